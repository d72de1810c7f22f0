"""Files that people write: YAML -> checked, frozen pydantic models.

Called by the studies of the experiments and by the recipes of learning. Everything that a file can get wrong ends as
one InputError that names the key, what was given and what was expected; unknown keys get "did you mean".
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Collection, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from trimtab.errors import InputError, unknown_name

__all__ = [
    "Count",
    "Natural",
    "NotNegative",
    "Options",
    "Positive",
    "Strict",
    "Text",
    "check",
    "number",
    "positive",
    "read_yaml",
    "whole",
]

_Model = TypeVar("_Model", bound=BaseModel)

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


def number(value: Any) -> float:
    """A finite number; PyYAML reads `1e-3` as a string, so strings that are numbers count."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"got {reprlib.repr(value)}, expected a number")
    try:
        checked = float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"got {reprlib.repr(value)}, expected a number") from None
    if not math.isfinite(checked):
        raise ValueError(f"got {value}, expected a finite number")
    return checked


def positive(value: Any) -> float:
    """A finite number above 0."""
    checked = number(value)
    if checked <= 0:
        raise ValueError(f"got {value}, expected a number above 0")
    return checked


def _not_negative(value: Any) -> float:
    checked = number(value)
    if checked < 0:
        raise ValueError(f"got {value}, expected 0 or more")
    return checked


def whole(least: int) -> Any:
    """A pydantic validator of whole numbers."""

    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"got {reprlib.repr(value)}, expected a whole number of at least {least}")
        return value

    return BeforeValidator(check)


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
        return number(value)
    raise ValueError(f"got {value!r}, expected numbers, strings, true, false, lists or mappings")


Count = Annotated[int, whole(1)]
Natural = Annotated[int, whole(0)]
Positive = Annotated[float, BeforeValidator(positive)]
NotNegative = Annotated[float, BeforeValidator(_not_negative)]
Options = Annotated[dict[str, Any], BeforeValidator(_plain)]
Text = Annotated[str, Field(strict=True, min_length=1)]


class Strict(BaseModel):
    """A part of a file in which unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which also refuses what it would resolve in silence or without end."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.YAMLError(f"aliases (*{event.anchor}) are not used in our files; write it out")
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


def read_yaml(path: Path, what: str = "study", keys: str = "study, idea, tasks and arms") -> dict[str, Any]:
    """Read a YAML file that holds one mapping.

    Args:
        path: The file.
        what: What it describes, for errors.
        keys: Keys that it must have, for errors.

    Raises:
        InputError: It cannot be read, is not UTF-8, not YAML, empty, not a mapping, or holds a key twice.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(f"cannot read the {what} file {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"the {what} file {path} is not UTF-8 text (byte {error.start}); is it YAML?") from error
    try:
        data = yaml.load(text, Loader=_Loader)
    except _YAML_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"the {what} file {path} is not valid YAML: {reason}") from error
    if data is None:
        raise InputError(f"the {what} file {path} is empty; expected at least {keys}")
    if not isinstance(data, dict):
        raise InputError(
            f"the {what} file {path} holds a {type(data).__name__}, expected a mapping of keys "
            f"({keys.replace(' and', ',')}, ...)"
        )
    return data


def check(
    model: type[_Model],
    data: Mapping[str, Any],
    where: str,
    *,
    needs: str,
    overridden: Collection[str] = (),
    prefix: str = "",
) -> _Model:
    """Check what a file holds against its model.

    Args:
        model: What it should be.
        data: What it holds.
        where: What to call the file in errors.
        needs: Said of a missing key: "every study needs study and idea".
        overridden: Keys that do not come from the file's top level.
        prefix: What stands before them in errors.

    Raises:
        UnknownNameError: A key that the model has not, at any depth.
        InputError: A key is missing, or its value wrong.
    """
    for key in data:
        if not isinstance(key, str):
            raise InputError(f"{where}: a key is a name, got {reprlib.repr(key)}")
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        # A key that is written wrong is also missing under its right name: say the former.
        first = min(error.errors(), key=lambda entry: entry["type"] != "extra_forbidden")
        path = ".".join(str(part) for part in first["loc"])
        path = prefix + path if first["loc"][0] in overridden else path
        if first["type"] == "extra_forbidden":
            owner = path.rpartition(".")[0]
            kind = f"key in {owner} of {where}" if owner else f"key in {where}"
            known = _keys(_model_at(model, first["loc"][:-1]))
            raise unknown_name(kind, first["loc"][-1], known) from error
        raise InputError(f"{where}: {path}: {_explain(first, needs)}") from error


def _keys(model: type[BaseModel]) -> dict[str, Any]:
    """Key in a file -> annotation."""
    return {item.alias or name: item.annotation for name, item in model.model_fields.items()}


def _model_at(model: type[BaseModel], place: Sequence[str | int]) -> type[BaseModel]:
    """The model of a part of a file; numbers in the place are those of a list's entries."""
    for part in place:
        if isinstance(part, str):
            model = _model_in(_keys(model).get(part)) or model
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)


def _explain(error: Any, needs: str) -> str:
    """One pydantic error as what was given and what was expected."""
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] == "missing":
        return "is missing" + (f"; {needs}" if len(error["loc"]) == 1 else "")
    given = reprlib.repr(error["input"])
    if error["type"] == "string_pattern_mismatch":
        return f"got {given}, expected a text like {error['ctx']['pattern']}"
    if error["type"] == "too_short":
        return f"got {given}, expected at least {error['ctx']['min_length']} entries"
    expected = error["msg"].removeprefix("Input should be ")
    return f"got {given}, expected {expected[:1].lower()}{expected[1:]}"
