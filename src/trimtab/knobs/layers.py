"""The knob of the number of hidden layers of a network that is training.

Called through the registry; docs/knobs.md says what counts as one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn
from typing_extensions import override

from trimtab.errors import InputError
from trimtab.knobs.structure import StructuralKnob, structure_of, tree_of
from trimtab.run_state import Array, RunState
from trimtab.surgery import Surgeon

__all__ = ["Layers"]

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase)


class Layers(StructuralKnob):
    """Hidden layers: Linear, convolution and recurrent layers, in no `Head`, whose units are not the network's output.

    One more is put in behind the last hidden layer that allows it exactly (ReLU, ReLU6, Hardtanh, or no activation),
    else where a Linear was taken out;
    the function is preserved as docs/surgery.md says. One less is the one nearest to the identity, which one that was
    just put in is; not the layer that the knob `units` reads its value from.

    Args:
        low: Smallest number that a controller may choose; default 1; raised to the number that has to stay in the
            model, because no more can be taken out.
        high: Largest; default 4.
    """

    name = "layers"
    scale = "linear"

    def __init__(self, low: float = 1, high: float = 4) -> None:
        super().__init__(low, high)
        self._hidden: dict[str, nn.Module] = {}
        self._others: set[nn.Module] = set()  # layers that are no hidden ones

    @override
    def bind(self, state: RunState) -> Array:
        structure = structure_of(state, self.name)
        surgeon = structure.surgeon
        places, refused = surgeon.deepenable()
        if not surgeon.hidden or not places:
            reasons = list(refused.values())
            reasons += [f"no layer is put in behind {_kind_of(surgeon, name)}" for name in surgeon.hidden]
            raise InputError(
                f"{type(surgeon.model).__name__} takes no further layer: {'; '.join(reasons[:4]) or 'it has none'}"
                "; leave the knob 'layers' out"
            )
        self._structure, self._pending = structure, None
        self._take_in(surgeon)
        self._version = surgeon.version
        self._written = len(surgeon.hidden)
        if self._written > self.low:
            least, why = self.reach(state, self._written, self.low)
            if least >= self.high:
                raise InputError(f"layers: at least {least:g} have to stay ({why}); high is {self.high:g}, raise it")
            self.low = max(self.low, least)
        return np.array([float(self._written)])

    @override
    def get(self, state: RunState) -> float:
        """Layers that stand in the live model, without those that are no hidden ones."""
        self._look()
        return float(self._count())

    def _count(self) -> int:
        return len(_layers_of(self._surgeon.model) - self._others)

    @override
    def reach(self, state: RunState, before: float, asked: float) -> tuple[float, str]:
        """Tried out, and put back to the bit: what can still be taken out shows only when others are out."""
        surgeon, reached, why = self._surgeon, before, ""
        try:
            surgeon.check()
            with surgeon.together():
                try:
                    self._change(int(asked))
                except InputError as error:
                    why = str(error)
                reached = float(len(surgeon.hidden))
                raise _TriedOutError
        except _TriedOutError:
            pass
        except InputError as error:
            why = str(error)
        return reached, why

    def _removable(self) -> list[str]:
        """Hidden layers that can be taken out, the nearest to the identity first."""
        surgeon = self._surgeon
        kept = set() if self._structure is None else self._structure.kept
        hidden = set(surgeon.hidden)
        return [n for n in surgeon.removable() if n in hidden and surgeon.model.get_submodule(n) not in kept]

    def _take_in(self, surgeon: Surgeon) -> None:
        self._hidden = {name: surgeon.model.get_submodule(name) for name in surgeon.hidden}
        self._others = _layers_of(surgeon.model) - set(self._hidden.values())

    @override
    def _is_at(self, value: int) -> bool:
        return len(self._hidden) == value

    @override
    def _change(self, value: int) -> None:
        surgeon = self._surgeon
        while len(surgeon.hidden) < value:
            places, refused = surgeon.deepenable()
            if not places:
                raise InputError(f"layers: no layer can be put in any more: {'; '.join(refused.values())}")
            hidden = [name for name in places if name in surgeon.hidden]
            surgeon.deepen((hidden or places)[-1])
        while len(surgeon.hidden) > value:
            removable = self._removable()
            if not removable:
                kept = self._structure.kept if self._structure is not None else ()
                mine = [name for name in surgeon.removable() if surgeon.model.get_submodule(name) in kept]
                why = f" (not {mine[0]!r}, that 'units' is read from)" if mine else ""
                raise InputError(f"layers: none of the {len(surgeon.hidden)} hidden layers can be taken out{why}")
            surgeon.remove_layer(removable[0])

    @override
    def _find_other(self) -> str | None:
        for name, module in self._hidden.items():
            if self._module_of(name) is not module:
                return f"module {name!r}, a hidden layer, is another one now"
        present = self._count()
        return None if present == self._written else f"layers are {present} where {self._written} were written"

    @override
    def _own_state(self) -> dict[str, Any]:
        return {"bounds": [self.low, self.high]}

    @override
    def _restore(self, state: dict[str, Any]) -> None:
        self.low, self.high = state["bounds"]


class _TriedOutError(Exception):
    """Ends a change that was made to see whether it can be."""


def _kind_of(surgeon: Surgeon, name: str) -> str:
    return f"{name!r} ({type(surgeon.model.get_submodule(name)).__name__})"


def _layers_of(model: nn.Module) -> set[nn.Module]:
    return {module for _, module in tree_of(model) if isinstance(module, _LAYERS)}
