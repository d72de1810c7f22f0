"""pruned_attention: an attention of which some heads are gone, in the place of an `nn.MultiheadAttention`.

Made by `attention.cut_heads`, and from its `options` by whoever builds a pruned network again. What torch's encoder and
its layers look at in an attention is here too (read in torch 2.13): `batch_first`, `num_heads`, `in_proj_weight`,
`in_proj_bias`, `out_proj` and `_qkv_same_embed_dim`.

It never takes torch's fused path (evaluation, no gradients). That path mistakes masks that are added to scores for
boolean ones (`nn.TransformerEncoderLayer` of torch 2.13), so with such masks the dense layer computes there something
else than in training; this one does not.

Shapes: N sequences, L queries, S keys, E = embed_dim, h heads of d numbers each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from trimtab.errors import InputError

__all__ = ["PrunedAttention"]


class _Weights(NamedTuple):
    """Parameters of an attention: all three in-projections in `packed`, or, where that is None, each by itself."""

    packed: Tensor | None
    separate: tuple[Tensor, Tensor, Tensor]
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
    q_proj_weight: Tensor  # these three are None where in_proj_weight is not, as in torch
    k_proj_weight: Tensor
    v_proj_weight: Tensor

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
        self.heads = tuple(range(n_heads)) if heads is None else _places(heads, n_heads, self.dense_heads)
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
            (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight),
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
    matrices = weights.separate if weights.packed is None else weights.packed.chunk(3)
    biases = (None, None, None) if weights.bias is None else weights.bias.chunk(3)
    inputs = (query, key, value)
    return [F.linear(x, matrix, bias) for x, matrix, bias in zip(inputs, matrices, biases, strict=True)]


def _by_head(x: Tensor, form: _Form) -> Tensor:
    """(N, h, places, d) of what is projected."""
    x = x.reshape(*x.shape[:-1], len(form.heads), form.head_dim)
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
            merged = merged.reshape(n_batch, -1, *merged.shape[1:])
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


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _places(heads: Sequence[int], n_heads: int, dense_heads: int) -> tuple[int, ...]:
    is_list = isinstance(heads, (list, tuple)) and all(_is_whole(head) and 0 <= head < dense_heads for head in heads)
    if not is_list or len(heads) != n_heads or sorted(set(heads)) != list(heads):
        raise InputError(
            f"heads of an attention are {heads!r}; give {n_heads} different places (n_heads) in ascending order, "
            f"from 0 to {dense_heads - 1} (dense_heads)"
        )
    return tuple(heads)
