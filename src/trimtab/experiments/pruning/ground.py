"""Ground: what all cells of a piece of work stand on: data, the task's own training and fine-tuning, and test.

Made by `job`, read by `dense` and `cell`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.cost import count_cost
from trimtab.errors import InputError
from trimtab.experiments.jobs import find_device, load_data
from trimtab.pruning.network import PrunableNetwork
from trimtab.pruning.scores import score_sum
from trimtab.seeding import derive_seed, scoped_global_rng, torch_generator
from trimtab.tasks.base import Data, Split, Task
from trimtab.training.batches import EpochBatches, augmentation_of

__all__ = ["FineTuner", "Ground", "HeldOut", "accuracy", "costs_of"]

_EXAMPLES = 8  # samples of the batch that a network is traced and counted with; numbers in reports are of one
_BATCH = 256


class HeldOut:
    """A test split that counts how often it is read.

    Args:
        split: The split.

    Attributes:
        reads: Networks whose accuracy was measured.
    """

    def __init__(self, split: Split) -> None:
        self._split = split
        self.reads = 0

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Share of samples that a network in evaluation classifies rightly."""
        self.reads += 1
        return accuracy(model, self._split)


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """Share of a split's samples that a network in evaluation classifies rightly."""
    right = 0.0
    for start in range(0, len(split.targets), _BATCH):
        batch = slice(start, start + _BATCH)
        right += score_sum(model(split.inputs[batch]), split.targets[batch])[0]
    return right / len(split.targets)


@dataclass
class FineTuner:
    """Trains a network for a number of optimizer steps, the same samples in the same order for every network.

    Adam with the task's weight decay and clipping, the rate constant; nothing is validated on the way.

    Attributes:
        task: Whose loss, batch size and so on.
        train: What is trained on.
        steps: Optimizer steps.
        rate: Learning rate.
        seed: Of the order.
        seconds: Of each fine-tuning so far.
    """

    task: Task
    train: Split
    steps: int
    rate: float
    seed: int
    seconds: list[float] = field(default_factory=list)

    def __call__(self, model: nn.Module) -> None:
        """Train in place."""
        started = time.perf_counter()
        augmentation = augmentation_of(self.task, self.train, derive_seed(self.seed, "fine-tuning"))
        order = torch_generator(self.seed, "fine-tuning order")
        batches = EpochBatches(self.train, self.task.batch_size, order, augmentation)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, self.rate, self.task.betas, weight_decay=self.task.weight_decay)
        for _ in range(self.steps):
            inputs, targets = batches.next()
            optimizer.zero_grad()
            self.task.loss(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
            if self.task.grad_clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, self.task.grad_clip)
            optimizer.step()
        self.seconds.append(time.perf_counter() - started)


@dataclass(frozen=True)
class Ground:
    """See the head of this file.

    Attributes:
        job: The piece of work, as `schema.jobs_of` has it.
        task: At the study's scale.
        data: Of the task, on the CPU.
        device: What everything runs on.
        train: On that device.
        val: The same; what searches are scored on.
        test: As it was loaded; only `HeldOut` reads it.
        folder: Of the piece of work.
    """

    job: Mapping[str, Any]
    task: Task
    data: Data
    device: torch.device
    train: Split
    val: Split
    test: Split
    folder: Path

    @classmethod
    def of(cls, job: Mapping[str, Any], task: Task, folder: Path, data_dir: str | None) -> Ground:
        """Load a task's data.

        Raises:
            InputError: The task is none of classification, or its data is missing.
        """
        if task.kind != "classification":
            raise InputError(f"task {task.name!r} is of {task.kind}; a study of pruning needs one of classification")
        data = load_data(task.name, job["scale"], data_dir)
        device = torch.device(find_device(job["device"]))
        train, val, test = (
            Split(split.inputs.to(device), split.targets.to(device)) for split in (data.train, data.val, data.test)
        )
        return cls(job, task, data, device, train, val, test, folder)

    def seed(self, purpose: str) -> int:
        """Seed of one purpose, the same for all cells of this piece of work."""
        return derive_seed(self.job["root_seed"], purpose, self.task.name, self.job["seed"])

    @property
    def examples(self) -> Tensor:
        """A small batch, for tracing and counting; (8, ...)."""
        return self.val.inputs[:_EXAMPLES]

    def describe(self, model: nn.Module) -> PrunableNetwork:
        """What can be pruned of a network.

        Raises:
            InputError: Nothing, or it cannot be traced.
        """
        return PrunableNetwork(model, self.examples, multiple=self.job["multiple"])

    def fine_tuner(self) -> FineTuner | None:
        """A new one; None where nothing is fine-tuned."""
        return self._tuner(self.job["fine_tune_steps"])

    def score_tuner(self) -> FineTuner | None:
        """A new one, for the moment before each score; None where networks are scored as they are cut."""
        return self._tuner(self.job["score_steps"])

    def _tuner(self, steps: int) -> FineTuner | None:
        rate = self.task.lr * self.job["fine_tune_rate"]
        return FineTuner(self.task, self.train, steps, rate, self.seed("fine-tuning")) if steps else None

    def new_network(self) -> nn.Module:
        """The task's network with new weights, on the CPU; torch's generator is lent."""
        with scoped_global_rng([torch_generator(0, "structure").get_state()], torch.device("cpu")):
            return self.task.make_model(self.data)


def costs_of(model: nn.Module, examples: Tensor) -> dict[str, int]:
    """FLOPs and MACs of a forward pass of one sample, parameters, and bytes on disk."""
    cost = count_cost(model, examples)
    flops = round(cost.forward_flops / len(examples))
    return {"flops": flops, "macs": flops // 2, "parameters": cost.parameters, "bytes": cost.bytes}
