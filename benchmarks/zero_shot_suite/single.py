"""One run of one arm on one part: train, watch validation at the task's `eval_every`, read test at the end.

Called in worker processes by `zero_shot.run_part`. Every arm goes through the same `TrainingLoop` and the same loop
below; an arm differs by what is called after each optimizer step. The validation loss is measured for every arm alike,
for its best weights and for the time to the target; who is told of it is said in `arms`.
"""

from __future__ import annotations

import functools
import gc
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from trimtab import registry
from trimtab.averaging import WeightAverage
from trimtab.tasks.base import Data
from trimtab.training.loop import ROUNDING, TrainingLoop
from zero_shot_suite.arms import Driver, make_driver
from zero_shot_suite.parts import find_part, run_seed

__all__ = ["run_job"]


@functools.lru_cache(maxsize=2)
def _load_data(task_name: str, data_dir: str | None) -> Data:
    data: Data = registry.load("task", task_name)("small").load(None if data_dir is None else Path(data_dir))
    # A controller looks for a second writer among all living objects: 0.2 s a run for what was only imported.
    gc.collect()
    gc.freeze()
    return data


def run_job(job: dict[str, Any], data_dir: str | None, progress: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Run one job to its end.

    Args:
        job: part, arm, rate, role ("choose" or "report"), index of the seed; source of a brain; replay for a twin.
        data_dir: Folder with the data sets, or None.
        progress: Not called: runs are short.

    Returns:
        The job's arm, rate, role and index, and: val0 (validation loss at the start), val, test (final weights),
        best_val, best_test, best_step (weights of the best validation loss; None where the arm is told of none),
        average_val, average_test (running average of the weights at the end; None where there is none),
        curve ([optimizer steps as the task has them, validation loss], report seeds only), status, rollbacks, steps,
        samples, spent (optimizer steps as the task has them), flops (of training, of a brain), masked (knobs of a brain
        that cannot act here), replay (of "default", which has
        a twin: what it decided), seconds (CPU). A loss that is not finite is None.
    """
    del progress
    logging.getLogger("trimtab").setLevel(logging.ERROR)  # roll-backs are counted; here they only tear the bar
    part = find_part(job["part"])
    task = part.task(job["rate"])
    data = _load_data(part.task_name, data_dir)
    started = time.process_time()
    loop = TrainingLoop(task, data, seed=run_seed(part, job["role"], job["index"]))
    driver = make_driver(job, loop)
    watch = _Watch(loop, driver)
    watch.look()
    while not (loop.is_over() or driver.has_given_up()):
        before = loop.spent
        loss = loop.step()
        watch.take_in()
        # Every `eval_every` steps of the task's own cost, whatever steps cost.
        looks = [math.floor((spent + ROUNDING) / task.eval_every) for spent in (before, loop.spent)]
        if looks[0] < looks[1] or loop.is_over():
            watch.look()
        driver.step(loss)
    if not driver.has_given_up():
        watch.look_at_end()
    return {
        **{key: job[key] for key in ("arm", "rate", "role", "index")},
        **watch.end(),
        "curve": [[step, _finite(loss)] for step, loss in watch.curve] if job["role"] == "report" else None,
        "status": driver.status,
        "rollbacks": driver.n_restored(),
        "steps": loop.steps_done,
        "samples": loop.samples_seen,
        "spent": loop.spent,
        "flops": loop.flops_used if job["arm"].startswith("brain:") else None,  # of all others it is the part's
        "masked": driver.masked(),
        "replay": driver.replay() if job["arm"] == "default" else None,
        "seconds": round(time.process_time() - started, 3),
    }


class _Watch:
    """The validation losses of a run, and its best weights so far."""

    def __init__(self, loop: TrainingLoop, driver: Driver) -> None:
        self._loop = loop
        self._driver = driver
        self.curve: list[tuple[float, float]] = []
        self._best: tuple[float, float] = (math.inf, 0)  # loss, when
        self._weights: dict[str, Tensor] | None = None
        self._n_restored = 0
        self._average = WeightAverage(loop.optimizer, loop.model, loop.total_steps)
        self._n_averaged = 0  # roll-backs before the average that is there

    def take_in(self) -> None:
        """After an optimizer step: let the average look at the weights, if it is time."""
        loop, average = self._loop, self._average
        if loop.spent < average.next_look:
            return
        if self._driver.n_restored() != self._n_averaged:
            self._n_averaged = self._driver.n_restored()
            average.restart()
        average.look(loop.spent)

    def look(self) -> None:
        """Measure the validation loss, tell the arm, and keep the weights if they are the best."""
        loop, driver = self._loop, self._driver
        with driver.evaluating():
            loss = loop.evaluate("val")["loss"]
            if loss < self._best[0] and driver.has_best:
                self._best = (loss, self._now)
                self._weights = {key: value.detach().clone() for key, value in loop.model.state_dict().items()}
        self.curve.append((self._now, loss))
        self._n_restored = driver.n_restored()
        driver.report(loss)

    @property
    def _now(self) -> float:
        """Optimizer steps as the task has them: what of the budget is spent."""
        spent = self._loop.spent
        return int(spent) if spent == int(spent) else round(spent, 3)

    def look_at_end(self) -> None:
        """Measure once more where the run ended between two looks."""
        if self.curve[-1][0] != self._now:
            self.look()

    def end(self) -> dict[str, Any]:
        """Read the test split, once for each set of weights that the run ends with."""
        loop, driver = self._loop, self._driver
        is_restored = driver.n_restored() > self._n_restored  # other weights were put in after the last look
        with driver.evaluating():
            if is_restored:
                self.curve.append((self._now, loop.evaluate("val")["loss"]))
            final = loop.evaluate("test")["loss"]
        average = self._averaged()
        with driver.evaluating():
            best = final
            if self._weights is None:
                best = math.inf
            elif self._best[1] != self._now or is_restored:
                loop.model.load_state_dict(driver.best_state() or self._weights)
                best = loop.evaluate("test")["loss"]
        return {
            "val0": _finite(self.curve[0][1]),
            "val": _finite(self.curve[-1][1]),
            "test": _finite(final),
            "best_val": _finite(self._best[0]),
            "best_test": _finite(best),
            "best_step": self._best[1] if driver.has_best else None,
            "average_val": _finite(average[0]),
            "average_test": _finite(average[1]),
        }

    def _averaged(self) -> tuple[float, float]:
        """Validation and test loss of the average; not finite where there is none, after a roll-back near the end."""
        if not self._average.is_there or self._driver.n_restored() != self._n_averaged:
            return math.inf, math.inf
        with self._average.applied():
            return self._loop.evaluate("val")["loss"], self._loop.evaluate("test")["loss"]


def _finite(loss: float) -> float | None:
    """Six digits, which is more than a loss is good for; None for what JSON has no number for."""
    return float(f"{loss:.6g}") if math.isfinite(loss) and abs(loss) < 1e39 else None
