"""The report of a study of pruning: results.json, plots, report.md and report.html.

Called by `trimtab run` and `trimtab prune` at their ends and by `trimtab report DIR`, through
`trimtab.experiments.report`; it reads the study's folder alone, also while the study is under way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.experiments import words
from trimtab.experiments.document import Block, Bullets, Heading, Image, Notice, Paragraph, to_markdown
from trimtab.experiments.plot_style import Plot
from trimtab.experiments.pruning import plots, tables
from trimtab.experiments.pruning.goals import AGENT, GOALS
from trimtab.experiments.pruning.results import PruningFolder, collect, read_folder
from trimtab.experiments.report_html import to_html
from trimtab.experiments.stats import MIN_SEEDS
from trimtab.storage import atomic_write, write_json

__all__ = ["compose", "write"]

_MAX_NAMED = 12  # missing cells named one by one before the rest is counted
_MANY_PARTS = 8  # layers, beyond which their widths are in the picture and in results.json alone


def write(out: Path) -> Path:
    """Write everything that the folder of a study of pruning gives.

    Args:
        out: The folder; the study may be unfinished, which the report then says.

    Returns:
        The path of report.html.

    Raises:
        InputError: There is no study of pruning in the folder.
        OutputError: The folder cannot be written.
    """
    study = read_folder(out)
    results = collect(study)
    write_json(out / "results.json", results)
    pictures = plots.write_all(study, results, out / "plots")
    blocks = compose(study, results, pictures)
    atomic_write(out / "report.md", to_markdown(blocks, out))
    atomic_write(out / "report.html", to_html(f"trimtab: {results['study']}", blocks))
    return out / "report.html"


def compose(study: PruningFolder, results: Mapping[str, Any], pictures: Sequence[Plot]) -> list[Block]:
    """The report as blocks, in the order in which it is read."""
    blocks: list[Block] = [Heading(1, f"Study {results['study']}"), *_unfinished(results)]
    blocks += [Heading(2, "Idea"), Paragraph(str(results["idea"]))]
    blocks += [Heading(2, "Conclusion"), Bullets(results["conclusion"] or ["There is nothing to conclude from."])]
    blocks += [Heading(2, "Plan"), *_plan(study, results)]
    blocks += [Heading(2, "Results"), Paragraph(_HOW_TO_READ), tables.dense_table(results["dense"])]
    for plan in study.plan["plans"]:
        blocks += _task(study, plan, results, [plot for plot in pictures if plot.task == plan["task"]])
    blocks += [Heading(2, "Goals"), *_goals(results)]
    return blocks


_HOW_TO_READ = (
    "Differences are paired by seed: one seed is one dense network, which every method prunes. Under "
    f"{MIN_SEEDS} seeds there is no interval and no verdict; from five to ten seeds the interval is Student's t, above "
    "ten a BCa bootstrap. Each interval stands for itself: nothing is corrected for their number, and the best "
    "baseline is the best on test, which favours it."
)


def _unfinished(results: Mapping[str, Any]) -> list[Block]:
    state = results["unfinished"]
    blocks: list[Block] = []
    n = state["n_planned"]
    if state["missing"]:
        text = f"Unfinished: {n - len(state['missing'])} of {n} cells have a result. Missing:"
        blocks.append(Notice(text, _shortened(state["missing"])))
    if state["failed"]:
        text = f"{words.count(len(state['failed']), 'cell')} of {n} failed:"
        blocks.append(Notice(text, _shortened(state["failed"])))
    return blocks


def _shortened(items: Sequence[str]) -> list[str]:
    rest = len(items) - _MAX_NAMED
    return list(items) if rest <= 0 else [*items[:_MAX_NAMED], f"and {rest} more; results.json names them all"]


def _plan(study: PruningFolder, results: Mapping[str, Any]) -> list[Block]:
    plan, settings = study.plan, study.plan["settings"]
    items = [f"Scale {plan['scale']}, root seed {plan['root_seed']}."]
    for entry, dense in zip(plan["plans"], results["dense"], strict=True):
        steps = dense["metrics"]["optimizer_steps"]["mean"]
        trained = (
            "not trained yet"
            if steps is None
            else f"{steps:,.0f} optimizer steps from rate {dense['lr']:g}, warm-up and cosine"
        )
        if dense["loaded_from"] is not None:
            trained = f"loaded from {dense['loaded_from']}"
        items.append(
            f"Task {entry['task']}: {words.count(entry['n_seeds'], 'seed')}; dense network {trained}; at most "
            f"{words.count(entry['max_evaluations'], 'evaluation')} a search; the {entry['n_best']} best are "
            f"fine-tuned; a fine-tuning is {words.count(entry['fine_tune_steps'], 'optimizer step')}"
            f"{_trained_first(entry)}."
        )
    items += [
        f"Fine-tuning: Adam at {settings['fine_tune_rate']:g} of the task's rate on the training samples, the same in "
        "the same order for every method of a seed; scratch has none: it is trained as long as the dense network.",
        "Searches score on validation, and the choice among what was fine-tuned is made there. Test is read at the end "
        "of a cell by the chosen network alone: once as it was cut, once as it was fine-tuned.",
        f"Widths are multiples of {settings['multiple']}, but for narrow layers and for the rules uniform, global and "
        "lamp, which choose to the unit.",
        "FLOPs are those of a forward pass of one sample, two a MAC; the trade-off score is test accuracy (as a share) "
        "x (1 / GFLOPs), as in the write-up: it is a number to report, and no aim, since it is best for the smallest "
        "network.",
        _timed(results, settings),
    ]
    if settings["stages"]:
        stages = ", ".join(f"{method} in {n}" for method, n in settings["stages"].items())
        items.append(f"Stages of pruning and fine-tuning: {stages}; one for the others.")
    environment = ", ".join(f"{name} {value}" for name, value in (plan.get("environment") or {}).items())
    items.append(f"Environment: {environment or 'not recorded'}.")
    return [tables.method_table(results["arms"], plan["plans"]), Bullets(items)]


def _trained_first(entry: Mapping[str, Any]) -> str:
    """What is done before a score in a search; studies of before it could be done say nothing of it."""
    steps = entry.get("score_steps", 0)
    return (
        f"; in a search every network is trained for {words.count(steps, 'step')} before it is scored" if steps else ""
    )


def _timed(results: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    sizes = words.listing([str(size) for size in settings["latency_batch_sizes"]])
    found = next((row["latency"] for row in results["arms"] if row["latency"]), None)
    where = "" if found is None else f" on {found['device']}, by the clock {found['clock']}"
    return (
        f"Times are medians of {settings['latency_repeats']} forward passes{where}, the dense and the pruned network "
        f"in turns, at batch {sizes}, {words.count(settings['threads'], 'thread')}; other work of the study may have "
        "run on the machine."
    )


def _task(
    study: PruningFolder, plan: Mapping[str, Any], results: Mapping[str, Any], pictures: list[Plot]
) -> list[Block]:
    rows = [row for row in results["arms"] if row["task"] == plan["task"]]
    blocks: list[Block] = [Heading(3, plan["task"])]
    if not any(row["seeds"] for row in rows):
        return [*blocks, Paragraph("No cell on this task has come to its end.")]
    blocks += [Image(plot.path, plot.alt, plot.caption) for plot in pictures if plot.kind in ("flops", "latency")]
    for name in dict.fromkeys(row["target_name"] for row in rows):
        group = [row for row in rows if row["target_name"] == name]
        blocks += [Heading(4, f"{plan['task']}: {_in_words(group[0]['target'])}")]
        if not any(row["seeds"] for row in group):
            blocks.append(Paragraph("No cell at this target has come to its end."))
            continue
        blocks += [
            tables.accuracy_table(group),
            tables.cost_table(group, study.plan["settings"]["latency_batch_sizes"]),
        ]
        if len(next(row["widths"] for row in group if row["widths"])) <= _MANY_PARTS:
            blocks.append(tables.widths_table(group))
        blocks += _notes(group)
    blocks += [Image(plot.path, plot.alt, plot.caption) for plot in pictures if plot.kind in ("widths", "history")]
    refused: Mapping[str, str] = next((row["refused"] for row in rows if row["refused"]), {})
    if refused:
        blocks += [Paragraph("Layers whose units had to stay:"),
                   Bullets([f"{name}: {reason}." for name, reason in refused.items()])]  # fmt: skip
    return blocks


def _in_words(target: Mapping[str, Any]) -> str:
    """A target as a heading says it, in per cent of the dense network's."""
    kind = next(key for key in target if key != "batch_size")
    name = {"flops": "FLOPs", "params": "parameters", "latency": f"time at batch {target.get('batch_size', 1)}"}[kind]
    return f"at most {100 * target[kind]:g} % of the {name}"


def _notes(group: Sequence[Mapping[str, Any]]) -> list[Block]:
    lines = [
        f"{row['id']}: {note} ({words.count(n, 'seed')})."
        for row in group
        for note, n in row["notes"].items()
    ]  # fmt: skip
    return [Bullets(lines)] if lines else []


def _goals(results: Mapping[str, Any]) -> list[Block]:
    if not results["goals"]:
        return [Paragraph(f"The study does not run {AGENT}, which the goals are about.")]
    blocks: list[Block] = [Paragraph("Set before anything was measured, and answered for every target by itself.")]
    for goal, meaning in GOALS.items():
        if any(entry["goal"] == goal for entry in results["goals"]):
            blocks += [Paragraph(f"{goal.capitalize()}: {meaning}."), tables.goal_table(results["goals"], goal)]
    return blocks
