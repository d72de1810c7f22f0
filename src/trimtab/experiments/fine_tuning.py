"""Earlier runs from which an agent that was taught before is taught on: it explores in them, and learns at their end.

Called by trimtab.experiments.single, for arms with a `brain` and `learn_runs`. In the run that counts the agent takes
its best moves, as every taught agent does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from trimtab.agents.base import Agent, Array, Needs, State
from trimtab.errors import InputError

__all__ = ["REWARD", "Explorer", "check_fine_tuning"]

# Of the earlier runs: the rank among many runs, by which brains are taught, cannot be told from a few.
REWARD = "log_improvement"


def check_fine_tuning(agent: Agent) -> None:
    """Refuse an agent that was taught before and can learn nothing from earlier runs.

    Raises:
        InputError: It is one, or says so itself when it is given no transitions at all.
    """
    if agent.is_taught and type(agent).learn_from_earlier is Agent.learn_from_earlier:
        raise InputError(f"agent {agent.name!r} cannot be taught on from earlier runs; leave learn_runs out")
    if agent.is_taught:
        none, no_moves = np.zeros((0, len(agent.needs.signals))), np.zeros((0, 1))
        agent.learn_from_earlier(none, no_moves, np.zeros(0), none, np.zeros(0, dtype=np.bool_))


class Explorer(Agent):
    """Lets a taught agent draw its moves, and keeps what followed them, a row for each decision of a run.

    Where the guard rolled back and cut the rate, nothing follows what the agent asked for: the row stays, with NaN for
    the action and 0 for the reward, so that the rows after it stand beside those of the same decision in other runs.

    Args:
        agent: The agent; it is changed by `teach` alone.
    """

    is_learned = True

    def __init__(self, agent: Agent) -> None:
        self.name = agent.name
        self._agent = agent
        self._runs: list[list[tuple[Any, ...]]] = []

    @property
    @override
    def needs(self) -> Needs:
        return self._agent.needs

    @override
    def initial_setting(self, optimizer: str) -> float | None:
        return self._agent.initial_setting(optimizer)

    def begin_run(self) -> None:
        """What follows belongs to another run."""
        self._runs.append([])

    @override
    def predict(
        self,
        observation: Array,
        state: State | None = None,
        episode_start: npt.NDArray[np.bool_] | None = None,
        deterministic: bool = False,
    ) -> tuple[npt.NDArray[Any], State | None]:
        action, state = self._agent.predict(observation, state, episode_start, deterministic)
        if not deterministic:
            self._runs[-1].append(
                (observation[0], np.full_like(action[0], np.nan, dtype=np.float64), 0.0, observation[0])
            )
        return action, state

    @override
    def update(
        self,
        observation: Array,
        action: npt.NDArray[Any],
        reward: Array,
        next_observation: Array,
        terminated: npt.NDArray[np.bool_],
    ) -> None:
        del terminated  # a roll-back may swallow the last transition: where a run ends is known here
        self._runs[-1][-1] = (observation[0], action[0], float(reward[0]), next_observation[0])

    def teach(self) -> int:
        """Let the agent learn from all runs; returns the number of its own moves that something followed."""
        rows = [row for run in self._runs for row in run]
        if rows:
            seen, did, got, then = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
            ends = np.array([place + 1 == len(run) for run in self._runs for place in range(len(run))])
            self._agent.learn_from_earlier(seen, did, got, then, ends)
        return sum(not np.isnan(row[1]).any() for row in rows)
