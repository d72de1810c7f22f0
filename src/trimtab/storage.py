"""Files that are whole or not there: atomic writes, appended lines, states, and the folder of one run.

Called by the experiments, by brains and by checkpoints. A state is a nest of dicts, lists, tuples, JSON scalars
and tensors; it becomes one safetensors file whose header holds the nest as JSON, so that nothing that is loaded
can run code, and one rename replaces it.

    RUN/run.json         what was asked: arm, task, seed, settings         (first)
    RUN/series.jsonl     one line an interval: losses, signals, knobs as read back
    RUN/decisions.jsonl  one line a decision (records.Decision)
    RUN/checkpoint/state.safetensors   only while the run is under way
    RUN/brain/           what a learned arm had learned by the end
    RUN/result.json      what came out; it exists only when the run is over (last)
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import InputError, OutputError

if TYPE_CHECKING:
    import torch

__all__ = [
    "RunDirectory",
    "append_lines",
    "atomic_write",
    "load_state",
    "read_json",
    "read_lines",
    "remove_temporary",
    "save_state",
    "temporary_folder",
    "write_json",
]

_HEADER = "trimtab_state"
_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp")  # what mkstemp and mkdtemp make of the words below


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write a file under a temporary name beside its place, then rename it into place.

    Raises:
        OutputError: The folder cannot be made or written, or there is no space; nothing is left behind.
    """
    raw = data.encode() if isinstance(data, str) else data
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o666 & ~_umask())  # mkstemp makes files that nobody else may read
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; give a folder that can be written (--out) and has space"
        ) from error


def temporary_folder(folder: Path, name: str) -> Path:
    """Make a folder of a temporary name in another one, for files that are renamed out of it together.

    Raises:
        OSError: It cannot be made.
    """
    return Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".tmp", dir=folder))


def remove_temporary(folder: Path) -> None:
    """Remove what killed writers left under temporary names in a folder and all below it, links not followed.

    Nobody else may be writing there. What cannot be removed stays: it is in nobody's way.
    """
    for place, folders, files in os.walk(folder):
        for name in filter(_TEMPORARY.fullmatch, files):
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(place, name))
        for name in filter(_TEMPORARY.fullmatch, folders):
            shutil.rmtree(os.path.join(place, name), ignore_errors=True)


def _umask() -> int:
    """The process's mask of permissions; it can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically, NaN and infinities as null, keys in the order given."""
    atomic_write(path, json.dumps(_finite(data), indent=1, allow_nan=False) + "\n")


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    if isinstance(data, float) and (data != data or data in (float("inf"), float("-inf"))):
        return None
    return data


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: It is not there, or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}; expected a JSON file written by trimtab") from error


def append_lines(path: Path, rows: Iterable[Any]) -> None:
    """Append rows as lines of JSON, in one write.

    Raises:
        OutputError: The file cannot be written.
    """
    text = "".join(json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows)
    if not text:
        return
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}; is the disk full?") from error


def read_lines(path: Path) -> list[Any]:
    """Read lines of JSON; a last line without its line end (a killed writer) is dropped, a missing file is empty."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]
    rows = []
    for line in whole.splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break  # nothing behind a torn line can be trusted
    return rows


def save_state(path: Path, state: Any) -> None:
    """Write a nest of dicts, lists, tuples, JSON scalars and tensors as one safetensors file, atomically."""
    from safetensors.torch import save

    tensors: dict[str, torch.Tensor] = {}
    header = json.dumps(_flatten(state, tensors))
    atomic_write(path, save(tensors, metadata={_HEADER: header}))


def load_state(path: Path) -> Any:
    """Inverse of `save_state`; tensors come back on the CPU.

    Raises:
        InputError: The file is missing, truncated, or was not written by `save_state`.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            header = (file.metadata() or {}).get(_HEADER)
            if header is None:
                raise InputError(f"{path} holds no trimtab state; expected a file written by save_state")
            # Copies: what it gives lies in the file itself, and whoever shortens that later would end the process.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (safe_open is no dict)
        return _unflatten(json.loads(header), tensors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read the state in {path}: {error}; the file is missing, torn or foreign") from error


def _flatten(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        key = f"t{len(tensors)}"
        tensors[key] = value.detach().to("cpu", copy=True).contiguous()
        return {"$tensor": key}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _flatten(item, tensors) for key, item in value.items()}
        return {"$items": [[key, _flatten(item, tensors)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"$tuple": [_flatten(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_flatten(item, tensors) for item in value]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise TypeError(f"a state holds tensors and JSON scalars, not {type(value).__name__}")


def _unflatten(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_unflatten(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$tuple" in value:
        return tuple(_unflatten(item, tensors) for item in value["$tuple"])
    if "$items" in value:
        return {key: _unflatten(item, tensors) for key, item in value["$items"]}
    return {key: _unflatten(item, tensors) for key, item in value.items()}


class RunDirectory:
    """The folder of one run; see the head of this file for what lies in it.

    Args:
        path: The folder; made by `start`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.series = path / "series.jsonl"
        self.decisions = path / "decisions.jsonl"
        self.result = path / "result.json"
        self._state = path / "checkpoint" / "state.safetensors"

    def is_done(self) -> bool:
        """Whether the run is over and its result written."""
        return self.result.exists()

    def start(self, header: dict[str, Any]) -> None:
        """Begin the run from nothing: what an earlier, unfinished try left is removed."""
        if self.path.exists():
            shutil.rmtree(self.path)
        write_json(self.path / "run.json", header)

    def header(self) -> Any:
        """What `start` was given."""
        return read_json(self.path / "run.json")

    def checkpoint(self, state: dict[str, Any]) -> None:
        """Keep what is needed to go on: the state, and how many lines had been written by then."""
        counts = {"series": len(read_lines(self.series)), "decisions": len(read_lines(self.decisions))}
        save_state(self._state, {"counts": counts, "state": state})

    def resume(self) -> dict[str, Any] | None:
        """The last checkpoint's state, or None; lines written after it are removed, so they are not there twice."""
        if not self._state.exists() or not (self.path / "run.json").exists():
            return None
        try:
            saved = load_state(self._state)
        except InputError:
            return None  # torn by the machine, not by us: begin again
        for path, count in (
            (self.series, saved["counts"]["series"]),
            (self.decisions, saved["counts"]["decisions"]),
        ):
            rows = read_lines(path)
            if len(rows) < count:
                return None  # lines the checkpoint counts on are gone: begin again
            atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows[:count]))
        state: dict[str, Any] = saved["state"]
        return state

    def finish(self, result: dict[str, Any]) -> None:
        """Write the result, last of all, and drop the checkpoint."""
        write_json(self.result, result)
        shutil.rmtree(self._state.parent, ignore_errors=True)
