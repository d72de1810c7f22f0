"""Knob: one hyperparameter that can be read, written and put back while a model trains.

Subclassed per place where a value acts (optimizer, loader, model); called by the spec and the controller only. A
knob owns its value: whatever differs from what it wrote last was written by somebody else, and is named.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import numpy as np

from trimtab.errors import InputError
from trimtab.run_state import Array, RunState

__all__ = ["Knob"]


class Knob(ABC):
    """One hyperparameter of R runs.

    Args:
        low: Smallest setting that a controller may choose.
        high: Largest setting that a controller may choose.

    Raises:
        InputError: The bounds are not finite, not in order, or not positive on a log scale.
    """

    name: ClassVar[str]
    scale: ClassVar[Literal["log", "linear"]] = "log"

    def __init__(self, low: float, high: float) -> None:
        for key, bound in (("low", low), ("high", high)):
            if isinstance(bound, bool) or not isinstance(bound, (int, float)) or not math.isfinite(bound):
                raise InputError(f"{self.name}: {key} is {bound!r}; expected a finite number")
        if low >= high or (self.scale == "log" and low <= 0):
            raise InputError(
                f"{self.name}: bounds [{low}, {high}]; expected {'0 < ' * (self.scale == 'log')}low < high"
            )
        self.low = float(low)
        self.high = float(high)

    @abstractmethod
    def bind(self, state: RunState) -> Array:
        """Take ownership of the value in this run.

        Returns:
            The setting found there; (R,).

        Raises:
            InputError: The run has no such value, or one that cannot be controlled.
        """

    @abstractmethod
    def get(self, state: RunState) -> float:
        """Read the value of a single run from where it acts. May synchronise with a device."""

    def read(self, state: RunState) -> Array:
        """Read the value from where it acts; (R,). May synchronise with a device."""
        return np.array([self.get(state)])

    @abstractmethod
    def put(self, state: RunState, value: float) -> None:
        """Write one value, unchecked, to where it acts: the path taken at every optimizer step of a single run."""

    def write(self, state: RunState, values: Array) -> None:
        """Write a value to where it acts; (R,). Never synchronises with a device.

        Raises:
            InputError: A value is NaN, infinite, negative, or of the wrong shape or type; nothing is written.
        """
        self.put(state, float(self.check_values(values)[0]))

    @abstractmethod
    def find_conflict(self, state: RunState) -> str | None:
        """Say what was found where the value acts, if it is not what this knob wrote last.

        It synchronises with a device only where something has changed there.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What the knob remembers, as plain numbers and lists."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`; `write` afterwards to make it act."""

    def clip(self, values: Array) -> Array:
        """Nearest setting inside the bounds; (R,)."""
        return np.asarray(np.minimum(np.maximum(values, self.low), self.high))

    def to_unit(self, values: Array) -> Array:
        """Map settings to the unit interval of the bounds (log or linear), clipped to [0, 1]; (R,)."""
        low, high, inside = self.low, self.high, self.clip(values)
        if self.scale == "log":
            return np.asarray(np.log(inside / low) / math.log(high / low))
        return np.asarray((inside - low) / (high - low))

    def from_unit(self, units: Array) -> Array:
        """Inverse of `to_unit`; (R,)."""
        units = np.clip(units, 0.0, 1.0)
        if self.scale == "log":
            return np.asarray(self.low * np.exp(units * math.log(self.high / self.low)))
        return np.asarray(self.low + units * (self.high - self.low))

    def check_values(self, values: Any) -> Array:
        """Return the values as a float64 array of shape (1,).

        Raises:
            InputError: See `write`.
        """
        try:
            array = np.asarray(values)
            good = array.dtype.kind in "fiu" and array.shape == (1,)
        except ValueError:  # a ragged list has no shape at all
            good = False
        if not good:
            raise InputError(f"{self.name}: got {values!r}; expected an array of one number, shape (1,)")
        value = float(array[0])
        if not math.isfinite(value) or value < 0:
            raise InputError(f"{self.name}: got {value!r}; expected a finite number of 0 or more")
        return np.asarray(array, dtype=np.float64)
