"""A folder of experience: append, list, read.

Called by what runs agents (it appends), by learners (they read) and by `trimtab list experience`.

    ROOT/FINGERPRINT/NUMBER-RUN_ID-TOKEN.safetensors   one file a run, written whole under a temporary name

Order: NUMBER is one more than the largest that stood in the folder when the file was begun. So a run that was stored
before another was begun comes before it; of those that were stored at once, which may share a number, the names decide.
It needs no lock, which a writer that hangs would hold, and no clock, and it survives copying, as times of files do not.
"""

from __future__ import annotations

import math
import os
import re
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import InputError, warn
from trimtab.experience.files import Header, encode, read_file, read_header
from trimtab.experience.transitions import Transitions, check_count
from trimtab.storage import atomic_write

__all__ = ["DEFAULT_FOLDER", "ExperienceStore", "Summary"]

DEFAULT_FOLDER = Path("runs", "experience")

_SUFFIX = ".safetensors"
_FINGERPRINT = re.compile(r"[A-Za-z0-9_-]{1,64}")
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:=+-]{0,149}")  # with number, token and endings a name of < 255 bytes
_NUMBER = re.compile(r"([0-9]{8,12})-")


@dataclass(frozen=True)
class Summary:
    """All runs of one spec.

    Attributes:
        fingerprint: Of the spec.
        runs: How many.
        transitions: Of all of them.
        knobs: Names, in order.
        signals: Names, in order.
        tasks: Different `task`s of their run information, sorted.
        mean_reward_sum: Mean over runs of the sum of a run's rewards.
    """

    fingerprint: str
    runs: int
    transitions: int
    knobs: tuple[str, ...]
    signals: tuple[str, ...]
    tasks: tuple[str, ...]
    mean_reward_sum: float


class ExperienceStore:
    """A folder of experience, to which any number of processes append and from which any number read.

    What a killed writer left under a temporary name is no part of it.

    Args:
        root: The folder; made by the first `append`.
    """

    def __init__(self, root: str | Path = DEFAULT_FOLDER) -> None:
        self.root = Path(root)

    def append(
        self,
        transitions: Transitions,
        *,
        spec: Mapping[str, Any],
        fingerprint: str,
        run: Mapping[str, Any] | None = None,
        run_id: str | None = None,
        replace: bool = False,
    ) -> Path:
        """Store the transitions of one run as a file of its own; no other file is touched unless `replace` says so.

        Args:
            transitions: Of one run, in the order of its decisions.
            spec: JSON-able, with `knobs` and `signals`, lists of names; one signal for each column of observations.
            fingerprint: Of the spec; files with the same are learned from together.
            run: JSON-able: task, seed, agent, study; what is known. Dates are the caller's, no clock is read here.
            run_id: Name for the run, such as "study-task-arm-seed"; drawn where it is None.
            replace: Take the place, in the order too, of the file last stored under `run_id`, if there is one, and
                remove earlier ones: for a run that is done again after an interruption.

        Returns:
            The file.

        Raises:
            InputError: Something given is not as described above.
            OutputError: The folder cannot be written; nothing is left behind.
        """
        if replace and run_id is None:
            raise InputError("replace=True needs the run_id of the run to replace")
        token = uuid.uuid4().hex[:12]
        if run_id is not None and not (isinstance(run_id, str) and _RUN_ID.fullmatch(run_id)):
            raise InputError(
                f"run_id {run_id!r}; expected 1 to 150 letters, digits or . _ : = + -, the first a letter or digit"
            )
        folder = self._folder(fingerprint)
        raw = encode(transitions, spec, fingerprint, run, run_id or token)
        there = self.files(fingerprint)
        same = [path for path in there if run_id and _stored_under(run_id).fullmatch(path.name)] if replace else []
        number = 1 + max([0, *map(_number, there)])
        # The token is drawn anew for each file, so that two writers never choose the same name.
        name = "-".join([f"{number:08d}", *([run_id] if run_id else []), token]) + _SUFFIX
        path = same[-1] if same else folder / name
        atomic_write(path, raw)
        for older in same[:-1]:
            older.unlink(missing_ok=True)
        return path

    def fingerprints(self) -> list[str]:
        """Of the specs that have a folder, sorted.

        Raises:
            InputError: The root is no folder, or cannot be read.
        """
        return [name for name in _names(self.root) if _FINGERPRINT.fullmatch(name) and (self.root / name).is_dir()]

    def files(self, fingerprint: str | None = None) -> list[Path]:
        """Files in the order in which they were stored (see the head of this module), of one spec or one after another.

        Files whose names were not given here come first. What is in them is not looked at.

        Raises:
            InputError: The fingerprint is none, or a folder cannot be read.
        """
        if fingerprint is None:
            return [path for name in self.fingerprints() for path in self.files(name)]
        folder = self._folder(fingerprint)
        paths = [folder / name for name in _names(folder) if name.endswith(_SUFFIX) and not name.startswith(".")]
        return sorted(paths, key=lambda path: (_number(path), path.name))

    def headers(self, fingerprint: str | None = None) -> list[Header]:
        """What the files say of themselves, in stored order; the columns are not read.

        A file that is torn, foreign or of a future version is left out, with a warning that names it.

        Raises:
            InputError: As `files`.
        """
        found = []
        for path in self.files(fingerprint):
            try:
                header = read_header(path)
                _check_place(header)
                found.append(header)
            except InputError as error:
                _warn_of(path, error)
        return found

    def summary(self) -> list[Summary]:
        """All runs of each spec, sorted by fingerprint; from the headers, with their warnings."""
        by_spec: dict[str, list[Header]] = {}
        for header in self.headers():
            by_spec.setdefault(header.fingerprint, []).append(header)
        return [
            Summary(
                fingerprint=fingerprint,
                runs=len(headers),
                transitions=sum(header.transitions for header in headers),
                knobs=tuple(headers[-1].spec["knobs"]),
                signals=tuple(headers[-1].spec["signals"]),
                tasks=tuple(sorted({str(header.run["task"]) for header in headers if "task" in header.run})),
                mean_reward_sum=math.fsum(header.reward_sum for header in headers) / len(headers),
            )
            for fingerprint, headers in by_spec.items()
        ]

    def read(
        self, fingerprint: str, *, newest: int | None = None, but: Collection[str] = (), columns: Collection[str] = ()
    ) -> Transitions:
        """Transitions of all runs that fit, in stored order, the newest last.

        A file that is torn, foreign or of a future version, that has not the columns asked for, or whose rows are not
        as wide as those of the newest one, is left out, with a warning that names it.

        Args:
            fingerprint: Of the spec.
            newest: At most so many transitions: runs are taken from the newest on, of the last one taken the end.
            but: Run ids to leave out; `headers` says which they are. Those that are not there do no harm.
            columns: Names of the extra columns wanted; others are left behind.

        Returns:
            The transitions; none, of width 0, where nothing is stored.

        Raises:
            InputError: An argument is not as described, or a folder cannot be read.
        """
        if newest is not None:
            check_count("newest", newest, least=1)
        for name, given in (("but", but), ("columns", columns)):
            if isinstance(given, str):
                raise InputError(f"{name} is the text {given!r}; expected a collection of names, such as [{given!r}]")
        parts: list[Transitions] = []
        room = math.inf if newest is None else newest
        for path in reversed(self.files(fingerprint)):
            if room <= 0:
                break
            try:
                header = read_header(path)
                _check_place(header)
                if header.run_id in but:
                    continue
                part = read_file(path)[1].with_extra(columns)
                if parts and part.widths != parts[0].widths:
                    raise InputError(
                        f"it has rows of {part.describe_row()}, newer runs of {parts[0].describe_row()}; "
                        "specs that differ need fingerprints that differ"
                    )
            except InputError as error:
                _warn_of(path, error)
                continue
            parts.append(part if room >= len(part) else part.newest(int(room)))
            room -= len(part)
        return Transitions.concatenate(parts[::-1]) if parts else Transitions.nothing(columns)

    def _folder(self, fingerprint: str) -> Path:
        if not isinstance(fingerprint, str) or not _FINGERPRINT.fullmatch(fingerprint):
            raise InputError(
                f"fingerprint {fingerprint!r}; expected 1 to 64 letters, digits or _ -, as ControlSpec.fingerprint"
            )
        return self.root / fingerprint


def _check_place(header: Header) -> None:
    folder = header.path.parent.name
    if header.fingerprint != folder:
        raise InputError(f"{header.path} is of the spec {header.fingerprint}, its folder is for {folder}; move it")


def _names(folder: Path) -> list[str]:
    """What is in a folder, sorted; nothing where it is not there yet."""
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(
            f"cannot read the experience in {folder}: {error.strerror or error}; give a folder that can be read"
        ) from error


def _number(path: Path) -> int:
    """Place of a file in the stored order, from its name; -1 for a name that was not given here."""
    found = _NUMBER.match(path.name)
    return int(found[1]) if found else -1


def _stored_under(run_id: str) -> re.Pattern[str]:
    """Names of the files of a run id."""
    return re.compile(rf"[0-9]{{8,12}}-{re.escape(run_id)}-[0-9a-f]{{12}}{re.escape(_SUFFIX)}")


def _warn_of(path: Path, error: InputError) -> None:
    """Say that a file is left out; one that was removed since it was listed (replaced, by its name) is not there."""
    if os.path.lexists(path):
        text = str(error)
        warn(f"left out: {text if str(path) in text else f'{path}: {text}'}")
