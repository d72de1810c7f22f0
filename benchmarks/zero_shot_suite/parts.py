"""Parts: a task and an optimizer each, the rates that are tried on it, and the rates that users may have written.

A part is a cut of a task at the scale "small", so that several hundred runs of it are affordable. Nothing here was
chosen by looking at what a controller of ours does on it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from trimtab import registry
from trimtab.errors import InputError, unknown_name
from trimtab.seeding import derive_seed, numpy_generator
from trimtab.tasks.base import Task

__all__ = ["PARTS", "SEARCHED", "Options", "Part", "drawn_rates", "find_part", "rate_grid", "run_seed"]

ROOT_SEED = 0
SEARCHED = (-5.0, -1.0)  # log10 of the rates that a user may have written: the draws, and the random search
# log10 of the rates among which arms are tuned: four decades around where the best ones lie on these parts, which for
# SGD is around 0.1. Where an arm's best is at the edge all the same, the table marks it.
_TUNED = {"adam": (-4.5, -0.5), "adamw": (-4.5, -0.5), "sgd": (-4.0, 0.0)}


@dataclass(frozen=True)
class Options:
    """How much is run of every part.

    Attributes:
        rates: Rates of tuned cosine's grid, over four decades; a multiple of 4.
        seeds: Seeds that choose, and as many others that report.
        other_seeds: Seeds that choose for the other tuned arms: half of them at every second rate, then all of them
            at the best of those and its two neighbours.
    """

    rates: int = 16
    seeds: int = 8
    other_seeds: int = 4

    def __post_init__(self) -> None:
        if self.rates < 4 or self.rates % 4:
            raise InputError(f"rates is {self.rates}; expected 4, 8, 12, 16, ... (the same number in each decade)")
        if self.seeds < 2:
            raise InputError(f"seeds is {self.seeds}; expected 2 or more, for a twin replays another seed's run")
        if not 1 <= self.other_seeds <= self.seeds:
            raise InputError(f"other_seeds is {self.other_seeds}; expected 1 to {self.seeds}, the seeds there are")

    @property
    def is_trial(self) -> bool:
        """Whether this is less than what the benchmark asks for."""
        return self.rates < 16 or self.seeds < 8

    def to_json(self) -> dict[str, int]:
        """Plain JSON types; `Options(**...)` is the inverse."""
        return asdict(self)


@dataclass(frozen=True)
class Part:
    """One row of the benchmark.

    Attributes:
        name: Its name, and its file's.
        task_name: In the registry; parts of one task are not independent, and the bootstrap keeps them together.
        changes: Fields of the task at scale "small" that differ here.
        cost_s: CPU seconds of one run as measured, for the first guess of the time left.
    """

    name: str
    task_name: str
    changes: dict[str, Any] = field(default_factory=dict)
    cost_s: float = 1.0

    def task(self, lr: float | None = None) -> Task:
        """The task, at a learning rate."""
        task: Task = registry.load("task", self.task_name)("small")
        changes = dict(self.changes)
        if "total_steps" in changes:  # the warm-up keeps its share of the budget
            share = task.warmup_steps / task.total_steps
            changes["warmup_steps"] = round(share * changes["total_steps"])
        return task.replace(**changes, **({} if lr is None else {"lr": lr}))

    def describe(self) -> dict[str, Any]:
        """What decides about a run of this part, as JSON: runs under another description are not comparable."""
        task = self.task()
        names = ["optimizer", "momentum", "betas", "weight_decay", "batch_size", "total_steps", "eval_every"]
        names += ["grad_clip", "warmup_steps", "min_lr_factor", "eval_batches", "test_batches"]
        values = {name: getattr(task, name) for name in names}
        return {"task": self.task_name, "scale": "small", **values, "betas": list(task.betas)}


_SGD = {"optimizer": "sgd", "momentum": 0.9}
PARTS: dict[str, Part] = {
    part.name: part
    for part in (
        Part("digits-mlp-60", "digits-mlp", {"total_steps": 60, "eval_every": 5}, cost_s=0.11),
        Part("digits-mlp-660", "digits-mlp", {"eval_every": 30}, cost_s=0.4),
        Part("digits-mlp-2000", "digits-mlp", {"total_steps": 2000, "eval_every": 100}, cost_s=1.05),
        Part("digits-mlp-660-sgd", "digits-mlp", {"eval_every": 30, **_SGD}, cost_s=0.3),
        Part("titanic-fcnn", "titanic-fcnn", {"eval_every": 30}, cost_s=0.4),
        Part("mnist-mlp", "mnist-mlp", cost_s=0.32),
        Part("mnist-mlp-sgd", "mnist-mlp", _SGD, cost_s=0.28),
        Part("sst2-mlp", "sst2-mlp", cost_s=0.35),
        Part("sst2-bilstm", "sst2-bilstm", cost_s=3.1),
        Part("mnist-cnn", "mnist-cnn", {"batch_size": 16, "total_steps": 120, "eval_every": 12}, cost_s=5.4),
        Part("cifar10-cnn", "cifar10-cnn", {"total_steps": 200, "eval_every": 25}, cost_s=6.9),
        Part("cifar10-cnn-sgd", "cifar10-cnn", {"total_steps": 200, "eval_every": 25, **_SGD}, cost_s=6.9),
        Part(
            "shakespeare-gpt",
            "shakespeare-gpt",
            {"batch_size": 4, "total_steps": 200, "eval_every": 20, "eval_batches": 15, "test_batches": 60},
            cost_s=7.4,
        ),
    )
}


def find_part(name: str) -> Part:
    """A part by name.

    Raises:
        UnknownNameError: There is none.
    """
    if name not in PARTS:
        raise unknown_name("part", name, PARTS)
    return PARTS[name]


def rate_grid(bounds: tuple[float, float], n: int) -> list[float]:
    """Midpoints of `n` equal stretches of log10 of the rate: each stands for the rates around it, evenly.

    Args:
        bounds: log10 of the least and the greatest rate.
        n: Rates.

    >>> rate_grid((-4.0, 0.0), 2)
    [0.001, 0.1]
    """
    low, high = bounds
    width = (high - low) / n
    return [float(f"{10 ** (low + (index + 0.5) * width):.4g}") for index in range(n)]


def tuned_grid(part: Part, options: Options) -> list[float]:
    """The rates among which the arms of a part are tuned."""
    return rate_grid(_TUNED[part.task().optimizer], options.rates)


def drawn_rates(part: Part, n: int) -> list[float]:
    """One initial rate for each report seed, log-uniform over `SEARCHED`, the same for every arm.

    Stratified: each of `n` equal stretches of log10 is drawn from once, in an order of its own, so that the mean over
    few draws is nearer to that over all rates.
    """
    generator = numpy_generator(ROOT_SEED, "zero-shot rates", part.name)
    places = (generator.permutation(n) + generator.random(n)) / n
    low, high = SEARCHED
    return [float(f"{10 ** (low + (high - low) * place):.4g}") for place in np.asarray(places).tolist()]


def run_seed(part: Part, role: str, index: int) -> int:
    """Seed of a run's weights, data order and dropout: the same for all arms.

    Args:
        part: The part.
        role: "choose" or "report".
        index: Number of the seed, from 0.
    """
    return derive_seed(ROOT_SEED, "zero-shot", part.name, role, index + 1)
