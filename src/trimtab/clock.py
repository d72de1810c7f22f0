"""Clock: how much of a run's budget is used, and after how many optimizer steps the next decision falls.

Called by the controller and its hand. The unit is an optimizer step of the cost that steps had at the start. A loop
that knows what its steps cost (`TrainingLoop`: training FLOPs) says what is spent; without one every step counts 1, and
time is the number of steps. Progress, the base schedule and the times of decisions all follow this clock, so that a run
with larger batches, which takes fewer steps, sees the same schedule and decides at the same shares of its budget.
"""

from __future__ import annotations

import math
from typing import Any

from trimtab.agents.base import Timing

__all__ = ["ROUNDING", "Clock", "affordable_steps", "steps_until"]

ROUNDING = 1e-6  # of a step: sums of costs such as 2 / 3 are not exact


def affordable_steps(left: float, cost: float) -> int:
    """Optimizer steps of a cost that what is left of the budget pays for."""
    return math.floor((left + ROUNDING) / cost)


def steps_until(target: float, spent: float, cost: float) -> int:
    """Optimizer steps of a cost after which at least so much is spent; 0 where it is already."""
    return max(0, math.ceil((target - spent - ROUNDING) / cost))


class Clock:
    """Where a run stands in its budget.

    Args:
        loader: The run's loader, or its loop; one with `spent` and `step_cost` is asked.
        total_steps: The budget, in steps of the cost at the start; None where the horizon is unknown.

    Attributes:
        spent: What was used up when the clock was last read.
        cost: Of the next step, then.
        line: Counts how often the time of coming steps turned out otherwise than `at` had said.
    """

    def __init__(self, loader: object, total_steps: int | None) -> None:
        knows = all(hasattr(loader, name) for name in ("spent", "step_cost"))
        self._loop: Any = loader if knows else None  # with a budget of its own, which may have begun before
        self._total = total_steps
        self._start: float = getattr(self._loop, "spent", 0)
        self._step = 0  # at the last reading
        self._target = 0  # of the coming decision, in the unit of `spent`
        self._n_targets = 0
        self.spent: float = 0
        self.cost: float = 1
        self.line = 0
        self.read(0)

    def read(self, step: int) -> None:
        """Look after this many optimizer steps, and after whatever may have changed their cost."""
        if self._loop is None:
            self.spent, self._step = step, step
            return
        spent, cost = self._loop.spent - self._start, self._loop.step_cost
        if cost != self.cost or abs(spent - self.at(step)) > ROUNDING:
            self.line += 1
        self.spent, self.cost, self._step = spent, cost, step

    def at(self, step: int) -> float:
        """What is spent after so many optimizer steps, if their cost stays."""
        return self.spent + (step - self._step) * self.cost

    @property
    def is_used_up(self) -> bool:
        """Whether the budget does not pay for another step."""
        return self._total is not None and affordable_steps(self._total - self.spent, self.cost) < 1

    def aim(self, timing: Timing, epoch_steps: int | None) -> None:
        """Set the time of the next decision.

        Decisions fall on shares of the budget, whatever a step costs; a step that costs more than the time between two
        of them passes over some.

        Args:
            timing: When decisions are taken, in the unit of `spent`.
            epoch_steps: Of an epoch, needed for "epoch".
        """
        while True:
            self._target = timing.next_decision(self._n_targets, self._target, self._total, epoch_steps)
            self._n_targets += 1
            if steps_until(self._target, self.spent, self.cost):
                return

    @property
    def steps_left(self) -> int:
        """Optimizer steps from the last reading to the next decision; at least 1.

        The last decision falls where the budget does not pay for another step.
        """
        count = steps_until(self._target, self.spent, self.cost)
        if self._total is not None:
            count = min(count, affordable_steps(self._total - self.spent, self.cost))
        return max(1, count)

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, as plain numbers."""
        return {
            "start": self._start,
            "step": self._step,
            "target": self._target,
            "n_targets": self._n_targets,
            "spent": self.spent,
            "cost": self.cost,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`; the loop's own state may be loaded before or after."""
        self._start, self._step = state["start"], state["step"]
        self._target, self._n_targets = state["target"], state["n_targets"]
        self.spent, self.cost = state["spent"], state["cost"]
        self.line += 1
