"""Knobs of an optimizer's memory: momentum (of SGD and RMSprop; betas[0] of Adam and its kin) and beta2 (betas[1]).

Called through the registry. Both are at home on the scale of 1 - x, the share of what is new. A change leaves Adam's
bias-corrected moments as they are: with the new beta alone, the old count of steps would blow them up.
"""

from __future__ import annotations

from abc import abstractmethod
from numbers import Real
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from typing_extensions import override

from trimtab.errors import InputError
from trimtab.knobs.base import SpreadKnob
from trimtab.run_state import Array, RunState

__all__ = ["Beta2", "Momentum", "get_momentum", "set_momentum"]


def _place(optimizer: Optimizer, group: dict[str, Any]) -> tuple[str, int | None] | None:
    """Key, and place under it, where an optimizer reads the momentum of a group; None where it has none.

    The class decides before the keys: an optimizer whose algorithm was switched keeps the keys of the others.
    """
    if "betas" in group and not isinstance(optimizer, SGD):
        return "betas", 0
    return ("momentum", None) if "momentum" in group else None


def get_momentum(optimizer: Optimizer, group: dict[str, Any]) -> Any:
    """The momentum of a group, from where it acts."""
    key, index = _place(optimizer, group) or ("momentum", None)
    return group[key] if index is None else group[key][index]


def set_momentum(group: dict[str, Any], value: float) -> None:
    """Write the momentum of a group to where it acts, and to where it would under another algorithm."""
    if "momentum" in group:
        group["momentum"] = value
    if "betas" in group:
        group["betas"] = (value, *group["betas"][1:])


class _MemoryKnob(SpreadKnob):
    """A number in [0, 1) of every param group.

    The knob's value is that of the first group that has a positive one. Other groups keep the ratio of their 1 - x to
    the reference's, at least 0; a group with 0 keeps 0, unless all have 0: then all move together.
    """

    scale = "reverse_log"
    below = 1.0
    what: ClassVar[str]

    @abstractmethod
    def _get(self, optimizer: Optimizer, group: dict[str, Any]) -> Any:
        """The value of a group; KeyError where it has none."""

    @abstractmethod
    def _set(self, optimizer: Optimizer, group: dict[str, Any], value: float) -> None:
        """Write the value of a group, and keep what depends on it coherent."""

    @override
    def bind(self, state: RunState) -> Array:
        optimizer = state.optimizer
        self._initial = [self._look(optimizer, group, f"param group {i}") for i, group in enumerate(_groups(optimizer))]
        positive = [index for index, value in enumerate(self._initial) if value > 0]
        self._reference = positive[0] if positive else 0
        self._written = list(self._initial)
        return np.array([self._initial[self._reference]])

    def _look(self, optimizer: Optimizer, group: dict[str, Any], where: str) -> float:
        try:
            value = self._get(optimizer, group)
        except (KeyError, IndexError):
            raise InputError(
                f"{type(optimizer).__name__} has no {self.what} in its param groups: the knob {self.name!r} cannot act "
                "on it; leave it out"
            ) from None
        good = isinstance(value, Real) and not isinstance(value, (bool, Tensor)) and 0 <= float(value) < 1
        if not good:
            raise InputError(f"{where} has the {self.what} {value!r}; expected a plain number in [0, 1)")
        return float(value)

    @override
    def get(self, state: RunState) -> float:
        return float(self._get(state.optimizer, _groups(state.optimizer)[self._reference]))

    @override
    def put(self, state: RunState, value: float) -> None:
        optimizer, initial = state.optimizer, self._initial
        groups = _groups(optimizer)
        for group in groups[len(initial) :]:  # added since: it keeps, from now on, what it came with, as a ratio
            found = self._look(optimizer, group, "the param group that was added")
            share = (1 - initial[self._reference]) / (1 - self._written[self._reference])
            initial.append(0.0 if found == 0 else max(0.0, 1 - (1 - found) * share))
            self._written.append(found)
        moves_all = not any(initial)
        for index, group in enumerate(groups):
            if index == self._reference or moves_all:
                new = value
            elif initial[index] == 0:
                new = 0.0
            else:
                new = max(0.0, 1 - (1 - value) * (1 - initial[index]) / (1 - initial[self._reference]))
            if self._get(optimizer, group) != new:
                self._set(optimizer, group, new)
            self._written[index] = new

    @override
    def find_conflict(self, state: RunState) -> str | None:
        optimizer = state.optimizer
        for index, (group, written) in enumerate(zip(_groups(optimizer), self._written, strict=False)):
            present = self._get(optimizer, group)
            if present != written:
                return f"param group {index} has the {self.what} {present!r} where {written:g} was written"
        return None

    @torch.no_grad()
    def _keep_moment(self, optimizer: Optimizer, group: dict[str, Any], key: str, old: float, new: float) -> None:
        """Scale a moment so that what bias correction makes of it, moment / (1 - beta^steps), stays as it is."""
        for parameter in group["params"]:
            entry = optimizer.state.get(parameter, {})
            if key not in entry or "step" not in entry:
                continue
            steps = entry["step"]
            if isinstance(steps, Tensor) and not steps.is_cpu:
                entry[key].mul_(((1 - new**steps) / (1 - old**steps)).to(entry[key]))
            else:
                # An Adam that has taken no step has no moments either.
                entry[key].mul_((1 - new ** float(steps)) / (1 - old ** float(steps)) if float(steps) > 0 else 1.0)
            self.has_touched_state = True


class Momentum(_MemoryKnob):
    """Momentum of every param group: `momentum`, or the first of `betas`.

    SGD's buffer is a sum, so that its updates grow with 1 / (1 - momentum); they do so over as many steps, since the
    buffer itself is left as it is. One that is raised from 0 begins with the next gradient.

    Args:
        low: Smallest momentum that a controller may choose; default 0.
        high: Largest, below 1; default 0.999.
    """

    name = "momentum"
    what = "momentum"

    def __init__(self, low: float = 0.0, high: float = 0.999) -> None:
        super().__init__(low, high)

    def _get(self, optimizer: Optimizer, group: dict[str, Any]) -> Any:
        return get_momentum(optimizer, group)

    def _set(self, optimizer: Optimizer, group: dict[str, Any], value: float) -> None:
        old = float(get_momentum(optimizer, group))
        if _place(optimizer, group) == ("betas", 0):
            self._keep_moment(optimizer, group, "exp_avg", old, value)
        elif old == 0 and isinstance(optimizer, SGD):
            for parameter in group["params"]:  # what torch left there while nothing was added to it
                if optimizer.state.get(parameter, {}).pop("momentum_buffer", None) is not None:
                    self.has_touched_state = True
        set_momentum(group, value)


class Beta2(_MemoryKnob):
    """Memory of squared gradients of every param group: the second of `betas`.

    Args:
        low: Smallest value that a controller may choose; default 0.9.
        high: Largest, below 1; default 0.9999.
    """

    name = "beta2"
    what = "beta2 (betas[1])"

    def __init__(self, low: float = 0.9, high: float = 0.9999) -> None:
        super().__init__(low, high)

    def _get(self, optimizer: Optimizer, group: dict[str, Any]) -> Any:
        return group["betas"][1]

    def _set(self, optimizer: Optimizer, group: dict[str, Any], value: float) -> None:
        old = float(group["betas"][1])
        if not isinstance(optimizer, SGD):
            for key in ("exp_avg_sq", "max_exp_avg_sq"):
                self._keep_moment(optimizer, group, key, old, value)
        group["betas"] = (group["betas"][0], value, *group["betas"][2:])


def _groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    return optimizer.param_groups
