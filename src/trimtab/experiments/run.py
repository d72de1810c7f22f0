"""Run a study: check everything, run its jobs in worker processes, go on after any interruption, report.

Called by the command line, and from Python as `trimtab.experiments.run.run("demo", out=...)`. Nothing is
written and nothing trains before names, options, data and the output folder have been checked. What lies in a
study's folder is the only memory: a job whose result.json is there is done, so that going on after a kill
needs nothing else.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimtab import machine, registry
from trimtab.errors import InputError, MissingDataError, MissingExtraError, OutputError, unknown_name
from trimtab.executors import make_executor
from trimtab.experiments.conductor import Conductor, result_of
from trimtab.experiments.design import Study, find_study, load_study
from trimtab.experiments.own_tasks import register_own
from trimtab.experiments.plan import Job, first_difference, plan_jobs, study_json, tuned_jobs, tuning_jobs
from trimtab.folders import WorkFolder, nothing_is_bad_input
from trimtab.progress import Display, Silent
from trimtab.storage import read_json, write_json
from trimtab.yaml_files import read_yaml

__all__ = ["KINDS", "Outcome", "check_data_dir", "check_workers", "run", "run_study"]

KINDS = ("pruning",)  # of study files, beside those that control training and name none

# What does one job, and what checks one without running it.
RUN_ONE = "trimtab.experiments.single:run_one"
CHECK_JOB = "trimtab.experiments.single:check_job"
CHECK_SEARCHES = "trimtab.experiments.searches:check_searches"
CHECK_OPTIMIZERS = "trimtab.experiments.single:check_own_optimizers"


@dataclass(frozen=True)
class Outcome:
    """What became of a study.

    Attributes:
        out: Its folder.
        report: report.html.
        n_runs: Runs that it has.
        failed: Run folder -> why, for every run that did not come to its end.
        left_out: Task -> why, for every optional task whose data was not found.
    """

    out: Path
    report: Path
    n_runs: int
    failed: Mapping[str, str]
    left_out: Mapping[str, str]

    @property
    def exit_code(self) -> int:
        """0 where everything that was asked for was done, else 1."""
        return 1 if self.failed else 0


def run(
    name_or_path: str | Path,
    *,
    scale: str = "small",
    tasks: Sequence[str] | None = None,
    arms: Sequence[str] | None = None,
    n_seeds: int | None = None,
    seed: int | None = None,
    out: str | Path | None = None,
    data_dir: str | Path | None = None,
    **how: Any,
) -> Outcome:
    """Run a study by name or file.

    Args:
        name_or_path: One of ours ("demo"), or a YAML file.
        scale: "smoke", "small" or "full".
        tasks: Run these tasks alone: names, or FILE.py:NAME for a task of one's own.
        arms: Run these arms alone; of a study of pruning its methods.
        n_seeds: Instead of the study's number of seeds.
        seed: Instead of the study's root seed.
        out: Folder of the study; runs/STUDY where it is None.
        data_dir: Folder with the data sets as files.
        **how: What `run_study` takes: executor, workers, resume, display.

    Raises:
        InputError: Something that was given is wrong; nothing was started and nothing is left behind.
        RunFailedError: The study could not go on at all.
    """
    files: dict[str, str] = {}
    if tasks is not None:
        tasks, files = register_own(tasks, scale)
    asked: dict[str, Any] = {"scale": scale, "tasks": tasks, "arms": arms, "n_seeds": n_seeds, "seed": seed}
    how["data_dir"] = None if data_dir is None else Path(data_dir)
    if _kind_of(name_or_path) == "pruning":
        from trimtab.experiments.pruning.run import run_pruning_study  # what prunes is not asked for otherwise
        from trimtab.experiments.pruning.schema import load_pruning_study

        plan = replace(load_pruning_study(name_or_path, **asked), own_tasks=files)
        return run_pruning_study(plan, Path("runs") / plan.study if out is None else Path(out), **how)
    study = replace(load_study(name_or_path, **asked), own_tasks=files)
    return run_study(study, Path("runs") / study.study if out is None else Path(out), **how)


def _kind_of(name_or_path: str | Path) -> str | None:
    """What a study file says of its kind; None of one that controls training."""
    path = find_study(name_or_path)
    data = read_yaml(path)
    if "kind" not in data:
        return None
    if data["kind"] not in KINDS:
        raise unknown_name(f"kind of study in {path.name}", data["kind"], KINDS)
    return str(data["kind"])


def run_study(
    study: Study,
    out: Path,
    *,
    data_dir: Path | None = None,
    executor: str = "local",
    workers: int | None = None,
    resume: bool = False,
    display: Display | None = None,
) -> Outcome:
    """Run a resolved study.

    Args:
        study: What to run.
        out: Its folder.
        data_dir: Folder with the data sets as files.
        executor: "local".
        workers: Processes at once; None is one for each core; 0 works in this process.
        resume: Go on from what is in `out`, which otherwise must be missing or empty.
        display: Where to show how it goes; nowhere where it is None.

    Returns:
        What became of it; a run that failed is named in it and does not stop the others.

    Raises:
        InputError: Something that was given is wrong; nothing was started and nothing is left behind.
        RunFailedError: The study could not go on at all.
    """
    display = display or Silent()
    out = out.absolute()
    data_dir = check_data_dir(data_dir)
    workers = check_workers(workers, executor, study.settings, RUN_ONE)
    folder = WorkFolder(out, "study.json", "study", "running a study")
    there = read_json(out / "study.json") if folder.is_begun(resume) else None
    study = _with_data(study, data_dir) if there is None else _as_begun(study, there, out)
    unfinished = _unfinished(study, out, there)
    _check_jobs(study, unfinished, data_dir, is_new=there is None)
    runs_on = machine.describe(study.settings) if unfinished or there is None else {}
    with folder.hold(resume), display:
        if there is None:
            write_json(out / "study.json", study_json(study, runs_on))
        with nothing_is_bad_input():
            for text in _remarks(study, there, runs_on):
                display.say(text)
            return _conduct(study, out, data_dir, workers if unfinished else 0, display)


def _conduct(study: Study, out: Path, data_dir: Path | None, workers: int, display: Display) -> Outcome:
    """Run what is left to run, and write the report."""
    # Nothing is left to run: then torch need not be asked for its threads.
    threads = int(study.settings["threads"]) if workers else None
    with make_executor("local", RUN_ONE, workers=workers, threads=threads) as work:
        conductor = Conductor(study, out, data_dir, work, display)
        conductor.run()
    from trimtab.experiments import report  # imports matplotlib and scipy

    display.say("writing the report")
    path = report.write(out)
    left_out = {entry["task"]: entry["why"] for entry in study.left_out}
    return Outcome(out, path, conductor.n_runs, dict(conductor.failed), left_out)


def check_data_dir(data_dir: Path | None) -> Path | None:
    """The folder of data sets, absolute.

    Raises:
        MissingDataError: It is not there.
    """
    if data_dir is not None and not data_dir.is_dir():
        raise MissingDataError(f"the data directory {data_dir} is not there, or is no folder (--data-dir)")
    return None if data_dir is None else data_dir.absolute()


def check_workers(workers: int | None, executor: str, settings: Mapping[str, Any], function: str) -> int:
    """Processes at once; one for each core where it is None.

    Args:
        workers: As it was given.
        executor: Its name.
        settings: device and threads.
        function: "module:attribute" of what does the work.

    Raises:
        InputError: The number or the name is none.
    """
    if workers is None:
        device = machine.resolve_device(str(settings["device"]))
        workers = machine.default_workers(device, int(settings["threads"]))
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
        raise InputError(f"workers: got {workers!r}, expected a whole number of 0 (in this process) or more")
    make_executor(executor, function, workers=workers).close()  # refuses a wrong name; starts nothing
    return workers


def _with_data(study: Study, data_dir: Path | None) -> Study:
    """The study without the optional tasks whose data is not found."""
    for task in (*study.optional_tasks, *study.benchmark_tasks):
        try:
            _load(study, task, data_dir)
        except (MissingDataError, MissingExtraError) as error:
            study = study.leave_out(task, str(error))
    return study


def _as_begun(study: Study, there: Any, out: Path) -> Study:
    """The study as its folder has it, after a check that it is the same one."""
    left_out = (there.get("left_out") or []) if isinstance(there, dict) else []
    for entry in left_out:
        if entry.get("task") in (*study.optional_tasks, *study.benchmark_tasks):
            study = study.leave_out(entry["task"], entry["why"])
    difference = first_difference(there, study_json(study, {}))
    if difference:
        raise OutputError(
            f"{out} holds another plan: {difference}; give the options it was begun with, or another --out"
        )
    return study


def _unfinished(study: Study, out: Path, there: Any) -> list[Job]:
    """Jobs that are still to be run, as far as they are known before the tuned rates are."""
    jobs = [*tuning_jobs(study), *plan_jobs(study)]
    if study.tuning is not None:
        chosen = (there["tuning"].get("chosen") or {}) if there is not None else {}
        for task in (*study.tasks, *study.optional_tasks):
            # Before the choice any rate of the grid stands for the one to come.
            jobs += tuned_jobs(study, task, chosen.get(task, study.tuning.lrs[0]))
    return [job for job in jobs if result_of(out, job.directory) is None]


def _check_jobs(study: Study, unfinished: Iterable[Job], data_dir: Path | None, *, is_new: bool) -> None:
    """Check agents, options, knobs and data of what is to be run, one job for each arm and task."""
    first: dict[tuple[str, str], Job] = {}
    for job in unfinished:
        first.setdefault((job.arm, job.task), job)
    if not first:
        return
    # A new study has loaded its optional and benchmark tasks already.
    known = set(study.tasks) if is_new else {job.task for job in first.values()}
    known |= {name for job in first.values() for name in job.learn_tasks}
    for task in sorted(known):
        _load(study, task, data_dir)
    check = _resolve(CHECK_JOB)
    for job in first.values():
        check(job.to_json())
    folder = None if data_dir is None else str(data_dir)
    searches = [job.to_json() for job in first.values() if job.search is not None]
    if searches:
        _resolve(CHECK_SEARCHES)(searches, folder)
    others = [job.to_json() for job in first.values() if job.own_optimizer is not None]
    if others:
        _resolve(CHECK_OPTIMIZERS)(others, folder)


def _load(study: Study, task: str, data_dir: Path | None) -> None:
    registry.load("task", task)(study.scale).load(data_dir)


def _resolve(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _remarks(study: Study, there: Any, runs_on: Mapping[str, Any]) -> list[str]:
    left_out = [f"left out: {entry['task']}: {entry['why']}" for entry in study.left_out]
    before = there.get("environment") or {} if there is not None else {}
    changed = [f"note: {text}; runs may differ" for text in machine.differences(before, runs_on)]
    return [*left_out, *changed]
