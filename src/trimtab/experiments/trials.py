"""One trial of a search: a run of the task from values of the search, under the arm's schedule, in equal parts.

Called by searches and pbt. A trial is the run that the plain schedule would be with these values: the same start, the
same steps. No controller takes part. Its budget is divided into equal parts, after each of which it is validated; a
step that costs more than a part passes over some, and where the budget pays for no further step the trial is at its
end.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trimtab.agents.base import Base
from trimtab.agents.scripted import make_schedule
from trimtab.errors import InputError
from trimtab.experiments.jobs import Job, begin_with, cosine_of, find_device, make_task
from trimtab.experiments.search_space import Space, Values
from trimtab.knobs.optimizer import LearningRate
from trimtab.seeding import derive_seed
from trimtab.storage import load_state, read_json, save_state, write_json
from trimtab.tasks.base import Data
from trimtab.training.loop import ROUNDING, TrainingLoop

__all__ = ["Record", "Setup", "TrialRun", "loss_of", "read_record", "trial_folder", "write_record"]

Record = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """What all trials of a search share.

    Attributes:
        job: The job that the search is.
        data: Of its task.
        space: Its parameters.
        n_parts: Parts of a trial.
    """

    job: Job
    data: Data
    space: Space
    n_parts: int

    @property
    def seed(self) -> int:
        """Of the run, which is that of every other arm under the job's seed."""
        job = self.job
        return derive_seed(job["root_seed"], "run", job["task"], job["seed"])

    def make_loop(self, values: Values, total_steps: int | None = None) -> TrainingLoop:
        """A fresh loop with the values that its task takes; a budget of None is the job's."""
        job = self.job
        task = make_task(job if total_steps is None else {**job, "total_steps": total_steps})
        task = self.space.on_task(task, values)
        device = find_device(job["device"])
        loop = TrainingLoop(task, self.data, seed=self.seed, device=device, precision=job["precision"])
        begin_with(loop, job["start"], job["arm"])
        return loop


@dataclass
class _Times:
    training: float = 0.0
    validation: float = 0.0


class TrialRun:
    """A trial under way.

    Args:
        setup: What it shares with the others.
        values: One for each parameter.
        total_steps: Its budget, in optimizer steps of the task's own cost.

    Attributes:
        loop: The run.
        rows: What was measured after each part.
        times: Wall time in seconds.

    Raises:
        InputError: A value does not act.
    """

    def __init__(self, setup: Setup, values: Values, total_steps: int) -> None:
        self.values = values
        self.rows: list[dict[str, Any]] = []
        self.times = _Times()
        self.loop = setup.make_loop(values, total_steps)
        self._setup = setup
        self._total_steps = total_steps
        self._state, self._knobs = setup.space.act(self.loop, values, setup.seed)
        self._rate = self._knobs.get("lr") or LearningRate()
        if "lr" not in self._knobs:
            self._rate.bind(self._state)
        self._setting = self._rate.get(self._state)
        job = setup.job
        options = cosine_of(self.loop.task, job["options"]) if job["agent"] == "cosine" else job["options"]
        self._schedule = make_schedule(Base(job["agent"], options))
        self._write_rate()

    def _write_rate(self) -> None:
        self._rate.put(self._state, self._setting * self._schedule(self.loop.spent, self._total_steps))

    @property
    def is_over(self) -> bool:
        """Whether its end was reached and measured."""
        return bool(self.rows) and self.rows[-1]["part"] == self._setup.n_parts

    def train(self, until: int) -> None:
        """Train to the end of a part, if it is not there yet, and validate.

        Args:
            until: Number of the part, from 1.
        """
        loop, n_parts = self.loop, self._setup.n_parts
        if self.rows and self.rows[-1]["part"] >= until:
            return
        started = time.perf_counter()
        losses = []
        part = 0
        while part < until and not loop.is_over():
            losses.append(loop.step())
            self._write_rate()
            part = math.floor((loop.spent + ROUNDING) * n_parts / self._total_steps)
        train_loss = float(torch.stack(losses).double().mean()) if losses else None
        trained = time.perf_counter()
        measured = loop.evaluate("val")
        self.times.training += trained - started
        self.times.validation += time.perf_counter() - trained
        self.rows.append({
            "part": n_parts if loop.is_over() else part,
            "optimizer_step": loop.steps_done,
            "spent": loop.spent,
            "samples": loop.samples_seen,
            "epoch": loop.epoch,
            "train_loss": train_loss,
            "val_loss": measured["loss"],
            "accuracy": measured.get("accuracy"),
        })  # fmt: skip

    def run(self, should_stop: Callable[[dict[str, Any]], bool]) -> bool:
        """Train to the end, or until somebody says so after a part.

        Returns:
            Whether it was stopped before its end.
        """
        while not self.is_over:
            self.train((self.rows[-1]["part"] if self.rows else 0) + 1)
            if should_stop(self.rows[-1]) and not self.is_over:
                return True
        return False

    def record(self, number: int, *, is_stopped: bool = False) -> Record:
        """What trial.json holds."""
        last = self.rows[-1]
        status = "pruned" if is_stopped else "done" if math.isfinite(last["val_loss"]) else "diverged"
        return {
            "number": number,
            "status": status if last["optimizer_step"] else "idle",
            "values": self.values,
            "total_steps": self._total_steps,
            **{key: last[key] for key in ("optimizer_step", "spent", "samples", "epoch", "val_loss", "accuracy")},
            "rows": self.rows,
            "times": vars(self.times),
        }

    def save(self, path: Path) -> None:
        """Keep everything that the trial goes on from."""
        save_state(path, {"loop": self.loop.state_dict(), "rows": self.rows, "times": vars(self.times)})

    def load(self, path: Path, source: Path | None = None) -> None:
        """Go on from what `save` kept.

        Args:
            path: Of this trial.
            source: Of the trial that weights and what the optimizer remembers come from instead.

        Raises:
            InputError: A file is broken, or a value does not act.
        """
        kept = load_state(path)
        loop_state = kept["loop"]
        if source is not None:
            other = load_state(source)["loop"]
            loop_state = {**loop_state, "model": other["model"], "optimizer": other["optimizer"]}
        self.loop.load_state_dict(loop_state)
        self.rows, self.times = kept["rows"], _Times(**kept["times"])
        space = self._setup.space
        for name, knob in self._knobs.items():
            knob.put(self._state, space.setting(name, self.values[name]))
        self._write_rate()
        space.check(self._state, self._knobs, self.values, but=("lr",))


def trial_folder(path: Path, number: int) -> Path:
    """Folder of a trial below that of its search."""
    return path / f"trial-{number:03d}"


def read_record(folder: Path, values: Values | None = None) -> Record | None:
    """A trial that is over; None where it is not.

    Args:
        folder: Of the trial.
        values: What it must have been of; None asks nothing.

    Raises:
        InputError: It was of other values.
    """
    if not (folder / "trial.json").exists():
        return None
    record: Record = read_json(folder / "trial.json")
    if values is not None and record["values"] != values:
        raise InputError(
            f"{folder} holds a trial of {record['values']} where the search asks for {values}; it was begun by another "
            "version: remove the folder of the run and run it again"
        )
    return record


def write_record(folder: Path, record: Record) -> None:
    """Write a trial that is over; a loss that is not finite becomes null."""
    write_json(folder / "trial.json", record)


def loss_of(record: Record) -> float:
    """Validation loss by which a trial wins; infinite where it is not finite, or the trial has not come to an end.

    One whose budget paid for no step is at the end of nothing.
    """
    loss = record["val_loss"]
    return float(loss) if record["status"] == "done" and loss is not None and math.isfinite(loss) else math.inf
