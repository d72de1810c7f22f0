"""Surgeon: changes the units and layers of a live network, and takes its optimizer along.

Called by knobs that change a network in mid-training, and by pruning. docs/surgery.md says what is preserved exactly.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trimtab.cost import Cost, as_inputs, count_cost
from trimtab.errors import InputError, unknown_name
from trimtab.surgery.checks import check_entry, check_number, check_units
from trimtab.surgery.couplings import Couplings, Group, Slot
from trimtab.surgery.layers import block_at, deepenings, head_of, make_deepened, removals, set_module
from trimtab.surgery.layout import Layout
from trimtab.surgery.optimizer_state import Before, OptimizerState, check_optimizer
from trimtab.surgery.trace import trace
from trimtab.surgery.units import (
    DRIFT,
    Copies,
    Share,
    UnitMap,
    add_noise,
    copies_at,
    distances,
    draw_copied,
    importance,
    remap,
)
from trimtab.surgery.way_back import History, WayBack

__all__ = ["Change", "Surgeon"]

_IMPORTANCE = ("product", "incoming", "outgoing")
_UNCOUNTED = Cost(0, 0, 0, 0)
_HISTORIES: WeakKeyDictionary[nn.Module, History] = WeakKeyDictionary()


@dataclass(frozen=True)
class Change:
    """One change of a network.

    Attributes:
        operation: "widen", "narrow", "deepen" or "remove_layer".
        target: The group's, or the layer's, name before the change.
        old_size: Units of the group, or Linear, convolution and recurrent layers of the network, before.
        new_size: The same after.
        units: Units copied (one for each new unit), or removed; empty for layers.
        cost_before: For the surgeon's example inputs.
        cost_after: The same after.
    """

    operation: str
    target: str
    old_size: int
    new_size: int
    units: tuple[int, ...]
    cost_before: Cost
    cost_after: Cost

    def to_dict(self) -> dict[str, Any]:
        """The change as plain numbers, strings and lists, for JSON."""
        return asdict(self) | {"units": list(self.units)}


class Surgeon:
    """Changes one network in place.

    Parameters that change are replaced by new ones, in the network and in the optimizer: whoever else holds them (an
    average of the weights, hooks on tensors, DistributedDataParallel) has to take them anew. Modules stay the same
    objects, so hooks on modules stay. Between changes nobody else may change the network's sizes.

    Args:
        model: Any network that torch.fx can trace.
        example_inputs: A tensor, or a tuple of the forward's positional arguments: a batch as in training. Costs are
            those of this batch.
        optimizer: Taken along; None without. May be exchanged by setting `optimizer`.

    A network that `replay` has changed keeps its history: its plan begins with the one that was replayed.

    Attributes:
        version: Grows with every change of the shape, by whatever method.

    Raises:
        InputError: The network cannot be traced or fails on the inputs.
    """

    def __init__(self, model: nn.Module, example_inputs: object, optimizer: Optimizer | None = None) -> None:
        self.model = model
        self.optimizer = optimizer
        self._inputs = as_inputs(example_inputs)
        self._couplings = Couplings(trace(model, self._inputs))
        self._copies: dict[nn.Module, Copies] = {}
        self._plan: list[dict[str, Any]] = []
        self._ways: list[WayBack | None] = []  # of each entry of the plan; None of one that was taken over
        self._cost: Cost | None = None
        self._counts = True  # replaying counts no costs
        self._undo: list[Callable[[], object]] | None = None  # while a change is made
        self._together: list[Callable[[], object]] | None = None  # while several are
        self._way: WayBack | None = None
        self._last: Change
        self.version = 0
        history = _HISTORIES.get(model)
        if history is not None and history.fits(model):
            self._plan = history.plan
            self._ways = [way if optimizer is None or way.groups is not None else None for way in history.ways]
            self._copies = {module: Copies(sources) for module, sources in history.copies.items()}

    @property
    def groups(self) -> tuple[Group, ...]:
        """Every group of units, those that cannot be changed included, in the order of the forward."""
        return self._couplings.groups

    @property
    def layers(self) -> tuple[str, ...]:
        """Linear, convolution and recurrent layers that the forward calls, in its order."""
        return self._layers_of(self.groups)

    def _layers_of(self, groups: Sequence[Group]) -> tuple[str, ...]:
        modules = self._couplings.trace.modules
        names = dict.fromkeys(name for group in groups for name in group.producers)
        return tuple(name for name in names if not isinstance(modules[name], nn.Embedding))

    @property
    def plan(self) -> list[dict[str, Any]]:
        """Every change so far, for JSON and `replay`: operation, target, units."""
        return [dict(entry, units=list(entry["units"])) for entry in self._plan]

    @property
    def hidden(self) -> tuple[str, ...]:
        """Those of `layers` whose units are not the network's output, and that stand in no `Head`."""
        c = self._couplings
        outputs = {c.spaces.root(space) for space in c.outputs}
        names = self._layers_of([group for group in self.groups if c.space_of(group) not in outputs])
        return tuple(name for name in names if head_of(c.trace.modules, name) is None)

    @property
    def cost(self) -> Cost:
        """Of the network as it is, for the example inputs."""
        if self._cost is None:
            self._cost = count_cost(self.model, self._inputs)
        return self._cost

    def group(self, name: str) -> Group:
        """The group that the layer of this name makes.

        Raises:
            InputError: There is none, or its units cannot be changed; the message says why.
        """
        return self._couplings.group(name)

    def importance(self, name: str, kind: str = "product") -> Tensor:
        """How much each unit of a group does; larger is more.

        "incoming" is the norm of the weights that make a unit, or of the weights of the batch norms behind it where
        there are any; "outgoing" the norm of the weights that read it; "product" their product.

        Returns:
            (units,), float64, on the CPU.
        """
        if kind not in _IMPORTANCE:
            raise unknown_name("importance", kind, _IMPORTANCE)
        group = self.group(name)
        c = self._couplings
        return importance(c.slots_of(group), c.spaces, c.space_of(group), kind)

    def widen(self, name: str, n: int, *, generator: torch.Generator, noise: float = 0.0) -> Change:
        """Widen a group to n units without changing the function (Net2WiderNet).

        Args:
            name: Of a layer that makes the units.
            n: Units then, more than now.
            generator: Draws the units that are copied, and the noise; on the CPU.
            noise: Standard deviation of what is added to the weights that make a copy, in units of their root mean
                square; 0 keeps the function. Copies without noise get equal gradients and stay copies, unless dropout
                tells them apart.

        Raises:
            InputError: The group cannot be widened, or n or noise is none that it can be widened with.
        """
        group = self.group(name)
        check_number(n, group.size + 1, None, f"widen {name!r}, which has {group.size} units")
        if not 0.0 <= noise < float("inf"):
            raise InputError(f"noise is {noise!r}; expected 0 or more, 0.01 for one percent of the weights' size")
        copied = draw_copied(group.size, n - group.size, generator)
        with self._change("widen", name, group.size, n) as units:
            self._widen(group, copied, noise, generator)
            units += copied
        return self._last

    def narrow(
        self,
        name: str,
        n: int | None = None,
        *,
        units: Sequence[int] | None = None,
        importance: str | Tensor = "product",
    ) -> Change:
        """Narrow a group to n units, or take the named ones away.

        Units that `widen` made go first, the newest before the others: what they gave is added to the unit that they
        copy, which restores the network from before (docs/surgery.md says how exactly). A copy that has drifted from
        its source by more than a tenth of its norm counts as a unit of its own. Of other units the least important go.

        Args:
            name: Of a layer that makes the units.
            n: Units then, at least 1 and fewer than now.
            units: Instead of n: the places of those that go.
            importance: A kind of `Surgeon.importance`, or a number for each unit, (units,); larger stays.

        Raises:
            InputError: The group cannot be narrowed, or the arguments do not fit.
        """
        group = self.group(name)
        if (n is None) == (units is None):
            raise InputError(f"narrow takes either n or units; given: n={n!r}, units={units!r}")
        scores = self._scores(group, importance)
        if units is not None:
            removed = check_units(units, group)
        else:
            check_number(n, 1, group.size - 1, f"narrow {name!r}, which has {group.size} units")
            removed = []
        with self._change("narrow", name, group.size, group.size - len(removed) if n is None else int(n)) as gone:
            if n is None:
                self._narrow(group, removed)
                gone += removed
            else:
                gone += self._narrow_to(group, int(n), scores, importance if isinstance(importance, str) else None)
        return self._last

    def deepen(self, after: str) -> Change:
        """Put a layer that changes nothing behind a layer (Net2DeeperNet).

        The layer, or its batch norm, is replaced by a `Deepened`, an nn.Sequential that holds it under the name 0, so
        that its parameters are called `fc.0.weight` instead of `fc.weight`.

        Args:
            after: Name of a Linear or convolution whose activation is ReLU, ReLU6 or Hardtanh, or that has none; or of
                a Linear that was taken out, in whose place one is put then.

        Raises:
            InputError: No layer can be put in there; the message says why.
        """
        c = self._couplings
        block = block_at(c, after, self._gone)
        new = make_deepened(c, block, self.model, self._inputs)
        with self._change("deepen", after, len(self.layers), len(self.layers) + 1):
            state = OptimizerState(self.optimizer)
            host = [p for module in (block.layer, block.norm) if module is not None for p in module.parameters()]
            norm: Any = new[-1] if block.norm is not None else None
            self._set_module(block.host_name, new)
            twin: Any = block.layer
            if block.is_gone:
                twin = Before(self.model, new.layer)
                host = twin.parameters
            pairs: list[tuple[Any, Any]] = [(new.layer, twin), *([] if norm is None else [(norm, block.norm)])]
            for made, like in pairs:
                for attribute in ("weight", "bias"):
                    parameter = getattr(made, attribute)
                    if parameter is not None:
                        state.insert(parameter, getattr(like, attribute), host)
                        host.append(parameter)
            state.rename(self.model)
        return self._last

    def deepenable(self) -> tuple[list[str], dict[str, str]]:
        """Layers that `deepen` takes, in the order of the forward; and the others, with the reason why not."""
        return deepenings(self._couplings, self._gone)

    @property
    def _gone(self) -> set[str]:
        """Layers that were taken out and have left an nn.Identity."""
        return {entry["target"] for entry in self._plan if entry["operation"] == "remove_layer"}

    def removable(self) -> dict[str, float]:
        """Layers that can be taken out, the least important first, with their distance from the identity."""
        return {removal.name: removal.score for removal in removals(self._couplings)[0]}

    def remove_layer(self, name: str | None = None) -> Change:
        """Take a hidden layer out, its batch norm with it.

        One that `deepen` put in is taken out without a trace; another leaves an nn.Identity under its name.

        Args:
            name: Of a Linear or convolution that makes as much as it reads; None takes the one that is nearest to the
                identity: |A - 1| + |b| over |1|, of its map A x + b in evaluation, batch norm included.

        Raises:
            InputError: The layer, or every layer, has to stay; the message says why.
        """
        found, refused = removals(self._couplings)
        chosen = found[0] if found and name is None else next((x for x in found if x.name == name), None)
        if chosen is None and name is None:
            raise InputError(f"no layer can be taken out: {'; '.join(refused.values()) or 'there is none'}")
        if chosen is None:
            raise InputError(refused[str(name)]) if name in refused else unknown_name("layer", name, self.layers)
        with self._change("remove_layer", chosen.name, len(self.layers), len(self.layers) - 1):
            before = list(self.model.parameters())
            for place, new in chosen.replacements:
                self._set_module(place, new)
            left = {id(parameter) for parameter in self.model.parameters()}
            state = OptimizerState(self.optimizer)
            state.remove(parameter for parameter in before if id(parameter) not in left)
            state.rename(self.model)
        return self._last

    # Several changes, and shapes of other times

    def check(self) -> None:
        """Refuse an optimizer that could not be taken along now.

        Raises:
            InputError: Naming what it keeps, or that it has none of the network's parameters.
        """
        if self.optimizer is not None:
            check_optimizer(self.optimizer, self.model)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Make several changes whole or not at all; none of them counts its cost, which `cost` does when asked."""
        copies = {module: list(kept.sources) for module, kept in self._copies.items()}
        kept = self._couplings, self._cost, self._counts, len(self._plan)
        self._together, self._counts = [], False
        try:
            yield
        except BaseException:
            for undo in reversed(self._together):
                undo()
            self._copies = {module: Copies(sources) for module, sources in copies.items()}
            self._couplings, self._cost = kept[:2]
            del self._plan[kept[3] :], self._ways[kept[3] :]
            raise
        finally:
            self._together, self._counts = None, kept[2]

    def follow(self, plan: Sequence[Mapping[str, Any]]) -> None:
        """Give the network the shape that a plan leads to: of its own past, or of another that began as it did.

        Changes beyond what both have in common are taken back, the last first, and the plan's are made. Weights that
        are changed thereby, and the optimizer's state of them, are of no use afterwards: load those that belong to
        the shape. Modules stay the same objects.

        Args:
            plan: `plan` of then, perhaps from JSON.

        Raises:
            InputError: An entry of the plan is none; then nothing is changed. Or it does not fit the network, which is
                left half changed; or it would have to go back over changes that were replayed without the optimizer.
        """
        entries, common, known = self._way_to(plan)
        for way in reversed(known):
            self._copies = way.go(self.model, self.optimizer)
        del self._plan[common:], self._ways[common:]
        if known:
            self._cost = None
            self._look_again()
        counted, self._counts = self._counts, False
        try:
            for place, (operation, target, units) in enumerate(entries[common:], start=common):
                self._repeat(place, operation, target, units)
        finally:
            self._counts = counted

    def check_way(self, plan: Sequence[Mapping[str, Any]]) -> None:
        """Refuse a plan that `follow` could not go back to.

        Raises:
            InputError: See `follow`.
        """
        self._way_to(plan)

    def _way_to(self, plan: Sequence[Mapping[str, Any]]) -> tuple[list[tuple[str, str, list[int]]], int, list[WayBack]]:
        """Entries of a plan, how many of them are made already, and the ways back over the changes beyond those."""
        entries = [check_entry(entry, place) for place, entry in enumerate(plan)]
        mine = [(entry["operation"], entry["target"], list(entry["units"])) for entry in self._plan]
        same = next((n for n, (a, b) in enumerate(zip(entries, mine, strict=False)) if a != b), None)
        common = min(len(entries), len(mine)) if same is None else same
        known = [way for way in self._ways[common:] if way is not None]
        if len(known) < len(self._ways) - common:
            raise InputError(
                f"{type(self.model).__name__} was replayed without its optimizer, and has no way back from there; give "
                "replay(...) the optimizer, or take a fresh network of the original shape"
            )
        return entries, common, known

    def remember(self) -> None:
        """Let surgeons of this network that are made later know of its changes, as long as nobody makes others."""
        ways = [way for way in self._ways if way is not None]
        if len(ways) == len(self._plan):
            copies = {module: list(kept.sources) for module, kept in self._copies.items()}
            _HISTORIES[self.model] = History(self.model, self.plan, ways, copies)

    def _repeat(self, place: int, operation: str, target: str, units: list[int]) -> None:
        """Make the change of one entry of a plan."""
        try:
            if operation == "widen":
                group = self.group(target)
                with self._change("widen", target, group.size, group.size + len(units)) as copied:
                    self._widen(group, check_units(units, group, several=True))
                    copied += units
            elif operation == "narrow":
                self.narrow(target, units=units)
            elif operation == "deepen":
                self.deepen(target)
            else:
                self.remove_layer(target)
        except InputError as error:
            raise InputError(
                f"the plan does not fit the network: entry {place} ({operation} {target!r}): {error}"
            ) from error

    # How a change is made, and taken back

    @contextmanager
    def _change(self, operation: str, target: str, old_size: int, new_size: int) -> Iterator[list[int]]:
        """Make a change whole or not at all; the list that it lends is for the units that were copied or removed."""
        self.check()
        before = self.cost if self._counts else _UNCOUNTED
        state = OptimizerState(self.optimizer)
        self._undo = [state.snapshot()]
        self._way = WayBack.before(self.model, self.optimizer, self._copies)
        copies = {module: list(kept.sources) for module, kept in self._copies.items()}
        couplings, units = self._couplings, list[int]()
        try:
            yield units
            self._look_again()
            self._cost = None
            after = self.cost if self._counts else _UNCOUNTED
        except BaseException:
            for undo in reversed(self._undo):
                undo()
            self._copies = {module: Copies(sources) for module, sources in copies.items()}
            self._couplings, self._cost = couplings, before if self._counts else None
            raise
        finally:
            undone, self._undo = self._undo, None
            way, self._way = self._way, None
        if self._together is not None:
            self._together += undone
        there = set(self.model.modules())
        self._copies = {module: kept for module, kept in self._copies.items() if module in there}
        self._last = Change(operation, target, old_size, new_size, tuple(units), before, after)
        self._plan.append({"operation": operation, "target": target, "units": list(units)})
        self._ways.append(way)

    def _look_again(self) -> None:
        self.version += 1
        self._couplings = Couplings(trace(self.model, self._inputs))

    def _later_undo(self, undo: Callable[[], object]) -> None:
        if self._undo is not None:
            self._undo.append(undo)

    def _set_module(self, name: str, new: nn.Module) -> None:
        old = self.model.get_submodule(name)
        places = {
            (id(owner), key) for owner in self.model.modules() for key, child in owner._modules.items() if child is old
        }
        if len(places) > 1:
            known = [known for known, module in self.model.named_modules(remove_duplicate=False) if module is old]
            raise InputError(f"module {name!r} is registered in several places ({', '.join(known)}); it has to stay")
        self._later_undo(lambda: set_module(self.model, name, old))
        if self._way is not None:
            self._way.note_module(name, old)
        set_module(self.model, name, new)

    def _set_attribute(self, module: nn.Module, attribute: str, value: Any) -> None:
        old = getattr(module, attribute)
        self._later_undo(lambda: setattr(module, attribute, old))
        if self._way is not None:
            self._way.note_attribute(module, attribute, old)
        setattr(module, attribute, value)

    def _copies_of(self, group: Group) -> Copies:
        module = self._couplings.trace.modules[group.name]
        known = self._copies.get(module)
        if known is None or len(known.sources) != group.size:
            known = self._copies[module] = Copies([-1] * group.size)
        return known

    def _widen(
        self, group: Group, copied: Sequence[int], noise: float = 0.0, generator: torch.Generator | None = None
    ) -> None:
        n = group.size + len(copied)
        if group.whole_multiples is not None and n % group.size:
            raise InputError(
                f"the units of {group.name!r} can be widened from {group.size} only to whole multiples, not to {n}: "
                f"{group.whole_multiples}"
            )
        self._copies_of(group).add(copied)
        slots, spaces, space = self._couplings.slots_of(group), self._couplings.spaces, self._couplings.space_of(group)
        self._map_units(group, UnitMap.widening(group.size, copied), n)
        for slot in slots:
            if noise > 0 and slot.role == "makes" and slot.dim is not None and not slot.attribute.startswith("bias"):
                weight: Tensor = getattr(slot.module, slot.attribute).data
                add_noise(weight, slot.dim, copies_at(slot.layout, spaces, space, group.size, n), noise, generator)

    def _narrow_to(self, group: Group, n: int, scores: Tensor, kind: str | None) -> list[int]:
        """Fold copies first, then remove the least important of what is left; the old places of all that went."""
        copies = self._copies_of(group)
        c, newest = self._couplings, copies.newest_first()
        slots, space = c.slots_of(group), c.space_of(group)
        folded: list[int] = []
        if newest:
            drift = distances(slots, c.spaces, space, newest, [copies.sources[unit] for unit in newest])
            folded = [unit for unit, apart in zip(newest, drift.tolist(), strict=True) if apart <= DRIFT]
            folded = folded[: group.size - n]
        kept = [unit for unit in range(group.size) if unit not in folded]
        if folded:
            self._narrow(group, folded)
        if len(kept) > n:
            if folded:
                self._look_again()
                group = self._couplings.group(group.name)
                scores = scores[kept] if kind is None else self._scores(group, kind)
            order = sorted(range(len(kept)), key=lambda unit: (float(scores[unit]), -unit))
            removed = order[: len(kept) - n]
            self._narrow(group, removed)
            folded += [kept[unit] for unit in removed]
        return sorted(folded)

    def _narrow(self, group: Group, removed: Sequence[int]) -> None:
        """Take units away; copies among them, as far as they still are copies, give what they have to their sources."""
        copies, gone = self._copies_of(group), set(removed)
        heirs = {unit: copies.into(unit, gone) for unit in removed}
        pairs = [(unit, heir) for unit, heir in heirs.items() if heir is not None]
        into: dict[int, int] = {}
        if pairs:
            c = self._couplings
            ones, twos = zip(*pairs, strict=True)
            drift = distances(c.slots_of(group), c.spaces, c.space_of(group), ones, twos).tolist()
            into = {unit: heir for (unit, heir), apart in zip(pairs, drift, strict=True) if apart <= DRIFT}
        copies.remove(gone)
        self._map_units(group, UnitMap.narrowing(group.size, removed, into), group.size - len(gone))

    def _map_units(self, group: Group, units: UnitMap, n: int) -> None:
        """Put a new tensor in the place of every one that has places for the group's units."""
        c, space = self._couplings, self._couplings.space_of(group)
        state = OptimizerState(self.optimizer)
        tensors: dict[tuple[nn.Module, str], list[Slot]] = defaultdict(list)
        for slot in c.slots_of(group):
            if slot.role == "size":
                self._set_size(slot, self._new_size(slot.layout, space, n))
            else:
                tensors[slot.module, slot.attribute].append(slot)

        def mapped(slots: list[Slot], tensor: Tensor, making: Share, reading: Share) -> Tensor:
            for slot in slots:
                share = reading if slot.role == "reads" else making
                dim = 0 if slot.dim is None else slot.dim
                tensor = remap(tensor, dim, slot.layout, c.spaces, space, units, share)
            return tensor

        for (module, attribute), slots in tensors.items():
            old = getattr(module, attribute)
            new = mapped(slots, old, "whole", "divided")
            if isinstance(old, nn.Parameter):
                parameter = nn.Parameter(new, requires_grad=old.requires_grad)
                parameter.__dict__.update(old.__dict__)  # marks that a user put on it
                # Of the gradient, copies have their share where units are made, and the same where they are read.
                state.replace(old, parameter, partial(mapped, slots, reading="whole"))
                new = parameter
            self._set_attribute(module, attribute, new)
        for module in dict.fromkeys(module for module, _ in tensors):
            if isinstance(module, nn.RNNBase):
                module.flatten_parameters()

    def _new_size(self, layout: Layout, space: int, n: int) -> int:
        c = self._couplings
        mine = sum(s.width for s in layout if s.space is not None and c.spaces.root(s.space) == space)
        return c.spaces.size(layout) + mine * (n - c.spaces[space].size)

    def _set_size(self, slot: Slot, size: int) -> None:
        if slot.dim is None:
            self._set_attribute(slot.module, slot.attribute, size)
            return
        sizes = list(getattr(slot.module, slot.attribute))
        sizes[slot.dim] = size
        self._set_attribute(slot.module, slot.attribute, tuple(sizes))

    def _scores(self, group: Group, importance: str | Tensor) -> Tensor:
        if isinstance(importance, str):
            return self.importance(group.name, importance)
        if importance.shape != (group.size,) or not bool(torch.isfinite(importance).all()):
            raise InputError(
                f"importance has shape {tuple(importance.shape)}; expected one finite number for each of the "
                f"{group.size} units of {group.name!r}"
            )
        return importance.detach().double().cpu()
