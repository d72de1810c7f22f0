"""Graph: what Torch-Pruning says of one network, and its cutting; the only place where that library is imported.

Called by `torch_pruning`. Recurrent layers are single operations for it here: it has no right rule for any of them, and
what they are made of leads it astray.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from trimtab.errors import InputError, MissingExtraError, RunFailedError

__all__ = [
    "RIDES",
    "ROOTS",
    "Graph",
    "Group",
    "Place",
    "import_library",
    "is_depthwise",
    "join",
    "named_tensors",
    "sharing",
    "unsupported",
]

ROOTS = (nn.Linear, nn.modules.conv._ConvNd)  # layers whose units Torch-Pruning starts from
_ACROSS_UNITS = (nn.LayerNorm, nn.GroupNorm)  # with fewer units they compute something else, and are meant to
RIDES = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.PReLU, *_ACROSS_UNITS)


@dataclass(frozen=True)
class Place:
    """Where a tensor has the units of a part.

    Attributes:
        module: Dotted name.
        attribute: Of the module.
        axis: Of the tensor.
        index: Places on the axis; (units, places of a unit).
        is_read: Whether the module reads the units there.
    """

    module: str
    attribute: str
    axis: int
    index: Tensor
    is_read: bool

    @property
    def tensor(self) -> str:
        """Its name in the network."""
        return join(self.module, self.attribute)


@dataclass
class Group:
    """What Torch-Pruning couples to the units of one layer.

    Attributes:
        root: The first layer that makes the units; `Part.name`.
        size: Its units.
        makers: Layers that make units of the group.
        covered: Those, and depthwise convolutions, which pass units on.
        places: All places of the units.
        is_across: Whether something is computed across the units, so that it changes when some of them go.
        refusal: Why the units have to stay.
    """

    root: str
    size: int
    makers: list[str] = field(default_factory=list)
    covered: set[str] = field(default_factory=set)
    places: list[Place] = field(default_factory=list)
    is_across: bool = False
    refusal: str | None = None

    def refuse(self, reason: str) -> None:
        """Keep the first reason."""
        self.refusal = self.refusal or reason


class Graph:
    """Torch-Pruning's graph of one network, which it cuts in place.

    Args:
        library: The module `torch_pruning`.
        model: In evaluation; its parameters ask for gradients afterwards.
        inputs: Positional arguments of its forward.

    Attributes:
        roots: Names of the Linear layers and convolutions that it found, in the order in which they are called.

    Raises:
        InputError: It cannot be traced.
    """

    def __init__(self, library: Any, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())  # traced by autograd
        self._modules = dict(model.named_modules())
        self._names = {module: name for name, module in self._modules.items()}
        self._parameters = {id(parameter): name for name, parameter in model.named_parameters()}
        self._outputs: list[Tensor] = []
        called: list[str] = []
        recurrent = [module for module in self._modules.values() if isinstance(module, nn.RNNBase)]
        hooks = [
            module.register_forward_pre_hook(lambda module, _: called.append(self._names[module]))
            for module in self._modules.values()
            if isinstance(module, ROOTS)
        ]
        try:
            with torch.enable_grad(), _as_one_operation(recurrent), _without_its_warnings():
                self._graph = library.DependencyGraph().build_dependency(
                    model,
                    inputs,
                    forward_fn=lambda model, inputs: model(*inputs),
                    output_transform=self._note_outputs,
                    customized_pruners={type(module): _Uncut() for module in recurrent},
                    verbose=False,
                )
        except Exception as error:  # its own errors are of many kinds, bare assertions among them
            raise InputError(
                f"Torch-Pruning cannot trace {type(model).__name__}: {type(error).__name__}: {error}; it needs outputs "
                "that autograd leads back from to the layers"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        self.roots = [name for name in dict.fromkeys(called) if self._modules[name] in self._graph.module2node]

    def _note_outputs(self, outputs: Any) -> list[Tensor]:
        self._outputs = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
        if not self._outputs:
            raise ValueError("no output is a tensor with a gradient")
        return self._outputs

    def _coupled(self, root: str, units: Iterable[int]) -> Any:
        module = self._modules[root]
        prune = self._graph.get_pruner_of_module(module).prune_out_channels
        try:
            with _without_its_warnings():
                return self._graph.get_pruning_group(module, prune, list(units))
        except Exception as error:  # its own errors are of many kinds, bare assertions among them
            reason = f"{type(error).__name__}: {error}"
            raise RunFailedError(f"Torch-Pruning cannot say what is coupled to {root!r}: {reason}") from error

    def prune(self, root: str, units: Sequence[int]) -> None:
        """Take units of a part away, in place.

        Raises:
            RunFailedError: Torch-Pruning fails.
        """
        group = self._coupled(root, units)
        try:
            group.prune()
        except Exception as error:  # as above
            raise RunFailedError(f"Torch-Pruning fails to cut {root!r}: {type(error).__name__}: {error}") from error

    def group(self, root: str, shared: Collection[str]) -> Group:
        """What is coupled to all units of a layer.

        Args:
            root: Name of the layer.
            shared: Names of modules that share a tensor with another.
        """
        weight: Any = self._modules[root].weight
        group = Group(root, weight.shape[_out_axis(self._modules[root])], [root])
        ends = {output.grad_fn for output in self._outputs}
        try:
            items = self._coupled(root, range(group.size)).items
        except RunFailedError as error:
            group.refuse(str(error))
            return group
        for item in items:
            target, module = item.dep.target, item.dep.target.module
            is_made = self._graph.is_out_channel_pruning_fn(item.dep.handler)
            if is_made and target.grad_fn in ends:
                group.refuse("its units are the network's output")
            if isinstance(module, nn.Parameter):
                held = self._parameters.get(id(module), "a parameter")
                group.refuse(f"its units meet {held!r}, of which Torch-Pruning guesses the axis that they lie on")
            if isinstance(module, nn.Parameter) or module not in self._names:
                continue  # an operation without tensors
            self._note(group, module, is_made, item, shared)
        order = {name: place for place, name in enumerate(self.roots)}
        group.makers.sort(key=lambda name: order.get(name, -1))
        return group

    def _note(self, group: Group, module: nn.Module, is_made: bool, item: Any, shared: Collection[str]) -> None:
        """Add the places that a module has for the units."""
        name, kind = self._names[module], type(module).__name__
        reason = unsupported(module)
        if reason is None and name in shared:
            reason = "it shares a parameter with another module"
        if reason is not None:
            group.refuse(reason if name == group.root else f"its units meet {name!r} ({kind}): {reason}")
        if isinstance(module, (*ROOTS, nn.Embedding)) and is_made:
            group.covered.add(name)
            if not is_depthwise(module) and name not in group.makers:
                group.makers.append(name)
        if reason is not None:
            return
        group.is_across = group.is_across or isinstance(module, _ACROSS_UNITS)
        is_read = not is_made
        for attribute, axis in _axes(module, is_read):
            length = getattr(module, attribute).shape[axis]
            index = _by_unit(item.idxs, item.root_idxs, group.size, length)
            if index is None:
                group.refuse(f"Torch-Pruning gives its units unequal numbers of places in {name!r}")
                return
            group.places.append(Place(name, attribute, axis, index, is_read))


class _Uncut:
    """Where Torch-Pruning looks for how a recurrent layer is cut. No group that one is in is ever cut."""

    pruning_dim = -1  # Torch-Pruning sets it

    def prune_out_channels(self, layer: nn.RNNBase, units: Sequence[int]) -> None:
        """Refuse."""
        raise RunFailedError(f"a recurrent layer was to lose {len(units)} of {layer.hidden_size} units")

    def prune_in_channels(self, layer: nn.RNNBase, units: Sequence[int]) -> None:
        """Refuse."""
        raise RunFailedError(f"a recurrent layer was to lose {len(units)} of {layer.input_size} inputs")

    def get_out_channels(self, layer: nn.RNNBase) -> int:
        """Units of one direction."""
        return layer.hidden_size

    def get_in_channels(self, layer: nn.RNNBase) -> int:
        """What it reads."""
        return layer.input_size


class _OneOperation(torch.autograd.Function):
    """A module's forward as one operation, so that outputs and last states come from the same node."""

    @staticmethod
    def forward(context: Any, run: Callable[[], Any], outlines: list[Any], *_: Tensor) -> tuple[Any, ...]:
        leaves, outline = tree_flatten(run())
        outlines.append(outline)
        return tuple(leaves)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> None:
        raise NotImplementedError("the graph is looked at, and never gone through")


@contextmanager
def _as_one_operation(modules: Sequence[nn.Module]) -> Iterator[None]:
    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        outlines: list[Any] = []
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        run = partial(type(module).forward, module, *args, **kwargs)
        outputs = _OneOperation.apply(run, outlines, *leaves)  # type: ignore[no-untyped-call]
        return tree_unflatten(list(outputs), outlines[0])

    for module in modules:
        module.__dict__["forward"] = partial(forward, module)
    try:
        yield
    finally:
        for module in modules:
            del module.__dict__["forward"]


def import_library() -> Any:
    """The module.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        return importlib.import_module("torch_pruning")
    except ImportError as error:
        raise MissingExtraError(
            'TorchPruningNetwork needs the package torch-pruning, which is not installed; pip install "trimtab[prune]"'
        ) from error


@contextmanager
def _without_its_warnings() -> Iterator[None]:
    """Torch-Pruning warns where it gives up; what it left out is found in its results."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch_pruning\.")
        yield


def unsupported(module: nn.Module) -> str | None:
    """Why the units that a module makes, reads or passes on have to stay."""
    if isinstance(module, (*ROOTS, nn.Embedding)) and "weight" not in dict(_own(module)):
        return "its weight is computed from other tensors; remove the parametrization"
    if isinstance(module, nn.modules.conv._ConvNd):
        is_possible = module.groups == 1 or is_depthwise(module)
        return None if is_possible else f"a convolution of {module.groups} groups"
    if isinstance(module, nn.GroupNorm):
        return None if module.num_groups == 1 else f"a group norm of {module.num_groups} groups"
    if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats:
        return "an instance norm with running statistics, which Torch-Pruning leaves as they are"
    if isinstance(module, (nn.Linear, nn.Embedding, *RIDES)):
        return None
    if isinstance(module, nn.RNNBase):
        return f"Torch-Pruning does not cut {type(module).__name__} layers, or cuts them wrongly"
    if isinstance(module, nn.MultiheadAttention):
        return "Torch-Pruning cannot cut the heads and the width of attention by themselves"
    return f"Torch-Pruning has no rule for {type(module).__name__}"


def _out_axis(module: nn.Module) -> int:
    """Axis of the weight that the units which a Linear or a convolution makes lie on."""
    return 1 if getattr(module, "transposed", False) and not is_depthwise(module) else 0


def is_depthwise(module: nn.Module) -> bool:
    """Whether a module is a convolution that takes each channel by itself, and so passes units on."""
    if not isinstance(module, nn.modules.conv._ConvNd):
        return False
    return module.groups > 1 and module.groups == module.in_channels == module.out_channels


def _axes(module: nn.Module, is_read: bool) -> list[tuple[str, int]]:
    """Tensors of a module that have places for the units it makes (or reads), and the axis that they lie on."""
    if isinstance(module, ROOTS):
        out = _out_axis(module)
        found = [("weight", 1 - out)] if is_read else [("weight", out), ("bias", 0)]
    elif isinstance(module, nn.Embedding):
        found = [("weight", 1)]
    elif isinstance(module, nn.PReLU):
        found = [("weight", 0)] if module.num_parameters > 1 else []
    else:  # a norm: of several axes the last
        names = [key for key, tensor in _own(module) if tensor.ndim > 0]
        found = [(key, getattr(module, key).ndim - 1) for key in names]
    return [(key, axis) for key, axis in found if getattr(module, key) is not None]


def _by_unit(places: Sequence[int], units: Sequence[int], size: int, length: int) -> Tensor | None:
    """Places of each unit, (units, places of a unit); None where their numbers differ or they are none of the axis."""
    found: list[list[int]] = [[] for _ in range(size)]
    for place, unit in zip(places, units, strict=True):
        if unit is None or not 0 <= place < length:
            return None
        found[unit].append(place)
    numbers = {len(of_unit) for of_unit in found}
    if len(numbers) != 1 or 0 in numbers or len(set(places)) < len(places):
        return None
    return torch.tensor([sorted(of_unit) for of_unit in found])


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer by the first name of the module that holds it."""
    for name, module in model.named_modules():
        for key, tensor in _own(module):
            yield join(name, key), tensor


def sharing(model: nn.Module) -> set[str]:
    """Modules that hold a parameter which another one holds too; Torch-Pruning would give each one of its own."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for _, parameter in module.named_parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(name)
    return {name for names in holders.values() if len(names) > 1 for name in names}


def join(module: str, key: str) -> str:
    """Name of a tensor of a module, which is "" for the network itself."""
    return f"{module}.{key}" if module else key
