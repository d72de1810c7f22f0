"""results.json: everything a study found, computed from its run directories alone.

Called by report.py and by tests. Two calls over folders that are equal but for the clock give dicts that are equal
but for the fields in "time_fields". One entry of "arms" is one arm on one task; differences are arm - reference,
paired by seed, so that a negative one is a gain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.experiments import conclusions, metrics
from trimtab.experiments.design import FLOPS
from trimtab.experiments.grid import collect_grid
from trimtab.experiments.reading import Arm, Run, StudyFolder, read_study
from trimtab.experiments.stats import compare, summarize

__all__ = ["collect", "collect_study"]

_MAIN = "test_loss"
_SECOND = "best_val_loss"
_IDLE = {"baseline": "it decides nothing", "search": "it is a search"}  # why nothing is paid back


def collect(out: Path) -> dict[str, Any]:
    """Compute the results of the study in a folder.

    Args:
        out: The folder that `trimtab run` wrote; the study may be unfinished.

    Raises:
        InputError: There is no study in it.
    """
    return collect_study(read_study(Path(out)))


def collect_study(study: StudyFolder) -> dict[str, Any]:
    """As `collect`, of a study that was read already."""
    thresholds = {task: _threshold(study, task) for task in study.tasks}
    rows = [_row(study, arm, task, "report", thresholds[task]) for task in study.tasks for arm in study.arms_on(task)]
    benchmark_thresholds = {task: _threshold(study, task, "benchmark") for task in study.benchmark_tasks}
    benchmark = [
        _row(study, arm, task, "benchmark", benchmark_thresholds[task])
        for task in study.benchmark_tasks
        for arm in study.arms
        if study.of(arm=arm.id, task=task, role="benchmark")
    ]
    results: dict[str, Any] = {
        "schema": 1,
        "study": study.plan.get("study"),
        "scale": study.plan.get("scale"),
        "root_seed": study.plan.get("root_seed"),
        "n_seeds": study.plan.get("n_seeds"),
        "tasks": list(study.tasks),
        "budget": study.budget,
        "environment": study.plan.get("environment") or {},
        "time_fields": sorted(metrics.TIME_METRICS),
        "unfinished": {
            "n_planned": study.n_planned,
            "n_over": study.n_over,
            "missing": list(study.missing),
            "problems": list(study.problems),
        },
        "tuned_arm": study.tuned_arm,
        "user_arm": {task: _user_arm(study, task) for task in study.tasks},
        "thresholds": thresholds,
        "arms": rows,
        "grid": collect_grid(study, rows, thresholds),
        "benchmark": {
            "tasks": list(study.benchmark_tasks),
            "thresholds": benchmark_thresholds,
            "arms": benchmark,
        },
        "left_out": list(study.plan.get("left_out") or []),
    }
    changes, reasons = conclusions.recommendations(results, study.plan.get("user_config") or {})
    results["recommendations"], results["recommendation_reasons"] = changes, reasons
    results["conclusion"] = conclusions.sentences(results)
    return results


def _row(study: StudyFolder, arm: Arm, task: str, role: str, threshold: Mapping[str, Any]) -> dict[str, Any]:
    seeds = sorted({run.seed for run in study.of(task=task, role=role)})
    runs = {run.seed: run for run in study.of(arm=arm.id, task=task, role=role)}
    numbers = {seed: metrics.run_metrics(run, threshold["value"]) for seed, run in runs.items()}
    table = {
        name: _summary(name, [numbers[seed][name] if seed in numbers else None for seed in seeds])
        for name in metrics.METRICS
    }
    differences = _differences(study, arm, task, role)
    own = [run for run in runs.values() if run.is_over]
    return {
        "id": arm.id,
        "task": task,
        "dataset": study.dataset(task),
        "kind": arm.kind,
        "of": arm.of,
        "agent": arm.agent,
        "options": dict(arm.options),
        "knobs": list(arm.knobs),
        "initial_lr": study.rate(arm, task, role),
        "seeds": seeds,
        "n_seeds": table[_MAIN]["n"],
        "n_validations": summarize([len(run.series) - 1 for run in own if run.series]).mean,
        "metrics": table,
        "differences": differences,
        "cost": _cost(study, arm, task, own, differences),
        "search": _search(own) if arm.kind == "search" else None,
        "stability": metrics.stability(own),
        "sensitivity": metrics.sensitivity([*study.of(arm=arm.id, task=task, role="sensitivity"), *own])
        if role == "report"
        else None,
        "status": _status(study.seeds_on(task), seeds, runs),
    }


def _summary(name: str, values: Sequence[float | None]) -> dict[str, Any]:
    """A summary; a mean of times to reach something is only given where every seed reached it."""
    summary = summarize(values).to_json()
    reaching = name.startswith(("steps_to_", "epochs_to_"))
    if reaching and 0 < summary["n"] < len(values):  # the mean of those that got there would flatter the others
        summary.update({"mean": None, "stderr": None, "interval": None, "method": None})
    return summary


def _status(n_planned: int, seeds: Sequence[int], runs: Mapping[int, Run]) -> dict[str, Any]:
    """What became of the planned runs: counts that add up to "planned"."""
    planned = max(n_planned, len(seeds), len(runs))
    counts = {
        status: sum(run.status == status for run in runs.values())
        for status in ("done", "gave_up", "failed", "unfinished")
    }
    over = [run for run in runs.values() if run.status in ("done", "gave_up")]
    return {
        "planned": planned,
        **counts,
        "not_started": planned - len(runs),
        "without_a_test_loss": sum(summarize([run.metrics.get(_MAIN)]).n == 0 for run in over),
        "errors": sorted({f"seed {run.seed}: {run.error}" for run in runs.values() if run.error}),
    }


def _differences(study: StudyFolder, arm: Arm, task: str, role: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for reference, roles in _references(study, arm, task).items():
        pairs = {
            metric: compare(_by_seed(study, arm.id, task, role, metric), _by_seed(study, reference, task, role, metric))
            for metric in (_MAIN, _SECOND)
        }
        found[reference] = {
            "roles": roles,
            **pairs[_MAIN].to_json(_MAIN),
            "second": pairs[_SECOND].to_json(_SECOND),
        }
    return found


def _references(study: StudyFolder, arm: Arm, task: str) -> dict[str, list[str]]:
    """Arms to compare an arm with, and what each of them is to it."""
    found: dict[str, list[str]] = {}

    def add(reference: str | None, what: str) -> None:
        if reference is not None and reference != arm.id and what not in found.setdefault(reference, []):
            found[reference].append(what)

    add(study.tuned_arm, "tuned")
    if arm.decides:
        for other in study.arms:
            if other.of == arm.id and other.kind in ("placebo", "yoked"):
                add(other.id, other.kind)
            elif other.kind == "baseline" and other.agent in ("constant", "default-cosine"):
                add(other.id, other.agent)
            elif other.kind == "rule" and arm.kind == "learned":
                add(other.id, "rule")
            elif other.kind == "search":
                add(other.id, "search")
            elif other.kind == "baseline" and other.agent == arm.base and _same_rate(study, other, arm, task):
                add(other.id, "same schedule and rate")
        for name, what in _siblings(study, arm):
            add(name, what)
    if arm.kind not in ("placebo", "yoked"):
        add(_user_arm(study, task), "user")
    here = {other.id for other in study.arms_on(task)}
    return {reference: roles for reference, roles in found.items() if reference in here}


def _siblings(study: StudyFolder, arm: Arm) -> list[tuple[str, str]]:
    """Learned arms before this one, so that each pair stands there once, with its agent and knobs; and what differs."""
    found = []
    for other in study.arms[: study.arms.index(arm)]:
        if arm.kind == other.kind == "learned" and (arm.agent, arm.knobs) == (other.agent, other.knobs):
            has_learned_more = arm.options == other.options and arm.learn_runs > other.learn_runs
            found.append((other.id, "fewer runs" if has_learned_more else "same agent"))
    return found


def _same_rate(study: StudyFolder, one: Arm, other: Arm, task: str) -> bool:
    rate = study.rate(one, task)
    return rate is not None and rate == study.rate(other, task)


def _user_arm(study: StudyFolder, task: str) -> str | None:
    """The baseline arm that does what the user's own configuration does: its schedule, at its rate if one has it."""
    config = study.plan.get("user_config") or {}
    schedule = config.get("schedule")
    same = [arm for arm in study.arms_on(task) if arm.kind == "baseline" and schedule in (arm.agent, arm.id)]
    rate = config.get("lr")
    rate = rate.get(task) if isinstance(rate, Mapping) else rate
    exact = [arm for arm in same if rate is not None and study.rate(arm, task) == rate]
    return next((arm.id for arm in [*exact, *same]), None)


def _by_seed(study: StudyFolder, arm: str, task: str, role: str, metric: str) -> dict[int, float | None]:
    return {run.seed: run.metrics.get(metric) for run in study.of(arm=arm, task=task, role=role)}


def _cost(
    study: StudyFolder, arm: Arm, task: str, runs: Sequence[Run], differences: Mapping[str, Any]
) -> dict[str, Any]:
    """What an arm cost before its first run here. Seeds share a brain, or each has its own: the dearest counts."""
    learning = [run.result.get("learning") or {} for run in runs]
    learning_steps = max((int(entry.get("optimizer_steps") or 0) for entry in learning), default=0)
    tuning = study.of(arm=study.tuned_arm, task=task, role="tuning") if study.tuned_arm else []
    tuning_steps = sum(run.total_steps for run in tuning)
    is_tuned = arm.id == study.tuned_arm
    paid = learning_steps, tuning_steps, differences.get(study.tuned_arm or "")
    if study.budget == FLOPS:
        flops = max((int(entry.get("flops") or 0) for entry in learning), default=0)
        paid = flops, sum(run.flops_budget for run in tuning), paid[2]
    taught = next((dict(run.taught) for run in runs if run.taught), None)
    uses, why = (
        metrics.uses_to_pay_back(*paid, "FLOPs" if study.budget == FLOPS else "steps")
        if arm.decides
        else (None, _IDLE.get(arm.kind, "it is a control"))
    )
    if taught is not None and uses is not None:
        why += "; what its brain took before is not counted"
    return {
        "taught": taught,
        "learning_runs": max((int(entry.get("runs") or 0) for entry in learning), default=0),
        "learning_optimizer_steps": learning_steps,
        "tuning_runs": len(tuning) if is_tuned else 0,
        "tuning_optimizer_steps": tuning_steps if is_tuned else 0,
        "search_trials": max((int(_found(run).get("trials") or 0) for run in runs), default=0),
        "search_flops": max((int(run.metrics.get("flops") or 0) for run in runs if _found(run)), default=0),
        "uses_to_pay_back": uses,
        "uses_to_pay_back_why": why,
    }


def _search(runs: Sequence[Run]) -> dict[str, Any]:
    """What the searches of an arm found, run by run; what one run gives is the first trial of each."""
    found = [_found(run) for run in runs]
    first = [entry.get("one_run") or {} for entry in found]
    return {
        "method": next((entry["method"] for entry in found if entry), None),
        "seeds": [run.seed for run in runs],
        "trials": [entry.get("trials") for entry in found],
        "pruned": [entry.get("pruned") for entry in found],
        "idle": [entry.get("idle") for entry in found],
        "values": [entry.get("values") for entry in found],
        "one_run_val_loss": summarize([entry.get("final_val_loss") for entry in first]).to_json(),
        "one_run_flops": summarize([entry.get("flops") for entry in first]).to_json(),
    }


def _found(run: Run) -> Mapping[str, Any]:
    """What a run that is a search says of itself; empty for all others."""
    entry: Mapping[str, Any] = run.result.get("search") or {}
    return entry


def _threshold(study: StudyFolder, task: str, role: str = "report") -> dict[str, Any]:
    """The validation loss that counts as "there": the tuned schedule's mean final one, else the best baseline's."""
    means = {
        arm.id: summarize(list(_by_seed(study, arm.id, task, role, "final_val_loss").values())).mean
        for arm in study.arms
        if arm.kind == "baseline" or arm.id == study.tuned_arm
    }
    known = {arm: mean for arm, mean in means.items() if mean is not None}
    if not known:
        return {"value": None, "arm": None, "is_tuned": False}
    tuned = study.tuned_arm if study.tuned_arm in known else None
    arm = tuned or min(known, key=lambda name: (known[name], name))
    return {"value": known[arm], "arm": arm, "is_tuned": tuned is not None}
