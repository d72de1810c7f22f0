"""R runs at once are R runs one after another: same weights, same losses, same measurements."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from trimtab.errors import InputError
from trimtab.gradients import MEASURE_EVERY, GradientProbe
from trimtab.tasks.base import Split
from trimtab.tasks.small import Network, SmallTask
from trimtab.training import batched
from trimtab.training.batched import BatchedTraining
from trimtab.training.loop import TrainingLoop

SETTINGS = {
    "sgd": {"optimizer": "sgd", "momentum": 0.9},
    "plain sgd with decay": {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.01},
    "adam": {"optimizer": "adam"},
    "adam with decay": {"optimizer": "adam", "weight_decay": 0.01},
    "adamw": {"optimizer": "adamw", "betas": (0.8, 0.95), "weight_decay": 0.1},
}


def split(rng: np.random.Generator, n: int, shape: tuple[int, ...], n_classes: int) -> Split:
    inputs = torch.from_numpy(rng.normal(size=(n, *shape)).astype(np.float32))
    if n_classes == 1:
        return Split(inputs, torch.from_numpy(rng.normal(size=n).astype(np.float32)))
    return Split(inputs, torch.from_numpy(rng.integers(n_classes, size=n)))


def make(seed: int, shape: tuple[int, ...], n_outputs: int, network: Network, **settings: object) -> SmallTask:
    rng = np.random.default_rng(seed)
    sizes = {"train": 40 + 7 * seed, "val": 20 + seed, "score": 24, "test": 30 + seed}
    parts = {name: split(rng, n, shape, n_outputs) for name, n in sizes.items()}
    given = {"optimizer": "adam", "momentum": 0.0, "betas": (0.9, 0.999), "weight_decay": 0.0, **settings}
    kind = "regression" if n_outputs == 1 else "classification"
    return SmallTask("test", "test", kind, **parts, n_outputs=n_outputs, network=network, batch_size=8, **given)


MLPS = [
    (5, 3, Network("mlp", (6,), "relu")),
    (9, 4, Network("mlp", (4, 4, 4), "tanh")),
    (3, 1, Network("mlp", (7, 5), "gelu")),
    (9, 2, Network("mlp", (12,), "relu")),
]
LINEAR = [(5, 1, Network("mlp", (), "relu")), (8, 1, Network("mlp", (), "relu"))]
CNNS = [
    (8, 3, Network("cnn", (2, 5), "relu")),
    (8, 5, Network("cnn", (4, 3), "tanh")),
    (8, 5, Network("cnn", (3, 2), "gelu")),
]


ODD = [(6, 3, Network("cnn", (2, 5), "tanh")), (6, 2, Network("cnn", (3, 3), "relu"))]  # 6 -> 3 -> 1


def tasks_of(kind: str, **settings: object) -> list[SmallTask]:
    table = {"mlp": MLPS, "linear": LINEAR, "cnn": CNNS, "odd cnn": ODD}[kind]
    return [
        make(i, (1, size, size) if "cnn" in kind else (size,), n_outputs, network, **settings)
        for i, (size, n_outputs, network) in enumerate(table)
    ]


def loops_of(tasks: list[SmallTask], seeds: list[int], rates: list[float], dtype: torch.dtype) -> list[TrainingLoop]:
    loops = []
    for task, seed, rate in zip(tasks, seeds, rates, strict=True):
        described, data = task.to_task(total_steps=1000)
        loop = TrainingLoop(described.replace(lr=rate), data, seed=seed)
        loop.model.to(dtype)
        for name, part in loop._splits.items():
            is_number = part.targets.is_floating_point()
            loop._splits[name] = Split(part.inputs.to(dtype), part.targets.to(dtype) if is_number else part.targets)
        loop._batches._split = loop._splits["train"]
        loops.append(loop)
    return loops


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kind", ["mlp", "linear", "cnn", "odd cnn"])
def test_hundred_steps_equal_the_loop(kind: str, settings: dict[str, object]) -> None:
    tasks = tasks_of(kind, **settings)
    seeds = [11 + i for i in range(len(tasks))]
    rates = [1e-1, 1e-3, 1e-2, 3e-2][: len(tasks)]
    if kind == "linear":
        rates = [1e-2, 1e-3]  # squared error: above, momentum SGD diverges, and there nothing is equal to anything
    loops = loops_of(tasks, seeds, rates, torch.float64)
    batch = BatchedTraining(tasks, seeds, rates, dtype=torch.float64)
    for run, loop in enumerate(loops):
        for mine, theirs in zip(batch.parameters_of(run), loop.model.parameters(), strict=True):
            assert torch.equal(mine, theirs)
    losses = batch.run(100).losses
    for run, loop in enumerate(loops):
        expected = torch.stack([loop.step() for _ in range(100)])
        torch.testing.assert_close(losses[:, run], expected, rtol=1e-9, atol=1e-9)
        for mine, theirs in zip(batch.parameters_of(run), loop.model.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
        for name in ("val", "test", "train"):
            assert float(batch.evaluate(name)[run]) == pytest.approx(loop.evaluate(name)["loss"], abs=1e-9)


@pytest.mark.parametrize("kind", ["mlp", "linear", "cnn", "odd cnn"])
def test_first_step_in_single_precision(kind: str) -> None:
    tasks = [t for name in SETTINGS for t in tasks_of(kind, **SETTINGS[name])]
    rates = [1e-2] * len(tasks)
    seeds = list(range(len(tasks)))
    batch = BatchedTraining(tasks, seeds, rates)
    loss = batch.run(1).losses[0]
    for run, loop in enumerate(loops_of(tasks, seeds, rates, torch.float32)):
        assert float(loss[run]) == pytest.approx(float(loop.step()), abs=1e-6)
        for mine, theirs in zip(batch.parameters_of(run), loop.model.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["mlp", "linear", "cnn", "odd cnn"])
def test_a_run_does_not_depend_on_those_beside_it(kind: str) -> None:
    tasks = [
        dataclasses.replace(task, network=dataclasses.replace(task.network, dropout=0.2 * i * (kind != "linear")))
        for i, task in enumerate(tasks_of(kind))
    ]
    together = BatchedTraining(tasks, [3] * len(tasks), [1e-2] * len(tasks), dtype=torch.float64)
    together.run(20)
    for run, task in enumerate(tasks):
        alone = BatchedTraining([task], [3], [1e-2], dtype=torch.float64)
        alone.run(20)
        for mine, theirs in zip(together.parameters_of(run), alone.parameters_of(0), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_the_first_of_equal_pixels_gets_the_gradient() -> None:
    """Flat images: all numbers of a square are equal, and torch's pooling takes the first."""
    tasks = tasks_of("cnn")
    for task in tasks:
        task.train.inputs[:, :, ::2] = task.train.inputs[:, :, 1::2]
        task.train.inputs[:, :, :, :4] = 1.0
    batch = BatchedTraining(tasks, [0] * 3, [1e-2] * 3, dtype=torch.float64)
    batch.run(5)
    for run, loop in enumerate(loops_of(tasks, [0] * 3, [1e-2] * 3, torch.float64)):
        for _ in range(5):
            loop.step()
        for mine, theirs in zip(batch.parameters_of(run), loop.model.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_runs_of_one_seed_share_the_order_of_their_data_and_nothing_else() -> None:
    tasks = tasks_of("mlp")
    tasks = [tasks[0], tasks[1], tasks[0], tasks[0]]
    seeds, rates = [3, 3, 3, 4], [1e-2, 1e-2, 1e-3, 1e-2]
    batch = BatchedTraining(tasks, seeds, rates, dtype=torch.float64)
    losses = torch.cat([batch.run(n).losses for n in (3, 1, 16)])  # over the ends of epochs, of intervals, and both
    for run, loop in enumerate(loops_of(tasks, seeds, rates, torch.float64)):
        expected = torch.stack([loop.step() for _ in range(20)])
        torch.testing.assert_close(losses[:, run], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("count", [1, 9, 20, 1000])
def test_images_are_evaluated_in_parts(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched, "_EVAL_IMAGES", count)
    tasks = tasks_of("cnn")
    batch = BatchedTraining(tasks, [0] * 3, [1e-2] * 3, dtype=torch.float64)
    for run, loop in enumerate(loops_of(tasks, [0] * 3, [1e-2] * 3, torch.float64)):
        assert float(batch.evaluate("val")[run]) == pytest.approx(loop.evaluate("val")["loss"], abs=1e-12)


def test_factors_multiply_the_rates_step_by_step() -> None:
    tasks = tasks_of("mlp", optimizer="adamw", weight_decay=0.1)
    batch = BatchedTraining(tasks, [0] * 4, [1e-2] * 4, dtype=torch.float64)
    batch.run(3, [1.0, 0.5, 0.25])
    for run, loop in enumerate(loops_of(tasks, [0] * 4, [1e-2] * 4, torch.float64)):
        for factor in (1.0, 0.5, 0.25):
            for group in loop.optimizer.param_groups:
                group["lr"] = 1e-2 * factor
            loop.step()
        for mine, theirs in zip(batch.parameters_of(run), loop.model.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert batch.optimizer.lr.flatten().tolist() == [1e-2] * 4
    with pytest.raises(InputError, match="a factor for each"):
        batch.run(3, [1.0, 0.5])


def test_padding_stays_zero() -> None:
    tasks = tasks_of("mlp", optimizer="adamw", weight_decay=0.1)
    batch = BatchedTraining(tasks, [0] * 4, [1e-2] * 4)
    batch.run(10)
    used = torch.zeros_like(batch.parameters)
    for run in range(4):
        for view in batch._network.parameters_of(run, used):
            view.fill_(1.0)
    assert (batch.parameters[used == 0] == 0).all()
    assert (batch.parameters[used == 1] != 0).all()


@pytest.mark.parametrize("n_steps", [2, 3, 9, 12, 22])
def test_measurements_are_those_of_the_gradient_probe(n_steps: int) -> None:
    assert batched.MEASURE_EVERY == MEASURE_EVERY
    tasks = tasks_of("mlp")
    seeds, rates = [0, 1, 2, 3], [1e-2, 1e-3, 3e-3, 1e-2]
    stats = BatchedTraining(tasks, seeds, rates, dtype=torch.float64).run(n_steps)
    for run, loop in enumerate(loops_of(tasks, seeds, rates, torch.float64)):
        probe = GradientProbe(loop.optimizer)
        probe.aim(n_steps)
        for _ in range(n_steps):
            loop.step()
        rows = torch.stack([torch.as_tensor(row) for row in probe.pending()])
        torch.testing.assert_close(stats.norms[:, :, run], rows.double(), rtol=1e-9, atol=1e-12)


def test_layer_ratios_are_of_matrices_alone() -> None:
    tasks = tasks_of("mlp")
    batch = BatchedTraining(tasks, [0] * 4, [1e-2] * 4, dtype=torch.float64)
    twin = BatchedTraining(tasks, [0] * 4, [1e-2] * 4, dtype=torch.float64)
    before = twin.parameters.clone()
    twin.run(1)
    ratios = batch.run(2).layer_ratios[0]
    for run, task in enumerate(tasks):
        old, new = (batch._network.parameters_of(run, flat) for flat in (before, twin.parameters))
        expected = [float((a - b).norm() / b.norm()) for a, b in zip(old[::2], new[::2], strict=True)]
        depth = len(task.network.hidden)
        mine = [*ratios[:depth, run].tolist(), float(ratios[-1, run])]
        assert mine == pytest.approx(expected, rel=1e-12)
        assert ratios[depth:-1, run].isnan().all()


def test_restore_puts_some_runs_back_and_leaves_the_others() -> None:
    tasks = tasks_of("mlp")
    batch = BatchedTraining(tasks, [0] * 4, [1e-2] * 4, dtype=torch.float64)
    batch.run(5)
    kept = batch.snapshot()
    batch.run(5)
    now = batch.snapshot()
    batch.restore(kept, torch.tensor([True, False, False, True]))
    for name, axis in (("parameters", 0), ("moments", 1), ("steps", 0)):
        tensor = batch.snapshot()[name]
        for run, source in enumerate((kept, now, now, kept)):
            assert torch.equal(tensor.select(axis, run), source[name].select(axis, run))


def test_dropout_keeps_the_mean_and_the_asked_share() -> None:
    uniform = batched.hashed_uniform(torch.tensor([5, 6, 7]), 9, (200, 50))
    assert 0 <= float(uniform.min()) < 1e-3 < 0.999 < float(uniform.max()) < 1
    shares = (uniform < 0.7).double().mean((1, 2))
    assert shares.tolist() == pytest.approx([0.7] * 3, abs=0.02)  # a standard error is 0.0046
    other = batched.hashed_uniform(torch.tensor([5, 6, 7]), 10, (200, 50))
    both = torch.corrcoef(torch.cat([uniform.flatten(1), other.flatten(1)]))
    assert float((both - torch.eye(6)).abs().max()) < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 16}, "batch sizes [8, 16] cannot be trained together; make one batch of runs a size"),
        ({"network": Network("mlp", (), "relu")}, "linear models and networks with hidden layers cannot be stacked"),
    ],
)
def test_what_cannot_be_stacked_is_refused(change: dict[str, object], message: str) -> None:
    tasks = tasks_of("mlp")
    tasks[1] = dataclasses.replace(tasks[1], **change)
    with pytest.raises(InputError) as caught:
        BatchedTraining(tasks, [0] * 4, [1e-2] * 4)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (
            [*tasks_of("mlp"), *tasks_of("cnn")],
            "networks of kinds ['cnn', 'mlp'] cannot be stacked; make one batch of runs a kind",
        ),
        ([*tasks_of("cnn"), *tasks_of("odd cnn")], "images of sizes [(6, 6), (8, 8)] cannot be stacked"),
    ],
)
def test_kinds_and_sizes_are_not_mixed(tasks: list[SmallTask], message: str) -> None:
    with pytest.raises(InputError) as caught:
        BatchedTraining(tasks, [0] * len(tasks), [1e-2] * len(tasks))
    assert message in str(caught.value)
