"""Metrics of runs: closed forms."""

import math
from dataclasses import replace

import pytest

from trimtab.experiments.metrics import (
    METRICS,
    TIME_METRICS,
    plateau,
    run_metrics,
    sensitivity,
    stability,
    threshold_crossing,
    uses_to_pay_back,
)
from trimtab.experiments.reading import Run

RUN = Run(
    path="runs/x", arm="a", task="t", dataset="d", role="report", seed=0, initial_lr=1e-3, total_steps=60,
    status="done", error=None, metrics={}, times={}, result={}, series=(), decisions=(),
)  # fmt: skip


def rows(losses, *, every=20):
    return [
        {"optimizer_step": every * i, "epoch": every * i / 40, "val_loss": loss, "knobs": {}}
        for i, loss in enumerate(losses)
    ]


def test_every_name_is_there_and_what_makes_no_sense_is_none():
    found = run_metrics(RUN, 0.5)
    assert set(found) == set(METRICS)
    assert set(found.values()) == {None}
    assert {"eval_loss", "eval_accuracy", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second",
            "epoch"} <= set(METRICS)  # fmt: skip
    assert set(TIME_METRICS) <= set(METRICS)


def test_values_come_from_where_the_runner_wrote_them():
    run = replace(
        RUN,
        metrics={"test_loss": 0.25, "test_mse": float("nan"), "eval_accuracy": 1, "epoch": 3.5},
        times={"total_train_time": 8.0, "controller_time": 2.0},
        result={"n_decisions": 3, "n_rollbacks": 0},
        series=tuple(rows([2.0, 1.0, 0.4])),
    )
    found = run_metrics(run, 1.0)
    assert found["test_loss"] == 0.25
    assert found["test_mse"] is None
    assert found["eval_accuracy"] == 1.0
    assert found["controller_share"] == 0.25
    assert (found["n_decisions"], found["n_rollbacks"], found["n_interventions"]) == (3.0, 0.0, None)
    assert (found["steps_to_threshold"], found["epochs_to_threshold"]) == (20.0, 0.5)


def test_threshold_is_reached_at_the_first_validation_at_or_below_it():
    series = rows([2.0, None, 1.0, 0.8, 1.2, 0.5])
    assert threshold_crossing(series, 1.0) == (40.0, 1.0)
    assert threshold_crossing(series, 0.4) == (None, None)
    assert threshold_crossing(series, None) == (None, None)


def test_plateau_begins_where_the_smoothed_loss_stops_gaining_one_percent():
    # trailing means of three: 4, 3, 7/3, 4/3, 1, 1, 1 -> within 1 % of the rest's minimum from index 4
    assert plateau(rows([4.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0])) == (80.0, 2.0)
    assert plateau(rows([1.0, 1.0, 1.0])) == (0.0, 0.0)
    assert plateau(rows([1.0, 1.2, 1.4])) == (0.0, 0.0)  # getting worse is no improvement
    assert plateau(rows([2.0**-i for i in range(10)])) == (None, None)  # still getting better at the end
    assert plateau([]) == (None, None)


def test_stability_is_the_spread_over_seeds_of_the_logarithm():
    def run(seed, *rates):
        series = [{"optimizer_step": i, "knobs": {"lr": rate}} for i, rate in enumerate(rates)]
        return replace(RUN, seed=seed, series=tuple(series))

    # log10: (0, 0) and (-2, -1): standard deviations 0 and 1/sqrt(2); the third step has one run alone
    found = stability([run(0, 1.0, 1e-2), run(1, 1.0, 1e-1, 5.0)])
    assert found == {"lr": pytest.approx(0.5 / math.sqrt(2))}
    assert stability([run(0, 1.0)]) is None
    assert stability([run(0, 0.0), run(1, 0.0)]) is None


def test_sensitivity_over_shared_seeds():
    def run(rate, seed, loss, status="done"):
        return replace(RUN, initial_lr=rate, seed=seed, metrics={"final_val_loss": loss}, status=status)

    runs = [run(0.1, 0, 4.0), run(0.1, 1, 4.0), run(0.01, 0, 1.0), run(0.01, 1, 1.0), run(0.01, 2, 99.0)]
    found = sensitivity(runs)
    assert found["initial_lrs"] == [0.01, 0.1]
    assert found["final_val_loss"] == [1.0, 4.0]  # seed 2 was not run from both
    assert found["seeds"] == [0, 1]
    assert found["worst_over_best"] == 4.0
    assert found["geometric_spread"] == pytest.approx(math.exp(math.log(4) / math.sqrt(2)))
    lost = sensitivity([*runs[2:4], run(0.1, 0, None), run(0.1, 1, float("inf"))])
    assert (lost["worst_over_best"], lost["runs_without_a_finite_loss"]) == (None, [0, 2])
    assert sensitivity(runs[:2]) is None
    assert sensitivity([*runs[:2], run(0.01, 0, 1.0, status="unfinished")]) is None


@pytest.mark.parametrize(
    ("steps", "entry", "uses", "why"),
    [
        (1000, {"interval": [-0.2, -0.1], "verdict": "better", "reference_mean": 1.0}, 2.0, "learning steps / steps"),
        (1000, {"interval": [-0.2, 0.04], "verdict": "no difference shown", "reference_mean": 1.0}, 2.0, "learning"),
        (0, {"interval": [0.0, 0.0], "verdict": "no difference shown", "reference_mean": 1.0}, 0.0, "learning steps"),
        (1000, {"interval": [-0.2, 0.06], "verdict": "no difference shown", "reference_mean": 1.0}, None, "no gain"),
        (1000, {"interval": [0.1, 0.2], "verdict": "worse", "reference_mean": 1.0}, None, "no gain"),
        (1000, {"interval": None, "verdict": "too few seeds to say", "reference_mean": 1.0}, None, "too few seeds"),
        (1000, None, None, "no tuned schedule"),
    ],
)
def test_uses_to_pay_back(steps, entry, uses, why):
    found, words = uses_to_pay_back(steps, 600, entry)
    assert found == uses
    assert why in words


def test_without_tuning_runs_nothing_is_saved():
    entry = {"interval": [-0.2, -0.1], "verdict": "better", "reference_mean": 1.0}
    assert uses_to_pay_back(10, 0, entry) == (None, "no tuning runs recorded, so nothing is saved")
