"""Run a study of pruning: check everything, do its pieces of work in worker processes, go on after any interruption.

Called by `trimtab.experiments.run` for files of `kind: pruning`, and by `command`. Nothing is written and nothing
trains before names, targets, data and the folder have been checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab import machine
from trimtab.errors import OutputError
from trimtab.executors import Event, make_executor
from trimtab.experiments.conductor import result_of
from trimtab.experiments.plan import first_difference
from trimtab.experiments.pruning.job import check_job
from trimtab.experiments.pruning.schema import PruningStudy, jobs_of, study_json
from trimtab.experiments.run import Outcome, check_data_dir, check_workers
from trimtab.folders import WorkFolder, nothing_is_bad_input
from trimtab.progress import Display, News, Silent
from trimtab.storage import atomic_write, read_json, write_json

__all__ = ["RUN_ONE", "run_pruning_study"]

RUN_ONE = "trimtab.experiments.pruning.job:run_one"


def run_pruning_study(
    study: PruningStudy,
    out: Path,
    *,
    data_dir: Path | None = None,
    executor: str = "local",
    workers: int | None = None,
    resume: bool = False,
    display: Display | None = None,
) -> Outcome:
    """Run a resolved study; see `trimtab.experiments.run.run_study` for arguments, errors and what is returned."""
    display = display or Silent()
    out = out.absolute()
    data_dir = check_data_dir(data_dir)
    workers = check_workers(workers, executor, study.settings, RUN_ONE)
    folder = WorkFolder(out, "study.json", "study", "running a study")
    there = read_json(out / "study.json") if folder.is_begun(resume) else None
    difference = None if there is None else first_difference(there, study_json(study, {}))
    if difference:
        raise OutputError(
            f"{out} holds another plan: {difference}; give the options it was begun with, or another --out"
        )
    unfinished = [job for job in jobs_of(study) if result_of(out, job["directory"]) is None]
    for job in {job["task"]: job for job in reversed(unfinished)}.values():
        check_job(job, None if data_dir is None else str(data_dir))
    runs_on = machine.describe(study.settings) if unfinished or there is None else {}
    with folder.hold(resume), display:
        if there is None:
            write_json(out / "study.json", study_json(study, runs_on))
        with nothing_is_bad_input():
            before = (there or {}).get("environment") or {}
            for text in machine.differences(before, runs_on):
                display.say(f"note: {text}; runs may differ")
            failed = _work(study, out, data_dir, unfinished, workers, display)
            from trimtab.experiments.pruning import report  # imports matplotlib and scipy

            display.say("writing the report")
            return Outcome(out, report.write(out), len(jobs_of(study)), failed, {})


def _work(
    study: PruningStudy,
    out: Path,
    data_dir: Path | None,
    unfinished: Sequence[Mapping[str, Any]],
    workers: int,
    display: Display,
) -> dict[str, str]:
    """Do what is left; folder -> why, for what failed."""
    failed: dict[str, str] = {}
    n_all = len(jobs_of(study))
    display.begin(n_all, n_all - len(unfinished), alike=len(study.plans) == 1)
    names = {job["directory"]: f"{job['task']}, seed {job['seed']}" for job in unfinished}

    def on_event(event: Event) -> None:
        if event.kind == "started":
            display.started(event.key, names[event.key])
        elif event.kind == "progress":
            display.news(event.key, News(**event.data))
        else:
            why = event.data.get("error")
            if event.kind == "failed" and event.data["traceback"]:
                atomic_write(out / event.key / "error.txt", event.data["traceback"])
            if why is not None:
                failed[event.key] = str(why)
                display.say(f"failed: {names[event.key]}: {why}")
            display.over(event.key)

    threads = int(study.settings["threads"]) if unfinished else None
    with make_executor("local", RUN_ONE, workers=workers if unfinished else 0, threads=threads) as work:
        for job in unfinished:
            # A result that says "failed" must not be taken for done by the one who does it again.
            (out / job["directory"] / "result.json").unlink(missing_ok=True)
            work.submit(job["directory"], job, str(out), None if data_dir is None else str(data_dir))
        work.drain(on_event)
    return failed
