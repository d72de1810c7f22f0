"""Episodes: which small tasks, horizons, rates and seeds R runs get, drawn from one seed.

Called by the vector environment. Runs of one task (16 by default) differ in their initial rate alone, so that their
ranks speak of decisions and not of luck. Tasks of one family are trained in batches, each with a horizon and a batch
size of its own, and attention and recurrent networks with one architecture.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trimtab.agents.base import Timing
from trimtab.errors import InputError, unknown_name
from trimtab.run_state import Array
from trimtab.seeding import derive_seed, numpy_generator
from trimtab.tasks.families import BATCH_SIZES, FAMILIES, SEQUENCE_FAMILIES, check_train_rows, draw_task
from trimtab.tasks.small import SEQUENCE_KINDS, Network, SmallTask

__all__ = [
    "DEFAULT_FAMILIES",
    "MAX_RUNS",
    "Batch",
    "EpisodeOptions",
    "count_decisions",
    "draw_episode",
    "fitting_horizon",
]

# Runs that are trained as one batch: beyond it activations leave the caches.
MAX_RUNS = {"mlp": 128, "image_mlp": 64, "quadratic": 128, "wide_mlp": 64, "cnn": 64, "attention": 64, "recurrent": 64}
# What is taken where no families are named: the others cost several times as much, and are there to be asked for.
DEFAULT_FAMILIES = ("mlp", "image_mlp", "cnn", "quadratic")
_DEAR = ("wide_mlp", "cnn", *SEQUENCE_FAMILIES)
# A budget may be moved by so many steps, or by its own length. Decisions of two agents may fit no short budget: the
# first that fits both 20 with none before them and 20 with seven before is 134 steps.
_REACH = 256


@dataclass(frozen=True)
class EpisodeOptions:
    """What episodes are drawn from.

    Attributes:
        families: Families of `trimtab.tasks.families`, taken in turn by the tasks; one named twice comes twice as
            often.
        runs_per_task: Runs of each task, compared with one another.
        horizon: Least and largest budget in optimizer steps, drawn log-uniformly for each batch of runs.
        max_cnn_horizon: The largest for convolutional networks, and for wide, attention and recurrent ones, which cost
            ten times as much a step and more.
        train_rows: Least and most rows that a task trains on; see `draw_task`. None is each family's own range.
        initial_lr: Least and largest initial rate, drawn log-uniformly, spread evenly over the runs of a task.
        no_validation: Share of tasks whose runs never report a validation loss.
        some_validation: Share of tasks whose runs report one at every other decision, by chance.

    Raises:
        UnknownNameError: No such family.
        InputError: A number out of range.
    """

    families: tuple[str, ...] = DEFAULT_FAMILIES
    runs_per_task: int = 16
    horizon: tuple[int, int] = (50, 2000)
    max_cnn_horizon: int = 500
    train_rows: tuple[int, int] | None = None
    initial_lr: tuple[float, float] = (1e-5, 1e-1)
    no_validation: float = 0.25
    some_validation: float = 0.25

    def __post_init__(self) -> None:
        if not self.families:
            raise InputError("families is empty; expected one name or more, such as ('mlp',)")
        for family in self.families:
            if family not in FAMILIES:
                raise unknown_name("family of tasks", family, FAMILIES)
        if self.runs_per_task < 1:
            raise InputError(f"runs_per_task is {self.runs_per_task}; expected 1 or more")
        for name, (low, high), least in (("horizon", self.horizon, 50), ("initial_lr", self.initial_lr, 1e-12)):
            if not least <= low <= high < np.inf:
                raise InputError(f"{name} is ({low}, {high}); expected two numbers in order, {least:g} or more")
        if self.max_cnn_horizon < self.horizon[0]:
            raise InputError(f"max_cnn_horizon is {self.max_cnn_horizon}; expected {self.horizon[0]} or more")
        check_train_rows(self.train_rows)
        if not (
            self.no_validation >= 0 and self.some_validation >= 0 and self.no_validation + self.some_validation <= 1
        ):
            raise InputError(
                f"no_validation {self.no_validation}, some_validation {self.some_validation}; expected shares of 1"
            )


@dataclass(frozen=True)
class Batch:
    """Runs that are trained together.

    Attributes:
        family: Their family.
        tasks: Of each run, (R,).
        groups: Number of each run's task in the episode, (R,).
        seeds: Root seed of each run, the same within a task; (R,).
        lr: Initial rate of each run, (R,).
        val_chance: Chance that a run's validation loss is reported at a decision, (R,).
        total_steps: Their budget.
    """

    family: str
    tasks: tuple[SmallTask, ...]
    groups: tuple[int, ...]
    seeds: tuple[int, ...]
    lr: tuple[float, ...]
    val_chance: tuple[float, ...]
    total_steps: int


def draw_episode(
    options: EpisodeOptions, n_runs: int, timing: Timing, seed: int, also_fit: Sequence[Timing] = ()
) -> list[Batch]:
    """Draw what R runs train in one episode.

    Args:
        options: What is drawn from.
        n_runs: R.
        timing: When decisions fall; horizons are fitted to it, so that all runs have equally many.
        seed: All is drawn from it.
        also_fit: Timings that the horizons fit as well. Agents of different timings draw the same episode where each
            names the other's; their order does not matter.
    """
    rng = numpy_generator(seed, "episode")
    n_tasks = -(-n_runs // options.runs_per_task)
    shift = int(rng.integers(len(options.families)))  # where there are fewer tasks than families, each has its turn
    families = [options.families[(index + shift) % len(options.families)] for index in range(n_tasks)]
    batches: list[Batch] = []
    for family in sorted(set(families)):
        groups = [index for index, name in enumerate(families) if name == family]
        per_batch = max(1, MAX_RUNS[family] // options.runs_per_task)
        for start in range(0, len(groups), per_batch):
            part = groups[start : start + per_batch]
            batches += _draw_batches(options, family, part, n_runs, (timing, *also_fit), rng, seed)
    return batches


def _draw_batches(
    options: EpisodeOptions,
    family: str,
    groups: Sequence[int],
    n_runs: int,
    timings: Sequence[Timing],
    rng: np.random.Generator,
    seed: int,
) -> list[Batch]:
    """Tasks of one family with one horizon and batch size: one batch, or several where networks cannot be stacked."""
    low, high = options.horizon
    high = min(high, options.max_cnn_horizon) if family in _DEAR else high
    total_steps = fitting_horizon(round(float(np.exp(rng.uniform(np.log(low), np.log(high))))), *timings)
    batch_size = int(rng.choice(BATCH_SIZES))
    tasks: list[tuple[SmallTask, int]] = []
    for group in groups:
        rng_ = numpy_generator(seed, family, group, "task")
        like = tasks[0][0] if tasks and family in SEQUENCE_FAMILIES else None  # only copies are trained together
        rows = options.train_rows
        tasks.append((draw_task(family, rng_, batch_size=batch_size, train_rows=rows, like=like), group))
    tasks.sort(key=_likeness)
    batches = []
    for _, alike in itertools.groupby(tasks, lambda pair: _stackable(pair[0])):
        runs: list[tuple[SmallTask, int, int, float, float]] = []
        for task, group in alike:
            count = min(options.runs_per_task, n_runs - group * options.runs_per_task)
            run_seed = derive_seed(seed, "run", group, "root") >> 1
            chance = _val_chance(options, float(rng.random()))
            runs += [(task, group, run_seed, float(lr), chance) for lr in _draw_rates(options, count, rng)]
        tasks_, groups_, seeds, rates, chances = zip(*runs, strict=True)
        batches.append(Batch(family, tasks_, groups_, seeds, rates, chances, total_steps))
    return batches


def _likeness(pair: tuple[SmallTask, int]) -> tuple[object, ...]:
    """What runs side by side should have in common: what can be stacked, then what is computed alike."""
    task = pair[0]
    return (*_stackable(task), task.kind, task.optimizer, task.network.activation, pair[1])


def _stackable(task: SmallTask) -> tuple[object, ...]:
    """What tasks must have in common to be trained as one batch."""
    network = task.network
    if network.kind == "cnn":
        return task.input_shape[1:], len(network.hidden)
    if isinstance(network, Network) and network.kind in SEQUENCE_KINDS:
        return task.input_shape, network.hidden, network.heads, network.activation
    return ()


def _draw_rates(options: EpisodeOptions, count: int, rng: np.random.Generator) -> Array:
    """Log-uniform rates, one from each of so many equal parts of the range."""
    low, high = np.log(options.initial_lr)
    shares = (np.arange(count) + rng.random(count)) / count
    return np.asarray(np.exp(low + shares * (high - low)))


def _val_chance(options: EpisodeOptions, draw: float) -> float:
    if draw < options.no_validation:
        return 0.0
    return 0.5 if draw < options.no_validation + options.some_validation else 1.0


def count_decisions(total_steps: int, timing: Timing) -> int:
    """Decisions in a run of so many steps, the one at its end included."""
    step = index = 0
    while step < total_steps:
        step = timing.next_decision(index, step, total_steps, None)
        index += 1
    return index


def fitting_horizon(total_steps: int, *timings: Timing) -> int:
    """The nearest budget with exactly `early_decisions + n_decisions` decisions; rounding may give one more or less.

    Args:
        total_steps: The budget that is wished for.
        timings: One, or several that all have to fit.

    Raises:
        InputError: A timing is not by shares of the budget, so that runs of different horizons cannot keep step.
    """
    for timing in timings:
        if timing.every is not None:
            raise InputError(
                f"timing has every={timing.every!r}; batches of runs need every=None, shares of the budget"
            )
    wanted = [timing.early_decisions + timing.n_decisions for timing in timings]
    for distance in range(max(total_steps, _REACH)):
        for candidate in (total_steps + distance, total_steps - distance):
            if candidate > 0 and [count_decisions(candidate, timing) for timing in timings] == wanted:
                return candidate
    raise InputError(f"no budget near {total_steps} steps has {' and '.join(map(str, wanted))} decisions; take fewer")
