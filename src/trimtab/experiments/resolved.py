"""A study whose names, rates and options are all resolved: what decides its numbers, frozen.

Made by trimtab.experiments.design; trimtab.experiments.plan turns it into jobs. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from trimtab.experiments.schema import Restriction

__all__ = ["FLOPS", "STEPS", "WITHOUT_RATE", "Arm", "Study", "Tuning"]

# Knobs, and settings to start with, that change what an optimizer step costs.
_DEAR = ("accumulation", "batch_size", "layers", "units")
WITHOUT_RATE = ("prodigy",)  # of the optimizers that an arm may bring, those that take no rate
STEPS, FLOPS = "optimizer steps", "training FLOPs"  # what a study's budgets are in


@dataclass(frozen=True)
class Arm:
    """One row of the comparison.

    Attributes:
        id: Its name in the study.
        agent: Registered name of the agent; a yoked arm's is "replay".
        kind: "baseline", "rule", "learned", "search", "placebo" or "yoked".
        of: The arm that a placebo or yoked arm belongs to.
        base: The schedule under the agent, which is what no change leaves; None is the agent's own.
        options: The agent's own options.
        lr: Initial rate by task; None leaves it to the task, or to the agent (default-cosine).
        reward: Registered name of the reward; None where nothing is rewarded or the agent's own holds.
        learn_runs: Runs that the arm learns on before each run that counts.
        learn_tasks: Tasks of these runs, in turn; empty for that of the run that counts.
        experience: Folder of transitions that it learns from before, or None.
        own_optimizer: Name of the optimizer that it trains with instead of the task's, or None.
        knobs: Names of the knobs that it moves; of a search, what it looks for.
        knob_options: Knob -> its options; of a search, the space.
        brain: Folder of the brain that it goes on from, or None.
        start: Settings of the loop that its runs begin with instead of the task's.
        search: Method, trials, budget and the rest of `SearchSpec` but the space; None where the arm is no search.
    """

    id: str
    agent: str
    kind: str
    of: str | None
    base: str | None
    options: Mapping[str, Any]
    lr: Mapping[str, float | None]
    reward: str | None
    learn_runs: int
    knobs: tuple[str, ...] = ("lr",)
    knob_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    brain: str | None = None
    start: Mapping[str, int] = field(default_factory=dict)
    search: Mapping[str, Any] | None = None
    learn_tasks: tuple[str, ...] = ()
    experience: str | None = None
    own_optimizer: str | None = None

    @property
    def changes_cost(self) -> bool:
        """Whether its optimizer steps may cost something else than the task's."""
        return any(name in _DEAR for name in (*self.knobs, *self.start))

    @property
    def has_rate(self) -> bool:
        """Whether its runs can begin with a rate that is given."""
        brings_one = self.agent == "default-cosine" or self.own_optimizer in WITHOUT_RATE
        return not brings_one and not (self.search is not None and "lr" in self.knobs)


@dataclass(frozen=True)
class Tuning:
    """The search for one baseline's rate: which arm it makes, from which rates, on how many seeds."""

    arm: Arm
    lrs: tuple[float, ...]
    n_seeds: int


@dataclass(frozen=True)
class Study:
    """Everything that decides the numbers of a study; the keys are those of a study file.

    `arms` leaves the tuned arm out, which is `tuning.arm`; `support` holds arms that are not in the study but
    that a yoked arm needs. `left_out` holds optional tasks whose data was not found, with the reason; `own_tasks`
    those of a user's own file, with the SHA-256 of it.
    """

    study: str
    idea: str
    scale: str
    root_seed: int
    n_seeds: int
    tasks: tuple[str, ...]
    optional_tasks: tuple[str, ...]
    benchmark_tasks: tuple[str, ...]
    arms: tuple[Arm, ...]
    support: tuple[Arm, ...]
    tuning: Tuning | None
    sensitivity_lrs: tuple[float, ...]
    sensitivity_seeds: int
    settings: Mapping[str, Any]
    user_config: Mapping[str, Any]
    final_info: bool
    left_out: tuple[Mapping[str, str], ...] = field(default=())
    restricted: Mapping[str, Restriction] = field(default_factory=dict)
    sensitivity_controls: bool = False
    own_tasks: Mapping[str, str] = field(default_factory=dict)

    def arms_on(self, task: str) -> tuple[Arm, ...]:
        """The arms that a task is run with."""
        entry = self.restricted.get(task)
        return self.arms if entry is None else tuple(arm for arm in self.arms if arm.id in entry.arms)

    def seeds_on(self, task: str) -> int:
        """Runs of each of these arms on the task."""
        return self.restricted[task].n_seeds if task in self.restricted else self.n_seeds

    @property
    def budget(self) -> str:
        """What every arm's budget is in: FLOPs where an arm can change what a step costs, else optimizer steps.

        They are the same for an arm that does not: FLOPs are those of the task's number of steps as the task has them.
        """
        arms = [*self.arms, *([self.tuning.arm] if self.tuning else [])]
        return FLOPS if any(arm.changes_cost for arm in arms) else STEPS

    def leave_out(self, task: str, why: str) -> Study:
        """The study without one of its optional tasks."""
        return replace(
            self,
            optional_tasks=tuple(name for name in self.optional_tasks if name != task),
            benchmark_tasks=tuple(name for name in self.benchmark_tasks if name != task),
            left_out=(*self.left_out, {"task": task, "why": why}),
        )
