"""Study files of `kind: pruning`: their shape, and what they come to.

Called by `run`, and by `trimtab.experiments.run` for files that say `kind: pruning`. A file is checked at every scale.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from trimtab import registry
from trimtab.errors import InputError, unknown_name
from trimtab.experiments.design import at_least, check_list, find_study
from trimtab.experiments.schema import parse_scales
from trimtab.pruner.methods import LEARNED, METHODS
from trimtab.pruner.policies import SHIPPED, TaughtPolicy
from trimtab.pruning.budget import Target
from trimtab.yaml_files import Count, Natural, Positive, Strict, Text, read_yaml, whole

__all__ = [
    "ALL_METHODS",
    "SCRATCH",
    "PruningFile",
    "PruningStudy",
    "TaskPlan",
    "jobs_of",
    "kind_of",
    "load_pruning_study",
    "parse_pruning_study",
    "resolve",
    "study_json",
    "target_name",
]

SCRATCH = "scratch"  # the network that ppo chose (uniform, without it), trained anew for as long as the dense one
ALL_METHODS = (*METHODS, SCRATCH)
_LEAST_EVALUATIONS = 8
_NEEDS = "every study of pruning needs study, kind, idea, tasks, targets and methods"
_PER_TASK = ("targets", "methods", "n_seeds", "max_evaluations", "n_best", "fine_tune_steps", "score_steps")


def _target(value: Any) -> Any:
    try:
        return Target.parse(value).to_dict()
    except InputError as error:
        raise ValueError(str(error)) from None


def _method(value: Any) -> Any:
    if value not in ALL_METHODS:
        raise ValueError(str(unknown_name("method", value, ALL_METHODS)))
    return value


def _distinct(values: Any) -> Any:
    if isinstance(values, (list, tuple)):
        seen: list[Any] = []
        for value in values:
            if value in seen:
                raise ValueError(f"{value!r} is there twice")
            seen.append(value)
    return values


def _task(value: Any) -> Any:
    return {"id": value} if isinstance(value, str) else value


def _stages(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"got {reprlib.repr(value)}, expected a mapping such as {{ppo: 2}}")
    for name, n in value.items():
        if name not in METHODS:
            raise ValueError(str(unknown_name("method", name, METHODS)))
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"got {name}: {reprlib.repr(n)}, expected a whole number of at least 1")
    return value


_Targets = Annotated[
    tuple[Annotated[dict[str, Any], BeforeValidator(_target)], ...], Field(min_length=1), BeforeValidator(_distinct)
]
_Methods = Annotated[
    tuple[Annotated[Text, BeforeValidator(_method)], ...], Field(min_length=1), BeforeValidator(_distinct)
]
_Evaluations = Annotated[int, whole(_LEAST_EVALUATIONS)]


class TaskSpec(Strict):
    """A task as written in a file; a bare name stands for `{id: name}`. What is not given is the study's."""

    id: Text
    targets: _Targets | None = None
    methods: _Methods | None = None
    n_seeds: Count | None = None
    max_evaluations: _Evaluations | None = None
    n_best: Count | None = None
    fine_tune_steps: Natural | None = None
    score_steps: Natural | None = None


class PruningFile(Strict):
    """A whole study file of pruning.

    Attributes:
        study: Its name, and that of its folder below runs/.
        kind: "pruning".
        idea: The question, in a sentence or two.
        tasks: Registered tasks of classification, each with its own targets and so on where they differ.
        targets: What may be left: {flops: 0.5}, {params: 0.5} or {latency: 0.5, batch_size: 64}.
        methods: Of `trimtab.pruner.methods.METHODS`, and "scratch".
        max_evaluations: Configurations that a search scores for one target.
        n_best: Of these, how many are fine-tuned and compared again.
        fine_tune_steps: Optimizer steps of a fine-tuning, the same for every method.
        score_steps: Optimizer steps that a cut network is trained for before each of its scores in a search, at the
            rate of a fine-tuning; of every method but "paper", which has whole fine-tunings. 0: scored as it was cut.
        fine_tune_rate: Learning rate of a fine-tuning as a share of the task's.
        multiple: Widths are multiples of it.
        brain: What "ppo" starts from: "pruning", which we ship, or a folder that `trimtab learn pruning` made.
        stages: Method -> number of stages in which it prunes and fine-tunes; 1 where it is not given.
        latency_batch_sizes: Samples of the forward passes that are timed.
        latency_repeats: Times that each median is of.
        n_seeds: Dense networks of each task, each pruned by every method.
        seed: Root seed.
        device: "auto", "cpu", "cuda" or "cuda:N".
        threads: Of torch, for each run and for what is timed.
        scales: "smoke", "small", "full" -> keys of this file that are different at that scale.
    """

    study: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]
    kind: Literal["pruning"]
    idea: Text
    tasks: Annotated[tuple[Annotated[TaskSpec, BeforeValidator(_task)], ...], Field(min_length=1)]
    targets: _Targets
    methods: _Methods
    max_evaluations: _Evaluations = 100
    n_best: Count = 5
    fine_tune_steps: Natural = 100
    score_steps: Natural = 0
    # One pass brought the CNN of cifar10-pruning, at a quarter of its FLOPs, to 54 % at half of the rate, to 50 % at a
    # tenth (one seed).
    fine_tune_rate: Positive = 0.5
    multiple: Count = 8
    brain: Text = SHIPPED
    stages: Annotated[dict[str, int], BeforeValidator(_stages)] = Field(default_factory=dict)
    latency_batch_sizes: Annotated[tuple[Count, ...], Field(min_length=1), BeforeValidator(_distinct)] = (1, 64)
    latency_repeats: Count = 30
    n_seeds: Count = 5
    seed: Natural = 0
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "cpu"
    threads: Count = 1
    scales: dict[str, dict[str, Any]] = Field(default_factory=dict)


@dataclass(frozen=True)
class TaskPlan:
    """What is done on one task; see `PruningFile`."""

    task: str
    targets: tuple[Mapping[str, Any], ...]
    methods: tuple[str, ...]
    n_seeds: int
    max_evaluations: int
    n_best: int
    fine_tune_steps: int
    score_steps: int


@dataclass(frozen=True)
class PruningStudy:
    """Everything that decides the numbers of a study of pruning.

    Attributes:
        study: Its name.
        idea: The question.
        scale: Of the tasks.
        root_seed: Root of all seeds.
        plans: One for each task.
        settings: The same for all tasks: fine_tune_rate, multiple, brain, stages, latency_batch_sizes, latency_repeats,
            device, threads.
        model: Folder of a network that is pruned instead of one that is trained, or None.
        save: Method -> folder, relative to the study's, in which its network is kept.
        own_tasks: Task of the user's own -> SHA-256 of its file.
    """

    study: str
    idea: str
    scale: str
    root_seed: int
    plans: tuple[TaskPlan, ...]
    settings: Mapping[str, Any]
    model: str | None = None
    save: Mapping[str, str] = field(default_factory=dict)
    own_tasks: Mapping[str, str] = field(default_factory=dict)

    @property
    def n_seeds(self) -> int:
        """The most seeds that a task has."""
        return max(plan.n_seeds for plan in self.plans)

    @property
    def methods(self) -> tuple[str, ...]:
        """Of all tasks."""
        return tuple(dict.fromkeys(method for plan in self.plans for method in plan.methods))


def parse_pruning_study(data: Mapping[str, Any], where: str, scale: str) -> PruningFile:
    """Check a study of pruning, at every scale, and return it as it is at one.

    Args:
        data: What the file holds.
        where: What to call the file in errors.
        scale: "smoke", "small" or "full".

    Raises:
        InputError: A key is unknown or its value wrong, at this scale or at another.
    """
    return parse_scales(PruningFile, data, where, scale, _NEEDS)


def load_pruning_study(
    name_or_path: str | Path,
    *,
    scale: str = "small",
    tasks: Sequence[str] | None = None,
    arms: Sequence[str] | None = None,
    n_seeds: int | None = None,
    seed: int | None = None,
) -> PruningStudy:
    """Read a study of pruning and resolve it with what the caller asks for.

    Args:
        name_or_path: One of ours, or a YAML file.
        scale: "smoke", "small" or "full".
        tasks: These tasks alone; others than the study's get its targets and methods.
        arms: These methods alone.
        n_seeds: Instead of the study's numbers of seeds.
        seed: Instead of the study's root seed.

    Raises:
        InputError: The study, or what was asked of it, is wrong.
    """
    path = find_study(name_or_path)
    file = parse_pruning_study(read_yaml(path), path.name, scale)
    changes: dict[str, Any] = {}
    if tasks is not None:
        known = {spec.id: spec for spec in file.tasks}
        changes["tasks"] = tuple(known.get(name) or TaskSpec(id=name) for name in check_list("tasks", tasks))
    if n_seeds is not None:
        changes["n_seeds"] = at_least("n_seeds", n_seeds, 1)
        specs = changes.get("tasks", file.tasks)
        changes["tasks"] = tuple(spec.model_copy(update={"n_seeds": None}) for spec in specs)
    if seed is not None:
        changes["seed"] = at_least("seed", seed, 0)
    methods = None if arms is None else check_list("arms", arms)
    return resolve(file.model_copy(update=changes), path.name, scale, methods)


def resolve(file: PruningFile, where: str, scale: str, methods: Sequence[str] | None = None) -> PruningStudy:
    """The study that a checked file comes to.

    Args:
        file: The file.
        where: What to call it in errors.
        scale: Of the tasks.
        methods: These alone, on every task.

    Raises:
        BrainError: What "ppo" starts from cannot be loaded.
        InputError: A task or method is unknown or there twice, a brain is given for no method, or "paper" has nothing
            to retrain with.
    """
    for name in methods or ():
        if name not in ALL_METHODS:
            raise unknown_name("arm (method of pruning)", name, ALL_METHODS)
    names = [spec.id for spec in file.tasks]
    for name in names:
        if name not in registry.names("task"):
            raise unknown_name("task", name, registry.names("task"))
        if names.count(name) > 1:
            raise InputError(f"{where}: the task {name!r} is there twice")
    plans = []
    for spec in file.tasks:
        own = {key: getattr(spec, key) for key in _PER_TASK}
        given = {key: getattr(file, key) if value is None else value for key, value in own.items()}
        given["methods"] = tuple(methods or given["methods"])
        plan = TaskPlan(task=spec.id, **given)
        if "paper" in plan.methods and plan.fine_tune_steps == 0:
            raise InputError(
                f"{where}: the method 'paper' retrains after each action; give fine_tune_steps of 1 or more"
            )
        for method, n in file.stages.items():
            if method in plan.methods and n > 1 and plan.max_evaluations < n * _LEAST_EVALUATIONS:
                least = n * _LEAST_EVALUATIONS
                raise InputError(
                    f"{where}: stages: {n} stages of {method!r} share {plan.max_evaluations} evaluations; expected "
                    f"max_evaluations of at least {least}"
                )
        plans.append(plan)
    keys = (
        "fine_tune_rate",
        "multiple",
        "brain",
        "stages",
        "latency_batch_sizes",
        "latency_repeats",
        "device",
        "threads",
    )
    settings = {key: getattr(file, key) for key in keys}
    policy = TaughtPolicy.for_methods([name for plan in plans for name in plan.methods], file.brain)
    settings["brain_sha256"] = None if policy is None else policy.digest  # a folder's content may change
    settings["latency_batch_sizes"] = list(settings["latency_batch_sizes"])
    return PruningStudy(file.study, file.idea, scale, file.seed, tuple(plans), settings)


def target_name(target: Mapping[str, Any], *, joined: str = " ") -> str:
    """A target in words, or as the name of a folder.

    >>> target_name({"flops": 0.5}), target_name({"latency": 0.5, "batch_size": 64}, joined="-")
    ('flops 0.5', 'latency-0.5-batch_size-64')
    """
    return joined.join(f"{key}{joined}{value:g}" for key, value in target.items())


def study_json(study: PruningStudy, environment: Mapping[str, Any]) -> dict[str, Any]:
    """What study.json holds: the resolved plan, and what it runs on."""
    return {
        "schema": 1,
        "kind": "pruning",
        "study": study.study,
        "idea": study.idea,
        "scale": study.scale,
        "root_seed": study.root_seed,
        "n_seeds": study.n_seeds,
        "tasks": [plan.task for plan in study.plans],
        "arms": [{"id": method, "kind": kind_of(method)} for method in study.methods],
        "plans": [_plain(plan) for plan in study.plans],
        "settings": dict(study.settings),
        "model": study.model,
        "save": dict(study.save),
        "left_out": [],
        "environment": dict(environment),
        # Left out where there is none, so that studies begun before can go on.
        **({"own_tasks": dict(study.own_tasks)} if study.own_tasks else {}),
    }


def jobs_of(study: PruningStudy) -> list[dict[str, Any]]:
    """Pieces of work as JSON: one task under one seed, seed by seed."""
    found = []
    for seed in range(study.n_seeds):
        for plan in study.plans:
            if seed >= plan.n_seeds:
                continue
            found.append({
                "study": study.study, "scale": study.scale, "root_seed": study.root_seed, "seed": seed, **_plain(plan),
                **study.settings, "model": study.model, "save": dict(study.save),
                "directory": f"runs/{plan.task}/seed-{seed}",
            })  # fmt: skip
    return found


def kind_of(method: str) -> str:
    """What a method is: "learned", "optimum" (all configurations were scored) or "baseline"."""
    if method in LEARNED:
        return "learned"
    return "optimum" if method == "exhaustive" else "baseline"


def _plain(plan: TaskPlan) -> dict[str, Any]:
    return {**asdict(plan), "targets": [dict(target) for target in plan.targets], "methods": list(plan.methods)}
