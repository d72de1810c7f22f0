"""What every kind of job needs: its data, its task, its loop's settings, and the speed of its network.

Called by trimtab.experiments.single and trimtab.experiments.searches.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from trimtab import registry
from trimtab.errors import InputError
from trimtab.seeding import torch_generator
from trimtab.tasks.base import Data, Task
from trimtab.training.loop import TrainingLoop

__all__ = ["Job", "Progress", "begin_with", "cosine_of", "find_device", "inference_speed", "load_data", "make_task"]

# New tokens by which the speed of inference is measured; the write-up that asks for it samples whole texts.
INFERENCE_TOKENS = 64

Job = Mapping[str, Any]  # `trimtab.experiments.plan.Job` as JSON
Progress = Callable[[dict[str, Any]], None]


@functools.lru_cache(maxsize=4)
def load_data(task: str, scale: str, data_dir: str | None) -> Data:
    """Data of a task, kept for the next job of this process."""
    data: Data = registry.load("task", task)(scale).load(None if data_dir is None else Path(data_dir))
    return data


def make_task(job: Job) -> Task:
    """The job's task, with what the study and the arm say instead of its own.

    Raises:
        InputError: A value that the task cannot have.
    """
    task: Task = registry.load("task", job["task"])(job["scale"])
    changes: dict[str, Any] = {}
    if job["total_steps"] is not None:
        changes["total_steps"] = job["total_steps"]
        # The warm-up keeps its share of the budget.
        changes["warmup_steps"] = round(task.warmup_steps * job["total_steps"] / task.total_steps)
    for key, name in (("initial_lr", "lr"), ("weight_decay", "weight_decay"), ("optimizer", "optimizer")):
        if job[key] is not None:
            changes[name] = job[key]
    return task.replace(**changes)


def cosine_of(task: Task, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a cosine: the task's own warm-up and final rate, where the study does not say otherwise."""
    return {"warmup_steps": task.warmup_steps, "min_factor": task.min_lr_factor, **given}


def begin_with(loop: TrainingLoop, start: Mapping[str, int], arm: str) -> None:
    """Settings of the arm instead of the task's; the budget stays the task's.

    Raises:
        InputError: A batch size that there are not the samples for.
    """
    try:
        loop.resize(start.get("batch_size", loop.batch_size))
    except InputError as error:
        raise InputError(f"start of arm {arm!r}: {error}") from error
    loop.accumulation = start.get("accumulation", loop.accumulation)


def find_device(name: str) -> str:
    """The device, where "auto" leaves it to the machine."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def inference_speed(loop: TrainingLoop) -> float | None:
    """Tokens a second when one text is continued, token by token; None for tasks without text."""
    generate = getattr(loop.model, "generate", None)
    if generate is None:
        return None
    device = loop.device
    generator = torch.Generator(device).manual_seed(torch_generator(0, "inference").initial_seed())
    prompt = torch.zeros((1, 1), dtype=torch.int64, device=device)
    started = time.perf_counter()
    generate(prompt, INFERENCE_TOKENS, generator=generator).tolist()
    return INFERENCE_TOKENS / (time.perf_counter() - started)
