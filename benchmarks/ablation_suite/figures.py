"""Statistics of the ablations: arrays of log ratios in, numbers out.

Called by summary.py. Symbols: L learners (seeds), F families, T tasks of a family, x[l, t] log ratio of losses.

A figure is the mean of x over tasks, then over families with equal weight, then over learners, as a ratio. Learners
and tasks are both drawn, and both would be others the next time. With m_l the mean of learner l over tasks and
families, and x_t the mean of a task over learners,

    variance = var_l(m_l) / L + sum over families of var_t(x_t) / (T F^2)

to which what a learner makes of a single task contributes twice: the interval is a little too wide rather than too
narrow. Its degrees of freedom are Satterthwaite's (1946, Biometrics Bulletin 2:110), mostly those of the few
learners. (Resampling five learners would give intervals that are too narrow.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from trimtab.agents.base import Array
from trimtab.learning.curves import LEAST_SEEDS

__all__ = ["LEAST_SEEDS", "LEAST_TASKS", "estimate"]

LEAST_TASKS = 5  # of each family, as with seeds


def estimate(families: Sequence[Array]) -> dict[str, Any]:
    """A ratio, its value of each learner, and its 95 % interval over learners and tasks.

    Args:
        families: Log ratios of each family; (L, T), L is the same for all.

    Returns:
        `value`; `learners`, the value of each; `interval`, its two ends, or None with fewer than `LEAST_SEEDS`
        learners or `LEAST_TASKS` tasks of a family.
    """
    learners = np.mean([table.mean(axis=1) for table in families], axis=0)
    found: dict[str, Any] = {
        "value": float(np.exp(learners.mean())),
        "learners": np.exp(learners).tolist(),
        "interval": None,
    }
    if len(learners) >= LEAST_SEEDS and min(table.shape[1] for table in families) >= LEAST_TASKS:
        half = _half_width(families, learners)
        found["interval"] = [float(np.exp(learners.mean() - half)), float(np.exp(learners.mean() + half))]
    return found


def _half_width(families: Sequence[Array], learners: Array) -> float:
    """Half the width of the interval of the mean of `learners`, in logarithms."""
    parts = [(float(learners.var(ddof=1)) / len(learners), len(learners) - 1)]
    for table in families:
        tasks = table.mean(axis=0)
        parts.append((float(tasks.var(ddof=1)) / len(tasks) / len(families) ** 2, len(tasks) - 1))
    variance = sum(part for part, _ in parts)
    if variance == 0.0:
        return 0.0
    degrees = variance**2 / sum(part**2 / freedom for part, freedom in parts)
    return float(stats.t.ppf(0.975, degrees) * np.sqrt(variance))


def differences(ours: Mapping[str, Array], theirs: Mapping[str, Array]) -> dict[str, Array]:
    """Log ratios of one variant over another: the same learner's, on the same task; family -> (L, T)."""
    return {family: table - theirs[family] for family, table in ours.items()}
