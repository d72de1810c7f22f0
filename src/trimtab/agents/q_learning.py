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

from trimtab.agents.base import Actions, Agent, Array, Base, Needs, State, Timing, load_generator
from trimtab.errors import InputError, unknown_name

__all__ = ["FACTORS", "QLearning", "check_epsilon", "epsilon_after", "named_factors"]

# Named sets of factors; "standard" is the write-ups' x1.1, x0.9, keep.
FACTORS: dict[str, tuple[float, ...]] = {
    "fine": (0.95, 1.0, 1.05),
    "standard": (0.9, 1.0, 1.1),
    "coarse": (0.5, 1.0, 2.0),
    "wide": (0.1, 0.5, 0.9, 1.0, 1.1, 2.0, 10.0),
}
# Signal -> inner edges of its bins. 4 x 3 x 3 x 3 = 108 states, of which a run of 30 decisions visits about 10.
BINS: dict[str, tuple[float, ...]] = {
    "update_to_weight": (-0.5, 0.25, 1.0),
    "grad_update_cosine": (-0.05, 0.1),
    "val_loss_log_ratio": (-0.02, 0.01),
    "progress": (0.34, 0.67),
}
MAX_ENTRIES = 10_000_000  # 160 MB of table and visits; a run visits about ten
SCHEDULES_OF_EPSILON = ("constant", "linear", "exponential")


class QLearning(Agent):
    """Q(s, a) += learning_rate * (r + gamma * max_a' Q(s', a') - Q(s, a)), epsilon-greedy.

    Args:
        actions: A name in `FACTORS`, or the factors themselves, one of them 1 ("keep").
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
    is_learned = True

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
        _check_shares(self.name, {"learning_rate": learning_rate, "gamma": gamma})
        if learning_rate == 0:
            raise InputError("q_learning: learning_rate is 0; a table that never learns is the mode 'use'")
        if n_knobs < 1:
            raise InputError(f"q_learning: n_knobs is {n_knobs!r}; expected 1 or more")
        self._given_actions = actions
        self._actions = Actions("multiply", named_factors(self.name, actions))
        self._bins = _bins(BINS if bins is None else bins)
        self._learning_rate = learning_rate
        self._gamma = gamma
        self._epsilon = check_epsilon(self.name, epsilon, epsilon_end, epsilon_schedule, epsilon_decisions)
        self._every = every
        self._base = Base(base, dict(base_options or {}))
        self._n_knobs = n_knobs
        self._rng = np.random.default_rng(seed)
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
    def needs(self) -> Needs:
        return Needs(
            signals=tuple(self._bins),
            actions=self._actions,
            timing=Timing(every=self._every),
            base=self._base,
        )

    @property
    @override
    def options(self) -> dict[str, Any]:
        epsilon, end, schedule, decisions = self._epsilon
        given = self._given_actions
        return {
            "actions": given if isinstance(given, str) else list(given),
            "bins": {key: list(edges) for key, edges in self._bins.items()},
            "learning_rate": self._learning_rate,
            "gamma": self._gamma,
            "epsilon": epsilon,
            "epsilon_end": end,
            "epsilon_schedule": schedule,
            "epsilon_decisions": decisions,
            "every": self._every,
            "base": self._base.name,
            "base_options": dict(self._base.options),
        }

    @property
    def n_updates(self) -> int:
        """Transitions that the table has learned from, over all runs."""
        return int(self.visits.sum())

    @property
    def epsilon(self) -> float:
        """Present probability of a random action."""
        return epsilon_after(self.n_updates, *self._epsilon)

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
        best = rows == rows.max(axis=1, keepdims=True)
        chosen = np.array([self._keep if row[self._keep] else int(np.flatnonzero(row)[0]) for row in best])
        if not deterministic:
            explores = self._rng.random(len(chosen)) < self.epsilon
            chosen = np.where(explores, self._rng.integers(0, self.table.shape[1], len(chosen)), chosen)
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

    def learn(self, env: Any, total_timesteps: int) -> QLearning:
        """Learn by acting, epsilon-greedy, in a single Gymnasium environment with this agent's signals.

        Args:
            env: Its observations are (S,), its actions indices into the factors.
            total_timesteps: Decisions to take.
        """
        observation, _ = env.reset(seed=int(self._rng.integers(2**31)))
        for _ in range(total_timesteps):
            now = np.asarray(observation, dtype=np.float64).reshape(1, -1)
            action, _ = self.predict(now)
            given = action[0] if self._n_knobs > 1 else int(action[0, 0])
            observation, reward, terminated, truncated, _ = env.step(given)
            then = np.asarray(observation, dtype=np.float64).reshape(1, -1)
            self.update(now, action, np.array([float(reward)]), then, np.array([bool(terminated)]))
            if terminated or truncated:
                observation, _ = env.reset()
        return self

    @override
    def reseed(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

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


def _check_shares(who: str, shares: Mapping[str, float]) -> None:
    for key, value in shares.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise InputError(f"{who}: {key} is {value!r}; expected a number in [0, 1]")


def check_epsilon(who: str, start: float, end: float, schedule: str, decisions: int) -> tuple[float, float, str, int]:
    """The course of epsilon, as `epsilon_after` takes it.

    Raises:
        InputError: A number is out of range, or there is no such schedule.
    """
    _check_shares(who, {"epsilon": start, "epsilon_end": end})
    if schedule not in SCHEDULES_OF_EPSILON:
        raise unknown_name("epsilon schedule", schedule, SCHEDULES_OF_EPSILON)
    if isinstance(decisions, bool) or not isinstance(decisions, int) or decisions < 1:
        raise InputError(f"{who}: epsilon_decisions is {decisions!r}; expected a whole number of 1 or more")
    return start, end, schedule, decisions


def epsilon_after(n_updates: int, start: float, end: float, schedule: str, decisions: int) -> float:
    """Probability of a random action after so many transitions.

    >>> epsilon_after(50, 0.1, 0.0, "linear", 100)
    0.05
    """
    if schedule == "linear":
        return start + (end - start) * min(1.0, n_updates / decisions)
    if schedule == "exponential":
        return end + (start - end) * math.exp(-n_updates / decisions)
    return start


def named_factors(who: str, actions: str | Sequence[float]) -> tuple[float, ...]:
    """Factors by their name in `FACTORS`, or as they are given.

    Raises:
        InputError: No such name, or no numbers.
    """
    if isinstance(actions, str):
        if actions not in FACTORS:
            raise unknown_name("set of actions", actions, FACTORS)
        return FACTORS[actions]
    try:
        return tuple(float(factor) for factor in actions)
    except (TypeError, ValueError):
        raise InputError(f"{who}: actions {actions!r}; expected a name ({', '.join(FACTORS)}) or factors") from None
