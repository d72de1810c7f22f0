"""The knob of the units per layer of a network that is training.

Called through the registry; docs/knobs.md says what moves together.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor, nn
from typing_extensions import override

from trimtab.errors import InputError, unknown_name
from trimtab.knobs.structure import StructuralKnob, structure_of
from trimtab.run_state import Array, RunState
from trimtab.seeding import torch_generator
from trimtab.surgery import Group, Surgeon

__all__ = ["Units"]

_IMPORTANCE = ("product", "incoming", "outgoing")


class Units(StructuralKnob):
    """Units of the layers: all groups that can be changed, together, or one.

    The knob's value is the number of units of the reference: the first group in the order of the forward that can be
    changed, or the one named. The others keep their ratio to it, rounded, with at least one unit. Embeddings, and
    groups that can be widened to whole multiples only (a LayerNorm over them), are left alone (embeddings unless
    named). A layer that is put in later has the ratio of the one it stands behind.

    Widening preserves the function, narrowing takes copies away first and then the least important units.

    Args:
        low: Smallest number of units of the reference that a controller may choose; default 32.
        high: Largest; default 256.
        group: Name of a layer, whose units alone are moved; None moves all.
        importance: By which units go: "product", "incoming" or "outgoing" (`Surgeon.importance`).
        noise: Of the weights that make a copy, in units of their root mean square. With 0 the function is preserved,
            but copies get equal gradients: without dropout they stay copies for ever. 0.01 sets them free.
        seed: Of the units that are copied, and the noise.

    Raises:
        InputError: An argument is wrong; the message names it.
    """

    name = "units"

    def __init__(
        self,
        low: float = 32,
        high: float = 256,
        *,
        group: str | None = None,
        importance: str = "product",
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(low, high)
        if group is not None and (not isinstance(group, str) or not group):
            raise InputError(f"units: group is {group!r}; expected the name of a layer, or None for all")
        if importance not in _IMPORTANCE:
            raise unknown_name("importance of the knob 'units'", importance, _IMPORTANCE)
        if isinstance(noise, bool) or not isinstance(noise, (int, float)) or not 0 <= noise < math.inf:
            raise InputError(f"units: noise is {noise!r}; expected a finite number of 0 or more, such as 0.01")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise InputError(f"units: seed is {seed!r}; expected a whole number of 0 or more")
        self._group, self._importance, self._noise, self._seed = group, importance, float(noise), seed
        self._reference: nn.Module | None = None
        self._parts: dict[nn.Module, _Part] = {}

    @override
    def bind(self, state: RunState) -> Array:
        structure = structure_of(state, self.name)
        surgeon = structure.surgeon
        if self._group is not None:
            named = surgeon.group(self._group)
            if named.whole_multiples is not None:
                raise InputError(
                    f"units: the units of {self._group!r} can be widened to whole multiples of their number only: "
                    f"{named.whole_multiples}"
                )
            groups = [named]
        else:
            groups = [group for group in surgeon.groups if _is_free(group)]
        if not groups:
            reasons = [f"{group.name!r} ({group.kind}): {_reason(group)}" for group in surgeon.groups]
            raise InputError(
                f"{type(surgeon.model).__name__} has no units that can be changed: {'; '.join(reasons) or 'no layers'}"
                "; leave the knob 'units' out"
            )
        self._structure, self._pending, self._version = structure, None, surgeon.version
        modules = [surgeon.model.get_submodule(group.name) for group in groups]
        self._parts = {
            module: _Part(group.name, float(group.size), group.size)
            for module, group in zip(modules, groups, strict=True)
        }
        self._keep(modules[0])
        self._written = groups[0].size
        return np.array([float(self._written)])

    def _keep(self, reference: nn.Module) -> None:
        if self._structure is not None:
            self._structure.kept -= {self._reference} if self._reference is not None else set()
            self._structure.kept.add(reference)
        self._reference = reference

    @override
    def get(self, state: RunState) -> float:
        """Units of the reference as its weight has them; -1 where it is gone."""
        self._look()
        reference = self._parts.get(self._reference) if self._reference is not None else None
        return float(-1 if reference is None else _units_of(self._module_of(reference.name)))

    def _take_in(self, surgeon: Surgeon) -> None:
        """Names and sizes of parts follow; a layer that is new gets the ratio of the one in front of it."""
        parts: dict[nn.Module, _Part] = {}
        for group in surgeon.groups:
            producers = [surgeon.model.get_submodule(name) for name in group.producers]
            known = [module for module in producers if module in self._parts]
            if known:
                module = self._reference if self._reference in known else known[0]
                name = group.producers[producers.index(module)]
                parts[module] = _Part(name, self._parts[module].base, group.size)
            elif self._group is None and _is_free(group):
                alike = [part for part in parts.values() if part.size == group.size]
                own = group.size * self._base() / max(1, self._written)
                parts[producers[0]] = _Part(group.name, alike[-1].base if alike else own, group.size)
        self._parts = parts

    def _base(self) -> float:
        """Units that the reference had at first."""
        reference = self._parts.get(self._reference) if self._reference is not None else None
        return reference.base if reference is not None else float(self._written)

    def _sizes(self, value: int) -> dict[nn.Module, int]:
        """Units of every part at a value of the knob."""
        base = self._base()
        return {
            module: value if module is self._reference else max(1, round(value * part.base / base))
            for module, part in self._parts.items()
        }

    @override
    def reach(self, state: RunState, before: float, asked: float) -> tuple[float, str]:
        surgeon = self._surgeon
        self._look()
        try:
            surgeon.check()
            for part in self._parts.values():
                surgeon.group(part.name)
        except InputError as error:
            return before, str(error)
        return asked, ""

    @override
    def _is_at(self, value: int) -> bool:
        return all(self._parts[module].size == size for module, size in self._sizes(value).items())

    @override
    def _change(self, value: int) -> None:
        surgeon, sizes = self._surgeon, self._sizes(value)
        for module, size in sizes.items():
            name = self._parts[module].name
            present = surgeon.group(name).size
            if size > present:
                generator = torch_generator(self._seed, "units", 1 + len(surgeon.plan))
                surgeon.widen(name, size, generator=generator, noise=self._noise)
            elif size < present:
                surgeon.narrow(name, size, importance=self._importance)

    @override
    def _find_other(self) -> str | None:
        if self._reference not in self._parts:
            return f"the layer that the knob {self.name!r} reads its value from was taken out of the network"
        for module, part in self._parts.items():
            if self._module_of(part.name) is not module:
                return f"module {part.name!r}, whose units were written, is another one now"
        return None

    @override
    def _find_other_size(self) -> str | None:
        for module, part in self._parts.items():
            written = self._written if module is self._reference else part.size
            if _units_of(module) != written:
                return f"module {part.name!r} has {_units_of(module)} units where {written} were written"
        return None

    @override
    def _own_state(self) -> dict[str, Any]:
        return {
            "parts": [[part.name, part.base] for part in self._parts.values()],
            "reference": next((n for n, module in enumerate(self._parts) if module is self._reference), 0),
        }

    @override
    def _restore(self, state: dict[str, Any]) -> None:
        model = self._surgeon.model
        self._parts = {model.get_submodule(name): _Part(name, base, 0) for name, base in state["parts"]}
        self._keep(list(self._parts)[state["reference"]])


class _Part:
    """One group of units that the knob moves.

    Args:
        name: Of the layer that makes them, now.
        base: Units that it had when the reference had its first.
        size: Units now, as the surgeon left them.
    """

    __slots__ = ("base", "name", "size")

    def __init__(self, name: str, base: float, size: int) -> None:
        self.name, self.base, self.size = name, base, size


def _is_free(group: Group) -> bool:
    return group.refusal is None and group.whole_multiples is None and group.kind != "Embedding"


def _reason(group: Group) -> str:
    return group.refusal or group.whole_multiples or "an embedding, moved only where it is named"


def _units_of(module: nn.Module | None) -> int:
    """Units that a layer makes, from the shape of its weight; -1 of what has none."""
    weight = getattr(module, "weight_hh_l0" if isinstance(module, nn.RNNBase) else "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim < 2:
        return -1
    return int(weight.shape[1] if isinstance(module, (nn.RNNBase, nn.Embedding)) else weight.shape[0])
