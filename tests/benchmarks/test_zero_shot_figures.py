"""Statistics of the zero-shot benchmark against closed forms."""

import itertools

import numpy as np
import pytest
from zero_shot_suite import figures
from zero_shot_suite.figures import CAP, NS, expected_best_of, search_curve, search_equivalent


def test_the_best_of_n_equals_the_average_over_all_draws():
    val = np.array([0.3, 0.1, 0.2])
    test = np.array([5.0, 2.0, 1.0])  # the best on validation is not the best on test
    for n in (1, 2, 3):
        kept = [test[min(draw, key=lambda run: val[run])] for draw in itertools.product(range(3), repeat=n)]
        assert expected_best_of(np.array([float(n)]), val, test)[0] == pytest.approx(np.mean(kept), rel=1e-12)


def test_with_two_runs_the_best_of_n_misses_the_better_one_with_probability_two_to_the_minus_n():
    curve = search_curve(np.array([1.0, 2.0]), np.array([0.0, 1.0]))
    np.testing.assert_allclose(curve, 0.5**NS, rtol=1e-12)


def test_runs_of_equal_validation_loss_are_kept_alike():
    curve = expected_best_of(np.array([1.0, 7.0]), np.array([1.0, 1.0, 1.0]), np.array([3.0, 6.0, 9.0]))
    np.testing.assert_allclose(curve, [6.0, 6.0], rtol=1e-12)
    swapped = expected_best_of(np.array([2.0]), np.array([1.0, 1.0, 2.0]), np.array([0.0, 4.0, 6.0]))
    assert swapped[0] == pytest.approx(2.0 * 8 / 9 + 6.0 / 9)  # both of the better ones count as 2


def test_search_equivalent_runs_of_a_loss_on_the_curve():
    val, test = np.array([1.0, 2.0]), np.array([0.0, 1.0])  # the best of n is expected at 2 ** -n
    for n in (1, 2, 5, 20):
        assert search_equivalent(0.5**n, val, test) == pytest.approx(n, rel=1e-9)
    # Half way between the best of 2 and of 3, in the loss: half way between them in log n.
    assert search_equivalent((0.25 + 0.125) / 2, val, test) == pytest.approx(np.sqrt(6.0))


def test_search_equivalent_runs_are_capped_and_never_below_one():
    val = np.linspace(0, 1, 128)
    assert search_equivalent(val[0], val, val) == CAP  # the optimum itself: no number of runs is sure to find it
    assert search_equivalent(-1.0, val, val) == CAP
    assert search_equivalent(val.mean(), val, val) == pytest.approx(1.0)
    assert search_equivalent(2.0, val, val) == 1.0


def test_search_equivalent_runs_are_monotone():
    generator = np.random.default_rng(0)
    val = generator.random(128)
    test = val + 0.3 * generator.standard_normal(128)  # a noisy choice: the curve itself need not fall
    losses = np.linspace(test.min() - 0.1, test.max() + 0.1, 200)
    found = [search_equivalent(float(loss), val, test) for loss in losses]
    assert all(worse <= better for better, worse in itertools.pairwise(found))
    assert (found[0], found[-1]) == (CAP, 1.0)


def test_a_search_does_not_depend_on_the_pools_order_or_size():
    val, test = np.array([0.4, 0.1, 0.3]), np.array([2.0, 1.0, 5.0])
    np.testing.assert_allclose(search_curve(val, test), search_curve(val[::-1], test[::-1]), rtol=1e-12)
    np.testing.assert_allclose(search_curve(np.tile(val, 4), np.tile(test, 4)), search_curve(val, test), rtol=1e-12)


def test_geometric_mean():
    assert figures.geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    assert figures.geometric_mean([1.1]) == pytest.approx(1.1)


def test_bootstrap_draws_whole_groups():
    seen = []

    def figure(drawn, generator):
        seen.append(tuple(drawn))
        return float(len(drawn))

    interval = figures.bootstrap_groups(["a", "b", "a", "c", "d", "e"], figure, n=500)
    for drawn in seen:
        assert drawn.count(0) == drawn.count(2)  # the two of group a together, or not at all
        assert len(drawn) == 5 + drawn.count(0)  # five groups
    assert max(map(len, seen)) > 6 > min(map(len, seen)) == 5
    assert interval == (5.0, 9.0)


def test_bootstrap_of_few_groups_is_as_wide_as_students_t():
    values = np.random.default_rng(2).standard_normal(8)
    low, high = figures.bootstrap_groups(list("abcdefgh"), lambda drawn, _: float(values[drawn].mean()), n=20_000)
    half = 2.365 * values.std(ddof=1) / np.sqrt(8)  # the middle 95 % of the draws: 0.77 of it
    assert high - low == pytest.approx(2 * half, rel=0.1)


def test_bootstrap_of_a_mean_is_as_wide_as_theory_says():
    values = np.random.default_rng(1).standard_normal(400)
    groups = [str(number) for number in range(400)]
    low, high = figures.bootstrap_groups(groups, lambda drawn, _: float(values[drawn].mean()), n=2000)
    half = 1.96 * values.std() / np.sqrt(400)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert figures.bootstrap_groups(["a", "b", "c", "d", "a"], lambda drawn, _: 1.0, n=10) is None


def test_time_to_target():
    curve = [[0, 3.0], [10, 2.0], [20, None], [30, 1.0], [40, 2.5]]
    assert figures.time_to_target(curve, 2.0, 40) == 0.25
    assert figures.time_to_target(curve, 1.5, 40) == 0.75
    assert figures.time_to_target(curve, 0.5, 40) == float("inf")
