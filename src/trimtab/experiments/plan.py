"""From a resolved Study to its jobs, and what of both is written to study.json.

Called by trimtab.experiments.run. A job is one training run: plain JSON for experiments.single.run_one,
and a folder of its own, runs/TASK/ARM/ROLE/lr-RATE/seed-N, so that two jobs never share a file.

Roles: "report" (an arm at its main rate), "sensitivity" (at other initial rates), "tuning" (choosing the
tuned arm's rate, on other seeds), "support" (what a yoked arm replays where no report run can serve),
"benchmark" (the same arm, untouched, on the second data set).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from trimtab.errors import InputError
from trimtab.experiments.design import Arm, Study
from trimtab.folders import where_they_differ

__all__ = ["Job", "choose_rate", "first_difference", "plan_jobs", "study_json", "tuned_jobs", "tuning_jobs"]

# Selection seeds start here, so that no rate is chosen on a seed that it is reported on.
TUNING_SEEDS_FROM = 1000
# Keys of an arm that came later, which are left out where they are not used.
_ADDED = ("start", "knob_options", "search", "learn_tasks", "experience", "own_optimizer")
# Keys of study.json that came later, and are left out in the same way.
_LATER = ("restricted", "sensitivity_controls")
# Keys of study.json that do not say what was asked for: filled in on the way, or words.
_NOT_ASKED = ("environment", "left_out", "idea", "schema", "budget")


@dataclass(frozen=True)
class Job:
    """One training run; `to_json` is what run_one is given.

    `seed` numbers the run within its study, from 0; the run's generators come from it and `root_seed`.
    `initial_lr`, `total_steps`, `every`, `weight_decay` and `optimizer` are the task's own where they are
    None; `start` has settings of the loop instead of its own. `replay_from` is the folder of the run whose
    decisions a yoked run replays. `search` makes it a whole search, of the knobs in `knobs`. `own_optimizer` is a
    name in `trimtab.training.own_optimizers`, instead of `optimizer`.
    """

    study: str
    arm: str
    agent: str
    kind: str
    of: str | None
    base: str | None
    options: Mapping[str, Any]
    reward: str | None
    task: str
    scale: str
    role: str
    seed: int
    root_seed: int
    initial_lr: float | None
    total_steps: int | None
    every: int | str | None
    weight_decay: float | None
    optimizer: str | None
    learn_runs: int
    knobs: tuple[str, ...]
    knob_options: Mapping[str, Mapping[str, Any]]
    brain: str | None
    start: Mapping[str, int]
    placebo: bool
    replay_from: str | None
    device: str
    precision: str
    threads: int
    directory: str
    search: Mapping[str, Any] | None = None
    learn_tasks: tuple[str, ...] = ()
    experience: str | None = None
    own_optimizer: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain dict of JSON types."""
        lists = {"knobs": list(self.knobs), "learn_tasks": list(self.learn_tasks)}
        return {**asdict(self), **lists, "start": dict(self.start)}


def plan_jobs(study: Study) -> list[Job]:
    """Every job whose rate is known before anything has run; a yoked run comes after its partner."""
    first: list[Job] = []
    last: list[Job] = []
    everywhere = [(task, "report") for task in _main_tasks(study)]
    everywhere += [(task, "benchmark") for task in study.benchmark_tasks]
    for task, role in everywhere:
        n_seeds = study.seeds_on(task)
        for arm in study.arms_on(task):
            if arm.kind != "yoked":
                first += [_job(study, arm, task, role, seed, arm.lr[task]) for seed in range(n_seeds)]
                continue
            for seed in range(n_seeds):
                partner = _partner(study, arm, task, role, seed)
                first += [partner] if partner.role == "support" else []
                twin = _job(study, arm, task, role, seed, arm.lr[task])
                last.append(replace(twin, replay_from=partner.directory))
    return [*first, *_sensitivity_jobs(study), *last]


def tuning_jobs(study: Study) -> list[Job]:
    """The runs from which the tuned arm's rate is chosen, task after task."""
    if study.tuning is None:
        return []
    return [
        _job(study, study.tuning.arm, task, "tuning", TUNING_SEEDS_FROM + k, lr)
        for task in _whole_tasks(study)
        for lr in study.tuning.lrs
        for k in range(study.tuning.n_seeds)
    ]


def tuned_jobs(study: Study, task: str, rate: float) -> list[Job]:
    """The tuned arm's runs that count, once its rate for a task is chosen.

    On the benchmark tasks it runs untouched, at the rate of the study's first task.
    """
    if study.tuning is None or task in study.restricted:
        return []
    places = [(task, "report")]
    places += [(name, "benchmark") for name in study.benchmark_tasks if task == study.tasks[0]]
    return [
        _job(study, study.tuning.arm, name, role, seed, rate) for name, role in places for seed in range(study.n_seeds)
    ]


def choose_rate(losses: Mapping[float, Sequence[float | None]]) -> float | None:
    """The rate with the lowest mean final validation loss.

    A run without a finite loss makes its rate the worst; of equal rates the lower one is chosen.

    Returns:
        The rate, or None where no rate ended finite.
    """
    means: dict[float, float] = {}
    for rate, values in losses.items():
        finite = [value for value in values if value is not None and math.isfinite(value)]
        means[rate] = math.fsum(finite) / len(finite) if values and len(finite) == len(values) else math.inf
    best = min(sorted(means), key=lambda rate: means[rate], default=None)
    return best if best is not None and math.isfinite(means[best]) else None


def study_json(
    study: Study, environment: Mapping[str, Any], chosen: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """What study.json holds: the resolved plan, what it runs on, and the rates chosen so far."""
    chosen = dict(chosen or {})
    arms = [_arm_json(arm) for arm in study.arms]
    tuning = None
    if study.tuning is not None:
        rates = {task: chosen.get(task) for task in study.tuning.arm.lr}
        rates |= {task: chosen.get(study.tasks[0]) for task in study.benchmark_tasks}
        arms.append(_arm_json(replace(study.tuning.arm, lr=rates)))
        tuning = {
            "arm": study.tuning.arm.id,
            "lrs": list(study.tuning.lrs),
            "n_seeds": study.tuning.n_seeds,
            "chosen": chosen,
        }
    later: dict[str, Any] = {"sensitivity_controls": True} if study.sensitivity_controls else {}
    if study.restricted:
        restricted = study.restricted.items()
        later["restricted"] = {task: {"arms": list(entry.arms), "n_seeds": entry.n_seeds} for task, entry in restricted}
    return {
        "schema": 1,
        **later,
        "study": study.study,
        "idea": study.idea,
        "budget": study.budget,
        "scale": study.scale,
        "root_seed": study.root_seed,
        "n_seeds": study.n_seeds,
        "tasks": list(_main_tasks(study)),
        "left_out": [dict(entry) for entry in study.left_out],
        "arms": arms,
        "support": [_arm_json(arm) for arm in study.support],
        "sensitivity_lrs": list(study.sensitivity_lrs),
        "sensitivity_seeds": study.sensitivity_seeds,
        "tuning": tuning,
        "benchmark_tasks": list(study.benchmark_tasks),
        "settings": dict(study.settings),
        "user_config": dict(study.user_config),
        "final_info": study.final_info,
        "environment": dict(environment),
        # Left out where there is none, so that studies begun before can go on.
        **({"own_tasks": dict(study.own_tasks)} if study.own_tasks else {}),
    }


def first_difference(there: Any, asked: Mapping[str, Any]) -> str | None:
    """Say where a folder's study.json and what is asked for now differ first; None where they do not."""
    if not isinstance(there, dict):
        raise InputError("study.json holds no plan; was it written by trimtab?")
    for key in (*asked, *(key for key in _LATER if key not in asked)):
        if key in _NOT_ASKED:
            continue
        value = asked.get(key)
        old, new = _as_asked(key, there.get(key)), _as_asked(key, value)
        if old != new:
            if key == "arms" and len(old or []) != len(new or []):
                old, new = [arm.get("id") for arm in old or []], [arm.get("id") for arm in new or []]
            return where_they_differ(key, old, new)
    return None


def _main_tasks(study: Study) -> tuple[str, ...]:
    return (*study.tasks, *study.optional_tasks)


def _whole_tasks(study: Study) -> tuple[str, ...]:
    """Those that are run from other rates too, and tuned."""
    return tuple(task for task in _main_tasks(study) if task not in study.restricted)


def _sensitivity_jobs(study: Study) -> list[Job]:
    jobs = []
    for task in _whole_tasks(study):
        for arm in study.arms:
            is_control = arm.kind in ("placebo", "yoked")
            if (is_control and not study.sensitivity_controls) or not _has_rate(study, arm):
                continue  # without it the controls are about the main rate; default-cosine and others bring their own
            rates = [rate for rate in study.sensitivity_lrs if rate != arm.lr[task]]
            jobs += [_job(study, arm, task, "sensitivity", seed, rate) for rate in rates for seed in _seeds(study, arm)]
    return [replace(job, replay_from=_other_seed(study, job)) if job.kind == "yoked" else job for job in jobs]


def _has_rate(study: Study, arm: Arm) -> bool:
    """Whether an arm can begin with a rate that is given; a twin begins where what it replays began."""
    return all(other.has_rate for other in (*study.arms, *study.support) if other.id in (arm.id, arm.of))


def _seeds(study: Study, arm: Arm) -> range:
    """Seeds of an arm's runs from other rates; of a twin none, where no other seed of its arm is run from them."""
    has_partner = arm.of in {other.id for other in study.arms} and study.sensitivity_seeds > 1
    return range(study.sensitivity_seeds if arm.kind != "yoked" or has_partner else 0)


def _other_seed(study: Study, twin: Job) -> str:
    """The run that a twin replays, from the same rate: its arm's under the next seed."""
    arm = next(arm for arm in study.arms if arm.id == twin.of)
    seed = (twin.seed + 1) % study.sensitivity_seeds
    return _job(study, arm, twin.task, "sensitivity", seed, twin.initial_lr).directory


def _partner(study: Study, twin: Arm, task: str, role: str, seed: int) -> Job:
    """The run that a yoked run replays: its arm's under the next seed, a support run where there is none."""
    n_seeds = study.seeds_on(task)
    reported = {arm.id for arm in study.arms_on(task)}
    arm = next(arm for arm in (*study.arms, *study.support) if arm.id == twin.of)
    if arm.id in reported and n_seeds > 1:
        return _job(study, arm, task, role, (seed + 1) % n_seeds, arm.lr[task])
    other = (seed + 1) % n_seeds if n_seeds > 1 else 1
    return _job(study, arm, task, "support", other, arm.lr[task])


def _job(study: Study, arm: Arm, task: str, role: str, seed: int, lr: float | None) -> Job:
    rate = "task" if lr is None else repr(lr)
    settings = dict(study.settings)
    if isinstance(settings["total_steps"], Mapping):
        settings["total_steps"] = settings["total_steps"].get(task)
    return Job(
        study=study.study,
        arm=arm.id,
        agent=arm.agent,
        kind=arm.kind,
        of=arm.of,
        base=arm.base,
        options=dict(arm.options),
        reward=arm.reward,
        task=task,
        scale=study.scale,
        role=role,
        seed=seed,
        root_seed=study.root_seed,
        initial_lr=lr,
        learn_runs=arm.learn_runs,
        knobs=arm.knobs,
        knob_options=dict(arm.knob_options),
        brain=arm.brain,
        start=dict(arm.start),
        search=None if arm.search is None else dict(arm.search),
        learn_tasks=arm.learn_tasks,
        experience=arm.experience,
        own_optimizer=arm.own_optimizer,
        placebo=arm.kind == "placebo",
        replay_from=None,
        directory=f"runs/{task}/{arm.id}/{role}/lr-{rate}/seed-{seed}",
        **settings,
    )


def _arm_json(arm: Arm) -> dict[str, Any]:
    lists = {"knobs": list(arm.knobs), "learn_tasks": list(arm.learn_tasks)}
    data = {**asdict(arm), "options": dict(arm.options), "lr": dict(arm.lr), **lists}
    # What was added later is left out where it is not used, so that studies begun before can go on.
    return {key: value for key, value in data.items() if key not in _ADDED or value}


def _as_asked(key: str, value: Any) -> Any:
    """A part of study.json without what was filled in on the way: the tuned arm's rates."""
    if key == "tuning" and isinstance(value, dict):
        return {name: item for name, item in value.items() if name != "chosen"}
    if key == "arms" and isinstance(value, list):
        return [
            {**arm, "lr": None} if isinstance(arm, dict) and str(arm.get("id")).startswith("tuned-") else arm
            for arm in value
        ]
    return value
