"""Tasks of a user's own, from a Python file named on the command line: FILE.py:NAME.

Called by trimtab.experiments.run. The file is run as any script is, so it is taken from whoever starts the study alone,
never from a study file or a folder that is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from trimtab import registry
from trimtab.errors import InputError
from trimtab.tasks.base import Task

__all__ = ["register_own"]

_MARK = ".py"


def register_own(given: Sequence[str], scale: str) -> tuple[list[str], dict[str, str]]:
    """Register the tasks that are named with their file, and check that they are tasks; other names stay as they are.

    Args:
        given: Names of tasks, or FILE.py:NAME, where NAME is a function that takes a scale and gives a `Task`.
        scale: Which the study asks for.

    Returns:
        Names, for each FILE.py:NAME its NAME; and NAME -> SHA-256 of its file.

    Raises:
        InputError: A file cannot be imported, has no such function, or it gives no task; or the name is taken.
    """
    names, files = [], {}
    for text in map(str.strip, given):
        file, _, name = text.rpartition(":")
        if text.endswith(_MARK):
            raise InputError(f"tasks: {text} names no task in it; give {text}:NAME, a function that takes a scale")
        if not file.endswith(_MARK):
            names.append(text)
            continue
        path = Path(file).expanduser().absolute()
        _check(path, name, scale)
        _register(path, name)
        names.append(name)
        files[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return names, files


def _check(path: Path, name: str, scale: str) -> None:
    module = registry.import_file(path)
    make = getattr(module, name, None)
    if not callable(make):
        known = sorted(
            key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__
        )
        raise InputError(f"{path} has no function {name!r}; it has: {', '.join(known) or 'none'}")
    try:
        task = make(scale)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: {name}({scale!r}) raised {type(error).__name__}: {error}") from error
    if not isinstance(task, Task):
        raise InputError(
            f"{path}: {name}({scale!r}) gave {type(task).__name__}; expected a trimtab.tasks.base.Task for the scale"
        )


def _register(path: Path, name: str) -> None:
    target = f"{path}:{name}"
    there = registry.entries("task").get(name)
    if there is None:
        registry.add("task", name, target, f"from {path.name}")
    elif there.target != target:
        raise InputError(f"{path}: a task {name!r} is there already; give the function another name")
