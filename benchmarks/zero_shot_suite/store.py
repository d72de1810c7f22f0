"""What is kept of a part: one JSON file with every run's numbers, written whole or not at all.

{"format", "version", "part", "description", "options", "arms": {arm: identity}, "machine", "is_complete",
 "runs": {"ARM RATE ROLE INDEX": what `run_job` returned}}
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import trimtab
from trimtab.errors import InputError
from trimtab.storage import atomic_write, read_json
from zero_shot_suite.parts import Options, Part, find_part

__all__ = ["Kept", "load_all", "open_part"]

_FORMAT, _VERSION = "trimtab-zero-shot", 1


@dataclass
class Kept:
    """One part's file.

    Attributes:
        path: The file.
        part: The part.
        options: How much was asked for, the last time that the part was run.
        arms: Arm -> its identity at that time.
        runs: Key of a job -> its numbers.
        is_complete: Whether everything asked for is there.
        machine: Where the runs were made.
    """

    path: Path
    part: Part
    options: Options
    arms: dict[str, str] = field(default_factory=dict)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    is_complete: bool = False
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def brains(self) -> list[str]:
        """NAMEs of the arms brain:NAME."""
        return [arm.partition(":")[2] for arm in self.arms if arm.startswith("brain:")]

    @property
    def seconds(self) -> float:
        """CPU seconds of all runs that are kept."""
        return sum((float(run["seconds"]) for run in self.runs.values()), 0.0)

    def save(self) -> None:
        """Write the file.

        Raises:
            OutputError: It cannot be written; what was there before is untouched.
        """
        head = {
            "format": _FORMAT,
            "version": _VERSION,
            "part": self.part.name,
            "description": self.part.describe(),
            "options": self.options.to_json(),
            "arms": self.arms,
            "machine": self.machine,
            "is_complete": self.is_complete,
        }
        # One run a line: the file is read by people too, and a change of one run is a change of one line.
        rows = [f"  {json.dumps(key)}: {json.dumps(run, allow_nan=False)}" for key, run in sorted(self.runs.items())]
        text = json.dumps(head, indent=1, allow_nan=False).removesuffix("\n}")
        atomic_write(self.path, text + ',\n "runs": {\n' + ",\n".join(rows) + "\n }\n}\n")


def machine() -> dict[str, Any]:
    """What the numbers may depend on."""
    return {
        "trimtab": trimtab.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads_a_run": 1,
    }


def open_part(part: Part, folder: Path, options: Options, arms: Mapping[str, str]) -> Kept:
    """What is kept of a part, less the runs of arms that are not what they were; empty if there is no file.

    Args:
        part: The part.
        folder: Of the results.
        options: How much is asked for now.
        arms: Arm -> its identity now. Brains that are kept and not named now stay.

    Raises:
        InputError: The file is of the part with other settings, or cannot be read.
    """
    path = folder / f"{part.name}.json"
    kept = _read(path, part) if path.exists() else Kept(path, part, options)
    changed = {arm for arm, name in arms.items() if kept.arms.get(arm) not in (None, name)}
    kept.runs = {key: run for key, run in kept.runs.items() if run["arm"] not in changed}
    kept.arms |= arms
    kept.options = options
    kept.machine = machine()
    kept.is_complete = False
    return kept


def load_all(folder: Path) -> list[Kept]:
    """Every part that is kept in a folder, in the order of the parts.

    Raises:
        InputError: A file cannot be read, or there is none.
    """
    from zero_shot_suite.parts import PARTS

    found = [_read(folder / f"{name}.json", part) for name, part in PARTS.items() if (folder / f"{name}.json").exists()]
    if not found:
        raise InputError(f"{folder} holds no results of a part; run some first, or give their folder as --out")
    return found


def _read(path: Path, part: Part) -> Kept:
    data = read_json(path)
    if not isinstance(data, dict) or data.get("format") != _FORMAT or data.get("version") != _VERSION:
        raise InputError(f"{path} is not a file of this benchmark ({_FORMAT}, version {_VERSION}); move it away")
    now = find_part(part.name).describe()
    if data["description"] != now:
        before = data["description"]
        changed = [f"{key}: {before.get(key)} then, {now[key]} now" for key in now if before.get(key) != now[key]]
        raise InputError(
            f"{path} was made with other settings ({'; '.join(changed)}); move it away to run the part anew"
        )
    return Kept(
        path=path,
        part=part,
        options=Options(**data["options"]),
        arms=data["arms"],
        runs=data["runs"],
        is_complete=data["is_complete"],
        machine=data["machine"],
    )
