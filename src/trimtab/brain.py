"""Brain: a saved agent with the spec it was trained on and where it came from.

Called by the controller, the command line and users. On disk it is a folder of two files, neither of which can run
code: `brain.json` (agent, options, spec, provenance, a list of every tensor with shape and dtype, checksums)
and `weights.safetensors`. Everything is checked before anything is allocated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trimtab import brain_files, brains, registry
from trimtab.agents.base import Agent
from trimtab.errors import BrainError, InputError, unknown_name
from trimtab.spec import ControlSpec, make_agent

__all__ = ["Brain"]

FORMAT = "trimtab-brain"
VERSION = 1
_OBJECTS = ("options", "spec", "state")


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
        data = brain_files.read_description(
            folder, kind=FORMAT, version=VERSION, shipped="default", objects=_OBJECTS, others=("agent", "fingerprint")
        )
        if str(data["agent"]) not in registry.entries("agent"):
            raise BrainError(
                f"{folder / 'brain.json'}: {unknown_name('agent', data['agent'], registry.entries('agent'))}"
            )
        try:
            spec = ControlSpec.from_json(data["spec"])
            if spec.fingerprint != data["fingerprint"]:
                raise BrainError(
                    f"its spec has the fingerprint {spec.fingerprint}, the file says {data['fingerprint']}; "
                    "it was changed after it was saved"
                )
            agent = make_agent(data["agent"], data["options"], n_knobs=spec.n_moved)
            agent.load_state_dict(_merge(data["state"], brain_files.read_weights(folder, data)))
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
        state, tensors = _split(self.agent.state_dict())
        description = {
            "agent": self.agent.name,
            "options": self.agent.options,
            "spec": self.spec.to_json(),
            "fingerprint": self.spec.fingerprint,
            "state": state,
            "provenance": dict(self.provenance),
        }
        return brain_files.write(directory, description, tensors, kind=FORMAT, version=VERSION)

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


def _split(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    tensors = {key: value.contiguous() for key, value in state.items() if isinstance(value, torch.Tensor)}
    return {key: value for key, value in state.items() if key not in tensors}, tensors


def _merge(state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {**state, **tensors}
