"""The picture of learning: means, intervals and what is told apart, read from the figure itself."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_hex
from scipy import stats

from trimtab.learning import curves


def learner(ratios, held_out_ratios, ranks):
    """The lines of a curve with a look before the first and after each of the iterations, of 10 decisions each."""
    rows = []
    for index, (ratio, other, rank) in enumerate(zip(ratios, held_out_ratios, ranks, strict=True)):
        rows += [{"iteration": index, "n_decisions": 10.0}] if index else []
        families = {
            "quadratic": {"ratio_uwhg": ratio, "mean_rank": rank},
            "mlp": {"ratio_uwhg": other, "mean_rank": 2.0},
        }
        rows.append({"validation": True, "iteration": index, "families": families})
    return rows


FIVE = [learner((1.0, 2.0**power), (1.0, 1.5), (2.0, 1.0 + 0.1 * power)) for power in range(5)]


def drawn(axis, label):
    """The thick line of a family, and the band of its colour if there is one."""
    line = next(line for line in axis.lines if line.get_label() == label)
    bands = [band for band in axis.collections if to_hex(band.get_facecolor()[0][:3]) == to_hex(line.get_color())]
    return line, (bands[0].get_paths()[0].vertices if bands else None)


def test_the_band_is_the_t_interval_of_the_mean_over_five_learners():
    left, right = curves.make_figure(FIVE, ["mlp"]).axes
    line, band = drawn(left, "quadratic")
    np.testing.assert_allclose(line.get_xdata(), [0, 10])
    returns = 1 - 0.5 * (1.0 + 0.1 * np.arange(5))
    half = stats.t.ppf(0.975, 4) * returns.std(ddof=1) / np.sqrt(5)
    assert half == pytest.approx(2.7764 * 0.0790569 / 5**0.5, rel=1e-4)
    assert line.get_ydata()[1] == pytest.approx(returns.mean())
    ends = band[band[:, 0] == 10][:, 1]
    assert (ends.min(), ends.max()) == pytest.approx((returns.mean() - half, returns.mean() + half))
    # Ratios 1, 2, 4, 8, 16: the geometric mean is 4, and the interval is one of logarithms, so it is never below 0.
    line, band = drawn(right, "quadratic")
    half = stats.t.ppf(0.975, 4) * np.log(2) * np.sqrt(2.5 / 5)
    assert line.get_ydata()[1] == pytest.approx(4.0)
    ends = band[band[:, 0] == 10][:, 1]
    assert (ends.min(), ends.max()) == pytest.approx((4 * np.exp(-half), 4 * np.exp(half)))


def test_families_that_were_held_out_stand_beside_and_are_dashed():
    for axis in curves.make_figure(FIVE, ["mlp"]).axes:
        assert drawn(axis, "mlp (held out)")[0].get_linestyle() == "--"
        assert drawn(axis, "quadratic")[0].get_linestyle() == "-"


def test_four_learners_have_a_mean_and_no_band():
    assert curves.LEAST_SEEDS == 5
    left, right = curves.make_figure(FIVE[:4], []).axes
    assert drawn(right, "quadratic")[0].get_ydata()[1] == pytest.approx(2.0**1.5)
    assert not left.collections
    assert not right.collections


def test_ratios_far_apart_stand_on_a_log_scale_with_plain_numbers():
    figure = curves.make_figure(FIVE, ["mlp"])
    figure.draw_without_rendering()
    axis = figure.axes[1]
    low, high = axis.get_ylim()
    shown = [
        text.get_text()
        for place, text in zip(axis.get_yticks(), axis.get_yticklabels(), strict=True)
        if low <= place <= high
    ]
    assert axis.get_yscale() == "log"
    assert shown == ["1", "1.5", "2", "3", "5", "7", "10", "15"]
