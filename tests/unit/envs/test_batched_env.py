"""The vector environment: what Gymnasium asks of one, that decisions act, that ranks and roll-backs are right."""

from __future__ import annotations

import dataclasses
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

import trimtab.envs  # registers
from trimtab.agents.base import Actions, Timing
from trimtab.envs.batched import TrainingVectorEnv
from trimtab.envs.episodes import Batch, EpisodeOptions, count_decisions, draw_episode, fitting_horizon
from trimtab.envs.specs import default_spec
from trimtab.errors import InputError, UnknownNameError
from trimtab.seeding import derive_seed
from trimtab.spec import ControlSpec
from trimtab.tasks.families import SEQUENCE_FAMILIES

SMALL: dict[str, Any] = {"horizon": (52, 60), "runs_per_task": 4, "max_cnn_horizon": 60}


def make(n_runs: int = 8, families: tuple[str, ...] = ("quadratic",), **options: Any) -> TrainingVectorEnv:
    env = gymnasium.make_vec(trimtab.envs.TRAINING, num_envs=n_runs, families=families, **{**SMALL, **options})
    assert isinstance(env, TrainingVectorEnv)
    return env


def play(env: TrainingVectorEnv, move: float = 0.0) -> list[tuple[Any, ...]]:
    steps = []
    while not steps or not steps[-1][2].all():
        steps.append(env.step(np.full((env.num_envs, 1), move)))
    return steps


@pytest.mark.parametrize("families", [("mlp",), ("quadratic",), ("cnn",), ("mlp", "cnn", "quadratic")])
def test_all_runs_have_equally_many_decisions_and_end_by_termination(families: tuple[str, ...]) -> None:
    env = make(10, families)  # 10 is no multiple of 4: the last task has two runs
    observation, infos = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    assert infos["group"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    steps = play(env)
    assert len(steps) == 6 + 20 - 1  # the first interval is `reset`'s, at the rate each run starts with
    for observation, _, terminated, truncated, _ in steps[:-1]:
        assert env.observation_space.contains(observation)
        assert not terminated.any()
        assert not truncated.any()
    assert not steps[-1][3].any()
    column = env.control_spec.signals.index("progress")
    assert (steps[-1][0][:, column] == 1.0).all()


def test_the_step_after_the_end_begins_the_next_episode() -> None:
    env = make()
    assert env.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    first, _ = env.reset(seed=0)
    play(env)
    observation, reward, terminated, truncated, _ = env.step(np.full((8, 1), 2.0))
    assert not reward.any()
    assert not terminated.any()
    assert not truncated.any()
    assert not np.array_equal(first, observation)
    twin = make()
    twin.reset(seed=0)
    play(twin, 0.2)  # what was done before does not matter to what is drawn
    assert np.array_equal(twin.step(np.zeros((8, 1)))[0], observation)


def test_a_seed_gives_the_same_episode_to_the_bit() -> None:
    runs = []
    for seed in (5, 5, 6):
        env = make(8, ("mlp",))
        start, _ = env.reset(seed=seed)
        runs.append(np.stack([start, *(step[0] for step in play(env, 0.1))]))
    assert np.array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


def test_actions_reach_the_optimizer_and_one_changed_action_changes_its_run_alone() -> None:
    finals = []
    for move in (0.0, 0.5):
        env = make()
        _, infos = env.reset(seed=1)
        before = infos["lr"]
        actions = np.zeros((8, 1))
        actions[3] = move
        *_, infos = env.step(actions)
        assert infos["lr"][3] == pytest.approx(before[3] * 10**move, rel=1e-6)  # read back, in single precision
        assert np.delete(infos["lr"], 3).tolist() == np.delete(before, 3).tolist()
        finals.append(play(env)[-1][4]["score_loss"])
    assert finals[0][3] != finals[1][3]
    assert np.delete(finals[0], 3).tolist() == np.delete(finals[1], 3).tolist()


def test_the_reward_is_the_rank_at_the_end() -> None:
    env = make(10)
    env.reset(seed=2)
    steps = play(env)
    assert all(not reward.any() for _, reward, *_ in steps[:-1])
    reward, score = steps[-1][1], steps[-1][4]["score_loss"]
    for low, high in ((0, 4), (4, 8), (8, 10)):
        order = np.argsort(score[low:high])
        assert reward[low:high][order].tolist() == pytest.approx(np.linspace(0.5, -0.5, high - low).tolist())


def test_runs_of_a_task_differ_in_their_rate_alone() -> None:
    batches = draw_episode(EpisodeOptions(families=("mlp", "cnn")), 64, default_spec().timing, seed=3)
    seen: dict[int, set[tuple[int, int, int]]] = {}
    for batch in batches:
        for task, group, seed in zip(batch.tasks, batch.groups, batch.seeds, strict=True):
            seen.setdefault(group, set()).add((id(task), seed, batch.total_steps))
        for group in set(batch.groups):
            rates = np.sort([rate for rate, g in zip(batch.lr, batch.groups, strict=True) if g == group])
            parts = np.floor((np.log10(rates) + 5) / 4 * 16).astype(int)
            assert parts.tolist() == list(range(16))  # one from each sixteenth of 1e-5..1e-1
    assert {len(kinds) for kinds in seen.values()} == {1}
    assert sorted(seen) == [0, 1, 2, 3]


@pytest.mark.parametrize("family", SEQUENCE_FAMILIES)
def test_sequences_of_a_batch_are_copies_of_one_network(family: str) -> None:
    options = EpisodeOptions(families=(family,), runs_per_task=16, horizon=(50, 2000), max_cnn_horizon=300)
    architectures = set()
    for seed in range(6):
        batches = draw_episode(options, 80, default_spec().timing, seed)
        assert [len(batch.tasks) for batch in batches] == [64, 16]
        for batch in batches:
            same = {(task.network, task.input_shape) for task in batch.tasks}
            assert len(same) == 1
            architectures |= same
            assert batch.total_steps <= 310  # the horizon of the dear ones, moved to where decisions fit
        assert len({task.train.inputs.numpy().tobytes() for batch in batches for task in batch.tasks}) == 5
    assert len(architectures) > 4


def test_train_rows_reach_the_tasks() -> None:
    options = EpisodeOptions(families=("image_mlp",), train_rows=(2000, 2100))
    batches = draw_episode(options, 64, default_spec().timing, seed=0)
    assert all(2000 <= len(task.train.inputs) <= 2100 for batch in batches for task in batch.tasks)
    with pytest.raises(InputError, match=r"^train_rows is \(1, 2\); expected None, or the least and most rows"):
        EpisodeOptions(train_rows=(1, 2))


def test_families_where_none_are_named() -> None:
    assert EpisodeOptions().families == ("mlp", "image_mlp", "cnn", "quadratic")


def test_horizons_are_log_uniform_and_fit_the_timing() -> None:
    timing = default_spec().timing
    drawn = [
        batch.total_steps
        for seed in range(300)
        for batch in draw_episode(EpisodeOptions(families=("quadratic",)), 16, timing, seed)
    ]
    assert {count_decisions(steps, timing) for steps in drawn} == {26}
    assert 50 <= min(drawn) < 60
    assert 1800 < max(drawn) <= 2010
    # Log-uniform over 50..2000: the mean of log T is (log 50 + log 2000) / 2, its standard error here 0.06.
    assert np.log(drawn).mean() == pytest.approx((np.log(50) + np.log(2000)) / 2, abs=0.2)


def test_a_short_budget_may_be_moved_by_more_than_its_length() -> None:
    plain, rule = (Timing(every=None, n_decisions=20, early_decisions=early) for early in (0, 7))
    assert fitting_horizon(50, plain, rule) == 134  # twice 50 is not far enough
    assert (count_decisions(134, plain), count_decisions(134, rule)) == (20, 27)


@pytest.mark.parametrize("total_steps", [50, 61, 300, 777, 2000])
def test_fitting_horizons_are_near(total_steps: int) -> None:
    fitted = fitting_horizon(total_steps, default_spec().timing)
    assert count_decisions(fitted, default_spec().timing) == 26
    assert abs(fitted - total_steps) <= max(10, 0.02 * total_steps)  # half of 20 decisions, or the early ones' rounding


def test_a_rate_that_is_far_too_high_is_rolled_back_and_divided() -> None:
    env = make(8, ("mlp", "quadratic"))
    _, infos = env.reset(seed=4)
    rolled_back = np.zeros(8, dtype=bool)
    for _ in range(10):
        before = infos["lr"]
        observation, *_, infos = env.step(np.full((8, 1), 2.0))
        now = infos["rolled_back"]
        rolled_back |= now
        signal = observation[:, env.control_spec.signals.index("rollback_memory")]
        assert (signal[now] == 1.0).all()
        assert np.isfinite(observation).all()
        low = np.minimum(before * 100, 10**1.5)
        assert infos["lr"][now] == pytest.approx((low / 5)[now], rel=1e-5) or (infos["lr"][now] < low[now]).all()
    assert rolled_back.all()
    final = play(env, -0.2)[-1]
    assert np.isfinite(final[4]["score_loss"]).all()


def test_a_first_interval_that_is_undone_leaves_no_validation_loss_and_a_guard_that_has_not_begun() -> None:
    env = make(16, ("mlp",), initial_lr=(1e-3, 1e3), no_validation=0.0, some_validation=0.0)
    _, infos = env.reset(seed=1)
    bad = infos["rolled_back"]
    assert 0 < bad.sum() < 16
    runs = env._runs
    assert runs is not None
    assert np.array_equal(np.isnan(runs.state.summary.initial_val_loss), bad)
    assert [guard.has_begun for guard in runs._guards] == (~bad).tolist()
    *_, infos = env.step(np.full((16, 1), 0.0))
    assert np.isfinite(runs.state.summary.initial_val_loss[bad & ~infos["rolled_back"]]).all()


def test_validation_is_not_reported_by_those_that_have_none() -> None:
    env = make(64, ("quadratic",), no_validation=0.5, some_validation=0.25)
    env.reset(seed=0)
    columns = [env.control_spec.signals.index(name) for name in ("has_val_loss", "val_loss_log_ratio_start")]
    told = np.stack([step[0][:, columns] for step in play(env)])
    shares = told[:, :, 0].mean(0)
    assert set(shares[shares < 0.2]) == {0.0}
    assert (shares == 1.0).any()
    assert ((shares > 0.2) & (shares < 0.8)).any()
    assert not told[:, shares == 0.0].any()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_envs": 0}, "num_envs is 0; expected a number of runs of 1 or more"),
        ({"families": "mlp"}, "families 'mlp'; expected a sequence of names"),
        ({"families": ()}, "families is empty"),
        ({"families": ("mpl",)}, "did you mean 'mlp'?"),
        ({"horizons": (50, 60)}, "unknown option 'horizons' of the environment; known: families, runs_per_task"),
        ({"horizon": (20, 60)}, "horizon is (20, 60); expected two numbers in order, 50 or more"),
        ({"initial_lr": (1e-1, 1e-5)}, "initial_lr is (0.1, 1e-05)"),
        ({"no_validation": 0.8, "some_validation": 0.3}, "expected shares of 1"),
        ({"spec": ControlSpec(knobs=("weight_decay",))}, "batches of runs need 'lr' among them"),
        (
            {"spec": ControlSpec(knobs=("lr", "beta2"))},
            "the knob 'beta2' is not known to batches of runs, which have lr, weight_decay, momentum, optimizer,",
        ),
        ({"spec": ControlSpec(turns=True, masks=True)}, "turns and masks together are not known to batches of runs"),
        (
            {"spec": ControlSpec(("lr", "batch_size"), {"batch_size": {"rate_scaling": "sqrt"}})},
            "rate_scaling of the knob 'batch_size' is not known to batches of runs",
        ),
        ({"spec": ControlSpec(knob_options={"lr": {"hold_decay": True}})}, "hold_decay=True of the knob 'lr'"),
        ({"spec": ControlSpec(reward="accuracy_improvement")}, "batches of runs report no accuracy"),
    ],
)
def test_bad_input_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises((InputError, UnknownNameError)) as caught:
        TrainingVectorEnv(**{"num_envs": 4, **given})
    assert message in str(caught.value)


def test_bad_calls_are_refused() -> None:
    env = make()
    with pytest.raises(InputError, match=r"step\(\) before reset\(\)"):
        env.step(np.zeros((8, 1)))
    for seed in ([1, 2], -1, True):
        with pytest.raises(InputError, match="expected one whole number"):
            env.reset(seed=seed)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="this environment has none"):
        env.reset(options={"a": 1})
    with pytest.raises(InputError, match=r"begin\(\) was given 16 runs; expected num_envs=8"):
        env.begin(draw_episode(EpisodeOptions(families=("mlp",)), 16, default_spec().timing, seed=0))
    with pytest.raises(InputError, match="every=10"):
        TrainingVectorEnv(4, spec=ControlSpec(timing=Timing(every=10))).reset(seed=0)


def test_discrete_actions_and_two_knobs() -> None:
    spec = ControlSpec(
        knobs=("lr", "weight_decay"),
        actions=Actions("multiply", factors=(0.5, 1.0, 2.0)),
        timing=default_spec().timing,
        signals=("progress", "weight_decay_unit"),
        reward="log_improvement",
    )
    env = make(4, ("mlp",), spec=spec)
    env.reset(seed=0)
    assert env.single_action_space == gymnasium.spaces.MultiDiscrete([3, 3])
    lr = env.step(np.full((4, 2), 1))[4]["lr"]
    assert env.step(np.array([[0, 1], [1, 1], [2, 1], [1, 0]]))[4]["lr"].tolist() == pytest.approx(
        (lr * [0.5, 1, 2, 1]).tolist()
    )


def test_knobs_that_some_runs_have_not_are_refused_or_masked() -> None:
    spec = ControlSpec(
        knobs=("lr", "momentum", "dropout", "batch_size"),
        actions=Actions("multiply", factors=(0.5, 1.0, 2.0)),
        timing=default_spec().timing,
        signals=("dropout_unit", "batch_size_unit"),
    )
    with pytest.raises(InputError, match="the knob 'dropout' cannot act on a run of the family 'quadratic': its netwo"):
        make(4, ("quadratic",), spec=spec).reset(seed=0)
    env = make(8, ("mlp",), spec=dataclasses.replace(spec, masks=True), runs_per_task=1)
    _, infos = env.reset(seed=0)
    before = {name: infos[name].copy() for name in spec.knobs}
    is_masked = np.isnan(before["dropout"])
    assert 0 < is_masked.sum() < 8
    assert (before["batch_size"] == before["batch_size"].astype(int)).all()
    observation, *_, infos = env.step(np.full((8, 4), 2))
    assert np.array_equal(np.isnan(infos["dropout"]), is_masked)
    assert (observation[is_masked, 0] == 0).all()
    went = ~infos["rolled_back"]
    assert infos["batch_size"][went].tolist() == np.minimum(2 * before["batch_size"], 128)[went].tolist()
    raised = 1 - (1 - before["momentum"]) / 2
    np.testing.assert_allclose(infos["momentum"][went], np.minimum(raised, 0.999)[went], atol=1e-7)
    raised = np.minimum(before["dropout"] + 0.6 * np.log10(2), 0.7)
    np.testing.assert_allclose(infos["dropout"][went], raised[went], rtol=1e-12)


# ---- equal FLOPs ----------------------------------------------------------------------------------------------------


def test_twice_the_batch_is_half_the_steps_of_the_same_budget() -> None:
    spec = dataclasses.replace(
        default_spec(), knobs=("lr", "batch_size"), knob_options={"batch_size": {"low": 4, "high": 64}},
        actions=Actions("set"), signals=("progress", "interval_log_ratio"),
    )  # fmt: skip
    env = TrainingVectorEnv(4, ("mlp",), spec, runs_per_task=4, horizon=(400, 420), initial_lr=(1e-4, 1e-3))
    seed = next(seed for seed in range(50) if draw(env, seed)[0].tasks[0].batch_size == 16)
    observation, infos = env.reset(seed=seed)
    total = int(infos["total_steps"][0])
    runs = env._runs
    assert runs is not None
    (training,) = runs._trainings
    first = training.optimizer.steps[0, 0].item()
    assert infos["spent"].tolist() == [first] * 4
    sizes, terminated, progress = np.array([16.0, 32.0, 64.0, 8.0]), np.zeros(4, dtype=bool), []
    while not terminated.any():
        rates = infos["lr"]
        observation, _, terminated, _, infos = env.step(np.stack([rates, sizes], axis=1))
        assert not infos["rolled_back"].any()
        progress.append(observation[:, 0])
    steps = training.optimizer.steps[:, 0].numpy()
    np.testing.assert_array_equal(infos["spent"], first + (steps - first) * sizes / 16)
    left = total - infos["spent"]
    assert ((left >= 0) & (left < sizes / 16)).all()
    # So it is half, a quarter, and twice the steps after the first interval, to one.
    np.testing.assert_allclose(steps - first, (total - first) * 16 / sizes, atol=1)
    # And all are everywhere at the same share of their budget, to one step.
    apart = np.ptp(np.array(progress), axis=1)
    assert apart.max() < 4 / total


def test_a_run_whose_step_costs_more_than_an_interval_sleeps_until_it_is_paid_for() -> None:
    spec = dataclasses.replace(
        default_spec(), knobs=("lr", "batch_size"), knob_options={"batch_size": {"low": 4, "high": 64}},
        actions=Actions("set"), signals=("progress", "train_loss_log_ratio", "interval_loss_log_ratio"),
        reward="log_improvement",
    )  # fmt: skip
    env = TrainingVectorEnv(2, ("mlp",), spec, runs_per_task=2, horizon=(60, 80), initial_lr=(1e-4, 1e-3))
    seed = next(seed for seed in range(50) if draw(env, seed)[0].tasks[0].batch_size == 8)
    _, infos = env.reset(seed=seed)
    runs = env._runs
    assert runs is not None
    (training,) = runs._trainings
    observation, reward, *_, infos = env.step(np.stack([infos["lr"], [8.0, 64.0]], axis=1))
    assert infos["spent"].tolist() == [4, 10]  # a step of 64 costs eight of 8, and an early interval is two
    n_slept = 0
    while True:
        weights = training.parameters[1].clone()
        asked = [8.0, 32.0] if n_slept else [8.0, 4.0]
        observation, reward, *_, infos = env.step(np.stack([infos["lr"], asked], axis=1))
        if not infos["asleep"][1]:
            break
        n_slept += 1
        assert torch.equal(training.parameters[1], weights)
        assert infos["batch_size"][1] == 4  # as asked after its step; what is asked while it sleeps counts for nothing
        assert observation[1].tolist() == [10 / infos["total_steps"][1], 0.0, 0.0]
        assert reward[1] == 0.0
    assert n_slept == 3
    assert infos["spent"].tolist() == [12, 12]


def test_all_runs_may_sleep_at_once() -> None:
    spec = dataclasses.replace(
        default_spec(), knobs=("lr", "batch_size"), knob_options={"batch_size": {"low": 4, "high": 64}},
        actions=Actions("set"),
    )  # fmt: skip
    env = TrainingVectorEnv(2, ("mlp",), spec, runs_per_task=2, horizon=(60, 80), initial_lr=(1e-4, 1e-3))
    seed = next(seed for seed in range(50) if draw(env, seed)[0].tasks[0].batch_size == 8)
    _, infos = env.reset(seed=seed)
    terminated, slept = np.zeros(2, dtype=bool), []
    while not terminated.any():
        observation, reward, terminated, _, infos = env.step(np.stack([infos["lr"], [64.0, 64.0]], axis=1))
        slept.append(infos["asleep"].tolist())
        assert np.isfinite(observation).all()
    assert [True, True] in slept
    assert sorted(reward.tolist()) == [-0.5, 0.5]  # they are ranked at the end, sleeping or not
    assert (infos["spent"] > infos["total_steps"] - 8).all()


def draw(env: TrainingVectorEnv, seed: int) -> list[Batch]:
    return draw_episode(env.options, env.num_envs, env.control_spec.timing, derive_seed(seed, "episode", 0, "of runs"))
