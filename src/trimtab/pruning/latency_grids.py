"""Latency grids: what of a network is measured for a table of latencies, at which widths, and how it is read off.

Called by `latency_table`. Nothing is measured here.

An operation is a call of a module with weights and all that runs after it until the next one. It depends on the widths
of the parts whose units it makes, reads or carries. Up to two parts have an axis of its grid each; of more (a
concatenation) those that the operation makes are one axis and the others one, by how long an axis their units make
together.

Heads and feed-forward units inside a transformer module have a grid for each part alone, the others being dense; what
each saves is taken off the module's time. Layers that are made alike share theirs.

An operation all of whose modules are taken out costs nothing; where something is left of it (an activation, pooling),
that has a grid of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import fx

from trimtab.pruning.latency import heads
from trimtab.pruning.network import PrunableNetwork
from trimtab.pruning.parts import Configuration
from trimtab.surgery.layout import leaves

__all__ = ["Assignment", "Grid", "Operation", "cover", "monotone", "operations"]

_LEVELS = 5  # widths at which an axis is measured
Assignment = dict[int, int]  # place of a part -> its width


@dataclass(frozen=True)
class Axis:
    """Parts whose widths move together along one axis of a table.

    Attributes:
        parts: Their places.
        levels: (levels, parts) widths at which it is measured.
        places: Of one unit of each part on the axis that is read; a channel has many behind a flatten.
    """

    parts: tuple[int, ...]
    levels: tuple[tuple[int, ...], ...]
    places: tuple[int, ...]

    def length(self, widths: Sequence[int]) -> int:
        """Of the axis, by width of each of its parts."""
        return sum(width * places for width, places in zip(widths, self.places, strict=True))


@dataclass
class Grid:
    """Times of one operation over some widths.

    Attributes:
        operation: Its number.
        fixed: Widths of the other parts that it depends on; 0 where the layer is taken out.
        axes: Widths that it is measured over.
        seconds: Medians, an axis for each of `axes`; NaN where nothing was measured yet.
        smooth: The same, monotone along each axis.
    """

    operation: int
    fixed: Assignment
    axes: tuple[Axis, ...]
    seconds: np.ndarray = field(init=False)
    smooth: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.fill(np.full(self.shape, np.nan))

    @property
    def shape(self) -> tuple[int, ...]:
        """Levels of each axis."""
        return tuple(len(axis.levels) for axis in self.axes)

    def fill(self, seconds: np.ndarray) -> None:
        """Take in what was measured."""
        self.seconds, self.smooth = seconds, monotone(seconds)

    def cells(self) -> dict[tuple[int, ...], Assignment]:
        """Widths of each cell."""
        found = {}
        for index in np.ndindex(self.shape):
            pairs = [zip(axis.parts, axis.levels[k], strict=True) for axis, k in zip(self.axes, index, strict=True)]
            found[index] = self.fixed | {part: width for axis in pairs for part, width in axis}
        return found

    def at(self, widths: Sequence[int] | Mapping[int, int]) -> float:
        """Seconds at widths of all parts, of which it looks at its own."""
        values: Any = self.smooth
        for axis in self.axes:
            lengths, wanted = (
                [axis.length(level) for level in axis.levels],
                axis.length([widths[p] for p in axis.parts]),
            )
            if len(lengths) == 1:
                values = values[0]
                continue
            k = min(int(np.searchsorted(lengths, wanted, side="right")) - 1, len(lengths) - 2)
            share = min(1.0, max(0.0, (wanted - lengths[k]) / (lengths[k + 1] - lengths[k]))) if k >= 0 else 0.0
            values = (1 - share) * values[max(k, 0)] + share * values[max(k, 0) + 1]
        return float(values)


@dataclass(frozen=True)
class Operation:
    """What runs from one module with weights to the next.

    Attributes:
        name: That module's; "" for what runs before the first.
        parts: Places of the parts that its time depends on.
        removable: Those of them of which it has the layer, or a part of it, that can be taken out.
        grids: Taken out -> times over the widths of the others.
        local: Part inside a transformer module -> times over its width, the others being dense.
    """

    name: str
    parts: tuple[int, ...]
    removable: tuple[int, ...]
    grids: dict[tuple[int, ...], Grid]
    local: dict[int, Grid]

    def all_grids(self) -> list[Grid]:
        """Every table once."""
        return [*self.grids.values(), *{id(grid): grid for grid in self.local.values()}.values()]

    def seconds(self, widths: Sequence[int], is_there: Sequence[bool]) -> float:
        """Its time, by width of each part as others see it, and whether the part's layer is there."""
        grid = self.grids.get(tuple(part for part in self.removable if not is_there[part]))
        if grid is None:  # nothing is left of it, or no part touches it
            return 0.0
        seconds = grid.at(widths)
        for part, local in self.local.items():
            (one,) = local.axes[0].parts  # that stands for all that are made alike
            seconds -= float(local.smooth[-1]) - local.at({one: widths[part]})
        return max(0.0, seconds)


def operations(network: PrunableNetwork) -> list[Operation]:
    """What runs from one module with weights to the next, and the tables that it needs."""
    starts, groups = set(heads(network)), list[list[fx.Node]]([[]])
    for node in network.couplings.trace.graph.nodes:
        if node in starts:
            groups.append([])
        if node.op not in ("placeholder", "output"):
            groups[-1].append(node)
    return [_operation(network, number, nodes) for number, nodes in enumerate(groups)]


def _operation(network: PrunableNetwork, number: int, nodes: Sequence[fx.Node]) -> Operation:
    carried, made, local = _parts_of(network, nodes)  # place of a part -> places of one of its units
    parts = tuple(sorted({*carried, *local}))
    called = {str(node.target) for node in nodes if node.op == "call_module"}
    removable = tuple(part for part in carried if called & _taken_out(network, part))
    grids = {}
    for n_gone in range(len(removable) + 1):
        for gone in itertools.combinations(removable, n_gone):
            names = {name for part in gone for name in _taken_out(network, part)}
            if parts and any(node.op != "call_module" or str(node.target) not in names for node in nodes):
                fixed = dict.fromkeys(gone, 0) | {part: network.dense[part] for part in local}
                left = [part for part in carried if part not in gone]
                grids[gone] = Grid(number, fixed, _axes(network, {part: carried[part] for part in left}, made))
    twins: dict[tuple[Any, ...], Grid] = {}
    of_local = {}
    for part in local:
        dense = {other: network.dense[other] for other in parts if other != part}
        grid = Grid(number, dense, (_axis(network, {part: 1}),))
        of_local[part] = twins.setdefault(_made_alike(network, part), grid)
    name = str(nodes[0].target) if number > 0 else ""
    return Operation(name, parts, removable, grids, of_local)


def _parts_of(network: PrunableNetwork, nodes: Sequence[fx.Node]) -> tuple[dict[int, int], set[int], list[int]]:
    """Parts whose units lie on what an operation reads, makes or carries; those it makes; those inside its modules.

    The first come with the places that one of their units has on the axis that the operation's weights read, 1 where
    they read none.
    """
    c = network.couplings
    by_space = {way.space: place for place, way in enumerate(network.ways) if way.space is not None}
    modules = {c.trace.module(node): str(node.target) for node in nodes if node.op == "call_module"}
    slots = [slot for slot in c.slots if slot.module in modules]
    values = [c.values.get(value) for node in nodes for value in (node, *node.all_input_nodes)]
    layouts = [layout for axes in leaves(values) for layout in axes.layouts] + [slot.layout for slot in slots]
    spaces = {space for layout in layouts for space in c.spaces.in_layout(layout)} & by_space.keys()
    carried = dict.fromkeys(sorted(by_space[space] for space in spaces), 1)
    for slot in slots:
        for space in spaces & set(c.spaces.in_layout(slot.layout)) if slot.role == "reads" else ():
            of_space = [s.width for s in slot.layout if s.space is not None and c.spaces.root(s.space) == space]
            carried[by_space[space]] = max(carried[by_space[space]], sum(of_space))
    made = {space for slot in slots if slot.role == "makes" for space in c.spaces.in_layout(slot.layout)}
    local = [
        place
        for place, way in enumerate(network.ways)
        if way.local is not None and any(f"{way.local.module}.".startswith(f"{name}.") for name in modules.values())
    ]
    return carried, {by_space[space] for space in made & by_space.keys()}, local


def _taken_out(network: PrunableNetwork, part: int) -> set[str]:
    """Modules that are no more when a part's layer is taken out."""
    removal = network.ways[part].removal
    return set() if removal is None else {name for name, _ in removal.replacements}


def _made_alike(network: PrunableNetwork, part: int) -> tuple[Any, ...]:
    """The same for parts inside one transformer module that save the same."""
    local = network.ways[part].local
    if local is None:
        return (part,)
    shapes = tuple(tuple(p.shape) for p in network.model.get_submodule(local.module).parameters())
    # A decoder's two attentions read sequences of different lengths.
    role = local.module.rpartition(".")[2] if local.kind == "heads" else ""
    return local.kind, role, network.parts[part].widths, shapes


def _axes(network: PrunableNetwork, parts: Mapping[int, int], made: set[int]) -> tuple[Axis, ...]:
    """Each part by itself, or those that are made and the others, where they are more than two."""
    if len(parts) <= 2:
        groups = [{part: places} for part, places in parts.items()]
    else:
        is_made = [{p: places for p, places in parts.items() if (p in made) == here} for here in (False, True)]
        groups = [group for group in is_made if group]
    return tuple(_axis(network, group) for group in groups)


def _axis(network: PrunableNetwork, parts: Mapping[int, int]) -> Axis:
    """Levels from the smallest widths to the largest, every part's evenly among those that it has."""
    choices = [[width for width in network.parts[part].widths if width > 0] for part in parts]
    n = min(_LEVELS, max(map(len, choices)))
    levels = []
    for k in range(n):
        down = (n - 1 - k) / max(1, n - 1)  # from the largest, which is always one
        levels.append(tuple(widths[len(widths) - 1 - round(down * (len(widths) - 1))] for widths in choices))
    return Axis(tuple(parts), tuple(levels), tuple(parts.values()))


def cover(cells: Sequence[Assignment], dense: Configuration, rest: Configuration) -> list[Configuration]:
    """Few configurations in which every cell is found: the dense one, and such as take in all cells that agree.

    Args:
        cells: Widths that a cell asks for.
        dense: Everything stays.
        rest: Widths of the parts that no cell of a configuration asks for.
    """
    unique = {tuple(sorted(cell.items())): cell for cell in cells}
    waiting = sorted(unique.values(), key=len, reverse=True)
    chosen: Assignment = dict(enumerate(dense))
    found = []
    while True:
        left = []
        for cell in waiting:
            if all(chosen.get(part, width) == width for part, width in cell.items()):
                chosen |= cell
            else:
                left.append(cell)
        found.append(tuple(chosen.get(part, width) for part, width in enumerate(rest)))
        if not left:
            return found
        waiting, chosen = left, {}


def monotone(seconds: np.ndarray) -> np.ndarray:
    """The mean of the largest value up to each place and the smallest from it on, along all axes."""
    low = high = seconds
    for axis in range(seconds.ndim):
        low = np.maximum.accumulate(low, axis)
        high = np.flip(np.minimum.accumulate(np.flip(high, axis), axis), axis)
    mean: np.ndarray = (low + high) / 2
    return mean
