"""Slicing: copies of a network, or of one of its modules, that have only some of their units.

Called by `network` for whole networks and by `evaluation` for single modules. `trimtab.surgery` changes a living
network step by step and looks at it anew after each; here the couplings of the dense network are found once, and any
number of smaller copies is made from them without copying what they do not keep.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.surgery.couplings import Couplings, Slot
from trimtab.surgery.layers import set_module
from trimtab.surgery.layout import Layout

__all__ = ["Kept", "Slicer"]

Kept = Mapping[int, Tensor]  # set of units -> places that stay, ascending; a set that is not there stays whole


class Slicer:
    """Makes smaller copies of one network.

    Args:
        couplings: Of the dense network.
    """

    def __init__(self, couplings: Couplings) -> None:
        self._couplings = couplings
        self._slots: dict[nn.Module, dict[str, list[Slot]]] = defaultdict(lambda: defaultdict(list))
        for slot in couplings.slots:
            self._slots[slot.module][slot.attribute].append(slot)

    def network(self, model: nn.Module, kept: Kept, replaced: Mapping[str, nn.Module]) -> nn.Module:
        """A copy of the network that the couplings are of.

        Args:
            model: That network; left as it is.
            kept: Places that stay.
            replaced: Name of a module -> what is put in its place.
        """
        gone = {self._couplings.trace.modules[name] for name in replaced}
        memo: dict[int, Any] = {}
        for module in self._slots:
            if module not in gone:
                self._note_tensors(module, kept, memo)
        new: nn.Module = copy.deepcopy(model, memo)
        for module in self._slots:
            if module not in gone:
                self._set_sizes(module, memo[id(module)], kept)
        for name, module in replaced.items():
            set_module(new, name, module)
        return new

    def module(self, module: nn.Module, kept: Kept) -> nn.Module:
        """A copy of one module."""
        memo: dict[int, Any] = {}
        self._note_tensors(module, kept, memo)
        new = copy.deepcopy(module, memo)
        self._set_sizes(module, new, kept)
        return new

    def select(self, value: Tensor, dim: int, layout: Layout, kept: Kept) -> Tensor:
        """The places along an axis that stay; the tensor itself where all do."""
        index = self.places(layout, kept)
        return value if index is None else value.index_select(dim, index.to(value.device))

    def size(self, layout: Layout, n_kept: Mapping[int, int]) -> int:
        """Length of an axis, by how many units of each set stay."""
        spaces = self._couplings.spaces
        length = 0
        for segment in layout:
            space = None if segment.space is None else spaces.root(segment.space)
            units = 1 if space is None else n_kept[space] if space in n_kept else spaces[space].size
            length += segment.width * units
        return length

    def places(self, layout: Layout, kept: Kept, n_there: Mapping[int, int] | None = None) -> Tensor | None:
        """The places along an axis that stay, ascending; None where all do.

        Args:
            layout: Of the axis in the dense network.
            kept: Units that stay.
            n_there: Units that are there, of sets that have been cut already.
        """
        spaces = self._couplings.spaces
        if not any(space in kept for space in spaces.in_layout(layout)):
            return None
        found, start = [], 0
        for segment in layout:
            length = self.size((segment,), n_there or {})
            space = None if segment.space is None else spaces.root(segment.space)
            if space is not None and space in kept:
                within = torch.arange(segment.width)
                found.append((kept[space][:, None] * segment.width + within).flatten() + start)
            else:
                found.append(torch.arange(start, start + length))
            start += length
        return torch.cat(found)

    def _note_tensors(self, module: nn.Module, kept: Kept, memo: dict[int, Any]) -> None:
        """Tell deepcopy what to put in the place of each tensor that gets smaller."""
        for attribute, slots in self._slots[module].items():
            old = getattr(module, attribute)
            if not isinstance(old, Tensor):
                continue
            new = old.detach()
            for slot in slots:
                new = self.select(new, slot.dim or 0, slot.layout, kept)
            if new.shape == old.shape:
                continue
            if isinstance(old, nn.Parameter):
                parameter = nn.Parameter(new.contiguous(), requires_grad=old.requires_grad)
                parameter.__dict__.update(old.__dict__)  # marks that a user put on it
                new = parameter
            memo[id(old)] = new

    def _set_sizes(self, module: nn.Module, new: nn.Module, kept: Kept) -> None:
        for attribute, slots in self._slots[module].items():
            for slot in slots:
                if slot.role != "size":
                    continue
                size = self.size(slot.layout, {space: len(units) for space, units in kept.items()})
                if slot.dim is None:
                    setattr(new, attribute, size)
                else:
                    sizes = list(getattr(new, attribute))
                    sizes[slot.dim] = size
                    setattr(new, attribute, tuple(sizes))
        if isinstance(new, nn.RNNBase):
            new.flatten_parameters()
