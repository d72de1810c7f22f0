"""The order of a study's jobs: what waits for what, what follows from what has come back.

Called by trimtab.experiments.run. Tuning runs go first, since the tuned arm waits for all of a task's; a
yoked run waits for the run that it replays. One failed run stops only those that need it, and each of them
is named.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from trimtab.executors import Event, Executor
from trimtab.experiments.design import Study
from trimtab.experiments.plan import Job, choose_rate, plan_jobs, tuned_jobs, tuning_jobs
from trimtab.experiments.progress import describe, news_of
from trimtab.progress import Display
from trimtab.storage import atomic_write, read_json, write_json

__all__ = ["Conductor", "result_of"]


def result_of(out: Path, directory: str) -> dict[str, Any] | None:
    """The result of a run that is over and did not fail; None where it must be run (again)."""
    path = out / directory / "result.json"
    if not path.exists():
        return None
    result: dict[str, Any] = read_json(path)
    return None if result.get("status") == "failed" else result


class Conductor:
    """Runs every job of a study that is not done.

    Args:
        study: The study.
        out: Its folder, in which study.json lies.
        data_dir: Folder with the data sets as files.
        executor: Does the jobs; its function takes a job, the folder and the data folder.
        display: Where to show how it goes.

    Attributes:
        n_runs: Runs that the study has.
        failed: Run folder -> why, for every run that did not come to its end.
    """

    def __init__(self, study: Study, out: Path, data_dir: Path | None, executor: Executor, display: Display) -> None:
        self._study = study
        self._out = out
        self._data_dir = None if data_dir is None else str(data_dir)
        self._executor = executor
        self._display = display
        self._jobs: dict[str, Job] = {}
        self._over: set[str] = set()
        self._waiting: dict[str, list[Job]] = defaultdict(list)
        self._tuning_left: dict[str, set[str]] = defaultdict(set)
        self._chosen: dict[str, float] = {}
        self.failed: dict[str, str] = {}
        tuning = tuning_jobs(study)
        for job in tuning:
            self._tuning_left[job.task].add(job.directory)
        self._todo = [*tuning, *plan_jobs(study)]
        # Any rate gives the tuned arm's runs their number; which one is known only later.
        tuned = [tuned_jobs(study, task, 1.0) for task in self._tuning_left]
        self.n_runs = len(self._todo) + sum(len(jobs) for jobs in tuned)

    def run(self) -> None:
        """Run everything; returns when nothing is left that can be run."""
        done = [job for job in self._todo if result_of(self._out, job.directory) is not None]
        self._display.begin(self.n_runs, len(done))
        self._over |= {job.directory for job in done}
        for job in self._todo:
            self._add(job)
        for task in list(self._tuning_left):
            for directory in [job.directory for job in done if job.role == "tuning" and job.task == task]:
                self._tuning_left[task].discard(directory)
            self._choose(task)
        self._executor.drain(self._on_event)

    def _add(self, job: Job) -> None:
        self._jobs[job.directory] = job
        partner = job.replay_from
        if job.directory in self._over:
            return
        if partner in self.failed:
            self._fail(job, f"the run that it replays, {partner}, failed")
        elif partner is not None and partner not in self._over:
            self._waiting[partner].append(job)
        else:
            # A result that says "failed" must not be taken for done by the one who runs it again.
            (self._out / job.directory / "result.json").unlink(missing_ok=True)
            self._executor.submit(job.directory, job.to_json(), str(self._out), self._data_dir)

    def _on_event(self, event: Event) -> None:
        job = self._jobs[event.key]
        if event.kind == "started":
            self._display.started(job.directory, describe(job))
        elif event.kind == "progress":
            self._display.news(job.directory, news_of(event.data))
        elif event.kind == "failed":
            if event.data["traceback"]:
                atomic_write(self._out / job.directory / "error.txt", event.data["traceback"])
            self._fail(job, event.data["error"])
        elif event.data.get("status") == "failed":
            self._fail(job, str(event.data.get("error")))
        else:
            if event.data.get("status") == "gave_up":
                self._display.say(f"gave up: {describe(job)}; its best weights are kept")
            self._finish(job)

    def _finish(self, job: Job) -> None:
        self._over.add(job.directory)
        self._display.over(job.directory)
        for follower in self._waiting.pop(job.directory, []):
            self._add(follower)
        if job.role == "tuning":
            self._tuning_left[job.task].discard(job.directory)
            self._choose(job.task)

    def _fail(self, job: Job, why: str) -> None:
        self.failed[job.directory] = why
        self._display.say(f"failed: {describe(job)}: {why}")
        self._display.over(job.directory)
        for follower in self._waiting.pop(job.directory, []):
            self._fail(follower, f"the run that it replays, {job.directory}, failed")
        if job.role == "tuning":
            self._tuning_left[job.task].discard(job.directory)
            self._choose(job.task)

    def _choose(self, task: str) -> None:
        """Choose the tuned arm's rate for a task, once all its tuning runs are over, and queue its runs."""
        tuning = self._study.tuning
        if tuning is None or self._tuning_left[task]:
            return
        runs = [job for job in self._jobs.values() if job.role == "tuning" and job.task == task]
        failed = next((job.directory for job in runs if job.directory in self.failed), None)
        if failed:
            self._fail_tuned(task, f"its rate could not be chosen, since the tuning run {failed} failed")
            return
        losses: dict[float, list[float | None]] = defaultdict(list)
        for job in runs:
            result = result_of(self._out, job.directory) or {}
            losses[job.initial_lr or 0.0].append((result.get("metrics") or {}).get("final_val_loss"))
        rate = choose_rate(losses)
        if rate is None:
            self._fail_tuned(task, "no rate of tuning.lrs ended with a finite loss")
            return
        self._chosen[task] = rate
        self._write_choice()
        for job in tuned_jobs(self._study, task, rate):
            if result_of(self._out, job.directory) is not None:
                self._over.add(job.directory)
                self._display.over(job.directory)
            self._add(job)

    def _fail_tuned(self, task: str, why: str) -> None:
        for job in tuned_jobs(self._study, task, 1.0):
            # No rate, no folder: the name says whose runs are missing.
            self.failed[job.directory.replace("lr-1.0", "lr-unknown")] = why
            self._display.over(job.directory)
        self._display.say(f"failed: {self._study.tuning.arm.id if self._study.tuning else ''} on {task}: {why}")

    def _write_choice(self) -> None:
        path = self._out / "study.json"
        plan = read_json(path)
        first = self._study.tasks[0]
        plan["tuning"]["chosen"] = {task: self._chosen[task] for task in self._tuning_left if task in self._chosen}
        for arm in plan["arms"]:
            if arm["id"] == plan["tuning"]["arm"]:
                for task in arm["lr"]:
                    source = first if task in self._study.benchmark_tasks else task
                    arm["lr"][task] = self._chosen.get(source)
        write_json(path, plan)
