"""RunState: all that a controller may see and touch of a training run (or of R runs at once).

Filled by the controller from what the loop measures; read by signals and rewards; touched by knobs. Per-run values
are float64 arrays of shape (R,); NaN stands for "not measured". R is 1 for a single run.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn
    from torch.optim import Optimizer

__all__ = ["Array", "Interval", "RunState"]

Array = npt.NDArray[np.float64]

# Weight of the newest interval in the smoothed train loss: half of it is forgotten after about two decisions.
SMOOTHING = 0.3


def _nan() -> Array:
    return np.full(1, np.nan)


@dataclass(frozen=True)
class Interval:
    """What was measured between two decisions; every array has shape (R,).

    Attributes:
        train_loss: Mean train loss of the interval's steps.
        first_half_loss: Mean over its first half (rounded down, at least one step).
        second_half_loss: Mean over the rest; NaN where the interval has one step.
        val_loss: Validation loss at its end.
        accuracy: Validation accuracy at its end, in [0, 1].
        grad_norm: Mean norm of the gradient over the measured steps.
        grad_update_cosine: Mean cosine between g_t and u_(t-1), where theta_t = theta_(t-1) - u_(t-1): positive
            when the last step was too short.
        update_ratio: Mean of |u| / |theta| over the measured steps.
    """

    train_loss: Array = field(default_factory=_nan)
    first_half_loss: Array = field(default_factory=_nan)
    second_half_loss: Array = field(default_factory=_nan)
    val_loss: Array = field(default_factory=_nan)
    accuracy: Array = field(default_factory=_nan)
    grad_norm: Array = field(default_factory=_nan)
    grad_update_cosine: Array = field(default_factory=_nan)
    update_ratio: Array = field(default_factory=_nan)

    def to_json(self) -> dict[str, list[float]]:
        """Plain lists, for a state_dict."""
        return {item.name: getattr(self, item.name).tolist() for item in fields(self)}

    @classmethod
    def from_json(cls, data: dict[str, list[float]]) -> Interval:
        """Inverse of `to_json`."""
        return cls(**{key: np.asarray(value, dtype=np.float64) for key, value in data.items()})


class RunState:
    """What may be seen and touched of a run.

    Args:
        optimizer: The optimizer whose settings knobs move.
        model: The model, where the caller gave one.
        loader: The data loader, where the caller gave one.
        total_steps: Budget in optimizer steps; None where the horizon is unknown.

    Attributes:
        optimizer_steps: Optimizer steps taken so far.
        current: Measurements of the interval that just ended.
        previous: Measurements of the one before it; all NaN at the first decision.
        initial_loss: Train loss of the very first step, before anything was learned; (R,); set by the controller.
        initial_val_loss, best_val_loss, best_train_loss, smoothed_loss, previous_smoothed_loss: (R,) each.
        settings: Level of each knob, in its unit, before the base schedule; (R,) each.
        unit_settings: The same on the unit interval of each knob's bounds.
        initial_settings: Level of each knob at the start.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module | None = None,
        loader: Iterable[Any] | None = None,
        total_steps: int | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.model = model
        self.loader = loader
        self.total_steps = total_steps
        self.optimizer_steps = 0
        self.current = Interval()
        self.previous = Interval()
        self.initial_loss = _nan()
        self.initial_val_loss = _nan()
        self.best_val_loss = _nan()
        self.best_train_loss = _nan()
        self.smoothed_loss = _nan()
        self.previous_smoothed_loss = _nan()
        self.settings: dict[str, Array] = {}
        self.unit_settings: dict[str, Array] = {}
        self.initial_settings: dict[str, Array] = {}

    @property
    def progress(self) -> Array:
        """Share of the budget used, in [0, 1]; NaN where the horizon is unknown; (R,)."""
        if self.total_steps is None:
            return _nan()
        return np.full(1, min(1.0, self.optimizer_steps / self.total_steps))

    def record(self, interval: Interval) -> None:
        """Take in the measurements of the interval that just ended."""
        self.previous, self.current = self.current, interval
        loss, val_loss = interval.train_loss, interval.val_loss
        self.initial_val_loss = _first(self.initial_val_loss, val_loss)
        self.best_train_loss = np.fmin(self.best_train_loss, loss)
        self.best_val_loss = np.fmin(self.best_val_loss, val_loss)
        self.previous_smoothed_loss = self.smoothed_loss
        blended = (1 - SMOOTHING) * self.smoothed_loss + SMOOTHING * loss
        self.smoothed_loss = np.where(np.isnan(self.smoothed_loss), loss, np.where(np.isnan(loss), self.smoothed_loss,
                                                                                   blended))

    def measurements(self) -> dict[str, Any]:
        """Everything that `record` changes, to be handed back to `rewind` if the interval is rolled back."""
        return {name: getattr(self, name) for name in ("current", "previous", *_SUMMARIES)}

    def rewind(self, measurements: dict[str, Any]) -> None:
        """Forget an interval that was rolled back; first values that it brought are kept."""
        for name, value in measurements.items():
            if not name.startswith("initial"):
                setattr(self, name, value)

    def watched_loss(self) -> Array:
        """Validation loss where it was measured, else the interval's train loss; (R,)."""
        return np.where(np.isnan(self.current.val_loss), self.current.train_loss, self.current.val_loss)

    def state_dict(self) -> dict[str, Any]:
        """Everything that was measured, as lists (NaN included) and plain numbers."""
        return {
            "optimizer_steps": self.optimizer_steps,
            "total_steps": self.total_steps,
            "current": self.current.to_json(),
            "previous": self.previous.to_json(),
            **{name: getattr(self, name).tolist() for name in _SUMMARIES},
            **{name: {key: value.tolist() for key, value in getattr(self, name).items()} for name in _SETTINGS},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.optimizer_steps = state["optimizer_steps"]
        self.total_steps = state["total_steps"]
        self.current = Interval.from_json(state["current"])
        self.previous = Interval.from_json(state["previous"])
        for name in _SUMMARIES:
            setattr(self, name, np.asarray(state[name], dtype=np.float64))
        for name in _SETTINGS:
            setattr(self, name, {key: np.asarray(value, dtype=np.float64) for key, value in state[name].items()})


_SUMMARIES = ("initial_loss", "initial_val_loss", "best_val_loss", "best_train_loss", "smoothed_loss",
              "previous_smoothed_loss")
_SETTINGS = ("settings", "unit_settings", "initial_settings")


def _first(kept: Array, new: Array) -> Array:
    return np.where(np.isnan(kept), new, kept)
