"""Units: tensors cut and copied unit by unit, copies of units, and how important a unit is.

Called by `surgeon`, and by `optimizer_state` for what an optimizer keeps. Function-preserving widening is Net2WiderNet
(Chen, Goodfellow, Shlens 2016, arXiv:1511.05641, section 2.2): new units copy old ones, and what reads a unit that is
now there k times reads each of them with 1/k of the weight. docs/surgery.md has the formulas.

Deviations: the copied units are not drawn with replacement; every unit is copied once before any is copied twice,
which keeps the k equal to within one, and layer norms exact where k is the same for all. And w / k is rounded to the
digits of w, the first of the k getting what is left, so that the shares add up to w to the bit: narrowing what was just
widened gives back the weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from trimtab.surgery.couplings import Slot
from trimtab.surgery.layout import Layout, Spaces

__all__ = [
    "DRIFT",
    "Copies",
    "Share",
    "UnitMap",
    "add_noise",
    "copies_at",
    "distances",
    "draw_copied",
    "importance",
    "remap",
    "rows",
]

Share = Literal["whole", "divided", "divided_twice"]

DRIFT = 0.1  # relative distance from which a copy counts as a unit of its own: far above rounding and usual noise


@dataclass(frozen=True)
class UnitMap:
    """How the new units of a set come from the old ones.

    Attributes:
        sources: Old unit that each new unit is.
        divisors: How often that old unit is there now; 1 for all when units are taken away.
        folded: Pairs (old unit that goes, new unit that takes over what it gave).
    """

    sources: tuple[int, ...]
    divisors: tuple[int, ...]
    folded: tuple[tuple[int, int], ...] = ()

    @classmethod
    def widening(cls, size: int, copied: Sequence[int]) -> UnitMap:
        """`size` units, followed by copies of the ones named."""
        sources = (*range(size), *copied)
        counts = Counter(sources)
        return cls(sources, tuple(counts[source] for source in sources))

    @classmethod
    def narrowing(cls, size: int, removed: Iterable[int], into: dict[int, int]) -> UnitMap:
        """`size` units without those removed; `into` says which old unit takes over from a removed one."""
        gone = set(removed)
        kept = tuple(unit for unit in range(size) if unit not in gone)
        folded = tuple((unit, kept.index(into[unit])) for unit in sorted(gone) if unit in into)
        return cls(kept, (1,) * len(kept), folded)


def draw_copied(size: int, n_new: int, generator: torch.Generator) -> tuple[int, ...]:
    """Units to copy: random, each once before any twice.

    Args:
        size: Units that there are.
        n_new: Units to add.
        generator: On the CPU.
    """
    drawn: list[int] = []
    while len(drawn) < n_new:
        drawn += torch.randperm(size, generator=generator).tolist()
    return tuple(drawn[:n_new])


def remap(tensor: Tensor, dim: int, layout: Layout, spaces: Spaces, space: int, units: UnitMap, share: Share) -> Tensor:
    """A tensor whose places along one axis follow a change of the units.

    Args:
        tensor: Left as it is.
        dim: The axis.
        layout: Of the axis, before the change.
        spaces: Sizes before the change.
        space: The set of units that changes.
        units: The change.
        share: "whole": copies are copies, and what is folded is dropped. "divided": each of k copies gets 1/k, and
            what is folded is added. "divided_twice": 1/k^2, and (sqrt(a) + sqrt(b))^2: second moments.

    Returns:
        A new tensor.
    """
    index: list[int] = []
    divisors: list[int] = []
    is_first: list[bool] = []  # of the places that share one
    onto: list[tuple[int, int]] = []  # (old place, new place)
    start = 0
    for segment in layout:
        width = segment.width
        if segment.space is None or spaces.root(segment.space) != space:
            length = spaces.size((segment,))
            index += range(start, start + length)
            divisors += [1] * length
            is_first += [True] * length
            start += length
            continue
        new_start = len(index)
        for unit, (source, divisor) in enumerate(zip(units.sources, units.divisors, strict=True)):
            index += range(start + source * width, start + (source + 1) * width)
            divisors += [divisor] * width
            is_first += [unit < spaces[space].size] * width
        for old, new in units.folded:
            onto += [(start + old * width + place, new_start + new * width + place) for place in range(width)]
        start += spaces.size((segment,))
    taken = tensor.detach().index_select(dim, torch.tensor(index, device=tensor.device))
    if share == "whole":
        return taken
    if max(divisors) > 1:
        shape = [1] * tensor.ndim
        shape[dim] = -1
        by = torch.tensor(divisors, dtype=tensor.dtype, device=tensor.device).view(shape)
        first = torch.tensor(is_first, device=tensor.device).view(shape)
        taken = _shares(taken, by, first) if share == "divided" else taken / by / by
    return _fold(taken, tensor.detach(), dim, onto, share) if onto else taken


def _shares(whole: Tensor, by: Tensor, first: Tensor) -> Tensor:
    """Shares of 1/k that add up, in any order, to the whole without rounding.

    Every share is a multiple of the last digit of the whole, so no partial sum has more digits. (a + w) - w rounds a to
    a multiple of w's last digit, or of the one before. Two halves are exact anyway.
    """
    even = whole / by
    rounded = (even + whole) - whole
    uneven = torch.where(first, whole - (by - 1) * rounded, rounded)
    return torch.where(by <= 2, even, uneven)


def _fold(taken: Tensor, tensor: Tensor, dim: int, onto: list[tuple[int, int]], share: Share) -> Tensor:
    """Add what goes to what takes over; of second moments the roots, and k equal ones are multiplied by k^2."""
    old, new = (torch.tensor(places, device=tensor.device) for places in zip(*onto, strict=True))
    given = tensor.index_select(dim, old)
    if share == "divided":
        return taken.index_add(dim, new, given)
    differs = (given != taken.index_select(dim, new)).to(torch.int32)
    all_equal = torch.zeros(taken.shape, dtype=torch.int32, device=taken.device).index_add_(dim, new, differs) == 0
    count = torch.ones_like(taken).index_add_(dim, new, torch.ones_like(given))
    root = taken.clamp_min(0).sqrt().index_add(dim, new, given.clamp_min(0).sqrt())
    return torch.where(all_equal, taken * count * count, root * root)


def copies_at(layout: Layout, spaces: Spaces, space: int, size: int, n: int) -> list[int]:
    """Places, along an axis of this layout, of the units from `size` to n, which stand behind the others.

    Args:
        layout: Of the axis.
        spaces: Sizes before the change.
        space: The set of units that was widened.
        size: Units before.
        n: Units now.
    """
    places: list[int] = []
    start = 0
    for segment in layout:
        if segment.space is not None and spaces.root(segment.space) == space:
            places += range(start + size * segment.width, start + n * segment.width)
            start += n * segment.width
        else:
            start += spaces.size((segment,))
    return places


def add_noise(weight: Tensor, dim: int, places: list[int], noise: float, generator: torch.Generator | None) -> None:
    """Add normal noise, `noise` times the weight's root mean square, at places along an axis; in place."""
    index = torch.tensor(places, device=weight.device)
    shape = list(weight.shape)
    shape[dim] = len(places)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64).to(weight)
    weight.index_add_(dim, index, drawn * (noise * weight.square().mean().sqrt()))


def rows(tensor: Tensor, dim: int, layout: Layout, spaces: Spaces, space: int) -> Tensor:
    """What a tensor has for each unit of a set: (units, numbers)."""
    start, parts = 0, []
    for segment in layout:
        length = spaces.size((segment,))
        if segment.space is not None and spaces.root(segment.space) == space:
            part = tensor.detach().narrow(dim, start, length).movedim(dim, 0)
            parts.append(part.reshape(spaces[space].size, -1))
        start += length
    return torch.cat(parts, dim=1)


def importance(slots: Sequence[Slot], spaces: Spaces, space: int, kind: str) -> Tensor:
    """How much each unit does, in float64.

    incoming_i = norm of all weights that make unit i; where batch norms follow, which take that norm out again, the
    norm of their weights gamma_i instead. outgoing_i = norm of all weights that read unit i.

    Args:
        slots: Every place of the units.
        spaces: Their sizes.
        space: The set.
        kind: "incoming", "outgoing", or "product" of both.

    Returns:
        (units,), on the CPU.
    """
    size = spaces[space].size
    gammas = [s for s in slots if s.role == "rides" and isinstance(s.module, _BatchNorm) and s.attribute == "weight"]
    weights = [s for s in slots if s.role == "makes" and not s.attribute.startswith("bias")]
    score = torch.ones(size, dtype=torch.float64)
    chosen = {"incoming": [gammas or weights], "outgoing": [[s for s in slots if s.role == "reads"]]}
    for part in chosen["incoming"] + chosen["outgoing"] if kind == "product" else chosen[kind]:
        square = torch.zeros(size, dtype=torch.float64)
        for slot in part:
            square += _rows(slot, spaces, space).double().square().sum(1).cpu()
        if part:
            score = score * square.sqrt()
    return score


def distances(slots: Sequence[Slot], spaces: Spaces, space: int, ones: Sequence[int], twos: Sequence[int]) -> Tensor:
    """Relative distance of what makes pairs of units: |a - b| / max(|a|, |b|), 0 for two that are made of zeros.

    Returns:
        (pairs,), float64, on the CPU.
    """
    apart, one_norm, two_norm = (torch.zeros(len(ones), dtype=torch.float64) for _ in range(3))
    for slot in slots:
        if slot.role in ("makes", "rides"):
            made = _rows(slot, spaces, space).double().cpu()
            one, two = made[list(ones)], made[list(twos)]
            apart += (one - two).square().sum(1)
            one_norm += one.square().sum(1)
            two_norm += two.square().sum(1)
    norm = torch.maximum(one_norm, two_norm)
    return torch.where(norm > 0, (apart / norm).sqrt(), 0.0)


def _rows(slot: Slot, spaces: Spaces, space: int) -> Tensor:
    if slot.dim is None:
        raise AssertionError(f"{slot.name}.{slot.attribute} is a number")  # sizes are never asked for rows
    tensor: Tensor = getattr(slot.module, slot.attribute)
    return rows(tensor, slot.dim, slot.layout, spaces, space)


class Copies:
    """Which units of a set were made as copies of which, so that narrowing can take copies away first.

    Args:
        sources: For each unit the one that it copies, -1 for none.
    """

    def __init__(self, sources: Iterable[int]) -> None:
        self.sources = list(sources)

    def add(self, copied: Iterable[int]) -> None:
        """New units at the end, copies of those named."""
        self.sources += copied

    def newest_first(self) -> list[int]:
        """Units that are copies, the last made first."""
        return [unit for unit in reversed(range(len(self.sources))) if self.sources[unit] >= 0]

    def into(self, unit: int, removed: set[int]) -> int | None:
        """The unit that takes over from one that is removed: the nearest it was copied from, else a copy of it."""
        at = self.sources[unit]
        while at >= 0:
            if at not in removed:
                return at
            at = self.sources[at]
        origin = self._origin(unit)
        same = [u for u in range(len(self.sources)) if u not in removed and self._origin(u) == origin]
        return same[0] if same else None

    def _origin(self, unit: int) -> int:
        while self.sources[unit] >= 0:
            unit = self.sources[unit]
        return unit

    def remove(self, removed: set[int]) -> None:
        """Forget units; copies of them become copies of what took over."""
        kept = [unit for unit in range(len(self.sources)) if unit not in removed]
        places = {unit: place for place, unit in enumerate(kept)}
        heirs = {unit: self.into(unit, removed) for unit in removed}
        new = []
        for unit in kept:
            source = self.sources[unit]
            heir = heirs[source] if source in removed else source
            new.append(-1 if heir is None or heir < 0 or heir == unit else places[heir])
        self.sources = new
