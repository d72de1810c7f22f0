"""The folder that a long piece of work fills, and goes on in after an interruption.

Called by the experiments and by the learning of brains. The folder has a plan, a JSON file that is written first and
says what was asked for; one process at a time has the folder to itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import InputError, OutputError, RunFailedError
from trimtab.storage import remove_temporary

__all__ = ["WorkFolder", "nothing_is_bad_input", "where_they_differ"]


@dataclass(frozen=True)
class WorkFolder:
    """A folder, and what is done in it.

    Attributes:
        path: The folder.
        plan: Name of the file in it that is written first.
        what: What fills it, such as "study".
        doing: The same as something that goes on, such as "running a study".
        is_resumable: Whether --resume goes on from what is there.
    """

    path: Path
    plan: str
    what: str
    doing: str
    is_resumable: bool = True

    def is_begun(self, resume: bool) -> bool:
        """Whether the work was begun before.

        Args:
            resume: Whether to go on with it; otherwise the folder must be missing or empty.

        Raises:
            OutputError: It is taken, foreign, no folder, or cannot be read.
        """
        out = self.path
        if out.exists() and not out.is_dir():
            raise OutputError(f"{out} is a file; give a folder (--out)")
        try:
            content = self._content()
        except OSError as error:
            raise OutputError(f"cannot read the folder {out}: {error.strerror or error}") from error
        if not content:
            return False
        if not resume:
            go_on = "go on from what is there with --resume, or " if self.is_resumable else ""
            raise OutputError(f"{out} is not empty; {go_on}give another --out")
        if not (out / self.plan).is_file():
            raise OutputError(
                f"{out} holds files but no {self.plan}, so it is no {self.what}'s folder; give another --out"
            )
        return True

    def _content(self) -> list[str]:
        """What is in it, without what a killed process left of its first file."""
        if not self.path.exists():
            return []
        return [name for name in os.listdir(self.path) if not name.startswith(f".{self.plan}.")]

    @contextlib.contextmanager
    def hold(self, resume: bool) -> Iterator[None]:
        """Have the folder, for this process alone; what was made of it is taken away if nothing came into it.

        What killed processes left in it under temporary names is removed: with the folder held, nobody writes there.

        Args:
            resume: Whether something may be in it.

        Raises:
            OutputError: Another process has it, or has just filled it, or it cannot be made or written.
        """
        out = self.path
        made = [path for path in (out, *out.parents) if not path.exists()]
        handle = None
        try:
            try:
                out.mkdir(parents=True, exist_ok=True)
                handle = os.open(out, os.O_RDONLY)
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise OutputError(f"another process is {self.doing} in {out}; wait for it, or end it") from error
            except OSError as error:
                raise OutputError(
                    f"cannot write {out}: {error.strerror or error}; give a folder that can be written (--out)"
                ) from error
            if not resume and self._content():
                raise OutputError(f"{out} has just been filled by another process; give another --out")
            remove_temporary(out)
            yield
        except BaseException:
            for path in made:
                with contextlib.suppress(OSError):  # it holds something by now, and is kept
                    path.rmdir()
            raise
        finally:
            if handle is not None:
                os.close(handle)  # and the lock with it


def where_they_differ(path: str, old: Any, new: Any) -> str:
    """Say where the plan in a folder and what is asked for now differ first.

    Args:
        path: Name of the part that differs.
        old: What is there.
        new: What is asked for.

    >>> where_they_differ("settings", {"lr": 0.1, "every": 2}, {"lr": 0.1, "every": 3})
    'settings.every is 2 there, 3 is asked for now'
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            if old.get(key) != new.get(key):
                return where_they_differ(f"{path}.{key}", old.get(key), new.get(key))
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (ours, theirs) in enumerate(zip(old, new, strict=True)):
            if ours != theirs:
                name = ours.get("id", index) if isinstance(ours, dict) else index
                return where_they_differ(f"{path}.{name}", ours, theirs)
    return f"{path} is {old!r} there, {new!r} is asked for now"


@contextlib.contextmanager
def nothing_is_bad_input() -> Iterator[None]:
    """From here on work has been done: an error is a failure, not a question of what was given.

    Raises:
        RunFailedError: Instead of an InputError.
    """
    try:
        yield
    except InputError as error:
        raise RunFailedError(str(error)) from error
