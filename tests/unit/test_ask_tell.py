"""HyperParameterOptimizer: the write-up's usage, what it answers, that it leaves the environment alone, its files."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

import trimtab
import trimtab.envs
from trimtab import HyperParameterOptimizer
from trimtab.agents.base import Actions
from trimtab.errors import BrainError, InputError, UnknownNameError
from trimtab.experience import ExperienceStore
from trimtab.storage import load_state, save_state

REAL = os.environ.get("TRIMTAB_DATA")

CONFIG: dict[str, Any] = {
    "learning_rate": 3e-4,
    "n_steps": 1024,
    "batch_size": 64,
    "gamma": 0.99,
    "train_frequency_min": 5,
    "train_frequency_max": 25,
    "training_timesteps_min": 5000,
    "training_timesteps_max": 10000,
    "intervention_threshold": 0.4,
    "brain_save_dir": "models/rl_brains",
}
QUICK = {"training_timesteps_min": 64, "training_timesteps_max": 128}


class Foreign(gymnasium.Env[Any, Any]):
    """Four states of which one can be recognised; it does not know us, and forbids being stepped or reset."""

    def __init__(self, action_space: Any = None, observation_space: Any = None) -> None:
        self.observation_space = observation_space or spaces.Box(-np.inf, np.inf, (4,))
        self.action_space = action_space or spaces.MultiDiscrete([3, 3])

    def reset(self, **_: Any) -> Any:
        raise AssertionError("reset")

    def step(self, _: Any) -> Any:
        raise AssertionError("step")


class Named(Foreign):
    hyperparameters = ("lr", "dropout")

    def decode(self, action: Any) -> list[float]:
        return [float(10.0 ** -action[0]), 0.1 * float(action[1])]


def play(tuner: HyperParameterOptimizer, n: int, seed: int, noise: float = 0.1) -> list[bool]:
    """n decisions in which intervening gives 1 in state 2 and costs 0.5 elsewhere; which of them were right."""
    rng = np.random.default_rng(seed)

    def observe(state: int) -> Any:
        return np.eye(4)[state] + 0.05 * rng.normal(size=4)

    state = int(rng.integers(4))
    seen, right = observe(state), []
    for _ in range(n):
        acts = tuner.optimize_hyperparameters(seen) is not None
        reward = (1.0 if state == 2 else -0.5) * acts + noise * rng.normal()
        right.append(acts == (state == 2))
        state = int(rng.integers(4))
        seen = observe(state)
        tuner.learn_from_intervention(seen, reward, acts)
    return right


def judged(tuner: HyperParameterOptimizer, seed: int) -> float:
    """Share of right decisions without exploration, on fresh observations."""
    rng = np.random.default_rng(seed)
    right = []
    for state in range(4):
        for _ in range(25):
            answer = tuner.optimize_hyperparameters(np.eye(4)[state] + 0.05 * rng.normal(size=4), deterministic=True)
            right.append((answer is not None) == (state == 2))
    return float(np.mean(right))


def test_the_usage_of_the_write_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    env = Foreign()
    tuner = HyperParameterOptimizer(env, CONFIG)
    observation = np.zeros(4, dtype=np.float32)
    answers = []
    for epoch in range(50):
        hyperparams = tuner.optimize_hyperparameters(observation)
        answers.append(hyperparams)
        tuner.learn_from_intervention(observation, reward=-1.0 / (epoch + 1), intervened=hyperparams is not None)
    given = [answer for answer in answers if answer is not None]
    assert 0 < len(given) < 50
    assert all(list(answer) == ["action_0", "action_1"] for answer in given)
    assert all(isinstance(value, int) and 0 <= value < 3 for answer in given for value in answer.values())
    assert tuner.save_brain() == Path("models/rl_brains/latest.safetensors")
    tuner.load_brain()


@pytest.mark.parametrize("agent", ["ppo", "dqn"])
@pytest.mark.parametrize(
    ("space", "count"), [(spaces.Discrete(4), 1), (spaces.MultiDiscrete([2, 5, 3]), 3), (spaces.MultiBinary(2), 2)]
)
def test_threshold_0_always_intervenes_and_1_never(agent: str, space: Any, count: int) -> None:
    for threshold, always in ((0, True), (1, False), (0.0, True), (1.0, False)):
        tuner = HyperParameterOptimizer(Foreign(space), {**QUICK, "agent": agent, "intervention_threshold": threshold})
        for _ in range(40):
            answer = tuner.optimize_hyperparameters(np.ones(4))
            assert (answer is not None) == always
            if answer is not None:
                assert list(answer) == [f"action_{n}" for n in range(count)]
                assert space.contains(tuner.last_action)
            tuner.learn_from_intervention(np.ones(4), -1.0, answer is not None)
        assert tuner.threshold == threshold


def test_names_and_values_are_the_environments_own() -> None:
    tuner = HyperParameterOptimizer(Named(), {**QUICK, "intervention_threshold": 0})
    answer = tuner.optimize_hyperparameters(np.zeros(4))
    first, second = tuner.last_action
    assert answer == {"lr": 10.0 ** -float(first), "dropout": 0.1 * float(second)}


def test_a_continuous_action_stays_inside_of_its_bounds() -> None:
    space = spaces.Box(np.array([1e-5, 0.1]), np.array([1e-1, 0.7]), dtype=np.float64)
    tuner = HyperParameterOptimizer(Foreign(space), {**QUICK, "intervention_threshold": 0})
    for _ in range(100):
        answer = tuner.optimize_hyperparameters(np.zeros(4))
        assert answer is not None
        assert 1e-5 <= answer["action_0"] <= 1e-1
        assert 0.1 <= answer["action_1"] <= 0.7
        tuner.learn_from_intervention(np.zeros(4), 0.0, True)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(4),
        spaces.Dict({"loss": spaces.Box(-9, 9, (2,)), "phase": spaces.Discrete(2)}),
        spaces.Box(0, 255, (2, 3), np.uint8),
    ],
)
def test_observations_are_flattened(space: Any) -> None:
    tuner = HyperParameterOptimizer(Foreign(observation_space=space), QUICK)
    for seed in range(10):
        space.seed(seed)
        answer = tuner.optimize_hyperparameters(space.sample())
        tuner.learn_from_intervention(space.sample(), 0.0, answer is not None)
    assert tuner.learner.batch.observations.shape == (10, spaces.flatdim(space))


@pytest.mark.parametrize(
    ("config", "error", "text"),
    [
        ({"n_step": 10}, UnknownNameError, "unknown key of the configuration 'n_step'.*did you mean 'n_steps'"),
        ({"intervention_threshold": 1.5}, InputError, "intervention_threshold is 1.5; expected a number in"),
        ({"brain_save_dir": 3}, InputError, "brain_save_dir is 3; expected a folder"),
        ({"experience_dir": ""}, InputError, "experience_dir is ''; expected a folder"),
        ({"seed": -1}, InputError, "seed is -1; expected a whole number of 0 or more"),
        ({"seed": 1.0}, InputError, "seed is 1.0; expected a whole number of 0 or more"),
    ],
)
def test_a_wrong_configuration_is_one_error(config: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        HyperParameterOptimizer(Foreign(), config)


def test_a_wrong_environment_is_one_error() -> None:
    with pytest.raises(InputError, match="env is a int whose observation_space is None; expected a Gymnasium"):
        HyperParameterOptimizer(3)
    wrong = Foreign()
    wrong.hyperparameters = "lr"  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="the environment's `hyperparameters` are 'lr'; expected a sequence of names"):
        HyperParameterOptimizer(wrong)
    wrong.hyperparameters = ("lr", "lr")  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="expected different names"):
        HyperParameterOptimizer(wrong)
    wrong.hyperparameters = ("lr",)  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"names 1 hyperparameters \(lr\), and its action has 2 values"):
        HyperParameterOptimizer(wrong)
    late = Named()
    late.decode = lambda action: [1.0]  # type: ignore[method-assign]
    tuner = HyperParameterOptimizer(late, {"intervention_threshold": 0, "min_distance": 5})
    for _ in range(2):  # an answer that could not be given has not been given
        with pytest.raises(InputError, match=r"names 2 hyperparameters \(lr, dropout\), and its action has 1 values"):
            tuner.optimize_hyperparameters(np.zeros(4))
    nothing = Foreign(spaces.MultiDiscrete([1, 1]))
    nothing.no_change_action = np.array([0, 0])  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="has nothing to choose but no change"):
        HyperParameterOptimizer(nothing)


def test_what_is_told_must_belong_to_what_was_asked() -> None:
    tuner = HyperParameterOptimizer(Foreign(), {**QUICK, "intervention_threshold": 1})
    with pytest.raises(InputError, match=r"learn_from_intervention\(\) before optimize_hyperparameters\(\); ask first"):
        tuner.learn_from_intervention(np.zeros(4), 0.0, False)
    assert tuner.optimize_hyperparameters(np.zeros(4)) is None
    with pytest.raises(InputError, match="intervened is True, but the answer was None"):
        tuner.learn_from_intervention(np.zeros(4), 0.0, True)
    with pytest.raises(InputError, match="intervened is 'no'; expected True or False"):
        tuner.learn_from_intervention(np.zeros(4), 0.0, "no")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="reward is 'good'; expected one number"):
        tuner.learn_from_intervention(np.zeros(4), "good", False)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"does not fit Box.*5 numbers where the space has 4"):
        tuner.learn_from_intervention(np.zeros(5), 0.0, False)
    tuner.learn_from_intervention(np.zeros(4), 0.0, False)
    assert len(tuner.learner.batch.rewards) == 1


def test_an_answer_that_was_not_followed_is_no_intervention() -> None:
    tuner = HyperParameterOptimizer(Foreign(), {**QUICK, "intervention_threshold": 0})
    for followed in (True, False):
        assert tuner.optimize_hyperparameters(np.zeros(4)) is not None
        tuner.learn_from_intervention(np.zeros(4), 0.0, followed)
    assert tuner.learner.batch.intervened.tolist() == [True, False]


def test_a_run_that_blows_up_is_not_the_tuners_end() -> None:
    tuner = HyperParameterOptimizer(Foreign(), {**QUICK, "train_frequency_min": 5, "train_frequency_max": 5})
    with pytest.warns(RuntimeWarning, match="not finite; they count as average ones"):
        tuner.optimize_hyperparameters(np.full(4, math.nan))
    for seen, reward in ((math.nan, 1.0), (math.inf, math.nan), (0.0, -math.inf)) * 6:
        answer = tuner.optimize_hyperparameters(np.full(4, seen))
        tuner.learn_from_intervention(np.full(4, -seen), reward, answer is not None)
    assert np.isfinite(tuner.learner.batch.rewards).all()
    assert np.isfinite(tuner.learner.batch.observations).all()
    tuner.optimize_hyperparameters(np.zeros(4))
    assert 0 < tuner.probability < 1


def test_burn_in_and_distance() -> None:
    config = {**QUICK, "intervention_threshold": 0, "burn_in": 2, "min_distance": 3}
    tuner = HyperParameterOptimizer(Foreign(), config)
    acted = []
    for turn in range(12):
        answer = tuner.optimize_hyperparameters(np.zeros(4))
        acted.append(answer is not None)
        tuner.learn_from_intervention(np.zeros(4), 0.0, answer is not None, terminated=turn == 6)
    assert acted == [False, False, True, False, False, True, False, False, False, True, False, False]


@pytest.mark.parametrize("agent", ["ppo", "dqn"])
def test_a_saved_brain_goes_on_as_if_never_stopped(agent: str, tmp_path: Path) -> None:
    config = {**CONFIG, **QUICK, "agent": agent, "brain_save_dir": str(tmp_path), "seed": 5}
    one = HyperParameterOptimizer(Foreign(), config)
    play(one, 90, 1)
    one.save_brain()
    two = HyperParameterOptimizer(Foreign(), config)
    two.load_brain()
    assert play(one, 60, 2) == play(two, 60, 2)
    first, second = one.learner.state_dict(), two.learner.state_dict()
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]) if isinstance(value, torch.Tensor) else value == second[key]


def test_the_best_brain_is_kept_beside_the_latest(tmp_path: Path) -> None:
    tuner = HyperParameterOptimizer(Foreign(), {**QUICK, "brain_save_dir": tmp_path, "intervention_threshold": 1})
    for reward in (1.0, -9.0):
        for _ in range(10):
            tuner.optimize_hyperparameters(np.zeros(4))
            tuner.learn_from_intervention(np.zeros(4), reward, False)
        tuner.save_brain()
    assert len(load_state(tmp_path / "best.safetensors")["learner"]["batch.rewards"]) == 10
    assert len(load_state(tmp_path / "latest.safetensors")["learner"]["batch.rewards"]) == 20


def test_broken_and_foreign_brains_are_refused_and_change_nothing(tmp_path: Path) -> None:
    config = {**QUICK, "brain_save_dir": tmp_path}
    tuner = HyperParameterOptimizer(Foreign(), config)
    with pytest.raises(BrainError, match=r"latest\.safetensors"):
        tuner.load_brain()
    play(tuner, 40, 0)
    path = tuner.save_brain()
    state = load_state(path)
    whole = path.read_bytes()
    before = tuner.learner.state_dict()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BrainError, match="cannot read the state in"):
        tuner.load_brain()
    for change, text in (
        ({"format": "other"}, "is no tuner; expected a file that HyperParameterOptimizer.save_brain wrote"),
        ({"version": 2}, "has version 2, this trimtab reads version 1; upgrade trimtab"),
        ({"counts": [1]}, "it is torn or foreign, save it anew"),
        ({"learner": {}}, "tuner: the state lacks or has beyond what is expected"),
        ({"learner": {**state["learner"], "gate.weights0": torch.zeros(2)}}, "gate: weights0 has the shape"),
        ({"learner": {**state["learner"], "batch.actions": torch.zeros(3, 9)}}, "batch.actions has the shape"),
        ({"spaces": {**state["spaces"], "actions": "Discrete(7)"}}, r"was learned with actions Discrete\(7\)"),
        ({"config": {"agent": "dqn"}}, "was learned with agent dqn, this tuner has ppo"),
    ):
        save_state(path, {**state, **change})
        with pytest.raises(BrainError, match=text):
            tuner.load_brain()
    after = tuner.learner.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items() if isinstance(v, torch.Tensor))


def test_earlier_runs_are_learned_from_and_every_run_is_added(tmp_path: Path) -> None:
    config = {**QUICK, "experience_dir": tmp_path, "brain_save_dir": tmp_path / "brains", "seed": 1}
    first = HyperParameterOptimizer(Foreign(), config)
    play(first, 30, 0)
    first.save_brain()
    first.save_brain()  # nothing new: no second file
    play(first, 20, 1)
    first.close()
    store = ExperienceStore(tmp_path)
    assert [header.transitions for header in store.headers(first.fingerprint)] == [30, 20]
    second = HyperParameterOptimizer(Foreign(), config)
    assert second.learner.batch.rewards.tolist() == first.learner.batch.rewards.tolist()
    assert second.learner.gate.n_decisions == 50
    assert second.learner.n_trainings == 1
    second.optimize_hyperparameters(np.zeros(4))
    second.learn_from_intervention(np.zeros(4), 0.0, False, terminated=True)
    assert [header.transitions for header in store.headers(first.fingerprint)] == [30, 20, 1]
    other = HyperParameterOptimizer(Foreign(spaces.Discrete(3)), config)
    assert other.fingerprint != first.fingerprint
    assert not len(other.learner.batch.rewards)


def test_cheap_tasks_fill_the_experience() -> None:
    env = gymnasium.make("trimtab/Training-v0", task="digits-mlp", scale="smoke", knobs=("lr", "weight_decay"), lr=1e-3)
    tuner = HyperParameterOptimizer(env, {**QUICK, "seed": 2})
    assert tuner.learn(env, 12) is tuner
    assert len(tuner.learner.batch.rewards) == 12
    with pytest.raises(InputError, match="the environment has no `no_change_action`"):
        HyperParameterOptimizer(Foreign(), QUICK).learn(Foreign(), 5)
    with pytest.raises(InputError, match="learn: the action_space is Discrete"):
        HyperParameterOptimizer(Foreign(), QUICK).learn(Foreign(spaces.Discrete(2)), 5)


def test_on_our_own_environment_a_decision_is_read_back_from_the_optimizer() -> None:
    env = gymnasium.make("trimtab/Training-v0", task="digits-mlp", scale="smoke", knobs=("lr", "weight_decay"), lr=1e-3)
    tuner = HyperParameterOptimizer(env, {**QUICK, "intervention_threshold": 0, "seed": 3})
    observation, _ = env.reset(seed=1)
    inner: Any = env.unwrapped
    while True:
        answer = tuner.optimize_hyperparameters(observation)
        assert answer is not None
        assert list(answer) == ["lr", "weight_decay"]
        observation, reward, terminated, _, infos = env.step(tuner.last_action)
        if not infos["rolled_back"]:
            assert infos["weight_decay"] == pytest.approx(answer["weight_decay"])
        tuner.learn_from_intervention(observation, float(reward), True, terminated=terminated)
        if terminated:
            break
    assert inner.controller.decisions[0].source == "agent"


def test_leaving_our_own_environment_alone_moves_nothing() -> None:
    env = gymnasium.make("trimtab/Training-v0", task="digits-mlp", scale="smoke", knobs=("lr", "weight_decay"), lr=1e-3)
    tuner = HyperParameterOptimizer(env, {"intervention_threshold": 1})
    observation, infos = env.reset(seed=1)
    first = infos["weight_decay"]
    assert first > 0  # the task has none: the knob begins at its lower bound
    for _ in range(4):
        assert tuner.optimize_hyperparameters(observation) is None
        observation, reward, _, _, infos = env.step(tuner.last_action)
        tuner.learn_from_intervention(observation, float(reward), False)
        assert infos["weight_decay"] == first


@pytest.mark.skipif(REAL is None, reason="TRIMTAB_DATA names no folder with the real sets")
def test_the_snippet_on_cifar10_is_read_back_knob_by_knob(tmp_path: Path) -> None:
    knobs = ("lr", "dropout", "weight_decay", "optimizer")
    env = gymnasium.make("trimtab/Training-v0", task="cifar10-cnn", scale="smoke", knobs=knobs, data_dir=REAL)
    tuner = HyperParameterOptimizer(env, {**CONFIG, "intervention_threshold": 0, "brain_save_dir": tmp_path, "seed": 0})
    observation, infos = env.reset(seed=0)
    n_stayed = 0
    over = False
    while not over:
        before, blind = infos["optimizer"], infos["rolled_back"]
        answer = tuner.optimize_hyperparameters(observation)
        assert answer is not None
        assert list(answer) == list(knobs)
        observation, reward, over, _, infos = env.step(tuner.last_action)
        tuner.learn_from_intervention(observation, float(reward), True, terminated=over)
        if blind or infos["rolled_back"]:
            continue
        assert infos["dropout"] == pytest.approx(answer["dropout"])
        assert ("sgd", "adam", "adamw")[int(infos["optimizer"])] == answer["optimizer"]
        if infos["optimizer"] == before:  # a switch converts rate and decay
            n_stayed += 1
            assert infos["weight_decay"] == pytest.approx(answer["weight_decay"])
    assert n_stayed >= 1


def test_with_one_seed_it_learns_where_to_act() -> None:
    tuner = HyperParameterOptimizer(Foreign(), {**CONFIG, "seed": 41})
    play(tuner, 200, 41)
    assert judged(tuner, 1) >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("agent", ["ppo", "dqn"])
def test_the_gate_acts_in_the_one_state_where_it_helps_and_nowhere_else(agent: str) -> None:
    """Five seeds that nothing was chosen by; exploration included in the last hundred decisions."""
    shares, last = [], []
    for seed in range(50, 55):
        tuner = HyperParameterOptimizer(Foreign(), {**CONFIG, "agent": agent, "seed": seed})
        right = play(tuner, 500, seed)
        last.append(float(np.mean(right[-100:])))
        shares.append(judged(tuner, seed))
    assert min(shares) >= 0.9, shares
    assert float(np.mean(last)) >= 0.85, last


@pytest.mark.parametrize("outlier", [-100.0, -1e6])
def test_one_extreme_reward_does_not_blind_the_gate(outlier: float) -> None:
    tuner = HyperParameterOptimizer(Foreign(), {**CONFIG, "seed": 43})
    play(tuner, 120, 43)
    tuner.optimize_hyperparameters(np.eye(4)[0])
    tuner.learn_from_intervention(np.eye(4)[1], outlier, False)
    play(tuner, 120, 44)
    assert judged(tuner, 2) >= 0.9
    assert tuner.learner.gate.reward_std < 1.5


def test_one_extreme_observation_does_not_blind_the_gate() -> None:
    tuner = HyperParameterOptimizer(Foreign(), {**CONFIG, "seed": 45})
    play(tuner, 120, 45)
    tuner.optimize_hyperparameters(np.eye(4)[0] + 1e6)
    tuner.learn_from_intervention(np.eye(4)[1], 0.0, False)
    play(tuner, 120, 46)
    assert judged(tuner, 3) >= 0.9


def test_cheap_tasks_come_before_the_run_and_leave_it_as_it_was(tmp_path: Path) -> None:
    knobs = ("lr", "weight_decay")
    own = gymnasium.make("trimtab/Training-v0", task="digits-mlp", scale="smoke", knobs=knobs)
    cheap = gymnasium.make("trimtab/Training-v0", task="digits-cnn", scale="smoke", knobs=knobs, lr=0.09)
    config = {**QUICK, "intervention_threshold": 0, "burn_in": 2, "experience_dir": tmp_path}
    tuner = HyperParameterOptimizer(own, config)
    tuner.learn(cheap, 9)  # before `own` was ever reset
    observation, _ = own.reset(seed=0)
    acted = []
    for _ in range(3):
        answer = tuner.optimize_hyperparameters(observation)
        acted.append(answer is not None)
        tuner.learn_from_intervention(observation, 0.0, answer is not None)
    assert acted == [False, False, True]
    assert sum(header.transitions for header in ExperienceStore(tmp_path).headers()) == 9


def test_an_action_that_the_guard_took_the_place_of_is_no_intervention() -> None:
    cheap: Any = gymnasium.make("trimtab/Training-v0", task="digits-mlp", scale="smoke", knobs=("lr",), lr=1e-3)
    rolled: list[bool] = []
    original = cheap.step

    def step(action: Any) -> Any:
        out = original(action)
        rolled.append(out[4]["rolled_back"])
        return out

    cheap.step = step
    spec = cheap.unwrapped.control_spec
    tuner = HyperParameterOptimizer(cheap, {**QUICK, "intervention_threshold": 0})
    huge = np.array([1.0])
    tuner.learner.proposals.propose = lambda x, rng: np.repeat(huge[None], len(x), 0)  # type: ignore[method-assign]
    tuner.learn(cheap, 8)
    expected = [not was for was in [False, *rolled[:-1]]]
    assert tuner.learner.batch.intervened.tolist() == expected
    assert not all(expected)
    assert spec.actions.kind == "decades"


def test_the_fingerprint_is_of_the_spaces_and_the_spec() -> None:
    def fingerprint(env: Any) -> str:
        return HyperParameterOptimizer(env, QUICK).fingerprint

    space = spaces.Box(np.array([0.123456789]), np.array([1.0]), dtype=np.float64)
    other = spaces.Box(np.array([0.1234567891]), np.array([1.0]), dtype=np.float64)
    first = fingerprint(Foreign(observation_space=space))
    with np.printoptions(precision=2):
        assert fingerprint(Foreign(observation_space=space)) == first
    assert fingerprint(Foreign(observation_space=other)) != first
    decades = Actions("decades")
    specs = [trimtab.ControlSpec(signals=("progress",), actions=decades, penalty=number) for number in (-1.0, -2.0)]
    ours = [gymnasium.make("trimtab/Training-v0", task="digits-mlp", scale="smoke", spec=spec) for spec in specs]
    assert fingerprint(ours[0]) != fingerprint(ours[1])


def test_a_worse_run_does_not_take_the_best_brains_place(tmp_path: Path) -> None:
    config = {**QUICK, "brain_save_dir": tmp_path, "intervention_threshold": 1}
    HyperParameterOptimizer(Foreign(), config).save_brain()  # before anything was learned: no best yet
    assert not (tmp_path / "best.safetensors").exists()
    for rewards, expected in (([-1.0] * 20, 20), ([-9.0] * 30, 20), ([-0.5] * 40, 40)):
        tuner = HyperParameterOptimizer(Foreign(), config)
        for reward in rewards:
            tuner.optimize_hyperparameters(np.zeros(4))
            tuner.learn_from_intervention(np.zeros(4), reward, False)
        tuner.save_brain()
        assert len(load_state(tmp_path / "best.safetensors")["learner"]["batch.rewards"]) == expected


def test_a_brain_goes_on_to_the_bit_under_another_seed_and_in_mid_question(tmp_path: Path) -> None:
    config = {**CONFIG, **QUICK, "brain_save_dir": tmp_path}
    one = HyperParameterOptimizer(Foreign(), {**config, "seed": 5})
    play(one, 60, 1)
    one.optimize_hyperparameters(np.zeros(4))
    one.save_brain()
    two = HyperParameterOptimizer(Foreign(), {**config, "seed": 6})
    two.load_brain()
    for tuner in (one, two):
        tuner.learn_from_intervention(np.ones(4), 0.5, False)
    assert play(one, 60, 2) == play(two, 60, 2)
    first, second = one.learner.state_dict(), two.learner.state_dict()
    assert all(torch.equal(v, second[k]) if isinstance(v, torch.Tensor) else v == second[k] for k, v in first.items())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("proposals.n_updates", "x"),
        ("gate.numbers", ["x"] * 7),
        ("gate.weights0", torch.full((10, 4, 32), math.nan)),
        ("batch.actions", torch.full((40, 2), 50.0)),
        ("rng", {"bit_generator": "PCG64"}),
    ],
)
def test_a_brain_that_is_wrong_inside_changes_nothing(tmp_path: Path, key: str, value: Any) -> None:
    tuner = HyperParameterOptimizer(Foreign(), {**QUICK, "brain_save_dir": tmp_path})
    play(tuner, 40, 0)
    path = tuner.save_brain()
    state = load_state(path)
    other = HyperParameterOptimizer(Foreign(), {**QUICK, "brain_save_dir": tmp_path, "seed": 9})
    before = other.learner.state_dict()
    save_state(path, {**state, "learner": {**state["learner"], key: value}})
    with pytest.raises(BrainError, match="it is torn or foreign, save it anew"):
        other.load_brain()
    after = other.learner.state_dict()
    assert all(torch.equal(v, after[k]) if isinstance(v, torch.Tensor) else v == after[k] for k, v in before.items())


def test_no_exploration_leaves_it_to_the_threshold() -> None:
    tuner = HyperParameterOptimizer(Foreign(), {**QUICK, "intervention_threshold": 0.999, "exploration": 0})
    for _ in range(30):
        assert tuner.optimize_hyperparameters(np.zeros(4)) is None
        tuner.learn_from_intervention(np.zeros(4), 0.0, False)


def test_what_lies_on_no_change_is_no_intervention() -> None:
    env = Foreign(spaces.Box(0.0, np.inf, (1,)))
    env.no_change_action = np.array([0.0])  # type: ignore[attr-defined]
    tuner = HyperParameterOptimizer(env, {**QUICK, "intervention_threshold": 0})
    answers = [tuner.optimize_hyperparameters(np.zeros(4)) for _ in range(60)]
    assert None in answers
    assert all(answer is None or answer["action_0"] > 0 for answer in answers)


def test_only_what_was_told_moves_the_clocks() -> None:
    tuner = HyperParameterOptimizer(Foreign(), {**QUICK, "intervention_threshold": 0, "burn_in": 1, "min_distance": 3})
    for _ in range(4):
        assert tuner.optimize_hyperparameters(np.zeros(4), deterministic=True) is None  # asked, not told
    tuner.learn_from_intervention(np.zeros(4), 0.0, False)
    assert tuner.optimize_hyperparameters(np.zeros(4)) is not None
    tuner.learn_from_intervention(np.zeros(4), 0.0, False)  # not followed: the next may come at once
    assert tuner.optimize_hyperparameters(np.zeros(4)) is not None


def test_no_transition_is_lost_before_it_is_stored(tmp_path: Path) -> None:
    config = {**QUICK, "experience_dir": tmp_path, "max_transitions": 64, "train_frequency_max": 25}
    tuner = HyperParameterOptimizer(Foreign(), config)
    play(tuner, 150, 0)
    tuner.close()
    assert [header.transitions for header in ExperienceStore(tmp_path).headers()] == [64, 64, 22]


def test_a_broken_folder_of_experience_keeps_neither_the_run_nor_the_brain(tmp_path: Path) -> None:
    folder = tmp_path / "experience"
    tuner = HyperParameterOptimizer(Foreign(), {**QUICK, "experience_dir": folder, "brain_save_dir": tmp_path})
    folder.write_text("a file")
    tuner.optimize_hyperparameters(np.zeros(4))
    with pytest.warns(RuntimeWarning, match="this run's transitions were not stored"):
        tuner.learn_from_intervention(np.zeros(4), 0.0, False, terminated=True)
    with pytest.raises(InputError):
        tuner.save_brain()
    assert (tmp_path / "latest.safetensors").exists()


@pytest.mark.parametrize(
    ("space", "observation"),
    [
        (spaces.Discrete(3, start=1), 0),
        (spaces.MultiDiscrete([2, 3]), [2, 0]),
        (spaces.Box(-9, 9, (2,)), [1.0]),
        (spaces.Dict({"a": spaces.Discrete(2)}), {"b": 1}),
    ],
)
def test_observations_outside_of_their_space_are_refused(space: Any, observation: Any) -> None:
    tuner = HyperParameterOptimizer(Foreign(observation_space=space), QUICK)
    with pytest.raises(InputError, match="does not fit"):
        tuner.optimize_hyperparameters(observation)


def test_tensors_are_observations_too() -> None:
    tuner = HyperParameterOptimizer(Foreign(), QUICK)
    tuner.optimize_hyperparameters(torch.ones(4, requires_grad=True))
    for reward in (True, "1.5", 10**400):
        with pytest.raises(InputError, match="expected one number"):
            tuner.learn_from_intervention(np.zeros(4), reward, False)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="terminated is 'False'; expected True or False"):
        tuner.learn_from_intervention(np.zeros(4), 0.0, False, terminated="False")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="config is a int; expected a dict"):
        HyperParameterOptimizer(Foreign(), 5)  # type: ignore[arg-type]
    numbers = {"n_steps": np.int64(512), "learning_rate": np.float32(3e-4)}
    assert HyperParameterOptimizer(Foreign(), numbers).options.n_steps == 512


def test_it_is_a_public_name() -> None:
    assert trimtab.HyperParameterOptimizer is HyperParameterOptimizer
