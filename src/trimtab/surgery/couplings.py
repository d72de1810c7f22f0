"""Couplings: which units of a network change together, and every place of every parameter that belongs to them.

Called by `surgeon`. The forward is followed operation by operation (`trace`); rules for torch's modules
(`module_rules`) and for functions and methods (`operation_rules`) say what becomes of the units on the axes of a
tensor. What no rule knows refuses, for all units that go through it, to be changed: nothing is guessed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx, nn

from trimtab.errors import InputError, unknown_name
from trimtab.surgery.layout import Axes, Layout, Spaces, leaves, plain
from trimtab.surgery.module_rules import module_value
from trimtab.surgery.operation_rules import operation_value
from trimtab.surgery.trace import Trace

__all__ = ["Couplings", "Group", "Slot", "Value"]

Value = Any  # of a node: Axes for a tensor, a tuple of values, None for everything else

Role = Literal["makes", "rides", "reads", "holds", "size"]


@dataclass(frozen=True)
class Slot:
    """One axis of one tensor of a module that units have places on.

    Attributes:
        name: The module's, dotted.
        module: The module.
        attribute: A parameter or buffer of the module, or the number in which it keeps its size.
        dim: Axis of the tensor; of a size kept as a tuple, the place in it; None for a size kept as a number.
        layout: Of the axis.
        role: "makes" for what computes a unit from what comes before, "rides" for parameters that a unit passes
            through (a batch norm's), "reads" for weights that a unit's output is multiplied with, "holds" for buffers,
            "size" for a number.
    """

    name: str
    module: nn.Module
    attribute: str
    dim: int | None
    layout: Layout
    role: Role


@dataclass(frozen=True)
class Group:
    """Units that can only be changed together, in every layer that makes or reads them.

    Attributes:
        name: The first layer that makes them, in the order of the forward.
        kind: The class of that layer.
        size: Units now.
        producers: Layers that make them, several where residual additions tie them.
        riders: Layers that they pass through and that have parameters or buffers for each.
        consumers: Layers that read them.
        refusal: Why they cannot be changed; None where they can.
        whole_multiples: Why they can only be widened to a whole multiple of their number; None where to any.
    """

    name: str
    kind: str
    size: int
    producers: tuple[str, ...]
    riders: tuple[str, ...]
    consumers: tuple[str, ...]
    refusal: str | None
    whole_multiples: str | None


class Couplings:
    """What changes with what in one network.

    Args:
        trace: The network's forward.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.spaces = Spaces()
        self.slots: list[Slot] = []
        self.values: dict[fx.Node, Value] = {}
        self.outputs: set[int] = set()  # units that the network puts out
        for node in trace.graph.nodes:
            if node.op == "call_module":
                self.values[node] = module_value(self, node)
            elif node.op in ("call_function", "call_method"):
                self.values[node] = operation_value(self, node)
            elif node.op == "output":
                returned = self.arguments(node)
                self.refuse(returned, "they are an output of the network, whose size is the task's")
                carried = [layout for axes in leaves(returned) for layout in axes.layouts]
                self.outputs = {space for layout in carried for space in self.spaces.in_layout(layout)}
            else:  # an input, or a tensor that the forward takes from the network by itself
                self.values[node] = self.fixed(trace.shapes[node])
        self._refuse_shared_parameters()
        self.groups = tuple(self._group(space) for space in self.spaces.roots())

    # What the rules use

    def arguments(self, node: fx.Node) -> list[Value]:
        """Values of all arguments, positional before keyword; constants are None, lists are tuples."""
        mapped = (fx.map_arg(argument, self._value) for argument in (*node.args, *node.kwargs.values()))
        return [_as_value(argument) for argument in mapped]

    def _value(self, node: fx.Node) -> Value:
        value = self.values[node]
        return _Wrapped(value)

    def fixed(self, shape: Any) -> Value:
        """Value of a result that carries no units."""
        if shape is None:
            return None
        if type(shape) is tuple:
            return tuple(self.fixed(part) for part in shape)
        return Axes(tuple(plain(size) for size in shape))

    def refuse(self, values: Iterable[Value], reason: str) -> None:
        """All units on any axis of the values may not be changed."""
        for axes in leaves(values):
            self.spaces.refuse(axes.layouts, reason)

    def add(self, name: str, module: nn.Module, *slots: tuple[str, int | None, Layout, Role]) -> None:
        """Note places of units in a module; a missing parameter or an axis without units is passed over."""
        for attribute, dim, layout, role in slots:
            if self.spaces.in_layout(layout) and getattr(module, attribute) is not None:
                self.slots.append(Slot(name, module, attribute, dim, layout, role))

    # What is made of it

    def group(self, name: str) -> Group:
        """The group that a layer makes.

        Raises:
            InputError: No layer of this name makes units, or its units cannot be changed.
        """
        for group in self.groups:
            if name in group.producers:
                if group.refusal is not None:
                    raise InputError(f"the units of {name!r} ({group.kind}) cannot be changed: {group.refusal}")
                return group
        raise unknown_name("group of units", name, [producer for g in self.groups for producer in g.producers])

    def slots_of(self, group: Group) -> list[Slot]:
        """Every place of the group's units, sizes included."""
        space = self.space_of(group)
        return [slot for slot in self.slots if space in self.spaces.in_layout(slot.layout)]

    def space_of(self, group: Group) -> int:
        """The group's set of units in the layouts of its slots."""
        return next(space for space in self.spaces.roots() if group.name == self.spaces[space].producers[0])

    def _group(self, space: int) -> Group:
        found: dict[str, dict[str, None]] = defaultdict(dict)
        for slot in self.slots:
            if space in self.spaces.in_layout(slot.layout):
                found[slot.role][slot.name] = None
        known = self.spaces[space]
        return Group(
            name=known.producers[0],
            kind=type(self.trace.modules[known.producers[0]]).__name__,
            size=known.size,
            producers=tuple(dict.fromkeys(known.producers)),
            riders=tuple(found["rides"] | found["holds"]),
            consumers=tuple(found["reads"]),
            refusal=known.refusal,
            whole_multiples=known.whole_multiples,
        )

    def _refuse_shared_parameters(self) -> None:
        """Refuse units whose parameters are used elsewhere or computed, where another selection would be needed."""
        names = {module: name for name, module in reversed(self.trace.modules.items())}
        places: dict[int, list[str]] = defaultdict(list)
        for module, name in names.items():
            for attribute, parameter in module.named_parameters(recurse=False):
                places[id(parameter)].append(f"{name}.{attribute}".lstrip("."))
        taken = {id(_attribute(self.trace, n)): n.name for n in self.trace.graph.nodes if n.op == "get_attr"}
        for slot in self.slots:
            tensor = getattr(slot.module, slot.attribute)
            if slot.role == "size":
                continue
            if self.trace.calls[slot.module] > 1:
                reason = f"module {slot.name!r} is called {self.trace.calls[slot.module]} times in one forward"
            elif len(places[id(tensor)]) > 1:
                reason = f"one parameter is used in several places: {', '.join(sorted(places[id(tensor)]))}"
            elif slot.attribute not in {**slot.module._parameters, **slot.module._buffers}:
                reason = (
                    f"{slot.name}.{slot.attribute} is computed from other tensors (weight_norm, spectral_norm, a mask)"
                )
            elif id(tensor) in taken:
                reason = f"the forward takes {slot.name}.{slot.attribute} by itself as well as through its module"
            else:
                continue
            self.spaces.refuse([slot.layout], reason)


@dataclass(frozen=True)
class _Wrapped:
    """A value on its way through `fx.map_arg`, which would take tuples apart."""

    value: Value


def _as_value(argument: Any) -> Value:
    if isinstance(argument, _Wrapped):
        return argument.value
    if isinstance(argument, (tuple, list)):
        return tuple(_as_value(part) for part in argument)
    return None


def _attribute(trace: Trace, node: fx.Node) -> Any:
    """What a node that takes something from the network by itself takes."""
    owner, _, attribute = str(node.target).rpartition(".")
    return getattr(trace.modules[owner], attribute)
