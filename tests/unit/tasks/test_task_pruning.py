"""Tasks of the pruning study: sizes and multiply-adds in closed form, what surgery may change, one logit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from test_task_reviews import write_imdb
from test_task_vision import write_cifar10
from torch import nn

from trimtab import registry
from trimtab.cost import count_cost
from trimtab.surgery import Surgeon
from trimtab.tasks.models import LSTMDense, two_convolutions
from trimtab.training.loop import TrainingLoop

REAL = os.environ.get("TRIMTAB_DATA")
NAMES = ["cifar10-pruning", "digits-pruning", "imdb-pruning"]
OUTPUT = "they are an output of the network, whose size is the task's"


@pytest.fixture
def data_dir(tmp_path):
    """Every set, in small."""
    write_cifar10(tmp_path / "cifar10", 800, 200)
    write_imdb(tmp_path / "imdb")
    return tmp_path


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def draw(make) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def test_the_cnn_has_the_size_and_the_multiply_adds_that_were_measured():
    model = two_convolutions(3, 32, 10, (32, 64, 512))
    assert count(model) == 6_447_562
    assert count(model) == (27 + 1) * 32 + (288 + 1) * 64 + (64 * 14 * 14 + 1) * 512 + 513 * 10
    macs = [30**2 * 27 * 32, 28**2 * 288 * 64, 64 * 14 * 14 * 512, 512 * 10]
    assert sum(macs) == 21_655_936
    assert count_cost(model, torch.zeros(1, 3, 32, 32)).forward_flops == 2 * 21_655_936
    assert [type(layer).__name__ for layer in model] == [
        "Conv2d", "ReLU", "Conv2d", "ReLU", "MaxPool2d", "Flatten", "Linear", "ReLU", "Linear",
    ]  # fmt: skip


def test_the_lstm_has_the_size_and_the_multiply_adds_that_were_measured():
    model = LSTMDense(10_002)
    assert count(model) == 10_002 * 64 + 4 * 128 * (64 + 128 + 2) + (128 + 1) * 64 + 65
    tokens = torch.ones(1, 200, dtype=torch.int64)
    assert 200 * 4 * 128 * (64 + 128) + 128 * 64 + 64 == 19_669_056
    assert count_cost(model, tokens).forward_flops == 2 * 19_669_056
    tokens[0, 50:] = 0  # padding costs as much as words
    assert count_cost(model, tokens).forward_flops == 2 * 19_669_056


def test_the_lstm_reads_the_state_behind_the_last_word():
    model = draw(lambda: LSTMDense(20, 6, units=5, dense=4)).eval()
    tokens = torch.tensor([[3, 4, 4, 0, 0], [5, 6, 7, 8, 9], [2, 0, 0, 0, 0]])
    for row, length in zip(tokens, (3, 5, 1), strict=True):
        _, (state, _) = model.lstm(model.tokens(row[:length].unsqueeze(0)))
        expected = model.head(torch.relu(model.dense(state[0])))
        torch.testing.assert_close(model(tokens)[row[0] == tokens[:, 0]], expected)
        torch.testing.assert_close(model(row[:length].unsqueeze(0)), expected)


@pytest.mark.parametrize(
    ("make", "inputs", "units"),
    [
        (
            lambda: two_convolutions(3, 32, 10, (32, 64, 512)),
            torch.zeros(1, 3, 32, 32),
            {"0": 32, "2": 64, "6": 512},
        ),
        (lambda: two_convolutions(1, 8, 10, (16, 32, 64)), torch.zeros(1, 1, 8, 8), {"0": 16, "2": 32, "6": 64}),
        (lambda: LSTMDense(20), torch.ones(2, 9, dtype=torch.int64), {"tokens": 64, "lstm": 128, "dense": 64}),
    ],
)
def test_surgery_may_change_all_but_the_outputs(make, inputs, units):
    *hidden, output = Surgeon(make(), inputs).groups
    assert {group.name: group.size for group in hidden} == units
    assert [group.refusal for group in (*hidden, output)] == [None, None, None, OUTPUT]


@pytest.mark.parametrize("name", NAMES)
def test_each_has_the_settings_of_the_write_up(name):
    smoke, small, full = (registry.load("task", name)(scale) for scale in ("smoke", "small", "full"))
    for task in (smoke, small, full):
        assert (task.lr, task.optimizer, task.weight_decay, task.name) == (1e-3, "adam", 1e-4, name)
    samples = {"cifar10": 45_000, "digits": 1_077, "imdb": 22_414}[full.dataset]
    assert full.batch_size == (32 if full.dataset == "digits" else 128)
    assert (full.eval_every, full.total_steps) == (samples // full.batch_size, 50 * full.eval_every)
    if full.dataset == "digits":
        assert (smoke.total_steps, small.total_steps) == (660, 660)
    else:
        epochs, n_train = {"cifar10": (10, 6_000), "imdb": (5, 22_414)}[full.dataset]
        assert (smoke.total_steps, small.batch_size, small.total_steps) == (20, 64, epochs * (n_train // 64))


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_taken_and_every_weight_moves(name, data_dir):
    task = registry.load("task", name)("smoke")
    loop = TrainingLoop(task, task.load(data_dir), seed=0)
    before = {key: value.clone() for key, value in loop.model.named_parameters()}
    loss = loop.step().item()
    assert loss == pytest.approx({"imdb": 0.693}.get(task.dataset, 2.303), abs=0.1)  # the log of the classes' number
    assert [key for key, value in loop.model.named_parameters() if torch.equal(value, before[key])] == []


def test_the_digits_are_learned_in_seconds():
    task = registry.load("task", "digits-pruning")("smoke")
    data = task.load(None)
    assert data.train.inputs.shape == (1077, 1, 8, 8)
    loop = TrainingLoop(task, data, seed=0)
    assert count(loop.model) == (9 + 1) * 16 + (144 + 1) * 32 + (128 + 1) * 64 + 65 * 10
    while not loop.is_over():
        loop.step()
    assert loop.evaluate("val")["accuracy"] > 0.96


def test_the_lstm_learns_what_tells_reviews_apart_with_one_logit(data_dir):
    task = registry.load("task", "imdb-pruning")("smoke")
    loop = TrainingLoop(task, task.load(data_dir), seed=0)
    for _ in range(40):  # "Bad, ..." and "Good, ..."
        loop.step()
    measured = loop.evaluate("val")
    assert (measured["accuracy"], measured["f1"], measured["n_samples"]) == (1.0, 1.0, 80)
    assert measured["loss"] < 0.1


@pytest.mark.skipif(REAL is None, reason="TRIMTAB_DATA names no folder with the real sets")
@pytest.mark.parametrize("name", ["cifar10-pruning", "imdb-pruning"])
def test_a_step_on_the_real_sets(name):
    task = registry.load("task", name)("smoke")
    loop = TrainingLoop(task, task.load(Path(REAL)), seed=0)
    assert loop.step().item() == pytest.approx({"imdb": 0.693}.get(task.dataset, 2.303), abs=0.1)


@pytest.mark.slow
@pytest.mark.skipif(REAL is None, reason="TRIMTAB_DATA names no folder with the real sets")
@pytest.mark.parametrize(
    ("name", "sizes", "n_common"),  # two reviews that go on differently begin with the same 64 tokens
    [("cifar10-pruning", (6_000, 1_000, 10_000), 0), ("imdb-pruning", (22_414, 1_000, 5_000), 1)],
)
def test_real_sets_at_small_scale(name, sizes, n_common):
    data = registry.load("task", name)("small").load(Path(REAL))
    assert tuple(len(part.targets) for part in (data.train, data.val, data.test)) == sizes
    train, val = ({row.tobytes() for row in part.inputs.numpy()} for part in (data.train, data.val))
    assert len(train & val) == n_common
