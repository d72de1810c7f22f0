"""The shape of a study file, and reading one: YAML -> checked, frozen pydantic models.

Called by trimtab.experiments.design. Everything that a file can get wrong ends as one InputError that names
the key, what was given and what was expected; unknown keys get "did you mean".
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from trimtab.errors import InputError, unknown_name

__all__ = ["SCALES", "ArmSpec", "Rate", "StudyFile", "TuningSpec", "parse_study", "read_yaml"]

SCALES = ("smoke", "small", "full")
_NAME = r"[A-Za-z0-9][A-Za-z0-9._+-]*"
# What a scale may not change: what the study is, and the scales themselves.
_FIXED = ("study", "idea", "scales")

# What PyYAML raises on text that is no YAML: its own errors, and those of constructors it does not guard.
_YAML_ERRORS = (
    yaml.YAMLError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    OverflowError,
    RecursionError,
)


def _number(value: Any) -> float:
    """A finite number; PyYAML reads `1e-3` as a string, so strings that are numbers count."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"got {reprlib.repr(value)}, expected a number")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"got {reprlib.repr(value)}, expected a number") from None
    if not math.isfinite(number):
        raise ValueError(f"got {value}, expected a finite number")
    return number


def _positive(value: Any) -> float:
    number = _number(value)
    if number <= 0:
        raise ValueError(f"got {value}, expected a number above 0")
    return number


def _not_negative(value: Any) -> float:
    number = _number(value)
    if number < 0:
        raise ValueError(f"got {value}, expected 0 or more")
    return number


def _whole(least: int) -> Any:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"got {reprlib.repr(value)}, expected a whole number of at least {least}")
        return value

    return BeforeValidator(check)


def _rate(value: Any) -> Any:
    if value == "task":
        return value
    if isinstance(value, dict):
        if not value:
            raise ValueError("got an empty mapping, expected a rate for each task")
        return {str(task): "task" if rate == "task" else _positive(rate) for task, rate in value.items()}
    try:
        return _positive(value)
    except ValueError as error:
        raise ValueError(f"{error}, or a mapping from tasks to numbers, or 'task' (the task's own)") from None


def _every(value: Any) -> Any:
    if value == "epoch":
        return value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"got {reprlib.repr(value)}, expected a whole number of optimizer steps, or 'epoch'")
    return value


def _plain(value: Any) -> Any:
    """What JSON can hold, so that it comes back from study.json as it was."""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"the key {key!r} is not a string; put it in quotes")
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return _number(value)
    raise ValueError(f"got {value!r}, expected numbers, strings, true, false, lists or mappings")


def _arm(value: Any) -> Any:
    return {"id": value} if isinstance(value, str) else value


Rate = float | dict[str, Any] | str
_Positive = Annotated[float, BeforeValidator(_positive)]
_NotNegative = Annotated[float, BeforeValidator(_not_negative)]
_Count = Annotated[int, _whole(1)]
_Natural = Annotated[int, _whole(0)]
_Rate = Annotated[Any, BeforeValidator(_rate)]
_Every = Annotated[Any, BeforeValidator(_every)]
_Options = Annotated[dict[str, Any], BeforeValidator(_plain)]
_Text = Annotated[str, Field(strict=True, min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ArmSpec(_Strict):
    """An arm as written in a study file; a bare name stands for `{id: name}`.

    `agent` is the arm's id where it is not given; `lr`, `reward` and `learn_runs` are the study's. `knobs` are what
    a learned arm moves together; `[lr]` where they are not given. `brain` is the folder of one saved before, from
    which a learned arm goes on; it brings the agent's options.
    """

    id: Annotated[str, Field(pattern=rf"^((placebo|yoked):)?{_NAME}$")]
    agent: _Text | None = None
    kind: Literal["baseline", "rule", "learned"] | None = None
    base: _Text | None = None
    options: _Options = {}
    lr: _Rate | None = None
    reward: _Text | None = None
    learn_runs: _Natural | None = None
    knobs: tuple[_Text, ...] | None = None
    brain: _Text | None = None


class TuningSpec(_Strict):
    """The search for the rate of one baseline, on seeds that are not those of the report."""

    arm: _Text
    lrs: Annotated[tuple[_Positive, ...], Field(min_length=2)]
    n_seeds: _Count


class StudyFile(_Strict):
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
        total_steps: See above.
        every: Optimizer steps between decisions, or "epoch"; the task's own where it is not given.
        reward: Of learned arms; the agent's own where it is not given.
        learn_runs: Whole runs that a learned arm learns from before each run that counts.
        sensitivity_lrs: Other initial rates to run every deciding arm and baseline from.
        sensitivity_seeds: Seeds of these runs; `n_seeds` where it is not given.
        tuning: The search for one baseline's rate, which makes the arm `tuned-ARM`.
        user_config: The user's own settings, from which the report recommends changes.
        device: "auto", "cpu", "cuda" or "cuda:N".
        precision: "float32", "bf16", or "auto" (bf16 where the device has it).
        threads: Of torch, for each run.
        final_info: Whether final_info.json files are written beside the report.
        scales: "smoke", "small", "full" -> keys of this file that are different at that scale.
    """

    study: Annotated[str, Field(pattern=rf"^{_NAME}$")]
    idea: _Text
    tasks: Annotated[tuple[_Text, ...], Field(min_length=1)]
    optional_tasks: tuple[_Text, ...] = ()
    benchmark_tasks: tuple[_Text, ...] = ()
    arms: Annotated[tuple[Annotated[ArmSpec, BeforeValidator(_arm)], ...], Field(min_length=1)]
    n_seeds: _Count = 5
    seed: _Natural = 0
    lr: _Rate = "task"
    weight_decay: _NotNegative | None = None
    optimizer: Literal["sgd", "adam", "adamw"] | None = None
    total_steps: _Count | None = None
    every: _Every | None = None
    reward: _Text | None = None
    learn_runs: _Natural = 0
    sensitivity_lrs: tuple[_Positive, ...] = ()
    sensitivity_seeds: _Count | None = None
    tuning: TuningSpec | None = None
    user_config: _Options = {}
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "cpu"
    precision: Literal["float32", "bf16", "auto"] = "float32"
    threads: _Count = 1
    final_info: Annotated[bool, Field(strict=True)] = False
    scales: dict[str, dict[str, Any]] = {}


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which also refuses what it would resolve in silence or without end."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.YAMLError(f"aliases (*{event.anchor}) are not used in study files; write it out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.YAMLError(f"a key is a name, not {reprlib.repr(key)}")
            if key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.YAMLError(f"the key {key!r} is there twice (the second time in line {line})")
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping.

    Raises:
        InputError: It cannot be read, is not UTF-8, not YAML, empty, not a mapping, or holds a key twice.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(f"cannot read the study file {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"the study file {path} is not UTF-8 text (byte {error.start}); is it YAML?") from error
    try:
        data = yaml.load(text, Loader=_Loader)
    except _YAML_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"the study file {path} is not valid YAML: {reason}") from error
    if data is None:
        raise InputError(f"the study file {path} is empty; expected at least study, idea, tasks and arms")
    if not isinstance(data, dict):
        raise InputError(
            f"the study file {path} holds a {type(data).__name__}, expected a mapping of keys "
            f"(study, idea, tasks, arms, ...)"
        )
    return data


def parse_study(data: Mapping[str, Any], where: str, scale: str) -> StudyFile:
    """Check a study, at every scale, and return it as it is at one.

    Args:
        data: What the file holds.
        where: What to call the file in errors.
        scale: "smoke", "small" or "full".

    Raises:
        InputError: A key is unknown or its value wrong, at this scale or at another.
    """
    if scale not in SCALES:
        raise unknown_name("scale", scale, SCALES)
    checked = {"": _validate(data, where, ())}
    for name, overrides in checked[""].scales.items():
        if name not in SCALES:
            raise unknown_name(f"scale in {where}", name, SCALES)
        for key in overrides:
            if key in _FIXED or key not in StudyFile.model_fields:
                allowed = [field for field in StudyFile.model_fields if field not in _FIXED]
                raise unknown_name(f"key in scales.{name} of {where}", key, allowed)
        checked[name] = _validate({**data, **overrides}, where, tuple(overrides), f"scales.{name}.")
    return checked.get(scale, checked[""])


def _validate(data: Mapping[str, Any], where: str, overridden: tuple[str, ...], prefix: str = "") -> StudyFile:
    for key in data:
        if not isinstance(key, str):
            raise InputError(f"{where}: a key is a name, got {reprlib.repr(key)}")
    try:
        return StudyFile.model_validate(dict(data))
    except ValidationError as error:
        # A key that is written wrong is also missing under its right name: say the former.
        first = min(error.errors(), key=lambda entry: entry["type"] != "extra_forbidden")
        path = ".".join(str(part) for part in first["loc"])
        path = prefix + path if first["loc"][0] in overridden else path
        if first["type"] == "extra_forbidden":
            models: dict[str, type[BaseModel]] = {"arms": ArmSpec, "tuning": TuningSpec}
            model = models.get(str(first["loc"][0]), StudyFile) if len(first["loc"]) > 1 else StudyFile
            owner = path.rpartition(".")[0]
            kind = f"key in {owner} of {where}" if owner else f"key in {where}"
            raise unknown_name(kind, first["loc"][-1], model.model_fields) from error
        raise InputError(f"{where}: {path}: {_explain(first)}") from error


def _explain(error: Any) -> str:
    """One pydantic error as what was given and what was expected."""
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] == "missing":
        return "is missing" + ("; every study needs study, idea, tasks and arms" if len(error["loc"]) == 1 else "")
    given = reprlib.repr(error["input"])
    if error["type"] == "string_pattern_mismatch":
        return f"got {given}, expected a text like {error['ctx']['pattern']}"
    if error["type"] == "too_short":
        return f"got {given}, expected at least {error['ctx']['min_length']} entries"
    expected = error["msg"].removeprefix("Input should be ")
    return f"got {given}, expected {expected[:1].lower()}{expected[1:]}"
