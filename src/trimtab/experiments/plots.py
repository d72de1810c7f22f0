"""The pictures over the course of a run: losses, the knobs' paths, rewards; and the way to draw all pictures.

Called by report.py; drawn on Figure objects, so that no state of pyplot is touched. Losses and rates have
logarithmic axes wherever all values are positive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from trimtab.experiments.plot_arms import draw_differences, draw_learning, draw_sensitivity
from trimtab.experiments.plot_style import GREY, INK, PALE, Plot, Style, log_axis, panels, save, slug, styles
from trimtab.experiments.reading import LANGUAGE_DATASETS, Run, StudyFolder
from trimtab.experiments.stats import is_finite

__all__ = ["write_all"]

_MAX_OVERLAY = 5  # more curves with bands than this in one panel hide each other: then every arm gets its own
_CUT = 10.0
_DECADES = 1e4  # how far below its highest value a knob is shown
_LABELS = {"train_loss": "training loss", "val_loss": "validation loss"}
_MARKS = {  # how a decision is marked: marker, area, what it says; the arm's colour where it is the agent's
    "kept": ("|", 14, "agent: kept as it was"),
    "agent": ("o", 9, "agent: changed"),
    "guard": ("v", 42, "guard: rolled back, cut"),
    "gave_up": ("X", 60, "guard: gave up"),
    "follow": ("d", 30, "followed another knob"),
    "memory": ("P", 42, "out of memory: halved"),
    "conflict": ("*", 70, "second writer found"),
}

Curve = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]


def write_all(study: StudyFolder, results: Mapping[str, Any], folder: Path) -> list[Plot]:
    """Draw and write every picture for which a study has something to show.

    Args:
        study: What was read of the study.
        results: As results.collect makes it.
        folder: Where the PNGs go.
    """
    look = styles(study.arms, study.tuned_arm)
    plots: list[Plot] = []
    for task in study.tasks:
        plots += _losses(study, task, folder, look)
        rows = [row for row in results["arms"] if row["task"] == task]
        for kind, figure, alt, caption in (
            ("differences", draw_differences(rows, look, task), *_DIFFERENCES),
            ("sensitivity", draw_sensitivity(rows, look, task, study.tuned_arm), *_SENSITIVITY),
            ("learning", draw_learning(rows, look, task), *_LEARNING),
            ("knob", _knobs(study, task, look), *_KNOBS),
            ("reward", _rewards(study, task, look), *_REWARDS),
        ):
            if figure is not None:
                path = folder / f"{kind}_{slug(task)}.png"
                save(figure, path)
                plots.append(Plot(path, kind, task, alt.format(task=task), caption))
    return plots


_DIFFERENCES = (
    "Differences in test loss on {task} with their intervals, by what each arm is compared with; the numbers are in "
    "the table of differences.",
    "Difference in test loss, arm minus reference, paired by seed: left of zero is a gain. Points are means, bars "
    "95 % intervals, small dots seeds. Without a bar there are too few seeds to say.",
)
_SENSITIVITY = (
    "Final validation loss on {task} against the initial learning rate, one line for each arm; the numbers are in "
    "the table of sensitivity.",
    "Mean final validation loss against the initial rate. A flat line is an arm that does not depend on it. A cross "
    "at the upper edge: no run from there ended finite. The level, where there is one, is the tuned schedule's.",
)
_LEARNING = (
    "Test loss on {task} against the number of runs that an arm had learned from before, one line for arms that differ "
    "in nothing else; the numbers are in the tables of outcomes and differences.",
    "Mean test loss with its 95 % interval against the runs learned from before; without a bar there are too few seeds "
    "to say. Whether more runs help is in the differences, which are paired by seed.",
)
_KNOBS = (
    "Paths of the knobs on {task} against optimizer steps, one line for each seed, with every decision marked.",
    "The knob as read back where it acts, one line for each seed; every decision is marked, by who took it. The axis "
    "ends four decades below the highest value.",
)
_REWARDS = (
    "Reward of every decision on {task} against optimizer steps, mean and range over seeds.",
    "Reward of every interval: mean over seeds, and the range from the lowest to the highest seed as a band. Arms "
    "whose reward is 0 throughout are left out: a rank among many runs says nothing of a single one.",
)


def _losses(study: StudyFolder, task: str, folder: Path, look: Mapping[str, Style]) -> list[Plot]:
    """One picture of both losses; of language models one for each loss, under its data set's name."""
    found = {name: _cut(_curves(study, task, name)) for name in _LABELS}
    dataset = study.dataset(task)
    if dataset in LANGUAGE_DATASETS:
        wanted = [(f"{name}_{slug(dataset)}.png", [name]) for name in _LABELS]
    else:
        wanted = [(f"loss_{slug(task)}.png", list(_LABELS))]
    plots = []
    for file, names in wanted:
        curves = {name: found[name] for name in names if found[name]}
        if not curves:
            continue
        arms = list(dict.fromkeys(arm for of_arm in curves.values() for arm in of_arm))
        what = " and ".join(_LABELS[name] for name in curves)
        few = len(arms) <= _MAX_OVERLAY
        save((_overlay if few else _small_multiples)(curves, arms, look, study.tuned_arm, task), folder / file)
        plots.append(
            Plot(
                folder / file,
                "loss",
                task,
                f"{what.capitalize()} on {task} against optimizer steps, for {', '.join(arms)}.",
                f"{what.capitalize()}: mean over seeds, and the range from the lowest to the highest seed as a band."
                + ("" if few else " In grey, the other arms.")
                + f" What rises above {_CUT:g} times the highest first value is drawn there.",
            )
        )
    return plots


def _curves(study: StudyFolder, task: str, name: str) -> dict[str, Curve]:
    """Arm -> steps, mean, lowest, highest over seeds; where every run of the arm has been, so that no mean jumps."""
    found = {}
    for arm in study.arms:
        curve = _mean_and_range(study.of(arm=arm.id, task=task, role="report"), name)
        if curve is not None:
            found[arm.id] = curve
    return found


def _cut(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    """Curves without what lies far above their start: one diverged run would press all others into a line."""
    top = _CUT * max((abs(float(curve[3][0])) for curve in curves.values()), default=0.0)
    return {
        arm: (steps, np.minimum(mean, top), np.minimum(low, top), np.minimum(high, top))
        for arm, (steps, mean, low, high) in curves.items()
    }


def _mean_and_range(runs: Sequence[Run], name: str) -> Curve | None:
    paths = [{_time(row): float(row[name]) for row in run.series if is_finite(row.get(name))} for run in runs]
    paths = [path for path in paths if path]
    if not paths:
        return None
    first, last = max(min(path) for path in paths), min(max(path) for path in paths)
    steps = [step for step in min(paths, key=len) if first <= step <= last]
    if not steps:
        return None
    # Runs whose steps cost differently were looked at after different shares of the budget: straight lines between.
    values = np.array([np.interp(steps, list(path), list(path.values())) for path in paths])
    return np.array(steps), values.mean(axis=0), values.min(axis=0), values.max(axis=0)


def _time(row: Mapping[str, Any]) -> float:
    """When a line of series.jsonl was written, in optimizer steps as the task has them."""
    return float(row.get("spent", row["optimizer_step"]))


def _overlay(
    curves: Mapping[str, Mapping[str, Curve]],
    arms: Sequence[str],
    look: Mapping[str, Style],
    tuned: str | None,
    task: str,
) -> Figure:
    """All arms in one panel a loss, bands drawn, legend outside and in the order of the final values."""
    figure, axes = panels(len(curves), columns=2, scale=1.35, share_y=False)
    for axis, (name, of_arm) in zip(axes, curves.items(), strict=True):
        for arm, (steps, mean, low, high) in of_arm.items():
            axis.fill_between(steps, low, high, color=look[arm].color, alpha=0.16, linewidth=0)
            _line(axis, look[arm], steps, mean)
        axis.set_title(f"{_LABELS[name]}, {task}", loc="left", fontsize=10)
        axis.set_xlabel("optimizer steps", fontsize=9)
        log_axis(axis, "y", [float(value) for curve in of_arm.values() for value in (*curve[2], *curve[3])])
    last = list(curves.values())[-1]
    order = sorted(arms, key=lambda arm: -float(last[arm][1][-1]) if arm in last else 0.0)
    handles = [
        Line2D([], [], color=look[arm].color, linestyle=look[arm].dash, linewidth=look[arm].width) for arm in order
    ]
    figure.legend(handles, order, loc="outside right center", frameon=False, fontsize=9)
    return figure


def _small_multiples(
    curves: Mapping[str, Mapping[str, Curve]],
    arms: Sequence[str],
    look: Mapping[str, Style],
    tuned: str | None,
    task: str,
) -> Figure:
    """One panel an arm: its own curves with bands before all others in grey."""
    figure, axes = panels(len(arms), columns=4, scale=0.85)
    main = list(curves)[-1]
    for axis, arm in zip(axes, arms, strict=True):
        for other, (steps, mean, _, _) in curves[main].items():
            if other != arm:
                is_tuned = other == tuned
                axis.plot(steps, mean, color=INK if is_tuned else PALE, linewidth=1.0, zorder=1.5 if is_tuned else 1)
        for name, of_arm in curves.items():
            if arm in of_arm:
                steps, mean, low, high = of_arm[arm]
                color = look[arm].color
                axis.fill_between(steps, low, high, color=color, alpha=0.25, linewidth=0, zorder=2)
                width = 2.0 if name == main else 1.2
                axis.plot(
                    steps,
                    mean,
                    color=color,
                    linewidth=width,
                    linestyle="-" if name == main else ":",
                    zorder=3,
                )
        axis.set_title(arm, loc="left", fontsize=9, color=INK)
        log_axis(
            axis,
            "y",
            [float(v) for of_arm in curves.values() for c in of_arm.values() for v in (*c[2], *c[3])],
        )
    handles, labels = _multiples_legend(main, len(curves) > 1, tuned if tuned in curves[main] else None)
    figure.legend(handles, labels, loc="outside upper left", ncols=4, frameon=False, fontsize=9)
    figure.supxlabel(f"optimizer steps, {task}", fontsize=9)
    return figure


def _multiples_legend(main: str, has_training: bool, tuned: str | None) -> tuple[list[Line2D], list[str]]:
    entries: list[tuple[str, str, float, Any]] = [(f"{_LABELS[main]} of the arm", GREY, 2.0, "-")]
    entries += [("its training loss", GREY, 1.2, ":")] if has_training else []
    entries += [("the other arms", PALE, 1.0, "-")]
    entries += [(tuned, INK, 1.0, "-")] if tuned is not None else []
    handles = [Line2D([], [], color=color, linewidth=width, linestyle=dash) for _, color, width, dash in entries]
    return handles, [label for label, *_ in entries]


def _line(axis: Axes, style: Style, steps: np.ndarray[Any, Any], values: np.ndarray[Any, Any]) -> None:
    axis.plot(steps, values, color=style.color, linestyle=style.dash, linewidth=style.width)


def _knobs(study: StudyFolder, task: str, look: Mapping[str, Style]) -> Figure | None:
    """A panel for each arm that decides and each knob it moves."""
    wanted = []
    for arm in study.arms:
        runs = [run for run in study.of(arm=arm.id, task=task, role="report") if run.series]
        if arm.decides and runs:
            moved = dict.fromkeys(str(row["knob"]) for run in runs for row in run.decisions)
            wanted += [(arm.id, knob, runs) for knob in moved]
    if not wanted:
        return None
    figure, axes = panels(len(wanted), columns=2, scale=1.35, share_y=False)
    used: dict[str, None] = {}
    for axis, (name, knob, runs) in zip(axes, wanted, strict=True):
        used.update(dict.fromkeys(_knob_panel(axis, runs, knob, look[name])))
        axis.set_title(f"{name}: {knob}, {len(runs)} seeds", loc="left", fontsize=10)
    handles = [
        Line2D(
            [],
            [],
            linestyle="none",
            marker=marker,
            color=GREY if source in ("agent", "kept") else INK,
            label=label,
        )
        for source, (marker, _, label) in _MARKS.items()
        if source in used
    ]
    if handles:
        figure.legend(handles=handles, loc="outside upper left", ncols=5, frameon=False, fontsize=9)
    figure.supxlabel(f"optimizer steps, {task}", fontsize=9)
    return figure


def _knob_panel(axis: Axes, runs: Sequence[Run], knob: str, style: Style) -> list[str]:
    """Paths of one knob over the seeds; returns the kinds of marks that were set."""
    values: list[float] = []
    marks: dict[str, tuple[list[int], list[float]]] = {}
    for run in runs:
        known = _path(run, knob)
        if known:
            axis.plot(*zip(*known, strict=True), color=style.color, linewidth=0.9, alpha=0.55)
        values += [value for _, value in known]
        setting = known[0][1] if known else None
        for row in run.decisions:
            if row["knob"] == knob and is_finite(row["read_back"]):
                # under a base schedule the value moves by itself: what the agent moves is its setting
                now = row.get("setting", row["read_back"])
                kept, setting = row["source"] == "agent" and now == setting, now
                steps, settings = marks.setdefault("kept" if kept else str(row["source"]), ([], []))
                steps.append(row["optimizer_step"])
                settings.append(row["read_back"])
                values.append(row["read_back"])
    for source, (steps, settings) in marks.items():
        marker, area, _ = _MARKS.get(source, _MARKS["agent"])
        is_agent = source in ("agent", "kept")
        color, alpha = (style.color, 0.7) if is_agent else (INK, 1.0)
        axis.scatter(
            steps,
            settings,
            s=area,
            marker=marker,
            linewidths=0.7,
            color=color,
            alpha=alpha,
            zorder=3 if is_agent else 4,
        )
    positive = [value for value in values if value > 0]
    if positive:  # a schedule may end at 0, which no logarithmic axis has
        log_axis(axis, "y", positive)
        axis.set_ylim(bottom=0.8 * max(min(positive), max(positive) / _DECADES))
    return list(marks)


def _path(run: Run, knob: str) -> list[tuple[float, float]]:
    """Steps and values of a knob: as read back at every interval, and before and after every decision."""
    points: list[tuple[int, int, Any]] = [
        (row["optimizer_step"], 3, (row.get("knobs") or {}).get(knob)) for row in run.series
    ]
    for row in run.decisions:
        if row["knob"] == knob:
            points += [
                (row["optimizer_step"], 1, row["before"]),
                (row["optimizer_step"], 2, row["read_back"]),
            ]
    ordered = sorted((step, order, value) for step, order, value in points if is_finite(value))
    return [(step, value) for step, _, value in ordered]


def _rewards(study: StudyFolder, task: str, look: Mapping[str, Style]) -> Figure | None:
    curves = {}
    for arm in study.arms:
        if arm.decides:
            curve = _mean_and_range(study.of(arm=arm.id, task=task, role="report"), "reward")
            if curve is not None and np.any(curve[1]):
                curves[arm.id] = curve
    if not curves:
        return None
    figure, axes = panels(len(curves), columns=2, scale=1.2, share_y=False)
    for axis, (name, (steps, mean, low, high)) in zip(axes, curves.items(), strict=True):
        axis.axhline(0, color=GREY, linewidth=0.8)
        axis.fill_between(steps, low, high, color=look[name].color, alpha=0.2, linewidth=0)
        axis.plot(steps, mean, color=look[name].color, linewidth=1.6, marker="o", markersize=2.5)
        axis.set_title(f"{name}: reward", loc="left", fontsize=10)
    figure.supxlabel(f"optimizer steps, {task}", fontsize=9)
    return figure
