"""Tabular Q-learning over binned, scale-free signals.

Called through the registry. Source: Watkins and Dayan 1992, "Q-learning", Machine Learning 8:279-292; Sutton and
Barto 2018, section 6.5. The experiment that this project grew from used losses to two digits as states, which
hardly ever recur (FINDINGS section 1); here a state is a tuple of a few bins of scale-free signals, so that what
was learned in one run is met again in the next, and the table is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import override

from trimtab.agents.base import Array, Base, State, load_generator
from trimtab.agents.epsilon_greedy import EpsilonGreedy, best_or_keep, check_shares, check_transitions
from trimtab.errors import InputError

__all__ = ["QLearning"]

# Signal -> inner edges of its bins. 4 x 3 x 3 x 3 = 108 states, of which a run of 30 decisions visits about 10.
BINS: dict[str, tuple[float, ...]] = {
    "update_to_weight": (-0.5, 0.25, 1.0),
    "grad_update_cosine": (-0.05, 0.1),
    "val_loss_log_ratio": (-0.02, 0.01),
    "progress": (0.34, 0.67),
}
MAX_ENTRIES = 10_000_000  # 160 MB of table and visits; a run visits about ten


class QLearning(EpsilonGreedy):
    """Q(s, a) += learning_rate * (r + gamma * max_a' Q(s', a') - Q(s, a)), epsilon-greedy.

    Args:
        actions: A name in `epsilon_greedy.FACTORS`, or the factors themselves, one of them 1 ("keep").
        bins: Signal -> inner edges of its bins, in ascending order.
        learning_rate: Step size of the table, in (0, 1].
        gamma: Discount per decision, in [0, 1].
        epsilon: Probability of a random action at the start.
        epsilon_end: The same in the end.
        epsilon_schedule: "constant", "linear" (over `epsilon_decisions`) or "exponential" (a factor of 1/e each
            `epsilon_decisions`); counted over all decisions the table has learned from, of every run.
        epsilon_decisions: See above.
        every: Steps between decisions, or "epoch".
        base: Name of the schedule under it.
        base_options: Its options.
        n_knobs: Knobs it moves together; the table has one column per joint action.
        seed: Seed of its exploration.

    Raises:
        InputError: A number is out of range, or the bins are not ascending.
    """

    name = "q_learning"

    def __init__(  # noqa: PLR0913 (options of a study file, flat because people write them by hand)
        self,
        *,
        actions: str | Sequence[float] = "standard",
        bins: Mapping[str, Sequence[float]] | None = None,
        learning_rate: float = 0.1,
        gamma: float = 0.9,
        epsilon: float = 0.1,
        epsilon_end: float = 0.01,
        epsilon_schedule: str = "constant",
        epsilon_decisions: int = 100,
        every: int | str = 10,
        base: str = "constant",
        base_options: Mapping[str, Any] | None = None,
        n_knobs: int = 1,
        seed: int = 0,
    ) -> None:
        check_shares(self.name, {"learning_rate": learning_rate, "gamma": gamma})
        if learning_rate == 0:
            raise InputError("q_learning: learning_rate is 0; a table that never learns is the mode 'use'")
        if n_knobs < 1:
            raise InputError(f"q_learning: n_knobs is {n_knobs!r}; expected 1 or more")
        self._bins = _bins(BINS if bins is None else bins)
        course = (epsilon, epsilon_end, epsilon_schedule, epsilon_decisions)
        super().__init__(actions, tuple(self._bins), course, every, Base(base, dict(base_options or {})), seed)
        self._learning_rate = learning_rate
        self._gamma = gamma
        self._n_knobs = n_knobs
        self._shape = tuple(len(edges) + 1 for edges in self._bins.values())
        n_states = math.prod(self._shape)
        self._keep = self._joint(np.full((1, n_knobs), self._actions.factors.index(1.0)))[0]
        entries = n_states * len(self._actions.factors) ** n_knobs
        if entries > MAX_ENTRIES:
            raise InputError(
                f"q_learning: a table of {entries} entries; at most {MAX_ENTRIES}, take fewer bins or actions"
            )
        self.table: Array = np.zeros((n_states, len(self._actions.factors) ** n_knobs))
        self.visits: npt.NDArray[np.int64] = np.zeros(self.table.shape, np.int64)

    @property
    @override
    def options(self) -> dict[str, Any]:
        return {
            **super().options,
            "bins": {key: list(edges) for key, edges in self._bins.items()},
            "learning_rate": self._learning_rate,
            "gamma": self._gamma,
        }

    @property
    @override
    def n_updates(self) -> int:
        """Transitions that the table has learned from, over all runs."""
        return int(self.visits.sum())

    def bin(self, observation: Array) -> npt.NDArray[np.int64]:
        """Number of the state that each observation falls into; (R, S) -> (R,)."""
        columns = [
            np.searchsorted(np.asarray(edges), observation[:, index], side="right")
            for index, edges in enumerate(self._bins.values())
        ]
        return np.asarray(np.ravel_multi_index(tuple(columns), self._shape), dtype=np.int64)

    def predict(
        self,
        observation: Array,
        state: State | None = None,
        episode_start: npt.NDArray[np.bool_] | None = None,
        deterministic: bool = False,
    ) -> tuple[npt.NDArray[Any], State | None]:
        """See `Agent.predict`; ties go to "keep", then to the first factor: an empty table moves nothing."""
        del episode_start
        rows = self.table[self.bin(observation)]
        chosen = best_or_keep(rows, self._keep)
        if not deterministic:
            chosen = self._explore(chosen, lambda n: self._rng.integers(0, rows.shape[1], n))
        factors = np.unravel_index(chosen, (len(self._actions.factors),) * self._n_knobs)
        return np.stack(factors, axis=1), state

    @override
    def update(
        self,
        observation: Array,
        action: npt.NDArray[Any],
        reward: Array,
        next_observation: Array,
        terminated: npt.NDArray[np.bool_],
    ) -> None:
        check_transitions(self.name, observation, action, reward, next_observation)
        columns = self._joint(action)
        rows, next_rows = self.bin(observation), self.bin(next_observation)
        for row, column, gain, next_row, is_end in zip(rows, columns, reward, next_rows, terminated, strict=True):
            target = gain + (0.0 if is_end else self._gamma * self.table[next_row].max())
            self.table[row, column] += self._learning_rate * (target - self.table[row, column])
            self.visits[row, column] += 1

    @override
    def learn_from_earlier(
        self,
        observation: Array,
        action: npt.NDArray[Any],
        reward: Array,
        next_observation: Array,
        terminated: npt.NDArray[np.bool_],
    ) -> None:
        """See `Agent.learn_from_earlier`; Q-learning's target does not depend on who acted."""
        self.update(observation, action, reward, next_observation, terminated)

    def _joint(self, action: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        shape = (len(self._actions.factors),) * self._n_knobs
        columns = tuple(action.astype(np.int64).reshape(-1, self._n_knobs).T)
        return np.asarray(np.ravel_multi_index(columns, shape), dtype=np.int64)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "table": torch.from_numpy(self.table.copy()),
            "visits": torch.from_numpy(self.visits.copy()),
            "rng": self._rng.bit_generator.state,
        }

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if set(state) != {"table", "visits", "rng"}:
            raise InputError(f"q_learning: the state has the keys {sorted(state)}; expected rng, table, visits")
        for key in ("table", "visits"):
            value = state[key]
            if not isinstance(value, torch.Tensor) or tuple(value.shape) != self.table.shape:
                shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
                raise InputError(f"q_learning: {key} is {shape}; expected a tensor of shape {self.table.shape}")
        load_generator(self._rng, state["rng"], self.name)
        self.table = state["table"].to(torch.float64).numpy().copy()
        self.visits = state["visits"].to(torch.int64).numpy().copy()


def _bins(given: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, ...]]:
    if not isinstance(given, Mapping) or not given:
        raise InputError(f"q_learning: bins are {given!r}; expected signals with the inner edges of their bins")
    bins = {}
    for key, edges in given.items():
        try:
            bins[key] = tuple(float(edge) for edge in edges)
        except (TypeError, ValueError):
            bins[key] = ()
        if not bins[key] or list(bins[key]) != sorted(set(bins[key])) or not all(map(math.isfinite, bins[key])):
            raise InputError(f"q_learning: bins of {key!r} are {edges!r}; expected ascending finite edges")
    return bins
