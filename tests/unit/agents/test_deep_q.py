"""Deep Q-learning: what it learns where the answer is known, what it does untaught, and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from trimtab.agents.deep_q import DeepQ
from trimtab.agents.epsilon_greedy import FACTORS
from trimtab.agents.q_learning import QLearning
from trimtab.errors import InputError
from trimtab.spec import make_agent

SIGNALS = ["progress", "loss_slope"]


def seen(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.0, 1.0, (n, 2))


def teach(agent: DeepQ, reward, n: int = 120) -> None:
    """Transitions whose reward is a function of what was observed and done; every one ends a run."""
    rng = np.random.default_rng(5)
    for row in seen(n, 1):
        if agent.needs.actions.kind == "multiply":
            action = np.array([[rng.integers(3)]])
        else:
            action = np.array([[rng.uniform(agent.needs.actions.low, agent.needs.actions.high)]])
        now = row[None]
        agent.update(now, action, np.array([reward(row, float(action[0, 0]))]), now, np.array([True]))


@pytest.mark.parametrize("actions", ["standard", "continuous"])
def test_untaught_it_moves_nothing(actions):
    agent = DeepQ(actions=actions, signals=SIGNALS, epsilon=0.0)
    action, _ = agent.predict(seen(5))
    keep = 1 if actions == "standard" else 0.0
    assert action.tolist() == [[keep]] * 5


def test_it_learns_which_factor_suits_which_state():
    agent = DeepQ(signals=SIGNALS, hidden=[16], learning_rate=1e-2, gamma=0.0)
    teach(agent, lambda row, action: 1.0 if action == (2 if row[0] > 0.5 else 0) else 0.0)
    low, high = np.array([[0.1, 0.5]]), np.array([[0.9, 0.5]])
    assert agent.predict(low, deterministic=True)[0][0, 0] == 0
    assert agent.predict(high, deterministic=True)[0][0, 0] == 2


def test_the_continuous_form_finds_the_best_move():
    span = math.log10(1.1)
    agent = DeepQ(actions="continuous", signals=SIGNALS, hidden=[16], learning_rate=1e-2, gamma=0.0)
    teach(agent, lambda row, action: 1.0 - ((action - 0.5 * span) / span) ** 2)
    best = agent.predict(seen(4), deterministic=True)[0]
    assert best == pytest.approx(np.full((4, 1), 0.5 * span), abs=0.15 * span)
    assert agent.outputs(seen(4))[:, 0] == pytest.approx(np.ones(4), abs=0.1)  # the value of the best move


def test_the_continuous_form_learns_as_much_from_rewards_of_hundredths():
    span, found = math.log10(1.1), []
    for seed in range(3):
        agent = DeepQ(actions="continuous", signals=SIGNALS, hidden=[16], gamma=0.0, epsilon=0.3, seed=seed)
        for now in seen(40, seed)[:, None]:
            action, _ = agent.predict(now)
            reward = 0.02 * (1.0 - (action[0] / span - 0.5) ** 2)
            agent.update(now, action, reward, now, np.array([True]))
        found.append(float(agent.predict(seen(20), deterministic=True)[0].mean()) / span)
    assert np.abs(np.array(found) - 0.5).mean() < 0.25, found


def test_what_follows_is_discounted():
    agent = DeepQ(signals=SIGNALS, hidden=[8], learning_rate=1e-2, gamma=0.5, target_every=1)
    now = np.array([[0.5, 0.5]])
    for _ in range(150):  # a reward of 1 for ever is worth 1 / (1 - 0.5)
        agent.update(now, np.array([[1]]), np.array([1.0]), now, np.array([False]))
    assert agent.outputs(now)[0, 1] == pytest.approx(2.0, abs=0.05)


def test_moves_drawn_are_as_many_as_epsilon_says_and_fewer_with_time():
    agent = DeepQ(
        signals=SIGNALS, epsilon=0.5, epsilon_end=0.0, epsilon_schedule="linear", epsilon_decisions=10, updates=1
    )
    moved = (agent.predict(seen(3000))[0] != 1).mean()
    assert moved == pytest.approx(0.5 * 2 / 3, abs=0.03)
    now = seen(10)
    agent.update(now, np.ones((10, 1)), np.zeros(10), now, np.zeros(10, dtype=np.bool_))
    assert agent.epsilon == 0.0
    assert (agent.predict(seen(100))[0] == 1).all()


def test_the_memory_forgets_the_oldest():
    agent = DeepQ(signals=SIGNALS, memory=3, updates=1)
    for reward in range(5):
        agent.update(seen(1), np.array([[1]]), np.array([float(reward)]), seen(1), np.array([False]))
    assert agent.state_dict()["memory.reward"].tolist() == [2.0, 3.0, 4.0]


def test_the_preset_of_the_paper():
    from trimtab.agents.presets import preset_options

    agent = make_agent("deep_q", preset_options("paper", "deep_q"))
    assert agent.needs.actions.factors == FACTORS["standard"] == (0.9, 1.0, 1.1)
    assert agent.needs.timing.every == "epoch"
    assert agent.epsilon == 0.1
    free = make_agent("deep_q", {**preset_options("paper", "deep_q"), "actions": "continuous"})
    assert free.needs.actions.kind == "decades"
    assert (10**free.needs.actions.low, 10**free.needs.actions.high) == pytest.approx((1 / 1.1, 1.1))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"gamma": 1.5}, r"deep_q: gamma is 1.5; expected a number in \[0, 1\]"),
        ({"learning_rate": 0}, "deep_q: learning_rate is 0; expected"),
        ({"span": 0.0, "actions": "continuous"}, "deep_q: span is 0.0; expected"),
        ({"span": 0.1}, "deep_q: span is 0.1, but the actions are factors; leave it out"),
        ({"hidden": [4, 10**6]}, r"deep_q: hidden\[1\] is 1000000; expected at most 2048"),
        ({"updates": 0}, "deep_q: updates is 0; expected a whole number of 1 or more"),
        ({"hidden": [4, 0]}, r"deep_q: hidden\[1\] is 0; expected"),
        ({"epsilon": 2}, r"deep_q: epsilon is 2; expected a number in \[0, 1\]"),
        ({"epsilon_schedule": "lin"}, "unknown epsilon schedule 'lin'; did you mean 'linear'"),
        ({"actions": "standart"}, "unknown set of actions 'standart'; did you mean 'standard'"),
    ],
)
def test_wrong_options_are_named(options, text):
    with pytest.raises(InputError, match=text):
        make_agent("deep_q", options)


def test_a_state_of_other_options_is_refused():
    state = DeepQ(signals=SIGNALS, hidden=[4]).state_dict()
    with pytest.raises(InputError, match=r"deep_q: network0 does not have the shape \(2, 8\)"):
        DeepQ(signals=SIGNALS, hidden=[8]).load_state_dict(state)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_it_learns_where_gradients_are_off(off):
    agents = [DeepQ(signals=SIGNALS, updates=2) for _ in range(2)]
    one = (seen(1), np.array([[1]]), np.array([1.0]), seen(1), np.array([True]))
    agents[0].update(*one)
    with off():
        agents[1].update(*one)
    found = [agent.outputs(seen(3)) for agent in agents]
    assert found[0].any()
    assert np.array_equal(*found)


@pytest.mark.parametrize("agent", [DeepQ(updates=1), QLearning()])
@pytest.mark.parametrize("place", [0, 2, 3])
def test_a_transition_that_is_not_finite_is_refused_and_not_remembered(agent, place):
    n_signals = len(agent.needs.signals)
    now = np.zeros((1, n_signals))
    columns = [now, np.array([[1]]), np.array([1.0]), now.copy(), np.array([False])]
    columns[place] = np.full_like(columns[place], np.nan)
    with pytest.raises(InputError, match=f"{agent.name}: a transition holds a number that is not finite"):
        agent.update(*columns)
    assert agent.n_updates == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n_updates", "four"),
        ("n_updates", -4),
        ("memory.action", torch.tensor([7.0], dtype=torch.float64)),
        ("memory.action", torch.tensor([0.5], dtype=torch.float64)),
        ("memory.terminated", torch.tensor([5.0], dtype=torch.float64)),
        ("adam1.exp_avg_sq", torch.full((32,), -1.0, dtype=torch.float64)),
    ],
)
def test_a_state_that_would_fail_later_is_refused_and_changes_nothing(key, value):
    one = (seen(1), np.array([[1]]), np.array([1.0]), seen(1), np.array([True]))
    first, second = DeepQ(signals=SIGNALS, updates=1), DeepQ(signals=SIGNALS, updates=1, seed=1)
    first.update(*one)
    before = second.state_dict()
    with pytest.raises(InputError, match=f"deep_q: {key} holds what this agent never writes there"):
        second.load_state_dict({**first.state_dict(), key: value})
    after = second.state_dict()
    assert after["rng"] == before["rng"]
    assert after["n_updates"] == 0
    assert all(torch.equal(after[name], before[name]) for name in before if isinstance(before[name], torch.Tensor))
    second.load_state_dict(first.state_dict())
