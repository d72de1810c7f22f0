"""Layouts: which units the places along an axis of a tensor belong to, and which sets of units are one and the same.

Called by the rules that follow the forward pass (`couplings`, `module_rules`, `operation_rules`) and by `units`, which
turns a layout into indices. A *space* is a set of units that can only be changed together: a layer's outputs, and
whatever a residual addition ties to them. A *layout* says of one axis which stretches of it belong to which space:

    output of Linear(4, 7)              (Segment(space a, 1),)
    8 channels of 3 x 3, flattened      (Segment(space a, 9),)          72 places, nine for each unit
    both directions of an LSTM          (Segment(space a, 1),) * 2
    its four gates' rows                (Segment(space a, 1),) * 4
    an axis without units, 5 long       (Segment(None, 5),)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Axes", "Layout", "Segment", "Spaces", "leaves", "plain"]


@dataclass(frozen=True)
class Segment:
    """A stretch of an axis: `width` places for each unit of `space`, or `width` places that belong to no unit."""

    space: int | None
    width: int


Layout = tuple[Segment, ...]


@dataclass(frozen=True)
class Axes:
    """A tensor as the rules see it: the layout of each axis."""

    layouts: tuple[Layout, ...]


def plain(size: int) -> Layout:
    """Layout of an axis that carries no units."""
    return (Segment(None, size),)


def leaves(values: Iterable[Any]) -> Iterator[Axes]:
    """The tensors in nested tuples of values."""
    for value in values:
        if isinstance(value, Axes):
            yield value
        elif isinstance(value, tuple):
            yield from leaves(value)


@dataclass
class _Space:
    """One set of units; `refusal` says why it may not change, `whole_multiples` why it may only grow k times."""

    size: int
    producers: list[str]
    refusal: str | None = None
    whole_multiples: str | None = None


class Spaces:
    """All sets of units found so far; sets that an operation ties together become one."""

    def __init__(self) -> None:
        self._parents: list[int] = []
        self._spaces: list[_Space] = []

    def new(self, size: int, producer: str) -> Layout:
        """Units that the module called `producer` puts out; the layout of its output axis."""
        self._parents.append(len(self._parents))
        self._spaces.append(_Space(size, [producer]))
        return (Segment(len(self._parents) - 1, 1),)

    def root(self, space: int) -> int:
        """The set that a space has become part of."""
        while self._parents[space] != space:
            space = self._parents[space]
        return space

    def roots(self) -> list[int]:
        """Each set once, in the order of its first producer."""
        return [space for space, parent in enumerate(self._parents) if space == parent]

    def __getitem__(self, space: int) -> _Space:
        return self._spaces[self.root(space)]

    def size(self, layout: Layout) -> int:
        """Length of an axis."""
        return sum(s.width if s.space is None else s.width * self[s.space].size for s in layout)

    def in_layout(self, layout: Layout) -> set[int]:
        """The sets that have a place on an axis."""
        return {self.root(segment.space) for segment in layout if segment.space is not None}

    def refuse(self, layouts: Iterable[Layout], reason: str) -> None:
        """Units on these axes may not change; the first reason stands."""
        for layout in layouts:
            for space in self.in_layout(layout):
                self[space].refusal = self[space].refusal or reason

    def tie(self, layouts: Sequence[Layout], where: str) -> Layout:
        """Axes of equal length that are combined place by place: their units become one set, or none may change.

        Args:
            layouts: One or more.
            where: What combines them, for the reason of a refusal.

        Returns:
            The layout of the result.
        """
        first, *others = sorted(layouts, key=lambda layout: not self.in_layout(layout))
        for other in others:
            if len(first) == len(other) and all(map(self._fits, first, other)):
                for one, two in zip(first, other, strict=True):
                    if one.space is not None and two.space is not None:
                        self._unite(one.space, two.space)
            elif self.in_layout(first) or self.in_layout(other):
                known = "something of fixed size" if not self.in_layout(other) else "units in another arrangement"
                self.refuse([first, other], f"{where} combines them with {known}")
        return first

    def _fits(self, one: Segment, two: Segment) -> bool:
        if (one.space is None) != (two.space is None) or one.width != two.width:
            return False
        return one.space is None or two.space is None or self[one.space].size == self[two.space].size

    def _unite(self, one: int, two: int) -> None:
        keep, gone = sorted((self.root(one), self.root(two)))
        if keep == gone:
            return
        kept, lost = self._spaces[keep], self._spaces[gone]
        self._parents[gone] = keep
        kept.producers += lost.producers
        kept.refusal = kept.refusal or lost.refusal
        kept.whole_multiples = kept.whole_multiples or lost.whole_multiples

    def merge(self, layouts: Sequence[Layout], where: str) -> Layout:
        """Layout of neighbouring axes that are flattened into one, the first of them slowest."""
        carrying = [index for index, layout in enumerate(layouts) if self.in_layout(layout)]
        if len(carrying) != 1:
            if carrying:
                self.refuse(layouts, f"{where} mixes two axes of units into one")
            return plain(math.prod(self.size(layout) for layout in layouts))
        before = math.prod(self.size(layout) for layout in layouts[: carrying[0]])
        after = math.prod(self.size(layout) for layout in layouts[carrying[0] + 1 :])
        return tuple(Segment(s.space, s.width * after) for s in layouts[carrying[0]]) * before
