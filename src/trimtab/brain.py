"""Brain: a saved agent with the spec it was trained on and where it came from.

Called by the controller, the command line and users. On disk it is a folder of two files, neither of which can run
code: `brain.json` (agent, options, spec, provenance, a list of every tensor with shape and dtype, checksums)
and `weights.safetensors`. Everything is checked before anything is allocated.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from trimtab import brains, registry
from trimtab.agents.base import Agent
from trimtab.errors import BrainError, InputError, unknown_name
from trimtab.spec import ControlSpec, make_agent
from trimtab.storage import atomic_write

__all__ = ["Brain"]

FORMAT = "trimtab-brain"
VERSION = 1
_KEYS = {
    "format",
    "version",
    "agent",
    "options",
    "spec",
    "fingerprint",
    "state",
    "tensors",
    "sha256",
    "provenance",
    "checksum",
}
_MAX_JSON_BYTES = 1 << 20
_MAX_HEADER_BYTES = 1 << 16
_DTYPES = {"float64": torch.float64, "float32": torch.float32, "int64": torch.int64}


@dataclass(frozen=True)
class Brain:
    """An agent, the spec it was trained on, and where it came from.

    Attributes:
        agent: The agent, with what it learned.
        spec: What it was trained on and is used with.
        provenance: JSON-able: recipe, seeds, tasks, cost, versions; what is known.
    """

    agent: Agent
    spec: ControlSpec
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Brain({self.agent.name!r}, spec {self.spec.fingerprint})"

    @classmethod
    def load(cls, source: str | Path) -> Brain:
        """Load a brain by the name of one we ship or from its folder.

        We ship what `trimtab list brains` lists. "default", and "default-open" for runs whose horizon is unknown, are
        the rule `uwhg`, over a cosine and over a constant base, until a learned brain is shown to be better.

        Raises:
            BrainError: The folder holds no brain, or a broken, foreign or future one; nothing is executed.
        """
        shipped = brains.folder_of(source) if isinstance(source, str) else None
        if shipped is None and source in brains.RULES:
            agent = make_agent("uwhg", brains.RULES[str(source)])
            return cls(agent, ControlSpec.for_agent(agent), {"made_by": "no learning: the rule uwhg stands in"})
        folder = shipped or Path(source)
        data = _read_description(folder)
        try:
            spec = ControlSpec.from_json(data["spec"])
            if spec.fingerprint != data["fingerprint"]:
                raise BrainError(
                    f"its spec has the fingerprint {spec.fingerprint}, the file says {data['fingerprint']}; "
                    "it was changed after it was saved"
                )
            agent = make_agent(data["agent"], data["options"], n_knobs=spec.n_moved)
            agent.load_state_dict(_merge(data["state"], _read_weights(folder, data)))
        except (InputError, TypeError, AttributeError, ValueError, KeyError) as error:
            raise BrainError(f"the brain in {folder} cannot be used: {error}") from error
        return cls(agent, spec, data["provenance"])

    def save(self, directory: str | Path) -> Path:
        """Write the brain into a folder, each file whole or not at all, the description last.

        Returns:
            The folder.

        Raises:
            OutputError: The folder cannot be written.
        """
        folder = Path(directory)
        state, tensors = _split(self.agent.state_dict())
        raw = save_tensors(tensors)
        description = {
            "format": FORMAT,
            "version": VERSION,
            "agent": self.agent.name,
            "options": self.agent.options,
            "spec": self.spec.to_json(),
            "fingerprint": self.spec.fingerprint,
            "state": state,
            "tensors": {
                key: {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
                for key, value in tensors.items()
            },
            "sha256": hashlib.sha256(raw).hexdigest(),
            "provenance": dict(self.provenance),
        }
        description = json.loads(json.dumps(description))  # as it will be read: keys are texts, tuples are lists
        description["checksum"] = _checksum(description)
        atomic_write(folder / "weights.safetensors", raw)
        atomic_write(folder / "brain.json", json.dumps(description, indent=1) + "\n")
        return folder

    def check_spec(self, spec: ControlSpec) -> None:
        """Refuse to be used with a spec it was not trained on.

        Raises:
            BrainError: The fingerprints differ; the message names the fields.
        """
        if spec.fingerprint == self.spec.fingerprint:
            return
        mine, theirs = self.spec.to_json(), spec.to_json()
        keys = [*mine, *(key for key in theirs if key not in mine)]
        both = [(key, mine.get(key, False), theirs.get(key, False)) for key in keys]
        parts = [f"{key}: {here} here, {there} asked for" for key, here, there in both if here != there]
        raise BrainError(
            f"this brain was made for another spec ({'; '.join(parts)}); use it with its own, or learn a new one"
        )


def _checksum(description: Mapping[str, Any]) -> str:
    """SHA-256 of everything else in it: one changed digit of an option would make another agent."""
    rest = {key: value for key, value in description.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / "brain.json"
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise BrainError(f"{path} is larger than {_MAX_JSON_BYTES} bytes; that is no brain of ours")
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BrainError(
            f"no brain in {folder}: {path.name} is missing; expected a folder that Brain.save wrote, or 'default'"
        ) from error
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no text, no JSON, or no path
        raise BrainError(f"{path} cannot be read as JSON ({error}); it is torn or foreign, copy it anew") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise BrainError(f"{path} is not a brain: expected the format {FORMAT!r}")
    if data.get("version") != VERSION:
        raise BrainError(
            f"{path} has version {data.get('version')!r}, this trimtab reads version {VERSION}; upgrade trimtab"
        )
    _check_keys(path, data)
    return data


def _check_keys(path: Path, data: dict[str, Any]) -> None:
    for key in data:
        if key not in _KEYS:
            raise BrainError(f"{path}: {unknown_name('key', key, _KEYS)}")
    if missing := sorted(_KEYS - set(data)):
        raise BrainError(f"{path} lacks {', '.join(missing)}; it is torn, copy it anew")
    if data["checksum"] != _checksum(data):
        raise BrainError(f"{path} is not what was saved (checksum); copy it anew")
    for key in ("options", "spec", "state", "tensors", "provenance"):
        if not isinstance(data[key], dict):
            raise BrainError(f"{path}: {key} is a {type(data[key]).__name__}, expected an object; copy it anew")
    if str(data["agent"]) not in registry.entries("agent"):
        raise BrainError(f"{path}: {unknown_name('agent', data['agent'], registry.entries('agent'))}")


def _read_weights(folder: Path, data: dict[str, Any]) -> dict[str, torch.Tensor]:
    path = folder / "weights.safetensors"
    expected = 0
    for key, entry in data["tensors"].items():
        shape, dtype = entry["shape"], _DTYPES.get(entry["dtype"])
        if dtype is None or not all(isinstance(n, int) and 0 <= n < 1 << 31 for n in shape):
            raise BrainError(
                f"tensor {key!r} has dtype {entry['dtype']!r} and shape {shape}; expected one of {sorted(_DTYPES)}"
            )
        expected += math.prod(shape) * dtype.itemsize
    size = path.stat().st_size if path.exists() else -1
    if not expected <= size <= expected + _MAX_HEADER_BYTES:
        raise BrainError(f"{path.name} has {size} bytes where its tensors take {expected}; it is torn, copy it anew")
    raw = path.read_bytes()
    if hashlib.sha256(raw).hexdigest() != data["sha256"]:
        raise BrainError(f"{path.name} is not what was saved (checksum); copy it anew")
    try:
        tensors: dict[str, torch.Tensor] = load_tensors(raw)
    except SafetensorError as error:
        raise BrainError(f"{path.name}: {error}") from error
    found = {
        key: {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        for key, value in tensors.items()
    }
    if found != data["tensors"]:
        raise BrainError(f"{path.name} holds {found}, the description says {data['tensors']}")
    return tensors


def _split(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    tensors = {key: value.contiguous() for key, value in state.items() if isinstance(value, torch.Tensor)}
    return {key: value for key, value in state.items() if key not in tensors}, tensors


def _merge(state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {**state, **tensors}
