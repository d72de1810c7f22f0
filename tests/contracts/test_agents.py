"""Every registered agent keeps its contract, and the battery notices each way of breaking it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from trimtab import registry
from trimtab.agents.base import Actions, Agent, Base, Needs, Timing
from trimtab.agents.q_learning import QLearning
from trimtab.agents.scripted import Replay
from trimtab.spec import make_agent
from trimtab.testing import ContractError, check_agent

OPTIONS: dict[str, dict[str, Any]] = {"replay": {"settings": [[0.1], [0.2], [0.05]]}}


@pytest.mark.parametrize("name", registry.names("agent"))
def test_registered_agents(name: str) -> None:
    check_agent(make_agent(name, OPTIONS.get(name), seed=3))


@pytest.mark.parametrize("name", ["q_learning", "random", "ppo", "dqn", "evolution"])
def test_agents_that_move_two_knobs(name: str) -> None:
    check_agent(make_agent(name, seed=3, n_knobs=2), n_knobs=2)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("step", {"step_size": 7, "gamma": 0.3}),
        ("exponential", {"gamma": 0.97}),
        ("cosine", {"warmup_steps": 5, "min_factor": 0.1}),
        ("default-cosine", {"min_factor": 0.1}),
        ("wsd", {"decay_share": 0.5}),
        ("plateau", {"patience": 2, "cooldown": 3, "every": 7, "factor": 0.5, "threshold": 0.1}),
        ("random", {"factors": [0.5, 1.0, 2.0], "every": "epoch"}),
        ("uwhg", {"target": 0.3, "gain": 0.1, "bias": 0.2, "n_decisions": 5, "base": "constant"}),
        ("q_learning", {"actions": [0.3, 1.0], "bins": {"progress": [0.5]}, "epsilon": 1.0, "base": "cosine"}),
        ("ppo", {"residual": "uwhg", "hidden": [8], "moves": [-1.0, 0.0, 1.0], "base": "constant", "members": 3}),
        ("dqn", {"signals": ["progress", "loss_slope"], "n_decisions": 5, "early_decisions": 2}),
        ("evolution", {"sigma": 0.2, "learning_rate": 0.1, "population": 32, "group_size": 8, "n_decisions": 5}),
        ("deep_q", {"actions": "continuous", "span": 0.3, "hidden": [8], "updates": 2, "signals": ["progress"]}),
        ("q_learning", {"actions": "wide", "epsilon_schedule": "linear", "gamma": 1.0, "base_options": {}}),
    ],
)
def test_agents_with_options(name: str, options: dict[str, Any]) -> None:
    agent = make_agent(name, options, seed=3)
    check_agent(agent)
    assert {key: agent.options[key] for key in options} == options


def test_replay_with_a_timing_and_a_base() -> None:
    agent = Replay([[0.1], [0.2]], Timing(every=7), Base("cosine", {"min_factor": 0.1}))
    check_agent(agent)


class Good(Agent):
    """Doubles or keeps, by a table of two numbers."""

    name = "good"
    is_learned = True

    def __init__(self, factor: float = 2.0) -> None:
        self.factor = factor
        self.values = [0.0, 0.0]

    @property
    def needs(self) -> Needs:
        return Needs(("progress",), Actions("multiply", (1.0, self.factor)), Timing(every=5))

    @property
    def options(self) -> dict[str, Any]:
        return {"factor": self.factor}

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]:
        return np.full((observation.shape[0], 1), int(self.values[1] > self.values[0])), None

    def update(self, observation: Any, action: Any, reward: Any, next_observation: Any, terminated: Any) -> None:
        for index, gain in zip(action[:, 0], reward, strict=True):
            self.values[int(index)] += 0.1 * (float(gain) - self.values[int(index)])

    def state_dict(self) -> dict[str, Any]:
        return {"values": list(self.values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        from trimtab.errors import InputError

        if set(state) != {"values"}:
            raise InputError(f"keys {sorted(state)}")
        self.values = list(state["values"])


def test_a_third_partys_agent_needs_no_registration() -> None:
    check_agent(Good())
    check_agent(Good(3.0), remake=lambda options: Good(**options))


class WrongShape(Good):
    def predict(self, observation: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return np.zeros(observation.shape[0], np.int64), None


class NotDeterministic(Good):
    calls = 0

    def predict(self, observation: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.calls += 1
        return np.full((observation.shape[0], 1), self.calls % 2), None


class ForgetsHalf(Good):
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.values = [state["values"][0], 0.0]


class TakesAnyState(Good):
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.values = list(state["values"])


class HidesOptions(Good):
    @property
    def options(self) -> dict[str, Any]:
        return {}


class OptionsAreNoJson(Good):
    @property
    def options(self) -> dict[str, Any]:
        return {"factor": np.float32(self.factor)}


class StateIsNoJson(Good):
    def state_dict(self) -> dict[str, Any]:
        return {"values": np.array(self.values)}


class LearnsInSecret(Good):
    is_learned = False


class LearnsNothing(Good):
    def update(self, *args: Any) -> None:
        pass


class OutOfRange(Good):
    def predict(self, observation: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return np.full((observation.shape[0], 1), 7), None


class WantsTheUnknown(Good):
    @property
    def needs(self) -> Needs:
        return Needs(("the_future",))


class AsksForMinus(Good):
    @property
    def needs(self) -> Needs:
        return Needs(("progress",), Actions("set"))

    def predict(self, observation: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return np.full((observation.shape[0], 1), -1.0), None


class LooksAtItsNeighbours(Good):
    def predict(self, observation: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return (observation > observation.min()).astype(np.int64), None


class WritesIntoTheObservation(Good):
    def predict(self, observation: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        observation[:] = 0
        return super().predict(observation)


class ExploresWithoutSeed(Good):
    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]:
        if deterministic:
            return super().predict(observation)
        return np.random.default_rng().integers(0, 2, (observation.shape[0], 1)), None


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        (WrongShape(), r"shape \(1,\) for observations of shape \(1, 1\); expected an array of shape \(1, 1\)"),
        (NotDeterministic(), "deterministic=True gave .* then"),
        (ForgetsHalf(), "a loaded state is not the one that was saved"),
        (TakesAnyState(), "load_state_dict of a foreign state: expected an InputError, but it was accepted"),
        (HidesOptions(3.0), "made again it needs"),
        (OptionsAreNoJson(), "its options is not JSON"),
        (StateIsNoJson(), "its state holds more than tensors and JSON scalars"),
        (LearnsInSecret(), "changed its state by update, but says is_learned = False"),
        (LearnsNothing(), "says is_learned = True, but its state is as it was"),
        (OutOfRange(), "is not in the spec's action space"),
        (WantsTheUnknown(), "no spec can be made of its needs: unknown signal 'the_future'"),
        (AsksForMinus(), "is not in the spec's action space"),
        (LooksAtItsNeighbours(), "3 runs at once gave"),
        (WritesIntoTheObservation(), "predict changed the observation"),
        (ExploresWithoutSeed(), "reseed with the same seed gave two different runs"),
    ],
)
def test_each_violation_is_named(broken: Agent, text: str) -> None:
    with pytest.raises(ContractError, match=text):
        check_agent(broken)


def test_a_contract_error_is_an_assertion_error() -> None:
    assert issubclass(ContractError, AssertionError)


def test_a_table_that_forgets_its_visits_is_noticed() -> None:
    class Forgets(QLearning):
        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            super().load_state_dict(state)
            self.visits[:] = 0

    with pytest.raises(ContractError, match="a loaded state is not the one that was saved"):
        check_agent(Forgets(seed=3), remake=lambda options: Forgets(seed=3, **options))
