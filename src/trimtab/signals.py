"""Signals: what a controller sees of a run, one number per run each, scale-free unless it says "raw".

Called through the registry by the spec. Every signal maps RunState to a float64 array (R,) inside its bounds; what
was not measured (a first decision, no validation) is 0, the middle of a ratio's range. Natural logarithms unless
it says log10. Sources: FINDINGS section 5 (features of the first trials).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from trimtab.run_state import Array, RunState, Value

__all__ = ["Signal", "observe"]

_LOG_300 = math.log10(300.0)


@dataclass(frozen=True)
class Signal:
    """One observed number per run.

    Attributes:
        formula: RunState -> (R,), or a float for a single run; NaN where it was not measured.
        low: Smallest value; smaller ones are clipped.
        high: Largest value; larger ones are clipped.
    """

    formula: Callable[[RunState], Value]
    low: float
    high: float

    def __call__(self, state: RunState) -> Array:
        """The signal's value now, clipped, 0 where it was not measured; (R,)."""
        return observe([self], state)[:, 0]


def observe(signals: Sequence[Signal], state: RunState) -> Array:
    """The values of signals now, clipped, 0 where they were not measured; (R, S)."""
    if not signals:
        return np.zeros((1, 0))
    raw = [signal.formula(state) for signal in signals]
    if all([isinstance(value, float) for value in raw]):
        row = [0.0 if x != x else min(max(x, signal.low), signal.high) for x, signal in zip(raw, signals, strict=True)]
        return np.array([row])
    # What all runs share, such as the progress, may be one number beside arrays.
    rows = np.stack(np.broadcast_arrays(*map(np.atleast_1d, raw)), axis=1).astype(np.float64)
    low, high = np.array([signal.low for signal in signals]), np.array([signal.high for signal in signals])
    return np.where(np.isnan(rows), 0.0, np.minimum(np.maximum(rows, low), high))


def _log_ratio(new: Value, old: Value) -> Value:
    """log(new / old); NaN where one of them is not measured or not positive."""
    if isinstance(new, float) and isinstance(old, float):
        return math.log(new / old) if 0 < new < math.inf and 0 < old < math.inf else math.nan
    with np.errstate(all="ignore"):
        return np.asarray(np.where((new > 0) & (old > 0), np.log(new / old), np.nan))


def _log10(value: Value) -> Value:
    if isinstance(value, float):
        return math.log10(value) if 0 < value < math.inf else math.nan
    with np.errstate(all="ignore"):
        return np.asarray(np.where(value > 0, np.log10(value), np.nan))


def _worst_if_nan(loss: Value) -> Value:
    if isinstance(loss, float):
        return loss if loss == loss else math.inf
    return np.asarray(np.where(np.isnan(loss), np.inf, loss))


def _is_known(value: Value) -> Value:
    if isinstance(value, float):
        return float(value == value)
    return np.where(np.isnan(value), 0.0, 1.0)


def _log_share(part: Value, whole: Value) -> Value:
    """log(part / whole + 0.001) + 2; NaN where the whole is not positive."""
    if isinstance(part, float) and isinstance(whole, float):
        known = 0 <= part < math.inf and 0 < whole < math.inf
        return math.log(part / whole + 0.001) + 2.0 if known else math.nan
    with np.errstate(all="ignore"):
        return np.asarray(np.where((part >= 0) & (whole > 0), np.log(part / whole + 0.001) + 2.0, np.nan))


def _unit(state: RunState, knob: str) -> Value:
    setting = state.settings[knob]
    if isinstance(setting, float) and knob in state.to_unit_one:
        return state.to_unit_one[knob](setting)
    found = np.asarray(state.to_unit[knob](np.atleast_1d(setting)))
    # One array among them would make `observe` take the long way for every signal of a single run.
    return found if isinstance(setting, np.ndarray) else float(found[0])


# log(smoothed train loss / the one a decision before)
train_loss_log_ratio = Signal(
    lambda s: _log_ratio(s.summary.smoothed_loss, s.summary.previous_smoothed_loss), -3.0, 3.0
)
# log(validation loss / the one a decision before)
val_loss_log_ratio = Signal(lambda s: _log_ratio(s.current.val_loss, s.previous.val_loss), -3.0, 3.0)
# log(validation loss / the best so far); 0 at the best, positive above it
val_loss_log_ratio_best = Signal(lambda s: _log_ratio(s.current.val_loss, s.summary.best_val_loss), 0.0, 3.0)
# log(mean loss of the interval's second half / of its first half)
loss_slope = Signal(lambda s: _log_ratio(s.current.second_half_loss, s.current.first_half_loss), -3.0, 3.0)
# log(validation loss / smoothed train loss)
generalization_gap = Signal(lambda s: _log_ratio(s.current.val_loss, s.summary.smoothed_loss), -3.0, 3.0)
# log(gradient norm / the one a decision before)
grad_norm_log_ratio = Signal(lambda s: _log_ratio(s.current.grad_norm, s.previous.grad_norm), -3.0, 3.0)
# mean cosine between g_t and u_(t-1), theta_t = theta_(t-1) - u_(t-1): positive when the last step was too short
grad_update_cosine = Signal(lambda s: s.current.grad_update_cosine, -1.0, 1.0)
# log10(|u| / |theta|) + 2.5: 0 at updates of 0.3 % of the weights
update_to_weight = Signal(lambda s: _log10(s.current.update_ratio) + 2.5, -3.0, 3.0)
# optimizer steps taken / budget; 0 where the horizon is unknown
progress = Signal(lambda s: s.progress, 0.0, 1.0)
# log10(level of the rate / its level at the start), before the base schedule
lr_log_ratio_start = Signal(lambda s: _log10(s.settings["lr"] / s.initial_settings["lr"]), -6.0, 6.0)
# level of the rate on the unit interval of its bounds (log scale)
lr_unit = Signal(lambda s: _unit(s, "lr"), 0.0, 1.0)
# weight decay on the unit interval of its bounds (log scale)
weight_decay_unit = Signal(lambda s: _unit(s, "weight_decay"), 0.0, 1.0)
# present level of these knobs on the unit interval of their bounds, on the knob's own scale
momentum_unit = Signal(lambda s: _unit(s, "momentum"), 0.0, 1.0)
beta2_unit = Signal(lambda s: _unit(s, "beta2"), 0.0, 1.0)
grad_clip_unit = Signal(lambda s: _unit(s, "grad_clip"), 0.0, 1.0)
dropout_unit = Signal(lambda s: _unit(s, "dropout"), 0.0, 1.0)
batch_size_unit = Signal(lambda s: _unit(s, "batch_size"), 0.0, 1.0)
accumulation_unit = Signal(lambda s: _unit(s, "accumulation"), 0.0, 1.0)
layers_unit = Signal(lambda s: _unit(s, "layers"), 0.0, 1.0)
units_unit = Signal(lambda s: _unit(s, "units"), 0.0, 1.0)
# place of the optimizer among its choices, 0 for the first and 1 for the last
optimizer_unit = Signal(lambda s: _unit(s, "optimizer"), 0.0, 1.0)
# place among the knobs of the one that the coming decision moves, 0 for the first and 1 for the last
turn = Signal(lambda s: s.turn, 0.0, 1.0)
# log(mean train loss of the interval / of the one before), not smoothed
interval_loss_log_ratio = Signal(lambda s: _log_ratio(s.current.train_loss, s.previous.train_loss), -3.0, 3.0)
# log(validation loss / the first one)
val_loss_log_ratio_start = Signal(lambda s: _log_ratio(s.current.val_loss, s.summary.initial_val_loss), -6.0, 3.0)
# 1 where a validation loss was measured in this interval, 0 where not
has_val_loss = Signal(lambda s: _is_known(s.current.val_loss), 0.0, 1.0)
# log(standard deviation of the interval's train losses / their mean, + 0.001) + 2
loss_noise = Signal(lambda s: _log_share(s.current.loss_std, s.current.train_loss), -5.0, 3.0)
# log10(|u| / |theta|) + 2.5 of the layer (matrix or kernel) where it is smallest, median, largest
update_to_weight_min = Signal(lambda s: _log10(s.current.layer_ratio_min) + 2.5, -3.0, 3.0)
update_to_weight_median = Signal(lambda s: _log10(s.current.layer_ratio_median) + 2.5, -3.0, 3.0)
update_to_weight_max = Signal(lambda s: _log10(s.current.layer_ratio_max) + 2.5, -3.0, 3.0)
# log10 of the factor by which the rate was moved last, by agent or guard; 0 before the first move
last_move = Signal(lambda s: s.last_moves.get("lr", 0.0), -2.0, 2.0)
# 1 after a roll-back, then 0.8 of it at each decision
rollback_memory = Signal(lambda s: s.rollback_memory, 0.0, 1.0)
# log10(level of the rate / the lowest one that was rolled back); 0 where none was
lr_log_ratio_bad = Signal(lambda s: _log10(s.settings["lr"] / s.lowest_bad_rate), -3.0, 3.0)
# log(steps of the interval / of an ordinary one): how much the numbers of a short early one can be trusted
interval_log_ratio = Signal(lambda s: _log_ratio(s.current.n_steps, s.main_interval), -4.0, 4.0)
# log10(budget in optimizer steps / 300); 0 where the horizon is unknown
budget_log_steps = Signal(lambda s: _log10(s.budget) - _LOG_300, -1.5, 1.5)
# raw: validation loss, or the interval's train loss where there is none; for rules that compare losses themselves
# (NaN is the worst, so that a run that has diverged is never taken for one with a loss of 0)
watched_loss = Signal(lambda s: _worst_if_nan(s.watched_loss()), -1e30, 1e30)
