"""A report as data, and its Markdown form: the one text from which both report.md and report.html are made.

Called by report.py. Everything in a block is plain text; what a renderer's language would take for markup is
escaped there, so that no name, error message or idea can become markup.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Block", "Bullets", "Diff", "Heading", "Image", "Notice", "Paragraph", "Table", "to_markdown"]


@dataclass(frozen=True)
class Heading:
    """A heading; level 1 is the report's title."""

    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    text: str


@dataclass(frozen=True)
class Notice:
    """What a reader must not miss; `items` follow it as a list."""

    text: str
    items: Sequence[str] = ()


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table: the first column names the row."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Image:
    """A picture on disk, what can be seen on it, and how to read it."""

    path: Path
    alt: str
    caption: str


@dataclass(frozen=True)
class Diff:
    """Lines of a unified diff: the first character is a blank, a minus or a plus."""

    lines: Sequence[str]


Block = Heading | Paragraph | Notice | Bullets | Table | Image | Diff


def to_markdown(blocks: Iterable[Block], folder: Path) -> str:
    """Render as GitHub's Markdown.

    Args:
        blocks: The report.
        folder: Where the file will lie; pictures are named relative to it.
    """
    return "\n\n".join(_markdown(block, folder) for block in blocks) + "\n"


def _markdown(block: Block, folder: Path) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {escape(block.text)}"
    if isinstance(block, Paragraph):
        return escape(block.text)
    if isinstance(block, Notice):
        return "\n".join([f"> **{escape(block.text)}**", *(f"> - {escape(item)}" for item in block.items)])
    if isinstance(block, Bullets):
        return "\n".join(f"- {escape(item)}" for item in block.items)
    if isinstance(block, Image):
        place = block.path.relative_to(folder).as_posix()
        return f"![{escape(block.alt)}](<{place}>)\n\n*{escape(block.caption)}*"
    if isinstance(block, Diff):
        return "\n".join(["```diff", *(line.replace("`", "'") for line in block.lines), "```"])
    head = "| " + " | ".join(escape(name) for name in block.columns) + " |"
    rule = "|---" * len(block.columns) + "|"
    rows = ["| " + " | ".join(escape(cell) for cell in row) + " |" for row in block.rows]
    return "\n".join([f"**{escape(block.caption)}**", "", head, rule, *rows])


def escape(text: str) -> str:
    r"""Text on one line in which nothing is Markdown.

    >>> escape("a|b <i> q_learning")
    'a\\|b \\<i\\> q_learning'
    """
    line = " ".join(str(text).split())
    line = re.sub(r"([\\`*\[\]<>|])", r"\\\1", line)
    line = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", line)  # within a word it is no markup, and names have many
    line = re.sub(r"&(?=#?\w+;)", r"\\&", line)
    return re.sub(r"^(#+|[-+~=]+|\d+[.)])(?=\s|$)", r"\\\1", line)
