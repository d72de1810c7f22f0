"""What the batteries have in common: the error, and a few ways to require things and to make runs to look at.

Called by the other files of this package.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from trimtab.errors import InputError
from trimtab.run_state import Interval, RunState, Summary

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ContractError", "Loop", "is_plain", "make_state", "require", "requires_input_error", "same"]


class ContractError(AssertionError):
    """A contract was broken; the message names what did it and how."""


def require(condition: bool, broken: str) -> None:
    """Raise `ContractError` with the text of what was broken, unless the condition holds."""
    if not condition:
        raise ContractError(broken)


@contextmanager
def requires_input_error(what: str, naming: str = "") -> Iterator[None]:
    """Require that the block raises InputError, with a text that contains `naming`."""
    try:
        yield
    except InputError as error:
        require(naming in str(error), f"{what}: the error does not name {naming!r}: {error}")
    except Exception as error:
        raise ContractError(f"{what}: expected an InputError, got {type(error).__name__}: {error}") from error
    else:
        raise ContractError(f"{what}: expected an InputError, but it was accepted")


def is_plain(value: Any) -> bool:
    """Whether a value is a nest of dicts, lists, tuples, tensors and JSON scalars."""
    if value is None or isinstance(value, (str, bool, int, float, torch.Tensor)):
        return True
    if isinstance(value, dict):
        return all(isinstance(key, (str, int)) and is_plain(item) for key, item in value.items())
    return isinstance(value, (list, tuple)) and all(is_plain(item) for item in value)


def same(first: Any, second: Any) -> bool:
    """Whether two nests are equal to the bit, NaN beside NaN included."""
    if isinstance(first, torch.Tensor) or isinstance(second, torch.Tensor):
        both = isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)
        return both and first.dtype == second.dtype and bool(np.array_equal(first.numpy(), second.numpy()))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second or (first != first and second != second))


def json_round_trip(value: Any, what: str) -> Any:
    """The value after a journey through JSON.

    Raises:
        ContractError: JSON cannot hold it.
    """
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ContractError(f"{what} is not JSON: {error}") from error


# The smoothed train loss, the train loss's halves and the validation loss of a run, interval after interval.
_LOSSES = ((2.3, 2.4, 2.2, 2.35), (1.9, 2.0, 1.8, 2.0), (1.7, 1.6, 1.8, 1.95))


def make_state(
    n_intervals: int, *, scale: float = 1.0, n_runs: int | None = None, bad: float | None = None
) -> RunState:
    """A run, or several, as a signal or a reward finds it at a decision.

    Args:
        n_intervals: Intervals measured so far, 0 to 3.
        scale: Factor on every loss.
        n_runs: None for a single run, whose values are floats; else arrays of this length.
        bad: What stands in place of every loss of the last interval, such as infinity or NaN.
    """
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.02)
    state = RunState(optimizer, total_steps=100)

    def value(number: float) -> Any:
        return number if n_runs is None else np.full(n_runs, number) * (1 + 0.01 * np.arange(n_runs))

    for knob, now, start, low, high in (("lr", 0.02, 0.01, 1e-7, 31.6), ("weight_decay", 0.1, 0.1, 1e-6, 1.0)):
        state.settings[knob], state.initial_settings[knob] = value(now), value(start)
        state.to_unit[knob] = lambda x, low=low, high=high: np.log(x / low) / np.log(high / low)  # type: ignore[misc]
    for knob in (
        *("momentum", "beta2", "grad_clip", "dropout", "batch_size", "accumulation", "optimizer"),
        *("layers", "units"),
    ):
        state.settings[knob] = value(0.4)
        state.to_unit[knob] = lambda x: x
    state.turn = value(0.5)
    state.last_moves["lr"], state.rollback_memory, state.lowest_bad_rate = value(0.2), value(0.64), value(0.2)
    state.main_interval = value(20.0)
    if n_runs is not None:
        nothing = Interval(*[np.full(n_runs, np.nan)] * len(Interval._fields))
        state.initial_loss = np.full(n_runs, np.nan)
        state.summary = Summary(nothing, nothing, *[np.full(n_runs, np.nan)] * 5)
    for number, (mean, early, late, validation) in enumerate(_LOSSES[:n_intervals]):
        is_bad = bad is not None and number == n_intervals - 1
        losses = [
            value(bad) if is_bad and bad is not None else value(scale * loss)
            for loss in (mean, early, late, validation)
        ]
        measured = [value(0.5 + 0.1 * number), value(3.0 - number), value(0.2), value(0.004 * (number + 1))]
        measured += [value(scale * 0.1), value(0.001), value(0.003), value(0.02), value(10.0)]
        state.initial_loss = value(scale * 2.5)
        state.optimizer_steps = state.spent = 10 * (number + 1)
        state.record(Interval(*losses, *measured))
    return state


class Loop:
    """A training run of a few microseconds a step, the same every time.

    Args:
        make_optimizer: From the parameters, in two groups, to an optimizer.
    """

    def __init__(self, make_optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]) -> None:
        generator = torch.Generator().manual_seed(5)
        self.first = nn.Parameter(torch.randn(4, 3, generator=generator))
        self.second = nn.Parameter(torch.randn(3, generator=generator))
        self.inputs = torch.randn(8, 4, generator=generator)
        self.optimizer = make_optimizer([{"params": [self.first]}, {"params": [self.second], "lr": 0.005}])
        self.t = 0

    def backward(self) -> torch.Tensor:
        """Loss of the coming step, its gradients in place."""
        loss = (torch.tanh(self.inputs @ self.first) @ self.second - self.t % 3).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        self.t += 1
        return loss.detach()

    def weights(self) -> torch.Tensor:
        """All weights, flat."""
        return torch.cat([self.first.detach().reshape(-1), self.second.detach()])

    def state_dict(self) -> dict[str, Any]:
        """Everything that the run needs to go on."""
        return {
            "weights": [self.first.detach().clone(), self.second.detach().clone()],
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "t": self.t,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        with torch.no_grad():
            self.first.copy_(state["weights"][0])
            self.second.copy_(state["weights"][1])
        self.optimizer.load_state_dict(state["optimizer"])
        self.t = state["t"]
