"""Agents that do as they are told, and runs in double precision, to compare single runs with those of a batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.agents.base import Agent, Array, Needs, State
from trimtab.tasks.base import Split
from trimtab.tasks.small import SmallTask
from trimtab.training.loop import TrainingLoop


class Puppet(Agent):
    """Does what it was told, and remembers what it saw."""

    name = "puppet"

    def __init__(self, moves: list[float]) -> None:
        self._moves = [0.0, *moves]  # the first call is the controller's own check of the actions' shape
        self.seen: list[Array] = []

    @property
    def needs(self) -> Needs:
        return Needs()

    def predict(
        self,
        observation: Array,
        state: State | None = None,
        episode_start: npt.NDArray[np.bool_] | None = None,
        deterministic: bool = False,
    ) -> tuple[npt.NDArray[Any], State | None]:
        self.seen.append(observation[0])
        return np.array([[self._moves[min(len(self.seen), len(self._moves)) - 1]]]), state


class Joint(Puppet):
    """Several numbers a decision, or one."""

    def __init__(self, moves: npt.NDArray[Any]) -> None:
        super().__init__([])
        self._rows = np.concatenate([np.zeros((1, moves.shape[1])), moves])

    def predict(
        self,
        observation: Array,
        state: State | None = None,
        episode_start: npt.NDArray[np.bool_] | None = None,
        deterministic: bool = False,
    ) -> tuple[npt.NDArray[Any], State | None]:
        self.seen.append(observation[0])
        return self._rows[[min(len(self.seen), len(self._rows)) - 1]], state


def in_double(task: SmallTask, seed: int, lr: float, total_steps: int) -> TrainingLoop:
    described, data = task.to_task(total_steps=total_steps, lr=lr)
    loop = TrainingLoop(described, data, seed=seed)
    loop.model.double()
    for name, part in loop._splits.items():
        targets = part.targets.double() if part.targets.is_floating_point() else part.targets
        loop._splits[name] = Split(part.inputs.double(), targets)
    loop._batches._split = loop._splits["train"]  # type: ignore[attr-defined]
    return loop
