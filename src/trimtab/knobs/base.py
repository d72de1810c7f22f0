"""Knob: one hyperparameter that can be read, written and put back while a model trains.

Subclassed per place where a value acts (optimizer, loader, model); called by the spec and the controller only. A
knob owns its value: whatever differs from what it wrote last was written by somebody else, and is named.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from typing_extensions import override

from trimtab.errors import InputError, unknown_name
from trimtab.run_state import Array, RunState

__all__ = ["CategoricalKnob", "Knob", "SpreadKnob"]

Scale = Literal["log", "linear", "reverse_log", "categorical"]


class Knob(ABC):
    """One hyperparameter of R runs.

    The scale says what a move is. A factor f turns a value x of scale "log" into f x; "reverse_log" (a momentum) 1 - x
    into (1 - x) / f; "linear" moves x by log10(f) of the range between the bounds; "categorical" to the next choice
    (f > 1) or the one before. A whole-numbered knob moves by one at least.

    Args:
        low: Smallest setting that a controller may choose.
        high: Largest setting that a controller may choose.

    Attributes:
        is_whole: Whether only whole numbers make sense.
        below: Every value has to be smaller than this.
        moves_rate: Whether a move of this knob asks for one of the rate, which must then be a knob too.
        has_touched_state: Set by `put` where it changed the optimizer's state: a snapshot taken before is of no use.
        changes_shape: Whether a move puts other parameters into the model.
        cost: Cost of the network before and after the last `put`, where that changed it: "step_flops_before",
            "step_flops", "parameters_before", "parameters"; None where it did not.

    Raises:
        InputError: The bounds are not finite, not in order, not positive on a log scale, or not whole where only
            whole numbers make sense.
    """

    name: ClassVar[str]
    scale: ClassVar[Scale] = "log"
    is_whole: ClassVar[bool] = False
    below: float = math.inf
    moves_rate: bool = False
    has_touched_state: bool = False
    changes_shape: ClassVar[bool] = False
    cost: dict[str, float] | None = None

    def __init__(self, low: float, high: float) -> None:
        for key, bound in (("low", low), ("high", high)):
            if isinstance(bound, bool) or not isinstance(bound, (int, float)) or not math.isfinite(bound):
                raise InputError(f"{self.name}: {key} is {bound!r}; expected a finite number")
            if self.is_whole and bound != int(bound):
                raise InputError(f"{self.name}: {key} is {bound!r}; expected a whole number")
        if low >= high or low < 0 or (self.scale == "log" and low <= 0) or high >= self.below:
            least = "0 < " if self.scale == "log" else "0 <= "
            limit = f" < {self.below:g}" if self.below < math.inf else ""
            raise InputError(f"{self.name}: bounds [{low}, {high}]; expected {least}low < high{limit}")
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
        """Write a value to where it acts; (R,). Never synchronises with a device, but where `changes_shape`.

        Raises:
            InputError: A value is NaN, infinite, negative, beyond what makes sense, or of the wrong shape or type;
                nothing is written.
        """
        self.put(state, float(self.check_values(values)[0]))

    @abstractmethod
    def find_conflict(self, state: RunState) -> str | None:
        """Say what was found where the value acts, if it is not what this knob wrote last.

        It synchronises with a device only where something has changed there.
        """

    def find_forced(self, state: RunState) -> tuple[float, str] | None:
        """The value that the place itself fell back to, and why; None where what was written last stands.

        The knob has taken it over, and its bounds, when this returns.
        """
        del state
        return None

    def reach(self, state: RunState, before: float, asked: float) -> tuple[float, str]:
        """The setting nearest to the one asked that the place can take now, and why it is another, if it is.

        Asked before `put`, of a setting inside the bounds.
        """
        del state, before
        return asked, ""

    def consequences(self, state: RunState, before: float, now: float) -> Mapping[str, float]:
        """Factors by which other knobs' settings are to be multiplied because this one is about to move.

        Asked before `put`. The controller moves them and records each as a decision of its own.
        """
        del state, before, now
        return {}

    def take_along(self, state: RunState, name: str, factor: float) -> None:
        """Multiply, as a consequence of a move, the value of another knob that nobody else moves."""
        raise InputError(f"{self.name}: a move would change {name!r}, which is not among the knobs; add it")

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What the knob remembers, as plain numbers and lists."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`; `write` afterwards to make it act."""

    def reshape(self, state: RunState) -> None:
        """Give the model the shape that a loaded state belongs to, before anything else of the state is put back."""
        del state

    def clip(self, values: Array) -> Array:
        """Nearest setting inside the bounds; (R,)."""
        inside = np.asarray(np.minimum(np.maximum(values, self.low), self.high))
        return np.asarray(np.rint(inside)) if self.is_whole else inside

    def to_unit(self, values: Array) -> Array:
        """Map settings to the unit interval of the bounds on the knob's scale, clipped to [0, 1]; (R,)."""
        low, high, inside = self.low, self.high, self.clip(values)
        if low == high:  # memory has left one batch size alone
            return np.zeros_like(inside)
        if self.scale == "log":
            return np.asarray(np.log(inside / low) / math.log(high / low))
        if self.scale == "reverse_log":
            return np.asarray(np.log((1 - inside) / (1 - low)) / math.log((1 - high) / (1 - low)))
        return np.asarray((inside - low) / (high - low))

    def to_unit_one(self, value: float) -> float:
        """The same for a single run, to the bit; one call of NumPy on one number costs a microsecond or more."""
        low, high = self.low, self.high
        if type(self).to_unit is not Knob.to_unit or type(self).clip is not Knob.clip or value != value:
            return float(self.to_unit(np.array([value]))[0])
        inside = min(max(value, low), high)
        if self.is_whole:
            inside = float(round(inside))
        if low == high:
            return 0.0
        if self.scale == "log":  # NumPy's logarithm and math's differ in the last bit
            return float(np.log(inside / low) / math.log(high / low))
        if self.scale == "reverse_log":
            return float(np.log((1 - inside) / (1 - low)) / math.log((1 - high) / (1 - low)))
        return (inside - low) / (high - low)

    def from_unit(self, units: Array) -> Array:
        """Inverse of `to_unit`, for whole numbers up to rounding; (R,)."""
        units = np.clip(units, 0.0, 1.0)
        if self.scale == "log":
            values = self.low * np.exp(units * math.log(self.high / self.low))
        elif self.scale == "reverse_log":
            values = 1 - (1 - self.low) * np.exp(units * math.log((1 - self.high) / (1 - self.low)))
            values = np.where(units == 0, self.low, np.where(units == 1, self.high, values))
        else:
            values = self.low + units * (self.high - self.low)
        return np.asarray(np.rint(values) if self.is_whole else values)

    @property
    def is_plain(self) -> bool:
        """Whether a move is nothing but a multiplication."""
        return self.scale == "log" and not self.is_whole

    def move(self, values: Array, factors: Array) -> Array:
        """The settings that moves by these factors ask for, not clipped to the bounds; of one shape, as is the result.

        See the class for what a factor means on each scale.
        """
        values, factors = np.asarray(values, np.float64), np.asarray(factors, np.float64)
        if self.scale == "log":
            moved = values * factors
        elif self.scale == "reverse_log":
            moved = np.maximum(1 - (1 - values) / factors, 0.0)
        elif self.scale == "linear":
            moved = values + np.log10(factors) * (self.high - self.low)
        else:
            moved = values + np.sign(factors - 1)
        if not self.is_whole:
            return np.asarray(np.where(factors == 1, values, moved))
        direction = np.sign(factors - 1)
        moved = np.rint(moved)
        return np.asarray(np.where(moved == values, values + direction, moved))

    def move_one(self, value: float, factor: float) -> float:
        """The same for a single run, to the bit."""
        if type(self).move is not Knob.move or not 0 < factor < math.inf:
            return float(self.move(np.array([value]), np.array([factor]))[0])
        direction = float((factor > 1) - (factor < 1))
        if self.scale == "log":
            moved = value * factor
        elif self.scale == "reverse_log":
            moved = max(1 - (1 - value) / factor, 0.0)
        elif self.scale == "linear":
            moved = value + float(np.log10(factor)) * (self.high - self.low)
        else:
            moved = value + direction
        if not self.is_whole:
            return moved if direction else value
        moved = round(moved, 0)  # with digits a number that is not finite stays what it is
        return value + direction if moved == value else moved

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
        if value >= self.below:
            raise InputError(f"{self.name}: got {value!r}; expected a number below {self.below:g}")
        if self.is_whole and (value != int(value) or (self.scale == "log" and value < 1)):
            least = " of 1 or more" if self.scale == "log" else ""
            raise InputError(f"{self.name}: got {value!r}; expected a whole number{least}")
        return np.asarray(array, dtype=np.float64)


class CategoricalKnob(Knob):
    """One of several named choices; its value is the place of the choice in `choices`, from 0.

    Args:
        choices: Names that a controller may choose from, in order; two or more of `known`.

    Raises:
        InputError: Fewer than two choices, or one given twice.
        UnknownNameError: A choice that there is not.
    """

    scale = "categorical"
    is_whole = True
    known: ClassVar[tuple[str, ...]]

    def __init__(self, choices: Sequence[str]) -> None:
        if isinstance(choices, str) or not isinstance(choices, Sequence) or len(choices) < 2:
            raise InputError(f"{self.name}: choices {choices!r}; expected two or more of {', '.join(self.known)}")
        for choice in choices:
            if choice not in self.known:
                raise unknown_name(f"choice of the knob {self.name!r}", choice, self.known)
        if len(set(choices)) != len(choices):
            raise InputError(f"{self.name}: choices {list(choices)!r}; expected each of them once")
        super().__init__(0, len(choices) - 1)
        self.choices = tuple(choices)
        self.below = float(len(choices))


class SpreadKnob(Knob):
    """A value that acts in several places, which move together.

    The knob's value is that of one of them, the reference; what becomes of the others is the subclass's to say. It
    remembers what stood in each at first, and what it wrote there last.
    """

    def __init__(self, low: float, high: float) -> None:
        super().__init__(low, high)
        self._initial: list[float] = []
        self._written: list[float] = []
        self._reference = 0

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"initial": list(self._initial), "written": list(self._written), "reference": self._reference}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._initial = list(state["initial"])
        self._written = list(state["written"])
        self._reference = state["reference"]
