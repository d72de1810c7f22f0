"""Gate: may the agent act now, and how far. Guard: has the run gone wrong. Snapshot: what to roll back to.

Called by the controller. The guard knows no knob: it gives a verdict, and the controller rolls back and cuts the
rate. Its thresholds are those of FINDINGS section 5, where it never fired for ordinary rates and halved the final
loss of runs that were started above a rate of 0.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trimtab.errors import InputError, unknown_name
from trimtab.run_state import Array, RunState

__all__ = ["Gate", "Guard", "Safety", "Snapshot", "Verdict"]


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

    def limit(self, asked: Array, present: Array, decision: int, last_change: int | None) -> tuple[Array, str]:
        """What may be written of what was asked, and why it is less, if it is.

        Args:
            asked: Setting that the action asks for; (R,).
            present: Setting now; (R,).
            decision: Number of this decision.
            last_change: Number of the last decision that changed something, or None.
        """
        if decision < self.burn_in:
            return present, "gate: burn-in"
        if last_change is not None and decision - last_change < self.min_distance:
            return present, "gate: too soon after the last change"
        if math.isinf(self.max_factor):
            return asked, ""
        limited = np.clip(asked, present / self.max_factor, present * self.max_factor)
        return limited, "" if np.array_equal(limited, asked) else "gate: change too large"


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


class Guard:
    """Watch for runs that have gone wrong.

    An interval is bad when its loss or a weight is not finite, or the watched loss (validation, else train) is
    above `above_initial` x the initial one, or above `above_best` x the best and 1.5 x the initial one.

    Args:
        cut: Factor by which the rate is divided at a roll-back.
        max_rollbacks: Roll-backs in a row, without a good interval between, after which the guard gives up.
        above_initial: See above.
        above_best: See above.

    Raises:
        InputError: A number is out of range.
    """

    def __init__(self, cut: float = 5.0, max_rollbacks: int = 10, above_initial: float = 2.0,
                 above_best: float = 3.0) -> None:
        if not cut > 1 or max_rollbacks < 1 or not above_initial > 1 or not above_best > 1:
            raise InputError(f"guard: cut {cut}, max_rollbacks {max_rollbacks}, above_initial {above_initial}, above_best "
                             f"{above_best}; expected max_rollbacks >= 1 and the others above 1")
        self.cut = cut
        self.max_rollbacks = max_rollbacks
        self.above_initial = above_initial
        self.above_best = above_best
        self.in_a_row = 0
        self.total = 0

    def judge(self, state: RunState, *, weights_are_finite: bool) -> Verdict:
        """Judge the interval that just ended; a bad one is counted."""
        reason = self._fault(state, weights_are_finite)
        if not reason:
            self.in_a_row = 0
            return Verdict("ok")
        self.in_a_row += 1
        self.total += 1
        if self.in_a_row > self.max_rollbacks:
            return Verdict("give_up", f"{reason}, after {self.max_rollbacks} roll-backs in a row")
        return Verdict("roll_back", reason)

    def _fault(self, state: RunState, weights_are_finite: bool) -> str:
        train, val = float(state.current.train_loss[0]), state.current.val_loss
        has_val = bool(np.isfinite(state.initial_val_loss[0]))
        if not weights_are_finite:
            return "a weight is not finite"
        if not math.isfinite(train):
            return "the train loss is not finite"
        if has_val:
            # A validation that was not asked for in this interval leaves NaN behind: nothing to judge by.
            now, initial, best, name = float(val[0]), state.initial_val_loss, state.best_val_loss, "validation loss"
        else:
            late = float(state.current.second_half_loss[0])
            now = train if math.isnan(late) else late
            initial, best, name = state.initial_loss, state.best_train_loss, "train loss"
        first, lowest = float(initial[0]), float(best[0])
        # Losses may be negative (a likelihood): multiples mean nothing there, only finiteness does.
        if math.isnan(now) or not (first > 0 and lowest > 0):
            return ""
        if now > self.above_initial * first:
            return f"the {name} {now:.4g} is above {self.above_initial:g} x its initial {first:.4g}"
        if now > self.above_best * lowest and now > 1.5 * first:
            return f"the {name} {now:.4g} is above {self.above_best:g} x its best {lowest:.4g}"
        return ""

    def state_dict(self) -> dict[str, Any]:
        """Its counts."""
        return {"in_a_row": self.in_a_row, "total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.in_a_row = state["in_a_row"]
        self.total = state["total"]


class Snapshot:
    """A copy of weights, optimizer state and, where the model is known, buffers; taken and put back in place.

    Args:
        optimizer: Whose parameters and state are copied.
        model: Whose buffers are copied too; None copies the optimizer's parameters alone.
        on_cpu: Keep the copy in host memory, where the device's is short.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module | None = None, *, on_cpu: bool = False) -> None:
        self._optimizer = optimizer
        self._model = model
        self._on_cpu = on_cpu
        self._tensors: list[Tensor] = []  # parameters, then buffers, then optimizer state, as `_sources` lists them
        self._counts = (0, 0)
        self._layout: list[dict[str, Any]] = []
        self.is_taken = False

    @property
    def size_bytes(self) -> int:
        """Memory that one copy of what is there now takes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._sources())

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    def _buffers(self) -> list[Tensor]:
        return [] if self._model is None else list(self._model.buffers())

    def _sources(self) -> list[Tensor]:
        parameters = self._parameters()
        state = self._optimizer.state
        entries = [value for parameter in parameters for value in state.get(parameter, {}).values()]
        return [*parameters, *self._buffers(), *(value for value in entries if isinstance(value, Tensor))]

    @torch.no_grad()
    def take(self) -> None:
        """Copy what is there now over the copy before."""
        sources = self._sources()
        cpu = torch.device("cpu")
        if len(sources) == len(self._tensors) and all(
            old.shape == new.shape and old.device == (cpu if self._on_cpu else new.device)
            for old, new in zip(self._tensors, sources, strict=True)
        ):
            torch._foreach_copy_(self._tensors, sources)
        else:
            self._tensors = [
                source.detach().to(cpu if self._on_cpu else source.device, copy=True) for source in sources
            ]
        parameters, state = self._parameters(), self._optimizer.state
        self._counts = (len(parameters), len(self._buffers()))
        self._layout = [
            {key: _TENSOR if isinstance(value, Tensor) else [value] for key, value in state.get(parameter, {}).items()}
            for parameter in parameters
        ]
        self.is_taken = True

    @torch.no_grad()
    def restore(self) -> None:
        """Put the copy back in place: the same tensors hold the old values again."""
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
                    key: _put_back(present.get(key), next(tensors), key, parameter) if kind == _TENSOR else kind[0]
                    for key, kind in layout.items()
                }
        for parameter in parameters[n_parameters:]:
            state.pop(parameter, None)

    def state_dict(self) -> dict[str, Any]:
        """The copy itself: a run resumed within an interval must be able to roll back as if never stopped."""
        return {
            "tensors": [tensor.clone() for tensor in self._tensors],
            "counts": list(self._counts),
            "layout": [dict(entry) for entry in self._layout],
            "is_taken": self.is_taken,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self._tensors = [tensor.clone() for tensor in state["tensors"]]
        self._counts = (state["counts"][0], state["counts"][1])
        self._layout = [dict(entry) for entry in state["layout"]]
        self.is_taken = state["is_taken"]


_TENSOR = "tensor"  # marks, in a layout, an entry whose value lies among the tensors


def _put_back(present: Any, kept: Tensor, key: str, parameter: Tensor) -> Tensor:
    if isinstance(present, Tensor) and present.shape == kept.shape:
        return present.copy_(kept)
    # torch keeps step counters on the CPU unless the optimizer is captured or fused; it moves them itself then.
    return kept.clone() if key == "step" else kept.to(parameter.device, copy=True)
