"""Read a study back from its folder: the plan in study.json and every run directory below runs/.

Called by results.py and plots.py. A run that was killed, torn or never started is not dropped: it is in
`StudyFolder.runs` with its status, or counted in `StudyFolder.missing`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import InputError
from trimtab.experiments.resolved import STEPS, WITHOUT_RATE
from trimtab.storage import read_json, read_lines

__all__ = ["LANGUAGE_DATASETS", "Arm", "Run", "StudyFolder", "read_study"]

LANGUAGE_DATASETS = ("shakespeare_char", "enwik8", "text8")
_MANY_RATES = ("sensitivity", "tuning")
_ENDED = ("done", "gave_up", "failed")


@dataclass(frozen=True)
class Arm:
    """One row of the plan.

    Attributes:
        id: Its name in the study.
        agent: Registered name of what decides; of a baseline with an optimizer of its own, that one's.
        kind: "baseline", "learned", "rule", "search", "placebo" or "yoked".
        of: The arm it is the placebo or the twin of.
        base: The schedule under it.
        options: Of the agent.
        lr: Task -> initial rate; None where the task or the agent brings its own, which the runs then name.
        chooses_rate: Whether it begins with rates of its own, so that it was not run from others.
        knobs: Names of the knobs that it moves.
        learn_runs: Runs that it learns from before each run that counts.
    """

    id: str
    agent: str
    kind: str
    of: str | None
    base: str | None
    options: Mapping[str, Any]
    lr: Mapping[str, float | None]
    chooses_rate: bool = False
    knobs: tuple[str, ...] = ("lr",)
    learn_runs: int = 0

    @property
    def decides(self) -> bool:
        """Whether it looks at the run: learned agents and rules."""
        return self.kind in ("learned", "rule")


@dataclass(frozen=True)
class Run:
    """One run directory as found.

    Attributes:
        total_steps: Its budget, in optimizer steps as the task has them.
        status: "done", "gave_up" (the guard ended it, best weights kept), "failed", or "unfinished".
        error: What a failed run said.
        metrics: Of result.json; empty where the run failed.
        times: Of result.json.
        result: All of result.json; empty while the run is unfinished.
        flops_budget: The budget in training FLOPs; 0 where they were not recorded.
        taught: What the brain that it went on from took before the study; None without one, or where nothing says so.
    """

    path: str
    arm: str
    task: str
    dataset: str
    role: str
    seed: int
    initial_lr: float | None
    total_steps: int
    status: str
    error: str | None
    metrics: Mapping[str, Any]
    times: Mapping[str, Any]
    result: Mapping[str, Any]
    series: tuple[Mapping[str, Any], ...]
    decisions: tuple[Mapping[str, Any], ...]
    flops_budget: int = 0
    taught: Mapping[str, Any] | None = None

    @property
    def is_over(self) -> bool:
        """Whether the run has its result, good or bad."""
        return self.status in _ENDED


@dataclass(frozen=True)
class StudyFolder:
    """A study as it lies on disk.

    Attributes:
        path: Its folder.
        plan: study.json.
        arms: Rows of the plan, in its order.
        tasks: Tasks of the plan without those left out.
        benchmark_tasks: Tasks on which the arms are tried untouched.
        runs: Every run directory found, in the order of the plan.
        problems: Run directories that could not be read or fit no arm of the plan, in words.
        missing: Planned runs without a result: one line for each arm, task and role, in words.
        n_planned: Runs that the plan asks for.
        n_over: Of those, how many have their result.
    """

    path: Path
    plan: Mapping[str, Any]
    arms: tuple[Arm, ...]
    tasks: tuple[str, ...]
    benchmark_tasks: tuple[str, ...]
    runs: tuple[Run, ...]
    problems: tuple[str, ...]
    missing: tuple[str, ...]
    n_planned: int
    n_over: int

    def of(self, *, arm: str | None = None, task: str | None = None, role: str | None = None) -> list[Run]:
        """The runs of an arm, a task, a role, or any mixture, by seed and rate."""
        return [
            run for run in self.runs if arm in (None, run.arm) and task in (None, run.task) and role in (None, run.role)
        ]

    def dataset(self, task: str) -> str:
        """Data set of a task as its runs name it; the task's own name before any run."""
        return next((run.dataset for run in self.runs if run.task == task), task)

    def rate(self, arm: Arm, task: str, role: str = "report") -> float | None:
        """Initial rate of an arm on a task: of the plan, or of its runs where the plan leaves it open."""
        planned = arm.lr.get(task)
        found = (run.initial_lr for run in self.of(arm=arm.id, task=task, role=role) if run.initial_lr is not None)
        return planned if planned is not None else next(found, None)

    def arms_on(self, task: str) -> tuple[Arm, ...]:
        """The arms that a task is run with: all of them, where the plan does not name those that are."""
        restriction = (self.plan.get("restricted") or {}).get(task)
        return self.arms if restriction is None else tuple(arm for arm in self.arms if arm.id in restriction["arms"])

    def seeds_on(self, task: str) -> int:
        """How many seeds each arm has on a task."""
        return _seeds_on(self.plan, task)

    @property
    def budget(self) -> str:
        """What budgets are in, `design.STEPS` or `design.FLOPS`."""
        return str(self.plan.get("budget") or STEPS)

    @property
    def tuned_arm(self) -> str | None:
        """The arm whose rate was tuned, if the study has one."""
        tuning = self.plan.get("tuning") or {}
        names = [arm.id for arm in self.arms]
        return next((name for name in (tuning.get("arm"), "tuned-cosine") if name in names), None)


def read_study(out: Path) -> StudyFolder:
    """Read the plan and all run directories of a study's folder.

    Args:
        out: The folder that `trimtab run` wrote.

    Raises:
        InputError: There is no study.json in it, or it is not one of ours.
    """
    if not (out / "study.json").is_file():
        raise InputError(
            f"no study in {out}: expected the file study.json there, and run directories below runs/; "
            "give the folder that `trimtab run STUDY --out DIR` wrote"
        )
    plan = read_json(out / "study.json")
    arms = _arms(plan, out)
    left_out = {entry.get("task") for entry in plan.get("left_out") or []}
    tasks = tuple(task for task in plan["tasks"] if task not in left_out)
    benchmark_tasks = tuple(task for task in plan.get("benchmark_tasks") or [] if task not in left_out)
    known = [arm.id for arm in arms] + [str(row.get("id")) for row in plan.get("support") or []]
    runs, problems = _runs(out, known, tasks + benchmark_tasks)
    missing, n_planned, n_over = _missing(_planned(plan, arms, tasks, benchmark_tasks), runs)
    return StudyFolder(
        out,
        plan,
        arms,
        tasks,
        benchmark_tasks,
        tuple(runs),
        tuple(problems),
        tuple(missing),
        n_planned,
        n_over,
    )


def _arms(plan: Any, out: Path) -> tuple[Arm, ...]:
    try:
        if not all(isinstance(task, str) for task in plan["tasks"]):
            raise TypeError("tasks")
        without_rate = {str(row["id"]) for row in (*plan["arms"], *(plan.get("support") or ())) if _chooses_rate(row)}
        return tuple(
            Arm(
                id=str(row["id"]),
                agent=str(row.get("own_optimizer") or row.get("agent") or row["id"]),
                kind=str(row["kind"]),
                of=row.get("of"),
                base=row.get("base"),
                options=dict(row.get("options") or {}),
                lr=dict(row.get("lr") or {}),
                chooses_rate=_chooses_rate(row) or row.get("of") in without_rate,
                knobs=tuple(row.get("knobs") or ("lr",)),
                learn_runs=int(row.get("learn_runs") or 0),
            )
            for row in plan["arms"]
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{out / 'study.json'} is no plan of a study ({type(error).__name__}: {error}); "
            "expected lists `tasks` and `arms` with an id and a kind each, as `trimtab run` writes them"
        ) from error


def _chooses_rate(row: Mapping[str, Any]) -> bool:
    is_free = row.get("agent") == "default-cosine" or row.get("own_optimizer") in WITHOUT_RATE
    return is_free or (row["kind"] == "search" and "lr" in (row.get("knobs") or ()))


def _runs(out: Path, arms: Sequence[str], tasks: tuple[str, ...]) -> tuple[list[Run], list[str]]:
    arm_order = {arm: index for index, arm in enumerate(arms)}
    task_order = {task: index for index, task in enumerate(tasks)}
    problems: list[str] = []
    found: dict[tuple[Any, ...], Run] = {}
    for header in sorted((out / "runs").rglob("run.json")):
        try:
            run = _run(header.parent, header.parent.relative_to(out).as_posix())
        except (InputError, KeyError, TypeError, ValueError) as error:
            problems.append(f"{header.parent.relative_to(out).as_posix()} cannot be read: {error}")
            continue
        key = (
            task_order.get(run.task, len(task_order)),
            arm_order.get(run.arm, len(arm_order)),
            run.role,
            run.initial_lr or 0.0 if run.role in _MANY_RATES else 0.0,  # elsewhere one run a seed
            run.seed,
        )
        if run.role == "support" and run.arm not in arm_order:
            continue  # run only to be replayed by a yoked twin; no table shows it
        if run.arm not in arm_order or run.task not in task_order:
            problems.append(f"{run.path} belongs to no arm and task of the plan ({run.arm} on {run.task})")
        elif key in found:
            problems.append(f"{run.path} repeats {found[key].path}; the first is used")
        else:
            found[key] = run
    return [found[key] for key in sorted(found)], problems


def _run(path: Path, name: str) -> Run:
    header = read_json(path / "run.json")
    result: Mapping[str, Any] = {}
    if (path / "result.json").exists():
        result = read_json(path / "result.json")
    status, error = str(result.get("status", "unfinished")), result.get("error")
    if not result and (path / "error.txt").exists():  # its process died, or raised, before it could say so itself
        status, error = "failed", _last_line(path / "error.txt")
    return Run(
        path=name,
        arm=str(header["arm"]),
        task=str(header["task"]),
        dataset=str(header.get("dataset") or header["task"]),
        role=str(header.get("role", "report")),
        seed=int(header["seed"]),
        initial_lr=_initial_lr(header),
        total_steps=int(header.get("total_steps") or 0),
        status=status if status in _ENDED else "unfinished",
        error=error,
        metrics=(result.get("metrics") or {}) if status != "failed" else {},  # half a run is no value
        times=result.get("times") or {},
        result=result,
        series=tuple(read_lines(path / "series.jsonl")),
        decisions=tuple(read_lines(path / "decisions.jsonl")),
        flops_budget=int(header.get("flops_budget") or 0),
        taught=header.get("taught"),
    )


def _initial_lr(header: Mapping[str, Any]) -> float | None:
    """The rate as planned; where the plan left it to the task or the agent, the one the run started from."""
    left_open = "initial_lr" in (header.get("job") or {}) and header["job"]["initial_lr"] is None
    rate = (header.get("start") or {}).get("lr") if left_open else header.get("initial_lr")
    return None if rate is None else float(rate)


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "no reason was written"


def _seeds_on(plan: Mapping[str, Any], task: str) -> int:
    return int(((plan.get("restricted") or {}).get(task) or plan).get("n_seeds") or 0)


def _planned(
    plan: Mapping[str, Any], arms: tuple[Arm, ...], tasks: tuple[str, ...], benchmark_tasks: tuple[str, ...]
) -> dict[tuple[str, str, str], int]:
    """How many runs the plan asks for, by role, arm and task; the same that trimtab.experiments.plan makes."""
    n_sensitivity = int(plan.get("sensitivity_seeds") or plan.get("n_seeds") or 0)
    restricted = plan.get("restricted") or {}
    tuning = plan.get("tuning") or {}
    ids = [arm.id for arm in arms]
    planned: dict[tuple[str, str, str], int] = {}
    for role, where in (("report", tasks), ("benchmark", benchmark_tasks)):
        for task in where:
            here = restricted[task]["arms"] if task in restricted else ids
            n_seeds = _seeds_on(plan, task)
            for arm in arms:
                if arm.id not in here:
                    continue
                planned[role, arm.id, task] = n_seeds
                if arm.kind == "yoked" and (arm.of not in here or n_seeds == 1):
                    planned["support", str(arm.of), task] = n_seeds
    for task in (name for name in tasks if name not in restricted):
        if tuning:
            planned["tuning", str(tuning.get("arm")), task] = len(tuning["lrs"]) * int(tuning["n_seeds"])
        for arm in arms:
            has_rate = not arm.chooses_rate
            if arm.kind in ("placebo", "yoked"):
                has_rate = bool(plan.get("sensitivity_controls")) and has_rate
            if arm.kind == "yoked" and (arm.of not in ids or n_sensitivity < 2):
                has_rate = False
            if has_rate and arm.id != tuning.get("arm"):
                rates = [rate for rate in plan.get("sensitivity_lrs") or [] if rate != arm.lr.get(task)]
                planned["sensitivity", arm.id, task] = len(rates) * n_sensitivity
    return planned


def _missing(planned: Mapping[tuple[str, str, str], int], runs: Iterable[Run]) -> tuple[list[str], int, int]:
    """Planned runs without a result, in words; how many are planned or were found; how many of them are over."""
    over: dict[tuple[str, str, str], int] = {}
    begun: dict[tuple[str, str, str], int] = {}
    for run in runs:
        key = (run.role, run.arm, run.task)
        begun[key] = begun.get(key, 0) + 1
        over[key] = over.get(key, 0) + int(run.is_over)
    whole = {key: max(planned.get(key, 0), begun.get(key, 0)) for key in (*planned, *begun)}
    lines = [
        f"{arm} on {task}, {role} runs: {over.get((role, arm, task), 0)} of {count}"
        for (role, arm, task), count in whole.items()
        if over.get((role, arm, task), 0) < count
    ]
    return lines, sum(whole.values()), sum(over.values())
