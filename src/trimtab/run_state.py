"""RunState: all that a controller may see and touch of a training run (or of R runs at once).

Filled by the controller from what the loop measures; read by signals and rewards; touched by knobs. A per-run value
is a float64 array of shape (R,), or, where there is a single run, a plain float: one NumPy call on one number costs
as much as a hundredth of a small network's training step (docs/decisions.md). NaN stands for "not measured".
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import nn
    from torch.optim import Optimizer

__all__ = ["Array", "BatchingLoop", "Interval", "RunState", "Summary", "Value"]

Array = npt.NDArray[np.float64]
Value = float | Array

# Weight of the newest interval in the smoothed train loss: half of it is forgotten after about two decisions.
SMOOTHING = 0.3


class Interval(NamedTuple):
    """What was measured between two decisions.

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
        loss_std: Standard deviation of the interval's train losses.
        layer_ratio_min: Smallest over the layers (matrices and kernels) of the mean of |u| / |theta|.
        layer_ratio_median: Median over the layers (the lower one of two).
        layer_ratio_max: Largest over the layers.
        n_steps: Optimizer steps in the interval.
    """

    train_loss: Value = math.nan
    first_half_loss: Value = math.nan
    second_half_loss: Value = math.nan
    val_loss: Value = math.nan
    accuracy: Value = math.nan
    grad_norm: Value = math.nan
    grad_update_cosine: Value = math.nan
    update_ratio: Value = math.nan
    loss_std: Value = math.nan
    layer_ratio_min: Value = math.nan
    layer_ratio_median: Value = math.nan
    layer_ratio_max: Value = math.nan
    n_steps: Value = math.nan


class Summary(NamedTuple):
    """What the intervals so far come to; replaced as a whole, so that an interval can be forgotten.

    Attributes:
        current: The interval that just ended.
        previous: The one before it.
        initial_val_loss: First validation loss.
        best_val_loss: Lowest validation loss.
        best_train_loss: Lowest mean train loss of an interval.
        smoothed_loss: Exponential average of the intervals' train losses.
        previous_smoothed_loss: The same a decision before.
    """

    current: Interval = Interval()
    previous: Interval = Interval()
    initial_val_loss: Value = math.nan
    best_val_loss: Value = math.nan
    best_train_loss: Value = math.nan
    smoothed_loss: Value = math.nan
    previous_smoothed_loss: Value = math.nan


class BatchingLoop(Protocol):
    """A loop that makes its own batches, as `TrainingLoop` does: what the knobs of the data can act on.

    Attributes:
        accumulation: Micro-batches averaged into one optimizer step.
        grad_clip: Largest norm of the gradient; None leaves it alone.
        max_batch_size: What memory was found to hold; None where it never ran out.
    """

    accumulation: int
    grad_clip: float | None
    max_batch_size: int | None

    @property
    def batch_size(self) -> int:
        """Samples in the next micro-batch."""

    @property
    def n_samples(self) -> int:
        """The largest batch there can be."""

    def resize(self, batch_size: int) -> None:
        """Take micro-batches of this size from the next step on."""


class RunState:
    """What may be seen and touched of a run.

    Args:
        optimizer: The optimizer whose settings knobs move.
        model: The model, where the caller gave one.
        loader: The data loader, or the loop, where the caller gave one.
        total_steps: Budget in optimizer steps of the cost that they have at the start; None where the horizon is
            unknown.

    Attributes:
        optimizer_steps: Optimizer steps taken so far.
        spent: What of the budget is used up, in its unit; the number of steps where nothing changes their cost.
        initial_loss: Train loss of the very first step, before anything was learned; set by the controller.
        summary: What was measured so far.
        settings: Level of each knob, in its unit, before the base schedule.
        initial_settings: Level of each knob at the start.
        to_unit: For each knob the map from its settings to the unit interval of its bounds.
        to_unit_one: The same for one number of a single run, where the controller knows it.
        last_moves: log10 of the factor by which each knob was moved last, by whomever; 0 before the first move.
        rollback_memory: 1 after a roll-back, and then forgotten by a fifth at each decision.
        lowest_bad_rate: Lowest setting of the rate that was rolled back; NaN where none was.
        main_interval: Steps of an ordinary interval, that is of the decisions after the early ones.
        score_loss: Loss on the score split at the end of an episode of learning; NaN before, and in use.
        turn: Place, in [0, 1], of the knob that the coming decision moves, where knobs move in turn.
        example_inputs: What the model's forward takes, as of a batch of training, for knobs that change its shape; None
            where the loader has to say.
        structure: What those knobs share (`trimtab.knobs.structure`), made by the first of them; None before.
        groups: Which runs are compared with one another in such an episode: the same number, the same task; (R,).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module | None = None,
        loader: Iterable[Any] | BatchingLoop | None = None,
        total_steps: int | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.model = model
        self.loader = loader
        self.total_steps = total_steps
        self.optimizer_steps = 0
        self.spent: float = 0
        self.initial_loss: Value = math.nan
        self.summary = Summary()
        self.settings: dict[str, Value] = {}
        self.initial_settings: dict[str, Value] = {}
        self.to_unit: dict[str, Callable[[Array], Array]] = {}
        self.to_unit_one: dict[str, Callable[[float], float]] = {}
        self.last_moves: dict[str, Value] = {}
        self.rollback_memory: Value = 0.0
        self.lowest_bad_rate: Value = math.nan
        self.main_interval: Value = math.nan
        self.score_loss: Value = math.nan
        self.turn: Value = math.nan
        self.example_inputs: Any = None
        self.structure: Any = None
        self.groups: npt.NDArray[np.int64] | None = None

    @property
    def current(self) -> Interval:
        """Measurements of the interval that just ended."""
        return self.summary.current

    @property
    def previous(self) -> Interval:
        """Measurements of the interval before it; all NaN at the first decision."""
        return self.summary.previous

    @property
    def progress(self) -> Value:
        """Share of the budget used, in [0, 1]; NaN where the horizon is unknown."""
        if self.total_steps is None:
            return math.nan
        return min(1.0, self.spent / self.total_steps)

    @property
    def budget(self) -> Value:
        """The budget in optimizer steps of the cost at the start; NaN where the horizon is unknown."""
        return math.nan if self.total_steps is None else float(self.total_steps)

    def note_move(self, knob: str, before: Value, now: Value) -> None:
        """Take in that a knob was moved, by whomever."""
        self.last_moves[knob] = _decades(before, now)

    def note_rollback(self, rolled_back: bool | npt.NDArray[np.bool_], rate: Value) -> None:
        """Take in, once at each decision, which runs were rolled back, and from which setting of the rate."""
        if isinstance(rolled_back, np.ndarray):
            self.rollback_memory = np.where(rolled_back, 1.0, 0.8 * np.asarray(self.rollback_memory))
            self.lowest_bad_rate = np.where(rolled_back, np.fmin(self.lowest_bad_rate, rate), self.lowest_bad_rate)
        else:
            self.rollback_memory = 1.0 if rolled_back else 0.8 * self.rollback_memory
            if rolled_back:
                self.lowest_bad_rate = _lower(self.lowest_bad_rate, rate)

    def note_val_loss(self, val_loss: Value) -> None:
        """Take in a validation loss, at any time; the first one is the initial one."""
        old = self.summary
        self.summary = old._replace(
            initial_val_loss=_first(old.initial_val_loss, val_loss), best_val_loss=_lower(old.best_val_loss, val_loss)
        )

    def record(self, interval: Interval) -> None:
        """Take in the measurements of the interval that just ended."""
        old, loss, val_loss = self.summary, interval.train_loss, interval.val_loss
        self.summary = Summary(
            interval,
            old.current,
            _first(old.initial_val_loss, val_loss),
            _lower(old.best_val_loss, val_loss),
            _lower(old.best_train_loss, loss),
            _first((1 - SMOOTHING) * old.smoothed_loss + SMOOTHING * loss, loss),
            old.smoothed_loss,
        )

    def watched_loss(self) -> Value:
        """Validation loss where it was measured, else the interval's train loss."""
        return _first(self.current.val_loss, self.current.train_loss)

    def state_dict(self) -> dict[str, Any]:
        """Everything that was measured, as plain numbers and lists (NaN included)."""
        summary = self.summary
        return {
            "optimizer_steps": self.optimizer_steps,
            "spent": self.spent,
            "total_steps": self.total_steps,
            "initial_loss": _plain(self.initial_loss),
            "current": [_plain(value) for value in summary.current],
            "previous": [_plain(value) for value in summary.previous],
            "rest": [_plain(value) for value in summary[2:]],
            "settings": {key: _plain(value) for key, value in self.settings.items()},
            "initial_settings": {key: _plain(value) for key, value in self.initial_settings.items()},
            "last_moves": {key: _plain(value) for key, value in self.last_moves.items()},
            "rollback_memory": _plain(self.rollback_memory),
            "lowest_bad_rate": _plain(self.lowest_bad_rate),
            "main_interval": _plain(self.main_interval),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.optimizer_steps = state["optimizer_steps"]
        self.spent = state["spent"]
        self.total_steps = state["total_steps"]
        self.initial_loss = _value(state["initial_loss"])
        current, previous, rest = ([_value(item) for item in state[key]] for key in ("current", "previous", "rest"))
        self.summary = Summary(Interval(*current), Interval(*previous), *rest)
        self.settings = {key: _value(value) for key, value in state["settings"].items()}
        self.initial_settings = {key: _value(value) for key, value in state["initial_settings"].items()}
        self.last_moves = {key: _value(value) for key, value in state["last_moves"].items()}
        self.rollback_memory = _value(state["rollback_memory"])
        self.lowest_bad_rate = _value(state["lowest_bad_rate"])
        self.main_interval = _value(state["main_interval"])


def _first(kept: Value, new: Value) -> Value:
    """`kept`, and `new` where that is NaN."""
    if isinstance(kept, np.ndarray) or isinstance(new, np.ndarray):
        return np.where(np.isnan(kept), new, kept)
    return kept if kept == kept else new


def _lower(kept: Value, new: Value) -> Value:
    """The lower of two; the other where one is NaN."""
    if isinstance(kept, np.ndarray) or isinstance(new, np.ndarray):
        return np.asarray(np.fmin(kept, new))
    return new if new < kept or kept != kept else kept


def _decades(before: Value, now: Value) -> Value:
    """log10(now / before); 0 where one of them is not positive."""
    if isinstance(before, np.ndarray) or isinstance(now, np.ndarray):
        before, now = np.broadcast_arrays(np.asarray(before, np.float64), np.asarray(now, np.float64))
        out = np.zeros(before.shape)
        good = (before > 0) & (now > 0)
        out[good] = np.log10(now[good] / before[good])
        return out
    return math.log10(now / before) if before > 0 and now > 0 else 0.0


def _plain(value: Value) -> float | list[float]:
    plain: float | list[float] = value.tolist() if isinstance(value, np.ndarray) else value
    return plain


def _value(plain: float | list[float]) -> Value:
    return np.asarray(plain, dtype=np.float64) if isinstance(plain, list) else plain
