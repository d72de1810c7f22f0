"""What is cut equals, to rounding, the dense network in which nothing reads the heads and units that are gone."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, prune

from trimtab.cost import count_cost
from trimtab.errors import InputError, UnknownNameError
from trimtab.pruning.attention import (
    PrunedAttention,
    attentions,
    cut_feed_forward,
    cut_heads,
    feed_forwards,
    head_importance,
    refused,
    unit_importance,
)
from trimtab.surgery import Surgeon

N, L, S, E, H, FF = 3, 5, 7, 24, 4, 10  # sequences, queries, keys, width, heads, feed-forward units
D = E // H
KEPT, UNITS = [0, 2, 3], [1, 4, 5, 9]
EXACT = {"rtol": 0, "atol": 1e-10}

pytestmark = pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning",  # torch's own use of them
    "ignore:enable_nested_tensor is True, but self.use_nested_tensor is False:UserWarning",
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def filled(model: nn.Module, seed: int = 0) -> Any:
    """The model in float64, with every parameter drawn, so that no bias is zero and no two layers are alike."""
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator(seed), dtype=torch.float64))
            seed += 1
    return model


def drawn(*shape: int, seed: int = 100) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def zeroed(weight: Tensor, kept: Sequence[int], size: int) -> None:
    """Set the columns of all units but the kept ones to zero; a unit has `size` columns."""
    with torch.no_grad():
        for unit in set(range(weight.shape[1] // size)) - set(kept):
            weight[:, unit * size : (unit + 1) * size] = 0


def both(
    model: nn.Module, heads: dict[str, Sequence[int]], units: dict[str, Sequence[int]] | None = None
) -> tuple[Any, Any]:
    """Two copies: masked, and cut."""
    masked, cut = copy.deepcopy(model), copy.deepcopy(model)
    for name, kept in heads.items():
        attention = masked.get_submodule(name)
        zeroed(attention.out_proj.weight, kept, attention.head_dim)
        cut_heads(cut, name, kept)
    for name, kept in (units or {}).items():
        zeroed(masked.get_submodule(name).linear2.weight, kept, 1)
        cut_feed_forward(cut, name, kept)
    return masked, cut


class Alone(nn.Module):
    """An attention that is not the whole model."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, H, **options)

    def forward(self, *args: Any, **options: Any) -> Any:
        return self.attention(*args, **options)


def encoder_layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(E, H, FF, **{"dropout": 0.0, "batch_first": True, **options})


def padding(n_keys: int = L) -> Tensor:
    """(N, keys), True at the end of every sequence but the longest."""
    lengths = torch.tensor([n_keys, n_keys - 2, n_keys - 1])
    return torch.arange(n_keys) >= lengths.unsqueeze(1)


@contextlib.contextmanager
def without_fused_path() -> Iterator[None]:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


CAUSAL = torch.ones(L, L, dtype=torch.bool).triu(1)
MASKS = {
    "no mask": {},
    "attn_mask": {"src_mask": CAUSAL},
    "added attn_mask": {"src_mask": drawn(L, L, seed=7)},
    "key_padding_mask": {"src_key_padding_mask": padding()},
    "both": {"src_mask": CAUSAL, "src_key_padding_mask": padding()},
    "causal hint": {"src_mask": CAUSAL, "is_causal": True},
}


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "batch second"])
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
def test_an_encoder_layer_equals_the_masked_one(norm_first: bool, batch_first: bool, bias: bool, masks: dict[str, Any]):
    options = {"norm_first": norm_first, "batch_first": batch_first, "bias": bias, "activation": "gelu"}
    masked, cut = both(filled(encoder_layer(**options)), {"self_attn": KEPT}, {"": UNITS})
    x = drawn(*((N, L) if batch_first else (L, N)), E)
    torch.testing.assert_close(cut(x, **masks), masked(x, **masks), **EXACT)
    masked.eval(), cut.eval()
    # Torch takes its fused path for the dense layer, which mistakes every mask for a boolean one.
    is_added = "src_mask" in masks and masks["src_mask"].is_floating_point()
    with torch.no_grad(), without_fused_path() if is_added else contextlib.nullcontext():
        torch.testing.assert_close(cut(x, **masks), masked(x, **masks), **EXACT)
    attention = cut.self_attn
    assert type(attention) is PrunedAttention
    assert attention.in_proj_weight.shape == (3 * 3 * D, E)
    assert attention.out_proj.weight.shape == (E, 3 * D)
    assert (attention.in_proj_bias is None, attention.out_proj.bias is None) == (not bias, not bias)
    assert cut.linear1.weight.shape == (4, E)
    assert (cut.linear1.out_features, cut.linear2.in_features) == (4, 4)


@pytest.mark.parametrize("masks", ["none", "bool", "per head", "per kept head"])
@pytest.mark.parametrize("widths", [{}, {"kdim": 6, "vdim": 10}, {"vdim": 10}], ids=["E", "kdim and vdim", "vdim"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "batch second"])
def test_cross_attention_and_its_weights(batch_first: bool, widths: dict[str, int], masks: str):
    masked, cut = both(filled(Alone(batch_first=batch_first, **widths)), {"attention": KEPT})
    lead = (lambda n: (N, n)) if batch_first else (lambda n: (n, N))
    inputs = (drawn(*lead(L), E), drawn(*lead(S), widths.get("kdim", E)), drawn(*lead(S), widths.get("vdim", E)))
    per_head = drawn(N * H, L, S, seed=5)
    dense_masks: dict[str, Any] = {"none": {}, "bool": {"attn_mask": torch.eye(L, S, dtype=torch.bool)}}.get(
        masks, {"attn_mask": per_head, "key_padding_mask": drawn(N, S).masked_fill_(padding(S), -math.inf)}
    )
    cut_masks = dict(dense_masks)
    if masks == "per kept head":
        cut_masks["attn_mask"] = per_head.view(N, H, L, S)[:, KEPT].flatten(0, 1)
    expected, dense_weights = masked(*inputs, average_attn_weights=False, **dense_masks)
    attended, weights = cut(*inputs, average_attn_weights=False, **cut_masks)
    torch.testing.assert_close(attended, expected, **EXACT)
    assert weights.shape == (N, 3, L, S)
    torch.testing.assert_close(weights, dense_weights[:, KEPT], **EXACT)
    attended, weights = cut(*inputs, **cut_masks)
    torch.testing.assert_close(attended, expected, **EXACT)
    torch.testing.assert_close(weights, dense_weights[:, KEPT].mean(1), **EXACT)
    attended, weights = cut(*inputs, need_weights=False, **cut_masks)
    torch.testing.assert_close(attended, expected, **EXACT)
    assert weights is None


@pytest.mark.parametrize("need_weights", [True, False])
def test_one_sequence_alone(need_weights: bool):
    masked, cut = both(filled(Alone(batch_first=True)), {"attention": KEPT})
    query, keys = drawn(L, E), drawn(S, E, seed=3)
    masks = {"key_padding_mask": padding(S)[1], "attn_mask": torch.eye(L, S, dtype=torch.bool)}
    options = {"need_weights": need_weights, "average_attn_weights": False}
    expected, dense_weights = masked(query, keys, keys, **masks, **options)
    attended, weights = cut(query, keys, keys, **masks, **options)
    assert attended.shape == (L, E)
    torch.testing.assert_close(attended, expected, **EXACT)
    if need_weights:
        torch.testing.assert_close(weights, dense_weights[KEPT], **EXACT)
        assert cut(query, keys, keys)[1].shape == (L, S)


def test_keys_and_values_that_are_not_the_same_tensor():
    masked, cut = both(filled(Alone()), {"attention": [1]})
    inputs = (drawn(L, N, E), drawn(S, N, E, seed=1), drawn(S, N, E, seed=2))
    torch.testing.assert_close(cut(*inputs)[0], masked(*inputs)[0], **EXACT)


def test_the_hint_is_believed_as_in_torch():
    masked, cut = both(filled(Alone()), {"attention": KEPT})
    x, no_mask = drawn(L, N, E), torch.zeros(L, L, dtype=torch.float64)
    hinted = cut(x, x, x, attn_mask=no_mask, is_causal=True, need_weights=False)[0]
    torch.testing.assert_close(hinted, masked(x, x, x, attn_mask=CAUSAL, need_weights=False)[0], **EXACT)
    unhinted = cut(x, x, x, attn_mask=no_mask, need_weights=False)[0]
    torch.testing.assert_close(unhinted, masked(x, x, x, need_weights=False)[0], **EXACT)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_acts_in_training_alone(need_weights: bool):
    masked, cut = both(filled(Alone(dropout=1.0)), {"attention": KEPT})
    x = drawn(L, N, E)
    attended, weights = cut(x, x, x, need_weights=need_weights)
    assert torch.equal(attended, cut.attention.out_proj.bias.expand(L, N, E))  # every weight is dropped
    if need_weights:
        assert torch.equal(weights, torch.zeros(N, L, L, dtype=torch.float64))
    masked.eval(), cut.eval()
    expected, _ = masked(x, x, x, need_weights=need_weights)
    torch.testing.assert_close(cut(x, x, x, need_weights=need_weights)[0], expected, **EXACT)


def test_half_of_the_weights_are_dropped_and_the_others_doubled():
    _, cut = both(filled(Alone(dropout=0.5)), {"attention": KEPT})
    x = drawn(40, 10, E)
    weights = cut(x, x, x, average_attn_weights=False)[1]
    kept = weights != 0
    cut.eval()
    torch.testing.assert_close(weights[kept], 2 * cut(x, x, x, average_attn_weights=False)[1][kept], **EXACT)
    assert 0.49 < kept.double().mean() < 0.51  # of 48,000, with a standard deviation of .0023


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "batch second"])
def test_a_decoder_layer_with_both_attentions(norm_first: bool, batch_first: bool):
    layer = nn.TransformerDecoderLayer(E, H, FF, 0.0, batch_first=batch_first, norm_first=norm_first)
    masked, cut = both(filled(layer), {"self_attn": KEPT, "multihead_attn": [1]}, {"": UNITS})
    target, memory = drawn(N, L, E), drawn(N, S, E, seed=3)
    if not batch_first:
        target, memory = target.transpose(0, 1), memory.transpose(0, 1)
    masks = {"tgt_mask": CAUSAL, "tgt_is_causal": True, "memory_key_padding_mask": padding(S)}
    for is_training in (True, False):
        masked.train(is_training), cut.train(is_training)
        torch.testing.assert_close(cut(target, memory, **masks), masked(target, memory, **masks), **EXACT)


@pytest.mark.parametrize("where", [[0], [1], [0, 1], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "padded"])
@pytest.mark.parametrize("mask", ["none", "padding", "causal", "both"])
def test_an_encoder_in_evaluation_without_gradients(mask: str, nested: bool, where: list[int]):
    encoder = filled(nn.TransformerEncoder(encoder_layer(), 3, nn.LayerNorm(E), enable_nested_tensor=nested))
    heads = {f"layers.{place}.self_attn": [0, 3] if place == 0 else KEPT for place in where}
    masked, cut = both(encoder, heads, {f"layers.{place}": UNITS for place in where})
    x = drawn(N, L, E)
    masks: dict[str, Any] = {"mask": CAUSAL} if mask in ("causal", "both") else {}
    masks |= {"src_key_padding_mask": padding()} if mask in ("padding", "both") else {}
    torch.testing.assert_close(cut(x, **masks), masked(x, **masks), **EXACT)
    masked.eval(), cut.eval()
    torch.testing.assert_close(cut(x, **masks), masked(x, **masks), **EXACT)
    with torch.no_grad():
        result = cut(x, **masks)
        torch.testing.assert_close(result, masked(x, **masks), **EXACT)
    if nested and mask == "padding":  # torch made nested tensors of it, which all layers took
        with torch.no_grad():
            bare = copy.deepcopy(cut)
            bare.norm = None
            assert torch.equal(bare(x, **masks)[padding()], torch.zeros(3, E, dtype=torch.float64))


def test_a_whole_transformer():
    model = filled(nn.Transformer(E, H, 2, 2, FF, 0.0, batch_first=True))
    names = list(attentions(model))
    assert names == [
        "encoder.layers.0.self_attn",
        "encoder.layers.1.self_attn",
        "decoder.layers.0.self_attn",
        "decoder.layers.0.multihead_attn",
        "decoder.layers.1.self_attn",
        "decoder.layers.1.multihead_attn",
    ]
    assert list(feed_forwards(model)) == [f"{side}.layers.{i}" for side in ("encoder", "decoder") for i in (0, 1)]
    assert refused(model) == {}
    heads = dict(zip(names, itertools.cycle([[1], [0, 3], KEPT]), strict=False))
    masked, cut = both(model, heads, {name: UNITS for name in feed_forwards(model)})
    source, target = drawn(N, S, E), drawn(N, L, E, seed=3)
    masks = {"tgt_mask": CAUSAL, "src_key_padding_mask": padding(S), "memory_key_padding_mask": padding(S)}
    torch.testing.assert_close(cut(source, target, **masks), masked(source, target, **masks), **EXACT)
    assert list(attentions(cut)) == [name for name, kept in heads.items() if len(kept) > 1]
    assert refused(cut) == {
        name: "it has one head, and one has to stay" for name, kept in heads.items() if len(kept) == 1
    }


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_random_architectures(data: st.DataObject):
    n_heads, head_dim, n_units = (data.draw(st.integers(1, 5)) for _ in range(3))
    width = n_heads * head_dim
    batch_first, is_decoder = data.draw(st.booleans()), data.draw(st.booleans())
    kind = nn.TransformerDecoderLayer if is_decoder else nn.TransformerEncoderLayer
    activation = data.draw(st.sampled_from(["relu", "gelu", nn.SiLU(), torch.tanh]))
    layer = kind(
        width,
        n_heads,
        n_units,
        dropout=0.0,
        activation=activation,
        batch_first=batch_first,
        norm_first=data.draw(st.booleans()),
        bias=data.draw(st.booleans()),
    )
    model = filled(nn.Sequential(layer), data.draw(st.integers(0, 1000)))
    subsets = functools.partial(st.lists, unique=True, min_size=1)
    heads = {name: data.draw(subsets(st.integers(0, n_heads - 1))) for name in attentions(model)}
    units = {name: data.draw(subsets(st.integers(0, n_units - 1))) for name in feed_forwards(model)}
    assert bool(heads) == (n_heads > 1)
    assert bool(units) == (n_units > 1)
    masked, cut = both(model, heads, units)
    n_batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    x = drawn(*((n_batch, length) if batch_first else (length, n_batch)), width)
    inputs: tuple[Any, ...] = (x, torch.flip(x, (0,))) if is_decoder else (x,)
    is_training = data.draw(st.booleans())
    masked.train(is_training), cut.train(is_training)
    with torch.set_grad_enabled(data.draw(st.booleans())):
        torch.testing.assert_close(cut[0](*inputs), masked[0](*inputs), **EXACT)
    for name, kept in heads.items():
        module = cut.get_submodule(name)
        assert module.num_heads == len(kept)
        assert isinstance(module, PrunedAttention) == (len(kept) < n_heads)
        if isinstance(module, PrunedAttention):
            assert module.heads == tuple(sorted(kept))


def test_gradients_are_those_of_the_masked_network():
    masked, cut = both(filled(nn.TransformerEncoder(encoder_layer(), 2)), {}, {})
    for place in (0, 1):
        zeroed(masked.layers[place].self_attn.out_proj.weight, KEPT, D)
        zeroed(masked.layers[place].linear2.weight, UNITS, 1)
        cut_heads(cut, f"layers.{place}.self_attn", KEPT)
        cut_feed_forward(cut, f"layers.{place}", UNITS)
    target = drawn(N, L, E, seed=8)
    for model in (masked, cut):
        F.mse_loss(model(drawn(N, L, E)), target).backward()
    rows = torch.cat([torch.arange(head * D, (head + 1) * D) for head in KEPT])
    packed, units = torch.cat([rows, rows + E, rows + 2 * E]), torch.tensor(UNITS)
    axes = {
        "self_attn.in_proj_weight": (0, packed),
        "self_attn.in_proj_bias": (0, packed),
        "self_attn.out_proj.weight": (1, rows),
        "linear1.weight": (0, units),
        "linear1.bias": (0, units),
        "linear2.weight": (1, units),
    }
    dense = dict(masked.named_parameters())
    assert list(dense) == [name for name, _ in cut.named_parameters()]
    for name, parameter in cut.named_parameters():
        expected = dense[name].grad
        if name.split(".", 2)[2] in axes:
            axis, kept = axes[name.split(".", 2)[2]]
            expected = expected.index_select(axis, kept)
        assert parameter.grad.abs().max() > 0
        torch.testing.assert_close(parameter.grad, expected, **EXACT)


def test_training_goes_on():
    _, cut = both(filled(nn.TransformerEncoder(encoder_layer(), 2)), {"layers.0.self_attn": [1]}, {"layers.1": UNITS})
    x, target = drawn(N, L, E), drawn(N, L, E, seed=8)
    optimizer = torch.optim.Adam(cut.parameters(), 0.01)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.mse_loss(cut(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    assert losses[-1] < 0.8 * losses[0]


def test_cutting_twice_is_cutting_once():
    model = filled(nn.Sequential(encoder_layer()))
    _, once = both(model, {"0.self_attn": [3, 1]}, {"0": [2, 7]})
    _, twice = both(model, {"0.self_attn": [1, 2, 3]}, {"0": [2, 5, 7]})
    attention = twice[0].self_attn
    cut_heads(twice, "0.self_attn", [0, 2])
    cut_feed_forward(twice, "0", [2, 0])
    assert twice[0].self_attn is attention
    assert attention.heads == (1, 3)
    assert attention.out_proj.in_features == 2 * D
    states = once.state_dict(), twice.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert attention.options == once[0].self_attn.options


def test_a_pruned_attention_that_is_the_whole_model_is_cut_in_place():
    attention = filled(PrunedAttention(E, 3, D))
    masked = copy.deepcopy(attention)
    zeroed(masked.out_proj.weight, [0, 2], D)
    cut_heads(attention, "", [0, 2])
    x = drawn(L, N, E)
    torch.testing.assert_close(attention(x, x, x)[0], masked(x, x, x)[0], **EXACT)


@pytest.mark.parametrize(
    "options", [{}, {"bias": False, "batch_first": True, "dropout": 0.25}, {"kdim": 6, "vdim": 10}], ids=str
)
def test_a_network_is_built_again_from_its_options_and_state(options: dict[str, Any]):
    _, cut = both(filled(Alone(**options)), {"attention": [1, 3]})
    numbers = json.loads(json.dumps(cut.attention.options))
    assert numbers == {
        **{"embed_dim": E, "n_heads": 2, "head_dim": D, "dropout": 0.0, "bias": True, "batch_first": False},
        **{"kdim": E, "vdim": E, "heads": [1, 3], "dense_heads": H},
        **options,
    }
    fresh = Alone(**options).double()
    fresh.attention = PrunedAttention(**numbers).double()
    fresh.load_state_dict(cut.state_dict(), strict=True)
    cut.eval(), fresh.eval()
    inputs = (drawn(N, L, E), drawn(N, L, options.get("kdim", E)), drawn(N, L, options.get("vdim", E)))
    for again in (fresh, copy.deepcopy(cut)):
        assert torch.equal(again(*inputs)[0], cut(*inputs)[0])
        assert again.attention.options == cut.attention.options
    assert repr(cut.attention).splitlines()[1].strip() == f"embed_dim={E}, heads=[1, 3] of 4, head_dim={D}"


def test_a_state_of_another_size_does_not_load():
    _, cut = both(filled(Alone()), {"attention": [1, 3]})
    with pytest.raises(RuntimeError, match="size mismatch for in_proj_weight"):
        PrunedAttention(E, 3, D).load_state_dict(cut.attention.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modes_gradients_and_dtypes_stay(dtype: torch.dtype, device: torch.device):
    model = nn.Sequential(encoder_layer()).to(device, dtype)
    model[0].self_attn.eval()
    model[0].self_attn.in_proj_bias.requires_grad_(False)
    model[0].linear2.weight.requires_grad_(False)
    before = {name: (p.requires_grad, p.dtype, p.device) for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    untouched = {name: p for name, p in model.named_parameters() if "norm" in name or name.endswith("2.bias")}
    out_bias, state = model[0].self_attn.out_proj.bias, torch.get_rng_state()
    cut_heads(model, "0.self_attn", KEPT)
    cut_feed_forward(model, "0", UNITS)
    assert {name: (p.requires_grad, p.dtype, p.device) for name, p in model.named_parameters()} == before
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert sum(not training for training in modes.values()) == 2  # the attention and its out projection
    assert all(model.get_parameter(name) is parameter for name, parameter in untouched.items())
    assert model[0].self_attn.out_proj.bias is out_bias
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn
    assert model(torch.ones(1, 2, E, device=device, dtype=dtype)).dtype == dtype


def test_keeping_all_changes_nothing():
    model = nn.Sequential(encoder_layer())
    before = dict(model.named_parameters()), dict(model.named_modules())
    cut_heads(model, "0.self_attn", range(H))
    cut_feed_forward(model, "0", list(reversed(range(FF))))
    assert all(one is before[0][name] for name, one in model.named_parameters())
    assert all(one is before[1][name] for name, one in model.named_modules())


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 6, "vdim": 10}], ids=str)
def test_head_importance(options: dict[str, Any]):
    model = filled(Alone(**options))
    attention = model.attention
    if options.get("kdim"):
        projections = [attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight]
    else:
        projections = list(attention.in_proj_weight.split(E))
    biases = [] if attention.in_proj_bias is None else list(attention.in_proj_bias.split(E))
    expected = []
    for head in range(H):
        rows = slice(head * D, (head + 1) * D)
        parts = [p[rows].flatten() for p in (*projections, *biases)] + [attention.out_proj.weight[:, rows].flatten()]
        expected.append(torch.linalg.vector_norm(torch.cat(parts)).item())
    score = head_importance(attention)
    assert score.dtype == torch.float64
    assert not score.requires_grad
    assert score.tolist() == pytest.approx(expected, rel=1e-12)
    cut_heads(model, "attention", [1, 3])
    assert head_importance(model.attention).tolist() == pytest.approx([expected[1], expected[3]], rel=1e-12)


def test_importance_of_numbers_that_can_be_worked_out_by_hand():
    model = Alone().float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
        model.attention.out_proj.weight[:, :D] = 2.0
    per_head = 3 * D * E + 3 * D
    expected = [math.sqrt(per_head + 4 * D * E)] + 3 * [math.sqrt(per_head + D * E)]
    assert head_importance(model.attention).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_unit_importance(bias: bool):
    layer = filled(encoder_layer(bias=bias))
    expected = []
    for unit in range(FF):
        parts = [layer.linear1.weight[unit], layer.linear2.weight[:, unit]]
        parts += [layer.linear1.bias[unit : unit + 1]] if bias else []
        expected.append(torch.linalg.vector_norm(torch.cat(parts)).item())
    assert unit_importance(layer).dtype == torch.float64
    assert unit_importance(layer).tolist() == pytest.approx(expected, rel=1e-12)
    cut_feed_forward(layer, "", UNITS)
    assert unit_importance(layer).tolist() == pytest.approx([expected[unit] for unit in UNITS], rel=1e-12)


class Mine(nn.MultiheadAttention):
    pass


class MyLayer(nn.TransformerEncoderLayer):
    pass


def halves(x: Tensor) -> Tensor:
    return torch.cat([F.glu(x), F.glu(x)], -1)


def hooked() -> nn.Module:
    model = Alone()
    model.attention.register_forward_hook(lambda *_: None)
    return model


def masked_by_torch(module: nn.Module, attribute: str, model: nn.Module) -> nn.Module:
    prune.l1_unstructured(module, attribute, amount=0.5)
    return model


def replaced(model: nn.Module, name: str, by: Any) -> nn.Module:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, by)
    return model


def tied_attentions() -> nn.Module:
    model = nn.ModuleDict({"one": Alone(), "two": Alone()})
    model["two"].attention.in_proj_weight = model["one"].attention.in_proj_weight
    return model


def tied_units() -> nn.Module:
    model = nn.ModuleList([encoder_layer(), encoder_layer()])
    model[1].linear1.weight = model[0].linear1.weight
    return model


def twice(module: nn.Module) -> nn.Module:
    return nn.ModuleList([module, module])


def tied(attribute: str, one: str, two: str) -> str:
    return f"{attribute} is shared: it stands under {one!r} and {two!r}"


def weight_normed() -> nn.Module:
    layer = encoder_layer()
    parametrizations.weight_norm(layer.linear2)
    return layer


SUBCLASS = "is not torch's own class but a subclass, whose forward may do other things"
REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "add_bias_kv": (
        lambda: Alone(add_bias_kv=True),
        {"attention": "it adds keys and values of its own (add_bias_kv)"},
    ),
    "add_zero_attn": (
        lambda: Alone(add_zero_attn=True),
        {"attention": "it adds a key and a value of zeros (add_zero_attn)"},
    ),
    "root": (
        lambda: nn.MultiheadAttention(E, H),
        {"": "it is the whole model, in whose place nothing can be put; put it into another module"},
    ),
    "one head": (lambda: nn.Sequential(nn.MultiheadAttention(E, 1)), {"0": "it has one head, and one has to stay"}),
    "one unit": (
        lambda: nn.TransformerEncoderLayer(E, H, 1),
        {"": "it has one unit, and one has to stay"},
    ),
    "subclass": (lambda: replaced(Alone(), "attention", Mine(E, H)), {"attention": f"Mine {SUBCLASS}"}),
    "subclassed layer": (lambda: nn.Sequential(MyLayer(E, H, FF)), {"0": f"MyLayer {SUBCLASS}"}),
    "hooks": (hooked, {"attention": "it has hooks, which would be lost with it; remove them"}),
    "mask": (
        lambda: (lambda m: masked_by_torch(m.attention, "in_proj_weight", m))(Alone()),
        {
            "attention": "it has in_proj_weight_mask, in_proj_weight_orig, which its class has not "
            "(a mask, or a parametrization)"
        },
    ),
    "masked units": (
        lambda: (lambda m: masked_by_torch(m.linear1, "weight", m))(encoder_layer()),
        {"": "of its linear1: it has weight_mask, weight_orig, which its class has not (a mask, or a parametrization)"},
    ),
    "weight norm": (weight_normed, {"": "its linear2 is a ParametrizedLinear"}),
    "one bias": (
        lambda: replaced(Alone(), "attention.out_proj.bias", None),
        {"attention": "only one of in_proj_bias and out_proj.bias is there"},
    ),
    "another projection": (
        lambda: replaced(Alone(), "attention.out_proj", nn.Bilinear(E, E, E)),
        {"attention": "its out_proj is a Bilinear"},
    ),
    "another dropout": (
        lambda: replaced(encoder_layer(), "dropout", nn.Softmax(-1)),
        {"": "its dropout is a Softmax"},
    ),
    "replaced forward": (
        lambda: replaced(Alone(), "attention.forward", lambda *_: None),
        {"attention": "its forward was replaced"},
    ),
    "replaced forward of a layer": (
        lambda: replaced(encoder_layer(), "_ff_block", lambda x: x),
        {"": "its forward was replaced"},
    ),
    "activation over units": (
        lambda: encoder_layer(activation=halves),
        {"": "of its activation 'halves' it is not known that it keeps units apart; use one of torch's"},
    ),
    "activation module": (
        lambda: encoder_layer(activation=nn.Softmax(-1)),
        {"": "of its activation 'Softmax' it is not known that it keeps units apart; use one of torch's"},
    ),
    "tied attentions": (
        tied_attentions,
        {
            f"{name}.attention": tied("its in_proj_weight", *(f"{n}.attention.in_proj_weight" for n in ("one", "two")))
            for name in ("one", "two")
        },
    ),
    "tied units": (
        tied_units,
        {name: tied("its linear1.weight", "0.linear1.weight", "1.linear1.weight") for name in "01"},
    ),
    "an attention twice": (
        lambda: twice(nn.MultiheadAttention(E, H)),
        {"0": tied("it", "0", "1")},
    ),
    "a layer twice": (
        lambda: twice(encoder_layer()),
        {"0": tied("it", "0", "1"), "0.self_attn": tied("it", "0.self_attn", "1.self_attn")},
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_cut_is_named(case: str):
    make, reasons = REFUSED[case]
    model = make()
    assert refused(model) == reasons
    assert not set(reasons) & ({*attentions(model)} | {*feed_forwards(model)} - {""})
    name, reason = next(iter(reasons.items()))
    is_layer = isinstance(model.get_submodule(name), nn.TransformerEncoderLayer)
    kind, cut = ("transformer layer", cut_feed_forward) if is_layer else ("attention", cut_heads)
    with pytest.raises(InputError) as caught:
        cut(model, name, [0])
    assert str(caught.value) == f"{name!r} cannot be cut: {reason}; cut another {kind}, or leave it as it is"


def test_parts_that_are_not_touched_may_be_shared():
    model = nn.ModuleList([encoder_layer(), encoder_layer()])
    model[1].self_attn = model[0].self_attn
    model[1].norm1 = model[0].norm1
    assert list(feed_forwards(model)) == ["0", "1"]
    assert refused(model) == {"0.self_attn": tied("it", "0.self_attn", "1.self_attn")}


@pytest.mark.parametrize(
    "activation",
    [F.silu, nn.GELU("tanh"), functools.partial(F.gelu, approximate="tanh")],
    ids=["function", "module", "partial"],
)
def test_known_activations_are_cut(activation: Any):
    masked, cut = both(filled(encoder_layer(activation=activation)), {}, {"": UNITS})
    torch.testing.assert_close(cut(drawn(N, L, E)), masked(drawn(N, L, E)), **EXACT)


PLACES = "one of them at least"
BAD_PLACES = [[], [4], [-1], [0, 0], [True], [1.0], ["0"], [None]]


@pytest.mark.parametrize("kept", BAD_PLACES, ids=str)
def test_bad_places_are_refused_and_nothing_is_changed(kept: list[Any]):
    model = nn.Sequential(nn.TransformerEncoderLayer(E, H, 4))
    state = {name: id(parameter) for name, parameter in model.named_parameters()}
    with pytest.raises(InputError) as caught:
        cut_heads(model, "0.self_attn", kept)
    expected = f"kept is {kept!r}; give different places from 0 to 3 of the heads of '0.self_attn', {PLACES}"
    assert str(caught.value) == expected
    with pytest.raises(InputError) as caught:
        cut_feed_forward(model, "0", kept)
    expected = f"kept is {kept!r}; give different places from 0 to 3 of the feed-forward units of '0', {PLACES}"
    assert str(caught.value) == expected
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == state


def test_unknown_names():
    model = nn.Sequential(encoder_layer())
    with pytest.raises(UnknownNameError) as caught:
        cut_heads(model, "0.self_atn", [0])
    assert str(caught.value) == "unknown attention '0.self_atn'; did you mean '0.self_attn'? known: 0.self_attn"
    with pytest.raises(UnknownNameError) as caught:
        cut_feed_forward(model, "0.self_attn", [0])
    assert str(caught.value) == "unknown transformer layer '0.self_attn'; known: 0"
    with pytest.raises(UnknownNameError) as caught:
        cut_heads(nn.Linear(1, 1), "attention", [0])
    assert str(caught.value) == "unknown attention 'attention'; known: none"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed_dim": 0}, "embed_dim of an attention is 0; give a whole number from 1"),
        ({"n_heads": 0}, "n_heads of an attention is 0; give a whole number from 1"),
        ({"head_dim": 2.0}, "head_dim of an attention is 2.0; give a whole number from 1"),
        ({"kdim": True}, "kdim of an attention is True; give a whole number from 1"),
        ({"vdim": -1}, "vdim of an attention is -1; give a whole number from 1"),
        ({"dense_heads": "4"}, "dense_heads of an attention is '4'; give a whole number from 1"),
        ({"dropout": 1.5}, "dropout of an attention is 1.5; give a probability from 0 to 1"),
        ({"dropout": None}, "dropout of an attention is None; give a probability from 0 to 1"),
        *(
            (
                {"heads": heads},
                f"heads of an attention are {heads!r}; give 2 different places (n_heads) in ascending order, "
                "from 0 to 2 (dense_heads)",
            )
            for heads in ([0], [1, 0], [1, 1], [1, 3], 3, ["a", "b"], [0.0, 1])
        ),
    ],
)
def test_bad_options(change: dict[str, Any], message: str):
    with pytest.raises(InputError) as caught:
        PrunedAttention(**{"embed_dim": E, "n_heads": 2, "head_dim": D, "dense_heads": 3, **change})
    assert str(caught.value) == message


def nested(*lengths: int) -> Tensor:
    return torch.nested.nested_tensor([torch.ones(length, E) for length in lengths])


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (lambda: (torch.ones(2, 3, 4, E),) * 3, {}, "query, key and value have 4, 4 and 4 dimensions"),
        (lambda: (torch.ones(3, E), torch.ones(3, 1, E), torch.ones(3, 1, E)), {}, "have 2, 3 and 3 dimensions"),
        (lambda: (torch.ones(3, 2, E),) * 3, {"is_causal": True}, "is_causal is given without attn_mask"),
        (
            lambda: (torch.ones(2, 3, E),) * 3,
            {"attn_mask": torch.zeros(2, 3, 3)},
            r"attn_mask has 2 planes; give one for each of 2 sequences and 3 heads \(6\), or for all 4 heads that "
            r"there were \(8\)",
        ),
        (
            lambda: (torch.ones(2, 3, E),) * 3,
            {"attn_mask": torch.zeros(3, 3, dtype=torch.int64)},
            "is torch.int64; give bool",
        ),
        (lambda: (nested(2, 3),) * 3, {"attn_mask": torch.zeros(3, 3)}, "query, key or value is nested"),
        (lambda: (nested(2, 3), nested(2, 3), nested(2, 3)), {}, "query, key or value is nested"),
    ],
)
def test_bad_calls(inputs: Callable[[], tuple[Tensor, ...]], options: dict[str, Any], message: str):
    attention = PrunedAttention(E, 3, D, batch_first=True, dense_heads=4)
    with pytest.raises(InputError, match=message):
        attention(*inputs(), **options)


def test_nested_tensors_in_self_attention():
    attention = PrunedAttention(E, 3, D, batch_first=True)
    x = nested(2, 4)
    result, weights = attention(x, x, x)
    assert [tuple(row.shape) for row in result.unbind()] == [(2, E), (4, E)]
    for row, sequence in zip(result.unbind(), x.unbind(), strict=True):
        torch.testing.assert_close(row, attention(sequence, sequence, sequence)[0])
    assert weights[0, :, 2:].tolist() == [[0.0, 0.0]] * 4


def test_flops_are_affine_and_those_of_the_closed_form():
    """Two FLOPs a multiply-add: four projections of every head, scores and sums over keys, two feed-forward layers."""
    costs = {}
    for n_heads, n_units in itertools.product(range(1, H + 1), (1, 4, 7, FF)):
        model = nn.TransformerEncoder(encoder_layer(norm_first=True), 1, enable_nested_tensor=False)
        cut_heads(model, "layers.0.self_attn", range(n_heads))
        cut_feed_forward(model, "layers.0", range(n_units))
        costs[n_heads, n_units] = count_cost(model, torch.zeros(N, L, E))
        projections = 2 * N * L * 4 * E * n_heads * D
        attention = 2 * N * n_heads * 2 * L * L * D
        feed_forward = 2 * N * L * 2 * E * n_units
        assert costs[n_heads, n_units].forward_flops == projections + attention + feed_forward
        weights = 4 * E * n_heads * D + 3 * n_heads * D + 2 * E * n_units + n_units
        assert costs[n_heads, n_units].parameters == weights + 2 * E + 4 * E  # biases that stay, two layer norms
    # 24 wide, 3 sequences of 5: by hand, 4 heads of 6 and 10 units are 69,120 + 7,200 + 14,400.
    assert costs[H, FF].forward_flops == 90_720
    steps = {sizes: cost.step_flops for sizes, cost in costs.items()}
    per_head, per_unit = steps[2, 1] - steps[1, 1], steps[1, 4] - steps[1, 1]
    for (n_heads, n_units), flops in steps.items():
        assert flops == steps[1, 1] + (n_heads - 1) * per_head + (n_units - 1) * per_unit // 3
    # Backward: twice the products with weights; of attention in one kernel, which makes its scores again, 5 to 2.
    assert per_head == 3 * 2 * N * L * 4 * E * D + (2 + 5) * 2 * N * L * L * D
    assert per_unit == 3 * 3 * 2 * N * L * 2 * E


class Mixed(nn.Module):
    """An attention between layers that surgery can change."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(E, E), nn.Linear(E, 6), nn.Linear(6, 2)
        self.attention = nn.MultiheadAttention(E, H)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        attended, _ = self.attention(y, y, y, need_weights=False)
        return self.three(torch.relu(self.two(attended)))


def test_surgery_goes_on_around_a_pruned_attention():
    masked, cut = both(filled(Mixed()), {"attention": KEPT})
    x = drawn(L, N, E)
    operations = [node.name for node in fx.symbolic_trace(cut).graph.nodes if node.op == "call_function"]
    assert "_attend" in operations  # one operation, however it branches
    surgeon = Surgeon(cut, x)
    groups = {group.name: group.refusal for group in surgeon.groups}
    assert groups["two"] is None
    assert "'_attend'" in groups["one"]
    surgeon.widen("two", 9, generator=generator())
    torch.testing.assert_close(cut(x), masked(x), **EXACT)
    assert cut.two.out_features == 9
