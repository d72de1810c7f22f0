"""Policies: their formulas against plain ones, one run equals many, ensembles, the residual, and what they refuse."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trimtab.agents.features import SCALES, SIGNALS, Features
from trimtab.agents.policy import MOVES, DQNAgent, PolicyAgent, PPOAgent
from trimtab.agents.uwhg import UWHG
from trimtab.brain import Brain
from trimtab.errors import InputError
from trimtab.spec import ControlSpec, make_agent

SPEC = ControlSpec.for_agent(PPOAgent())
KINDS = (PPOAgent, DQNAgent)


def scattered(agent: PolicyAgent, seed: int = 0) -> PolicyAgent:
    """The agent with weights of size 1, so that every move has its turn."""
    rng = np.random.default_rng(seed)
    state = agent.state_dict()
    for key in sorted(set(state) - {"rng"}):
        state[key] = torch.from_numpy(rng.normal(size=tuple(state[key].shape)))
    agent.load_state_dict(state)
    return agent


def observations(n_runs: int, seed: int = 0, spec: ControlSpec = SPEC) -> np.ndarray:
    space = spec.observation_space
    return np.random.default_rng(seed).uniform(
        np.maximum(space.low, -1), np.minimum(space.high, 1), (n_runs, *space.shape)
    )


def plain_outputs(agent: PolicyAgent, seen: np.ndarray, member: int = 0) -> list[list[float]]:
    """z of one run, by loops over Python numbers; (K, moves)."""
    state = agent.state_dict()
    scales = [SCALES.get(name, 1.0) for name in agent.features.signals]
    x = [min(max(a * b, -3.0), 3.0) for a, b in zip(seen.tolist(), scales, strict=True)]
    for layer in range(3):
        weight, bias = state[f"w{layer}"][member].tolist(), state[f"b{layer}"][member, 0].tolist()
        x = [sum(a * row[j] for a, row in zip(x, weight, strict=True)) + bias[j] for j in range(len(bias))]
        x = [math.tanh(a) for a in x] if layer < 2 else x
    return [x[i : i + len(agent.moves)] for i in range(0, len(x), len(agent.moves))]


@pytest.mark.parametrize("n_knobs", [1, 2])
def test_ppo_acts_with_the_mean_of_its_moves(n_knobs: int) -> None:
    agent = scattered(PPOAgent(n_knobs=n_knobs))
    seen = observations(4)
    actions, state = agent.predict(seen, deterministic=True)
    assert state is None
    for run in range(4):
        for knob, z in enumerate(plain_outputs(agent, seen[run])):
            weights = [math.exp(value) for value in z]
            mean = sum(w * m for w, m in zip(weights, MOVES, strict=True)) / sum(weights)
            assert actions[run, knob] == pytest.approx(mean, abs=1e-12)
            chances = [w / sum(weights) for w in weights]
            np.testing.assert_allclose(agent.probabilities(seen)[run, knob], chances, atol=1e-12)


def test_dqn_acts_with_its_best_move() -> None:
    agent = scattered(DQNAgent())
    seen = observations(50)
    actions, _ = agent.predict(seen, deterministic=True)
    best = [MOVES[int(np.argmax(plain_outputs(agent, run)[0]))] for run in seen]
    assert actions[:, 0].tolist() == best
    assert len(set(best)) >= 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"residual": "uwhg"}, {"members": 3}, {"members": 9, "hidden": [5]}])
def test_one_run_equals_many_to_the_bit(kind: type[PolicyAgent], options: dict[str, Any]) -> None:
    agent = scattered(kind(**options))
    seen, state = observations(256), None
    states: list[Any] = [None] * 256
    for decision in range(9):
        starts = np.full(256, decision == 0)
        together, state = agent.predict(seen, state, starts, deterministic=True)
        for run in range(256):
            alone, states[run] = agent.predict(seen[run : run + 1], states[run], starts[:1], deterministic=True)
            assert alone[0, 0] == together[run, 0]
        seen = observations(256, decision + 1)


def test_moves_are_drawn_with_their_probabilities() -> None:
    agent = scattered(PPOAgent())
    seen = np.repeat(observations(1), 20_000, axis=0)
    drawn, _ = agent.predict(seen)
    chances = agent.probabilities(seen[:1])[0, 0]
    shares = [(drawn[:, 0] == move).mean() for move in MOVES]
    np.testing.assert_allclose(shares, chances, atol=4 * 0.5 / math.sqrt(20_000))
    agent = scattered(DQNAgent())
    drawn, _ = agent.predict(seen)
    best = agent.predict(seen[:1], deterministic=True)[0]
    assert (drawn != best).mean() == pytest.approx(0.05 * 8 / 9, abs=0.006)


@pytest.mark.parametrize("kind", KINDS)
def test_joined_agents_act_with_their_mean(kind: type[PolicyAgent]) -> None:
    agents = [scattered(kind(), seed) for seed in range(3)]
    joined = kind.join(agents)
    seen = observations(20)
    mean = np.mean([agent.predict(seen, deterministic=True)[0] for agent in agents], axis=0)
    np.testing.assert_allclose(joined.predict(seen, deterministic=True)[0], mean, atol=1e-12)
    assert joined.options["members"] == 3
    assert kind.join([joined, *agents]).options["members"] == 6
    twin = make_agent(joined.name, joined.options)
    twin.load_state_dict(joined.state_dict())
    assert np.array_equal(twin.predict(seen, deterministic=True)[0], joined.predict(seen, deterministic=True)[0])


def test_what_cannot_be_joined() -> None:
    with pytest.raises(InputError, match=r"differ in \['hidden'\]"):
        PPOAgent.join([PPOAgent(), PPOAgent(hidden=[8])])
    with pytest.raises(InputError, match="'dqn' cannot be joined with 'ppo': they differ in their kind"):
        PPOAgent.join([PPOAgent(), DQNAgent()])  # type: ignore[list-item]
    with pytest.raises(InputError, match="no agents to join"):
        PPOAgent.join([])


def test_the_residual_adds_half_its_move_to_the_rules() -> None:
    agent, bare, rule = scattered(PPOAgent(residual="uwhg")), scattered(PPOAgent()), UWHG()
    assert agent.needs.timing.early_decisions == rule.needs.timing.early_decisions == 7
    columns = [SIGNALS.index("update_to_weight"), SIGNALS.index("grad_update_cosine")]
    state = rules_state = None
    were_clipped = 0
    for decision in range(12):
        seen, starts = observations(6, decision), np.full(6, decision == 0)
        seen[0, columns[0]] = -3.0  # the rule asks for all it may
        actions, state = agent.predict(seen, state, starts, deterministic=True)
        moves, _ = bare.predict(seen, deterministic=True)
        proposed, rules_state = rule.predict(seen[:, columns], rules_state, starts)
        wanted = proposed + 0.5 * moves
        were_clipped += int((abs(wanted) > 2).sum())
        np.testing.assert_array_equal(actions, np.clip(wanted, -2, 2))
    assert were_clipped > 0


def test_the_residual_of_two_knobs_moves_the_rate_by_the_rule_and_the_other_by_itself() -> None:
    agent = scattered(PPOAgent(residual="uwhg", n_knobs=2))
    bare = scattered(PPOAgent(n_knobs=2))
    seen = observations(3)
    actions, _ = agent.predict(seen, deterministic=True)  # decision 0: the rule only measures
    np.testing.assert_array_equal(actions, 0.5 * bare.predict(seen, deterministic=True)[0])


def test_it_begins_by_changing_nothing() -> None:
    agent = PPOAgent(seed=5)
    assert abs(agent.predict(observations(100), deterministic=True)[0]).max() < 0.05
    chances = agent.probabilities(observations(1))[0, 0]
    assert chances.argmax() == MOVES.index(0.0)
    assert chances[4] == pytest.approx(math.e / (math.e + 8), abs=0.02)


def test_features_are_scaled_and_clipped() -> None:
    features = Features("x", ["progress", "loss_slope"], {"progress": 2.0})
    assert features.scales == {"progress": 2.0, "loss_slope": 4.0}
    assert features(np.array([[0.25, -0.5], [1.0, 3.0]])).tolist() == [[0.5, -2.0], [2.0, 3.0]]


def test_a_brain_keeps_it(tmp_path: Path) -> None:
    agent = scattered(PPOAgent(residual="uwhg", members=2, scales={"progress": 2.0}))
    spec = ControlSpec.for_agent(agent)
    Brain(agent, spec).save(tmp_path / "brain")
    loaded = Brain.load(tmp_path / "brain")
    seen = observations(7)
    assert np.array_equal(loaded.agent.predict(seen, None, None, True)[0], agent.predict(seen, None, None, True)[0])
    assert loaded.agent.options == agent.options


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"moves": [-1, 1]}, r"moves \[-1, 1\]; expected ascending numbers"),
        ({"moves": [1, 0, -1]}, "expected ascending numbers"),
        ({"moves": [0.0, 1.0]}, "below 0, 0 and above 0"),
        ({"moves": ["a"]}, "expected ascending numbers"),
        ({"moves": 3}, "expected ascending numbers"),
        ({"hidden": [0]}, "hidden is 0; expected a whole number of 1 or more"),
        ({"hidden": [8.0]}, "hidden is 8.0"),
        ({"members": True}, "members is True"),
        ({"hidden": [4000, 4000]}, "more than 10000000 weights"),
        ({"signals": []}, "expected a list of one or more different names"),
        ({"signals": "progress"}, "signals 'progress'; expected a list"),
        (
            {"scales": {"progres": 1.0}},
            "unknown signal with a scale, of agent 'ppo' 'progres'; did you mean 'progress'",
        ),
        ({"scales": {"progress": 0}}, "scale of 'progress' is 0; expected a positive number"),
        ({"residual": "uwgh"}, "unknown residual of agent 'ppo' 'uwgh'; did you mean 'uwhg'"),
        (
            {"residual": "uwhg", "signals": ["progress", "update_to_weight"]},
            "needs the signals grad_update_cosine, which are not among progress, update_to_weight; add them",
        ),
        ({"n_decisions": 0}, "expected n_decisions >= 1"),
    ],
)
def test_bad_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        make_agent("ppo", options)


def test_bad_observations_and_states() -> None:
    agent = PPOAgent()
    with pytest.raises(
        InputError, match=r"an observation of shape \(1, 3\); expected 22 columns, one for each of progress"
    ):
        agent.predict(np.zeros((1, 3)))
    state = agent.state_dict()
    before = agent.predict(observations(3), deterministic=True)[0]
    for change, text in (
        ({"w0": torch.zeros(1, 9, 32)}, r"w0 is \(1, 9, 32\); expected a tensor of shape \(1, 22, 32\)"),
        ({"b1": torch.full((1, 1, 32), math.nan)}, "b1 holds numbers that are not finite"),
        ({"b2": [0.0]}, "b2 is list; expected a tensor"),
        ({"rng": {}}, "rng is no state of its generator"),
        ({"w3": torch.zeros(1)}, "the state has the keys"),
    ):
        with pytest.raises(InputError, match=text):
            agent.load_state_dict({**scattered(PPOAgent()).state_dict(), **change})
        assert np.array_equal(agent.predict(observations(3), deterministic=True)[0], before)
    agent.load_state_dict(state)


def test_it_says_who_teaches_it() -> None:
    with pytest.raises(InputError, match=r"taught by a learner: make_learner\('dqn', spec\)"):
        DQNAgent().learn(None, 1)


def test_outside_what_it_learned_on_the_rule_decides_and_says_so() -> None:
    signals = ["update_to_weight", "grad_update_cosine", "budget_log_steps"]
    ranges = {"budget_log_steps": (-0.8, 0.8)}
    agent = scattered(PPOAgent(signals=signals, ranges=ranges, early_decisions=7))
    free = PPOAgent(signals=signals, early_decisions=7)
    free.load_state_dict(agent.state_dict())
    rule, state, rule_state = UWHG(), None, None
    observation = np.array([[0.1, 0.3, 0.5], [0.1, 0.3, 0.9]])
    for _ in range(9):
        actions, state = agent.predict(observation, state, deterministic=True)
        expected, rule_state = rule.predict(observation[:, :2], rule_state)
        assert actions[0] == free.predict(observation, deterministic=True)[0][0]
        assert actions[1] == expected[1]
        assert agent.note == "outside what was learned on (budget_log_steps): the rule uwhg decides"
    agent.predict(observation[:1], None, deterministic=True)
    assert agent.note == ""
    assert PPOAgent(**agent.options).options == agent.options


@pytest.mark.parametrize(
    ("ranges", "text"),
    [
        ({"progres": (0, 1)}, "did you mean 'progress'?"),
        ({"progress": (1, 0)}, r"range of 'progress' is \(1, 0\); expected two numbers, the lower one first"),
        ({"progress": 1}, "range of 'progress' is 1; expected two numbers"),
    ],
)
def test_bad_ranges(ranges: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        PPOAgent(ranges=ranges)
