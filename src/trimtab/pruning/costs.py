"""Closed form: FLOPs and parameters of every configuration of a network, in microseconds.

Called by `network`. A weight with an axis of p units and one of q is a term p x q; what a layer costs is the number of
places that it is applied at, times that. The places are counted once, on the dense network, by `trimtab.cost` (torch's
FlopCounterMode, two FLOPs a multiply-add); what no unit takes part in is a constant. The tests hold the form against
the counter on cut networks, where both are equal to the last FLOP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from trimtab.cost import size_of
from trimtab.surgery.couplings import Couplings, Slot
from trimtab.surgery.layout import Axes, Layout, Spaces, leaves, plain
from trimtab.surgery.operation_rules import operation_name

__all__ = ["ClosedForm", "Counts", "Factor", "Term", "terms_of_couplings"]

Counts = Mapping[str, int]  # FLOPs of the dense network by module; the whole network's under ""


@dataclass(frozen=True)
class Factor:
    """The length of an axis: `fixed` and, for each unit of a part, `by_part` more."""

    fixed: int = 1
    by_part: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Term:
    """A tensor whose size follows the widths.

    Attributes:
        module: Where it is.
        factors: Its two longest-moving axes; the others are in the numbers below.
        flops: For each entry of the product of the factors.
        parameters: The same.
        owner: Part whose layer it goes with when that is taken out.
    """

    module: str
    factors: tuple[Factor, Factor]
    flops: float
    parameters: int
    owner: int | None = None

    def owned_by(self, part: int | None) -> Term:
        """The same term, which goes when that part's layer goes."""
        return replace(self, owner=part)


def terms_of_couplings(c: Couplings, counts: Counts, parts: Mapping[int, int]) -> list[Term]:
    """Terms of all tensors that have places for units.

    Args:
        c: Of the dense network.
        counts: Its FLOPs by module.
        parts: Set of units -> place of its part; sets that are not there are of fixed size.
    """
    tensors: dict[tuple[nn.Module, str], list[Slot]] = {}
    for slot in c.slots:
        if isinstance(getattr(slot.module, slot.attribute), Tensor):
            tensors.setdefault((slot.module, slot.attribute), []).append(slot)
    n_weights: dict[nn.Module, int] = {}
    for module, attribute in tensors:
        if _is_counted(module, attribute):
            n_weights[module] = n_weights.get(module, 0) + getattr(module, attribute).numel()
    terms = []
    for (module, attribute), slots in tensors.items():
        tensor: Tensor = getattr(module, attribute)
        name = slots[0].name
        layouts: list[Layout] = [plain(size) for size in tensor.shape]
        for slot in slots:
            layouts[slot.dim or 0] = slot.layout
        factors = [_factor(layout, c.spaces, parts) for layout in layouts]
        moving = [f for f in factors if f.by_part]
        fixed = int(np.prod([f.fixed for f in factors if not f.by_part]))
        if moving:
            flops = counts.get(name, 0) / n_weights[module] if _is_counted(module, attribute) else 0.0
            is_parameter = isinstance(tensor, nn.Parameter)
            one, two = (*moving, Factor(), Factor())[:2]  # no weight has units on three axes
            terms.append(Term(name, (one, two), flops * fixed, fixed if is_parameter else 0))
    return [*terms, *_terms_of_products(c, parts)]


def _terms_of_products(c: Couplings, parts: Mapping[int, int]) -> list[Term]:
    """Terms of matrix products between results, which have no weights: of a graph's adjacency with its units, say."""
    terms = []
    for node in c.trace.graph.nodes:
        value = c.values.get(node)
        is_product = node.op in ("call_function", "call_method") and operation_name(node.target) in ("matmul", "bmm")
        if not is_product or not isinstance(value, Axes):
            continue
        one, two = (_factor(layout, c.spaces, parts) for layout in value.layouts[-2:])
        if one.by_part or two.by_part:
            *batch, _, _ = c.trace.shapes[node]
            first = next(leaves(c.arguments(node)))
            summed = c.spaces.size(first.layouts[-1])
            terms.append(Term("", (one, two), 2 * float(np.prod(batch)) * summed, 0))
    return terms


def _is_counted(module: nn.Module, attribute: str) -> bool:
    """Whether a tensor is one that products are made with, and so what its module's FLOPs go by."""
    return attribute.startswith("weight") and getattr(module, attribute).ndim >= 2


def _factor(layout: Layout, spaces: Spaces, parts: Mapping[int, int]) -> Factor:
    fixed, by_part = 0, dict[int, int]()
    for segment in layout:
        place = None if segment.space is None else parts.get(spaces.root(segment.space))
        if place is None:
            fixed += spaces.size((segment,))
        else:
            by_part[place] = by_part.get(place, 0) + segment.width
    return Factor(fixed, by_part)


class ClosedForm:
    """FLOPs and parameters by widths.

    Args:
        model: The dense network.
        counts: Its FLOPs by module.
        dense: Widths of the dense network.
        terms: What follows the widths.
    """

    def __init__(self, model: nn.Module, counts: Counts, dense: Sequence[int], terms: Sequence[Term]) -> None:
        shape = (len(terms), len(dense) + 1)
        self._one, self._two = np.zeros(shape), np.zeros(shape)
        for row, term in enumerate(terms):
            for matrix, factor in zip((self._one, self._two), term.factors, strict=True):
                matrix[row, 0] = factor.fixed
                for part, width in factor.by_part.items():
                    matrix[row, part + 1] = width
        self._prices = np.array([[term.flops, term.parameters] for term in terms])  # (terms, 2)
        self._owners = np.array([-1 if term.owner is None else term.owner for term in terms])
        self._rest = np.zeros(2)
        everything = np.array([counts[""], size_of(model)[0]])
        self._rest = everything - self._both((tuple(dense), (True,) * len(dense)))

    def _both(self, effective: tuple[Sequence[int], Sequence[bool]]) -> Any:
        widths, is_there = effective
        units = np.array([1, *widths], dtype=np.float64)
        entries = (self._one @ units) * (self._two @ units)
        if not all(is_there):
            entries = entries * np.array([*is_there, True])[self._owners]  # -1 is the last: no owner
        return self._rest + entries @ self._prices

    def flops(self, effective: tuple[Sequence[int], Sequence[bool]]) -> int:
        """FLOPs of a forward pass.

        Args:
            effective: Width of each part's units as others see them, and whether its layer is there.
        """
        return round(float(self._both(effective)[0]))

    def parameters(self, effective: tuple[Sequence[int], Sequence[bool]]) -> int:
        """Numbers in all parameters."""
        return round(float(self._both(effective)[1]))
