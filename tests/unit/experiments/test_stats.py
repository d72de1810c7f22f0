"""Intervals and verdicts: closed forms, edge cases, and coverage by simulation."""

import math

import numpy as np
import pytest

from trimtab.experiments.stats import (
    BETTER,
    NO_DIFFERENCE,
    TOO_FEW,
    WORSE,
    compare,
    mean_interval,
    summarize,
)


def test_t_interval_in_closed_form():
    # mean 3, standard deviation sqrt(2.5), t(0.975, 4) = 2.776445
    interval = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.7764451051977987 * math.sqrt(2.5 / 5)
    assert interval.method == "t"
    assert interval.low == pytest.approx(3 - half, abs=1e-12)
    assert interval.high == pytest.approx(3 + half, abs=1e-12)


@pytest.mark.parametrize(
    ("n", "method"), [(0, None), (1, None), (4, None), (5, "t"), (10, "t"), (11, "bca"), (40, "bca")]
)
def test_method_follows_the_number_of_seeds(n, method):
    interval = mean_interval(np.random.default_rng(0).normal(size=n).tolist())
    assert (interval.method if interval else None) == method


def test_bca_is_the_same_every_time_and_says_when_it_is_undefined():
    values = np.random.default_rng(1).exponential(size=15).tolist()
    assert mean_interval(values) == mean_interval(values)
    same = mean_interval([0.1] * 12)
    assert (same.low, same.high, same.method) == (0.1, 0.1, "t (BCa undefined)")


def test_bca_leans_to_the_long_tail_where_t_cannot():
    values = np.random.default_rng(3).lognormal(sigma=1.0, size=25)
    interval = mean_interval(values.tolist())
    assert interval.high - values.mean() > 1.15 * (values.mean() - interval.low)


# Nominal 95 %. 3,000 intervals have a standard error of sqrt(.95 * .05 / 3000) = .004: +-.016 is four of them. t is
# exact on normal differences.
@pytest.mark.parametrize("n", [5, 10])
def test_t_covers_what_it_says(n):
    covered = _coverage(n, 3000, n_resamples=1)
    assert 0.934 < covered < 0.966


# BCa at n = 20 is known to cover about 93 % on normal data: it has no t quantile and the standard deviation is taken
# with n. 1,000 intervals have a standard error of .008; .93 +- 3.5 of them is the band. An interval that forgot half
# its width (67 %), or one of 99 % (98 %), falls out of it.
def test_bca_covers_about_what_it_says():
    assert 0.902 < _coverage(20, 1000, n_resamples=1999) < 0.958


def _coverage(n: int, trials: int, n_resamples: int) -> float:
    rng = np.random.default_rng(20261121 + n)
    truth = 0.3
    hits = 0
    for _ in range(trials):
        interval = mean_interval(rng.normal(truth, 1.0, size=n).tolist(), n_resamples=n_resamples)
        hits += interval.low <= truth <= interval.high
    return hits / trials


def test_summary_leaves_out_what_is_missing_and_keeps_its_place():
    summary = summarize([1.0, None, float("nan"), 3.0, float("inf")])
    assert summary.values == (1.0, None, None, 3.0, None)
    assert (summary.n, summary.mean, summary.minimum, summary.maximum) == (2, 2.0, 1.0, 3.0)
    assert summary.stderr == pytest.approx(1.0)
    assert summary.interval is None
    assert summary.to_json()["method"] is None


def test_summary_of_nothing_and_of_one():
    assert summarize([]).to_json() == {
        "values": [], "n": 0, "mean": None, "stderr": None, "min": None, "max": None, "interval": None, "method": None,
    }  # fmt: skip
    one = summarize([2.0])
    assert (one.mean, one.stderr) == (2.0, None)


@pytest.mark.parametrize(
    ("shift", "verdict"), [(-0.5, BETTER), (0.5, WORSE), (0.0, NO_DIFFERENCE)], ids=["below", "above", "around"]
)
def test_verdict_follows_the_interval(shift, verdict):
    noise = [-0.1, 0.05, 0.0, 0.1, -0.05]
    reference = dict(enumerate([1.0, 2.0, 3.0, 4.0, 5.0]))
    arm = {seed: value + shift + noise[seed] for seed, value in reference.items()}
    found = compare(arm, reference)
    assert found.verdict == verdict
    assert found.mean == pytest.approx(shift, abs=1e-12)
    assert found.interval.high - found.interval.low < 0.25  # paired: the spread of the seeds themselves has gone
    if verdict != NO_DIFFERENCE:
        assert compare(arm, reference, lower_is_better=False).verdict == {BETTER: WORSE, WORSE: BETTER}[verdict]


def test_four_seeds_say_nothing_whatever_the_numbers():
    found = compare(dict.fromkeys(range(4), 0.0), dict.fromkeys(range(4), 100.0))
    assert (found.verdict, found.interval) == (TOO_FEW, None)
    assert found.differences == (-100.0,) * 4


def test_comparison_is_over_the_seeds_that_both_have_and_names_the_others():
    arm = {0: 1.0, 1: 1.0, 2: None, 3: 1.0, 4: 1.0, 5: 1.0, 7: 1.0}
    reference = {0: 2.0, 1: 2.1, 2: 2.0, 3: 2.2, 4: 2.0, 5: float("nan"), 6: 2.0, 7: 2.05}
    found = compare(arm, reference)
    assert found.seeds == (0, 1, 3, 4, 7)
    assert found.left_out == (2, 5, 6)
    assert found.verdict == BETTER
    assert found.reference_mean == pytest.approx(2.07)
    assert found.to_json("test_loss")["relative"] == pytest.approx(-1.07 / 2.07)


@pytest.mark.parametrize("n", [5, 12])
def test_a_placebo_equal_to_its_base_is_no_difference(n):
    values = {seed: 0.1 * seed + 0.03 for seed in range(n)}
    found = compare(values, dict(values))
    assert (found.interval.low, found.interval.high) == (0.0, 0.0)
    assert found.verdict == NO_DIFFERENCE
    assert found.identical


def test_nothing_in_common():
    found = compare({0: 1.0}, {1: 1.0})
    assert (found.verdict, found.mean, found.left_out, found.identical) == (TOO_FEW, None, (0, 1), False)
