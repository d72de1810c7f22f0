"""attention: heads and feed-forward units taken out of torch's own transformer modules.

Called by the rest of `trimtab.pruning`. torch.fx sees `nn.MultiheadAttention` and the transformer layers as leaves, so
`trimtab.surgery` cannot look into them. `nn.MultiheadAttention` has embed_dim / heads numbers a head, and cannot have
fewer heads of the same size: a `PrunedAttention` takes its place. Feed-forward units are rows of `linear1` and columns
of `linear2`, and are cut where they are.

What is cut computes what the dense network computes with the columns of the out projection (of `linear2`) that read
the removed heads (units) set to zero. Only torch's very own classes are cut; what cannot be is named by `refused`.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from trimtab.errors import InputError, unknown_name
from trimtab.pruning.pruned_attention import PrunedAttention

__all__ = [
    "PrunedAttention",
    "attentions",
    "cut_feed_forward",
    "cut_heads",
    "feed_forwards",
    "head_importance",
    "refused",
    "unit_importance",
]

Attention: TypeAlias = nn.MultiheadAttention | PrunedAttention
Layer: TypeAlias = nn.TransformerEncoderLayer | nn.TransformerDecoderLayer

# Parameters that heads share out among themselves: the axis, and how many times all heads lie on it (q, k, v packed).
_HEAD_AXES = {
    "in_proj_weight": (0, 3),
    "in_proj_bias": (0, 3),
    "q_proj_weight": (0, 1),
    "k_proj_weight": (0, 1),
    "v_proj_weight": (0, 1),
    "out_proj.weight": (1, 1),
}
_UNIT_AXES = {"linear1.weight": 0, "linear1.bias": 0, "linear2.weight": 1}
# Activations that are known to look at each unit by itself; of others it cannot be known.
_FUNCTIONS = (
    F.relu, F.gelu, F.silu, F.mish, F.tanh, F.sigmoid, F.leaky_relu, F.elu, F.selu, F.celu, F.relu6, F.softplus,
    F.softsign, F.hardtanh, F.hardsigmoid, F.hardswish, F.logsigmoid, torch.relu, torch.tanh, torch.sigmoid,
)  # fmt: skip
_MODULES = (
    nn.ReLU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.ReLU6,
    nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.LogSigmoid, nn.Identity,
)  # fmt: skip


def attentions(model: nn.Module) -> dict[str, Attention]:
    """Attentions whose heads can be cut, dense or pruned before, by dotted name, in the order of `named_modules`."""
    return _survey(model).attentions


def feed_forwards(model: nn.Module) -> dict[str, Layer]:
    """Transformer layers whose feed-forward units can be cut, by dotted name, in the order of `named_modules`."""
    return _survey(model).feed_forwards


def refused(model: nn.Module) -> dict[str, str]:
    """Attentions and transformer layers that cannot be cut, by dotted name, with the reason.

    That a layer is refused is said of its feed-forward units; its attentions stand under names of their own.
    """
    return _survey(model).refused


def head_importance(attention: Attention) -> Tensor:
    """L2 norm of all weights of each head: rows of the in-projections, their biases, columns of the out projection.

    Args:
        attention: Dense or pruned.

    Returns:
        (h,), float64, on the CPU.
    """
    square = torch.zeros(attention.num_heads, dtype=torch.float64)
    for name, parameter in _named(attention, _HEAD_AXES).items():
        axis, parts = _HEAD_AXES[name]
        by_head = _by_head(parameter.detach().cpu().double(), axis, parts, attention)
        square += by_head.movedim(axis + 1, 0).flatten(1).square().sum(1)
    return square.sqrt()


def unit_importance(layer: Layer) -> Tensor:
    """L2 norm of all weights of each feed-forward unit: row of `linear1`, its bias, column of `linear2`.

    Args:
        layer: An encoder or decoder layer.

    Returns:
        (dim_feedforward,), float64, on the CPU.
    """
    square = torch.zeros(layer.linear1.out_features, dtype=torch.float64)
    for name, parameter in _named(layer, _UNIT_AXES).items():
        by_unit = parameter.detach().cpu().double().movedim(_UNIT_AXES[name], 0)
        square += by_unit.reshape(len(square), -1).square().sum(1)
    return square.sqrt()


def cut_heads(model: nn.Module, name: str, kept: Sequence[int]) -> None:
    """Take heads out of an attention of the model, in place; a dense one is replaced by a `PrunedAttention`.

    The parameters that are cut are new ones, without gradients; modes, dtypes, devices and `requires_grad` stay. If all
    heads are kept, nothing is changed. What else in the model reads the attention's parameters has to follow by itself.

    Args:
        model: Changed.
        name: Dotted name of the attention, as in `attentions`.
        kept: Places of the heads that stay, among those that are there now; they stay in ascending order.

    Raises:
        InputError: The name is unknown or refused, or `kept` is empty, out of range or doubled; nothing is changed.
    """
    survey = _survey(model)
    attention = _find("attention", name, survey.attentions, survey.refused)
    places = _checked(kept, attention.num_heads, f"heads of {name!r}")
    if len(places) == attention.num_heads:
        return
    cut = {}
    for parameter_name, parameter in _named(attention, _HEAD_AXES).items():
        axis, parts = _HEAD_AXES[parameter_name]
        by_head = _by_head(parameter.detach(), axis, parts, attention)
        index = torch.tensor(places, device=parameter.device)
        cut[parameter_name] = by_head.index_select(axis + 1, index).flatten(axis, axis + 2)
    if isinstance(attention, PrunedAttention):
        attention.heads = tuple(attention.heads[place] for place in places)
        attention.num_heads = len(places)
        attention.out_proj.in_features = len(places) * attention.head_dim
        _put(attention, cut)
        return
    pruned = _without_weights(attention, places)
    _put(pruned, cut)
    if attention.out_proj.bias is not None:
        pruned.out_proj.bias = attention.out_proj.bias
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, pruned)


def cut_feed_forward(model: nn.Module, name: str, kept: Sequence[int]) -> None:
    """Take feed-forward units out of a transformer layer of the model, in place.

    The parameters that are cut are new ones, without gradients; modules, modes, dtypes, devices and `requires_grad`
    stay. If all units are kept, nothing is changed.

    Args:
        model: Changed.
        name: Dotted name of the layer, as in `feed_forwards`.
        kept: Places of the units that stay, among those that are there now; they stay in ascending order.

    Raises:
        InputError: The name is unknown or refused, or `kept` is empty, out of range or doubled; nothing is changed.
    """
    survey = _survey(model)
    layer = _find("transformer layer", name, survey.feed_forwards, survey.refused)
    places = _checked(kept, layer.linear1.out_features, f"feed-forward units of {name!r}")
    if len(places) == layer.linear1.out_features:
        return
    cut = {}
    for parameter_name, parameter in _named(layer, _UNIT_AXES).items():
        index = torch.tensor(places, device=parameter.device)
        cut[parameter_name] = parameter.detach().index_select(_UNIT_AXES[parameter_name], index)
    _put(layer, cut)
    layer.linear1.out_features = layer.linear2.in_features = len(places)


def _without_weights(attention: nn.MultiheadAttention, heads: list[int]) -> PrunedAttention:
    """The form of a pruned attention, in the dense one's modes; its weights take no memory and draw no numbers."""
    with torch.device("meta"):
        pruned = PrunedAttention(
            attention.embed_dim,
            len(heads),
            attention.head_dim,
            attention.dropout,
            attention.in_proj_bias is not None,
            attention.batch_first,
            attention.kdim,
            attention.vdim,
            heads,
            attention.num_heads,
        )
    pruned.train(attention.training)
    pruned.out_proj.train(attention.out_proj.training)
    for name, parameter in pruned.named_parameters():
        parameter.requires_grad_(attention.get_parameter(name).requires_grad)
    return pruned


def _by_head(tensor: Tensor, axis: int, parts: int, attention: Attention) -> Tensor:
    """The tensor with three axes in the place of one: parts, heads, numbers of a head."""
    before, after = tensor.shape[:axis], tensor.shape[axis + 1 :]
    return tensor.reshape(*before, parts, attention.num_heads, attention.head_dim, *after)


def _named(module: nn.Module, names: Mapping[str, object]) -> dict[str, nn.Parameter]:
    """The module's parameters of those names."""
    return {name: parameter for name, parameter in module.named_parameters() if name in names}


def _put(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put new parameters in the place of those of these names, trained or frozen as they are."""
    for name, tensor in tensors.items():
        owner, _, attribute = name.rpartition(".")
        requires_grad = module.get_parameter(name).requires_grad
        setattr(module.get_submodule(owner), attribute, nn.Parameter(tensor, requires_grad=requires_grad))


def _find(kind: str, name: str, known: Mapping[str, Any], refusals: Mapping[str, str]) -> Any:
    if name in known:
        return known[name]
    if name in refusals:
        raise InputError(f"{name!r} cannot be cut: {refusals[name]}; cut another {kind}, or leave it as it is")
    raise unknown_name(kind, name, known)


def _checked(kept: Sequence[int], size: int, what: str) -> list[int]:
    """Places in ascending order."""
    places = list(kept)
    known = all(_is_whole(place) and 0 <= place < size for place in places)
    if not places or not known or len(set(places)) != len(places):
        raise InputError(
            f"kept is {places!r}; give different places from 0 to {size - 1} of the {what}, one of them at least"
        )
    return sorted(places)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class _Survey(NamedTuple):
    """What a model has to cut, and what it has that cannot be cut."""

    attentions: dict[str, Attention]
    feed_forwards: dict[str, Layer]
    refused: dict[str, str]


def _survey(model: nn.Module) -> _Survey:
    survey = _Survey({}, {}, {})
    names: dict[int, list[str]] = defaultdict(list)  # by the identity of a module or parameter
    for name, module in model.named_modules(remove_duplicate=False):
        names[id(module)].append(name)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    for name, module in model.named_modules():
        if isinstance(module, (nn.MultiheadAttention, PrunedAttention)):
            reason = _attention_refusal(module, names, is_root=module is model)
            found: dict[str, Any] = survey.attentions
        elif isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            reason = _layer_refusal(module, names)
            found = survey.feed_forwards
        else:
            continue
        if reason is None:
            found[name] = module
        else:
            survey.refused[name] = reason
    return survey


def _attention_refusal(attention: Attention, names: Mapping[int, list[str]], *, is_root: bool) -> str | None:
    """Why heads cannot be cut; None if they can."""
    pruned = type(attention) is PrunedAttention
    if not pruned and type(attention) is not nn.MultiheadAttention:
        return _not_torchs_own(attention)
    if not pruned and attention.bias_k is not None:
        return "it adds keys and values of its own (add_bias_kv)"
    if not pruned and attention.add_zero_attn:
        return "it adds a key and a value of zeros (add_zero_attn)"
    if not pruned and is_root:
        return "it is the whole model, in whose place nothing can be put; put it into another module"
    reason = _changed(attention, {"out_proj"}, {*_HEAD_AXES, "out_proj.bias"})
    if reason is None and type(attention.out_proj) not in (nn.Linear, NonDynamicallyQuantizableLinear):
        reason = f"its out_proj is a {type(attention.out_proj).__name__}"
    if reason is None and (attention.in_proj_bias is None) != (attention.out_proj.bias is None):
        reason = "only one of in_proj_bias and out_proj.bias is there"
    if reason is None and not pruned and any(_has_hooks(module) for module in attention.modules()):
        reason = "it has hooks, which would be lost with it; remove them"
    reason = reason or _shared(attention.named_modules(), attention.named_parameters(), names)
    return reason or ("it has one head, and one has to stay" if attention.num_heads == 1 else None)


def _layer_refusal(layer: Layer, names: Mapping[int, list[str]]) -> str | None:
    """Why feed-forward units cannot be cut; None if they can."""
    if type(layer) not in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer):
        return _not_torchs_own(layer)
    if "forward" in vars(layer) or "_ff_block" in vars(layer):
        return "its forward was replaced"
    for name in ("linear1", "linear2"):
        linear = getattr(layer, name)
        if type(linear) is not nn.Linear:
            return f"its {name} is a {type(linear).__name__}"
        reason = _changed(linear, set(), {"weight", "bias"})
        if reason is not None:
            return f"of its {name}: {reason}"
    if type(layer.dropout) not in (nn.Dropout, nn.Identity):
        return f"its dropout is a {type(layer.dropout).__name__}"
    activation: Any = layer.activation
    while isinstance(activation, functools.partial):
        activation = activation.func
    if activation not in _FUNCTIONS and type(activation) not in _MODULES:
        called = getattr(activation, "__name__", type(activation).__name__)
        return f"of its activation {called!r} it is not known that it keeps units apart; use one of torch's"
    parts = {"": layer, "linear1": layer.linear1, "linear2": layer.linear2}
    parameters = [(name, parameter) for name, parameter in layer.named_parameters() if name.startswith("linear")]
    reason = _shared(parts.items(), parameters, names)
    return reason or ("it has one unit, and one has to stay" if layer.linear1.out_features == 1 else None)


def _not_torchs_own(module: nn.Module) -> str:
    name = type(module).__name__
    return f"{name} is not torch's own class but a subclass, whose forward may do other things"


def _changed(module: nn.Module, children: set[str], tensors: set[str]) -> str | None:
    """Why a module is no more what its class is: replaced forward, parametrization, mask, more or fewer tensors."""
    if "forward" in vars(module):
        return "its forward was replaced"
    other = {name for name, _ in module.named_children()} - children
    other |= {name for name, _ in (*module.named_parameters(), *module.named_buffers())} - tensors
    if other:
        return f"it has {', '.join(sorted(other))}, which its class has not (a mask, or a parametrization)"
    return None


def _has_hooks(module: nn.Module) -> bool:
    return any(hooks for name, hooks in vars(module).items() if name.endswith("_hooks"))


def _shared(
    modules: Iterable[tuple[str, nn.Module]],
    parameters: Iterable[tuple[str, nn.Parameter]],
    names: Mapping[int, list[str]],
) -> str | None:
    """Which of the modules or parameters stands in the model under several names."""
    for name, part in (*modules, *parameters):
        if len(names[id(part)]) > 1:
            others = " and ".join(repr(other) for other in names[id(part)])
            return f"{f'its {name}' if name else 'it'} is shared: it stands under {others}"
    return None
