"""The gate: bounds of its threshold in closed form, what it learns of known differences, and what moves it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from trimtab.agents.base import Array
from trimtab.agents.intervention import REACH, STEP, Batch, InterventionGate, normal_cdf
from trimtab.errors import InputError


def make_batch(states: Array, intervened: Array, rewards: Array, next_states: Array | None = None) -> Batch:
    """Transitions between one-hot states; the next one is drawn where it is not given."""
    n = len(states)
    then = np.random.default_rng(5).integers(0, 3, n) if next_states is None else next_states
    eye = np.eye(3)
    return Batch(
        eye[states],
        np.zeros((n, 1)),
        rewards.astype(np.float64),
        eye[then],
        np.zeros(n, dtype=np.bool_),
        intervened.astype(np.bool_),
        np.zeros(n),
        np.arange(n),
    )


def drawn(n: int = 600, seed: int = 0) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 3, n), rng.integers(0, 2, n)


@pytest.mark.parametrize(("z", "p"), [(0.0, 0.5), (1.959963985, 0.975), (-1.0, 0.158655254)])
def test_the_normal_distribution_function(z: float, p: float) -> None:
    assert normal_cdf(z) == pytest.approx(p, abs=1e-9)


def test_a_threshold_of_0_always_acts_and_of_1_never() -> None:
    seen = np.random.default_rng(0).normal(size=(50, 4))
    for threshold, acts in ((0.0, True), (1.0, False)):
        gate = InterventionGate(4, threshold=threshold)
        for _ in range(3):
            assert (gate.decide(seen, deterministic=False)[0] == acts).all()
        gate.take_in(_bad(30, 4))
        assert gate.threshold == threshold
        assert gate.exploration == 0.0


def _bad(n: int, n_signals: int) -> Batch:
    rng = np.random.default_rng(1)
    seen = rng.normal(size=(n, n_signals))
    return Batch(
        seen,
        np.zeros((n, 1)),
        -np.arange(n, dtype=np.float64),
        seen,
        np.zeros(n, dtype=np.bool_),
        np.ones(n, dtype=np.bool_),
        np.zeros(n),
        np.arange(n),
    )


def test_bounds_of_the_threshold() -> None:
    """sigmoid(logit(0.4) +- 1) = 0.644 and 0.197, however often interventions fail or the reward stagnates."""
    gate = InterventionGate(4, threshold=0.4, stagnation=10**6)
    gate.take_in(_bad(200, 4))  # each reward lower than the one before: a failure
    logit = math.log(0.4 / 0.6)
    assert gate.threshold == pytest.approx(1 / (1 + math.exp(-logit - REACH)))
    assert gate.threshold == pytest.approx(0.6444, abs=1e-4)
    still = InterventionGate(4, threshold=0.4, stagnation=1)
    batch = _bad(200, 4)._replace(intervened=np.zeros(200, dtype=np.bool_))
    still.take_in(batch)
    assert still.threshold == pytest.approx(0.1970, abs=1e-4)
    assert still.n_stagnations == 200


def test_one_failure_moves_the_logit_by_one_step_and_a_success_takes_it_back() -> None:
    gate = InterventionGate(3, threshold=0.4, stagnation=10**6)
    states, acts = drawn(400)
    gate.take_in_earlier(make_batch(states, acts, np.where(states == 0, 1.0, -1.0) * acts))
    gate.learn(make_batch(states, acts, np.where(states == 0, 1.0, -1.0) * acts), 20_000, 64)
    one = np.array([1])
    gate.take_in(make_batch(one, one, np.array([-1.0]), one))
    assert math.log(gate.threshold / (1 - gate.threshold)) == pytest.approx(math.log(0.4 / 0.6) + STEP)
    nought = np.array([0])
    for _ in range(3):  # never below where it began
        gate.take_in(make_batch(nought, one, np.array([1.0]), nought))
        assert gate.threshold == pytest.approx(0.4)


def test_reward_statistics_are_those_of_all_rewards() -> None:
    gate = InterventionGate(3)
    rewards = np.random.default_rng(3).normal(2.0, 3.0, 57)
    states, acts = drawn(57)
    gate.take_in(make_batch(states[:20], acts[:20], rewards[:20]))
    gate.take_in_earlier(make_batch(states[20:], acts[20:], rewards[20:]))
    assert gate.reward_mean == pytest.approx(rewards.mean())
    assert gate.reward_std == pytest.approx(rewards.std())
    assert gate.scaled(rewards).mean() == pytest.approx(0.0, abs=1e-12)
    assert gate.n_decisions == 57


def test_performance_compares_the_newest_rewards_with_all() -> None:
    gate = InterventionGate(3)
    assert gate.performance == 0.5
    states, acts = drawn(100)
    gate.take_in(make_batch(states, acts, np.repeat([0.0, 1.0], 50)))
    assert gate.recent_reward == pytest.approx(1 - 0.9**50, abs=1e-9)
    assert gate.performance == pytest.approx(normal_cdf((1 - 0.9**50 - 0.5) / 0.5))


@pytest.mark.parametrize("seed", [21, 22])
def test_it_learns_the_difference_that_acting_makes(seed: int) -> None:
    """Acting gives +1 in state 0, nothing in state 1 and -1 in state 2, beside what the states give by themselves."""
    states, acts = drawn(600, seed)
    rng = np.random.default_rng(seed)
    gain = np.array([1.0, 0.0, -1.0])
    rewards = np.array([0.0, 2.0, -1.0])[states] + gain[states] * acts + 0.1 * rng.normal(size=600)
    batch = make_batch(states, acts, rewards)
    gate = InterventionGate(3, seed=seed)
    gate.take_in_earlier(batch)
    gate.learn(batch, 60_000, 64)
    p = gate.probability(np.eye(3))
    assert p[0] > 0.95
    assert p[1] < 0.4
    assert p[2] < 0.02
    with torch.no_grad():
        at_once = gate._heads(gate.normalize(np.eye(3)), gate._weights)[1].mean(0).numpy()
    assert at_once == pytest.approx(gain / rewards.std(), abs=0.15)


def test_it_sees_what_comes_later() -> None:
    """Acting in state 0 costs a little at once and leads to state 2, which gives 1; elsewhere it only costs."""
    rng = np.random.default_rng(4)
    states, acts = [0], []
    rewards = []
    for _ in range(900):
        act = int(rng.integers(0, 2))
        rewards.append(float(states[-1] == 2) - 0.1 * act)
        acts.append(act)
        states.append(2 if states[-1] == 0 and act else int(rng.integers(0, 2)))
    batch = make_batch(np.array(states[:-1]), np.array(acts), np.array(rewards), np.array(states[1:]))
    gate = InterventionGate(3, seed=1)
    gate.take_in_earlier(batch)
    gate.learn(batch, 60_000, 64)
    p = gate.probability(np.eye(3))
    assert p[0] > 0.9
    assert p[1] < 0.4


def test_exploration_falls_with_decisions() -> None:
    gate = InterventionGate(3, exploration=0.02)
    assert gate.exploration == 1.0
    states, acts = drawn(100)
    gate.take_in_earlier(make_batch(states, acts, np.zeros(100)))
    assert gate.exploration == pytest.approx(0.5)
    gate.n_decisions = 10**6
    assert gate.exploration == 0.02


def test_deterministic_decisions_follow_the_threshold_alone() -> None:
    gate = InterventionGate(4)
    seen = np.random.default_rng(0).normal(size=(40, 4))
    acts, p = gate.decide(seen, deterministic=True)
    assert (acts == (p > gate.threshold)).all()
    assert ((p > 0) & (p < 1)).all()


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    gate, other = InterventionGate(4), InterventionGate(5)
    before = gate.state_dict()
    with pytest.raises(InputError, match=r"gate: weights0 has the shape \(10, 5, 32\); expected \(10, 4, 32\)"):
        gate.load_state_dict(other.state_dict())
    with pytest.raises(InputError, match="gate: the state has the keys"):
        gate.load_state_dict({})
    after = gate.state_dict()
    assert all(
        torch.equal(after[key], value) if isinstance(value, torch.Tensor) else after[key] == value
        for key, value in before.items()
    )


def test_numbers_that_are_not_finite_count_as_the_mean() -> None:
    gate = InterventionGate(3)
    states, acts = drawn(90)
    batch = make_batch(states, acts, np.zeros(90))
    gate.learn(batch, 64, 64)
    filled = gate.fill(np.array([[math.nan, 1.0, math.inf]]))
    mean = batch.observations.mean(0)
    assert filled[0] == pytest.approx([mean[0], 1.0, mean[2]])
