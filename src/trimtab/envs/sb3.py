"""A vector environment as Stable-Baselines3 wants to see one.

Called by the learners; beside agents/sb3.py the only file that imports stable_baselines3. A Gymnasium vector
environment of R runs becomes one VecEnv of R "environments", which cannot be told apart or reached singly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.vec_env import VecEnv
from typing_extensions import override

from trimtab.errors import InputError

__all__ = ["SB3View"]

Array = npt.NDArray[np.float64]
# (chosen (R, K), observation (R, S), state, episode_start (R,)) -> (actions (R, K), state)
Act = Callable[[npt.NDArray[Any], Array, Any, npt.NDArray[np.bool_]], tuple[npt.NDArray[Any], Any]]


class SB3View(VecEnv):
    """View of a `gymnasium.vector.VectorEnv` through which Stable-Baselines3 acts in it.

    What Stable-Baselines3 sees of the end of an episode: `done` is terminated or truncated; the info of a run that is
    done has its last observation under "terminal_observation", and "TimeLimit.truncated" is True only where the run was
    truncated and not terminated, so that a value is bootstrapped there and nowhere else.

    Args:
        envs: It resets a run in the step that ends it (`AutoresetMode.SAME_STEP`), or in the step after
            (`AutoresetMode.NEXT_STEP`); of the latter one episode is seen, whose runs end together: the next one
            takes another `begin` or `reset`.
        observe: What is done with an observation before it is seen, (R, S) -> (R, S); None for nothing.
        act: What becomes of the chosen actions before the environment gets them; None for nothing. Its state is handed
            back to it in the next step.
        action_space: What one run's choice looks like to Stable-Baselines3; None for the environment's own.

    Attributes:
        envs: The environment behind it.
        finished: The sum of rewards of every episode that has ended since `begin` or `reset`.

    Raises:
        InputError: Another autoreset mode, or observations that are no vectors.
    """

    def __init__(
        self,
        envs: gymnasium.vector.VectorEnv[Any, Any, Any],
        *,
        observe: Callable[[Array], Array] | None = None,
        act: Act | None = None,
        action_space: gymnasium.Space[Any] | None = None,
    ) -> None:
        mode = envs.metadata.get("autoreset_mode")
        if mode not in (AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP):
            raise InputError(
                f'the environment\'s metadata["autoreset_mode"] is {mode!r}; expected {AutoresetMode.SAME_STEP!r} or '
                f"{AutoresetMode.NEXT_STEP!r}: runs are not reset one by one here"
            )
        self._resets_later = mode == AutoresetMode.NEXT_STEP
        shape = envs.single_observation_space.shape
        if shape is None or len(shape) != 1:
            raise InputError(f"observations of one run have the shape {shape}; expected a vector (S,)")
        self.envs = envs
        self._observe = observe
        self._act = act
        self._first: npt.NDArray[np.float32] | None = None
        self._seed: int | None = None
        self._chosen: npt.NDArray[Any] = np.zeros(0)
        self._seen: Array = np.zeros((envs.num_envs, shape[0]))
        self._state: Any = None
        self._starts = np.ones(envs.num_envs, np.bool_)
        self._returns = np.zeros(envs.num_envs)
        self.finished: list[float] = []
        space = gymnasium.spaces.Box(-np.inf, np.inf, shape, np.float32)  # what its networks calculate with
        super().__init__(envs.num_envs, space, envs.single_action_space if action_space is None else action_space)

    def begin(self, seed: int) -> None:
        """Begin new episodes from a seed; the next `reset` gives their first observation instead of beginning others.

        So that what the environment says of the episodes can be read before Stable-Baselines3 resets it.
        """
        self._seed = seed
        self._first = None
        self._first = self.reset()

    @override
    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Seed of the next `reset`; the R runs share it."""
        self._seed = seed
        return [seed] * self.num_envs

    def reset(self) -> npt.NDArray[np.float32]:
        """First observations of new episodes; (R, S)."""
        if self._first is not None:
            first, self._first = self._first, None
            return first
        observation, _ = self.envs.reset(seed=self._seed)
        self._seed = None
        self._state = None
        self._starts = np.ones(self.num_envs, np.bool_)
        self._returns = np.zeros(self.num_envs)
        self.finished = []
        self._seen = np.asarray(observation, dtype=np.float64)
        return self._see(self._seen)

    def _see(self, observation: Array) -> npt.NDArray[np.float32]:
        return np.array(observation if self._observe is None else self._observe(observation), dtype=np.float32)

    def step_async(self, actions: npt.NDArray[Any]) -> None:
        """Take the chosen actions; they act in `step_wait`."""
        self._chosen = actions

    def step_wait(
        self,
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.bool_], list[dict[str, Any]]]:
        """One decision of all runs: observations (R, S), rewards (R,), done (R,), and one info a run.

        Raises:
            InputError: Runs ended, and the environment did not say with which observation.
        """
        actions = self._chosen
        if self._act is not None:
            chosen = actions.reshape(self.num_envs, -1)
            actions, self._state = self._act(chosen, self._seen, self._state, self._starts)
        observation, reward, terminated, truncated, infos = self.envs.step(actions)
        self._seen = np.asarray(observation, dtype=np.float64)
        self._starts = np.asarray(terminated | truncated, dtype=np.bool_)
        self._returns += reward
        each: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        if self._starts.any():
            self._end(each, infos, truncated & ~terminated)
        return self._see(self._seen), np.array(reward, dtype=np.float32), self._starts.copy(), each

    def _end(self, each: list[dict[str, Any]], infos: dict[str, Any], is_cut: npt.NDArray[np.bool_]) -> None:
        """Write into the infos of the runs that are done how and where they ended."""
        runs = np.flatnonzero(self._starts)
        if self._resets_later:
            if len(runs) < self.num_envs:
                raise InputError(
                    f"{len(runs)} of {self.num_envs} runs ended in one step; with AutoresetMode.NEXT_STEP all runs end "
                    "together here"
                )
            infos = {**infos, "final_obs": self._seen}  # nothing was reset: what is seen is the last of the episode
        if "final_obs" not in infos:
            raise InputError(
                f"{len(runs)} runs ended, but the infos {sorted(infos)} hold no 'final_obs'; an environment with "
                "AutoresetMode.SAME_STEP owes the last observation of a run there"
            )
        last = self._see(np.stack([infos["final_obs"][run] for run in runs]))
        for row, run in enumerate(runs):
            each[run] = {"terminal_observation": last[row], "TimeLimit.truncated": bool(is_cut[run])}
        self.finished += self._returns[runs].tolist()
        self._returns[runs] = 0.0

    def close(self) -> None:
        """Close the environment behind it."""
        self.envs.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """An attribute of the environment, once for each run asked for."""
        return [getattr(self.envs, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Not here.

        Raises:
            InputError: Always.
        """
        raise InputError(f"attribute {attr_name!r} of single runs cannot be set; set it on the environment (`envs`)")

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """Not here.

        Raises:
            InputError: Always.
        """
        raise InputError(f"method {method_name!r} of single runs cannot be called; call it on the environment (`envs`)")

    def env_is_wrapped(self, wrapper_class: type[Any], indices: Any = None) -> list[bool]:
        """False for every run asked for: there are no single environments to wrap."""
        return [False for _ in self._get_indices(indices)]
