"""Learn a policy of widths: draw and train many small networks, teach on them, write the brain.

Called by `trimtab learn pruning`. It is done in one process, on one thread, and keeps nothing on the way, so that after
a kill it begins anew; with the same numbers it makes the same brain.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trimtab import machine
from trimtab.errors import InputError
from trimtab.folders import WorkFolder
from trimtab.progress import Display, News, Silent
from trimtab.pruner.lessons import FAMILIES, Lesson, draw_lesson
from trimtab.pruner.policies import BRAIN, TaughtPolicy
from trimtab.pruner.teach import SHARES, TEACHING, teach

__all__ = ["learn_policy"]

NAME = "pruning"
N_LESSONS = 160
N_STEPS = 98 * TEACHING.n_steps
_PACKAGES = ("torch", "numpy", "stable-baselines3", "gymnasium")
_POINTS = 30  # of the curve


def learn_policy(
    out: str | Path | None = None,
    *,
    seed: int = 0,
    n_lessons: int = N_LESSONS,
    n_steps: int = N_STEPS,
    display: Display | None = None,
) -> Path:
    """Learn a policy.

    Args:
        out: Folder, missing or empty; runs/learn-pruning where it is None.
        seed: Root seed, of which all that is drawn follows.
        n_lessons: Networks that it learns on.
        n_steps: Environment steps, rounded up to whole rollouts of 2,048; an episode has one for each part of its
            network.
        display: Where to show how it goes; nowhere where it is None.

    Returns:
        The brain's folder, OUT/brain.

    Raises:
        InputError: A number is out of range, or the folder holds something.
        OutputError: It cannot be written.
    """
    for name, least, value in [("seed", 0, seed), ("n_lessons", 1, n_lessons), ("n_steps", 64, n_steps)]:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name} is {value!r}; expected a whole number of {least} or more")
    display = display or Silent()
    options = replace(TEACHING, n_steps=min(TEACHING.n_steps, n_steps), batch_size=min(TEACHING.batch_size, n_steps))
    n_steps = options.n_steps * math.ceil(n_steps / options.n_steps)
    path = Path("runs") / f"learn-{NAME}" if out is None else Path(out)
    folder = WorkFolder(path, BRAIN, "policy's making", "learning a policy", is_resumable=False)
    folder.is_begun(False)
    with folder.hold(False), display, machine.torch_threads(1):
        cpu_s = time.process_time()
        display.begin(2, 0, "pieces of work", alike=False)
        lessons = _draw(seed, n_lessons, display)
        display.started("teaching", "teaching")
        done = 0

        def tell() -> None:
            nonlocal done
            done += 1
            display.news("teaching", News("step", done, n_steps))

        policy, rewards = teach(lessons, n_steps=n_steps, seed=seed, options=options, on_step=tell)
        display.over("teaching")
        provenance = {
            "command": f"trimtab learn {NAME}" + (f" --seed {seed}" if seed else ""),
            "root_seed": seed,
            "n_lessons": n_lessons,
            "n_steps": n_steps,
            "ppo": asdict(options),
            "versions": machine.describe({"device": "cpu", "threads": torch.get_num_threads()}, _PACKAGES),
            "families": list(FAMILIES),
            "sources": sorted({lesson.source for lesson in lessons}),
            "targets": list(SHARES),
            "lessons_drawn_from": {family: sum(x.family == family for x in lessons) for family in FAMILIES},
            "curve": _curve(rewards),
            "cost": {"cpu_s": round(time.process_time() - cpu_s, 1), "episodes": len(rewards)},
        }
        return TaughtPolicy(policy.weights(), provenance).save(path / BRAIN)


def _draw(seed: int, n_lessons: int, display: Display) -> list[Lesson]:
    display.started("lessons", "networks to learn on")
    lessons = []
    for number in range(n_lessons):
        lessons.append(draw_lesson(seed, number))
        display.news("lessons", News("network", number + 1, n_lessons))
    display.over("lessons")
    return lessons


def _curve(rewards: Sequence[float]) -> list[list[Any]]:
    """(episodes, mean reward) over equal shares of all episodes: how much better than the better rule, per share."""
    parts = [part for part in np.array_split(np.asarray(rewards), _POINTS) if len(part)]
    ends = np.cumsum([len(part) for part in parts])
    return [[int(end), round(float(part.mean()), 4)] for end, part in zip(ends, parts, strict=True)]
