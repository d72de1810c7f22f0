"""Tasks of the tuning study: they begin alike, and every knob of the study moves on every one of them."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from test_task_reviews import write_imdb
from test_task_sentences import write_sst2
from test_task_tabular import passengers, write_csv
from test_task_vision import write_cifar10
from torch import nn

from trimtab import Controller, ControlSpec, registry
from trimtab.agents.base import Timing
from trimtab.agents.scripted import Replay
from trimtab.safety import Safety
from trimtab.surgery import Surgeon
from trimtab.tasks.models import BiLSTMDense, conv_dense
from trimtab.training.loop import TrainingLoop

REAL = os.environ.get("TRIMTAB_DATA")
NAMES = ["cifar10-tuning", "digits-tuning", "imdb-tuning", "sst2-tuning", "titanic-tuning"]
KNOBS = ("lr", "weight_decay", "batch_size", "dropout", "layers", "units", "optimizer")
START = {
    "lr": 1e-3, "weight_decay": 1e-6, "batch_size": 32, "dropout": 0.5, "layers": 2, "units": 64, "optimizer": 1,
}  # fmt: skip
LAYERS = (nn.Conv2d, nn.Linear, nn.LSTM)


@pytest.fixture
def data_dir(tmp_path):
    """Every set, in small."""
    write_cifar10(tmp_path / "cifar10", 800, 200)
    write_imdb(tmp_path / "imdb")
    write_sst2(tmp_path / "sst2")
    return write_csv(tmp_path, passengers(300))


def first_units(model: nn.Module) -> int:
    first = next(module for module in model.modules() if isinstance(module, LAYERS))
    return first.hidden_size if isinstance(first, nn.LSTM) else len(first.weight)


@pytest.mark.usefixtures("unwatched")
@pytest.mark.parametrize("name", NAMES)
def test_every_knob_moves_on_every_task(name, data_dir):
    task = registry.load("task", name)("smoke").replace(total_steps=100)
    loop = TrainingLoop(task, task.load(data_dir), seed=0)
    rows = [
        (3e-3, 1e-4, 64, 0.2, 1, 64, 2),
        (1e-3, 1e-3, 16, 0.7, 4, 64, 1),
        (1e-3, 1e-3, 16, 0.7, 4, 32, 1),
        (1e-3, 1e-3, 16, 0.1, 1, 256, 1),
        (1e-3, 1e-3, 32, 0.5, 2, 64, 0),
    ]
    agent = Replay(rows, Timing(every=1))
    controller = Controller(
        agent,
        optimizer=loop.optimizer,
        model=loop.model,
        loader=loop,
        total_steps=task.total_steps,
        spec=ControlSpec.for_agent(agent, knobs=KNOBS),
        safety=Safety(rollback=False),
    )
    assert controller.read_knobs() == START
    output_and_head = sum(isinstance(module, LAYERS) for module in loop.model.modules()) - 2
    for row in rows:
        n_before = len(controller.decisions)
        # The budget is one of FLOPs: a cheap network decides less often.
        while len(controller.decisions) == n_before:
            assert not loop.is_over()
            controller.step(loop.step())
        found = controller.read_knobs()
        asked = dict(zip(KNOBS, row, strict=True))
        if row[-1] == 0:  # a switch to SGD converts the rate
            found.pop("lr")
            asked.pop("lr")
        assert found == pytest.approx(asked)
        assert sum(isinstance(module, LAYERS) for module in loop.model.modules()) - output_and_head == row[4]
        assert first_units(loop.model) == row[5]
        assert {module.p for module in loop.model.modules() if isinstance(module, nn.Dropout)} == {row[3]}
        assert type(loop.optimizer).__name__ == ("SGD", "Adam", "AdamW")[row[6]]
        assert math.isfinite(loop.step())
    assert loop.batch_size == 32


@pytest.mark.parametrize("name", NAMES)
def test_each_begins_as_the_write_up_says(name):
    smoke, small, full = (registry.load("task", name)(scale) for scale in ("smoke", "small", "full"))
    for task in (smoke, small, full):
        assert (task.lr, task.batch_size, task.optimizer, task.weight_decay) == (1e-3, 32, "adam", 1e-6)
    assert (smoke.total_steps, small.total_steps // small.eval_every) == (20, 20)
    assert full.total_steps == 50 * full.eval_every  # epochs
    samples = {"cifar10": 45_000, "digits": 1_077, "imdb": 22_414, "sst2": 60_615, "titanic": 535}[full.dataset]
    assert full.eval_every == samples // 32


def test_the_convolutional_network_has_the_layers_of_the_write_up():
    model = conv_dense(3, 32, 10)
    kinds = [type(module).__name__ for module in model.modules() if not isinstance(module, nn.Sequential)]
    assert [kind for kind in kinds if kind not in ("ReLU", "Dropout")] == [
        "Conv2d", "MaxPool2d", "Conv2d", "MaxPool2d", "Flatten", "Linear", "Linear",
    ]  # fmt: skip
    assert sum(p.numel() for p in model.parameters()) == (27 + 1) * 64 + (576 + 1) * 64 + (4096 + 1) * 64 + 65 * 10
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert conv_dense(3, 32, 10, stride=2)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert Surgeon(model, torch.zeros(2, 3, 32, 32)).hidden == ("0", "3")


def test_the_recurrent_network_reads_the_mean_of_both_directions():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BiLSTMDense(20, 6, 2, units=5).eval()
    tokens = torch.tensor([[3, 4, 4, 0]])
    outputs, _ = model.lstm(model.tokens(tokens[:, :3]))
    expected = model.head(torch.relu(model.dense(outputs.mean(1))))
    torch.testing.assert_close(model(tokens), expected)
    assert Surgeon(model, tokens).hidden == ("lstm", "dense")
    beside = torch.tensor([[3, 4, 4, 0, 0], [5, 6, 7, 8, 9]])  # padding changes nothing, and neither does company
    torch.testing.assert_close(model(beside)[:1], expected)


@pytest.mark.skipif(REAL is None, reason="TRIMTAB_DATA names no folder with the real sets")
@pytest.mark.parametrize(
    ("name", "sizes", "parameters"),
    [
        ("cifar10-tuning", (6_000, 400, 1_000), 104_970),
        ("imdb-tuning", (6_000, 400, 1_000), 211_458),
        ("sst2-tuning", (6_000, 600, 872), 211_458),
        ("titanic-tuning", (535, 178, 178), 5_506),
    ],
)
def test_real_sets_at_small_scale(name, sizes, parameters):
    task = registry.load("task", name)("small")
    data = task.load(Path(REAL))
    assert tuple(len(part.targets) for part in (data.train, data.val, data.test)) == sizes
    with torch.random.fork_rng():
        assert sum(p.numel() for p in task.make_model(data).parameters()) == parameters
