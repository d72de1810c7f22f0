"""Brain files: what an agent learned, as `brain.json` and `weights.safetensors`, neither of which can run code.

Called by `brain` and by `trimtab.pruner.policies`. The description lists every tensor with shape and dtype and has a
checksum of itself and of the weights. Everything is checked before anything is allocated.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from trimtab.errors import BrainError, unknown_name
from trimtab.storage import atomic_write

__all__ = ["kind_of", "read_description", "read_weights", "write"]

_OWN_KEYS = ("format", "version", "tensors", "sha256", "provenance", "checksum")
_MAX_JSON_BYTES = 1 << 20
_MAX_HEADER_BYTES = 1 << 16
_DTYPES = {"float64": torch.float64, "float32": torch.float32, "int64": torch.int64}


def write(
    directory: str | Path,
    description: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    *,
    kind: str,
    version: int,
) -> Path:
    """Write both files, each whole or not at all, the description last.

    Args:
        directory: The folder; made if it is missing.
        description: JSON-able: provenance, and whatever else the kind has.
        tensors: Contiguous, on the CPU.
        kind: What stands under "format".
        version: Of the kind.

    Returns:
        The folder.

    Raises:
        OutputError: The folder cannot be written.
    """
    folder = Path(directory)
    raw = save_tensors(dict(tensors))
    shapes = {
        key: {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        for key, value in tensors.items()
    }
    whole = {
        "format": kind,
        "version": version,
        **description,
        "tensors": shapes,
        "sha256": hashlib.sha256(raw).hexdigest(),
    }
    whole = json.loads(json.dumps(whole))  # as it will be read: keys are texts, tuples are lists
    whole["checksum"] = _checksum(whole)
    atomic_write(folder / "weights.safetensors", raw)
    atomic_write(folder / "brain.json", json.dumps(whole, indent=1) + "\n")
    return folder


def _checksum(description: Mapping[str, Any]) -> str:
    """SHA-256 of everything else in it: one changed digit of an option would make another agent."""
    rest = {key: value for key, value in description.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_description(
    folder: Path, *, kind: str, version: int, shipped: str, objects: Collection[str] = (), others: Collection[str] = ()
) -> dict[str, Any]:
    """Read and check `brain.json`.

    Args:
        folder: With both files.
        kind: The format that is expected.
        version: The newest that is known.
        shipped: Name of one that we ship, for those who gave no folder of one.
        objects: Keys of the kind that hold JSON objects.
        others: Its other keys.

    Raises:
        BrainError: The file is missing, broken, foreign, or of another version.
    """
    path = folder / "brain.json"
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise BrainError(f"{path} is larger than {_MAX_JSON_BYTES} bytes; that is no brain of ours")
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BrainError(
            f"no brain in {folder}: {path.name} is missing; expected a folder that trimtab wrote, or {shipped!r}"
        ) from error
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no text, no JSON, or no path
        raise BrainError(f"{path} cannot be read as JSON ({error}); it is torn or foreign, copy it anew") from error
    if not isinstance(data, dict) or data.get("format") != kind:
        found = data.get("format") if isinstance(data, dict) else None
        raise BrainError(f"{path} is not a brain: expected the format {kind!r}, got {found!r}")
    if data.get("version") != version:
        raise BrainError(
            f"{path} has version {data.get('version')!r}, this trimtab reads version {version}; upgrade trimtab"
        )
    keys = {*_OWN_KEYS, *objects, *others}
    for key in data:
        if key not in keys:
            raise BrainError(f"{path}: {unknown_name('key', key, keys)}")
    if missing := sorted(keys - set(data)):
        raise BrainError(f"{path} lacks {', '.join(missing)}; it is torn, copy it anew")
    if data["checksum"] != _checksum(data):
        raise BrainError(f"{path} is not what was saved (checksum); copy it anew")
    for key in (*objects, "tensors", "provenance"):
        if not isinstance(data[key], dict):
            raise BrainError(f"{path}: {key} is a {type(data[key]).__name__}, expected an object; copy it anew")
    return data


def kind_of(folder: Path) -> str:
    """What stands under "format" in a folder's description; empty where it cannot be read."""
    path = folder / "brain.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size <= _MAX_JSON_BYTES else None
    except (OSError, ValueError, RecursionError):
        return ""
    return str(data.get("format")) if isinstance(data, dict) else ""


def read_weights(folder: Path, data: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Read `weights.safetensors` as a checked description says it is.

    Raises:
        BrainError: It is anything else.
    """
    path = folder / "weights.safetensors"
    expected = 0
    for key, entry in data["tensors"].items():
        found = entry if isinstance(entry, dict) else {}
        shape, dtype = found.get("shape"), _DTYPES.get(str(found.get("dtype")))
        if (
            dtype is None
            or not isinstance(shape, list)
            or not all(isinstance(n, int) and 0 <= n < 1 << 31 for n in shape)
        ):
            raise BrainError(
                f"tensor {key!r} has dtype {found.get('dtype')!r} and shape {shape}; expected one of {sorted(_DTYPES)}"
            )
        expected += math.prod(shape) * dtype.itemsize
    size = path.stat().st_size if path.exists() else -1
    if not expected <= size <= expected + _MAX_HEADER_BYTES:
        raise BrainError(f"{path} has {size} bytes where its tensors take {expected}; it is torn, copy it anew")
    raw = path.read_bytes()
    if hashlib.sha256(raw).hexdigest() != data["sha256"]:
        raise BrainError(f"{path} is not what was saved (checksum); copy it anew")
    try:
        tensors: dict[str, torch.Tensor] = load_tensors(raw)
    except SafetensorError as error:
        raise BrainError(f"{path}: {error}") from error
    held = {
        key: {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        for key, value in tensors.items()
    }
    if held != data["tensors"]:
        raise BrainError(f"{path} holds {held}, the description says {data['tensors']}")
    return tensors
