"""The picture of learning: return against what was trained, and the loss relative to uwhg's, family by family.

Called by trimtab.learning.report.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from scipy import stats

from trimtab.agents.base import Array
from trimtab.storage import atomic_write

__all__ = ["LEAST_SEEDS", "draw", "make_figure", "mean_and_interval", "validations"]

LEAST_SEEDS = 5  # with fewer, an interval of the mean says next to nothing
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")  # Okabe and Ito (2008)
_GREY = "#8A8A8A"

Lines = Sequence[tuple[Array, Array]]


def draw(learners: Sequence[Sequence[Mapping[str, Any]]], held_out: Sequence[str], path: Path) -> None:
    """Draw a PNG from the lines of the learners' curves; see `make_figure`.

    Args:
        learners: Rows of curve.jsonl of each learner.
        held_out: Families that were not trained on.
        path: The file.
    """
    buffer = io.BytesIO()
    make_figure(learners, held_out).savefig(
        buffer, format="png", dpi=130, facecolor="white", metadata={"Software": None}
    )
    atomic_write(path, buffer.getvalue())


def make_figure(learners: Sequence[Sequence[Mapping[str, Any]]], held_out: Sequence[str]) -> Figure:
    """Two panels, a colour for each family: return, and final loss relative to uwhg's, against decisions taken.

    The return is that of validation: 1 - rank / 2, where the rank is that among the agent, uwhg and the cosine in the
    same run; 0.5 means better than both in every run. (With ranks among its own runs as reward, the mean return in
    training is 0 by construction and shows nothing.) Ratios are averaged as logarithms, their interval too. Families
    that were held out are dashed.

    Args:
        learners: Rows of curve.jsonl of each learner.
        held_out: Families that were not trained on.
    """
    looks = [validations(rows) for rows in learners]
    families = list(looks[0][0]["families"])
    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _panel(left, "decisions taken in training", "return on validation tasks")
    for index, family in enumerate(families):
        style = "--" if family in held_out else "-"
        label = f"{family} (held out)" if family in held_out else family
        color = _COLORS[index % len(_COLORS)]
        returns = [(_at(rows), 1 - 0.5 * _numbers(rows, family, "mean_rank")) for rows in looks]
        _lines(left, returns, color, style, label)
        ratios = [(_at(rows), _numbers(rows, family, "ratio_uwhg")) for rows in looks]
        _lines(right, ratios, color, style, label, are_ratios=True)
    _panel(right, "decisions taken in training", "final loss / uwhg's")
    right.axhline(1.0, color=_GREY, linewidth=1)
    left.axhline(0.0, color=_GREY, linewidth=1)
    left.set_ylim(-0.53, 0.53)
    ratios_seen = [row["families"][family]["ratio_uwhg"] for rows in looks for row in rows for family in families]
    if max(ratios_seen) > 3 * min(ratios_seen):
        right.set_yscale("log")
        right.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
        right.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        right.yaxis.set_minor_formatter(NullFormatter())
    right.legend(frameon=False, fontsize=8)
    return figure


def mean_and_interval(values: Array) -> tuple[Array, Array | None]:
    """Mean over learners, and half the width of its 95 % t-interval; (L, V) -> (V,), (V,); None below five learners."""
    mean: Array = values.mean(axis=0)
    count = len(values)
    if count < LEAST_SEEDS:
        return mean, None
    factor = float(stats.t.ppf(0.975, count - 1)) / np.sqrt(count)
    return mean, np.asarray(factor * values.std(axis=0, ddof=1))


def validations(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The validations of one learner, from the lines of its curve, each with `taken`, the decisions taken before it."""
    taken, found = 0.0, []
    for row in rows:
        if row.get("validation"):
            found.append({**row, "taken": taken})
        else:
            taken += row["n_decisions"]
    return found


def _at(rows: Sequence[Mapping[str, Any]]) -> Array:
    return np.array([row["taken"] for row in rows], dtype=np.float64)


def _numbers(rows: Sequence[Mapping[str, Any]], family: str, name: str) -> Array:
    return np.array([row["families"][family][name] for row in rows], dtype=np.float64)


def _lines(axis: Axes, lines: Lines, color: str, style: str, label: str, *, are_ratios: bool = False) -> None:
    """Learners as thin lines, their mean as a thick one, its interval as a band; of ratios both are of logarithms."""
    for at, values in lines:
        axis.plot(at, values, color=color, linestyle=style, linewidth=0.7, alpha=0.5)
    at = lines[0][0]  # all learners validate at the same iterations, of equally many decisions
    table = np.stack([values for _, values in lines])
    mean, half = mean_and_interval(np.log(table) if are_ratios else table)
    shown = np.exp if are_ratios else np.positive
    axis.plot(at, shown(mean), color=color, linestyle=style, linewidth=2, marker="o", markersize=3, label=label)
    if half is not None:
        axis.fill_between(at, shown(mean - half), shown(mean + half), color=color, alpha=0.15, linewidth=0)


def _panel(axis: Axes, x: str, y: str) -> None:
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(True, color="#ECECEC", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8)
