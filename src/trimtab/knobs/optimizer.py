"""Knobs that live in the optimizer's param groups: learning rate and weight decay.

Called through the registry. Ratios between groups are kept: the knob's value is that of the first group that has
a positive one (the reference), and every other group moves with it.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, ClassVar

import numpy as np
from torch import Tensor
from typing_extensions import override

from trimtab.errors import InputError
from trimtab.knobs.base import SpreadKnob
from trimtab.run_state import Array, RunState

__all__ = ["LearningRate", "WeightDecay"]

# A float32 tensor keeps 24 bits of what was written: anything further off was written by somebody else.
_TENSOR_TOLERANCE = 1e-6


def _setting(value: Any, what: str) -> float:
    is_one = value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, Real)
    number = float(value) if is_one and not isinstance(value, bool) else math.nan
    if not math.isfinite(number) or number < 0:
        shown = number if is_one else value
        raise InputError(f"{what} {shown!r}; expected a finite number of 0 or more")
    return number


class _GroupKnob(SpreadKnob):
    """A value under one key of every param group."""

    key: ClassVar[str]

    def __init__(self, low: float, high: float) -> None:
        super().__init__(low, high)
        self._seen: dict[int, tuple[Tensor, int]] = {}  # tensor values, and their count of writes after ours

    def bind(self, state: RunState) -> Array:
        groups = state.optimizer.param_groups
        initial = []
        for index, group in enumerate(groups):
            if self.key not in group:
                raise InputError(
                    f"{type(state.optimizer).__name__} has no {self.key!r} in its param groups: "
                    f"the knob {self.name!r} cannot act on it; leave it out"
                )
            initial.append(_setting(group[self.key], f"param group {index} has {self.key}"))
        positive = [index for index, value in enumerate(initial) if value > 0]
        if not positive:
            raise InputError(
                f"{self.key} is 0 in every param group, so there is nothing that {self.name!r} could "
                f"multiply; give at least one group a positive {self.key}"
            )
        self._reference = positive[0]
        self._initial = initial
        self._written = list(initial)
        return np.array([initial[self._reference]])

    def get(self, state: RunState) -> float:
        return float(state.optimizer.param_groups[self._reference][self.key])

    def put(self, state: RunState, value: float) -> None:
        groups, written = state.optimizer.param_groups, self._written
        if len(groups) == 1 == len(written) and groups[0][self.key].__class__ is float:
            groups[0][self.key] = written[0] = value
            return
        if len(groups) > len(self._initial):
            self._adopt(groups)
        scale = value / self._initial[self._reference]
        for index, group in enumerate(groups):
            new = value if index == self._reference else self._initial[index] * scale
            present = group[self.key]
            if isinstance(present, Tensor):
                present.fill_(new)
                self._seen[index] = (present, present._version)
            else:
                group[self.key] = new
            self._written[index] = new

    def _adopt(self, groups: list[dict[str, Any]]) -> None:
        """Take in groups added since: each keeps, from now on, the ratio to the reference that it came with."""
        reference_now = self._written[self._reference]
        for group in groups[len(self._initial) :]:
            value = _setting(group[self.key], f"the param group that was added has {self.key}")
            scale = self._initial[self._reference] / reference_now if reference_now > 0 else 1.0
            self._initial.append(value * scale)
            self._written.append(value)

    @override
    def find_conflict(self, state: RunState) -> str | None:
        groups = state.optimizer.param_groups
        if len(groups) == 1 and groups[0][self.key] is self._written[0]:
            return None
        for index, (group, written) in enumerate(zip(groups, self._written, strict=False)):
            present = group[self.key]
            if not self._stands(index, present):
                return f"param group {index} has {self.key}={float(present):g} where {written:g} was written"
        return None

    def _stands(self, index: int, present: Any) -> bool:
        """Whether a group holds what was written; of a tensor its count of writes is asked, which waits for nothing."""
        written = self._written[index]
        if not isinstance(present, Tensor):
            return bool(present == written)
        seen = self._seen.get(index)
        if seen is not None and seen[0] is present and seen[1] == present._version:
            return True
        # Written since, or another tensor, as after the optimizer's state was loaded: only then its value is looked at.
        if not math.isclose(float(present), written, rel_tol=_TENSOR_TOLERANCE, abs_tol=1e-38):
            return False
        self._seen[index] = (present, present._version)
        return True


class LearningRate(_GroupKnob):
    """Learning rate of every param group; a tensor rate is filled in place.

    Args:
        low: Smallest rate that a controller may choose; default 1e-7.
        high: Largest; default 10**1.5, where no network of FINDINGS section 5 trained any more.
        hold_decay: With decoupled decay (AdamW) the effective decay is lr x weight_decay. False leaves
            weight_decay alone, so that the effective decay follows the rate; True keeps the product.
    """

    name = "lr"
    key = "lr"

    def __init__(self, low: float = 1e-7, high: float = 10**1.5, *, hold_decay: bool = False) -> None:
        super().__init__(low, high)
        self.hold_decay = hold_decay
        self._products: list[float] = []

    @override
    def bind(self, state: RunState) -> Array:
        found = super().bind(state)
        groups = state.optimizer.param_groups
        if self.hold_decay and not any(group.get("weight_decay", 0) > 0 for group in groups):
            raise InputError("hold_decay=True, but no param group has a positive weight_decay to hold; leave it out")
        if self.hold_decay:
            self._products = []
            self._hold(groups)
        return found

    def _hold(self, groups: list[dict[str, Any]]) -> None:
        """Note the product of every group not noted yet."""
        known = len(self._products)
        for group, rate in zip(groups[known:], self._written[known:], strict=True):
            self._products.append(rate * group.get("weight_decay", 0))

    @override
    def put(self, state: RunState, value: float) -> None:
        super().put(state, value)
        if self.hold_decay:
            self._write_decay(state.optimizer.param_groups)

    def follow(self, state: RunState, value: float) -> bool:
        """Write a value if what was written last still stands: the path taken at every optimizer step of a single run.

        Returns:
            False, and nothing is written, where it does not stand.
        """
        written, groups = self._written, state.optimizer.param_groups
        if len(groups) == 1 and groups[0]["lr"] is written[0] and not self.hold_decay:
            groups[0]["lr"] = written[0] = value  # nearly every step of nearly every run
            return True
        for index, (group, last) in enumerate(zip(groups, written, strict=False)):
            present = group["lr"]
            if present is not last and not self._stands(index, present):
                return False
        if value != written[self._reference] or len(groups) != len(written):
            self.put(state, value)
        return True

    def _write_decay(self, groups: list[dict[str, Any]]) -> None:
        self._hold(groups)
        for group, product, rate in zip(groups, self._products, self._written, strict=False):
            if product > 0 and rate > 0:  # at a rate of 0 nothing decays, whatever the coefficient
                group["weight_decay"] = product / rate

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "products": list(self._products)}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._products = list(state["products"])


class WeightDecay(_GroupKnob):
    """Weight decay of every param group; a group with 0 keeps 0.

    Args:
        low: Smallest decay that a controller may choose; default 1e-6.
        high: Largest; default 1.
    """

    name = "weight_decay"
    key = "weight_decay"

    def __init__(self, low: float = 1e-6, high: float = 1.0) -> None:
        super().__init__(low, high)
