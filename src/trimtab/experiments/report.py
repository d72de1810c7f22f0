"""Write the report of a study: results.json, plots, report.md, report.html, final_info.json.

Called by `trimtab run` at its end and by `trimtab report DIR`; it reads run directories alone, so that a report
can be written again at any time, also of a study that is under way.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.experiments import plots, words
from trimtab.experiments.design import FLOPS
from trimtab.experiments.document import Block, Bullets, Diff, Heading, Image, Notice, Paragraph, to_markdown
from trimtab.experiments.final_info import write_final_info
from trimtab.experiments.plot_style import Plot
from trimtab.experiments.reading import StudyFolder, read_study
from trimtab.experiments.report_grid import grid_tables
from trimtab.experiments.report_html import to_html
from trimtab.experiments.report_tables import plan_table, rate, result_tables
from trimtab.experiments.results import collect_study
from trimtab.experiments.stats import MIN_SEEDS
from trimtab.storage import atomic_write, read_json, write_json

__all__ = ["write"]

_GUARDED = {"learned": "learned arms", "rule": "rules", "yoked": "yoked twins"}
_MAX_NAMED = 12  # missing runs named one by one before the rest is counted


def write(out: Path) -> Path:
    """Write everything that a study's folder gives.

    Args:
        out: The folder that `trimtab run` wrote; the study may be unfinished, which the report then says.

    Returns:
        The path of report.html.

    Raises:
        InputError: There is no study in the folder.
        OutputError: The folder cannot be written.
    """
    out = Path(out)
    if _kind_of(out) == "pruning":
        from trimtab.experiments.pruning import report as pruning_report

        return pruning_report.write(out)
    study = read_study(out)
    results = collect_study(study)
    write_json(out / "results.json", results)
    write_final_info(study, out)
    pictures = plots.write_all(study, results, out / "plots")
    blocks = compose(study, results, pictures)
    atomic_write(out / "report.md", to_markdown(blocks, out))
    atomic_write(out / "report.html", to_html(f"trimtab: {results['study']}", blocks))
    return out / "report.html"


def _kind_of(out: Path) -> str | None:
    """What study.json says of its kind; None of a study that controls training, and where there is none."""
    plan = read_json(out / "study.json") if (out / "study.json").is_file() else None
    return plan.get("kind") if isinstance(plan, dict) else None


def compose(study: StudyFolder, results: Mapping[str, Any], pictures: list[Plot]) -> list[Block]:
    """The report as blocks, in the order in which it is read."""
    blocks: list[Block] = [Heading(1, f"Study {results['study']}"), *_unfinished(results)]
    blocks += [Heading(2, "Idea"), Paragraph(str(study.plan.get("idea") or "The study states none."))]
    blocks += [Heading(2, "Plan"), *_plan(study, results)]
    blocks += [Heading(2, "Results"), *_how_to_read(results)]
    for task in results["tasks"]:
        blocks += _results(task, results, [plot for plot in pictures if plot.task == task])
    blocks += _notes(study, results)
    blocks += [Heading(2, "Benchmark results"), *_benchmark(results)]
    blocks += [Heading(2, "Recommended configuration changes"), *_recommendations(study, results)]
    blocks += [Heading(2, "Conclusion"), Bullets(results["conclusion"] or ["There is nothing to conclude from."])]
    return blocks


def _unfinished(results: Mapping[str, Any]) -> list[Block]:
    state = results["unfinished"]
    blocks: list[Block] = []
    if state["n_over"] < state["n_planned"]:
        blocks.append(
            Notice(
                f"Unfinished: {state['n_over']} of {state['n_planned']} runs have a result. Missing:",
                _shortened(state["missing"]),
            )
        )
    if state["problems"]:
        blocks.append(Notice("Folders that are not used:", _shortened(state["problems"])))
    return blocks


def _shortened(items: list[str]) -> list[str]:
    rest = len(items) - _MAX_NAMED
    return items if rest <= 0 else [*items[:_MAX_NAMED], f"and {rest} more; results.json names them all"]


def _plan(study: StudyFolder, results: Mapping[str, Any]) -> list[Block]:
    plan = study.plan
    rates = {(row["id"], row["task"]): row["initial_lr"] for row in results["arms"]}
    seeds = words.count(int(plan.get("n_seeds") or 0), "seed")
    items = [
        f"Scale {plan.get('scale')}, root seed {plan.get('root_seed')}, {seeds} for each arm and task.",
        *(_task(study, task) for task in study.tasks),
        "Same start: with the same seed every arm has the same data order, initial weights and dropout.",
        "The validation set is what arms may look at; the test set is read once, at the end of a run.",
        *_unequal(study, results),
        *_tuning(study),
    ]
    if plan.get("sensitivity_lrs"):
        listed = words.listing([f"{value:g}" for value in plan["sensitivity_lrs"]])
        items.append(f"Sensitivity: the arms are also run from initial rates of {listed}.")
    for task, entry in (plan.get("restricted") or {}).items():
        few = words.count(int(entry["n_seeds"]), "seed")
        items.append(f"{task} is run with {words.listing(entry['arms'])} alone, from their main rate, {few} each.")
    environment = ", ".join(f"{name} {value}" for name, value in (plan.get("environment") or {}).items())
    items.append(f"Environment: {environment or 'not recorded'}.")
    items += [f"Left out: {entry.get('task')}, since {entry.get('why')}." for entry in results["left_out"]]
    return [plan_table(plan["arms"], study.tasks, rates), Bullets(items)]


def _task(study: StudyFolder, task: str) -> str:
    steps = sorted({run.total_steps for run in study.of(task=task, role="report")})
    budget = f"{words.listing([f'{count:,}' for count in steps])} optimizer steps" if steps else "no run yet"
    if steps and study.budget == FLOPS:
        flops = sorted({run.flops_budget for run in study.of(task=task, role="report")})
        listed = words.listing([words.number(count / 1e9) for count in flops])
        budget = f"{listed} training GFLOPs for every arm, those of {budget} as the task has them"
    return f"Task {task} (data set {study.dataset(task)}): budget of a run {budget}."


def _unequal(study: StudyFolder, results: Mapping[str, Any]) -> list[str]:
    """Where arms are not treated alike: how often they are validated, and who has the guard."""
    items = []
    if any(len(_validations(results, task)) > 1 for task in study.tasks):
        items.append(
            "Validation: before training, and before each decision. Arms that decide at other times are validated at "
            "other times, as the table of speed says: the best loss of a run, and when it first gets somewhere, favour "
            "those that are validated more often; what is measured at the end does not."
        )
    guarded = [name for kind, name in _GUARDED.items() if any(arm.kind == kind for arm in study.arms)]
    if guarded and any(arm.kind in ("baseline", "placebo") for arm in study.arms):
        rules = [arm.id for arm in study.arms if arm.kind == "rule"]
        items.append(
            f"Guard: {words.listing(guarded)} go back, and cut their rate, when a run diverges; baselines and placebos "
            "do not. From a rate at which runs diverge, a gain over those may be the guard's."
            + (f" Rules here: {words.listing(rules)}." if rules else "")
        )
    return items


def _validations(results: Mapping[str, Any], task: str) -> set[float]:
    found = {row["n_validations"] for row in results["arms"] if row["task"] == task}
    return {number for number in found if number is not None}


def _tuning(study: StudyFolder) -> list[str]:
    tuning = study.plan.get("tuning")
    if not tuning:
        return ["No schedule of the study was tuned."]
    lrs = sorted(tuning.get("lrs") or [])
    items = []
    for task, chosen in (tuning.get("chosen") or {}).items():
        runs = study.of(arm=study.tuned_arm, task=task, role="tuning") if study.tuned_arm else []
        tried = words.listing([f"{value:g}" for value in lrs])
        text = (
            f"Tuning on {task}: {tuning.get('arm')} got the rate {rate(chosen)} out of {tried}, chosen in "
            f"{words.count(len(runs), 'run')} on other seeds than those reported."
        )
        if lrs and chosen in (lrs[0], lrs[-1]):
            text += " It lies at the edge of the rates tried, so a better one may lie beyond: the bar may be too low."
        items.append(text)
    return items or ["Tuning has not chosen a rate yet."]


def _how_to_read(results: Mapping[str, Any]) -> list[Block]:
    counted = [
        entry
        for row in results["arms"]
        for entry in row["differences"].values()
        if entry["interval"] is not None and not entry["identical"]
    ]
    text = (
        f"Differences are paired by seed. Under {MIN_SEEDS} seeds there is no interval and no verdict; from five to "
        "ten seeds the interval is Student's t, above ten a BCa bootstrap. "
    )
    if counted:
        chance = max(1, round(0.05 * len(counted)))
        text += (
            f"{len(counted)} comparisons below have an interval of 95 %, each for itself: were all arms the same, "
            f"about {chance} of them would still exclude zero."
        )
    return [Paragraph(text)]


def _results(task: str, results: Mapping[str, Any], pictures: list[Plot]) -> list[Block]:
    rows = [row for row in results["arms"] if row["task"] == task]
    blocks: list[Block] = [Heading(3, task)]
    if not any(row["seeds"] for row in rows):
        return [*blocks, Paragraph("No run on this task has begun.")]
    by_kind: dict[str, list[Image]] = {}
    for plot in pictures:
        by_kind.setdefault(plot.kind, []).append(Image(plot.path, plot.alt, plot.caption))
    outcome, *others = result_tables(rows, results["thresholds"][task])
    entries = [entry for entry in results["grid"] if entry["task"] == task]
    by_rate: list[Block] = [*grid_tables(entries, rows, results["tuned_arm"])]
    sensitivity = by_kind.get("sensitivity", [])
    # A study that is run from a grid of rates is made for what those tables say: they come first.
    first, last = ([*by_rate, *sensitivity], []) if by_rate else ([], sensitivity)
    blocks += [
        *first,
        outcome,
        *by_kind.get("loss", []),
        *by_kind.get("differences", []),
        *by_kind.get("learning", []),
        *others,
        *last,
        *by_kind.get("knob", []),
        *by_kind.get("reward", []),
    ]
    return blocks


def _notes(study: StudyFolder, results: Mapping[str, Any]) -> list[Block]:
    """What runs said of themselves, and why runs failed."""
    counts: dict[str, int] = {}
    for run in study.runs:
        for note in run.result.get("notes") or []:
            counts[f"{run.arm} on {run.task}: {note}"] = counts.get(f"{run.arm} on {run.task}: {note}", 0) + 1
    lines = [f"{text} ({words.count(n, 'run')})" for text, n in counts.items()]
    errors = [f"{run.arm} on {run.task}, {run.role}, seed {run.seed}: {run.error}" for run in study.runs if run.error]
    blocks: list[Block] = []
    if errors:
        blocks += [Heading(3, "Runs that failed"), Bullets(_shortened(errors))]
    if lines:
        blocks += [Heading(3, "Notes of the runs"), Bullets(_shortened(lines))]
    return blocks


def _benchmark(results: Mapping[str, Any]) -> list[Block]:
    found = results["benchmark"]
    if not found["tasks"]:
        return [Paragraph("The study names no second data set, so there are no benchmark results.")]
    blocks: list[Block] = [Paragraph("The same arms, untouched, on data sets that nothing was chosen on.")]
    for task in found["tasks"]:
        rows = [row for row in found["arms"] if row["task"] == task]
        blocks.append(Heading(3, task))
        blocks += result_tables(rows, found["thresholds"][task]) or [Paragraph("No run on this task has begun.")]
    return blocks


def _recommendations(study: StudyFolder, results: Mapping[str, Any]) -> list[Block]:
    config = study.plan.get("user_config") or {}
    blocks: list[Block] = []
    for task in results["tasks"]:
        changes = [change for change in results["recommendations"] if change["task"] == task]
        if len(results["tasks"]) > 1:
            blocks.append(Heading(3, task))
        if changes:
            blocks.append(Diff(_diff(config, changes)))
        blocks.append(Paragraph(results["recommendation_reasons"][task]))
    return blocks or [Paragraph("Nothing is recommended: the study has no task.")]


def _diff(config: Mapping[str, Any], changes: list[dict[str, Any]]) -> list[str]:
    """The user's configuration with the changes, as a diff."""
    new = {change["setting"]: change for change in changes}
    lines = []
    for setting, value in config.items():
        if setting in new:
            lines += [f"-{setting}: {_value(new[setting]['old'])}", f"+{setting}: {_value(new.pop(setting)['new'])}"]
        else:
            lines.append(f" {setting}: {_value(value)}")
    for setting, change in new.items():
        lines += [f"-{setting}: {_value(change['old'])}"] if change["old"] is not None else []
        lines.append(f"+{setting}: {_value(change['new'])}")
    return lines


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else " ".join(str(value).split())
