"""Features: the signals that learned policies look at, brought to like sizes.

Called by the policies and by the learners. A log ratio between two decisions is mostly a few hundredths, the share
of the budget goes from 0 to 1: a network that starts from random weights would be deaf to the first. Each signal is
multiplied by a fixed scale and clipped. Source of the scales: FINDINGS section 5 and its record, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from trimtab.agents.base import Array
from trimtab.errors import InputError, unknown_name

__all__ = ["LIMIT", "SCALES", "SIGNALS", "Features"]

# Scale-free, and none of them tells tasks apart. The absolute rate (`lr_unit`) is left out: it gained nothing on the
# family learned on and can only mislead elsewhere (FINDINGS' record, section 6).
SIGNALS = (
    "progress",
    "budget_log_steps",
    "interval_log_ratio",
    "loss_slope",
    "interval_loss_log_ratio",
    "train_loss_log_ratio",
    "loss_noise",
    "has_val_loss",
    "val_loss_log_ratio",
    "val_loss_log_ratio_best",
    "val_loss_log_ratio_start",
    "generalization_gap",
    "grad_update_cosine",
    "grad_norm_log_ratio",
    "update_to_weight",
    "update_to_weight_min",
    "update_to_weight_median",
    "update_to_weight_max",
    "lr_log_ratio_start",
    "last_move",
    "rollback_memory",
    "lr_log_ratio_bad",
)
# What a signal is multiplied by; 1 where none stands here.
SCALES = {
    "loss_slope": 4.0,
    "interval_loss_log_ratio": 4.0,
    "train_loss_log_ratio": 4.0,
    "val_loss_log_ratio": 4.0,
    "val_loss_log_ratio_best": 4.0,
    "generalization_gap": 2.0,
    "grad_norm_log_ratio": 2.0,
    "grad_update_cosine": 4.0,
    "lr_log_ratio_start": 0.5,
    "last_move": 2.0,
    "loss_noise": 0.5,
    "interval_log_ratio": 0.5,
}
LIMIT = 3.0  # one wild signal must not drown the others


class Features:
    """feature = clip(scale * signal, -LIMIT, LIMIT).

    Args:
        who: Name of the agent, for errors.
        signals: Names of the signals, in order; None for `SIGNALS`.
        scales: Signal -> its scale, where it is to be another than in `SCALES` (or 1).

    Attributes:
        signals: Names, in order; S of them.
        scales: The scale of every signal.

    Raises:
        InputError: No signal, one given twice, a scale of a signal that is not there, or one that is not positive.
    """

    def __init__(self, who: str, signals: Sequence[str] | None, scales: Mapping[str, float] | None) -> None:
        names = SIGNALS if signals is None else signals
        if isinstance(names, str) or not names or len(set(names)) != len(names):
            raise InputError(f"{who}: signals {names!r}; expected a list of one or more different names")
        self.who = who
        self.signals = tuple(names)
        for key in scales or {}:
            if key not in self.signals:
                raise unknown_name(f"signal with a scale, of agent {who!r}", key, self.signals)
        self.scales = {name: SCALES.get(name, 1.0) for name in self.signals} | dict(scales or {})
        for key, value in self.scales.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise InputError(f"{who}: scale of {key!r} is {value!r}; expected a positive number")
        self._row = np.array([float(self.scales[name]) for name in self.signals])

    def __call__(self, observation: Array) -> Array:
        """Features of each run; (R, S) -> (R, S).

        Raises:
            InputError: The observation has another number of signals.
        """
        if observation.shape[1] != len(self._row):
            raise InputError(
                f"{self.who}: an observation of shape {observation.shape}; expected {len(self._row)} columns, "
                f"one for each of {', '.join(self.signals)}"
            )
        scaled: Array = observation * self._row
        # Half the time of np.clip, and a decision stands in the middle of somebody's training step.
        np.minimum(scaled, LIMIT, out=scaled)
        np.maximum(scaled, -LIMIT, out=scaled)
        return scaled
