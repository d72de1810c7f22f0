"""Knobs of the network's shape: units per layer, and hidden layers, of a network that is training.

Called through the registry. Both work through one `trimtab.surgery.Surgeon` of the run, which changes network and
optimizer together; docs/surgery.md says what is preserved. Parameters that change are new objects: whoever holds them
is told by `has_touched_state`, and the controller lets go of what it held.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from trimtab.cost import Cost
from trimtab.errors import InputError, unknown_name
from trimtab.knobs.base import Knob
from trimtab.run_state import Array, RunState
from trimtab.seeding import torch_generator
from trimtab.surgery import Group, Surgeon

__all__ = ["Layers", "StructuralKnob", "Structure", "Units", "cost_change"]

_IMPORTANCE = ("product", "incoming", "outgoing")
_OPTIMIZERS = ("SGD", "Adam", "AdamW", "NAdam", "RAdam")  # those of torch whose state surgery knows
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase)


class Structure:
    """What the structural knobs of one run share.

    Args:
        surgeon: Of the run's model and optimizer.

    Attributes:
        surgeon: See above.
        kept: Modules that a knob reads its value from: they are not taken out.
    """

    def __init__(self, surgeon: Surgeon) -> None:
        self.surgeon = surgeon
        self.kept: set[nn.Module] = set()


class StructuralKnob(Knob):
    """A knob that puts other parameters into the model, and other layers.

    Its state holds the plan of all changes, so that a network of the original shape follows it.
    """

    is_whole = True
    changes_shape = True

    def __init__(self, low: float, high: float) -> None:
        super().__init__(low, high)
        if low < 1:
            raise InputError(f"{self.name}: bounds [{low}, {high}]; expected 1 or more")
        self._structure: Structure | None = None
        self._pending: dict[str, Any] | None = None  # a loaded state that the network has not followed yet
        self._version = -1  # of the surgeon, when its groups were looked at last
        self._seen: list[tuple[str, nn.Module]] = []  # the model's modules when they were last found as they should be
        self._written = 0

    @property
    def _surgeon(self) -> Surgeon:
        if self._structure is None:
            raise InputError(f"the knob {self.name!r} is not bound to a run; call bind first")
        return self._structure.surgeon

    @override
    def check_values(self, values: Any) -> Array:
        checked = super().check_values(values)
        if checked[0] < 1:
            raise InputError(f"{self.name}: got {float(checked[0])!r}; expected a whole number of 1 or more")
        return checked

    @override
    def put(self, state: RunState, value: float) -> None:
        """Make the change, which takes as long as a few training steps and waits for the device."""
        self.reshape(state)
        self._look()
        self.cost = None
        surgeon, number = self._surgeon, int(value)
        if not self._is_at(number):
            before = surgeon.cost
            with surgeon.together():
                self._change(number)
                after = surgeon.cost  # a network that fails now is put back
            self.cost = cost_change(before, after)
            self.has_touched_state = True
        self._written = number
        self._look()

    def adopt(self, state: RunState) -> float:
        """Take over the value that the surgeon has left in the network, and return it."""
        self._look()
        self._written = int(self.get(state))
        return float(self._written)

    @override
    def reshape(self, state: RunState) -> None:
        if self._pending is not None:
            self._surgeon.follow(self._pending["plan"])
            pending, self._pending = self._pending, None
            self._restore(pending)
            self._written = pending["written"]
            self._version = -1
            self._look()

    @override
    def find_conflict(self, state: RunState) -> str | None:
        if self._pending is not None:
            return None
        self._look()
        modules = _tree_of(self._surgeon.model)
        if modules != self._seen:  # most often nobody has touched them
            if (found := self._find_other()) is not None:
                return found
            self._seen = modules
        return self._find_other_size()

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._pending is not None:
            return copy.deepcopy(self._pending)
        if self._structure is None:
            return {"written": 0, "plan": None}
        self._look()
        return {"written": self._written, **self._own_state(), "plan": self._surgeon.plan}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._pending = copy.deepcopy(state) if state["plan"] is not None else None

    def _look(self) -> None:
        """Take in what the surgeon has changed since the last look, for whichever knob."""
        surgeon = self._surgeon
        if self._version != surgeon.version:
            self._take_in(surgeon)
            self._version, self._seen = surgeon.version, []

    def _module_of(self, name: str) -> nn.Module | None:
        """What stands in the live model under a name; None where nothing does."""
        try:
            return self._surgeon.model.get_submodule(name)
        except AttributeError:
            return None

    @abstractmethod
    def _take_in(self, surgeon: Surgeon) -> None:
        """Look at the network's groups and layers anew."""

    @abstractmethod
    def _is_at(self, value: int) -> bool:
        """Whether the network has this value already."""

    @abstractmethod
    def _change(self, value: int) -> None:
        """Give the network this value."""

    @abstractmethod
    def _find_other(self) -> str | None:
        """What somebody else has changed among the modules."""

    def _find_other_size(self) -> str | None:
        """What somebody else has changed inside of them."""
        return None

    def _own_state(self) -> dict[str, Any]:
        """What the knob remembers beside its value."""
        return {}

    def _restore(self, state: dict[str, Any]) -> None:
        """Take that in, now that the network has the shape of then."""


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
        structure = _structure_of(state, self.name)
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


class Layers(StructuralKnob):
    """Hidden layers: those Linear, convolution and recurrent layers whose units are not the network's output.

    One more is put in behind the last hidden layer that allows it exactly (ReLU, ReLU6, Hardtanh, or no activation);
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
        structure = _structure_of(state, self.name)
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


def _is_free(group: Group) -> bool:
    return group.refusal is None and group.whole_multiples is None and group.kind != "Embedding"


def _reason(group: Group) -> str:
    return group.refusal or group.whole_multiples or "an embedding, moved only where it is named"


def _kind_of(surgeon: Surgeon, name: str) -> str:
    return f"{name!r} ({type(surgeon.model.get_submodule(name)).__name__})"


def _layers_of(model: nn.Module) -> set[nn.Module]:
    return {module for _, module in _tree_of(model) if isinstance(module, _LAYERS)}


def _tree_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The model and all modules in it, with the names they have where they stand; quicker than `named_modules`."""
    found = [("", model)]
    for _, module in found:
        found += [(name, child) for name, child in module._modules.items() if child is not None]
    return found


def _units_of(module: nn.Module | None) -> int:
    """Units that a layer makes, from the shape of its weight; -1 of what has none."""
    weight = getattr(module, "weight_hh_l0" if isinstance(module, nn.RNNBase) else "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim < 2:
        return -1
    return int(weight.shape[1] if isinstance(module, (nn.RNNBase, nn.Embedding)) else weight.shape[0])


def cost_change(before: Cost, after: Cost) -> dict[str, float]:
    """Cost of the network before and after, under the keys of `Knob.cost`."""
    return {
        "step_flops_before": float(before.step_flops),
        "step_flops": float(after.step_flops),
        "parameters_before": float(before.parameters),
        "parameters": float(after.parameters),
    }


def _structure_of(state: RunState, knob: str) -> Structure:
    """What the structural knobs of the run share; made for the first of them.

    Raises:
        InputError: There is no model or no example inputs, or the model cannot be traced.
    """
    if state.model is None:
        raise InputError(f"the knob {knob!r} acts in the model: give it as model=...")
    kind = type(state.optimizer)
    if kind.__module__.startswith("torch.optim.") and kind.__name__ not in _OPTIMIZERS:
        raise InputError(
            f"the knob {knob!r} cannot carry over what {kind.__name__} keeps; expected {', '.join(_OPTIMIZERS)}"
        )
    structure = state.structure
    if structure is None:
        structure = state.structure = Structure(_surgeon_of(state, knob))
    found: Structure = structure
    found.surgeon.check()
    return found


def _surgeon_of(state: RunState, knob: str) -> Surgeon:
    """The loop's own surgeon where it has one; else a new one on example inputs, or a batch of the loader's data."""
    model, loader = state.model, state.loader
    if hasattr(type(loader), "surgeon"):
        if state.example_inputs is not None:
            raise InputError(f"example_inputs beside loader={type(loader).__name__}, which has its own; leave them out")
        own: Surgeon = loader.surgeon  # type: ignore[union-attr]
        if own.model is not model or own.optimizer is not state.optimizer:
            raise InputError(
                f"the knob {knob!r}: the model and optimizer given are not those of loader={type(loader).__name__}; "
                "give its own"
            )
        return own
    inputs = state.example_inputs
    if inputs is None:
        inputs = _first_inputs(loader, knob)
        device = next(p.device for group in state.optimizer.param_groups for p in group["params"])
        inputs = inputs.to(device)
    return Surgeon(model, inputs, state.optimizer)  # type: ignore[arg-type]


def _first_inputs(loader: object, knob: str) -> Tensor:
    """Inputs of the first samples of a loader's data; neither its order nor a random generator moves.

    Raises:
        InputError: The loader is none that can be asked, or its batches do not begin with a tensor.
    """
    need = (
        f"the knob {knob!r} needs a batch of the model's inputs: give Controller(example_inputs=...), a tensor or a "
        "tuple of the forward's positional arguments, or a TrainingLoop or DataLoader as loader=..."
    )
    data: Any = getattr(loader, "dataset", None)
    if not isinstance(loader, DataLoader) or not hasattr(data, "__len__") or len(data) < 1:
        raise InputError(f"{need}; loader is {type(loader).__name__}")
    collate: Callable[[list[Any]], Any] | None = loader.collate_fn
    count = min(len(data), int(getattr(loader.batch_sampler, "batch_size", None) or 1))
    with torch.random.fork_rng(devices=()):
        samples = [data[index] for index in range(count)]
        batch = collate(samples) if collate is not None else samples
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(first, Tensor):
        raise InputError(f"{need}; a batch of this one begins with {type(first).__name__}")
    return first
