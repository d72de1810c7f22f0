"""The tuner: its options, when it trains and on how much, what it remembers, and the agent of controllers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from trimtab.agents.tuner import InterventionLearner, TunerAgent, TunerOptions, make_options
from trimtab.errors import InputError, UnknownNameError


def make(**options: Any) -> InterventionLearner:
    return InterventionLearner(3, spaces.Discrete(3), TunerOptions(**options), no_change=1, seed=4)


def feed(learner: InterventionLearner, rewards: np.ndarray, intervened: bool = True) -> None:
    rng = np.random.default_rng(2)
    for reward in rewards:
        seen, then = rng.normal(size=(2, 1, 3))
        action = learner.decide(seen)[2]
        learner.record(seen, action, np.array([reward]), then, np.array([False]), np.array([intervened]))


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"agent": "sac"}, "unknown agent of the tuner 'sac'"),
        ({"learning_rate": 0}, "learning_rate is 0; expected a number above 0"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'; expected a number above 0"),
        ({"n_steps": 0}, "n_steps is 0; expected a whole number of 1 or more"),
        ({"n_steps": 10.5}, "n_steps is 10.5; expected a whole number of 1 or more"),
        ({"batch_size": True}, "batch_size is True; expected a whole number of 1 or more"),
        ({"gamma": 1.01}, r"gamma is 1.01; expected a number in \[0, 1\]"),
        ({"gamma": float("nan")}, r"gamma is nan; expected a number in \[0, 1\]"),
        ({"intervention_threshold": -0.1}, r"intervention_threshold is -0.1; expected a number in \[0, 1\]"),
        ({"burn_in": -1}, "burn_in is -1; expected a whole number of 0 or more"),
        ({"min_gain": -1}, "min_gain is -1; expected a number of 0 or more"),
        ({"train_frequency_min": 26}, "train_frequency_min is 26, above train_frequency_max, 25; exchange them"),
        ({"n_steps": 32}, "n_steps is 32, below batch_size, 64: nothing would ever be learned"),
        ({"max_transitions": 5}, "max_transitions is 5, below batch_size, 64: nothing would ever be learned"),
        ({"batch_size": 1}, "batch_size is 1; expected 2 or more"),
        ({"agent": ["ppo"]}, "unknown agent of the tuner"),
        (
            {"training_timesteps_max": 10},
            "training_timesteps_min is 5000, above training_timesteps_max, 10; exchange them",
        ),
    ],
)
def test_options_are_refused_by_name(option: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        TunerOptions(**option)


def test_an_unknown_option_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UnknownNameError, match=r"intervention_treshold.*did you mean 'intervention_threshold'"):
        make_options({"intervention_treshold": 0.4})


def test_worse_rewards_train_more_often_and_longer() -> None:
    """A performance of 1/2 gives the middles: 5 + 20/2 = 15 decisions, 10000 - 5000/2 = 7500 transitions."""
    learner = make()
    assert (learner.train_frequency, learner.training_timesteps) == (15, 7500)
    feed(learner, np.zeros(2))
    few = {"training_timesteps_min": 100, "training_timesteps_max": 200}
    better, worse = make(**few), make(**few, train_frequency_max=1000)
    feed(better, np.repeat([0.0, 1.0], [200, 30]))
    feed(worse, np.repeat([0.0, -1.0], [200, 30]))
    assert better.gate.performance > 0.98
    assert (better.train_frequency, better.training_timesteps) == (25, 200 - round(100 * better.gate.performance))
    assert better.training_timesteps <= 102
    assert worse.gate.performance < 0.02
    assert worse.training_timesteps >= 198
    assert worse.train_frequency < 25


def test_it_trains_each_time_the_frequency_is_reached() -> None:
    learner = make(train_frequency_min=7, train_frequency_max=7, training_timesteps_min=64, training_timesteps_max=64)
    feed(learner, np.zeros(6))
    assert learner.n_trainings == 0
    feed(learner, np.zeros(1))
    assert learner.n_trainings == 1
    feed(learner, np.zeros(14))
    assert learner.n_trainings == 3


def test_a_closed_gate_trains_nothing() -> None:
    learner = make(intervention_threshold=1)
    feed(learner, np.zeros(40), intervened=False)
    assert learner.n_trainings == 0
    assert len(learner.batch.rewards) == 40


def test_the_oldest_transitions_go_first() -> None:
    learner = make(max_transitions=10, batch_size=4, train_frequency_max=100, train_frequency_min=100)
    feed(learner, np.arange(25.0))
    assert learner.batch.rewards.tolist() == list(range(15, 25))
    assert learner.batch.numbers.tolist() == list(range(15, 25))


def test_a_reward_that_is_not_finite_counts_as_worse_than_all() -> None:
    learner = make(train_frequency_min=100, train_frequency_max=100)
    feed(learner, np.array([1.0, 3.0, float("nan"), float("-inf")]))
    assert learner.batch.rewards[:2].tolist() == [1.0, 3.0]
    assert learner.batch.rewards[2] == pytest.approx(1.0 - 1.0)  # the lowest, less the standard deviation of 1 and 3
    assert learner.batch.rewards[3] == pytest.approx(1.0 - np.std([1.0, 3.0, 0.0]))
    for _ in range(100):
        feed(learner, np.array([2.0, float("nan")]))
    assert learner.batch.rewards.min() > -5.0  # what stands for NaN does not drag itself down


def test_earlier_runs_count_as_experience() -> None:
    first, second = make(training_timesteps_min=64), make(training_timesteps_max=5000)
    feed(first, np.random.default_rng(0).normal(size=80))
    trained = second.gate.state_dict()["weights0"]
    second.learn_from_earlier(first.batch)
    assert second.gate.n_decisions == 80
    assert second.gate.reward_mean == pytest.approx(first.batch.rewards.mean())
    assert second.n_trainings == 1
    assert not torch.equal(trained, second.gate.state_dict()["weights0"])


def test_the_agent_keeps_burn_in_and_distance_in_each_run() -> None:
    agent = TunerAgent(intervention_threshold=0, burn_in=2, min_distance=3, seed=1)
    keep = agent.needs.actions.factors.index(1.0)
    state, acted = None, []
    for _ in range(9):
        action, state = agent.predict(np.zeros((2, 8)), state)
        acted.append((action != keep).any(1).tolist())
    assert [row[0] for row in acted] == [False, False, True, False, False, True, False, False, True]
    assert [row[1] for row in acted] == [row[0] for row in acted]
    action, _ = agent.predict(np.zeros((2, 8)), state, np.array([True, False]))
    assert (action != keep).any(1).tolist() == [False, False]


def test_no_change_is_no_intervention() -> None:
    agent = TunerAgent(n_knobs=2, intervention_threshold=0, seed=0, train_frequency_min=25)
    keep = agent.needs.actions.factors.index(1.0)
    seen = np.zeros((3, 8))
    actions = np.array([[keep, keep], [keep, 0], [0, 0]])
    agent.update(seen, actions, np.zeros(3), seen, np.zeros(3, np.bool_))
    assert agent.learner.batch.intervened.tolist() == [False, True, True]


def test_factors_are_checked() -> None:
    with pytest.raises(InputError, match=r"tuner: actions \(0.5, 2.0\); expected a name"):
        TunerAgent(actions=(0.5, 2.0))
    with pytest.raises(UnknownNameError, match="set of actions 'tiny'"):
        TunerAgent(actions="tiny")
    with pytest.raises(InputError, match="tuner: signals are empty"):
        TunerAgent(signals=())
