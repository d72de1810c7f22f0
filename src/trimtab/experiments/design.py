"""From a study's name or file, and what the caller asks for, to a resolved, frozen Study.

Called by trimtab.experiments.run and by the command line. A Study says everything that decides the numbers of
a study; trimtab.experiments.plan turns it into jobs. Nothing here imports torch, so that listing stays quick.

Arms: a registered agent's name, or a mapping that gives an agent another id, base, options, rate, reward;
`placebo:ARM` and `yoked:ARM` of any of them; `tuned-ARM`, which the study's `tuning` produces; and searches, arms
whose run is a number of trials.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from trimtab import brains, registry
from trimtab.agents.presets import preset_options
from trimtab.errors import InputError, unknown_name
from trimtab.experiments.resolved import FLOPS, STEPS, WITHOUT_RATE, Arm, Study, Tuning
from trimtab.experiments.schema import ArmSpec, Restriction, SearchSpec, StudyFile, parse_study
from trimtab.yaml_files import read_yaml

__all__ = [
    "FLOPS",
    "STEPS",
    "Arm",
    "Study",
    "Tuning",
    "at_least",
    "check_list",
    "find_study",
    "load_study",
    "study_names",
]

# Open loop: what they write follows from the step alone.
BASELINES = ("constant", "step", "exponential", "cosine", "wsd", "default-cosine")
# They look, by a rule that learns nothing. Any other agent, also one of another package, is taken to learn.
_RULES = ("uwhg", "plateau", "random")
# What a controller may sit on.
_BASES = ("constant", "step", "exponential", "cosine", "wsd")
# What goes to every job as it is in the file.
_SETTINGS = ("total_steps", "every", "weight_decay", "optimizer", "device", "precision", "threads")
# Optimizers that an arm may bring.
_OWN_OPTIMIZERS = ("schedule-free", "prodigy")
_DERIVED = ("placebo", "yoked")
_METHODS = ("grid", "random", "tpe", "pbt")


def study_names() -> dict[str, Path]:
    """The studies that come with trimtab: name -> file."""
    folder = Path(str(resources.files("trimtab.experiments") / "studies"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_study(
    name_or_path: str | Path,
    *,
    scale: str = "small",
    tasks: Sequence[str] | None = None,
    arms: Sequence[str] | None = None,
    n_seeds: int | None = None,
    seed: int | None = None,
) -> Study:
    """Read a study and resolve it with what the caller asks for.

    Args:
        name_or_path: One of ours, or a YAML file.
        scale: "smoke", "small" or "full".
        tasks: Run these tasks alone; their data must be there.
        arms: Run these arms alone: of the study, of its tuning, or any registered agent.
        n_seeds: Instead of the study's number of seeds.
        seed: Instead of the study's root seed.

    Raises:
        InputError: The study, or what was asked of it, is wrong.
    """
    path = find_study(name_or_path)
    where = path.name
    file = parse_study(read_yaml(path), where, scale)
    changes: dict[str, Any] = {}
    if tasks is not None:
        changes |= {"tasks": tuple(check_list("tasks", tasks)), "optional_tasks": ()}
        changes["benchmark_tasks"] = tuple(name for name in file.benchmark_tasks if name not in tasks)
    if n_seeds is not None:
        changes["n_seeds"] = at_least("n_seeds", n_seeds, 1)
        changes["restricted"] = {  # what is too dear for more seeds stays so
            task: entry.model_copy(update={"n_seeds": min(entry.n_seeds, n_seeds)})
            for task, entry in file.restricted.items()
        }
    if seed is not None:
        changes["seed"] = at_least("seed", seed, 0)
    file = file.model_copy(update=changes)
    _check_tasks(file, where)
    return _Resolver(file, where, scale, None if arms is None else check_list("arms", arms)).study()


def find_study(name_or_path: str | Path) -> Path:
    """The file of a study by name or path.

    Raises:
        InputError: There is none.
    """
    ours = study_names()
    text = str(name_or_path)
    if text in ours:
        return ours[text]
    if text.endswith((".yaml", ".yml")) or "/" in text or isinstance(name_or_path, Path):
        path = Path(text)
        if not path.is_file():
            raise InputError(f"there is no study file {path}; give a YAML file, or one of: {', '.join(ours)}")
        return path
    raise unknown_name("study", text, ours)


def check_list(key: str, given: Sequence[str]) -> list[str]:
    """Names as they were given, without blanks.

    Raises:
        InputError: One is empty, or there twice.
    """
    names = [name.strip() for name in given]
    if not names or not all(names):
        raise InputError(f"{key}: got an empty name, expected names with commas between them")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{key}: {twice[0]!r} is there twice")
    return names


def at_least(key: str, given: int, least: int) -> int:
    """A whole number of at least so much.

    Raises:
        InputError: It is none.
    """
    if isinstance(given, bool) or not isinstance(given, int) or given < least:
        raise InputError(f"{key}: got {given!r}, expected a whole number of at least {least}")
    return given


def _check_tasks(file: StudyFile, where: str) -> None:
    known = registry.names("task")
    for key in ("tasks", "optional_tasks", "benchmark_tasks"):
        for name in getattr(file, key):
            if name not in known:
                raise unknown_name("task", name, known)
    every = (*file.tasks, *file.optional_tasks, *file.benchmark_tasks)
    twice = sorted({name for name in every if every.count(name) > 1})
    if twice:
        raise InputError(f"{where}: the task {twice[0]!r} is there twice (tasks, optional_tasks, benchmark_tasks)")
    for key in ("restricted", "total_steps"):
        given = getattr(file, key)
        for name in given if isinstance(given, dict) else ():
            if name not in known:
                raise unknown_name(f"task in {key} of {where}", name, known)


class _Resolver:
    """Turns the arms of one study file into resolved arms."""

    def __init__(self, file: StudyFile, where: str, scale: str, wanted: list[str] | None) -> None:
        self._file = file
        self._where = where
        self._scale = scale
        self._specs = {spec.id: spec for spec in file.arms}
        self._agents = registry.names("agent")
        self._known_knobs = registry.names("knob")
        self._tuned_id = f"tuned-{file.tuning.arm}" if file.tuning else None
        if len(self._specs) < len(file.arms):
            ids = [spec.id for spec in file.arms]
            raise InputError(f"{where}: arms: {next(i for i in ids if ids.count(i) > 1)!r} is there twice")
        everything = [*self._specs, *([self._tuned_id] if self._tuned_id else [])]
        self._wanted = everything if wanted is None else wanted

    def study(self) -> Study:
        """The whole study."""
        file = self._file
        arms = tuple(self._arm(name) for name in self._wanted if name != self._tuned_id)
        ids = {arm.id for arm in arms}
        needed = sorted({arm.of for arm in arms if arm.kind == "yoked" and arm.of not in ids and arm.of})
        tuning = self._tuning() if self._tuned_id in self._wanted else None
        return Study(
            study=file.study,
            idea=file.idea,
            scale=self._scale,
            root_seed=file.seed,
            n_seeds=file.n_seeds,
            tasks=file.tasks,
            optional_tasks=file.optional_tasks,
            benchmark_tasks=file.benchmark_tasks,
            arms=arms,
            support=tuple(self._arm(name) for name in needed),
            tuning=tuning,
            sensitivity_lrs=file.sensitivity_lrs,
            sensitivity_seeds=min(file.sensitivity_seeds or file.n_seeds, file.n_seeds),
            settings={key: getattr(file, key) for key in _SETTINGS},
            user_config=file.user_config,
            final_info=file.final_info,
            restricted=self._restricted(ids),
            sensitivity_controls=file.sensitivity_controls,
        )

    def _restricted(self, ids: set[str]) -> dict[str, Restriction]:
        """Of the tasks and arms that are run, those that are restricted."""
        file = self._file
        found: dict[str, Restriction] = {}
        for task, entry in file.restricted.items():
            for name in entry.arms:
                if name not in self._specs:
                    raise unknown_name(f"arm in restricted.{task} of {self._where}", name, self._specs)
            if task in (*file.tasks, *file.optional_tasks):
                arms = tuple(name for name in entry.arms if name in ids)
                if not arms:
                    raise InputError(
                        f"{task} is restricted to {', '.join(entry.arms)} in {self._where}, and none of them is asked "
                        "for; add one of them to the arms, or leave out the task"
                    )
                found[task] = entry.model_copy(update={"arms": arms})
        return found

    def _arm(self, name: str) -> Arm:
        prefix, _, rest = name.partition(":")
        if rest and prefix in _DERIVED:
            return self._derived(name, prefix, rest)
        spec = self._specs.get(name) or ArmSpec.model_construct(id=name)
        agent = spec.agent or spec.id
        if agent not in self._agents:
            self._unknown(spec, agent)
        if agent == "replay":
            raise InputError(f"arm {name!r}: 'replay' needs decisions to replay; use yoked:ARM")
        if spec.search is not None:
            return self._search_arm(spec, agent, spec.search)
        kind = spec.kind or _kind_of(agent)
        if kind == "baseline" and spec.base is not None:
            raise InputError(f"arm {name!r}: base is for arms that decide; a baseline is its own schedule")
        if spec.base is not None and spec.base not in _BASES:
            raise unknown_name(f"base of arm {name!r}", spec.base, _BASES)
        if kind != "learned" and (spec.reward is not None or spec.learn_runs or spec.learn_tasks or spec.experience):
            raise InputError(
                f"arm {name!r}: reward, learn_runs, learn_tasks and experience are for learned arms; this is a {kind}"
            )
        is_taught = registry.entries("agent")[agent].needs_brain
        if is_taught and spec.brain is None:
            raise InputError(
                f"arm {name!r}: agent {agent!r} knows what it was taught before, and learns nothing in a run; expected "
                "brain: NAME or FOLDER"
            )
        learn_runs = spec.learn_runs
        if learn_runs is None:  # the study's are for agents that begin without knowing anything
            learn_runs = 0 if is_taught else self._file.learn_runs
        return Arm(
            id=name,
            agent=agent,
            kind=kind,
            of=None,
            base=spec.base or ("constant" if kind == "learned" and not is_taught else None),
            options=self._options(spec, agent),
            lr=self._rates(spec, agent),
            reward=self._reward(spec) if kind == "learned" and not (is_taught and spec.reward is None) else None,
            learn_runs=learn_runs if kind == "learned" else 0,
            knobs=self._knobs(spec, kind),
            knob_options=self._knob_options(spec, kind),
            brain=self._brain(spec, kind),
            start=spec.start,
            learn_tasks=self._learn_tasks(spec, kind),
            experience=None if spec.experience is None else str(Path(spec.experience).expanduser().resolve()),
            own_optimizer=self._own_optimizer(spec, kind),
        )

    def _options(self, spec: ArmSpec, agent: str) -> dict[str, Any]:
        """The agent's options: those of the preset, and what the arm says instead of them."""
        if spec.preset is None or spec.brain is not None:  # the second is refused by `_brain`
            return spec.options
        try:
            return {**preset_options(spec.preset, agent), **spec.options}
        except InputError as error:
            raise type(error)(f"arm {spec.id!r}: {error}") from error

    def _own_optimizer(self, spec: ArmSpec, kind: str) -> str | None:
        name = spec.own_optimizer
        if name is None:
            return None
        if name not in _OWN_OPTIMIZERS:
            raise unknown_name(f"own_optimizer of arm {spec.id!r}", name, _OWN_OPTIMIZERS)
        if kind != "baseline" or (spec.agent or spec.id) == "default-cosine":
            raise InputError(
                f"arm {spec.id!r}: own_optimizer is for a baseline, whose agent is the schedule over it, such as "
                f"constant; this is a {kind} with the agent {spec.agent or spec.id!r}"
            )
        return name

    def _learn_tasks(self, spec: ArmSpec, kind: str) -> tuple[str, ...]:
        known = registry.names("task")
        for name in spec.learn_tasks:
            if name not in known:
                raise unknown_name(f"task in learn_tasks of arm {spec.id!r}", name, known)
        runs = self._file.learn_runs if spec.learn_runs is None else spec.learn_runs
        if kind == "learned" and spec.learn_tasks and not runs:
            raise InputError(
                f"arm {spec.id!r}: learn_tasks without learn_runs, their number; give it, or leave them out"
            )
        return spec.learn_tasks

    def _search_arm(self, spec: ArmSpec, agent: str, search: SearchSpec) -> Arm:
        """An arm whose run is a search; bounds and other options of its space are checked with the data."""
        search = self._check_search(spec, agent, search)
        rates = self._rates(spec, agent)
        return Arm(
            id=spec.id,
            agent=agent,
            kind="search",
            of=None,
            base=None,
            options=spec.options,
            lr=dict.fromkeys(rates) if "lr" in search.space else rates,
            reward=None,
            learn_runs=0,
            knobs=tuple(search.space),
            knob_options=search.space,
            start=spec.start,
            search=search.model_dump(exclude={"space"}, exclude_none=True),
        )

    def _check_search(self, spec: ArmSpec, agent: str, search: SearchSpec) -> SearchSpec:
        """The search with the defaults of its method, after a check of what needs no knob."""
        where = f"arm {spec.id!r}: search"
        for key in (
            "kind",
            "base",
            "reward",
            "learn_runs",
            "knobs",
            "knob_options",
            "brain",
            "own_optimizer",
            "preset",
        ):
            if key in spec.model_fields_set:
                raise InputError(f"{where}: {key} is for arms that decide while a run goes on; leave it out")
        if agent not in _BASES:
            raise InputError(f"{where}: the agent is {agent!r}; its trials train under a schedule: {', '.join(_BASES)}")
        if search.method not in _METHODS:
            raise unknown_name(f"search method of arm {spec.id!r}", search.method, _METHODS)
        for name in search.space:
            if name not in self._known_knobs:
                raise unknown_name(f"knob in search.space of arm {spec.id!r}", name, self._known_knobs)
        for name in spec.start:
            if name in search.space:
                raise InputError(f"{where}: {name} is in space and in start; leave one out")
        if "lr" in search.space and spec.lr is not None:
            raise InputError(f"{where}: lr is in space, and the arm has a rate of its own; leave one out")
        return _with_defaults(search, where)

    def _brain(self, spec: ArmSpec, kind: str) -> str | None:
        if spec.brain is None:
            return None
        if kind != "learned" or spec.options or spec.preset:
            raise InputError(
                f"arm {spec.id!r}: brain is for learned arms, and brings the agent's options; leave one out"
            )
        if brains.folder_of(spec.brain) is not None:
            return spec.brain
        return str(Path(spec.brain).expanduser().resolve())

    def _knobs(self, spec: ArmSpec, kind: str) -> tuple[str, ...]:
        if spec.knobs is None:
            return ("lr",)
        if kind != "learned":
            raise InputError(f"arm {spec.id!r}: knobs are for learned arms; this is a {kind} and moves the rate alone")
        for name in spec.knobs:
            if name not in self._known_knobs:
                raise unknown_name(f"knob of arm {spec.id!r}", name, self._known_knobs)
        if "lr" not in spec.knobs or len(set(spec.knobs)) != len(spec.knobs):
            raise InputError(
                f"arm {spec.id!r}: knobs are {list(spec.knobs)}; expected different names, 'lr' among them"
            )
        return spec.knobs

    def _knob_options(self, spec: ArmSpec, kind: str) -> dict[str, Any]:
        knobs = self._knobs(spec, kind)
        for name in spec.knob_options:
            if kind != "learned":
                raise InputError(f"arm {spec.id!r}: knob_options are for learned arms; this is a {kind}")
            if name not in knobs:
                raise unknown_name(f"knob in knob_options of arm {spec.id!r}", name, knobs)
        return spec.knob_options

    def _unknown(self, spec: ArmSpec, agent: str) -> None:
        if spec.agent is not None:
            raise unknown_name(f"agent of arm {spec.id!r}", agent, self._agents)
        known = {*self._agents, *self._specs, *([self._tuned_id] if self._tuned_id else [])}
        raise unknown_name("arm", agent, known - {"replay", agent})

    def _derived(self, name: str, prefix: str, rest: str) -> Arm:
        spec = self._specs.get(name)
        if spec is not None and spec.model_fields_set - {"id"}:
            given = sorted(spec.model_fields_set - {"id"})[0]
            raise InputError(f"arm {name!r}: {given}: a {prefix} arm takes its settings from {rest!r}")
        if ":" in rest:
            raise InputError(f"arm {name!r}: there is no {prefix} of a {rest.partition(':')[0]}")
        if rest == self._tuned_id:
            raise InputError(f"arm {name!r}: the tuned arm is an open-loop schedule and has no {prefix}")
        of = self._arm(rest)
        if of.kind == "search":
            raise InputError(f"arm {name!r}: {rest!r} is a search, which decides nothing in a run and has no {prefix}")
        agent, options = (of.agent, of.options) if prefix == "placebo" else ("replay", {})
        learn_runs = of.learn_runs if prefix == "placebo" else 0
        learn_tasks = of.learn_tasks if prefix == "placebo" else ()
        experience = of.experience if prefix == "placebo" else None
        reward = of.reward if prefix == "placebo" else None
        return replace(
            of,
            id=name,
            kind=prefix,
            of=rest,
            agent=agent,
            options=options,
            learn_runs=learn_runs,
            learn_tasks=learn_tasks,
            experience=experience,
            reward=reward,
        )

    def _rates(self, spec: ArmSpec, agent: str) -> dict[str, float | None]:
        tasks = (*self._file.tasks, *self._file.optional_tasks)
        benchmarks = self._file.benchmark_tasks
        if agent == "default-cosine":
            if spec.lr is not None:
                raise InputError(f"arm {spec.id!r}: lr: default-cosine brings its own rate; leave lr out")
            return dict.fromkeys((*tasks, *benchmarks))
        if spec.own_optimizer in WITHOUT_RATE:
            if spec.lr is not None:
                raise InputError(f"arm {spec.id!r}: lr: {spec.own_optimizer} finds its own rate; leave lr out")
            return dict.fromkeys((*tasks, *benchmarks))
        given = self._file.lr if spec.lr is None else spec.lr
        owner = self._where if spec.lr is None else f"arm {spec.id!r}"
        if not isinstance(given, dict):
            return self._with_own({task: given for task in (*tasks, *benchmarks)})
        known = registry.names("task")
        for task in given:
            if task not in known:
                raise unknown_name(f"task in lr of {owner}", task, known)
        missing = [task for task in tasks if task not in given]
        if missing:
            raise InputError(f"{owner}: lr: no rate for the task {missing[0]!r}; give a number, or 'task'")
        # A benchmark task gets the model untouched: with the first task's rate where it has none of its own.
        rates = {task: given[task] for task in tasks}
        rates |= {task: given.get(task, given[tasks[0]]) for task in benchmarks}
        return self._with_own(rates)

    def _with_own(self, rates: Mapping[str, Any]) -> dict[str, float | None]:
        """The task's own rate as None; as a number where runs from other rates must be told from those from it."""
        if not self._file.sensitivity_lrs:
            return {task: None if rate == "task" else rate for task, rate in rates.items()}
        return {
            task: registry.load("task", task)(self._scale).lr if rate == "task" else rate
            for task, rate in rates.items()
        }

    def _reward(self, spec: ArmSpec) -> str | None:
        name = spec.reward or self._file.reward
        if name is not None and name not in registry.names("reward"):
            raise unknown_name("reward", name, registry.names("reward"))
        return name

    def _tuning(self) -> Tuning | None:
        spec = self._file.tuning
        if spec is None:
            return None
        arm = self._arm(spec.arm)
        if arm.kind != "baseline" or not arm.has_rate:
            raise InputError(f"{self._where}: tuning.arm: got {spec.arm!r}, expected a baseline with a rate to tune")
        if len(set(spec.lrs)) < len(spec.lrs):
            raise InputError(f"{self._where}: tuning.lrs: a rate is there twice")
        tuned = replace(arm, id=f"tuned-{spec.arm}", lr=dict.fromkeys(arm.lr))
        return Tuning(arm=tuned, lrs=tuple(sorted(spec.lrs)), n_seeds=spec.n_seeds)


def _with_defaults(search: SearchSpec, where: str) -> SearchSpec:
    """The search with what its method takes where nothing is given, and nothing that belongs to another."""
    if search.method != "grid" and search.trials is None:
        raise InputError(f"{where}: trials is missing; {search.method} needs their number")
    for key, method, default in (("points", "grid", 3), ("interval", "pbt", 0.1)):
        given = getattr(search, key)
        if given is not None and search.method != method:
            raise InputError(f"{where}: {key} is for {method}, the method is {search.method}; leave it out")
        if given is None and search.method == method:
            search = search.model_copy(update={key: default})
    return search


def _kind_of(agent: str) -> str:
    if agent in BASELINES:
        return "baseline"
    return "rule" if agent in _RULES else "learned"
