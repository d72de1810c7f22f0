"""The pictures that set arms beside each other: sensitivity to the initial rate, learning, differences (forest plot).

Called by plots.py. They draw what is in results.json and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from trimtab.experiments.plot_style import GREY, INK, PALE, Style, log_axis, panels, tidy
from trimtab.experiments.words import interval, number

__all__ = ["draw_differences", "draw_learning", "draw_sensitivity"]

_GROUPS = {
    "tuned": "against the tuned schedule ({})",
    "placebo": "each against its placebo",
    "yoked": "each against its yoked twin",
    "user": "against your configuration ({})",
}
_MAX_LINES = 8  # more in one panel cannot be told apart: then every arm gets its own
_FAR = 20.0  # beyond so many times the middle size of a difference a linear axis hides the small ones


def draw_sensitivity(
    rows: Sequence[Mapping[str, Any]], look: Mapping[str, Style], task: str, tuned: str | None = None
) -> Figure | None:
    """Final validation loss against initial rate, one line an arm; None where no arm has two rates.

    Args:
        rows: The arms' rows of one task.
        look: Line of every arm.
        task: Its name.
        tuned: The tuned schedule: where it has a loss, that is drawn as a level.
    """
    known = {row["id"]: row["sensitivity"] for row in rows if row["sensitivity"]}
    known = {arm: entry for arm, entry in known.items() if any(loss is not None for loss in entry["final_val_loss"])}
    if not known:
        return None
    found = [(row["id"], row["metrics"]["final_val_loss"]["mean"]) for row in rows if row["id"] == tuned]
    levels = {name: level for name, level in found if level is not None}
    losses = list(levels.values())
    losses += [loss for entry in known.values() for loss in entry["final_val_loss"] if loss is not None]
    many = len(known) > _MAX_LINES
    figure, axes = panels(len(known), columns=4, scale=0.85) if many else panels(1, scale=1.9)
    shown = [[arm] for arm in known] if many else [list(known)]
    for axis, arms in zip(axes, shown, strict=True):
        for level in levels.values():
            axis.axhline(level, color=INK, linewidth=1.0, zorder=1.5)
        for arm in (arm for arm in known if arm not in arms):
            axis.plot(*_pairs(known[arm]), color=PALE, linewidth=1.0, zorder=1)
        for arm in arms:
            _sensitivity_line(axis, known[arm], look[arm], max(losses) * 1.25)
        log_axis(axis, "x", [rate for entry in known.values() for rate in entry["initial_lrs"]])
        log_axis(axis, "y", losses)
        axis.set_title(arms[0] if many else task, loc="left", fontsize=9 if many else 10, color=INK)
    if many:
        figure.supxlabel(f"initial learning rate, {task}", fontsize=9)
        figure.supylabel("mean final validation loss", fontsize=9)
        entries = [("the arm", GREY, 2.0), ("the other arms", PALE, 1.0), *((name, INK, 1.0) for name in levels)]
        handles = [Line2D([], [], color=color, linewidth=width) for _, color, width in entries]
        names = [name for name, *_ in entries]
        figure.legend(handles, names, loc="outside upper left", ncols=3, frameon=False, fontsize=9)
        return figure
    axes[0].set_xlabel("initial learning rate", fontsize=9)
    axes[0].set_ylabel("mean final validation loss", fontsize=9)
    order = sorted(known, key=lambda arm: -(known[arm]["final_val_loss"][-1] or max(losses) * 1.25))
    handles = [
        Line2D([], [], color=s.color, linestyle=s.dash, linewidth=s.width, marker="o", markersize=4)
        for s in (look[arm] for arm in order)
    ]
    handles += [Line2D([], [], color=INK, linewidth=1.0) for _ in levels]
    figure.legend(handles, [*order, *levels], loc="outside right upper", frameon=False, fontsize=9)
    return figure


def _pairs(entry: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Rates that have a loss, and the losses."""
    both = zip(entry["initial_lrs"], entry["final_val_loss"], strict=True)
    kept = [(rate, loss) for rate, loss in both if loss is not None]
    return [rate for rate, _ in kept], [loss for _, loss in kept]


def _sensitivity_line(axis: Axes, entry: Mapping[str, Any], style: Style, top: float) -> None:
    """One arm; a cross at the top where no run from a rate ended finite."""
    rates, losses = _pairs(entry)
    axis.plot(
        rates,
        losses,
        color=style.color,
        linestyle=style.dash,
        linewidth=style.width,
        marker="o",
        markersize=4,
        zorder=3,
    )
    lost = [rate for rate in entry["initial_lrs"] if rate not in rates]
    axis.scatter(lost, [top] * len(lost), marker="x", color=style.color, s=40, zorder=3)


def draw_learning(rows: Sequence[Mapping[str, Any]], look: Mapping[str, Style], task: str) -> Figure | None:
    """Test loss against the runs that arms had learned from, for arms that differ in nothing else; None without any."""
    alike: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["kind"] == "learned" and row["metrics"]["test_loss"]["mean"] is not None:
            key = json.dumps([row["agent"], row["knobs"], row["options"], row["cost"].get("taught")], sort_keys=True)
            alike.setdefault(key, []).append(row)
    curves = [
        sorted(group, key=lambda row: row["cost"]["learning_runs"])
        for group in alike.values()
        if len({row["cost"]["learning_runs"] for row in group}) > 1
    ]
    if not curves:
        return None
    counts = sorted({row["cost"]["learning_runs"] for curve in curves for row in curve})
    figure, (axis,) = panels(1, scale=1.6)
    for curve in curves:
        style = look[curve[-1]["id"]]
        places = [counts.index(row["cost"]["learning_runs"]) for row in curve]
        means = [row["metrics"]["test_loss"]["mean"] for row in curve]
        ends = [row["metrics"]["test_loss"]["interval"] or (mean, mean) for row, mean in zip(curve, means, strict=True)]
        bars = [[mean - low for mean, (low, _) in zip(means, ends, strict=True)]]
        bars += [[high - mean for mean, (_, high) in zip(means, ends, strict=True)]]
        axis.errorbar(places, means, yerr=bars, color=style.color, marker="o", markersize=5, capsize=3, linewidth=1.5)
        for place, mean, row in zip(places, means, curve, strict=True):
            axis.annotate(row["id"], (place, mean), xytext=(6, 6), textcoords="offset points", fontsize=9)
    axis.set_xticks(range(len(counts)), [str(count) for count in counts])
    axis.set_xlim(-0.3, len(counts) - 0.4)
    has_brains = any(row["cost"].get("taught") for curve in curves for row in curve)
    axis.set_xlabel("runs learned from before" + (", on top of the brain" if has_brains else ""), fontsize=9)
    axis.set_ylabel("mean test loss, 95 % interval", fontsize=9)
    axis.set_title(task, loc="left", fontsize=10)
    return figure


def draw_differences(rows: Sequence[Mapping[str, Any]], look: Mapping[str, Style], task: str) -> Figure | None:
    """Every difference to the tuned schedule, to placebos and to twins, with its interval; None without any."""
    lines = _lines(rows)
    if not lines:
        return None
    height = 0.27 * len(lines) + 1.2
    figure = Figure(figsize=(9.6, height), layout="constrained")
    axis = figure.subplots()
    tidy(axis)
    axis.grid(False, axis="y")
    axis.axvline(0, color=INK, linewidth=1)
    ends = [0.0]
    for place, (arm, entry, text) in enumerate(lines):
        if entry is None:
            axis.text(
                0.0,
                place,
                text,
                transform=axis.get_yaxis_transform(),
                fontsize=9,
                color=INK,
                va="center",
                fontweight="bold",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )
            continue
        ends += _difference_line(axis, place, entry, look[arm].color)
        axis.text(1.02, place, text, transform=axis.get_yaxis_transform(), fontsize=8, color=INK, va="center")
    _scale(axis, ends)
    axis.set_yticks(
        [place for place, (_, entry, _) in enumerate(lines) if entry is not None],
        [arm for arm, entry, _ in lines if entry is not None],
    )
    axis.tick_params(axis="y", length=0, labelsize=9)
    axis.set_ylim(len(lines) - 0.4, -0.6)
    axis.set_xlabel("difference in test loss, arm minus reference  (left of zero: the arm is better)", fontsize=9)
    axis.set_title(task, loc="left", fontsize=10)
    return figure


def _lines(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any] | None, str]]:
    """Headings (no entry) and differences from top to bottom, the best first within a group."""
    lines: list[tuple[str, Mapping[str, Any] | None, str]] = []
    has_tuned = any("tuned" in entry["roles"] for row in rows for entry in row["differences"].values())
    for role, heading in _GROUPS.items():
        if role == "user" and has_tuned:
            continue  # it is in the table; here it would double the lines for the weaker of two bars
        group = [
            (row["id"], reference, entry)
            for row in rows
            for reference, entry in row["differences"].items()
            if role in entry["roles"] and entry["n"]
        ]
        if group:
            lines.append(("", None, heading.format(group[0][1])))
            for arm, _, entry in sorted(group, key=lambda line: (line[2]["mean"], line[0])):
                bounds = interval(entry["interval"], signed=True)
                size = number(entry["mean"], digits=3, signed=True) if bounds else ""
                lines.append((arm, entry, " ".join([size, bounds, "", entry["verdict"]]).strip()))
    return lines


def _difference_line(axis: Axes, place: int, entry: Mapping[str, Any], color: str) -> list[float]:
    """Seeds, interval and mean on one line; returns how far they reach."""
    values, bounds = entry["values"], entry["interval"]
    below = 0.24 if bounds else 0.0
    axis.scatter(values, [place + below] * len(values), s=8 if bounds else 14, color=color, alpha=0.6, linewidths=0)
    if bounds:  # with too few seeds to say, a mean would look like an answer
        axis.plot(bounds, [place, place], color=color, linewidth=2.4, solid_capstyle="round", zorder=3)
        axis.scatter([entry["mean"]], [place], s=36, color=color, edgecolors="white", linewidths=0.8, zorder=4)
    return [*values, *(bounds or [])]


def _scale(axis: Axes, ends: Sequence[float]) -> None:
    """Symmetric-log where a few far differences would hide the small ones; said on the axis."""
    sizes = np.array([abs(end) for end in ends if end != 0.0])
    if len(sizes) and sizes.max() > _FAR * np.median(sizes):
        axis.set_xscale("symlog", linthresh=float(np.median(sizes)))
        axis.text(
            1.0,
            -0.02,
            "axis logarithmic outside the middle",
            transform=axis.transAxes,
            fontsize=8,
            color=GREY,
            ha="right",
            va="top",
        )
    axis.margins(x=0.04)
