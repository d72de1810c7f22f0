"""Numbers of one run, and of one arm over its runs: pure functions of what the run directories hold.

Called by results.py. None stands for "makes no sense here", "did not happen" or "was not finite"; what is counted
on a clock is named in TIME_METRICS, so that two reports can be compared without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trimtab.experiments.reading import Run
from trimtab.experiments.stats import BETTER, is_finite

__all__ = [
    "METRICS",
    "TIME_METRICS",
    "plateau",
    "run_metrics",
    "sensitivity",
    "stability",
    "threshold_crossing",
    "uses_to_pay_back",
]

_FROM_METRICS = (
    "test_loss",
    "best_val_loss",
    "final_val_loss",
    "final_train_loss",
    "test_accuracy",
    "test_f1",
    "test_mse",
    "eval_loss",
    "eval_accuracy",
    "epoch",
    "optimizer_steps",
    "samples",
    "flops",
    "budget_used",
)
_FROM_TIMES = (
    "eval_runtime",
    "eval_samples_per_second",
    "eval_steps_per_second",
    "total_train_time",
    "controller_time",
    "avg_inference_tokens_per_second",
)
_FROM_RESULT = ("n_decisions", "n_interventions", "n_rollbacks")
_FROM_SERIES = ("steps_to_threshold", "epochs_to_threshold", "steps_to_plateau", "epochs_to_plateau")

TIME_METRICS = (*_FROM_TIMES, "controller_share")
METRICS = (*_FROM_METRICS, *_FROM_SERIES, *_FROM_RESULT, *TIME_METRICS)

_SMOOTHING = 3  # validations in the trailing mean: enough against single outliers, short against a run's 30 or 40
_PLATEAU_GAIN = 0.01  # 1 % relative: about the seed noise of a validation loss in these tasks
_NOT_WORSE = 0.05  # an arm pays back if it is surely at most 5 % behind the tuned schedule


def run_metrics(run: Run, threshold: float | None) -> dict[str, float | None]:
    """Every metric of one run.

    Args:
        run: The run; an unfinished or failed one has None almost everywhere.
        threshold: Validation loss that counts as "there", or None where no arm gives one.

    Returns:
        One entry for each name in METRICS. `controller_share` = controller_time / total_train_time.
    """
    found: dict[str, float | None] = {name: _number(run.metrics.get(name)) for name in _FROM_METRICS}
    there = threshold_crossing(run.series, threshold)
    flat = plateau(run.series)
    found["steps_to_threshold"], found["epochs_to_threshold"] = there if run.is_over else (None, None)
    found["steps_to_plateau"], found["epochs_to_plateau"] = flat if run.is_over else (None, None)
    found.update({name: _number(run.result.get(name)) for name in _FROM_RESULT})
    found.update({name: _number(run.times.get(name)) for name in _FROM_TIMES})
    spent, whole = found["controller_time"], found["total_train_time"]
    found["controller_share"] = spent / whole if spent is not None and whole else None
    return found


def threshold_crossing(
    series: Sequence[Mapping[str, Any]], threshold: float | None
) -> tuple[float | None, float | None]:
    """Optimizer steps and epochs at the first validation loss at or below a threshold; None where it never is.

    >>> threshold_crossing([{"optimizer_step": 20, "epoch": 0.5, "val_loss": 0.4}], 0.5)
    (20.0, 0.5)
    """
    if threshold is not None:
        for row in _validated(series):
            if row["val_loss"] <= threshold:
                return _number(row.get("optimizer_step")), _number(row.get("epoch"))
    return None, None


def plateau(series: Sequence[Mapping[str, Any]]) -> tuple[float | None, float | None]:
    """Optimizer steps and epochs at which a run stops getting better.

    s_i = mean of the validation losses i-2 .. i (fewer at the start). The plateau begins at the first interval i
    from which s improves by less than 1 % until the end: s_i - min_{j > i} s_j < 0.01 |s_i|. A run that only meets
    this at its last validation has no plateau: None.
    """
    rows = _validated(series)
    losses = [float(row["val_loss"]) for row in rows]
    smooth = [float(np.mean(losses[max(0, i - _SMOOTHING + 1) : i + 1])) for i in range(len(losses))]
    for i in range(len(smooth) - 1):
        if smooth[i] - min(smooth[i + 1 :]) < _PLATEAU_GAIN * abs(smooth[i]):
            return _number(rows[i].get("optimizer_step")), _number(rows[i].get("epoch"))
    return None, None


def stability(runs: Sequence[Run]) -> dict[str, float] | None:
    """How differently an arm moves a knob from seed to seed.

    Mean over the intervals of a run of the standard deviation across seeds (n - 1) of log10 of the knob as read
    back. 0: every seed takes the same path; 0.3: paths differ by a factor of two.

    Returns:
        Knob -> value; None with fewer than two runs. Intervals that fewer than two runs reached, and values that
        have no logarithm, are left out.
    """
    if len(runs) < 2:
        return None
    paths: dict[str, dict[int, list[float]]] = {}
    for run in runs:
        for row in run.series:
            step = round(row.get("spent", row["optimizer_step"]))
            for knob, value in (row.get("knobs") or {}).items():
                if is_finite(value) and value > 0:
                    paths.setdefault(knob, {}).setdefault(step, []).append(math.log10(value))
    spreads = {
        knob: [float(np.std(values, ddof=1)) for _, values in sorted(steps.items()) if len(values) > 1]
        for knob, steps in sorted(paths.items())
    }
    return {knob: float(np.mean(values)) for knob, values in spreads.items() if values} or None


def sensitivity(runs: Sequence[Run]) -> dict[str, Any] | None:
    """How much the final validation loss depends on the initial rate.

    Over the seeds that every rate was run with (all seeds where there is no such seed): mean final validation
    loss of each rate; worst / best of these means; geometric spread = exp(standard deviation of their logarithms).
    Both are None where a rate has no finite loss at all: such an arm depends on its rate beyond any number.

    Returns:
        None with fewer than two initial rates.
    """
    by_rate: dict[float, dict[int, float | None]] = {}
    for run in runs:
        if run.initial_lr is not None and run.is_over:
            by_rate.setdefault(run.initial_lr, {})[run.seed] = _number(run.metrics.get("final_val_loss"))
    if len(by_rate) < 2:
        return None
    rates = sorted(by_rate)
    shared = set.intersection(*(set(by_rate[rate]) for rate in rates))
    losses: list[float | None] = []
    without: list[int] = []
    for rate in rates:
        values = [value for seed, value in sorted(by_rate[rate].items()) if seed in shared or not shared]
        finite = [value for value in values if value is not None]
        losses.append(float(np.mean(finite)) if finite else None)
        without.append(len(values) - len(finite))
    known = [loss for loss in losses if loss is not None]
    usable = len(known) == len(rates) and min(known) > 0
    return {
        "initial_lrs": rates,
        "final_val_loss": losses,
        "runs_without_a_finite_loss": without,
        "seeds": sorted(shared),
        "worst_over_best": max(known) / min(known) if usable else None,
        "geometric_spread": math.exp(float(np.std(np.log(known), ddof=1))) if usable else None,
    }


def uses_to_pay_back(
    learning: int, tuning: int, difference: Mapping[str, Any] | None, unit: str = "steps"
) -> tuple[float | None, str]:
    """After how many training runs an arm has saved what it cost to learn.

    A use is one training run with the arm as it is, instead of first tuning a schedule on the same task. What it
    saves is the cost of the tuning runs; uses = cost of learning / cost of tuning, rounded up, 0 for an arm that cost
    nothing to learn. It counts only where the arm can stand in for the tuned schedule: shown better, or
    the interval's upper end at most 5 % of the tuned schedule's mean loss above it.

    Args:
        learning: Spent on learning before this study's runs: optimizer steps, or FLOPs where budgets are in FLOPs.
        tuning: Spent in the tuning runs of the tuned schedule on this task.
        difference: Of the arm against the tuned schedule, as in results.json; None where there is none.
        unit: What both are in: "steps" or "FLOPs".

    Returns:
        The number, or None, and in words why.
    """
    if difference is None:
        return None, "no tuned schedule in this study to save"
    if difference.get("interval") is None:
        return None, "too few seeds to say whether it can stand in for the tuned schedule"
    if tuning <= 0:
        return None, "no tuning runs recorded, so nothing is saved"
    upper, margin = difference["interval"][1], _NOT_WORSE * abs(difference["reference_mean"])
    if difference["verdict"] != BETTER and upper > margin:
        return None, "no gain: not shown to come within 5 % of the tuned schedule"
    return float(math.ceil(learning / tuning)), f"learning {unit} / {unit} of the tuning runs saved"


def _validated(series: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in series if is_finite(row.get("val_loss"))]


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if is_finite(value) else None
