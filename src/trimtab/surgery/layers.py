"""Layers: where a layer that changes nothing can be put in, which layer can be taken out, and how that is done.

Called by `surgeon`. Deepening is Net2DeeperNet (Chen, Goodfellow, Shlens 2016, arXiv:1511.05641, section 2.3): behind a
layer f and its activation phi an identity layer I with phi is inserted, which is exact where phi(I phi(z)) = phi(z),
that is where phi is idempotent. docs/surgery.md says where it is not.

The new layer goes in front of the activation that is there: phi(f(x)) becomes phi(I(phi'(f(x)))), phi' a copy of phi.
So it makes no difference whether the activation is a module or a function. The layer, or its batch norm if it has one,
is replaced, under its own name, by a `Deepened` that holds it, phi', the new layer and a new batch norm.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import skip_init

from trimtab.errors import InputError, unknown_name
from trimtab.surgery.couplings import Couplings
from trimtab.surgery.layout import leaves
from trimtab.surgery.module_rules import CONVOLUTIONS, has_batch_norm_rule
from trimtab.surgery.operation_rules import operation_name
from trimtab.surgery.trace import evaluating

__all__ = [
    "Block",
    "Deepened",
    "Head",
    "Removal",
    "block_at",
    "deepenings",
    "head_of",
    "make_deepened",
    "removals",
    "set_module",
]

_IDEMPOTENT = (nn.ReLU, nn.ReLU6, nn.Hardtanh)
_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_OTHER_ACTIVATIONS = (
    nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.SELU, nn.CELU, nn.LeakyReLU, nn.PReLU, nn.RReLU,
    nn.Softplus, nn.Softsign, nn.Hardsigmoid, nn.Hardswish, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.LogSigmoid,
    nn.Softmax, nn.LogSoftmax, nn.Threshold,
)  # fmt: skip
_OTHER_FUNCTIONS = (
    "tanh", "sigmoid", "gelu", "silu", "mish", "elu", "selu", "celu", "leaky_relu", "prelu", "rrelu", "softplus",
    "softsign", "hardsigmoid", "hardswish", "hardshrink", "softshrink", "tanhshrink", "logsigmoid", "softmax",
    "log_softmax", "threshold", "clamp", "clip", "clamp_min", "clamp_max", "sin", "cos", "exp", "log", "square",
    "abs", "hardtanh",
)  # fmt: skip


class Deepened(nn.Sequential):
    """A layer (or its batch norm) and, behind it, an activation, a layer that was put in, and that one's batch norm.

    Args:
        host: What stood here before.
        activation: A copy of what follows; None where nothing does.
        layer: The new one.
        norm: Its batch norm; None without.
    """

    def __init__(self, host: nn.Module, activation: nn.Module | None, layer: nn.Module, norm: nn.Module | None) -> None:
        super().__init__(*(module for module in (host, activation, layer, norm) if module is not None))
        self._place = 1 if activation is None else 2

    @property
    def host(self) -> nn.Module:
        """What stood here before."""
        return self[0]

    @property
    def layer(self) -> nn.Module:
        """The layer that was put in."""
        return self[self._place]


class Head(nn.Sequential):
    """The end of a network that does not count as its hidden layers, such as the dense layers behind convolutions.

    `Surgeon.hidden` leaves them out, none is put in behind them and none is taken out: the knob `layers` does not see
    them. Their units are units like any others.
    """


def head_of(modules: Mapping[str, nn.Module], name: str) -> str | None:
    """Name of the `Head` that a layer stands in; None where it stands in none."""
    parts = name.split(".")
    above = (".".join(parts[:n]) for n in range(len(parts)))
    return next((parent for parent in above if isinstance(modules[parent], Head)), None)


@dataclass(frozen=True)
class Block:
    """A layer with what follows it.

    Attributes:
        name: Of the layer.
        layer: nn.Linear or a convolution.
        node: Its call.
        norm_name: Of the batch norm behind it; None without.
        norm: The batch norm.
        activation: The call of what follows, past dropout; None where no activation does.
        is_gone: The layer was taken out: `layer` is one as it might be, and stands nowhere.
    """

    name: str
    layer: nn.Module
    node: fx.Node
    norm_name: str | None
    norm: nn.Module | None
    activation: fx.Node | None
    is_gone: bool = False

    @property
    def host_name(self) -> str:
        """Of the last module before the activation."""
        return self.norm_name or self.name

    @property
    def host(self) -> nn.Module:
        """The last module before the activation."""
        return self.norm or self.layer


def block_at(c: Couplings, name: str, gone: Collection[str] = ()) -> Block:
    """The layer of a name, with what follows it.

    Args:
        c: Of the network.
        name: Of the layer.
        gone: Places that a Linear was taken out of; the block of such a place has a Linear of the width that goes
            through it, which stands nowhere.

    Raises:
        InputError: There is no such layer, it is none that has an identity, it is called several times, or what it
            puts out is used in several places.
    """
    known = {str(n.target): n for n in _places(c, gone)}
    if name not in known:
        if name in c.trace.modules:
            kind = type(c.trace.modules[name]).__name__
            raise InputError(f"module {name!r} is {kind}; layers are put in behind, and taken out of, Linear and Conv")
        raise unknown_name("layer", name, known)
    layer, node = c.trace.modules[name], known[name]
    if (head := head_of(c.trace.modules, name)) is not None:
        raise InputError(f"layer {name!r} stands in the Head {head!r}; none is put in behind it, and it has to stay")
    if c.trace.calls[layer] > 1:
        raise InputError(f"layer {name!r} is called {c.trace.calls[layer]} times in one forward; it has to stay")
    norm_name, norm = None, None
    at = node
    while True:
        users = list(at.users)
        if len(users) != 1:
            raise InputError(f"what layer {name!r} puts out is used in {len(users)} places before any activation")
        at = users[0]
        module = c.trace.module(at) if at.op == "call_module" else None
        if module is not None and has_batch_norm_rule(module) and norm is None and at.args[0] is node:
            if c.trace.calls[module] > 1:
                raise InputError(f"the batch norm {str(at.target)!r} behind layer {name!r} is called several times")
            norm_name, norm = str(at.target), module
        elif not isinstance(module, _DROPOUT) and operation_name(at.target) not in ("dropout", "dropout2d"):
            break
    activation = at if _is_activation(c, at) else None
    if type(layer) is not nn.Identity:
        return Block(name, layer, node, norm_name, norm, activation)
    if activation is None or norm is not None:
        raise InputError(f"no layer can be put in where {name!r} was taken out: no activation follows, or a batch norm")
    return Block(name, _linear_through(c, node, layer), node, None, None, activation, is_gone=True)


def _places(c: Couplings, gone: Collection[str]) -> list[fx.Node]:
    """Calls of layers that have an identity, and of what was left where such a one went through a vector of units."""
    calls = [node for node in c.trace.graph.nodes if node.op == "call_module"]
    return [
        node
        for node in calls
        if _has_identity(c.trace.module(node))
        or (str(node.target) in gone and type(c.trace.module(node)) is nn.Identity and len(c.trace.shapes[node]) == 2)
    ]


def _linear_through(c: Couplings, node: fx.Node, place: nn.Module) -> nn.Module:
    """A Linear as wide as what goes through a place, as a model for the one that is put in."""
    weights = [p for p in c.trace.modules[""].parameters() if p.is_floating_point()]
    width = c.trace.shapes[node][-1]
    new: nn.Module = _without_weights(nn.Linear, width, width, device=weights[0].device, dtype=weights[0].dtype)
    return new.train(place.training)


def _has_identity(module: nn.Module) -> bool:
    return type(module) is nn.Linear or type(module) in CONVOLUTIONS


def _is_activation(c: Couplings, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(c.trace.module(node), (*_IDEMPOTENT, *_OTHER_ACTIVATIONS))
    name = (operation_name(node.target) or "").rstrip("_")
    return node.op in ("call_function", "call_method") and (name in ("relu", "relu6") or name in _OTHER_FUNCTIONS)


def _activation_name(c: Couplings, node: fx.Node) -> str:
    return type(c.trace.module(node)).__name__ if node.op == "call_module" else str(operation_name(node.target))


def _copy_of_activation(c: Couplings, node: fx.Node) -> nn.Module | None:
    """A module that does the same; None where doing it twice is not doing it once."""
    if node.op == "call_module":
        module = c.trace.module(node)
        if type(module) not in _IDEMPOTENT:
            return None
        twin: Any = copy.deepcopy(module)
        twin.inplace = False
        return twin  # type: ignore[no-any-return]
    name = (operation_name(node.target) or "").rstrip("_")
    return {"relu": nn.ReLU, "relu6": nn.ReLU6}[name]() if name in ("relu", "relu6") else None


def make_deepened(c: Couplings, block: Block, model: nn.Module, inputs: tuple[Any, ...]) -> Deepened:
    """The host with an identity layer behind it; the network is not changed yet.

    Raises:
        InputError: The layer's units are the network's output, its activation is not idempotent, or its batch norm
            has no weights or no running statistics.
    """
    # Where a layer was taken out, what was left there is the host, and the activation that was its own is there still.
    activation = None if block.is_gone else _activation_to_repeat(c, block)
    host = c.trace.modules[block.name] if block.is_gone else block.host
    layer = _identity(block.layer).train(block.layer.training)
    norm = None if block.norm is None else _identity_norm(block, activation, model, inputs)
    new = Deepened(host, activation, layer, norm)
    new.training = block.layer.training  # and not new.train(), which would reach the host: it may be frozen
    return new


def deepenings(c: Couplings, gone: Collection[str] = ()) -> tuple[list[str], dict[str, str]]:
    """Layers, and places of `gone`, that one can be put in behind, in the order of the forward; and why not others."""
    found, refused = [], {}
    for node in _places(c, gone):
        name = str(node.target)
        try:
            block = block_at(c, name, gone)
            if not block.is_gone:
                _activation_to_repeat(c, block)
            _check_norm(block)
            found.append(name)
        except InputError as error:
            refused[name] = str(error)
    return found, refused


def _activation_to_repeat(c: Couplings, block: Block) -> nn.Module | None:
    """What stands between a layer and the one that is put in behind it; None where nothing does.

    Raises:
        InputError: The layer's units are the network's output, or its activation is not idempotent.
    """
    name = block.name
    units = {
        s for axes in leaves([c.values[block.node]]) for layout in axes.layouts for s in c.spaces.in_layout(layout)
    }
    if block.activation is not None:
        activation = _copy_of_activation(c, block.activation)
        if activation is None:
            kind = _activation_name(c, block.activation)
            raise InputError(
                f"no layer can be put in behind {name!r}: its activation is {kind}, and {kind}({kind}(x)) is not "
                f"{kind}(x), so that an identity layer would change the function; ReLU, ReLU6 and Hardtanh allow it"
            )
        return activation
    if units & {c.spaces.root(space) for space in c.outputs}:
        raise InputError(f"no layer can be put in behind {name!r}: what it makes is the network's output")
    return None


def _identity(like: Any) -> nn.Module:
    """A layer that gives back what it gets: the unit matrix, or Dirac's kernel with as much padding as it needs."""
    options = {"bias": like.bias is not None, "device": like.weight.device, "dtype": like.weight.dtype}
    new: Any  # made without initial weights, which would be drawn from torch's global generator
    if isinstance(like, nn.Linear):
        new = _without_weights(nn.Linear, like.out_features, like.out_features, **options)
    else:
        kernel = tuple(k if k % 2 else 3 for k in like.kernel_size)  # an even kernel has no middle
        padding = tuple(k // 2 for k in kernel)
        new = _without_weights(type(like), like.out_channels, like.out_channels, kernel, padding=padding, **options)
    _set_to_identity(new.weight)
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    for attribute in ("weight", "bias"):
        if getattr(like, attribute) is not None:
            getattr(new, attribute).requires_grad_(getattr(like, attribute).requires_grad)
    return new  # type: ignore[no-any-return]


def _without_weights(kind: type[nn.Module], *args: Any, **options: Any) -> Any:
    return skip_init(kind, *args, **options)  # type: ignore[no-untyped-call]


def _set_to_identity(weight: Tensor) -> Tensor:
    return nn.init.eye_(weight) if weight.ndim == 2 else nn.init.dirac_(weight)


@torch.no_grad()
def _identity_norm(block: Block, activation: nn.Module | None, model: nn.Module, inputs: tuple[Any, ...]) -> nn.Module:
    """A batch norm that gives back what it gets in evaluation, and nearly so in training.

    Running mean m and variance v are those of its input on the example inputs, weight sqrt(v + eps) and bias m; a
    channel without variance there gets v = 1.
    """
    old: Any = block.norm
    _check_norm(block)
    seen: list[Tensor] = []
    handle = old.register_forward_hook(lambda module, arguments, output: seen.append(output))
    try:
        with evaluating(model):
            model(*inputs)
    finally:
        handle.remove()
    values = seen[0] if activation is None else activation(seen[0])
    values = values.transpose(0, 1).flatten(1)
    mean, variance = values.mean(1), values.var(1, unbiased=False)
    variance = torch.where(variance > old.eps, variance, torch.ones_like(variance))
    new: Any = copy.deepcopy(old)
    for parameter in new.parameters():
        parameter.grad = None
    new.running_mean.copy_(mean)
    new.running_var.copy_(variance)
    new.weight.copy_((variance + new.eps).sqrt())
    new.bias.copy_(mean)
    new.num_batches_tracked.zero_()
    return new  # type: ignore[no-any-return]


def _check_norm(block: Block) -> None:
    norm: Any = block.norm
    if norm is not None and (norm.weight is None or norm.running_mean is None):
        missing = "weights" if norm.weight is None else "running statistics"
        raise InputError(
            f"no layer can be put in behind {block.name!r}: its batch norm {block.norm_name!r} has no {missing}, so "
            "that a second one cannot be set to the identity"
        )


def set_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in the place of the one of this name; its place in its parent's order stays."""
    parent, _, last = name.rpartition(".")
    model.get_submodule(parent)._modules[last] = new


@dataclass(frozen=True)
class Removal:
    """How a layer is taken out.

    Attributes:
        name: Of the layer.
        score: How far it is from the identity; 0 for one that changes nothing.
        replacements: (name, what is put there).
    """

    name: str
    score: float
    replacements: tuple[tuple[str, nn.Module], ...]


def removals(c: Couplings) -> tuple[list[Removal], dict[str, str]]:
    """Layers that can be taken out, the least important first, and why others cannot."""
    found, refused = [], {}
    for node in c.trace.graph.nodes:
        if node.op == "call_module" and _has_identity(c.trace.module(node)):
            name = str(node.target)
            try:
                found.append(_removal(c, name))
            except InputError as error:
                refused[name] = str(error)
    return sorted(found, key=lambda removal: removal.score), refused


def _removal(c: Couplings, name: str) -> Removal:
    block = block_at(c, name)
    node, source = block.node, block.node.all_input_nodes[0]
    units_in, units_out = (
        {s for axes in leaves([c.values[n]]) for layout in axes.layouts for s in c.spaces.in_layout(layout)}
        for n in (source, node)
    )
    if not units_in:
        raise InputError(f"layer {name!r} cannot be taken out: it reads the network's input")
    if units_out & {c.spaces.root(space) for space in c.outputs}:
        raise InputError(f"layer {name!r} cannot be taken out: it makes the network's output")
    old, new = tuple(c.trace.shapes[source]), tuple(c.trace.shapes[node])
    if old != new:
        raise InputError(f"layer {name!r} cannot be taken out: it reads {old} and makes {new}, which have to be equal")
    replacements: list[tuple[str, nn.Module]] = []
    parent, _, _ = name.rpartition(".")
    container = c.trace.modules[parent]
    if isinstance(container, Deepened) and container.layer is block.layer and container[-1] is block.host:
        replacements.append((parent, container.host))
        return Removal(name, _from_identity(block), tuple(replacements))
    replacements += [(known, nn.Identity()) for known in (name, block.norm_name) if known is not None]
    if block.activation is not None and _copy_of_activation(c, block.activation) is None:
        # Twice this activation is not once, so it goes as well.
        kind = _activation_name(c, block.activation)
        if block.activation.op != "call_module" or c.trace.calls[c.trace.module(block.activation)] > 1:
            raise InputError(
                f"layer {name!r} cannot be taken out: its activation {kind} would then be applied twice; it can go "
                "with its layer only if it is a module of its own"
            )
        replacements.append((str(block.activation.target), nn.Identity()))
    for _, identity in replacements:
        identity.train(block.layer.training)
    return Removal(name, _from_identity(block), tuple(replacements))


@torch.no_grad()
def _from_identity(block: Block) -> float:
    """(|A - 1| + |b|) / |1| of the affine map A x + b that layer and batch norm are in evaluation."""
    layer: Any = block.layer
    weight = layer.weight.double()
    identity = _set_to_identity(torch.zeros_like(weight))
    bias = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    if layer.bias is not None:
        bias = layer.bias.double()
    norm: Any = block.norm
    if norm is not None and norm.running_mean is not None:
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        bias = (bias - norm.running_mean.double()) * scale + (0.0 if norm.bias is None else norm.bias.double())
        weight = weight * scale.view(-1, *[1] * (weight.ndim - 1))
    return float(((weight - identity).norm() + bias.norm()) / identity.norm())
