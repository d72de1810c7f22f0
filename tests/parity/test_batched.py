"""R runs at once are R runs one after another: same weights, same losses, same measurements."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trimtab.errors import InputError
from trimtab.gradients import MEASURE_EVERY, GradientProbe
from trimtab.knobs.momentum import Momentum
from trimtab.run_state import RunState
from trimtab.tasks.base import Split
from trimtab.tasks.small import ModuleNetwork, Network, SmallTask
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


N_CHARACTERS = 7


class Own(nn.Module):
    """Of a user: embedding, LayerNorm, a buffer that is drawn, and a parameter that does not learn."""

    def __init__(self, shape: tuple[int, ...], n_outputs: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(N_CHARACTERS, 6)
        self.norm = nn.LayerNorm(6)
        self.readout = nn.Linear(6, n_outputs)
        self.register_buffer("strength", torch.rand(shape[0], 1))
        self.scale = nn.Parameter(torch.randn(n_outputs), requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        x = (self.embedding(inputs.long()) * self.strength).mean(-2)
        return self.readout(self.norm(x)) * self.scale


COPIES = {
    "attention": Network("attention", (8,), "relu", heads=2),
    "attention, two blocks": Network("attention", (4, 4), "gelu"),
    "recurrent": Network("recurrent", (5, 5), "tanh"),
    "module": ModuleNetwork(Own, "own"),
}
KINDS = ["mlp", "linear", "cnn", "odd cnn", *COPIES]
# At a rate of 1e-1 Adam's path with two blocks is chaotic: one loop, begun 1e-15 beside another, ends 1e-2 from it.
TAME = {"linear": [1e-2, 1e-3], "attention, two blocks": [1e-2, 1e-3]}


def characters(seed: int, network: Network | ModuleNetwork, **settings: object) -> SmallTask:
    """Rows of characters; the last comes once more."""
    task = make(seed, (5,), N_CHARACTERS, Network("mlp", (4,), "relu"), **settings)
    rng = np.random.default_rng(seed)
    parts = {}
    for name in ("train", "val", "score", "test"):
        rows = torch.from_numpy(rng.integers(N_CHARACTERS, size=getattr(task, name).inputs.shape))
        parts[name] = Split(rows.float(), rows[:, -1].clone())
    return dataclasses.replace(task, network=network, **parts)


def learned(model: nn.Module) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def tasks_of(kind: str, **settings: object) -> list[SmallTask]:
    if kind in COPIES:
        return [characters(i, COPIES[kind], **settings) for i in range(2)]
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


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in KINDS for name in SETTINGS if "blocks" not in kind or name in ("sgd", "adamw")],
)
def test_hundred_steps_equal_the_loop(kind: str, name: str) -> None:
    tasks = tasks_of(kind, **SETTINGS[name])
    seeds = [11 + i for i in range(len(tasks))]
    # Linear: squared error; above, momentum SGD diverges, and there nothing is equal to anything.
    rates = TAME.get(kind, [1e-1, 1e-3, 1e-2, 3e-2][: len(tasks)])
    loops = loops_of(tasks, seeds, rates, torch.float64)
    batch = BatchedTraining(tasks, seeds, rates, dtype=torch.float64)
    for run, loop in enumerate(loops):
        for mine, theirs in zip(batch.parameters_of(run), learned(loop.model), strict=True):
            assert torch.equal(mine, theirs)
    losses = batch.run(100).losses
    for run, loop in enumerate(loops):
        expected = torch.stack([loop.step() for _ in range(100)])
        torch.testing.assert_close(losses[:, run], expected, rtol=1e-9, atol=1e-9)
        for mine, theirs in zip(batch.parameters_of(run), learned(loop.model), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
        for part in ("val", "test", "train"):
            assert float(batch.evaluate(part)[run]) == pytest.approx(loop.evaluate(part)["loss"], abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_first_step_in_single_precision(kind: str) -> None:
    tasks = [t for name in SETTINGS for t in tasks_of(kind, **SETTINGS[name])]
    rates = [1e-2] * len(tasks)
    seeds = list(range(len(tasks)))
    batch = BatchedTraining(tasks, seeds, rates)
    loss = batch.run(1).losses[0]
    for run, loop in enumerate(loops_of(tasks, seeds, rates, torch.float32)):
        assert float(loss[run]) == pytest.approx(float(loop.step()), abs=1e-6)
        for mine, theirs in zip(batch.parameters_of(run), learned(loop.model), strict=True):
            # Adam's first step is the rate times g / (|g| + 1e-8): of a gradient about that small, rounding decides.
            size = torch.zeros(()) if theirs.grad is None else theirs.grad.abs()
            is_rounding = (size > 0) & (size < 1e-7) & (tasks[run].optimizer != "sgd")
            assert int(is_rounding.sum()) <= 1
            torch.testing.assert_close(torch.where(is_rounding, theirs, mine), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_does_not_depend_on_those_beside_it(kind: str) -> None:
    tasks = tasks_of(kind)
    if kind in ("mlp", "cnn", "odd cnn"):
        networks = [dataclasses.replace(task.network, dropout=0.2 * i) for i, task in enumerate(tasks)]
        tasks = [dataclasses.replace(task, network=network) for task, network in zip(tasks, networks, strict=True)]
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


# ---- copies of any module ------------------------------------------------------------------------------------------


def test_copies_have_a_place_for_every_number_and_layers_for_matrices() -> None:
    tasks = tasks_of("module")
    batch = BatchedTraining(tasks, [0, 1], [1e-2] * 2, dtype=torch.float64)
    assert batch.parameters.shape == (2, N_CHARACTERS * 6 + 6 + 6 + 6 * N_CHARACTERS + N_CHARACTERS)
    before = batch.parameters.clone()
    twin = BatchedTraining(tasks, [0, 1], [1e-2] * 2, dtype=torch.float64)
    twin.run(1)
    ratios = batch.run(2).layer_ratios[0]
    for run in range(2):
        old, new = (batch._network.parameters_of(run, flat) for flat in (before, twin.parameters))
        embedding, _, _, matrix, _ = [float((a - b).norm() / b.norm()) for a, b in zip(old, new, strict=True)]
        assert ratios[:, run].tolist() == pytest.approx([embedding, matrix], rel=1e-12)


def test_buffers_are_those_of_each_run_and_one_piece_of_memory_where_they_are_equal() -> None:
    task = tasks_of("module")[0]
    for seeds, stride in (([3, 3], 0), ([3, 4], 5)):
        batch = BatchedTraining([task] * 2, seeds, [1e-2] * 2)
        kept = batch._network._given["strength"]
        assert kept.stride(0) == stride
        for run, loop in enumerate(loops_of([task] * 2, seeds, [1e-2] * 2, torch.float32)):
            assert torch.equal(kept[run], loop.model.strength)


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 4, 4), (4, 3)])
def test_a_module_gets_rows_in_the_shape_of_the_data(shape: tuple[int, ...]) -> None:
    def network(shape: tuple[int, ...], n_outputs: int) -> nn.Module:
        convolution = nn.Conv2d if len(shape) == 3 else nn.Conv1d
        return nn.Sequential(convolution(shape[0], 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(n_outputs))

    def made(shape: tuple[int, ...], n_outputs: int) -> nn.Module:
        module = network(shape, n_outputs)
        module(torch.zeros(1, *shape))
        return module

    tasks = [make(i, shape, 3, ModuleNetwork(made, "convolution")) for i in range(2)]
    batch = BatchedTraining(tasks, [5, 6], [1e-2] * 2, dtype=torch.float64)
    losses = batch.run(5).losses
    for run, loop in enumerate(loops_of(tasks, [5, 6], [1e-2] * 2, torch.float64)):
        torch.testing.assert_close(losses[:, run], torch.stack([loop.step() for _ in range(5)]), rtol=1e-12, atol=1e-12)
        assert float(batch.evaluate("val")[run]) == pytest.approx(loop.evaluate("val")["loss"], abs=1e-12)


def test_attention_of_torch_is_run_for_all_copies_at_once() -> None:
    def made(shape: tuple[int, ...], n_outputs: int) -> nn.Module:
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        return nn.Sequential(layer, nn.Flatten(), nn.Linear(12, n_outputs))

    tasks = [make(i, (3, 4), 3, ModuleNetwork(made, "encoder"), optimizer="sgd") for i in range(2)]
    batch = BatchedTraining(tasks, [5, 6], [1e-2] * 2, dtype=torch.float64)
    losses = batch.run(5).losses  # a warning of vmap that it runs copies one by one would fail this test
    for run, loop in enumerate(loops_of(tasks, [5, 6], [1e-2] * 2, torch.float64)):
        torch.testing.assert_close(losses[:, run], torch.stack([loop.step() for _ in range(5)]), rtol=1e-12, atol=1e-12)


class Odd(nn.Module):
    """A linear model that does one thing more."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.linear, self.what = nn.Linear(5, 3), what
        if what == "unused":
            self.spare = nn.Parameter(torch.zeros(2))
        if what == "frozen":
            self.requires_grad_(False)
        self.hidden_state = torch.rand(3) if what == "drawn" else torch.ones(3)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.linear(inputs) * self.hidden_state
        if self.what == "branch" and float(outputs.detach().sum()) > 1e9:
            return -outputs
        if self.what == "mode" and self.training:
            return 2 * outputs
        return outputs[:, :2] if self.what == "narrow" else outputs


def odd(what: str) -> ModuleNetwork:
    return ModuleNetwork(lambda shape, n_outputs: Odd(what), what)


def sequence_of(*layers: object) -> ModuleNetwork:
    return ModuleNetwork(lambda shape, n_outputs: nn.Sequential(nn.Linear(5, 3), *[layer() for layer in layers]), "own")


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (
            sequence_of(lambda: nn.Dropout(0.1)),
            "network 'own' cannot be trained in a batch, since it draws random numbers in forward, which copies of it "
            "would share; make it without dropout (p=0), or train its runs one by one with TrainingLoop",
        ),
        (
            sequence_of(lambda: nn.BatchNorm1d(3)),
            "since it changes '1.running_mean' in forward; normalise by LayerNorm or GroupNorm instead of batch norm",
        ),
        (
            sequence_of(lambda: nn.BatchNorm1d(3, track_running_stats=False)),
            "since it gives a row another output where other rows stand beside it; normalise by LayerNorm",
        ),
        (
            sequence_of(lambda: nn.Softmax(0)),
            "since it gives a row another output where other rows stand beside it; normalise by LayerNorm",
        ),
        (sequence_of(lambda: nn.LazyLinear(3)), "since it has parameters without a shape; let make run it once"),
        (sequence_of(lambda: nn.Linear(4, 3)), "since it cannot read inputs of shape (4, 5): mat1 and mat2 shapes"),
        (odd("unused"), "since it does not use its parameter 'spare'; leave it out, or set requires_grad to False"),
        (odd("frozen"), "since it has no parameters that learn; give it some"),
        (odd("drawn"), "since it depends on more than its parameters and buffers; make the same each time"),
        (odd("branch"), "since it cannot be run by torch.func.vmap: vmap: It looks like you're calling .item()"),
        (odd("mode"), "since it computes something else in evaluation than in training; let it do the same in both"),
        (odd("narrow"), "since it makes outputs of shape (4, 2) of 4 rows; let it make 3 of each, (4, 3)"),
        (ModuleNetwork(lambda shape, n_outputs: 3, "own"), "make of network 'own' gave 'int'; expected a torch module"),
    ],
)  # fmt: skip
def test_a_module_that_cannot_be_copied_is_refused_before_training(network: ModuleNetwork, message: str) -> None:
    task = make(0, (5,), 3, network)
    state = torch.get_rng_state()
    with pytest.raises(InputError) as caught:
        BatchedTraining([task] * 2, [0, 1], [1e-2] * 2)
    assert message in str(caught.value)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_module_whose_shapes_change_is_refused() -> None:
    def made(shape: tuple[int, ...], n_outputs: int) -> nn.Module:
        width = int(torch.randint(2, 100, ()))
        return nn.Sequential(nn.Linear(5, width), nn.Linear(width, n_outputs))

    with pytest.raises(InputError, match="since it has parameters of other shapes each time it is made"):
        BatchedTraining([make(0, (5,), 3, ModuleNetwork(made, "own"))], [0], [1e-2])
    widths = iter([4, 4, 4, 4, 6])  # two are tried, one is kept, then one is made for each seed
    changing = ModuleNetwork(lambda shape, n: nn.Sequential(nn.Linear(5, w := next(widths)), nn.Linear(w, n)), "own")
    with pytest.raises(InputError, match="network 'own' made modules with different parameters; expected the same"):
        BatchedTraining([make(0, (5,), 3, changing)] * 2, [0, 1], [1e-2] * 2)


def test_different_architectures_are_not_mixed() -> None:
    tasks = [characters(0, COPIES["recurrent"]), characters(1, Network("recurrent", (6,), "tanh"))]
    with pytest.raises(InputError) as caught:
        BatchedTraining(tasks, [0, 1], [1e-2] * 2)
    assert "hidden=(6,)" in str(caught.value)
    assert "copies of one module are trained together; make one batch of runs an architecture" in str(caught.value)
    with pytest.raises(InputError, match=r"networks of kinds \['attention', 'recurrent'\] cannot be stacked"):
        BatchedTraining([tasks[0], characters(1, COPIES["attention"])], [0, 1], [1e-2] * 2)


# ---- knobs ----------------------------------------------------------------------------------------------------------


def same_parameters(batch: BatchedTraining, loops: list[TrainingLoop]) -> None:
    for run, loop in enumerate(loops):
        for mine, theirs in zip(batch.parameters_of(run), learned(loop.model), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SETTINGS)
def test_momentum_acts_as_the_knob_of_a_single_run_does(name: str) -> None:
    tasks, seeds, rates = tasks_of("mlp", **SETTINGS[name]), [1, 2, 3, 4], [1e-2, 1e-3, 3e-3, 1e-2]
    batch = BatchedTraining(tasks, seeds, rates, dtype=torch.float64)
    loops = loops_of(tasks, seeds, rates, torch.float64)
    knobs = [(Momentum(), RunState(loop.optimizer)) for loop in loops]
    found = [float(knob.bind(state)[0]) for knob, state in knobs]
    assert batch.optimizer.momentum[:, 0].tolist() == found
    for values in ([0.5, 0.9, 0.0, 0.99], [0.95, 0.9, 0.7, 0.0], [0.2, 0.5, 0.5, 0.8]):
        batch.run(6)
        batch.optimizer.set_momentum(torch.tensor(values, dtype=torch.float64).unsqueeze(1))
        assert batch.optimizer.momentum[:, 0].tolist() == values
        for loop, (knob, state), value in zip(loops, knobs, values, strict=True):
            for _ in range(6):
                loop.step()
            knob.write(state, np.array([value]))
    batch.run(6)
    for loop in loops:
        for _ in range(6):
            loop.step()
    same_parameters(batch, loops)


@pytest.mark.parametrize("kind", ["mlp", "cnn", "attention"])
def test_batches_of_different_sizes_are_those_of_the_loops(kind: str) -> None:
    tasks = tasks_of(kind)
    count = len(tasks)
    seeds, rates = [5] * count, [1e-2] * count
    batch = BatchedTraining(tasks, seeds, rates, dtype=torch.float64)
    loops = loops_of(tasks, seeds, rates, torch.float64)
    assert batch.batch_sizes.tolist() == [8] * count
    losses: list[Tensor] = []
    expected: list[Tensor] = []
    changes = [[8, 8, 8, 8], [3, 16, 8, 1], [20, 5, 8, 40], [40, 40, 40, 40], [7, 7, 7, 7], [2, 9, 30, 8]]
    for sizes, n_steps in zip(changes, (3, 4, 3, 2, 9, 5), strict=True):
        batch.resize(np.array(sizes[:count]))
        losses.append(batch.run(n_steps).losses)
        for loop, size in zip(loops, sizes, strict=False):
            loop.resize(size)
        expected.append(torch.stack([torch.stack([loop.step() for loop in loops]) for _ in range(n_steps)]))
    torch.testing.assert_close(torch.cat(losses), torch.cat(expected), rtol=1e-9, atol=1e-9)
    same_parameters(batch, loops)
    with pytest.raises(
        InputError, match=r"batch sizes .*; expected one for each run, from 1 to its train samples \[40"
    ):
        batch.resize(np.array([41] * count))


def test_sizes_that_are_changed_before_the_first_step() -> None:
    tasks = tasks_of("mlp")
    batch, loops = BatchedTraining(tasks, [5] * 4, [1e-2] * 4, dtype=torch.float64), []
    batch.resize(np.array([4, 8, 16, 32]))
    losses = batch.run(12).losses
    loops = loops_of(tasks, [5] * 4, [1e-2] * 4, torch.float64)
    for run, loop in enumerate(loops):
        loop.resize(4 * 2**run)
        expected = torch.stack([loop.step() for _ in range(12)])
        torch.testing.assert_close(losses[:, run], expected, rtol=1e-9, atol=1e-9)


def test_dropout_that_is_written_is_dropout_that_was_there() -> None:
    def with_dropout(probability: float) -> BatchedTraining:
        tasks = tasks_of("mlp")
        given = [dataclasses.replace(task.network, dropout=probability if i else 0.0) for i, task in enumerate(tasks)]
        tasks = [dataclasses.replace(task, network=network) for task, network in zip(tasks, given, strict=True)]
        return BatchedTraining(tasks, [3] * 4, [1e-2] * 4)

    written, there, other = with_dropout(0.2), with_dropout(0.5), with_dropout(0.2)
    written.set_dropout(np.full(4, 0.5))
    np.testing.assert_array_equal(written.dropout, [np.nan, 0.5, 0.5, 0.5])
    for batch in (written, there, other):
        batch.run(5)
    assert torch.equal(written.parameters, there.parameters)
    assert not torch.equal(written.parameters[1:], other.parameters[1:])
    assert torch.equal(written.parameters[0], other.parameters[0])
