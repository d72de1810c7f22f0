"""attention: heads and feed-forward units taken out of torch's own transformer modules.

Called by the rest of `trimtab.pruning`. torch.fx sees `nn.MultiheadAttention` and the transformer layers as leaves, so
`trimtab.surgery` cannot look into them. `nn.MultiheadAttention` has embed_dim / heads numbers a head, and cannot have
fewer heads of the same size: a `PrunedAttention` takes its place. Feed-forward units are rows of `linear1` and columns
of `linear2`, and are cut where they are.

What is cut computes what the dense network computes with the columns of the out projection (of `linear2`) that read
the removed heads (units) set to zero. Only torch's very own classes are cut; what cannot be is named by `refused`.

Shapes: N sequences, L queries, S keys, E = embed_dim, h heads of d numbers each.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from trimtab.errors import InputError, unknown_name

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

Attention: TypeAlias = "nn.MultiheadAttention | PrunedAttention"
Layer: TypeAlias = "nn.TransformerEncoderLayer | nn.TransformerDecoderLayer"

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


class _Weights(NamedTuple):
    """Parameters of an attention: either all three in-projections in `packed`, or each by itself."""

    packed: Tensor | None
    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None


class _Form(NamedTuple):
    """Numbers of an attention; `dropout` is 0 in evaluation."""

    heads: tuple[int, ...]
    dense_heads: int
    head_dim: int
    dropout: float
    batch_first: bool


class _Call(NamedTuple):
    """What a call asks for beside query, key and value; names as in `nn.MultiheadAttention.forward`."""

    key_padding_mask: Tensor | None
    need_weights: bool
    attn_mask: Tensor | None
    average_attn_weights: bool
    is_causal: bool


class PrunedAttention(nn.Module):
    """Takes the place of an `nn.MultiheadAttention` of which some heads are gone.

    Embeddings stay as wide as they were; the in-projections lead to fewer heads of the same size, and the out
    projection leads back. Names of parameters are those of `nn.MultiheadAttention`, without `bias_k` and `bias_v`.

    A three-dimensional `attn_mask` may be one for the heads that are here, or one for all heads of the dense attention,
    of which those of the kept heads are used. Attention weights that are averaged are averaged over the heads that are
    here. Nested tensors are taken where torch's fused path would take them: in self-attention without masks.

    Args:
        embed_dim: E, width of queries and of the result.
        n_heads: Heads that are left.
        head_dim: Numbers of one head.
        dropout: Probability with which attention weights are dropped in training.
        bias: Whether the projections have biases.
        batch_first: Whether batches are (N, L, E) and not (L, N, E).
        kdim: Width of keys; None for E.
        vdim: Width of values; None for E.
        heads: Which heads of the dense attention are left, ascending; None for the first ones.
        dense_heads: How many heads the dense attention had; None for as many as are left.

    Raises:
        InputError: A number is not a whole number from 1, `dropout` is no probability, or `heads` are not `n_heads`
            ascending places below `dense_heads`.
    """

    # The encoder and its layers take torch's fused path, which has no other form than E = h x d, only where this holds.
    _qkv_same_embed_dim = False

    in_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    q_proj_weight: Tensor | None
    k_proj_weight: Tensor | None
    v_proj_weight: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        n_heads: int,
        head_dim: int,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        heads: Sequence[int] | None = None,
        dense_heads: int | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.num_heads = n_heads
        self.head_dim = head_dim
        self.dropout = dropout
        self.batch_first = batch_first
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.dense_heads = n_heads if dense_heads is None else dense_heads
        numbers = {"embed_dim": embed_dim, "n_heads": n_heads, "head_dim": head_dim, "kdim": self.kdim}
        for name, number in {**numbers, "vdim": self.vdim, "dense_heads": self.dense_heads}.items():
            if not _is_whole(number) or number < 1:
                raise InputError(f"{name} of an attention is {number!r}; give a whole number from 1")
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout <= 1:
            raise InputError(f"dropout of an attention is {dropout!r}; give a probability from 0 to 1")
        self.heads = tuple(range(n_heads) if heads is None else heads)
        places = set(range(self.dense_heads))
        if len(self.heads) != n_heads or not set(self.heads) <= places or sorted(set(self.heads)) != list(self.heads):
            raise InputError(
                f"heads of an attention are {list(self.heads)}; give {n_heads} different places (n_heads) in ascending "
                f"order, from 0 to {self.dense_heads - 1} (dense_heads)"
            )
        width = n_heads * head_dim
        packed = self.kdim == self.vdim == embed_dim
        # One parameter for all three where torch has one; the encoder of torch looks for it by this name.
        shapes = {"in_proj_weight": (3 * width, embed_dim) if packed else None}
        shapes |= {"q_proj_weight": None if packed else (width, embed_dim)}
        shapes |= {"k_proj_weight": None if packed else (width, self.kdim)}
        shapes |= {"v_proj_weight": None if packed else (width, self.vdim)}
        for name, shape in shapes.items():
            weight = None if shape is None else nn.Parameter(nn.init.xavier_uniform_(torch.empty(shape)))
            self.register_parameter(name, weight)
        self.register_parameter("in_proj_bias", nn.Parameter(torch.zeros(3 * width)) if bias else None)
        self.out_proj = nn.Linear(width, embed_dim, bias=bias)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments, as JSON has them, from which an attention of the same shape is made."""
        return {
            "embed_dim": self.embed_dim,
            "n_heads": self.num_heads,
            "head_dim": self.head_dim,
            "dropout": self.dropout,
            "bias": self.in_proj_bias is not None,
            "batch_first": self.batch_first,
            "kdim": self.kdim,
            "vdim": self.vdim,
            "heads": list(self.heads),
            "dense_heads": self.dense_heads,
        }

    def extra_repr(self) -> str:
        """Sizes, for `repr`."""
        return f"embed_dim={self.embed_dim}, heads={list(self.heads)} of {self.dense_heads}, head_dim={self.head_dim}"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, as `nn.MultiheadAttention` does.

        Args:
            query: (N, L, E), or (L, N, E) without `batch_first`, or (L, E).
            key: (N, S, kdim), or (S, N, kdim), or (S, kdim).
            value: (N, S, vdim), or (S, N, vdim), or (S, vdim).
            key_padding_mask: (N, S) or (S): True, or what is added to the scores, where keys are not looked at.
            need_weights: Whether attention weights are wanted; without them it is faster.
            attn_mask: (L, S) or (N x heads, L, S): True, or what is added, where queries do not look at keys.
            average_attn_weights: Whether attention weights are averaged over heads.
            is_causal: Says that `attn_mask`, which has to be given, is the causal one.

        Returns:
            What was attended to, of the query's shape; and attention weights (after dropout, as in torch), (N, L, S) or
            (N, h, L, S), without N for one sequence alone; None if they are not wanted.

        Raises:
            InputError: Tensors have other numbers of dimensions, `attn_mask` is for another number of heads,
                `is_causal` comes without a mask, or nested tensors are not the same one, or come with a mask.
        """
        weights = _Weights(
            self.in_proj_weight,
            self.q_proj_weight,
            self.k_proj_weight,
            self.v_proj_weight,
            self.in_proj_bias,
            self.out_proj.weight,
            self.out_proj.bias,
        )
        dropout = self.dropout if self.training else 0.0
        form = _Form(self.heads, self.dense_heads, self.head_dim, dropout, self.batch_first)
        call = _Call(key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        return _attend(query, key, value, weights, form, call)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, weights: _Weights, form: _Form, call: _Call
) -> tuple[Tensor, Tensor | None]:
    """The whole of the forward, in one function, which torch.fx takes for one operation."""
    if query.is_nested or key.is_nested or value.is_nested:
        return _attend_nested(query, key, value, weights, form, call)
    n_dims = query.dim()
    if n_dims not in (2, 3) or not n_dims == key.dim() == value.dim():
        raise InputError(
            f"query, key and value have {n_dims}, {key.dim()} and {value.dim()} dimensions; give 3 for a batch, or 2 "
            "for one sequence, the same for all"
        )
    if call.is_causal and call.attn_mask is None:
        raise InputError("is_causal is given without attn_mask, of which it says that it is causal; give both")
    q, k, v = (_by_head(x, form) for x in _projected(query, key, value, weights))  # (N, h, L or S, d)
    by_hint = call.is_causal and call.key_padding_mask is None and not call.need_weights
    mask = None if by_hint else _merged_mask(call, form, q, k)
    attention = None
    if call.need_weights:
        scores = (q * form.head_dim**-0.5) @ k.transpose(-2, -1)
        scores = scores if mask is None else scores + mask
        attention = F.dropout(scores.softmax(-1), form.dropout, training=form.dropout > 0)
        attended = attention @ v
        attention = attention.mean(1) if call.average_attn_weights else attention
        attention = attention if n_dims == 3 else attention.squeeze(0)
    else:
        attended = F.scaled_dot_product_attention(q, k, v, mask, form.dropout, is_causal=by_hint)
    if n_dims == 2:
        attended = attended.squeeze(0).transpose(0, 1)  # (L, h, d)
    else:
        attended = attended.transpose(1, 2) if form.batch_first else attended.permute(2, 0, 1, 3)
    return F.linear(attended.flatten(-2), weights.out, weights.out_bias), attention


fx.wrap("_attend")


def _attend_nested(
    query: Tensor, key: Tensor, value: Tensor, weights: _Weights, form: _Form, call: _Call
) -> tuple[Tensor, Tensor | None]:
    """Sequences of several lengths, as `nn.TransformerEncoder` makes them of padded ones in evaluation."""
    masked = call.key_padding_mask is not None or call.attn_mask is not None
    if query is not key or key is not value or masked or not form.batch_first:
        raise InputError(
            "query, key or value is nested; give nested tensors for self-attention alone (all three the same tensor), "
            "without masks and with batch_first=True, or padded tensors with key_padding_mask"
        )
    lengths = [len(sequence) for sequence in query.unbind()]
    padded = query.to_padded_tensor(0.0)
    places = torch.arange(padded.shape[1], device=padded.device)
    padding = places >= torch.tensor(lengths, device=padded.device).unsqueeze(1)
    result, attention = _attend(padded, padded, padded, weights, form, call._replace(key_padding_mask=padding))
    rows = [row[:length] for row, length in zip(result, lengths, strict=True)]
    return torch.nested.as_nested_tensor(rows, layout=query.layout), attention


def _projected(query: Tensor, key: Tensor, value: Tensor, weights: _Weights) -> Sequence[Tensor]:
    """Queries, keys and values of all heads side by side."""
    if weights.packed is not None and query is key and key is value:
        return F.linear(query, weights.packed, weights.bias).chunk(3, -1)
    matrices = (weights.q, weights.k, weights.v) if weights.packed is None else weights.packed.chunk(3)
    biases = (None, None, None) if weights.bias is None else weights.bias.chunk(3)
    inputs = (query, key, value)
    return [F.linear(x, matrix, bias) for x, matrix, bias in zip(inputs, matrices, biases, strict=True)]


def _by_head(x: Tensor, form: _Form) -> Tensor:
    """(N, h, places, d) of what is projected."""
    x = x.unflatten(-1, (len(form.heads), form.head_dim))
    if x.dim() == 3:
        return x.transpose(0, 1).unsqueeze(0)
    return x.transpose(1, 2) if form.batch_first else x.permute(1, 2, 0, 3)


def _merged_mask(call: _Call, form: _Form, q: Tensor, k: Tensor) -> Tensor | None:
    """Both masks, as what is added to scores (N, h, L, S), or fits them by broadcasting."""
    n_batch, n_heads, _, _ = q.shape
    merged = None
    if call.attn_mask is not None:
        merged = _as_added(call.attn_mask, q.dtype)
        if merged.dim() == 3:
            if len(merged) not in (n_batch * n_heads, n_batch * form.dense_heads):
                raise InputError(
                    f"attn_mask has {len(merged)} planes; give one for each of {n_batch} sequences and {n_heads} heads "
                    f"({n_batch * n_heads}), or for all {form.dense_heads} heads that there were "
                    f"({n_batch * form.dense_heads}), or one of two dimensions"
                )
            merged = merged.unflatten(0, (n_batch, -1))
            merged = merged if merged.shape[1] == n_heads else merged[:, list(form.heads)]
    if call.key_padding_mask is not None:
        padding = _as_added(call.key_padding_mask, q.dtype).reshape(n_batch, 1, 1, k.shape[2])
        merged = padding if merged is None else merged + padding
    return merged


def _as_added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as what is added to scores; True is minus infinity."""
    if mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise InputError(f"a mask of attention is {mask.dtype}; give booleans, True where not to look, or floats")
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


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
        by_head = parameter.detach().cpu().double().unflatten(axis, (parts, attention.num_heads, attention.head_dim))
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
    size = (attention.num_heads, attention.head_dim)
    cut = {}
    for parameter_name, parameter in _named(attention, _HEAD_AXES).items():
        axis, parts = _HEAD_AXES[parameter_name]
        by_head = parameter.detach().unflatten(axis, (parts, *size))
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
