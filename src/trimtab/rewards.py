"""Rewards: how good the last interval was, one number per run each, higher is better.

Called through the registry by the controller, at a decision, for the decision before. What cannot be computed (a
first decision, no validation where accuracy is asked for) is 0. A rolled-back interval is not rewarded by these
but lies below the lowest of the run by `ControlSpec.penalty`.
"""

from __future__ import annotations

import numpy as np

from trimtab.run_state import Array, Interval, RunState, Value

__all__ = ["accuracy_improvement", "improvement", "log_improvement", "negative_loss", "score_rank"]


def _array(value: Value) -> Array:
    """As (R,), 0 where it is not finite."""
    array = np.atleast_1d(np.asarray(value, dtype=np.float64))
    return np.where(np.isfinite(array), array, 0.0)


def _watched(interval: Interval) -> Array:
    """Validation loss, or train loss where there is none; (R,)."""
    val_loss = np.atleast_1d(np.asarray(interval.val_loss, dtype=np.float64))
    return np.where(np.isnan(val_loss), interval.train_loss, val_loss)


def negative_loss(state: RunState) -> Array:
    """-L: minus the validation loss (train loss where there is none), in the loss's unit; (R,)."""
    return _array(-_watched(state.current))


def improvement(state: RunState) -> Array:
    """L_before - L: drop of the validation loss (train loss where there is none), in the loss's unit; (R,)."""
    return _array(_watched(state.previous) - _watched(state.current))


def log_improvement(state: RunState) -> Array:
    """log(L_before / L), without unit: the same early and late; 0 where a loss is not positive; (R,)."""
    before, now = _watched(state.previous), _watched(state.current)
    with np.errstate(all="ignore"):
        return _array(np.where((before > 0) & (now > 0), np.log(before / now), np.nan))


def accuracy_improvement(state: RunState) -> Array:
    """Rise of the validation accuracy, in shares of 1; 0 where no accuracy is reported; (R,)."""
    return _array(state.current.accuracy - state.previous.accuracy)


def score_rank(state: RunState) -> Array:
    """Minus the rank of the run's final loss on the score split among the runs of its task, in [-0.5, 0.5]; (R,).

    0 before the episode's end, and for a run on its own. Equal losses share their mean rank; a loss that is not
    finite is the worst. Ranks are the same whatever the task's unit of loss, and a whole episode has one: a reward
    of every interval makes an agent greedy (FINDINGS section 5).
    """
    score = np.atleast_1d(np.asarray(state.score_loss, dtype=np.float64))
    n_runs = max(len(score), len(np.atleast_1d(np.asarray(state.current.train_loss))))
    out = np.zeros(n_runs)
    if state.groups is None or np.isnan(state.score_loss).all():
        return out
    worst_if_bad = np.where(np.isfinite(score), score, np.inf)
    for group in np.unique(state.groups):
        members = np.flatnonzero(state.groups == group)
        if len(members) > 1:
            mine, theirs = worst_if_bad[members, None], worst_if_bad[None, members]
            better = (theirs < mine).sum(1) + 0.5 * ((theirs == mine).sum(1) - 1)  # equal ones share their mean rank
            out[members] = 0.5 - better / (len(members) - 1)
    return out
