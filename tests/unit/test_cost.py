"""Costs against closed forms worked out by hand; two FLOPs are one multiply-add."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trimtab.cost import count_cost
from trimtab.errors import InputError
from trimtab.tasks.models import GPT, BiLSTM, GPTConfig

B, T = 3, 5


def test_linear():
    model = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 2))
    cost = count_cost(model, torch.zeros(B, 4))
    first, second = 2 * B * 4 * 7, 2 * B * 7 * 2
    assert cost.forward_flops == first + second
    assert cost.step_flops == 2 * first + 3 * second  # nobody needs the gradient of the network's input
    assert cost.parameters == 4 * 7 + 7 + 7 * 2 + 2
    assert cost.bytes == 4 * cost.parameters


def test_frozen_parameters_have_no_backward():
    model = nn.Linear(4, 7, bias=False).requires_grad_(False)
    cost = count_cost(model, torch.zeros(B, 4))
    assert cost.step_flops == cost.forward_flops == 2 * B * 4 * 7


def test_conv2d():
    model = nn.Sequential(nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, groups=6))
    cost = count_cost(model, torch.zeros(B, 2, 8, 8))
    first = 2 * B * 4 * 4 * 6 * 2 * 9
    depthwise = 2 * B * 2 * 2 * 6 * 1 * 9
    assert cost.forward_flops == first + depthwise
    assert cost.bytes == 4 * (cost.parameters + 12) + 8  # running mean and variance, and an int64 count


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("directions", [1, 2])
def test_lstm(layers, directions):
    n_inputs, units = 8, 16
    model = nn.LSTM(n_inputs, units, layers, bidirectional=directions == 2, batch_first=True)
    cost = count_cost(model, torch.zeros(B, T, n_inputs))
    widths = [n_inputs] + [directions * units] * (layers - 1)
    forward = sum(2 * B * T * directions * 4 * units * (width + units) for width in widths)
    assert cost.forward_flops == forward
    assert cost.step_flops == 3 * forward


def test_lstm_taken_apart_leaves_out_gradients_that_nobody_needs():
    model = nn.LSTM(8, 16, batch_first=True, dtype=torch.float64)
    cost = count_cost(model, torch.zeros(B, T, 8, dtype=torch.float64))
    inputs, states = 2 * B * T * 64 * 8, 2 * B * T * 64 * 16
    assert cost.forward_flops == inputs + states
    assert cost.step_flops == 2 * inputs + 2 * states + 2 * B * (T - 1) * 64 * 16


def test_packed_sentences_count_their_tokens():
    model = BiLSTM(20, 8, 16, 2)
    tokens = torch.tensor([[3, 4, 5, 6], [3, 4, 0, 0], [3, 0, 0, 0]])
    cost = count_cost(model, tokens)
    assert cost.forward_flops == 2 * 7 * 2 * 64 * (8 + 16) + 2 * 3 * 32 * 2


def test_gru():
    cost = count_cost(nn.GRU(8, 16, batch_first=True), torch.zeros(B, T, 8))
    assert cost.forward_flops == 2 * B * T * 48 * (8 + 16)


def test_attention():
    width, heads, layers = 16, 2, 2
    model = GPT(GPTConfig(11, T, layers, heads, width))
    cost = count_cost(model, torch.zeros(B, T, dtype=torch.int64))
    block = 2 * B * T * width * (3 * width + width + 8 * width)  # qkv, projection, feed-forward
    attention = 2 * 2 * B * heads * T * T * (width // heads)  # scores and their weighted sum; causality not used
    assert cost.forward_flops == layers * (block + attention) + 2 * B * T * width * 11


def test_transformer_encoder_is_not_zero():
    layer = nn.TransformerEncoderLayer(64, 2, dim_feedforward=128, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    cost = count_cost(model, torch.zeros(1, 10, 64))
    products = 10 * 64 * (3 * 64 + 64 + 2 * 128)
    assert cost.forward_flops == 2 * 2 * (products + 2 * 10 * 10 * 64)


def test_leaves_the_network_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    model[2].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    count_cost(model, torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [module.training for module in model] == [True, True, False]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_refusals():
    with pytest.raises(InputError, match="example_inputs is str; give a tensor, or a tuple of the forward's"):
        count_cost(nn.Linear(2, 2), "x")
    with pytest.raises(InputError, match=r"Linear fails on the example inputs: RuntimeError: .* give inputs that the"):
        count_cost(nn.Linear(2, 2), torch.zeros(1, 3))
