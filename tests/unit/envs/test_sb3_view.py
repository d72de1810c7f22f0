"""The view through which Stable-Baselines3 sees a vector environment."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.vec_env import VecEnv

from fake_envs import FakeTraining
from trimtab.agents.base import Actions
from trimtab.envs.sb3 import SB3View
from trimtab.errors import InputError
from trimtab.spec import ControlSpec

FACTORS = ControlSpec(signals=("progress", "update_to_weight"), actions=Actions("multiply", (0.1, 1.0, 10.0)))
MOVES = ControlSpec(signals=("progress", "update_to_weight"), actions=Actions("decades"))


def test_it_shows_what_the_environment_does() -> None:
    view, twin = SB3View(FakeTraining(FACTORS, 16, n_decisions=3)), FakeTraining(FACTORS, 16, n_decisions=3)
    assert isinstance(view, VecEnv)
    assert view.action_space == gymnasium.spaces.Discrete(3)
    assert view.observation_space.shape == (2,)
    assert view.observation_space.dtype == np.float32
    view.seed(7)
    np.testing.assert_array_equal(view.reset(), twin.reset(seed=7)[0].astype(np.float32))
    rng = np.random.default_rng(0)
    for decision in range(1, 7):
        actions = rng.integers(0, 3, 16)
        seen, reward, done, infos = view.step(actions)
        expected, rewards, terminated, _, extra = twin.step(actions)
        np.testing.assert_array_equal(seen, expected.astype(np.float32))
        np.testing.assert_array_equal(reward, rewards.astype(np.float32))
        assert done.tolist() == terminated.tolist() == [decision % 3 == 0] * 16
        if decision % 3 == 0:
            for run in range(16):
                assert infos[run]["TimeLimit.truncated"] is False
                np.testing.assert_array_equal(
                    infos[run]["terminal_observation"], extra["final_obs"][run].astype(np.float32)
                )
        else:
            assert infos == [{}] * 16
    assert len(view.finished) == 32
    assert view.finished[16:] == rewards.tolist()


def test_truncated_is_said_and_terminated_wins() -> None:
    view = SB3View(FakeTraining(FACTORS, 16, n_decisions=1, ends="truncated"))
    view.reset()
    _, _, done, infos = view.step(np.ones(16, np.int64))
    assert done.all()
    assert all(info["TimeLimit.truncated"] is True for info in infos)

    class Both(FakeTraining):
        def step(self, actions: np.ndarray) -> tuple[Any, ...]:
            seen, reward, terminated, _, infos = super().step(actions)
            return seen, reward, terminated, np.ones_like(terminated), infos

    view = SB3View(Both(FACTORS, 16, n_decisions=1))
    view.reset()
    assert [info["TimeLimit.truncated"] for info in view.step(np.ones(16, np.int64))[3]] == [False] * 16


def test_final_observations_may_be_an_array_of_arrays_and_of_some_runs() -> None:
    class Some(FakeTraining):
        def step(self, actions: np.ndarray) -> tuple[Any, ...]:
            seen, reward, terminated, truncated, _ = super().step(actions)
            final = np.full(16, None, dtype=object)
            final[3], terminated[:] = np.array([0.5, 0.25]), np.arange(16) == 3
            return seen, reward, terminated, truncated, {"final_obs": final, "_final_obs": terminated}

    view = SB3View(Some(FACTORS, 16, n_decisions=9), observe=lambda seen: 2 * seen)
    view.reset()
    _, _, done, infos = view.step(np.ones(16, np.int64))
    assert np.flatnonzero(done).tolist() == [3]
    assert infos[3]["terminal_observation"].tolist() == [1.0, 0.5]
    assert [run for run in range(16) if infos[run]] == [3]
    assert len(view.finished) == 1


def test_choices_are_translated_with_state_and_starts() -> None:
    calls = []

    def act(chosen: Any, seen: Any, state: Any, starts: Any) -> tuple[Any, Any]:
        calls.append((seen.copy(), state, starts.tolist()))
        return chosen - 1.0, (state or 0) + 1

    envs = FakeTraining(MOVES, 16, n_decisions=2)
    view = SB3View(envs, observe=lambda seen: seen / 2, act=act, action_space=gymnasium.spaces.Discrete(3))
    first = view.reset()
    chosen = np.random.default_rng(0).integers(0, 3, 16)
    for _ in range(3):
        view.step(chosen)
    assert all(np.array_equal(actions, chosen[:, None] - 1.0) for actions in envs.actions)
    np.testing.assert_allclose(calls[0][0] / 2, first, rtol=1e-6)  # what is translated sees signals, not features
    assert [call[1] for call in calls] == [None, 1, 2]
    assert [call[2] for call in calls] == [[True] * 16, [False] * 16, [True] * 16]


def test_begin_gives_its_first_observation_to_the_next_reset() -> None:
    envs = FakeTraining(FACTORS, 16)
    view = SB3View(envs)
    view.begin(3)
    first = view.reset()
    assert envs.seeds == [3]
    np.testing.assert_array_equal(first, FakeTraining(FACTORS, 16).reset(seed=3)[0].astype(np.float32))
    view.reset()
    assert envs.seeds == [3, None]


def test_other_ways_of_resetting_are_refused() -> None:
    with pytest.raises(InputError, match=r"\"autoreset_mode\"\] is .*; expected .*SAME_STEP.* or .*NEXT_STEP"):
        SB3View(FakeTraining(FACTORS, 16, mode=AutoresetMode.DISABLED))


def test_where_the_reset_comes_later_the_last_observation_is_the_one_seen() -> None:
    from trimtab.envs.batched import TrainingVectorEnv

    view = SB3View(TrainingVectorEnv(4, ("quadratic",), horizon=(52, 60), runs_per_task=4))
    view.begin(0)
    view.reset()
    done = np.zeros(4, np.bool_)
    while not done.all():
        view.step_async(np.zeros((4, 1)))
        seen, reward, done, infos = view.step_wait()
    assert [info["TimeLimit.truncated"] for info in infos] == [False] * 4
    assert all(np.array_equal(info["terminal_observation"], row) for info, row in zip(infos, seen, strict=True))
    assert sorted(reward.tolist()) == pytest.approx([-0.5, -1 / 6, 1 / 6, 0.5])
    assert sum(view.finished) == pytest.approx(0.0, abs=1e-6)


def test_what_single_runs_cannot_do() -> None:
    envs = FakeTraining(FACTORS, 16)
    view = SB3View(envs)
    assert view.get_attr("num_envs", [1, 2]) == [16, 16]
    assert view.env_is_wrapped(gymnasium.Wrapper) == [False] * 16
    with pytest.raises(InputError, match="attribute 'x' of single runs cannot be set"):
        view.set_attr("x", 1)
    with pytest.raises(InputError, match="method 'x' of single runs cannot be called"):
        view.env_method("x")


def test_an_environment_that_hides_how_runs_end_is_refused() -> None:
    class Silent(FakeTraining):
        def step(self, actions: np.ndarray) -> tuple[Any, ...]:
            return (*super().step(actions)[:4], {})

    view = SB3View(Silent(FACTORS, 16, n_decisions=1))
    view.reset()
    with pytest.raises(InputError, match=r"16 runs ended, but the infos \[\] hold no 'final_obs'"):
        view.step(np.ones(16, np.int64))


def test_gymnasiums_own_vector_environment() -> None:
    """CartPole: runs that end at different times, and infos as Gymnasium itself writes them."""

    def make() -> gymnasium.vector.SyncVectorEnv:
        makers = [lambda: gymnasium.make("CartPole-v1", max_episode_steps=20)] * 3
        return gymnasium.vector.SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)

    view, twin = SB3View(make()), make()
    view.seed(1)
    np.testing.assert_array_equal(view.reset(), twin.reset(seed=1)[0])
    rng, ends = np.random.default_rng(0), {True: 0, False: 0}
    for _ in range(200):
        actions = rng.integers(0, 2, 3)
        _, _, done, infos = view.step(actions)
        _, _, terminated, truncated, extra = twin.step(actions)
        assert done.tolist() == (terminated | truncated).tolist()
        for run in np.flatnonzero(done):
            np.testing.assert_array_equal(infos[run]["terminal_observation"], extra["final_obs"][run])
            assert infos[run]["TimeLimit.truncated"] == (truncated[run] and not terminated[run])
            ends[infos[run]["TimeLimit.truncated"]] += 1
    assert min(ends.values()) > 0
    assert len(view.finished) == sum(ends.values())
    view.close()
    twin.close()
