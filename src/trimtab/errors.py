"""Every exception that trimtab raises on purpose.

    TrimtabError
    ├── InputError (ValueError)      what was given is wrong; nothing was started, nothing is left behind
    │   ├── UnknownNameError         a name that no registry, schema or table knows, with "did you mean"
    │   ├── MissingDataError         a data set that is not where it was looked for
    │   ├── MissingExtraError        an optional package that is not installed
    │   ├── BrainError               a brain file that is broken or was made for something else
    │   └── OutputError              an output folder that is taken or cannot be written
    ├── ConflictError (RuntimeError) somebody else writes the value that a knob owns
    └── RunFailedError (RuntimeError) something that was asked for was started and did not come to its end

The command line maps InputError to exit code 2 and every other TrimtabError to 1.
"""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable

__all__ = [
    "BrainError",
    "ConflictError",
    "InputError",
    "MissingDataError",
    "MissingExtraError",
    "OutputError",
    "RunFailedError",
    "TrimtabError",
    "UnknownNameError",
    "unknown_name",
    "warn",
]


class TrimtabError(Exception):
    """Base of every exception that trimtab raises on purpose."""


class InputError(TrimtabError, ValueError):
    """What was given is wrong: the message says what was given, what was expected and what to do."""


class UnknownNameError(InputError):
    """A name that is not known where it was used."""


class MissingDataError(InputError):
    """A data set that is not where it was looked for."""


class MissingExtraError(InputError):
    """An optional package that this part needs is not installed."""


class BrainError(InputError):
    """A brain on disk is broken, too new, or was made for another spec."""


class OutputError(InputError):
    """An output folder is taken, or cannot be written."""


class ConflictError(TrimtabError, RuntimeError):
    """Two writers of one value: a knob does not hold what its controller wrote."""


class RunFailedError(TrimtabError, RuntimeError):
    """Something that was asked for was started and did not come to its end."""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UnknownNameError:
    """Build the error for a name that is not known.

    Args:
        kind: What the name stands for, in the singular: "knob", "task", "key in the study file".
        name: The name as it was given.
        known: Every name that would have been right.

    Returns:
        The error, ready to be raised, with the nearest known name where one is near.

    >>> str(unknown_name("knob", "lrr", ["lr", "weight_decay"]))
    "unknown knob 'lrr'; did you mean 'lr'? known: lr, weight_decay"
    """
    names = sorted(known)
    given = str(name)
    aliases = {"learning_rate": "lr", "learningrate": "lr", "wd": "weight_decay"}
    near = [aliases[given.lower()]] if aliases.get(given.lower()) in names else []
    near = near or difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return UnknownNameError(f"unknown {kind} {given!r}{hint} known: {', '.join(names) or 'none'}")


def warn(message: str) -> None:
    """Give a RuntimeWarning that points at the line of the user's code which called into trimtab."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).startswith("trimtab"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, RuntimeWarning, stacklevel=level)
