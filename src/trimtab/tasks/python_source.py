"""Character sequences from the source text of Python's standard library: which character comes next.

Called by `families`. The text is that of the running interpreter's own modules, reduced to 32 classes of characters; no
other file is read. Windows lie side by side, without overlap, and a row of characters that occurs again is left out, so
that no window, and no row, is in two splits.
"""

from __future__ import annotations

import sysconfig
from functools import lru_cache
from importlib.machinery import PathFinder

import numpy as np
import numpy.typing as npt

from trimtab.errors import InputError
from trimtab.tasks.pools import Pool, Sizes

__all__ = ["ALPHABET", "CONTEXTS", "MODULES", "python_source", "read_codes"]

# One class each: letters without their case, digits, blanks, ends of lines, "_", brackets, and all other signs.
ALPHABET = "abcdefghijklmnopqrstuvwxyz0 \n_(."
CONTEXTS = {8: 0.5, 16: 0.35, 24: 0.15}  # characters of a row: how likely
# Modules of one file in every Python from 3.10 to 3.13, most of them of 10 to 100 thousand characters.
MODULES = (
    "argparse", "ast", "bdb", "calendar", "cmd", "configparser", "copy", "csv", "dataclasses", "difflib", "doctest",
    "enum", "fileinput", "fractions", "ftplib", "functools", "getopt", "gettext", "gzip", "heapq", "imaplib", "inspect",
    "ipaddress", "locale", "mailbox", "netrc", "optparse", "pdb", "pickletools", "plistlib", "poplib", "pprint",
    "pstats", "random", "shlex", "shutil", "smtplib", "socket", "socketserver", "ssl", "statistics", "subprocess",
    "tarfile", "tempfile", "textwrap", "threading", "timeit", "tokenize", "trace", "turtle", "typing", "uuid",
    "warnings", "weakref",
)  # fmt: skip


def python_source(generator: np.random.Generator, sizes: Sizes, context: int | None = None) -> Pool:
    """Windows of a few modules, in random order: T characters, and the one after them.

    Modules are taken in a drawn order until there are enough different rows; a window begins T + 1 characters after the
    one before, the first at a drawn place.

    Args:
        generator: What everything is drawn from.
        sizes: Rows of each split.
        context: T; None draws one of `CONTEXTS`.

    Returns:
        Inputs (N, T) of class numbers, as floats; targets (N,) class numbers of the next character.

    Raises:
        InputError: The interpreter has not the source of its standard library.
    """
    own_context = list(CONTEXTS)[int(generator.choice(len(CONTEXTS), p=list(CONTEXTS.values())))]
    context = own_context if context is None else context
    start = int(generator.integers(context + 1))
    windows = np.zeros((0, context + 1), np.uint8)
    n_modules = 0
    for place in generator.permutation(len(MODULES)):
        codes = read_codes(MODULES[place])[start:]
        windows = np.concatenate(
            [windows, codes[: len(codes) // (context + 1) * (context + 1)].reshape(-1, context + 1)]
        )
        _, first = np.unique(windows[:, :context], axis=0, return_index=True)
        windows = windows[np.sort(first)]
        n_modules += 1
        if len(windows) >= sizes.total:
            break
    rows = windows[generator.permutation(len(windows))[: sizes.total]]
    drawn: dict[str, float | str] = {"context": context, "n_modules": n_modules}
    return Pool(rows[:, :context].astype(np.float32), rows[:, context].astype(np.int64), len(ALPHABET), drawn, "none")


@lru_cache(maxsize=len(MODULES))
def read_codes(name: str) -> npt.NDArray[np.uint8]:
    """A module's text as numbers of classes, (n,); blanks side by side are one, lines' ends with what is indented too.

    Args:
        name: One of `MODULES`.

    Raises:
        InputError: Its source is not there, as where Python came without.
    """
    folder = sysconfig.get_path("stdlib")
    spec = PathFinder.find_spec(name, [folder])
    text = None if spec is None or spec.loader is None else getattr(spec.loader, "get_source", lambda _: None)(name)
    if not text:
        raise InputError(
            f"the source of Python's module {name!r} is not in {folder}, but the families on python-source read it; "
            "take a Python with its sources, or other families"
        )
    lines = (" ".join(line.split()) for line in text.lower().splitlines())
    codes = np.frombuffer("\n".join(line for line in lines if line).encode("ascii", "replace"), np.uint8)
    table: npt.NDArray[np.uint8] = _table()[codes]
    table.setflags(write=False)
    return table


def _table() -> npt.NDArray[np.uint8]:
    """Class of each ASCII character."""
    table = np.full(128, ALPHABET.index("."), np.uint8)
    for place, character in enumerate(ALPHABET):
        table[ord(character)] = place
    for like, characters in (("0", "123456789"), ("(", ")[]{}")):
        table[[ord(character) for character in characters]] = ALPHABET.index(like)
    return table
