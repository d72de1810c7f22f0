"""One file of experience: how it is written, and what is looked at before it is believed.

Called by the store. It is a safetensors file: a tensor for each column, and in the metadata a header as JSON text, with
a checksum of the text and, in it, one of the columns; docs/experience.md has every key. Loading runs no code, and what
the header says is checked against the file's size before anything is allocated.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import InputError
from trimtab.experience.transitions import COLUMNS, EXTRA_NAME, EXTRA_TYPES, Transitions

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["Header", "encode", "read_file", "read_header"]

FORMAT = "trimtab-experience"
VERSION = 1

_METADATA = {"format", "version", "header", "sha256"}
_KEYS = {"fingerprint", "run_id", "spec", "run", "transitions", "reward_sum", "sha256"}
_MAX_HEADER_BYTES = 1 << 20  # a spec takes about 2 KB
_BYTES = {"F32": ("float32", 4), "F64": ("float64", 8), "I64": ("int64", 8), "BOOL": ("bool", 1)}  # safetensors' names


@dataclass(frozen=True)
class Header:
    """What a file of experience says of itself.

    Attributes:
        path: The file.
        fingerprint: Of the spec.
        run_id: What the run was stored under; several files may have the same.
        spec: Of the run, as JSON; its `knobs` and `signals` are lists of names.
        run: What else was told of the run (task, seed, agent, study), as JSON.
        transitions: How many there are.
        reward_sum: Sum of the rewards.
        columns: Type and shape of every column, by its name.
        sha256: Of the columns; compared when they are read, not before.
    """

    path: Path
    fingerprint: str
    run_id: str
    spec: Mapping[str, Any]
    run: Mapping[str, Any]
    transitions: int
    reward_sum: float
    columns: Mapping[str, tuple[str, tuple[int, ...]]]
    sha256: str


def read_header(path: str | Path) -> Header:
    """What one file says of itself; the columns are not read, nor compared with their checksum.

    Raises:
        InputError: It is missing, torn, foreign, or of a future version.
    """
    path = Path(path)
    try:
        if not path.is_file():  # to open a pipe or a device would be to wait for it
            raise _unreadable(path, "there is no such file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise _unreadable(path, f"its {size} bytes hold no header of safetensors")
            raw = file.read(length)
        return _parse(path, raw, size - 8 - length)
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error


def read_file(path: str | Path) -> tuple[Header, Transitions]:
    """Read one file: what it says of itself, and all its columns.

    Raises:
        InputError: It is missing, torn, foreign, of a future version, or not what was stored.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    path = Path(path)
    header = read_header(path)
    try:
        columns = load(path.read_bytes())
        if _digest(columns) != header.sha256:
            raise InputError("its columns are not what was stored (checksum)")
        return header, Transitions.from_columns(columns)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise _unreadable(path, str(error)) from error


def encode(
    transitions: Transitions, spec: Mapping[str, Any], fingerprint: str, run: Mapping[str, Any] | None, run_id: str
) -> bytes:
    """The whole file.

    Raises:
        InputError: Spec or run are not JSON, not as described, or too large.
    """
    from safetensors.numpy import save

    if not isinstance(transitions, Transitions):
        raise InputError(f"transitions is a {type(transitions).__name__}; expected trimtab.experience.Transitions")
    given = {"spec": _as_json("spec", spec), "run": _as_json("run", {} if run is None else run)}
    if problem := _wrong_with_names(given["spec"], transitions.observations.shape[1]):
        raise InputError(problem)
    try:
        reward_sum = math.fsum(transitions.rewards.tolist())
    except OverflowError as error:
        raise InputError("the sum of the rewards is larger than any float; scale them") from error
    columns = transitions.columns
    data = {
        "fingerprint": fingerprint,
        "run_id": run_id,
        **given,
        "transitions": len(transitions),
        "reward_sum": reward_sum,
        "sha256": _digest(columns),
    }
    text = json.dumps(data)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "header": text,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    raw: bytes = save(columns, metadata=metadata)
    length = int.from_bytes(raw[:8], "little")
    if length > _MAX_HEADER_BYTES:
        raise InputError(f"spec, run and columns take {length} bytes as JSON, at most {_MAX_HEADER_BYTES}; tell less")
    return raw


def _parse(path: Path, raw: bytes, n_bytes: int) -> Header:
    """The header of a file, from the text of safetensors and the number of bytes behind it."""
    try:
        table = json.loads(raw.decode(), parse_constant=_refuse_constant)
        metadata = table.pop("__metadata__", None) if isinstance(table, dict) else None
        if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
            raise InputError(f"{path} is no experience: expected a safetensors file of the format {FORMAT!r}")
        if metadata.get("version") != str(VERSION):
            raise InputError(
                f"{path} has version {metadata.get('version')} of the format, this trimtab reads version {VERSION}; "
                "upgrade trimtab"
            )
        if set(metadata) != _METADATA or not isinstance(metadata["header"], str):
            raise _unreadable(path, f"its metadata have the keys {sorted(metadata)}, expected {sorted(_METADATA)}")
        if hashlib.sha256(metadata["header"].encode()).hexdigest() != metadata["sha256"]:
            raise _unreadable(path, "its header is not what was stored (checksum)")
        data = json.loads(metadata["header"], parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # ValueError: no text, or no JSON
        if isinstance(error, InputError):
            raise
        raise _unreadable(path, f"its header is no JSON ({error})") from error
    if not isinstance(data, dict) or set(data) != _KEYS:
        found = sorted(data) if isinstance(data, dict) else type(data).__name__
        raise _unreadable(path, f"its header has the keys {found}, expected {sorted(_KEYS)}")
    columns = _parse_columns(path, table, n_bytes)
    if problem := _wrong_in(data, columns):
        raise _unreadable(path, problem)
    return Header(path=path, columns=columns, **data)


def _parse_columns(path: Path, table: dict[str, Any], n_bytes: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of every column, once they are known to take just the bytes that there are."""
    columns, taken = {}, 0
    for name, entry in table.items():
        kind, shape = (entry.get("dtype"), entry.get("shape")) if isinstance(entry, dict) else (None, None)
        is_shape = isinstance(shape, list) and all(type(n) is int and 0 <= n < 1 << 31 for n in shape)
        if not isinstance(kind, str) or kind not in _BYTES or not isinstance(shape, list) or not is_shape:
            raise _unreadable(path, f"column {name!r} has dtype {kind!r} and shape {shape!r}")
        dtype, size = _BYTES[kind]
        columns[name] = (dtype, tuple(shape))
        taken += math.prod(shape) * size
    if taken != n_bytes:
        raise _unreadable(path, f"it has {n_bytes} bytes where its columns take {taken}")
    return columns


def _wrong_in(data: dict[str, Any], columns: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    """What a header that was stored whole says wrongly, so that a foreign writer must have made it; or nothing."""
    kinds = {"fingerprint": str, "run_id": str, "spec": dict, "run": dict, "transitions": int, "sha256": str}
    for key, kind in {**kinds, "reward_sum": float}.items():
        if type(data[key]) is not kind:
            return f"{key} in its header is a {type(data[key]).__name__}, expected a {kind.__name__}"
    if missing := [name for name in COLUMNS if name not in columns]:
        return f"it has no column {missing[0]!r}"
    for name, (dtype, shape) in columns.items():
        types, letters = COLUMNS.get(name, (EXTRA_TYPES, None))
        if dtype not in types or (letters is not None and len(shape) != len(letters)):
            return f"column {name!r} is {dtype} of shape {shape}"
        if shape[:1] != (data["transitions"],):
            return f"column {name!r} has the shape {shape}, its header says {data['transitions']} transitions"
        if letters is None and not EXTRA_NAME.fullmatch(name):
            return f"column {name!r} has no name of an extra column"
    if columns["observations"] != columns["next_observations"]:
        return "'observations' and 'next_observations' differ in type or shape"
    return _wrong_with_names(data["spec"], columns["observations"][1][1])


def _wrong_with_names(spec: Mapping[str, Any], width: int) -> str:
    """Why a spec's names do not go with observations of this width; or nothing."""
    for key in ("knobs", "signals"):
        names = spec.get(key)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            return f"{key} of the spec is {names!r}, expected a list of names"
    if len(spec["signals"]) != width:
        return f"the spec names {len(spec['signals'])} signals, observations have {width} columns"
    return ""


def _digest(columns: Mapping[str, npt.NDArray[Any]]) -> str:
    """SHA-256 of the columns in the order of their names: each name, type, shape, and all bytes."""
    digest = hashlib.sha256()
    for name in sorted(columns):
        column = columns[name]
        digest.update(f"{name} {column.dtype.name} {column.shape}\n".encode())
        digest.update(column.tobytes())
    return digest.hexdigest()


def _as_json(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """As it will be read: keys are texts, tuples are lists."""
    try:
        plain = json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{name} cannot be written as JSON ({error}); give a mapping of plain values") from error
    return dict(plain)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _unreadable(path: Path, why: str) -> InputError:
    return InputError(f"cannot read the experience in {path}: {why}; copy it anew, or remove it")
