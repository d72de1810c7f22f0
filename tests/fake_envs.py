"""A vector environment that costs nothing: runs are off their optimum by some decades, agents move them there."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode

from trimtab.spec import ControlSpec


class FakeTraining(gymnasium.vector.VectorEnv):
    """R runs in lockstep; the reward comes with the last decision: the rank among the runs of the same group.

    A run's offset x (decades from its best rate) starts uniformly in [-spread, spread]; an action adds to it. Seen are
    x with some noise in column `seen_at`, the share of the decisions taken in column 0, and noise in the others. The
    score is minus |x| at the end (`rewards="score"`: it is the reward itself, not its rank).
    """

    def __init__(
        self,
        spec: ControlSpec,
        n_runs: int = 32,
        *,
        n_decisions: int = 5,
        group_size: int = 16,
        seen_at: int = 1,
        noise: float = 0.1,
        spread: float = 3.0,
        ends: str = "terminated",
        mode: AutoresetMode = AutoresetMode.SAME_STEP,
        rewards: str = "rank",
    ) -> None:
        self.metadata = {"autoreset_mode": mode}
        self.num_envs = n_runs
        self.single_observation_space = spec.observation_space
        self.single_action_space = spec.action_space
        self.observation_space = gymnasium.vector.utils.batch_space(self.single_observation_space, n_runs)
        self.action_space = gymnasium.vector.utils.batch_space(self.single_action_space, n_runs)
        self._spec, self._shape = spec, (n_runs, len(spec.signals))
        self._length, self._group, self._seen_at, self._noise = n_decisions, group_size, seen_at, noise
        self._ends, self._rewards, self._spread = ends, rewards, spread
        self.rng = np.random.default_rng(0)
        self.seeds: list[int | None] = []
        self.actions: list[np.ndarray] = []

    def _begin(self) -> None:
        self.taken = 0
        self.offset = self.rng.uniform(-self._spread, self._spread, self.num_envs)

    def _observe(self) -> np.ndarray:
        seen = self.rng.normal(0, 0.5, self._shape)
        seen[:, 0] = self.taken / self._length
        seen[:, self._seen_at] = self.offset + self.rng.normal(0, self._noise, self.num_envs)
        space = self.single_observation_space
        return np.clip(seen, space.low, space.high)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        self.seeds.append(seed)
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        self._begin()
        return self._observe(), {}

    def step(self, actions: np.ndarray) -> tuple[Any, ...]:
        self.actions.append(np.array(actions))
        moves = np.asarray(actions, dtype=np.float64).reshape(self.num_envs, -1)[:, 0]
        if self._spec.actions.kind == "multiply":
            moves = np.log10(np.take(self._spec.actions.factors, moves.astype(int)))
        self.offset = self.offset + moves
        self.taken += 1
        seen, is_over = self._observe(), self.taken == self._length
        reward, infos, done = np.zeros(self.num_envs), {}, np.full(self.num_envs, is_over)
        if is_over:
            score = -np.abs(self.offset)
            self.last_scores = score
            ranks = score.reshape(-1, self._group).argsort(axis=1).argsort(axis=1) / (self._group - 1) - 0.5
            reward = ranks.reshape(-1) if self._rewards == "rank" else score
            infos = {"final_obs": seen, "_final_obs": done.copy()}
            self._begin()
            seen = self._observe()
        never = np.zeros(self.num_envs, np.bool_)
        return (seen, reward, done, never, infos) if self._ends == "terminated" else (seen, reward, never, done, infos)


def off_by(agent: Any, envs: FakeTraining, seeds: range = range(100, 104)) -> float:
    """Mean |x| in the end when the agent acts, deterministically, in new episodes."""
    found = []
    for seed in seeds:
        seen, _ = envs.reset(seed=seed)
        state, starts, is_over = None, np.ones(envs.num_envs, np.bool_), False
        while not is_over:
            action, state = agent.predict(seen, state, starts, deterministic=True)
            seen, _, terminated, truncated, _ = envs.step(action)
            starts, is_over = np.zeros(envs.num_envs, np.bool_), bool(terminated.all() or truncated.all())
        found.append(-envs.last_scores.mean())
    return float(np.mean(found))
