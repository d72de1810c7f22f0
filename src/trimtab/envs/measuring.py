"""From what a batch of runs measured in an interval to what signals read: `Meter` for R runs at once.

Called by the vector environment. The rules are those of `trimtab.meter` and `trimtab.gradients`, so that a policy
sees in use what it saw when it learned (tests/parity/test_envs.py).
"""

from __future__ import annotations

import numpy as np

from trimtab.run_state import Array, Interval
from trimtab.training.batched import IntervalStats

__all__ = ["join", "summarize"]


def summarize(stats: IntervalStats, val_loss: Array) -> Interval:
    """One interval of the runs of a batch.

    Args:
        stats: What the batch measured.
        val_loss: Validation loss at its end, NaN where none was reported; (R,).

    Returns:
        Arrays of (R,).
    """
    losses, counts = stats.losses.double().cpu().numpy(), stats.counts
    # All end together: the places of a run's steps, from 0, negative before its first.
    place = np.arange(len(losses))[:, None] - (len(losses) - counts)
    is_first_half = (place >= 0) & (place < np.maximum(1, counts // 2))
    is_second_half = place >= np.maximum(1, counts // 2)
    update, weight, gradient, product = stats.norms.double().cpu().numpy().transpose(1, 0, 2)
    with np.errstate(all="ignore"):
        cosine = np.clip(product / update / gradient, -1.0, 1.0)
        has_cosine = (update > 0) & (gradient > 0) & np.isfinite(product)
        has_ratio = (update > 0) & (weight > 0) & np.isfinite(update)
        lowest, median, highest = spread(stats.layer_ratios.double().cpu().numpy())
        return Interval(
            _mean(losses, place >= 0),
            _mean(losses, is_first_half),
            _mean(losses, is_second_half),
            np.where(np.isnan(val_loss), np.nan, val_loss),
            np.full(losses.shape[1], np.nan),
            _mean(gradient, np.isfinite(gradient)),
            _mean(cosine, has_cosine),
            _mean(update / weight, has_ratio),
            np.sqrt(_mean((losses - _mean(losses, place >= 0)) ** 2, place >= 0)),
            lowest,
            median,
            highest,
            counts.astype(np.float64),
        )


def spread(ratios: Array) -> tuple[Array, Array, Array]:
    """Smallest, median (the lower of two) and largest layer; (m, layers, R) -> three of (R,).

    A layer's ratio is its mean over the measured steps; layers that a run has not, or that are not finite, are left
    out.
    """
    if not len(ratios):
        nothing = np.full(ratios.shape[2], np.nan)
        return nothing, nothing, nothing
    means = np.sort(_mean(ratios, np.isfinite(ratios) & (ratios > 0)), axis=0)  # NaN comes last
    counts = (~np.isnan(means)).sum(0)
    runs = np.arange(means.shape[1])
    return means[0], means[np.maximum(counts - 1, 0) // 2, runs], means[np.maximum(counts - 1, 0), runs]


def _mean(values: Array, is_good: np.ndarray) -> Array:
    """Mean over the first axis of what is good; NaN where nothing is."""
    counts = is_good.sum(0)
    return np.where(counts > 0, np.where(is_good, values, 0.0).sum(0) / np.maximum(counts, 1), np.nan)


def join(intervals: list[Interval]) -> Interval:
    """The intervals of several batches, run after run."""
    return Interval(*[np.concatenate(parts) for parts in zip(*intervals, strict=True)])
