"""The shape of a study file, as checked, frozen pydantic models.

Called by trimtab.experiments.design; how a file is read and what is said of a bad one stands in trimtab.yaml_files.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field

from trimtab.errors import unknown_name
from trimtab.yaml_files import (
    Count,
    Natural,
    NotNegative,
    Options,
    Positive,
    Strict,
    Text,
    check,
    number,
    positive,
    whole,
)

__all__ = [
    "SCALES",
    "ArmSpec",
    "Rate",
    "Restriction",
    "SearchSpec",
    "StudyFile",
    "TuningSpec",
    "parse_scales",
    "parse_study",
]

SCALES = ("smoke", "small", "full")
# What an arm may begin with instead of the task's own.
START = ("accumulation", "batch_size")
_NAME = r"[A-Za-z0-9][A-Za-z0-9._+-]*"
# What a scale may not change: what the study is, and the scales themselves.
_FIXED = ("study", "kind", "idea", "scales")
_Scaled = TypeVar("_Scaled", bound=Strict)


def _rate(value: Any) -> Any:
    if value == "task":
        return value
    if isinstance(value, dict):
        if not value:
            raise ValueError("got an empty mapping, expected a rate for each task")
        return {str(task): "task" if rate == "task" else positive(rate) for task, rate in value.items()}
    try:
        return positive(value)
    except ValueError as error:
        raise ValueError(f"{error}, or a mapping from tasks to numbers, or 'task' (the task's own)") from None


def _every(value: Any) -> Any:
    if value == "epoch":
        return value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"got {reprlib.repr(value)}, expected a whole number of optimizer steps, or 'epoch'")
    return value


def _arm(value: Any) -> Any:
    return {"id": value} if isinstance(value, str) else value


def _start(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"got {reprlib.repr(value)}, expected a mapping such as {{batch_size: 64}}")
    for key, size in value.items():
        if key not in START:
            raise ValueError(f"got {key!r}, expected settings of the loop: {', '.join(START)}")
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"got {key}: {reprlib.repr(size)}, expected a whole number of at least 1")
    return value


def _interval(value: Any) -> float:
    share = number(value)
    if not 0 < share <= 0.5:
        raise ValueError(f"got {value}, expected a share of a member's budget above 0 and up to 0.5")
    return share


def _space(value: Any) -> Any:
    """Bounds as numbers: PyYAML reads `1e-5` as a string."""
    if not isinstance(value, dict):
        raise ValueError(f"got {reprlib.repr(value)}, expected a mapping such as {{lr: {{low: 1.0e-5, high: 0.1}}}}")
    space = {}
    for name, options in value.items():
        if not isinstance(options, dict):
            raise ValueError(f"got {name}: {reprlib.repr(options)}, expected options of the knob, {{}} for its own")
        space[name] = {
            key: number(item) if key in ("low", "high") and not isinstance(item, int) else item
            for key, item in options.items()
        }
    return space


Rate = float | dict[str, Any] | str
_Rate = Annotated[Any, BeforeValidator(_rate)]
_Every = Annotated[Any, BeforeValidator(_every)]
_Start = Annotated[dict[str, int], BeforeValidator(_start)]


class SearchSpec(Strict):
    """A search for hyperparameters, which makes an arm of many trials; docs/searches.md says how each method works.

    Attributes:
        method: "grid", "random", "tpe" or "pbt".
        space: Knob -> its options (`low`, `high`, `choices`, ...); what is not given is the knob's own.
        trials: How many; of pbt the members of the population. A grid has as many as it has points.
        budget: "shared": all trials together get the budget of one run. "each": every trial gets it.
        points: Of a grid, values of each parameter; 3 where it is not given.
        interval: Of pbt, share of a member's budget between two rounds of copying; 0.1 where it is not given.
        masks: Whether what a task's network has not is left out of the space there, instead of refused.
    """

    method: Text
    space: Annotated[dict[Text, Options], Field(min_length=1), BeforeValidator(_space)]
    trials: Count | None = None
    budget: Literal["shared", "each"] = "shared"
    points: Annotated[int, whole(2)] | None = None
    interval: Annotated[float, BeforeValidator(_interval)] | None = None
    masks: Annotated[bool, Field(strict=True)] = False


class ArmSpec(Strict):
    """An arm as written in a study file; a bare name stands for `{id: name}`.

    `agent` is the arm's id where it is not given; `lr`, `reward` and `learn_runs` are the study's. `learn_tasks` are
    what these runs train, in turn; the task of the run that counts where they are not given. `experience` is a folder
    of transitions of earlier runs, such as OUT/experience of another study, from which the agent learns before.
    `knobs` are what
    a learned arm moves together, `[lr]` where they are not given, and `knob_options` their bounds and other options:
    `{units: {high: 128, noise: 0.01}}`. `preset` names options of the agent, which `options` may change. `brain` is the
    folder of one saved before, or the name of one we ship, from which a learned arm goes on; it brings the agent's
    options. An agent that was taught before is taught on in `learn_runs`, where the arm itself gives them. `start` has
    settings of the loop that a run of the arm begins with instead of the task's, and keeps where no knob moves them:
    `{batch_size: 128, accumulation: 4}`.
    `own_optimizer`, "schedule-free" or "prodigy" (extra `baselines`), makes a baseline train with that instead of the
    task's optimizer. `search` makes the arm a search, whose trials train under the schedule that `agent` names.
    """

    id: Annotated[str, Field(pattern=rf"^((placebo|yoked):)?{_NAME}$")]
    agent: Text | None = None
    kind: Literal["baseline", "rule", "learned"] | None = None
    base: Text | None = None
    options: Options = Field(default_factory=dict)
    lr: _Rate | None = None
    reward: Text | None = None
    learn_runs: Natural | None = None
    learn_tasks: tuple[Text, ...] = ()
    experience: Text | None = None
    knobs: tuple[Text, ...] | None = None
    knob_options: dict[Text, Options] = Field(default_factory=dict)
    brain: Text | None = None
    start: _Start = Field(default_factory=dict)
    own_optimizer: Text | None = None
    preset: Text | None = None
    search: SearchSpec | None = None


class TuningSpec(Strict):
    """The search for the rate of one baseline, on seeds that are not those of the report."""

    arm: Text
    lrs: Annotated[tuple[Positive, ...], Field(min_length=2)]
    n_seeds: Count


class Restriction(Strict):
    """The arms that a task is run with, at their main rate alone, and on how many seeds."""

    arms: Annotated[tuple[Text, ...], Field(min_length=1)]
    n_seeds: Count


class StudyFile(Strict):
    """A whole study file.

    Attributes:
        study: Its name, and that of its folder below runs/.
        idea: The question, in a sentence or two.
        tasks: Registered tasks; their data must be there.
        optional_tasks: Run where their data is found, else listed as left out.
        benchmark_tasks: Every arm runs on these too, untouched; left out where their data is not found.
        arms: Names, or mappings as in `ArmSpec`.
        n_seeds: Runs of each arm on each task.
        seed: Root seed.
        lr: Initial rate: a number, a mapping from tasks to numbers, or "task" (the task's own).
        weight_decay: Instead of the task's own; so are `optimizer` and `total_steps`.
        optimizer: See above.
        total_steps: See above; one number, or a mapping from tasks to numbers (others keep their own).
        restricted: Task -> the arms that it is run with, at their main rate alone, and its number of seeds: for tasks
            that are too dear to be run with all arms.
        every: Optimizer steps between decisions, or "epoch", of arms that decide at equal intervals; the task's own
            where it is not given. The rule `uwhg`, and brains like `default`, bring times of their own.
        reward: Of learned arms; the agent's own where it is not given.
        learn_runs: Whole runs that a learned arm learns from before each run that counts.
        sensitivity_lrs: Other initial rates to run every deciding arm and baseline from.
        sensitivity_seeds: Seeds of these runs; `n_seeds` where it is not given.
        sensitivity_controls: Whether placebos and yoked twins are run from these rates too, each twin beside its arm.
        tuning: The search for one baseline's rate, which makes the arm `tuned-ARM`.
        user_config: The user's own settings, from which the report recommends changes.
        device: "auto", "cpu", "cuda" or "cuda:N".
        precision: "float32", "bf16", or "auto" (bf16 where the device has it).
        threads: Of torch, for each run.
        final_info: Whether final_info.json files are written beside the report.
        scales: "smoke", "small", "full" -> keys of this file that are different at that scale.
    """

    study: Annotated[str, Field(pattern=rf"^{_NAME}$")]
    idea: Text
    tasks: Annotated[tuple[Text, ...], Field(min_length=1)]
    optional_tasks: tuple[Text, ...] = ()
    benchmark_tasks: tuple[Text, ...] = ()
    arms: Annotated[tuple[Annotated[ArmSpec, BeforeValidator(_arm)], ...], Field(min_length=1)]
    n_seeds: Count = 5
    seed: Natural = 0
    lr: _Rate = "task"
    weight_decay: NotNegative | None = None
    optimizer: Literal["sgd", "adam", "adamw"] | None = None
    total_steps: Count | dict[Text, Count] | None = None
    restricted: dict[Text, Restriction] = Field(default_factory=dict)
    every: _Every | None = None
    reward: Text | None = None
    learn_runs: Natural = 0
    sensitivity_lrs: tuple[Positive, ...] = ()
    sensitivity_seeds: Count | None = None
    sensitivity_controls: Annotated[bool, Field(strict=True)] = False
    tuning: TuningSpec | None = None
    user_config: Options = Field(default_factory=dict)
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "cpu"
    precision: Literal["float32", "bf16", "auto"] = "float32"
    threads: Count = 1
    final_info: Annotated[bool, Field(strict=True)] = False
    scales: dict[str, dict[str, Any]] = Field(default_factory=dict)


def parse_study(data: Mapping[str, Any], where: str, scale: str) -> StudyFile:
    """Check a study, at every scale, and return it as it is at one.

    Args:
        data: What the file holds.
        where: What to call the file in errors.
        scale: "smoke", "small" or "full".

    Raises:
        InputError: A key is unknown or its value wrong, at this scale or at another.
    """
    return parse_scales(StudyFile, data, where, scale, "every study needs study, idea, tasks and arms")


def parse_scales(model: type[_Scaled], data: Mapping[str, Any], where: str, scale: str, needs: str) -> _Scaled:
    """Check a file of any kind of study, at every scale, and return it as it is at one.

    Args:
        model: Of its kind; it has a key `scales`.
        data: What the file holds.
        where: What to call the file in errors.
        scale: "smoke", "small" or "full".
        needs: Said of a missing key.

    Raises:
        InputError: A key is unknown or its value wrong, at this scale or at another.
    """
    if scale not in SCALES:
        raise unknown_name("scale", scale, SCALES)
    plain = check(model, data, where, needs=needs)
    checked = {"": plain}
    scales: dict[str, dict[str, Any]] = getattr(plain, "scales")  # noqa: B009 (of each of the models, not of their base)
    for name, overrides in scales.items():
        if name not in SCALES:
            raise unknown_name(f"scale in {where}", name, SCALES)
        for key in overrides:
            if key in _FIXED or key not in model.model_fields:
                allowed = [field for field in model.model_fields if field not in _FIXED]
                raise unknown_name(f"key in scales.{name} of {where}", key, allowed)
        changed = {**data, **overrides}
        checked[name] = check(model, changed, where, needs=needs, overridden=tuple(overrides), prefix=f"scales.{name}.")
    return checked.get(scale, plain)
