"""Evaluation with memory: equal to cutting and running each configuration, with far fewer operations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pruning_networks import drawn, network
from surgery_networks import ALL, TASKS
from trimtab.errors import InputError
from trimtab.pruning.evaluation import CachedEvaluator
from trimtab.pruning.network import PrunableNetwork
from trimtab.pruning.scores import score_sum
from trimtab.pruning.validation import Validation


def validation(net: PrunableNetwork, inputs: object, targets: object, batch_size: int = 256) -> Validation:
    return Validation((inputs, targets), net.model, len(net.inputs), batch_size=batch_size)


@pytest.mark.parametrize("memory", [1 << 30, 20_000])  # bytes: everything fits, or nearly nothing
@pytest.mark.parametrize("name", [*ALL, *TASKS, "encoder"])
def test_outputs_are_those_of_the_cut_network(name: str, memory: int) -> None:
    net, inputs = network(name)
    targets = torch.zeros(len(inputs), dtype=torch.long)
    evaluator = CachedEvaluator(net, validation(net, inputs, targets, 3), memory=memory)
    rng = np.random.default_rng(2)
    for _ in range(25):
        configuration = drawn(net, rng)
        model = net.cut(configuration)
        found, expected = evaluator.outputs(configuration), model(inputs)
        assert (found - expected).abs().max() < 1e-10, configuration
        right = (expected.argmax(-1) == targets).double().mean() if expected.shape[-1] > 1 else None
        assert right is None or evaluator.score(configuration) == pytest.approx(float(right))


def test_sizes_that_the_forward_asks_for_are_those_of_the_cut_network() -> None:
    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 8, 3)
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.head(x.reshape(x.shape[0], x.shape[1], -1).mean(2) * x.shape[1])

    net = PrunableNetwork(Asking().double(), torch.randn(2, 1, 5, 5).double(), multiple=1)
    inputs = torch.randn(6, 1, 5, 5).double()
    evaluator = CachedEvaluator(net, validation(net, inputs, torch.zeros(6).long()))
    for width in net.parts[0].widths:
        assert (evaluator.outputs((width,)) - net.cut((width,))(inputs)).abs().max() < 1e-10


def test_what_lies_before_the_first_difference_is_not_run_again() -> None:
    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 24), nn.ReLU(),
                          nn.Linear(24, 3))  # fmt: skip
    net = PrunableNetwork(model, torch.zeros(1, 1, 8, 8))
    evaluator = CachedEvaluator(net, validation(net, torch.randn(10, 1, 8, 8), torch.zeros(10).long()))
    for configuration in itertools.product((8, 16), (8, 16, 24)):
        evaluator.score(configuration)
    # Convolution, ReLU and flatten once; dense and ReLU once for each width of the convolution; the end each time.
    assert evaluator.n_operations == 3 + 2 * 2 + 6
    evaluator.score((16, 8))
    assert evaluator.n_operations == 3 + 2 * 2 + 6


def test_memory_is_bounded() -> None:
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    net = PrunableNetwork(model, torch.zeros(1, 4))
    evaluator = CachedEvaluator(net, validation(net, torch.randn(100, 4), torch.zeros(100).long()), memory=120_000)
    for configuration in itertools.product(net.parts[0].widths, net.parts[1].widths):
        evaluator.score(configuration)
    assert 0 < evaluator.bytes_kept <= 120_000


def test_scores() -> None:
    assert score_sum(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1])) == (1.0, 2)
    assert score_sum(torch.tensor([[2.0], [-1.0], [3.0]]), torch.tensor([1, 0, 0])) == (2.0, 3)
    assert score_sum(torch.tensor([2.0, -1.0]), torch.tensor([1, 1])) == (1.0, 2)
    assert score_sum(torch.zeros(2, 3, 5), torch.zeros(2, 3).long()) == (6.0, 6)
    assert score_sum(torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, 4.0])) == (-4.0, 2)


def test_bad_input_is_one_error() -> None:
    net, inputs = network("mlp")
    long = torch.zeros(7).long()
    for given, text in [
        ((inputs, [0] * 7), "validation has Tensor, list; expected"),
        ((inputs, long[:3]), r"validation has \[3, 7\] samples"),
        (((inputs, inputs), long), "validation has 2 inputs; the example inputs are 1"),
        ((inputs, torch.zeros(7)), r"the network puts out \(7, 3\) and the targets are torch.float32 \(7,\)"),
        ((inputs, torch.zeros(7, 2).long()), r"targets are torch.int64 \(7, 2\)"),
        ((inputs[:, :2], long), "the network fails on the validation inputs: RuntimeError"),
    ]:
        with pytest.raises(InputError, match=text):
            validation(net, *given)
