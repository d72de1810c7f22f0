"""Knob that lives in the model without changing its shape: dropout.

Called through the registry.
"""

from __future__ import annotations

import numpy as np
from torch import nn
from typing_extensions import override

from trimtab.errors import InputError
from trimtab.knobs.base import SpreadKnob
from trimtab.places import dropout_places
from trimtab.run_state import Array, RunState

__all__ = ["Dropout"]

_MOST = 0.95  # of a place that has more than the reference; at 1 nothing would get through


class Dropout(SpreadKnob):
    """Probability of every dropout in the model: modules, recurrent layers, attention, and functional ones.

    A module that calls `F.dropout` or `F.scaled_dot_product_attention` itself is reached through a number that it keeps
    as `self.dropout` or `self.dropout_p` and reads in `forward`. The knob's value is that of the first place with a
    positive one; the others keep their ratio to it (up to 0.95), and a place with 0 keeps 0, unless all have 0: then
    all move together. It acts at the next forward pass.

    Args:
        low: Smallest probability that a controller may choose; default 0.1.
        high: Largest, below 1; default 0.7.
    """

    name = "dropout"
    scale = "linear"
    below = 1.0

    def __init__(self, low: float = 0.1, high: float = 0.7) -> None:
        super().__init__(low, high)
        self._places: list[tuple[nn.Module, str]] = []

    @override
    def bind(self, state: RunState) -> Array:
        if state.model is None:
            raise InputError("the knob 'dropout' acts in the model: give it as model=...")
        self._places = dropout_places(state.model)
        if not self._places:
            raise InputError(
                f"{type(state.model).__name__} has no dropout: no nn.Dropout of any kind, none inside a recurrent "
                "layer of several layers or an attention, and no module with a number 'dropout' or 'dropout_p'; leave "
                "the knob 'dropout' out"
            )
        self._initial = [float(getattr(module, name)) for module, name in self._places]
        for (module, name), value in zip(self._places, self._initial, strict=True):
            if not 0 <= value < 1:
                raise InputError(f"{type(module).__name__}.{name} is {value!r}; expected a probability in [0, 1)")
        positive = [index for index, value in enumerate(self._initial) if value > 0]
        self._reference = positive[0] if positive else 0
        self._written = list(self._initial)
        return np.array([self._initial[self._reference]])

    @override
    def get(self, state: RunState) -> float:
        module, name = self._places[self._reference]
        return float(getattr(module, name))

    @override
    def put(self, state: RunState, value: float) -> None:
        reference = self._initial[self._reference]
        for index, (module, name) in enumerate(self._places):
            if index == self._reference or reference == 0:
                new = value
            else:
                new = min(value * self._initial[index] / reference, max(_MOST, self._initial[index]))
            setattr(module, name, new)
            self._written[index] = new

    @override
    def find_conflict(self, state: RunState) -> str | None:
        for (module, name), written in zip(self._places, self._written, strict=True):
            present = getattr(module, name)
            if present != written:
                return f"{type(module).__name__}.{name} is {present!r} where {written:g} was written"
        return None
