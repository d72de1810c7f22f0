"""Gate: may the agent act now, and how far. Guard: has the run gone wrong. Snapshot: what to roll back to.

Called by the controller. The guard knows no knob: it gives a verdict, and the controller rolls back and cuts the
rate. Its thresholds, but for what is lost late in a run, are those of FINDINGS section 5, where it never fired for
ordinary rates and halved the final loss of runs that were started above a rate of 0.1.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trimtab.errors import InputError, unknown_name
from trimtab.flat import FlatRow, FlatView, Floats, gather
from trimtab.run_state import RunState, Value

__all__ = ["GOOD", "Gate", "Guard", "Safety", "Snapshot", "Verdict", "log_noise"]


@dataclass(frozen=True)
class Gate:
    """Limits on when and how far an agent may move a knob.

    Attributes:
        burn_in: Decisions at the start in which nothing is changed.
        min_distance: Least number of decisions from one change to the next; 1 allows every one.
        max_factor: Largest factor, up or down, of one change; infinity allows all.

    Raises:
        InputError: A limit is out of range.
    """

    burn_in: int = 0
    min_distance: int = 1
    max_factor: float = math.inf

    def __post_init__(self) -> None:
        if self.burn_in < 0 or self.min_distance < 1 or not self.max_factor > 1:
            raise InputError(f"{self}: expected burn_in >= 0, min_distance >= 1, max_factor > 1")

    def limit(
        self,
        asked: float,
        present: float,
        decision: int,
        last_change: int | None,
        move: Callable[[float, float], float] | None = None,
    ) -> tuple[float, str]:
        """What may be written of what was asked, and why it is less, if it is.

        Args:
            asked: Setting that the action asks for.
            present: Setting now.
            decision: Number of this decision.
            last_change: Number of the last decision that changed something, or None.
            move: What a factor makes of a setting, on the knob's scale; None: their product.
        """
        if decision < self.burn_in:
            return present, "gate: burn-in"
        if last_change is not None and decision - last_change < self.min_distance:
            return present, "gate: too soon after the last change"
        if move is None:
            limited = min(max(asked, present / self.max_factor), present * self.max_factor)
        elif math.isinf(self.max_factor):
            limited = asked
        else:
            limited = min(max(asked, move(present, 1 / self.max_factor)), move(present, self.max_factor))
        return limited, "" if limited == asked else "gate: change too large"


@dataclass(frozen=True)
class Verdict:
    """What the guard says of an interval: "ok", "roll_back" or "give_up", and why."""

    kind: Literal["ok", "roll_back", "give_up"]
    reason: str = ""


@dataclass(frozen=True)
class Safety:
    """How a controller is kept from doing harm.

    Attributes:
        gate: When and how far the agent may act.
        rollback: Watch for runs that go wrong, keep a snapshot of each interval's start, and roll back to it.
        cut: Factor by which the rate is divided at a roll-back.
        max_rollbacks: Roll-backs in a row after which the guard gives up, with the best weights kept.
        snapshot_on_cpu: Keep snapshots in host memory.
        on_conflict: What to do when somebody else writes a knob's value: "error", or "warn": hand it back,
            end control, record it.

    Raises:
        UnknownNameError: `on_conflict` is neither.
    """

    gate: Gate = Gate()
    rollback: bool = True
    cut: float = 5.0
    max_rollbacks: int = 10
    snapshot_on_cpu: bool = False
    on_conflict: str = "error"

    def __post_init__(self) -> None:
        if self.on_conflict not in ("error", "warn"):
            raise unknown_name("value of on_conflict", self.on_conflict, ("error", "warn"))
        Guard(self.cut, self.max_rollbacks)


GOOD = Verdict("ok")
# One loss is allowed this many standard deviations of its log. With batches of one row (squared error) the first
# loss lies so far below the rest that without it 9 runs in 10 were rolled back for nothing, with it 1 in 10.
NOISE_MARGIN = 1.5
_LOST = 0.5  # of the initial loss: half of what was learned, or more, is lost


def log_noise(losses: Sequence[float]) -> float:
    """Standard deviation of log(loss) from one step to another, a steady rise or fall taken out; 0 of too few."""
    if len(losses) < 3 or not all([0 < loss < math.inf for loss in losses]):
        return 0.0
    logs = [math.log(loss) for loss in losses]
    steps = [after - before for before, after in itertools.pairwise(logs)]
    mean = (logs[-1] - logs[0]) / len(steps)
    return math.sqrt(sum((step - mean) ** 2 for step in steps) / (2 * (len(steps) - 1)))


class Guard:
    """Watch for runs that have gone wrong.

    An interval is bad when its loss or a weight is not finite, or the watched loss is above `above_initial` x the
    initial one, or above `above_best` x the best and 1.5 x the initial one. The watched loss is the validation loss
    where it was measured in this interval and before; else, and beside a first one, the train loss. Until an interval
    was good, the train loss is watched as well: units that a first step at too high a rate kills show in the loss of
    the second step, while the validation loss may be back at that of guessing by the end of the interval.

    An interval is bad as well when what was learned is lost: validation loss and train loss are both above `above_best`
    x their best and half of their initial one. A classifier whose units have died ends there, at the loss of guessing,
    which is about what it began with and never 1.5 times as much. One of the two alone says less: rows learned by heart
    make the validation loss rise, and train losses that rise may be what is wanted (of adversaries, of harder data).
    This needs a validation in the interval before, and one that was not lost: else nothing better is known to go back
    to. Nor is it done twice in a row: what was gone back to may have been ruined after it was validated.

    Args:
        cut: Factor by which the rate is divided at a roll-back.
        max_rollbacks: Roll-backs in a row, without a good interval between, after which the guard gives up.
        above_initial: See above.
        above_best: See above.

    Raises:
        InputError: A number is out of range.
    """

    def __init__(
        self, cut: float = 5.0, max_rollbacks: int = 10, above_initial: float = 2.0, above_best: float = 3.0
    ) -> None:
        if not cut > 1 or max_rollbacks < 1 or not above_initial > 1 or not above_best > 1:
            raise InputError(
                f"guard: cut {cut}, max_rollbacks {max_rollbacks}, above_initial {above_initial}, above_best "
                f"{above_best}; expected max_rollbacks >= 1 and the others above 1"
            )
        self.cut = cut
        self.max_rollbacks = max_rollbacks
        self.above_initial = above_initial
        self.above_best = above_best
        self.in_a_row = 0
        self.total = 0
        self.has_gone_back = False
        self.has_begun = False  # an interval was good

    def judge(self, state: RunState, *, weights_are_finite: bool, losses: Sequence[float] = ()) -> Verdict:
        """Judge the interval that just ended; a bad one is counted.

        Args:
            state: The run, with the interval recorded.
            weights_are_finite: Whether every weight is.
            losses: Train losses of the interval's last steps; how they scatter widens the train loss's limits.
        """
        reason = self._fault(state, weights_are_finite, losses)
        if not reason:
            self.in_a_row = 0
            self.has_begun = True
            return GOOD
        self.in_a_row += 1
        self.total += 1
        if self.in_a_row > self.max_rollbacks:
            return Verdict("give_up", f"{reason}, after {self.max_rollbacks} roll-backs in a row")
        return Verdict("roll_back", reason)

    def _fault(self, state: RunState, weights_are_finite: bool, losses: Sequence[float]) -> str:
        summary = state.summary
        interval = summary.current
        train = _number(interval.train_loss)
        if not weights_are_finite:
            return "a weight is not finite"
        if not math.isfinite(train):
            return "the train loss is not finite"
        val, first_val = _number(interval.val_loss), _number(summary.initial_val_loss)
        late = _number(interval.second_half_loss)
        now = train if math.isnan(late) else late
        first, lowest = _number(state.initial_loss), _number(summary.best_train_loss)
        is_validated = math.isfinite(first_val) and not math.isnan(val)
        fault = ""
        if is_validated:
            fault = self._excess("validation loss", val, first_val, _number(summary.best_val_loss))
        if not fault and (not is_validated or val == first_val or not self.has_begun):
            # No validation in this interval, or the very first, which is no measure of what was there before; or no
            # good interval yet, when the validation loss alone may hide what the first steps have ruined.
            fault = self._excess("train loss", now, first, lowest)
            if fault:
                fault = self._excess("train loss", now, first, lowest, _margin(losses))
        best_val = _number(summary.best_val_loss)
        both = is_validated and self._is_lost(val, first_val, best_val) and self._is_lost(now, first, lowest)
        if not both or not self._is_lost(now, first, lowest, _margin(losses)):
            self.has_gone_back = False
            return fault
        was = _number(summary.previous.val_loss)
        if fault or self.has_gone_back or math.isnan(was) or self._is_lost(was, first_val, best_val):
            return fault
        self.has_gone_back = True
        return f"what was learned is lost: the validation loss was {best_val:.4g} and is {val:.4g} again"

    def _is_lost(self, now: float, first: float, lowest: float, margin: float = 1.0) -> bool:
        return first > 0 and lowest >= 0 and now > margin * max(self.above_best * lowest, _LOST * first)

    def _excess(self, name: str, now: float, first: float, lowest: float, margin: float = 1.0) -> str:
        # Losses may be negative (a likelihood): multiples mean nothing there, only finiteness does.
        if not (first > 0 and lowest >= 0):
            return ""
        if now > self.above_initial * margin * first:
            return f"the {name} {now:.4g} is above {self.above_initial * margin:.3g} x its initial {first:.4g}"
        if now > self.above_best * margin * lowest and now > 1.5 * margin * first:
            return f"the {name} {now:.4g} is above {self.above_best * margin:.3g} x its best {lowest:.4g}"
        return ""

    def state_dict(self) -> dict[str, Any]:
        """Its counts."""
        names = ("in_a_row", "total", "has_gone_back", "has_begun")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.in_a_row = state["in_a_row"]
        self.total = state["total"]
        self.has_gone_back = state.get("has_gone_back", False)  # not in checkpoints of before there was such a rule
        self.has_begun = state.get("has_begun", True)  # nor this

    def count_good(self) -> None:
        """An interval that needed no judging, since nothing can be wrong with it."""
        self.in_a_row = 0
        self.has_gone_back = False
        self.has_begun = True


def _margin(losses: Sequence[float]) -> float:
    return math.exp(min(NOISE_MARGIN * log_noise(losses), 50.0))


class Snapshot:
    """A copy of weights, optimizer state and, where the model is known, buffers; taken and put back in place.

    Args:
        optimizer: Whose parameters and state are copied.
        model: Whose buffers are copied too; None copies the optimizer's parameters alone.
        on_cpu: Keep the copy in host memory, where the device's is short.

    Attributes:
        plan: Changes of the model's shape (`trimtab.surgery`) up to the copy; the caller keeps it, and gives the model
            that shape before `restore`.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module | None = None, *, on_cpu: bool = False) -> None:
        self._optimizer = optimizer
        self._model = model
        self._on_cpu = on_cpu
        self._tensors: list[Tensor] = []  # parameters, then buffers, then optimizer state, as `_sources` lists them
        self._copied: list[int] = []  # which tensors were copied last
        self._view: FlatView | None = None  # or, in a small network, all of them at once
        self._row, self._next_row = FlatRow(0), FlatRow(0)  # then: what `_tensors` lie in, and what comes next
        self._next_tensors: list[Tensor] = []
        self._is_copied = False  # whether the next row holds what is there now
        self._n_weights = 0  # numbers in a row that are weights, which come first
        self._weights: FlatView | None = None
        self._has_values = False  # whether an optimizer keeps more than tensors, to be looked at every time
        self._counts = (0, 0)
        self._layout: list[dict[str, Any]] = []
        self.plan: list[dict[str, Any]] = []

    @property
    def size_bytes(self) -> int:
        """Memory that one copy of what is there now takes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._sources())

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    def _buffers(self) -> list[Tensor]:
        return [] if self._model is None else list(self._model.buffers())

    def _sources(self) -> list[Tensor]:
        """Parameters, then buffers, then the optimizer's state."""
        state = self._optimizer.state
        parameters = self._parameters()
        sources = [*parameters, *self._buffers()]
        for parameter in parameters:
            sources += [value for value in state.get(parameter, {}).values() if isinstance(value, Tensor)]
        return sources

    def sum_of_weights(self) -> float | Tensor:
        """Not finite if a weight is not, or is far beyond use: a number, or a tensor of one on the weights' device.

        In a small network all that a snapshot holds is copied for it, and `keep` makes that the snapshot.
        """
        if self._view is not None and not self._has_values and self._view.shows(self._sources()):
            self._view.copy_to(self._next_row)
            self._is_copied = True
            return _square(self._next_row.numbers[: self._n_weights])
        parameters = self._parameters()
        view = self._weights
        if view is None or not view.shows(parameters):
            view = self._weights = FlatView(parameters) if FlatView.fits(parameters) else None
        if view is not None:
            return view.square()
        weights = [parameter.detach() for parameter in parameters]
        if any([weight.dtype == torch.float16 for weight in weights]):  # it ends at 65,504, which a norm may pass
            return gather([weight.sum(dtype=torch.float32) for weight in weights]).sum().view(1)
        return gather(torch._foreach_norm(weights)).sum().view(1)

    def keep(self, *, is_stale: bool = False) -> None:
        """Take a snapshot as of `sum_of_weights`, where no tensor has been written since: saves the second copy.

        Args:
            is_stale: A knob has written to the optimizer's state since, or put other tensors there.
        """
        if is_stale:
            self._copied, self._view = [], None
        if not self._is_copied or is_stale:
            self.take()
            return
        self._is_copied = False
        self._row, self._next_row = self._next_row, self._row
        self._tensors, self._next_tensors = self._next_tensors, self._tensors

    def take(self) -> None:
        """Copy what is there now over the copy before."""
        self._is_copied = False
        sources = self._sources()
        if self._view is not None and self._view.shows(sources) and not self._has_values:
            self._view.copy_to(self._row)
            return
        who = [*map(id, sources)]
        if who == self._copied and not self._has_values:
            with torch.no_grad():
                torch._foreach_copy_(self._tensors, sources)  # the same tensors as last time, the usual case
            return
        cpu = torch.device("cpu")
        self._view = FlatView(sources) if FlatView.fits(sources) else None
        if self._view is not None:
            self._row, self._next_row = FlatRow(self._view.size), FlatRow(self._view.size)
            self._view.copy_to(self._row)
            self._tensors = self._view.parts_of(self._row, sources)
            self._next_tensors = self._view.parts_of(self._next_row, sources)
            self._n_weights = sum(parameter.numel() for parameter in self._parameters())
            who = []
        else:
            self._tensors = [
                source.detach().to(cpu if self._on_cpu else source.device, copy=True) for source in sources
            ]
        self._copied = who
        parameters, state = self._parameters(), self._optimizer.state
        self._counts = (len(parameters), len(self._buffers()))
        self._layout = [
            {
                key: _TENSOR if isinstance(value, Tensor) else [copy.deepcopy(value)]
                for key, value in state.get(parameter, {}).items()
            }
            for parameter in parameters
        ]
        self._has_values = any(kind != _TENSOR for entry in self._layout for kind in entry.values())

    @torch.no_grad()
    def restore(self) -> None:
        """Put the copy back in place: the same tensors hold the old values again."""
        self._is_copied = False
        n_parameters, n_buffers = self._counts
        parameters = self._parameters()
        # A group added since the copy was taken keeps its weights: nothing older of it is known.
        for target, kept in zip(parameters[:n_parameters], self._tensors[:n_parameters], strict=True):
            target.copy_(kept)
        for target, kept in zip(self._buffers(), self._tensors[n_parameters : n_parameters + n_buffers], strict=True):
            target.copy_(kept)
        tensors = iter(self._tensors[n_parameters + n_buffers :])
        state = self._optimizer.state
        for parameter, layout in zip(parameters, self._layout, strict=False):
            present = state.pop(parameter, {})
            if layout:
                state[parameter] = {
                    key: _put_back(present.get(key), next(tensors), key, parameter)
                    if kind == _TENSOR
                    else copy.deepcopy(kind[0])  # L-BFGS keeps lists, which it changes in place
                    for key, kind in layout.items()
                }
        for parameter in parameters[n_parameters:]:
            state.pop(parameter, None)

    def state_dict(self) -> dict[str, Any]:
        """The copy itself: a run resumed within an interval must be able to roll back as if never stopped."""
        return {
            "tensors": [tensor.clone() for tensor in self._tensors],
            "counts": list(self._counts),
            "layout": [copy.deepcopy(entry) for entry in self._layout],
            "plan": copy.deepcopy(self.plan),
            "shapes": [list(parameter.shape) for parameter in self._parameters()],
        }

    def check(self, state: dict[str, Any], plan: Sequence[dict[str, Any]] = ()) -> None:
        """Refuse a state that was saved beside other parameters; `plan` is that of the model's shape now.

        Raises:
            InputError: A parameter is missing here, or has another shape.
        """
        shapes = [tuple(parameter.shape) for parameter in self._parameters()]
        kept = [tuple(tensor.shape) for tensor in state["tensors"][: state["counts"][0]]]
        if state.get("plan", []) != list(plan):  # the copy has the shape of before a change
            kept = [tuple(shape) for shape in state["shapes"]]
        if kept != shapes[: len(kept)]:
            raise InputError(
                f"this state is of an optimizer with the parameters {kept}, this one has {shapes}; build model and "
                "optimizer, with every param group that was added, before loading"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self._tensors = [tensor.clone() for tensor in state["tensors"]]
        self._copied, self._view, self._is_copied = [], None, False
        self._counts = (state["counts"][0], state["counts"][1])
        self._layout = [dict(entry) for entry in state["layout"]]
        self.plan = copy.deepcopy(state.get("plan", []))


def _square(row: Floats) -> float:
    with np.errstate(all="ignore"):
        return float(row.dot(row))


def _number(value: Value) -> float:
    """The value of a single run."""
    return value if isinstance(value, float) else float(value[0])


_TENSOR = "tensor"  # marks, in a layout, an entry whose value lies among the tensors


def _put_back(present: Any, kept: Tensor, key: str, parameter: Tensor) -> Tensor:
    if isinstance(present, Tensor) and present.shape == kept.shape:
        return present.copy_(kept)
    # torch keeps step counters on the CPU unless the optimizer is captured or fused; it moves them itself then.
    return kept.clone() if key == "step" else kept.to(parameter.device, copy=True)
