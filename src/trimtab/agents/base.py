"""Agent: the base of everything that decides, and the plain data by which it says what it needs.

Called by the spec (needs), the controller (predict, update) and `learn`. Stable-Baselines3's `predict` is kept to
the letter, so that one of its models can serve as agent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from trimtab.errors import InputError, unknown_name

__all__ = ["Actions", "Agent", "Array", "Base", "Needs", "State", "Timing"]

Array = npt.NDArray[np.float64]
State = tuple[Any, ...]

_ACTION_KINDS = {
    "multiply": "an index into `factors`; the setting is multiplied by that factor",
    "decades": "a number; the setting is multiplied by ten to its power",
    "set": "a number; the setting becomes it",
}


@dataclass(frozen=True)
class Actions:
    """How an action becomes a setting; one number per run and knob.

    Attributes:
        kind: "multiply": an index into `factors`. "decades": a move of log10 of the setting in [low, high].
            "set": the setting itself.
        factors: For "multiply"; one of them is 1, which is "no change".
        low: For "decades", smallest move.
        high: For "decades", largest move.

    Raises:
        InputError: The kind is unknown, a factor is not positive, or none of them is 1.
    """

    kind: str = "multiply"
    factors: tuple[float, ...] = ()
    low: float = -2.0
    high: float = 2.0

    def __post_init__(self) -> None:
        if self.kind not in _ACTION_KINDS:
            raise unknown_name("kind of action", self.kind, _ACTION_KINDS)
        if self.kind == "multiply" and (1.0 not in self.factors or not all(0 < f < np.inf for f in self.factors)):
            raise InputError(
                f"action factors {list(self.factors)}; expected positive numbers, one of them 1 (no change)"
            )
        if self.kind == "decades" and not self.low < 0 < self.high:
            raise InputError(f"action moves in [{self.low}, {self.high}]; expected low < 0 < high")

    def decode(self, action: float, setting: float) -> float:
        """The setting that one action asks for.

        Raises:
            InputError: An index outside `factors`.
        """
        if self.kind == "decades":
            return float(setting * 10.0 ** min(max(action, self.low), self.high))
        if self.kind == "set":
            return action
        if action not in range(len(self.factors)):
            raise InputError(f"action {action!r}; expected an index into the factors {list(self.factors)}")
        return setting * self.factors[int(action)]

    def decode_all(self, actions: npt.NDArray[Any], settings: Array) -> Array:
        """The settings that many actions ask for; of one shape, as are the results.

        Raises:
            InputError: An index outside `factors`.
        """
        if self.kind == "decades":
            return np.asarray(settings * 10.0 ** np.clip(actions, self.low, self.high))
        if self.kind == "set":
            return np.array(actions, dtype=np.float64)
        is_known = np.isin(actions, np.arange(len(self.factors)))
        if not is_known.all():
            self.decode(actions[~is_known][0].item(), 0.0)  # says what is wrong with it
        return np.asarray(settings * np.array(self.factors)[actions.astype(np.int64)])


@dataclass(frozen=True)
class Timing:
    """When an agent decides, in optimizer steps.

    Attributes:
        every: Steps between decisions, or "epoch"; None shares what the early decisions leave of the budget in
            `n_decisions` equal parts.
        n_decisions: For `every=None`.
        early_decisions: Decisions taken first, each after `early_share` of the budget, at least 2 steps.
        early_share: See above.
        unknown_every: Steps between decisions where `every` is None and the budget is unknown.
    """

    every: int | str | None = 10
    n_decisions: int = 32
    early_decisions: int = 0
    early_share: float = 0.01
    unknown_every: int = 50

    def __post_init__(self) -> None:
        every = self.every
        whole = isinstance(every, int) and not isinstance(every, bool) and every >= 1
        if not (every is None or every == "epoch" or whole):
            raise InputError(f"every is {every!r}; expected a number of optimizer steps of 1 or more, or 'epoch'")
        if self.n_decisions < 1 or self.early_decisions < 0 or not 0 < self.early_share < 1 or self.unknown_every < 1:
            raise InputError(f"{self}: expected n_decisions >= 1, early_decisions >= 0, 0 < early_share < 1")

    def next_decision(self, index: int, step: int, total_steps: int | None, epoch_steps: int | None) -> int:
        """Number of steps after which decision `index` is taken, when `step` have been.

        Args:
            index: Number of the coming decision, from 0.
            step: Optimizer steps taken.
            total_steps: The budget, or None; the last decision falls on it.
            epoch_steps: Steps of an epoch, needed for "epoch".
        """
        is_early = index < self.early_decisions
        length = self._early_length(total_steps) if is_early else self.main_interval(total_steps, epoch_steps)
        end = step + length
        return end if total_steps is None or step >= total_steps else min(end, total_steps)

    def main_interval(self, total_steps: int | None, epoch_steps: int | None = None) -> int:
        """Optimizer steps between two decisions after the early ones; arguments as in `next_decision`."""
        if self.every == "epoch":
            return epoch_steps or 1
        if isinstance(self.every, int):
            return self.every
        if total_steps is None:
            return self.unknown_every
        left = total_steps - self.early_decisions * self._early_length(total_steps)
        return max(2, round(left / self.n_decisions))

    def _early_length(self, total_steps: int | None) -> int:
        return 2 if total_steps is None else max(2, round(self.early_share * total_steps))


@dataclass(frozen=True)
class Base:
    """The schedule under the controller: the rate written is the setting times its factor.

    Attributes:
        name: A name in `trimtab.agents.scripted.SCHEDULES`.
        options: The schedule's options.
    """

    name: str = "constant"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Needs:
    """What an agent asks of the spec that connects it to a run.

    Attributes:
        signals: Names of the signals it observes, in order.
        actions: How its actions become settings.
        timing: When it decides.
        base: The schedule under it.
    """

    signals: tuple[str, ...] = ()
    actions: Actions = field(default_factory=lambda: Actions("multiply", (1.0,)))
    timing: Timing = field(default_factory=Timing)
    base: Base = field(default_factory=Base)


class Agent(ABC):
    """Maps observations to actions, and may learn from what follows.

    Attributes:
        name: Name in the registry.
        note: What is to be said of the last decision, for the record; empty where it was an ordinary one.
        is_learned: Whether `update` changes it, so that it goes on learning within a run.
        is_taught: Whether it was learned before and is used as it is: then it takes its best action in every mode,
            since it would learn nothing from trying others, and without a brain it knows nothing.
        decides: Whether it ever asks for anything but "no change"; False for a plain schedule.
    """

    name: str
    note: str = ""
    is_learned: ClassVar[bool] = False
    is_taught: ClassVar[bool] = False
    decides: ClassVar[bool] = True

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What this agent asks of its spec."""

    @property
    def options(self) -> dict[str, Any]:
        """The constructor's arguments, JSON-able, but for `seed` and `n_knobs`: what makes the agent again."""
        return {}

    @abstractmethod
    def predict(
        self,
        observation: Array,
        state: State | None = None,
        episode_start: npt.NDArray[np.bool_] | None = None,
        deterministic: bool = False,
    ) -> tuple[npt.NDArray[Any], State | None]:
        """Choose an action for each run.

        Args:
            observation: Signals; (R, S).
            state: What `predict` returned before, for agents that remember within a run; None at the start.
            episode_start: True where a run has just begun; (R,).
            deterministic: Take the best known action instead of exploring.

        Returns:
            The actions (R, K), and the state to hand in next time.
        """

    def initial_setting(self, optimizer: str) -> float | None:
        """Learning rate to start from instead of the user's, by the optimizer's class name; None keeps the user's."""
        del optimizer
        return None

    def reseed(self, seed: int) -> None:
        """Begin exploration anew from a seed; agents that draw nothing have nothing to do."""
        del seed

    def update(  # noqa: B027 (learning nothing is a right default, not an omission)
        self,
        observation: Array,
        action: npt.NDArray[Any],
        reward: Array,
        next_observation: Array,
        terminated: npt.NDArray[np.bool_],
    ) -> None:
        """Learn from one transition of each run; agents that learn nothing within a run ignore it.

        Args:
            observation: (R, S).
            action: (R, K).
            reward: (R,).
            next_observation: (R, S).
            terminated: (R,); no value follows.
        """

    def learn_from_earlier(
        self,
        observation: Array,
        action: npt.NDArray[Any],
        reward: Array,
        next_observation: Array,
        terminated: npt.NDArray[np.bool_],
    ) -> None:
        """Learn from transitions of earlier runs, perhaps of other agents, the newest last; (T, ...) as in `update`.

        To a taught agent an action is NaN where it was asked and the guard acted in its place; the reward is 0 there.

        Raises:
            InputError: This agent learns from nothing but what it does itself.
        """
        del observation, action, reward, next_observation, terminated
        raise InputError(f"agent {self.name!r} does not learn from earlier runs' transitions; leave experience out")

    def learn(self, env: Any, total_timesteps: int) -> Agent:
        """Learn by acting in a Gymnasium environment.

        Raises:
            InputError: This agent learns nothing.
        """
        del env, total_timesteps
        raise InputError(f"agent {self.name!r} does not learn; use it as it is")

    def state_dict(self) -> dict[str, Any]:
        """Everything that experience changed, as tensors and JSON scalars."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`.

        Raises:
            InputError: The state does not fit this agent; nothing is changed.
        """
        if state:
            raise InputError(f"agent {self.name!r} has no state to load, got keys {sorted(state)}")


def load_generator(generator: np.random.Generator, state: Any, who: str) -> None:
    """Set a generator to a state that its `bit_generator.state` gave.

    Raises:
        InputError: It is none, or of another kind of generator; nothing is changed.
    """
    try:
        generator.bit_generator.state = state
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise InputError(f"{who}: rng is no state of its generator ({type(error).__name__}: {error})") from error


def keep_actions(actions: Actions, observation: Array, n_knobs: int) -> npt.NDArray[Any]:
    """No change, for every run and knob, in the form of these actions; (R, K)."""
    shape = (observation.shape[0], n_knobs)
    if actions.kind == "multiply":
        return np.full(shape, actions.factors.index(1.0), dtype=np.int64)
    return np.zeros(shape)
