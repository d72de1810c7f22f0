"""What all pictures of a report share: colours, lines, panels, and the writing of a PNG.

Colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart; an arm keeps its colour in
every picture, and a placebo or a twin has its partner's colour with another line.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from trimtab.experiments.reading import Arm
from trimtab.storage import atomic_write

__all__ = ["GREY", "INK", "PALE", "Plot", "Style", "log_axis", "panels", "save", "slug", "styles"]

GREY, INK, PALE = "#8A8A8A", "#222222", "#C9C9C9"
_BLUE, _ORANGE, _GREEN, _PINK, _AMBER, _SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
_DECIDING = (_ORANGE, _BLUE, "#7B3FA0", _GREEN, _AMBER, _SKY)
_BASELINES = (_SKY, _GREEN, _AMBER, GREY, _PINK, "#7A5230")
_DASHES = ("-", (0, (5, 2)), (0, (5, 2, 1, 2)), (0, (7, 2, 1, 2, 1, 2)))
_DOTTED = (0, (1, 1.4))
_DPI = 130
_PANEL = (3.3, 2.5)  # inches: three beside each other are as wide as a page


@dataclass(frozen=True)
class Plot:
    """One picture of the report.

    Attributes:
        path: The PNG.
        kind: "loss", "knob", "reward", "sensitivity" or "differences".
        task: What it belongs to.
        alt: What can be seen, for those who cannot see it.
        caption: How to read it.
    """

    path: Path
    kind: str
    task: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Style:
    """Colour, dashes and width of an arm's line."""

    color: str
    dash: Any
    width: float


def slug(name: str) -> str:
    """A name that every file system takes: all but letters, digits, dot, plus, dash and underscore become a dash.

    >>> slug("yoked:q_learning")
    'yoked-q_learning'
    """
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", name).lstrip(".") or "unnamed"


def styles(arms: Sequence[Arm], tuned: str | None) -> dict[str, Style]:
    """Line of every arm: warm and thick for what decides, black for the tuned schedule, dashed for baselines."""
    found: dict[str, Style] = {}
    deciding = [arm for arm in arms if arm.decides]
    baselines = [arm for arm in arms if arm.kind == "baseline" and arm.id != tuned]
    for index, arm in enumerate(deciding):
        found[arm.id] = Style(_DECIDING[index % 6], _DASHES[index // 6 % 4], 2.2)
    for index, arm in enumerate(baselines):
        found[arm.id] = Style(_BASELINES[index % 6], _DASHES[(1 + index // 6) % 4], 1.5)
    if tuned is not None:
        found[tuned] = Style(INK, "-", 1.8)
    for arm in arms:
        if arm.id not in found:
            partner = found.get(arm.of or "", Style(GREY, "-", 1.6))
            found[arm.id] = Style(partner.color, _DOTTED if arm.kind == "placebo" else _DASHES[2], 1.6)
    return found


def panels(count: int, *, columns: int = 3, scale: float = 1.0, share_y: bool = True) -> tuple[Figure, list[Axes]]:
    """A grid of equal panels; places that are left over stay empty.

    Args:
        count: Panels.
        columns: At most so many beside each other.
        scale: Size of a panel relative to a third of a page.
        share_y: Whether all have one scale of values.
    """
    width = min(columns, count)
    height = -(-count // width)
    figure = Figure(figsize=(_PANEL[0] * scale * width + 0.4, _PANEL[1] * scale * height + 0.7), layout="constrained")
    grid = figure.subplots(height, width, squeeze=False, sharex=True, sharey=share_y)
    axes = [axis for row in grid for axis in row]
    for index, axis in enumerate(axes[count:], start=count):
        axis.set_visible(False)
        axes[index - width].xaxis.set_tick_params(labelbottom=True)  # the panel above is the last of its column
    for axis in axes[:count]:
        tidy(axis)
    return figure, axes[:count]


def tidy(axis: Axes) -> None:
    """No frame on top and right, a faint grid behind."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(True, color="#ECECEC", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8, color=GREY)
    axis.title.set_fontsize(10)


def log_axis(axis: Axes, which: str, values: Iterable[float]) -> None:
    """Make an axis logarithmic where all values are positive and differ; few ticks, plain numbers."""
    known = [value for value in values if value > 0]
    if not known or len(known) < len(list(values)) or max(known) <= 1.05 * min(known):
        return
    (axis.set_xscale if which == "x" else axis.set_yscale)("log")
    side = axis.xaxis if which == "x" else axis.yaxis
    ratio = max(known) / min(known)
    if ratio < 30:  # at powers of ten alone such an axis would have one tick or none
        side.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)) if ratio > 3 else MaxNLocator(4))
    side.set_major_formatter(lambda value, _: f"{value:g}")
    side.set_minor_formatter(NullFormatter())


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, facecolor="white", metadata={"Software": None})
    atomic_write(path, buffer.getvalue())
