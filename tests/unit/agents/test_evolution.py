"""Evolution strategies: the deal, the ranks, the known optimum, and that a saved one goes on as if it had not been."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fake_envs import FakeTraining
from trimtab.agents.evolution import Evolution, _ranks
from trimtab.errors import InputError
from trimtab.spec import ControlSpec, make_agent
from trimtab.testing.contract import same

SIGNALS = ["progress", "update_to_weight", "loss_slope"]


def make(**options: Any) -> Evolution:
    return Evolution(signals=SIGNALS, n_decisions=4, early_decisions=1, **options)


def test_a_linear_policy() -> None:
    agent = make(n_knobs=2)
    state = agent.state_dict()
    state["weights"] = torch.tensor([[1.0, 0.0], [0.5, -9.0], [0.25, 0.0], [-0.125, 0.5]], dtype=torch.float64)
    agent.load_state_dict(state)
    moves, _ = agent.predict(np.array([[0.5, 1.0, 0.25], [0.0, -2.0, -3.0]]))
    # loss_slope is scaled by 4: 0.25 is seen as 1, -3 is clipped to -3.
    assert moves.tolist() == [[0.5 + 0.5 + 0.25 - 0.125, -2.0], [-1.0 - 0.75 - 0.125, 2.0]]
    assert agent.weights() == {
        "progress": [1.0, 0.0],
        "update_to_weight": [0.5, -9.0],
        "loss_slope": [0.25, 0.0],
        "bias": [-0.125, 0.5],
    }


def test_ranks_share_ties() -> None:
    assert _ranks(np.array([3.0, 1.0, 2.0, 0.0, 7.0])).tolist() == [0.25, -0.25, 0.0, -0.5, 0.5]
    assert _ranks(np.array([1.0, 1.0, 5.0])).tolist() == [-0.25, -0.25, 0.5]


@pytest.mark.parametrize(("population", "group_size", "n_runs"), [(16, 16, 64), (32, 16, 64), (8, 16, 48), (6, 4, 24)])
def test_pairs_stay_together_and_all_act_equally_often(population: int, group_size: int, n_runs: int) -> None:
    agent = make(population=population, group_size=group_size)
    dealt = agent._deal(n_runs, np.random.default_rng(0))
    assert np.bincount(dealt, minlength=population).tolist() == [n_runs // population] * population
    for group in dealt.reshape(-1, group_size):
        plus, minus = np.sort(group[group % 2 == 0]), np.sort(group[group % 2 == 1])
        assert plus.tolist() == (minus - 1).tolist()
    places = [agent._deal(n_runs, np.random.default_rng(i)).tolist() for i in range(3)]
    assert places[0] != places[1] != places[2]


def test_it_finds_the_known_optimum() -> None:
    """One decision, x seen without noise, reward the rank of -|x + move|: the best policy is move = -x, all else 0."""
    agent = Evolution(signals=SIGNALS, n_decisions=1, early_decisions=0, seed=4)
    envs = FakeTraining(ControlSpec.for_agent(agent), 64, n_decisions=1, noise=0.0, spread=1.5)
    agent.learn(envs, 300 * 64)
    assert agent.generation == 300
    weights = agent.weights()
    assert weights["update_to_weight"][0] == pytest.approx(-1.0, abs=0.05)
    assert weights["loss_slope"][0] == pytest.approx(0.0, abs=0.05)
    assert weights["bias"][0] == pytest.approx(0.0, abs=0.05)
    assert (
        weights["progress"] == [0.0] or abs(weights["progress"][0]) < 1
    )  # always seen as 0: it can drift, it does nothing


def test_each_generation_has_its_own_episodes() -> None:
    agent = make(seed=2)
    envs = FakeTraining(ControlSpec.for_agent(agent), 32)
    numbers = [agent.iterate(envs) for _ in range(3)]
    assert len(set(envs.seeds)) == 3
    assert [entry["n_decisions"] for entry in numbers] == [5 * 32] * 3
    assert all(abs(entry["mean_return"]) < 1e-12 < entry["best_return"] for entry in numbers)


def test_half_saved_and_loaded_equals_whole() -> None:
    def envs(agent: Evolution) -> FakeTraining:
        return FakeTraining(ControlSpec.for_agent(agent), 32)

    whole, first, second = make(seed=1), make(seed=1), make(seed=9)
    whole.learn(envs(whole), 6 * 160)
    first.learn(envs(first), 3 * 160)
    second.load_state_dict(first.state_dict())
    second.learn(envs(second), 3 * 160)
    assert same(whole.state_dict(), second.state_dict())
    assert whole.generation == 6


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"population": 7}, "population is 7; expected an even number of 2 or more"),
        ({"group_size": 0}, "group_size is 0; expected an even number"),
        ({"sigma": 0.0}, r"sigma is 0.0; expected a number in \(0, 10\)"),
        ({"learning_rate": "a"}, "learning_rate is 'a'; expected a number"),
        ({"signals": ["progress", "progress"]}, "expected a list of one or more different names"),
    ],
)
def test_bad_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        make_agent("evolution", options)


def test_bad_environments_and_states() -> None:
    agent = make()
    envs = FakeTraining(ControlSpec.for_agent(agent), 24, group_size=8)
    with pytest.raises(InputError, match="an environment of 24 runs; expected a multiple of the population 16 and of"):
        agent.iterate(envs)
    state = agent.state_dict()
    for change, text in (
        ({"weights": torch.zeros(3, 1)}, r"weights is \(3, 1\); expected a tensor of shape \(4, 1\)"),
        ({"second_moment": torch.full((4, 1), torch.inf)}, "second_moment holds numbers that are not finite"),
        ({"generation": -1}, "generation is -1; expected a whole number"),
        ({"more": 1}, "the state has the keys"),
    ):
        with pytest.raises(InputError, match=text):
            agent.load_state_dict({**state, "weights": torch.ones(4, 1), **change})
        assert same(agent.state_dict(), state)
