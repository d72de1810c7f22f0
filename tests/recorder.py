"""An agent that remembers everything it was told, for tests of those who tell it."""

from __future__ import annotations

from typing import Any

import numpy as np

from toy import Toy
from trimtab.agents.base import Actions, Agent, Needs, Timing
from trimtab.controller import Controller


class Recorder(Agent):
    """Always the same factor; remembers everything it was told."""

    name = "recorder"
    is_learned = True

    def __init__(self, factor: float = 1.0, signals: tuple[str, ...] = ("progress",), every: int | str = 5) -> None:
        self._needs = Needs(signals, Actions("multiply", tuple({factor, 1.0})), Timing(every=every))
        self.transitions: list[tuple[Any, ...]] = []
        self.factor = factor

    @property
    def needs(self) -> Needs:
        return self._needs

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]:
        index = self._needs.actions.factors.index(self.factor)
        return np.full((observation.shape[0], 1), index), state

    def update(self, *transition: Any) -> None:
        self.transitions.append(transition)


def controlled(agent: Any, n_steps: int = 40, toy: Toy | None = None, **options: Any) -> tuple[Toy, Controller]:
    toy = toy or Toy()
    controller = Controller(agent, optimizer=toy.optimizer, total_steps=n_steps, **options)
    for _ in range(n_steps):
        controller.step(toy.step())
    return toy, controller
