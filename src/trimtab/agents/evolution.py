"""Evolution strategies over a linear policy: a homeostat whose few weights can be read.

Called through the registry and by the learners. Source: Salimans et al. 2017, "Evolution strategies as a scalable
alternative to reinforcement learning", arXiv:1703.03864: antithetic pairs, fitness shaped by ranks, Adam. Deviation:
candidates are dealt to the runs of a vector environment in such a way that they meet in every group of runs, because
the reward is a rank within the group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import override

from trimtab.agents.base import Actions, Agent, Array, Base, Needs, State, Timing
from trimtab.agents.features import Features
from trimtab.errors import InputError
from trimtab.seeding import derive_seed, numpy_generator

__all__ = ["Evolution"]

LIMIT = 2.0  # decades a decision
_ADAM = (0.9, 0.99, 1e-8)  # the second moment forgets faster than usual: a run has tens of generations, not thousands


class Evolution(Agent):
    """A linear policy, improved by trying out pairs of opposite changes of its weights.

    move = clip(w . feature + b, -2, 2),  feature = clip(scale * signal, -3, 3)

    One generation: draw population / 2 directions e; candidates theta + sigma e and theta - sigma e act in whole
    episodes; their mean returns are replaced by ranks in [-1/2, 1/2]; theta follows, by Adam, the mean over pairs of
    (rank(+) - rank(-)) e.

    Who acts where: runs that lie next to each other form the groups of `group_size` within which the environment
    ranks. A candidate that had a group for itself would always have the same mean rank there, so each group is dealt
    to pairs: both halves of a pair always act in the same group, where they meet the same task; each candidate acts in
    equally many runs (num_envs / population); which pairs meet, and who gets which run of a group (which differ in
    their initial rate), is shuffled anew in every generation.

    Args:
        signals: Names of the signals it observes; None for `features.SIGNALS`.
        scales: Signal -> what it is multiplied by, where it is to be another than in `features.SCALES`.
        n_decisions: Decisions after the early ones, in equal parts of the budget.
        early_decisions: Decisions of 1 % of the budget at the start.
        base: Name of the schedule under it.
        base_options: Its options.
        sigma: Length of a change, for each weight.
        learning_rate: Adam's; about what a weight moves in one generation.
        population: Candidates in a generation, an even number; the number of runs must be a multiple of it.
        group_size: Runs that are ranked among each other, an even number.
        n_knobs: Knobs it moves together.
        seed: Seed of its directions, of the deal and of the environment's episodes.

    Raises:
        InputError: An option is out of range.
    """

    name = "evolution"
    is_taught = True

    def __init__(  # noqa: PLR0913 (options of a study file, flat because people write them by hand)
        self,
        *,
        signals: Sequence[str] | None = None,
        scales: Mapping[str, float] | None = None,
        n_decisions: int = 20,
        early_decisions: int = 6,
        base: str = "cosine",
        base_options: Mapping[str, Any] | None = None,
        sigma: float = 0.05,
        learning_rate: float = 0.02,
        population: int = 16,
        group_size: int = 16,
        n_knobs: int = 1,
        seed: int = 0,
    ) -> None:
        self.features = Features(self.name, signals, scales)
        for key, number in (("sigma", sigma), ("learning_rate", learning_rate)):
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number < 10:
                raise InputError(f"evolution: {key} is {number!r}; expected a number in (0, 10)")
        for key, count in (("population", population), ("group_size", group_size)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 2 or count % 2:
                raise InputError(f"evolution: {key} is {count!r}; expected an even number of 2 or more, for pairs")
        if isinstance(n_knobs, bool) or not isinstance(n_knobs, int) or n_knobs < 1:
            raise InputError(f"evolution: n_knobs is {n_knobs!r}; expected a whole number of 1 or more")
        self._needs = Needs(
            signals=self.features.signals,
            actions=Actions("decades", low=-LIMIT, high=LIMIT),
            timing=Timing(every=None, n_decisions=n_decisions, early_decisions=early_decisions),
            base=Base(base, dict(base_options or {})),
        )
        self.sigma = sigma
        self.learning_rate = learning_rate
        self.population = population
        self.group_size = group_size
        self.generation = 0
        self._seed = seed
        shape = (len(self.features.signals) + 1, n_knobs)  # the last row is b
        self._theta: Array = np.zeros(shape)
        self._first: Array = np.zeros(shape)
        self._second: Array = np.zeros(shape)

    @property
    @override
    def needs(self) -> Needs:
        return self._needs

    @property
    @override
    def options(self) -> dict[str, Any]:
        timing, base = self._needs.timing, self._needs.base
        return {
            "signals": list(self.features.signals),
            "scales": dict(self.features.scales),
            "n_decisions": timing.n_decisions,
            "early_decisions": timing.early_decisions,
            "base": base.name,
            "base_options": dict(base.options),
            "sigma": self.sigma,
            "learning_rate": self.learning_rate,
            "population": self.population,
            "group_size": self.group_size,
        }

    def weights(self) -> dict[str, list[float]]:
        """The whole policy as a table: signal (scaled) -> decades a unit, one number a knob; last "bias"."""
        return dict(zip([*self.features.signals, "bias"], self._theta.tolist(), strict=True))

    def predict(
        self,
        observation: Array,
        state: State | None = None,
        episode_start: npt.NDArray[np.bool_] | None = None,
        deterministic: bool = False,
    ) -> tuple[npt.NDArray[Any], State | None]:
        """See `Agent.predict`; it explores in its weights, between episodes, never in its actions."""
        del episode_start, deterministic
        return _moves(self._theta, self.features(observation)), state

    def learn(self, env: Any, total_timesteps: int) -> Evolution:
        """Run generations of whole episodes until so many decisions have been taken.

        Args:
            env: A `gymnasium.vector.VectorEnv` with this agent's signals and actions.
            total_timesteps: Decisions to take, counted over all runs; the last generation is ended.

        Raises:
            InputError: The number of runs is no multiple of the population and of the group's size.
        """
        taken = 0
        while taken < total_timesteps:
            taken += int(self.iterate(env)["n_decisions"])
        return self

    def iterate(self, envs: Any) -> dict[str, float]:
        """One generation; see `learn`.

        Returns:
            mean_return, best_return (of the best candidate), n_decisions, step (mean change of a weight).
        """
        rng = numpy_generator(self._seed, "evolution", self.generation)
        half = rng.standard_normal((self.population // 2, *self._theta.shape))
        directions = np.stack([half, -half], axis=1).reshape(self.population, *self._theta.shape)
        dealt = self._deal(envs.num_envs, rng)
        thetas = (self._theta + self.sigma * directions)[dealt]
        seed = derive_seed(self._seed, "episodes", self.generation)
        returns, n_decisions = self._play(envs, thetas, seed)
        fitness = np.bincount(dealt, returns, self.population) / np.bincount(dealt, minlength=self.population)
        before = self._theta.copy()
        self._ascend(_ranks(fitness), directions)
        self.generation += 1
        return {
            "mean_return": float(returns.mean()),
            "best_return": float(fitness.max()),
            "n_decisions": float(n_decisions),
            "step": float(np.abs(self._theta - before).mean()),
        }

    def _deal(self, n_runs: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """The candidate of each run, (R,); candidates 2 i and 2 i + 1 are a pair."""
        if n_runs % self.population or n_runs % self.group_size:
            raise InputError(
                f"evolution: an environment of {n_runs} runs; expected a multiple of the population "
                f"{self.population} and of the group's size {self.group_size}"
            )
        pairs = np.concatenate([rng.permutation(self.population // 2) for _ in range(n_runs // self.population)])
        dealt = np.stack([2 * pairs, 2 * pairs + 1], axis=1).reshape(-1, self.group_size)
        return np.asarray(rng.permuted(dealt, axis=1).reshape(-1), dtype=np.int64)

    def _play(self, envs: Any, thetas: Array, seed: int) -> tuple[Array, int]:
        """Sum of rewards of one episode of each run, (R,), and the decisions taken in them."""
        observation, _ = envs.reset(seed=seed)
        returns, running, taken = np.zeros(len(thetas)), np.ones(len(thetas), np.bool_), 0
        while running.any():
            actions = _moves(thetas, self.features(np.asarray(observation, dtype=np.float64)))
            observation, reward, terminated, truncated, _ = envs.step(actions)
            taken += int(running.sum())
            returns += np.where(running, reward, 0.0)
            running &= ~(np.asarray(terminated) | np.asarray(truncated))
        return returns, taken

    def _ascend(self, ranks: Array, directions: Array) -> None:
        """One step of Adam along the estimated gradient of the mean rank."""
        slope = np.tensordot(ranks, directions, axes=1) / len(ranks)
        keep_first, keep_second, tiny = _ADAM
        self._first = keep_first * self._first + (1 - keep_first) * slope
        self._second = keep_second * self._second + (1 - keep_second) * slope**2
        count = self.generation + 1
        first, second = self._first / (1 - keep_first**count), self._second / (1 - keep_second**count)
        self._theta = self._theta + self.learning_rate * first / (np.sqrt(second) + tiny)

    @override
    def reseed(self, seed: int) -> None:
        self._seed = seed

    def _tensors(self) -> dict[str, Array]:
        return {"weights": self._theta, "first_moment": self._first, "second_moment": self._second}

    @override
    def state_dict(self) -> dict[str, Any]:
        tensors = {key: torch.from_numpy(array.copy()) for key, array in self._tensors().items()}
        return {**tensors, "generation": self.generation, "seed": self._seed}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        expected = {*self._tensors(), "generation", "seed"}
        if set(state) != expected:
            raise InputError(f"evolution: the state has the keys {sorted(state)}; expected {sorted(expected)}")
        for key in self._tensors():
            value = state[key]
            if not isinstance(value, torch.Tensor) or tuple(value.shape) != self._theta.shape:
                shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
                raise InputError(f"evolution: {key} is {shape}; expected a tensor of shape {self._theta.shape}")
            if not bool(torch.isfinite(value).all()):
                raise InputError(f"evolution: {key} holds numbers that are not finite; learn it anew")
        for key in ("generation", "seed"):
            if isinstance(state[key], bool) or not isinstance(state[key], int) or state[key] < 0:
                raise InputError(f"evolution: {key} is {state[key]!r}; expected a whole number of 0 or more")
        arrays = {key: state[key].detach().to("cpu", torch.float64).numpy().copy() for key in self._tensors()}
        self._theta, self._first, self._second = arrays["weights"], arrays["first_moment"], arrays["second_moment"]
        self.generation, self._seed = state["generation"], state["seed"]


def _moves(theta: Array, features: Array) -> Array:
    """Moves of each run; theta is (S + 1, K), or (R, S + 1, K) with one for each run; (R, S) -> (R, K)."""
    # Every run is multiplied by itself: its move does not depend, to the last bit, on its neighbours.
    moves = (features[:, None, :] @ theta[..., :-1, :] + theta[..., -1:, :])[:, 0]
    return np.asarray(np.minimum(np.maximum(moves, -LIMIT), LIMIT))


def _ranks(fitness: Array) -> Array:
    """Ranks in [-1/2, 1/2], equal ones shared; (P,) -> (P,)."""
    above = (fitness[:, None] > fitness).sum(axis=1) + 0.5 * ((fitness[:, None] == fitness).sum(axis=1) - 1)
    return np.asarray(above / (len(fitness) - 1) - 0.5)
