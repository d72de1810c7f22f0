"""Signals: what a controller sees of a run, one number per run each, scale-free unless it says "raw".

Called through the registry by the spec. Every signal maps RunState to a float64 array (R,) inside its bounds; what
was not measured (a first decision, no validation) is 0, the middle of a ratio's range. Natural logarithms unless
it says log10. Sources: FINDINGS section 5 (features of the first trials).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trimtab.run_state import Array, RunState

__all__ = ["Signal"]


@dataclass(frozen=True)
class Signal:
    """One observed number per run.

    Attributes:
        formula: RunState -> (R,), NaN where it was not measured.
        low: Smallest value; smaller ones are clipped.
        high: Largest value; larger ones are clipped.
    """

    formula: Callable[[RunState], Array]
    low: float
    high: float

    def __call__(self, state: RunState) -> Array:
        """The signal's value now, clipped, 0 where it was not measured; (R,)."""
        with np.errstate(all="ignore"):
            raw = self.formula(state)
        return np.asarray(np.clip(np.where(np.isnan(raw), 0.0, raw), self.low, self.high))


def _log_ratio(new: Array, old: Array) -> Array:
    return np.asarray(np.log(new / old))


# log(smoothed train loss / the one a decision before)
train_loss_log_ratio = Signal(lambda s: _log_ratio(s.smoothed_loss, s.previous_smoothed_loss), -3.0, 3.0)
# log(validation loss / the one a decision before)
val_loss_log_ratio = Signal(lambda s: _log_ratio(s.current.val_loss, s.previous.val_loss), -3.0, 3.0)
# log(validation loss / the best so far); 0 at the best, positive above it
val_loss_log_ratio_best = Signal(lambda s: _log_ratio(s.current.val_loss, s.best_val_loss), 0.0, 3.0)
# log(mean loss of the interval's second half / of its first half)
loss_slope = Signal(lambda s: _log_ratio(s.current.second_half_loss, s.current.first_half_loss), -3.0, 3.0)
# log(validation loss / smoothed train loss)
generalization_gap = Signal(lambda s: _log_ratio(s.current.val_loss, s.smoothed_loss), -3.0, 3.0)
# log(gradient norm / the one a decision before)
grad_norm_log_ratio = Signal(lambda s: _log_ratio(s.current.grad_norm, s.previous.grad_norm), -3.0, 3.0)
# mean cosine between g_t and u_(t-1), theta_t = theta_(t-1) - u_(t-1): positive when the last step was too short
grad_update_cosine = Signal(lambda s: s.current.grad_update_cosine, -1.0, 1.0)
# log10(|u| / |theta|) + 2.5: 0 at updates of 0.3 % of the weights
update_to_weight = Signal(lambda s: np.log10(s.current.update_ratio) + 2.5, -3.0, 3.0)
# optimizer steps taken / budget; 0 where the horizon is unknown
progress = Signal(lambda s: s.progress, 0.0, 1.0)
# log10(level of the rate / its level at the start), before the base schedule
lr_log_ratio_start = Signal(lambda s: np.log10(s.settings["lr"] / s.initial_settings["lr"]), -6.0, 6.0)
# level of the rate on the unit interval of its bounds (log scale)
lr_unit = Signal(lambda s: s.unit_settings["lr"], 0.0, 1.0)
# weight decay on the unit interval of its bounds (log scale)
weight_decay_unit = Signal(lambda s: s.unit_settings["weight_decay"], 0.0, 1.0)
# raw: validation loss, or the interval's train loss where there is none; for rules that compare losses themselves
watched_loss = Signal(RunState.watched_loss, -1e30, 1e30)
