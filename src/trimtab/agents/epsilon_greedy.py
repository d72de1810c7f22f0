"""EpsilonGreedy: base of agents that take the move of highest value and, now and then, another (q_learning, deep_q)."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import Self, override

from trimtab.agents.base import Actions, Agent, Array, Base, Needs, Timing
from trimtab.errors import InputError, unknown_name

__all__ = ["FACTORS", "EpsilonGreedy", "best_or_keep", "check_shares", "check_transitions", "epsilon_after"]

# Named sets of factors; "standard" is the write-ups' x1.1, x0.9, keep.
FACTORS: dict[str, tuple[float, ...]] = {
    "fine": (0.95, 1.0, 1.05),
    "standard": (0.9, 1.0, 1.1),
    "coarse": (0.5, 1.0, 2.0),
    "wide": (0.1, 0.5, 0.9, 1.0, 1.1, 2.0, 10.0),
}
SCHEDULES_OF_EPSILON = ("constant", "linear", "exponential")


class EpsilonGreedy(Agent):
    """What the values are is the subclass's.

    Args:
        given: Its option `actions`: a name in `FACTORS`, the factors, or a name for `moves`.
        epsilon: Its options of that name: start, end, schedule and decisions.
        moves: What it does where it does not multiply by factors.

    The others are those of `Needs`, and the seed of exploration. Raises InputError where a number or name is wrong.
    """

    is_learned = True

    def __init__(
        self,
        given: str | Sequence[float],
        signals: tuple[str, ...],
        epsilon: tuple[float, float, str, int],
        every: int | str,
        base: Base,
        seed: int,
        moves: Actions | None = None,
    ) -> None:
        self._given, self._actions = given, moves or Actions("multiply", _named_factors(self.name, given))
        self._epsilon = _check_epsilon(self.name, *epsilon)
        self._needs = Needs(signals, self._actions, Timing(every=every), base)
        self._rng = np.random.default_rng(seed)

    @property
    @override
    def needs(self) -> Needs:
        return self._needs

    @property
    @override
    def options(self) -> dict[str, Any]:
        keys = ("epsilon", "epsilon_end", "epsilon_schedule", "epsilon_decisions")
        return {
            "actions": self._given if isinstance(self._given, str) else list(self._given),
            **dict(zip(keys, self._epsilon, strict=True)),
            "every": self._needs.timing.every,
            "base": self._needs.base.name,
            "base_options": dict(self._needs.base.options),
        }

    @property
    @abstractmethod
    def n_updates(self) -> int:
        """Transitions learned from, over all runs."""

    @property
    def epsilon(self) -> float:
        """Present probability of a move drawn evenly."""
        return epsilon_after(self.n_updates, *self._epsilon)

    def _explore(self, chosen: npt.NDArray[Any], draw: Callable[[int], npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """What was chosen, in some runs what `draw` gives for so many instead; (R,) -> (R,)."""
        explores = self._rng.random(len(chosen)) < self.epsilon
        return np.where(explores, draw(len(chosen)), chosen)

    @override
    def learn(self, env: Any, total_timesteps: int) -> Self:
        """Learn by acting, epsilon-greedy, in a single Gymnasium environment with this agent's signals and moves."""
        seen, _ = env.reset(seed=int(self._rng.integers(2**31)))
        for _ in range(total_timesteps):
            now = np.asarray(seen, dtype=np.float64).reshape(1, -1)
            action, _ = self.predict(now)
            is_index = self._actions.kind == "multiply" and action.shape[1] == 1
            seen, reward, terminated, truncated, _ = env.step(int(action[0, 0]) if is_index else action[0])
            then = np.asarray(seen, dtype=np.float64).reshape(1, -1)
            self.update(now, action, np.array([float(reward)]), then, np.array([bool(terminated)]))
            if terminated or truncated:
                seen, _ = env.reset()
        return self

    @override
    def reseed(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)


def best_or_keep(values: Array, keep: int) -> npt.NDArray[Any]:
    """The best of M moves; of equal ones the one at `keep`, then the first; (R, M) -> (R,)."""
    return np.where(values[:, keep] == values.max(axis=1), keep, values.argmax(axis=1))


def check_shares(who: str, shares: Mapping[str, float]) -> None:
    """Refuse numbers outside of [0, 1], by an InputError that names them."""
    for key, value in shares.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise InputError(f"{who}: {key} is {value!r}; expected a number in [0, 1]")


def check_transitions(who: str, *columns: npt.NDArray[Any]) -> None:
    """Refuse transitions with a number that is not finite, by an InputError: what is remembered is learned again."""
    if not all(np.isfinite(column).all() for column in columns):
        raise InputError(
            f"{who}: a transition holds a number that is not finite; leave it out, or give a finite reward"
        )


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


def _check_epsilon(who: str, start: float, end: float, schedule: str, decisions: int) -> tuple[float, float, str, int]:
    check_shares(who, {"epsilon": start, "epsilon_end": end})
    if schedule not in SCHEDULES_OF_EPSILON:
        raise unknown_name("epsilon schedule", schedule, SCHEDULES_OF_EPSILON)
    if isinstance(decisions, bool) or not isinstance(decisions, int) or decisions < 1:
        raise InputError(f"{who}: epsilon_decisions is {decisions!r}; expected a whole number of 1 or more")
    return start, end, schedule, decisions


def _named_factors(who: str, actions: str | Sequence[float]) -> tuple[float, ...]:
    if isinstance(actions, str):
        if actions not in FACTORS:
            raise unknown_name("set of actions", actions, FACTORS)
        return FACTORS[actions]
    try:
        return tuple(float(factor) for factor in actions)
    except (TypeError, ValueError):
        raise InputError(f"{who}: actions {actions!r}; expected a name ({', '.join(FACTORS)}) or factors") from None
