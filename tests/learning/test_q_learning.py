"""Q-learning reaches the optimum that value iteration finds; its schedules and UW+HG's moves are their formulas."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from trimtab.agents.epsilon_greedy import FACTORS
from trimtab.agents.q_learning import BINS, QLearning
from trimtab.agents.uwhg import UWHG
from trimtab.brain import Brain
from trimtab.errors import InputError
from trimtab.spec import ControlSpec

# A chain of five states: left, stay, right, with a slip to the other side; the right end pays and ends the episode.
N_STATES, SLIP, GAMMA = 5, 0.1, 0.9
CENTRES = [0.1, 0.3, 0.5, 0.7, 0.9]
EDGES = [0.2, 0.4, 0.6, 0.8]


def outcomes(state: int, action: int) -> list[tuple[float, int, float, bool]]:
    """(probability, next state, reward, is it the end) of each thing that can happen."""
    move = action - 1
    found = []
    for share, step in ((1 - SLIP, move), (SLIP, -move)):
        then = min(max(state + step, 0), N_STATES - 1)
        found.append((share, then, 1.0 if then == N_STATES - 1 else -0.02, then == N_STATES - 1))
    return found


def optimal() -> np.ndarray:
    """Q* by value iteration; (states, actions)."""
    values = np.zeros((N_STATES, 3))
    for _ in range(500):
        for state in range(N_STATES - 1):
            for action in range(3):
                values[state, action] = sum(
                    share * (gain + (0.0 if is_end else GAMMA * values[then].max()))
                    for share, then, gain, is_end in outcomes(state, action)
                )
    return values


class Chain(gymnasium.Env[np.ndarray, int]):
    """The chain as an environment; a cut after 30 steps is a truncation, whose last state still has a value."""

    observation_space = gymnasium.spaces.Box(0.0, 1.0, (1,), np.float64)
    action_space = gymnasium.spaces.Discrete(3)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.state, self.taken = int(self.np_random.integers(N_STATES - 1)), 0
        return np.array([CENTRES[self.state]]), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        options = outcomes(self.state, action)
        chosen = int(self.np_random.random() >= options[0][0])
        _, self.state, reward, is_end = options[chosen]
        self.taken += 1
        return np.array([CENTRES[self.state]]), reward, is_end, self.taken >= 30, {}


def learner(**options: Any) -> QLearning:
    given = {"bins": {"progress": EDGES}, "gamma": GAMMA, "learning_rate": 0.05, "epsilon": 0.5, "seed": 0, **options}
    return QLearning(**given)


def test_it_reaches_the_optimal_values() -> None:
    agent = learner()
    assert agent.learn(Chain(), 40_000) is agent
    expected = optimal()
    assert agent.n_updates == 40_000
    assert np.abs(agent.table[:-1] - expected[:-1]).max() < 0.05
    observations = np.array([[centre] for centre in CENTRES[:-1]])
    action, _ = agent.predict(observations, deterministic=True)
    assert action[:, 0].tolist() == [2, 2, 2, 2] == expected[:-1].argmax(axis=1).tolist()


def test_a_step_size_of_one_solves_what_does_not_slip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.SLIP", 0.0)
    agent = learner(learning_rate=1.0, epsilon=1.0)
    agent.learn(Chain(), 3_000)
    np.testing.assert_allclose(agent.table[:-1], optimal()[:-1], atol=1e-12)


def test_learning_repeats_with_its_seed_and_goes_on_after_saving(tmp_path: Path) -> None:
    whole = learner(seed=4).learn(Chain(), 500)
    again = learner(seed=4).learn(Chain(), 500)
    np.testing.assert_array_equal(whole.table, again.table)
    Brain(again, ControlSpec.for_agent(again)).save(tmp_path)
    loaded = Brain.load(tmp_path).agent
    assert isinstance(loaded, QLearning)
    whole.learn(Chain(), 300)
    loaded.learn(Chain(), 300)
    assert loaded.n_updates == 800
    np.testing.assert_array_equal(whole.table, loaded.table)
    np.testing.assert_array_equal(whole.visits, loaded.visits)


# ---- one update, one choice -----------------------------------------------------------------------------------------


def update(agent: QLearning, state: int, action: int, reward: float, then: int, *, ends: bool) -> None:
    agent.update(
        np.array([[CENTRES[state]]]),
        np.array([[action]]),
        np.array([reward]),
        np.array([[CENTRES[then]]]),
        np.array([ends]),
    )


def test_one_update_is_the_formula() -> None:
    agent = learner(learning_rate=0.25, gamma=0.8)
    agent.table[3] = [0.1, 0.5, 0.2]
    agent.table[2, 0] = 1.0
    update(agent, 2, 0, 2.0, 3, ends=False)
    assert agent.table[2, 0] == pytest.approx(1.0 + 0.25 * (2.0 + 0.8 * 0.5 - 1.0))
    update(agent, 2, 1, 2.0, 3, ends=True)  # no value follows
    assert agent.table[2, 1] == pytest.approx(0.25 * 2.0)
    assert agent.visits[2].tolist() == [1, 1, 0]
    assert agent.n_updates == 2


def test_several_runs_are_learned_from_one_after_the_other() -> None:
    together, apart = learner(), learner()
    transitions = [(0, 1, 0.5, 1, False), (1, 2, 1.0, 2, False), (0, 1, -1.0, 0, True)]
    for state, action, reward, then, ends in transitions:
        update(apart, state, action, reward, then, ends=ends)
    states, actions, rewards, thens, ends = zip(*transitions, strict=True)
    together.update(
        np.array([[CENTRES[state]] for state in states]),
        np.array(actions)[:, None],
        np.array(rewards),
        np.array([[CENTRES[state]] for state in thens]),
        np.array(ends),
    )
    np.testing.assert_array_equal(together.table, apart.table)


def test_bins_have_their_edges_on_the_right_side() -> None:
    agent = learner()
    values = [-5.0, 0.0, 0.2 - 1e-12, 0.2, 0.3, 0.4, 0.79, 0.8, 5.0]
    assert agent.bin(np.array(values)[:, None]).tolist() == [0, 0, 0, 1, 1, 2, 3, 4, 4]


def test_states_of_several_signals_are_all_different() -> None:
    agent = QLearning()
    assert list(agent.needs.signals) == list(BINS)
    middles = [
        [edges[0] - 1, *((a + b) / 2 for a, b in itertools.pairwise(edges)), edges[-1] + 1] for edges in BINS.values()
    ]
    grid = np.stack(np.meshgrid(*middles, indexing="ij"), axis=-1).reshape(-1, len(BINS))
    assert sorted(agent.bin(grid).tolist()) == list(range(4 * 3 * 3 * 3))


def test_an_empty_table_moves_nothing_and_ties_keep() -> None:
    for name, factors in FACTORS.items():
        agent = learner(actions=name)
        seen = np.array([[centre] for centre in CENTRES])
        keep = factors.index(1.0)
        assert agent.predict(seen, deterministic=True)[0].tolist() == [[keep]] * 5
        agent.table[1, :] = 0.7
        agent.table[2, :] = [0.0] * (len(factors) - 1) + [0.1]
        chosen = agent.predict(seen, deterministic=True)[0][:, 0].tolist()
        assert chosen == [keep, keep, len(factors) - 1, keep, keep]


def test_exploration_is_as_frequent_as_it_says() -> None:
    agent = learner(epsilon=0.3, seed=1)
    agent.table[:, 0] = 1.0
    seen = np.full((20_000, 1), 0.5)
    chosen = agent.predict(seen)[0][:, 0]
    counts = np.bincount(chosen, minlength=3) / len(chosen)
    assert counts == pytest.approx([0.8, 0.1, 0.1], abs=0.01)  # a random action may be the best one
    assert agent.predict(seen, deterministic=True)[0].tolist() == [[0]] * len(seen)


def test_two_knobs_have_a_column_for_each_pair() -> None:
    agent = learner(n_knobs=2)
    assert agent.table.shape == (5, 9)
    agent.table[0, 5] = 1.0  # 5 = 1 * 3 + 2
    seen = np.array([[0.1]])
    assert agent.predict(seen, deterministic=True)[0].tolist() == [[1, 2]]
    agent.update(seen, np.array([[1, 2]]), np.array([3.0]), seen, np.array([True]))
    assert agent.visits[0].tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0]


def test_epsilon_schedules_are_closed_forms_of_what_was_learned() -> None:
    for schedule, formula in (
        ("constant", lambda n: 0.4),
        ("linear", lambda n: 0.4 + (0.05 - 0.4) * min(1.0, n / 50)),
        ("exponential", lambda n: 0.05 + (0.4 - 0.05) * math.exp(-n / 50)),
    ):
        agent = learner(epsilon=0.4, epsilon_end=0.05, epsilon_schedule=schedule, epsilon_decisions=50)
        for count in range(120):
            assert agent.epsilon == pytest.approx(formula(count), abs=1e-15)
            update(agent, 0, 0, 0.0, 1, ends=False)


def test_the_decay_goes_on_in_the_next_run(tmp_path: Path) -> None:
    agent = learner(epsilon=0.4, epsilon_end=0.0, epsilon_schedule="linear", epsilon_decisions=100)
    agent.learn(Chain(), 60)
    Brain(agent, ControlSpec.for_agent(agent)).save(tmp_path)
    again = Brain.load(tmp_path).agent
    assert isinstance(again, QLearning)
    assert again.epsilon == pytest.approx(0.4 * 0.4)


def test_a_table_of_another_shape_is_refused_and_changes_nothing() -> None:
    agent = learner()
    before = agent.table.copy()
    state = QLearning().state_dict()
    with pytest.raises(InputError, match=r"q_learning: table is \(108, 3\); expected a tensor of shape \(5, 3\)"):
        agent.load_state_dict(state)
    with pytest.raises(InputError, match="rng is no state of its generator"):
        agent.load_state_dict({**learner().state_dict(), "rng": {}})
    np.testing.assert_array_equal(agent.table, before)


# ---- UW+HG ----------------------------------------------------------------------------------------------------------


def test_uwhg_moves_by_its_formulas() -> None:
    """FINDINGS section 5: decision 0 measures, 1 to 6 bring updates to 0.9 % of the weights, then the hypergradient."""
    agent = UWHG()
    rng = np.random.default_rng(0)
    state = None
    for decision in range(20):
        ratio, cosine = rng.uniform(-3, 3, 4), rng.uniform(-1, 1, 4)
        action, state = agent.predict(np.stack([ratio, cosine], axis=1), state)
        if decision == 0:
            expected = np.zeros(4)
        elif decision <= 6:
            expected = np.clip(0.45 - ratio, -2, 2)
        else:
            expected = 0.15 * np.clip(4 * cosine - 0.3, -1, 1)
        np.testing.assert_allclose(action[:, 0], expected, atol=1e-15, err_msg=str(decision))
    assert pytest.approx(0.009, rel=0.01) == 10 ** (0.45 - 2.5)


def test_uwhg_does_not_move_on_what_was_not_measured() -> None:
    agent = UWHG()
    state = None
    for _ in range(12):
        action, state = agent.predict(np.zeros((1, 2)), state)
        assert action.tolist() == [[0.0]]


def test_uwhg_counts_each_run_by_itself() -> None:
    agent = UWHG()
    seen = np.array([[1.0, 0.5], [1.0, 0.5]])
    _, state = agent.predict(seen, None)
    _, state = agent.predict(seen, state)
    action, state = agent.predict(seen, state, np.array([True, False]))
    assert action[:, 0].tolist() == [0.0, pytest.approx(-0.55)]


@pytest.mark.parametrize("lr", [1e-5, 1e-3, 1e-1])
def test_uwhg_ends_at_the_same_place_from_any_rate(lr: float) -> None:
    from toy import Toy
    from trimtab.controller import Controller

    toy = Toy("adam", lr)
    controller = Controller("uwhg", optimizer=toy.optimizer, total_steps=400)
    for _ in range(400):
        controller.step(toy.step())
    assert toy.val_loss() < 0.12  # untrained 1.1; a constant rate of 1e-5 ends at 1.08
    early = [row.setting for row in controller.decisions if row.index == 6]
    assert 0.002 < early[0] < 0.1
