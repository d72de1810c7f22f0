"""The pictures of a report of pruning: accuracy against FLOPs and against time, widths, scores over evaluations.

Called by `report`; drawn on Figure objects, so that no state of pyplot is touched. A method keeps its colour and marker
in every picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from trimtab.experiments.plot_style import INK, PALE, Plot, Style, panels, save, slug, styles
from trimtab.experiments.pruning.results import PruningFolder
from trimtab.experiments.reading import Arm
from trimtab.pruner.search import AGENTS

__all__ = ["write_all"]

_MARKERS = "osD^vP<X>*hp"
_FLOPS = (
    "Test accuracy after fine-tuning on {task} against the FLOPs that are left, one line for each method over the "
    "targets; the numbers are in the tables of accuracy and cost.",
    "Each method's front: test accuracy after fine-tuning (left) and before it (right) against FLOPs left; points are "
    "means over seeds, bars 95 % intervals (range below five seeds), the dashed line is the dense network. Up and to "
    "the left is better.",
)
_LATENCY = (
    "Test accuracy after fine-tuning on {task} against measured time, one line for each method over the targets; the "
    "numbers are in the tables of accuracy and cost.",
    "The same against measured time, in units of the dense network's: points are means over seeds, bars 95 % intervals "
    "(range below five seeds) of accuracy. What saves FLOPs and no time stays on the right.",
)
_WIDTHS = (
    "Units left in each layer on {task}, one panel for each target, beside those of the dense network; the numbers are "
    "in the tables of units.",
    "Units in each layer before (grey bars, the dense network) and after (points, means over seeds), on a logarithmic "
    "scale; a point on the lower edge: the layer was taken out.",
)
_HISTORY = (
    "Best score on validation so far on {task} against the number of evaluations, one line for each search.",
    "Score on validation before fine-tuning over the evaluations (episodes) of each search: lines are the best so far, "
    "mean over seeds, dots single evaluations of the agent. The paper's scores are taken after a short retraining, "
    "all where the plan has networks trained before they are scored.",
)


def write_all(study: PruningFolder, results: Mapping[str, Any], folder: Path) -> list[Plot]:
    """Draw and write every picture for which the study has something to show.

    Args:
        study: What was read of it.
        results: As `results.collect` makes it.
        folder: Where the PNGs go.
    """
    look = _look(study.plan["arms"])
    found: list[Plot] = []
    for plan in study.plan["plans"]:
        task = plan["task"]
        rows = [row for row in results["arms"] if row["task"] == task and row["seeds"]]
        if not rows:
            continue
        for kind, figure, (alt, caption) in (
            ("flops", _against_flops(rows, look), _FLOPS),
            ("latency", _against_time(rows, look, study.plan["settings"]["latency_batch_sizes"]), _LATENCY),
            ("widths", _widths(rows, look), _WIDTHS),
            ("history", _history(study, plan, look), _HISTORY),
        ):
            if figure is not None:
                path = folder / f"{kind}_{slug(task)}.png"
                save(figure, path)
                found.append(Plot(path, kind, task, alt.format(task=task), caption))
    return found


def _look(arms: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Style, str]]:
    """Line and marker of every method."""
    as_arms = [
        Arm(str(a["id"]), "", "learned" if a["kind"] == "learned" else "baseline", None, None, {}, {}) for a in arms
    ]
    optimum = next((str(arm["id"]) for arm in arms if arm["kind"] == "optimum"), None)
    lines = styles(as_arms, optimum)
    return {arm.id: (lines[arm.id], _MARKERS[place % len(_MARKERS)]) for place, arm in enumerate(as_arms)}


Look = Mapping[str, tuple[Style, str]]
Rows = Sequence[Mapping[str, Any]]


def _against_flops(rows: Rows, look: Look) -> Figure:
    figure, axes = panels(2, columns=2, scale=1.35)
    for axis, metric, title in zip(
        axes, ("test_accuracy", "test_before"), ("after fine-tuning", "before fine-tuning"), strict=True
    ):
        _fronts(axis, rows, look, "flops_left", metric)
        axis.set_title(f"{rows[0]['task']}, {title}", loc="left", fontsize=10)
        axis.set_xlabel("FLOPs left, % of the dense network", fontsize=9)
    axes[0].set_ylabel("test accuracy, %", fontsize=9)
    _legend(figure, rows, look)
    return figure


def _against_time(rows: Rows, look: Look, batch_sizes: Sequence[int]) -> Figure:
    figure, axes = panels(len(batch_sizes), columns=2, scale=1.35)
    for axis, size in zip(axes, batch_sizes, strict=True):
        _fronts(axis, rows, look, f"latency_share_{size}", "test_accuracy")
        axis.set_title(f"{rows[0]['task']}, batch {size}", loc="left", fontsize=10)
        axis.set_xlabel("time of a forward pass, % of the dense network", fontsize=9)
    axes[0].set_ylabel("test accuracy, %", fontsize=9)
    _legend(figure, rows, look)
    return figure


def _fronts(axis: Axes, rows: Rows, look: Look, x: str, y: str) -> None:
    """One line a method, over its targets."""
    dense = [value for row in rows for value in row["metrics"]["test_dense"]["values"] if value is not None]
    axis.axhline(100 * float(np.mean(dense)), color=INK, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    for method in dict.fromkeys(row["id"] for row in rows):
        style, marker = look[method]
        known = [row["metrics"] for row in rows if row["id"] == method and row["metrics"][y]["mean"] is not None]
        if not known:
            continue
        found = sorted(known, key=lambda numbers: numbers[x]["mean"])
        means = [100 * numbers[y]["mean"] for numbers in found]
        ends = [numbers[y]["interval"] or (numbers[y]["min"], numbers[y]["max"]) for numbers in found]
        bars = [[max(0.0, m - 100 * low) for m, (low, _) in zip(means, ends, strict=True)],
                [max(0.0, 100 * high - m) for m, (_, high) in zip(means, ends, strict=True)]]  # fmt: skip
        axis.errorbar(
            [100 * numbers[x]["mean"] for numbers in found], means, yerr=bars, color=style.color, linestyle=style.dash,
            linewidth=style.width, marker=marker, markersize=5, elinewidth=0.7, alpha=0.9, zorder=3,
        )  # fmt: skip


def _widths(rows: Rows, look: Look) -> Figure:
    """Grey bars of the dense network, points of every method, a panel for each target."""
    targets = list(dict.fromkeys(row["target_name"] for row in rows))
    parts = next(row["widths"] for row in rows)
    names = [f"{entry['kind']} {name}" for name, entry in parts.items()]
    figure, axes = panels(len(targets), columns=2, scale=1.35 if len(parts) <= 8 else 2.0)
    for axis, target in zip(axes, targets, strict=True):
        dense = [entry["dense"] for entry in parts.values()]
        axis.bar(range(len(dense)), dense, color=PALE, width=0.8, zorder=1)
        group = [row for row in rows if row["target_name"] == target and row["widths"]]
        for place, row in enumerate(group):
            style, marker = look[row["id"]]
            shift = (place + 0.5) / len(group) * 0.72 - 0.36
            left = [max(0.8, float(np.mean(entry["left"]))) for entry in row["widths"].values()]
            axis.scatter(np.arange(len(left)) + shift, left, color=style.color, marker=marker, s=22, zorder=3)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_ylim(0.75, 1.3 * max(dense))
        axis.set_title(f"{rows[0]['task']}, {target}", loc="left", fontsize=10)
        turned = len(names) > 4
        axis.set_xticks(range(len(names)), names, rotation=60 if turned else 0, ha="right" if turned else "center")
        axis.tick_params(axis="x", labelsize=7 if turned else 8)
    axes[0].set_ylabel("units", fontsize=9)
    _legend(figure, rows, look, lines=False)
    return figure


def _history(study: PruningFolder, plan: Mapping[str, Any], look: Look) -> Figure | None:
    """Best so far over the evaluations of every search; None without any."""
    searches = [name for name in AGENTS if name in plan["methods"]]
    curves: dict[tuple[int, str], list[list[float]]] = {}
    for place in range(len(plan["targets"])):
        for method in searches:
            cells = study.done(plan["task"], place, method).values()
            found = [[np.nan if score is None else score for score in cell["history"]] for cell in cells]
            if any(len(history) > 1 for history in found):
                curves[place, method] = found
    targets = sorted({place for place, _ in curves})
    if not targets:
        return None
    from trimtab.experiments.pruning.schema import target_name

    figure, axes = panels(len(targets), columns=2, scale=1.35)
    for axis, place in zip(axes, targets, strict=True):
        for (at, method), found in curves.items():
            if at != place:
                continue
            style, _ = look[method]
            if method == "ppo":
                for history in found:
                    axis.scatter(range(1, len(history) + 1), 100 * np.array(history), s=4, color=style.color,
                                 alpha=0.25, linewidths=0)  # fmt: skip
            longest = max(len(history) for history in found)
            best = np.array([np.fmax.accumulate([*h, *[np.nan] * (longest - len(h))]) for h in found])
            axis.plot(range(1, longest + 1), 100 * best.mean(axis=0), color=style.color, linestyle=style.dash,
                      linewidth=style.width)  # fmt: skip
        axis.set_title(f"{plan['task']}, {target_name(plan['targets'][place])}", loc="left", fontsize=10)
        axis.set_xlabel("evaluations", fontsize=9)
    axes[0].set_ylabel("accuracy on validation, %", fontsize=9)
    shown = list(dict.fromkeys(method for _, method in curves))
    handles = [Line2D([], [], color=look[name][0].color, linestyle=look[name][0].dash, linewidth=2) for name in shown]
    figure.legend(handles, shown, loc="outside right center", frameon=False, fontsize=9)
    return figure


def _legend(figure: Figure, rows: Rows, look: Look, *, lines: bool = True) -> None:
    """Methods by name, and what stands for the dense network."""
    shown = list(dict.fromkeys(row["id"] for row in rows))
    handles: list[Any] = [
        Line2D([], [], color=look[name][0].color, linestyle=look[name][0].dash if lines else "none",
               marker=look[name][1], linewidth=look[name][0].width, markersize=5)
        for name in shown
    ]  # fmt: skip
    dense = Line2D([], [], color=INK if lines else PALE, linestyle=(0, (4, 3)) if lines else "-",
                   linewidth=1.0 if lines else 6)  # fmt: skip
    figure.legend([*handles, dense], [*shown, "dense"], loc="outside right center", frameon=False, fontsize=9)
