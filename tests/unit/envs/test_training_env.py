"""One run as an environment: what Gymnasium and SB3 ask of one, and that it is the controller of use."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.utils.seeding import np_random

import trimtab.envs  # registers
from trimtab.agents.base import Actions, Agent, Needs, Timing
from trimtab.controller import Controller
from trimtab.envs.training import TrainingEnv
from trimtab.errors import InputError, UnknownNameError
from trimtab.safety import Safety
from trimtab.spec import ControlSpec
from trimtab.training.loop import TrainingLoop

pytestmark = pytest.mark.usefixtures("unwatched")

FACTORS = ControlSpec(
    signals=("progress", "val_loss_log_ratio"),
    actions=Actions("multiply", factors=(0.5, 1.0, 2.0)),
    timing=Timing(every=10),
)


def make(**given: Any) -> TrainingEnv:
    env = gymnasium.make(trimtab.envs.TRAINING, **{"task": "digits-mlp", "scale": "smoke", **given}).unwrapped
    assert isinstance(env, TrainingEnv)
    return env


def play(env: TrainingEnv, seed: int | None, moves: list[float] | None = None) -> list[tuple[Any, ...]]:
    """An episode: (observation, reward, terminated, truncated, infos) of every step, that of the reset first."""
    observation, infos = env.reset(seed=seed)
    steps = [(observation, None, False, False, infos)]
    while not steps[-1][2]:
        move = 0.0 if moves is None else moves[(len(steps) - 1) % len(moves)]
        steps.append(env.step(np.array([move])))
    return steps


def weights(env: TrainingEnv) -> torch.Tensor:
    assert env.controller is not None
    model = env.controller.state.model
    assert model is not None
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("spec", [None, pytest.param(FACTORS, id="factors")])
@pytest.mark.parametrize("check", ["gymnasium", "stable-baselines3"])
# What they recommend of an action space; a move in decades is not within [-1, 1].
@pytest.mark.filterwarnings("ignore:.*symmetric and normalized", "ignore:.*dtype float64")
def test_checkers_find_no_fault(spec: ControlSpec | None, check: str) -> None:
    env = make(spec=spec)
    if check == "gymnasium":
        check_env(env)
    else:
        from stable_baselines3.common import env_checker

        env_checker.check_env(env)
    assert env.observation_space.contains(env.reset(seed=0)[0])


def test_the_name_with_its_module_needs_no_import() -> None:
    env = gymnasium.make(f"trimtab.envs:{trimtab.envs.TRAINING}", task="digits-mlp", knobs=("lr",), data_dir=None)
    assert isinstance(env.unwrapped, TrainingEnv)
    assert env.unwrapped.control_spec.reward == "log_improvement"


def test_the_entry_point_registers() -> None:
    points = [p for p in metadata.entry_points(group="gymnasium.envs") if p.value.startswith("trimtab")]
    if not points:
        pytest.skip("trimtab is not installed here with its entry points")
    assert points[0].load() is trimtab.envs.register


def test_an_episode_ends_with_the_budget_by_termination() -> None:
    steps = play(make(), 0)
    last = steps[-1][4]
    assert [step[4]["optimizer_steps"] for step in steps][:7] == [2, 4, 6, 8, 10, 12, 14]
    assert last["optimizer_steps"] == 60
    assert last["final_val_loss"] == last["val_loss"]
    assert last["best_val_loss"] == min(step[4]["val_loss"] for step in steps)
    assert last["lr"] == 0.0  # the end of the cosine
    assert not any(step[3] for step in steps)
    assert not any("final_val_loss" in step[4] for step in steps[:-1])
    # log(L_before / L), summed over an episode, is the log of the first loss over the last.
    total = sum(step[1] for step in steps[1:])
    assert total == pytest.approx(np.log(steps[0][4]["val_loss"] / last["val_loss"]), rel=1e-9)


def test_an_action_moves_the_rate_and_changes_the_weights() -> None:
    found = []
    for move in (0.0, 1.0):
        env = make(lr=1e-4)
        env.reset(seed=0)
        start = weights(env)
        infos = env.step(np.array([move]))[4]
        found.append((start, weights(env), infos["lr"]))
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[0][1], found[1][1])
    assert found[1][2] == pytest.approx(10 * found[0][2], rel=1e-12)
    ratio = (found[1][1] - found[1][0]).norm() / (found[0][1] - found[0][0]).norm()
    assert 8 < float(ratio) < 12  # Adam's first updates are as long as the rate says


def test_a_seed_gives_the_same_episode_to_the_bit_and_without_one_it_goes_on() -> None:
    env = make()
    first, second = play(env, 3, [0.3, -0.1]), play(env, None, [0.3, -0.1])
    twin = make()
    again, other = play(twin, 3, [0.3, -0.1]), play(twin, None, [0.3, -0.1])
    for mine, theirs in ((first, again), (second, other)):
        assert np.array_equal([step[0] for step in mine], [step[0] for step in theirs])
        assert [step[1:] for step in mine] == [step[1:] for step in theirs]
    assert torch.equal(weights(env), weights(twin))
    assert first[0][4]["lr"] != second[0][4]["lr"]


def test_initial_rates_are_log_uniform_unless_one_is_given() -> None:
    env = make(spec=ControlSpec(timing=Timing(every=10)))  # over a constant base
    rates = np.log10([env.reset(seed=0 if i == 0 else None)[1]["lr"] for i in range(60)])
    assert rates.min() > -5
    assert rates.max() < -1
    assert np.histogram(rates, bins=4, range=(-5, -1))[0].min() >= 6  # 15 on average, standard deviation 3.4
    assert make(spec=ControlSpec(timing=Timing(every=10)), lr=0.02).reset(seed=0)[1]["lr"] == 0.02


class Given(Agent):
    """Hands in one action after another, whatever it sees."""

    name = "given"
    needs = Needs()

    def __init__(self, actions: list[float]) -> None:
        self.actions = actions
        self.seen: list[np.ndarray] = []

    def predict(self, observation, state=None, episode_start=None, deterministic=False):  # type: ignore[no-untyped-def]
        index = 0 if state is None else int(state[0])
        if episode_start is None:  # not the one with which a controller tries the agent out
            self.seen.append(observation[0])
        return np.array([[self.actions[index % len(self.actions)]]]), (index + 1,)


@pytest.mark.parametrize(
    ("lr", "moves"), [(1e-3, [0.5, -0.3, 0.0]), (0.3, [1.5, 0.5, 0.0])], ids=["ordinary", "rolled back"]
)
def test_it_is_the_controller_of_use_with_the_same_actions(lr: float, moves: list[float]) -> None:
    env = make(lr=lr)
    steps = play(env, 7, moves)
    assert env.controller is not None
    n_rollbacks = env.controller.n_rollbacks
    assert (n_rollbacks > 0) == (lr == 0.3)
    assert sum(step[4]["rolled_back"] for step in steps) == n_rollbacks

    run = int(np_random(7)[0].integers(1 << 62))
    loop = TrainingLoop(env.task.replace(lr=lr), env.task.load(None), seed=run)
    agent = Given(moves)
    controller = Controller(
        agent, optimizer=loop.optimizer, model=loop.model, total_steps=loop.total_steps, spec=env.control_spec
    )
    rewards: list[float | None] = []
    while not loop.is_over():
        is_due = controller.is_due
        loss = loop.step()
        if is_due:
            controller.report(loop.evaluate("val")["loss"])
        controller.step(loss)
        if is_due:
            rewards.append(controller.last_reward)
    seen = [*agent.seen, np.array(controller.last_observation)]  # at the end nobody is asked
    np.testing.assert_allclose([step[0] for step in steps], seen, rtol=0, atol=1e-12)
    assert [step[1] for step in steps[1:]] == rewards[1:]
    assert [d.to_json() for d in env.controller.decisions] == [d.to_json() for d in controller.decisions]
    for mine, theirs in zip(env.controller.state.model.parameters(), loop.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_an_episode_that_the_guard_gives_up_is_over() -> None:
    env = make(lr=30.0, safety=Safety(cut=1.01, max_rollbacks=1))
    steps = play(env, 0, [2.0])
    assert [step[4]["rolled_back"] for step in steps] == [True, True]
    assert steps[-1][2:4] == (True, False)
    assert steps[-1][4]["optimizer_steps"] < 60
    # Below all that the run was rewarded with before, which is nothing: 0 and the penalty.
    assert [step[1] for step in steps[1:]] == [-1.0]
    assert np.isfinite(steps[-1][4]["final_val_loss"])
    with pytest.raises(InputError, match="after the end of the episode"):
        env.step(np.array([0.0]))
    assert env.reset(seed=1)[1]["optimizer_steps"] == 2


def test_a_decision_each_epoch_and_two_knobs() -> None:
    task = make().task.replace(optimizer="adamw", weight_decay=0.1)
    spec = ControlSpec(
        knobs=("lr", "weight_decay"), actions=Actions("multiply", factors=(0.5, 1.0)), timing=Timing(every="epoch")
    )
    env = make(task=task, spec=spec, lr=1e-3)
    assert env.action_space == gymnasium.spaces.MultiDiscrete([2, 2])
    _, infos = env.reset(seed=0)
    assert infos["optimizer_steps"] == 33  # 1077 samples in batches of 32
    assert (infos["lr"], infos["weight_decay"]) == (1e-3, 0.1)
    infos = env.step(np.array([0, 1]))[4]
    assert (infos["optimizer_steps"], infos["lr"], infos["weight_decay"]) == (60, 5e-4, 0.1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task": "digits-mpl"}, "did you mean 'digits-mlp'?"),
        ({"scale": "tiny"}, "'tiny'"),
        ({"lr": 0.0}, "lr is 0.0; expected a positive number, or None to draw one in each episode"),
        ({"lr": "high"}, "lr is 'high'"),
        ({"knobs": "lr"}, "knobs 'lr'; expected a sequence of names, such as ('lr',)"),
        ({"knobs": ("learning_rate",)}, "did you mean 'lr'?"),
        ({"knobs": ("weight_decay",)}, "which is not among the knobs ('weight_decay',)"),
        ({"knobs": ("lr", "weight_decay"), "spec": FACTORS}, "beside a spec with the knobs ('lr',); give either"),
        ({"spec": "default"}, "spec is a str; expected a ControlSpec or None"),
        ({"spec": ControlSpec(reward="score_rank")}, "ranks the runs of one task, and here one run is alone"),
        ({"task": "mnist-cnn", "data_dir": "nowhere"}, "nowhere"),
    ],
)
def test_bad_input_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises((InputError, UnknownNameError)) as caught:
        TrainingEnv(**given)
    assert message in str(caught.value)


def test_a_task_without_decay_begins_at_the_least_that_the_knob_can_write() -> None:
    env = make(knobs=("lr", "weight_decay"))
    _, infos = env.reset(seed=0)
    assert infos["weight_decay"] == env.unwrapped.control_spec.make_knobs()[1].low
    assert infos["weight_decay"] == 1e-6


def test_what_an_action_asks_for_is_decoded_within_the_bounds() -> None:
    env = make(knobs=("lr", "optimizer", "weight_decay"), lr=1e-3)
    inner = env.unwrapped
    assert inner.hyperparameters == ("lr", "optimizer", "weight_decay")
    assert inner.no_change_action.tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(InputError, match=r"decode\(\) before reset\(\)"):
        inner.decode([0.0, 0.0, 0.0])
    env.reset(seed=0)
    rate, optimizer, decay = inner.decode([0.5, 0.0, 2.0])
    assert rate == pytest.approx(1e-3 * 10**0.5)
    assert optimizer == "adam"
    assert decay == pytest.approx(1e-4)
    assert inner.decode([-2.0, 0.0, -2.0])[2] == 1e-6
    with pytest.raises(InputError, match="expected finite numbers of shape"):
        inner.decode([0.0])


def test_bad_calls_are_refused() -> None:
    env = make()
    with pytest.raises(InputError, match=r"step\(\) before reset\(\)"):
        env.step(np.array([0.0]))
    with pytest.raises(InputError, match="this environment has none"):
        env.reset(options={"a": 1})
    with pytest.raises(InputError, match="would fall on the end of the budget of 60 optimizer steps"):
        make(spec=ControlSpec(timing=Timing(every=70))).reset(seed=0)
    with pytest.raises(InputError, match="'dropout'"):  # the network has none
        make(knobs=("lr", "dropout")).reset(seed=0)
    env.reset(seed=0)
    for action in (np.array([np.nan]), np.zeros(2)):
        with pytest.raises(InputError, match="expected finite numbers of shape"):
            env.step(action)
    factors = make(spec=FACTORS)
    factors.reset(seed=0)
    with pytest.raises(InputError, match="expected an index into the factors"):
        factors.step(3)
    before = weights(factors)
    factors.step(2)  # a wrong action was no step
    assert not torch.equal(before, weights(factors))


def test_knobs_of_every_kind_and_those_that_the_task_has_not() -> None:
    spec = ControlSpec(
        knobs=("lr", "optimizer", "batch_size", "accumulation", "dropout"),
        actions=Actions("multiply", factors=(0.5, 1.0, 2.0)),
        timing=Timing(every=5),
        masks=True,
    )
    env = make(spec=spec)
    assert env.action_space == gymnasium.spaces.MultiDiscrete([3] * 5)
    _, infos = env.reset(seed=0)
    assert infos["masked"] == ["dropout"]
    assert "dropout" not in infos
    before = infos
    *_, infos = env.step(np.array([1, 2, 2, 2, 2]))
    assert infos["optimizer"] == before["optimizer"] + 1
    assert (infos["batch_size"], infos["accumulation"]) == (2 * before["batch_size"], 2 * before["accumulation"])
    for _ in range(3):
        *_, infos = env.step(np.array([1, 0, 1, 1, 1]))
    assert infos["optimizer"] == 0.0
    assert np.isfinite(infos["val_loss"])
