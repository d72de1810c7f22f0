"""A run of a batch that switches its optimizer's algorithm is the single run under a Controller that does so."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch

from puppets import Joint, in_double
from trimtab.controller import Controller
from trimtab.envs import batched
from trimtab.envs.batched import TrainingVectorEnv
from trimtab.envs.episodes import Batch, fitting_horizon
from trimtab.envs.specs import default_spec
from trimtab.errors import InputError, UnknownNameError
from trimtab.knobs import switch
from trimtab.seeding import numpy_generator
from trimtab.tasks.families import draw_task
from trimtab.tasks.small import SmallTask
from trimtab.training import batched_optimizer
from trimtab.training.batched import BatchedTraining

CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}
# Rates of equal effect; decays of use; adam's betas are not torch's.
STARTS = {
    "sgd": (0.02, {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.01}),
    "adam": (0.003, {"optimizer": "adam", "betas": (0.8, 0.95), "weight_decay": 0.01}),
    "adamw": (0.003, {"optimizer": "adamw", "betas": (0.9, 0.99), "weight_decay": 0.1}),
}


def make(seed: int, **settings: Any) -> SmallTask:
    task = draw_task("mlp", numpy_generator(seed, "switching"), batch_size=8)
    network = dataclasses.replace(task.network, dropout=0.0)
    return dataclasses.replace(task, network=network, **settings)


def tasks_of(choices: tuple[str, ...], **changes: Any) -> tuple[list[SmallTask], list[float]]:
    """Six runs, of the algorithms in turn."""
    starts = [STARTS[choices[run % len(choices)]] for run in range(6)]
    return [make(run, **{**start[1], **changes}) for run, start in enumerate(starts)], [start[0] for start in starts]


def begin(spec: Any, tasks: list[SmallTask], rates: list[float], total_steps: int) -> tuple[Any, ...]:
    env = TrainingVectorEnv(len(tasks), ("mlp",), spec)
    count = len(tasks)
    batch = Batch(
        "mlp", tuple(tasks), tuple(range(count)), tuple(range(3, 3 + count)), tuple(rates), (1.0,) * count, total_steps
    )
    return env, batch, *env.begin([batch])


def play(spec: Any, tasks: list[SmallTask], rates: list[float], moves: np.ndarray, total_steps: int) -> dict[str, int]:
    """Play moves (T, R, K) in a batch and, run by run, under a Controller; what happened, counted."""
    env, batch, observation, infos = begin(spec, tasks, rates, total_steps)
    seen, told = [observation], [infos]
    for row in moves:
        observation, *_, infos = env.step(row)
        seen.append(observation)
        told.append(infos)
    training = env._runs._trainings[0]
    counted = {"switches": 0, "roll-backs": 0, "slept": 0}
    for run, task in enumerate(tasks):
        loop = in_double(task, batch.seeds[run], batch.lr[run], total_steps)
        awake = np.array([not infos["asleep"][run] for infos in told])
        controller = Controller(
            Joint(moves[awake[:-1], run]), optimizer=loop.optimizer, model=loop.model, loader=loop,
            total_steps=total_steps, spec=spec, mode="use",
        )  # fmt: skip
        rows, kinds, settings = [], [], []
        while not loop.is_over():
            # Those that the steps to come are trained with.
            before = dict(controller.state.settings)
            loss, is_due = loop.step(), controller.is_due
            controller.step(loss, loop.evaluate("val")["loss"] if is_due else None)
            if is_due:
                rows.append(controller.last_observation)
                kinds.append(before["optimizer"])
                settings.append([before[name] for name in spec.knobs])
        is_asked = [index for index, is_awake in enumerate(awake) if is_awake]
        np.testing.assert_allclose(np.array(rows), np.stack([seen[index][run] for index in is_asked]), **CLOSE)
        good = [place for place, index in enumerate(is_asked) if not told[index]["rolled_back"][run]]
        theirs = [[told[is_asked[place]][name][run] for name in spec.knobs] for place in good]
        np.testing.assert_allclose(np.array(settings)[good], theirs, rtol=1e-9)
        for mine, single in zip(training.parameters_of(run), loop.model.parameters(), strict=True):
            torch.testing.assert_close(mine, single, **CLOSE)
        group = loop.optimizer.param_groups[0]
        assert training.optimizer.weight_decay[run, 0].item() == pytest.approx(group["weight_decay"], rel=1e-9)
        assert type(loop.optimizer).__name__.lower() == training.optimizer.names[run]
        counted["switches"] += int((np.diff(kinds) != 0).sum())
        counted["roll-backs"] += controller.n_rollbacks
        counted["slept"] += int((~awake).sum())
    return counted


def spec_of(*knobs: str, turns: bool = False, **options: Any) -> Any:
    plain = default_spec()
    signals = (*plain.signals, *(f"{knob}_unit" for knob in knobs), *(["turn"] if turns else []))
    return dataclasses.replace(plain, knobs=("lr", *knobs), knob_options=options, signals=signals, turns=turns)


@pytest.fixture(autouse=True)
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched, "BatchedTraining", functools.partial(BatchedTraining, dtype=torch.float64))


PAIRS = [("sgd", "adam"), ("sgd", "adamw"), ("adam", "adamw")]


@pytest.mark.parametrize("decay_is_knob", [False, True])
@pytest.mark.parametrize("choices", PAIRS, ids="-".join)
def test_each_pair_of_algorithms_there_and_back(choices: tuple[str, str], decay_is_knob: bool) -> None:
    spec = spec_of("optimizer", *(["weight_decay"] if decay_is_knob else []), optimizer={"choices": choices})
    total_steps = fitting_horizon(200, spec.timing)
    n_decisions = spec.timing.early_decisions + spec.timing.n_decisions - 1
    moves = np.random.default_rng(1).choice([-0.1, 0.0, 0.1], (n_decisions, 6, len(spec.knobs)))
    moves[:, :, 1] = 0.0
    for run in range(6):  # each at decisions of its own: there, back, and there again
        there = 1.0 if run % 2 == 0 else -1.0
        for index, sign in ((1 + run, 1), (9 + run, -1), (16 + run // 2, 1)):
            moves[index, run, 1] = sign * there
    assert play(spec, *tasks_of(choices), moves, total_steps)["switches"] == 18


@pytest.mark.parametrize("knobs", [("optimizer", "momentum", "weight_decay"), ("optimizer",)], ids="-".join)
@pytest.mark.parametrize("turns", [False, True])
def test_all_at_random_with_momentum_and_decay(
    knobs: tuple[str, ...], turns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batched_optimizer, "_MAX_STRETCHES", 6 if turns else 2)  # rows by number where all move at once
    spec = spec_of(*knobs, turns=turns)
    total_steps = fitting_horizon(150, spec.timing)
    n_decisions = spec.timing.early_decisions + spec.timing.n_decisions - 1
    shape = (n_decisions, 6, 1 if turns else len(spec.knobs))
    moves = np.random.default_rng(2).choice([-0.3, 0.0, 0.3], shape)
    counted = play(spec, *tasks_of(("sgd", "adam", "adamw")), moves, total_steps)
    assert counted["switches"] >= 15


def test_momentum_of_zero_and_no_decay() -> None:
    spec = spec_of("optimizer", "momentum")
    total_steps = fitting_horizon(150, spec.timing)
    n_decisions = spec.timing.early_decisions + spec.timing.n_decisions - 1
    moves = np.random.default_rng(3).choice([-1.0, 0.0, 1.0], (n_decisions, 6, 3))
    moves[:, :, 0] = 0.0
    tasks, rates = tasks_of(("sgd", "adam", "adamw"), weight_decay=0.0, momentum=0.0)
    counted = play(spec, tasks, rates, moves, total_steps)
    assert counted["switches"] >= 20


def test_runs_that_are_rolled_back() -> None:
    spec = spec_of("optimizer")
    total_steps = fitting_horizon(70, spec.timing)
    n_decisions = spec.timing.early_decisions + spec.timing.n_decisions - 1
    moves = np.random.default_rng(4).choice([-0.3, 0.0, 0.3], (n_decisions, 6, 2))
    moves[-6:, :, 0] = 1.0  # rates that go wrong, at the end alone: rounding grows on such paths
    counted = play(spec, *tasks_of(("sgd", "adam", "adamw")), moves, total_steps)
    assert counted["switches"] >= 10
    assert counted["roll-backs"] >= 4


def test_runs_that_take_unequal_steps_and_sleep() -> None:
    spec = spec_of("optimizer", "batch_size", batch_size={"low": 4, "high": 50})
    total_steps = fitting_horizon(70, spec.timing)
    n_decisions = spec.timing.early_decisions + spec.timing.n_decisions - 1
    moves = np.random.default_rng(4).choice([-0.3, 0.0, 0.3], (n_decisions, 6, 3))
    counted = play(spec, *tasks_of(("sgd", "adam", "adamw")), moves, total_steps)
    assert counted["switches"] >= 10
    assert counted["slept"] >= 1


def test_the_numbers_of_the_knob() -> None:
    ours = (batched_optimizer.WORTH, batched_optimizer.LOOK_EVERY, batched_optimizer.NEWEST)
    assert ours == (switch.WORTH, switch.MEASURE_EVERY, switch._NEWEST)


def test_rows_by_number_are_rows_of_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine runs of algorithms in turn, which are stepped by number, and sorted, in three stretches."""
    monkeypatch.setattr(batched_optimizer, "_MAX_STRETCHES", 3)
    tasks = [make(0, **STARTS[name][1]) for name in ("sgd", "adam", "adamw") * 3]
    order = sorted(range(9), key=lambda run: run % 3)
    mixed = BatchedTraining(tasks, list(range(9)), [0.01] * 9, dtype=torch.float64)
    by_kind = BatchedTraining([tasks[run] for run in order], order, [0.01] * 9, dtype=torch.float64)
    assert [type(rows) for _, rows in mixed.optimizer._rows] == [torch.Tensor] * 3
    assert [type(rows) for _, rows in by_kind.optimizer._rows] == [slice] * 3
    for training in (mixed, by_kind):
        training.run(12)
    torch.testing.assert_close(mixed.parameters[order], by_kind.parameters, rtol=1e-12, atol=1e-12)
    assert not torch.equal(mixed.parameters[0], mixed.parameters[1])


def test_a_snapshot_goes_back_until_a_run_switches() -> None:
    def make_one() -> BatchedTraining:
        tasks, rates = tasks_of(("sgd", "adam", "adamw"))
        training = BatchedTraining(tasks, list(range(6)), rates, dtype=torch.float64)
        training.watch_squares()
        training.run(5)
        training.optimizer.switch(["adam", "sgd", "sgd", "adamw", "adamw", "adam"])
        return training

    training, other = make_one(), make_one()
    snapshot = training.snapshot()
    training.run(7)
    some = torch.tensor([True, True, True, True, False, False])
    training.restore(snapshot, some)
    assert torch.equal(training.parameters[:4], other.parameters[:4])
    assert torch.equal(training.optimizer.moments[:, :4], other.optimizer.moments[:, :4])
    assert training.optimizer.steps[:, 0].tolist() == [100.0, 5.0, 5.0, 100.0, 12.0, 12.0]
    training.optimizer.switch(["adam", "sgd", "sgd", "adamw", "adamw", "sgd"])
    training.restore(snapshot, some)  # the one that switched is not among them
    with pytest.raises(InputError, match="run 5 is at 'sgd', the snapshot is of 'adam', whose moments mean something"):
        training.restore(snapshot, ~some)


def test_before_any_gradient_a_switch_begins_anew() -> None:
    tasks, rates = tasks_of(("sgd", "adam"))
    training = BatchedTraining(tasks, list(range(6)), rates, dtype=torch.float64)
    training.watch_squares()
    names = ["adam", "sgd"] * 3
    rate, decay = training.optimizer.conversion(names)
    assert rate.tolist() == decay.tolist() == [1.0] * 6
    training.optimizer.switch(names)
    assert training.optimizer.names == tuple(names)
    assert training.optimizer.steps.abs().sum() == training.optimizer.moments.abs().sum() == 0
    training.run(3)
    assert training.are_finite().all()
    assert training.optimizer.steps[:, 0].tolist() == [3.0] * 6


def test_bad_calls_are_refused() -> None:
    tasks, rates = tasks_of(("sgd", "adam"))
    training = BatchedTraining(tasks, list(range(6)), rates)
    with pytest.raises(InputError, match=r"needs the squared gradients of SGD; call watch\(\) before the first step"):
        training.optimizer.switch(["sgd"] * 6)
    training.watch_squares()
    with pytest.raises(UnknownNameError, match="unknown algorithm 'sdg'; did you mean 'sgd'"):
        training.optimizer.switch(["sdg"] * 6)


def test_an_algorithm_that_is_no_choice_is_refused_or_masked() -> None:
    spec = spec_of("optimizer", optimizer={"choices": ("sgd", "adam")})
    tasks, rates = tasks_of(("sgd", "adam", "adamw"))
    total_steps = fitting_horizon(60, spec.timing)
    with pytest.raises(
        InputError,
        match=r"'optimizer' cannot act on a run of the family 'mlp': its optimizer is 'adamw', which is not among the "
        r"choices \['sgd', 'adam'\]; leave the knob out, or give masks=True",
    ):
        begin(spec, tasks, rates, total_steps)
    env, *_, infos = begin(dataclasses.replace(spec, masks=True), tasks, rates, total_steps)
    np.testing.assert_array_equal(infos["optimizer"], [0.0, 1.0, np.nan] * 2)
    *_, infos = env.step(np.array([[0.0, 1.0]] * 6))
    np.testing.assert_array_equal(infos["optimizer"], [1.0, 1.0, np.nan] * 2)
    assert env._runs._trainings[0].optimizer.names == ("adam", "adam", "adamw") * 2
