"""The JSON file of a pruned network: what it says of modules and tensors, and everything that is checked about that.

Called by `saving`. Nothing here makes a tensor: all sizes are compared with each other, and with the size of the file
of tensors, as numbers.

    format, version   "trimtab-pruned", 1
    model             name of the network's class, for messages alone; nothing is looked up by it
    modules           name -> kind (a class of the tables in `classes`), sizes, options, children of containers
    tensors           name -> shape, dtype, kind (parameter or buffer), requires_grad
    tied              name -> name of the tensor in `tensors` that stands there too
    is_described      whether `modules` say how to build the whole network
    builder, extra    as they were given to save_pruned
    sha256, checksum  of the file of tensors; of everything else in this file
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trimtab.errors import InputError
from trimtab.pruning.classes import CONTAINERS, LAYERS, REPLACEMENTS

__all__ = [
    "DTYPES",
    "FORMAT",
    "VERSION",
    "Document",
    "ModuleEntry",
    "TensorEntry",
    "check",
    "checksum",
    "read_document",
]

FORMAT = "trimtab-pruned"
VERSION = 1
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip
_MAX_BYTES = 1 << 26  # a network with 100,000 tensors takes a quarter of it
_MAX_DEPTH = 64  # of names; a module within a module is built by recursion
_Length = Annotated[int, Field(ge=0, lt=1 << 31)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class TensorEntry(_Strict):
    """One parameter or buffer."""

    shape: Annotated[list[_Length], Field(max_length=16)]
    dtype: str
    kind: Literal["parameter", "buffer"]
    requires_grad: bool

    @property
    def torch_dtype(self) -> torch.dtype:
        """Its dtype; the name has been checked."""
        return DTYPES[self.dtype]

    @property
    def n_bytes(self) -> int:
        """What it takes in the file."""
        return math.prod(self.shape) * self.torch_dtype.itemsize


class ModuleEntry(_Strict):
    """One module of a class of the tables.

    Attributes:
        kind: Name of its class, a key of LAYERS, CONTAINERS or REPLACEMENTS.
        sizes: Of a layer.
        options: Of a layer, whatever it can be built with, else null; of a replacement, its arguments.
        children: Names of a container's modules, in their order.
    """

    kind: str
    sizes: dict[str, Any] = {}
    options: dict[str, Any] | None = None
    children: list[str] | None = None

    @property
    def values(self) -> dict[str, Any]:
        """Sizes and options."""
        return {**self.sizes, **(self.options or {})}

    def to_json(self) -> dict[str, Any]:
        """What `Document.modules` has of it."""
        return self.model_dump(exclude_defaults=True)


class Document(_Strict):
    """The whole file; see the head of this module."""

    format: str
    version: int
    model: str
    modules: dict[str, ModuleEntry]
    tensors: dict[str, TensorEntry]
    tied: dict[str, str]
    is_described: bool
    builder: dict[str, Any] | None
    extra: dict[str, Any]
    sha256: str
    checksum: str

    def all_tensors(self) -> dict[str, TensorEntry]:
        """Entries by every name, those of tied tensors included."""
        return {**self.tensors, **{name: self.tensors[first] for name, first in self.tied.items()}}


def checksum(data: Mapping[str, Any]) -> str:
    """SHA-256 of everything but the checksum itself: one changed digit of an option would make another network."""
    rest = {key: value for key, value in data.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_document(path: Path) -> Document:
    """Read and check the file.

    Raises:
        InputError: It is missing, torn, foreign, of another version, changed, or contradicts itself.
    """
    data = _read(path)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise InputError(
            f"{path} is not of a pruned network: expected the format {FORMAT!r}; give a folder that save_pruned wrote"
        )
    if data.get("version") != VERSION or type(data["version"]) is not int:
        raise InputError(
            f"{path} has version {data.get('version')!r}, this trimtab reads version {VERSION}; upgrade trimtab, or "
            "save the network again"
        )
    try:
        if checksum(data) != data.get("checksum"):
            raise InputError(f"{path} is not what was saved (checksum); copy it anew, or save the network again")
        document = Document.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{path}: {where} is {_short(first['input'])}: {first['msg']}; the file is foreign, save the network again"
        ) from error
    except RecursionError as error:
        raise InputError(f"{path} is nested too deeply; the file is foreign, save the network again") from error
    try:
        check(document)
    except InputError as error:
        raise InputError(f"{path}: {error}; the file is foreign or broken, save the network again") from error
    return document


def _read(path: Path) -> Any:
    try:
        if not path.is_file():  # reading a pipe would not end
            raise FileNotFoundError(path)
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{path} is larger than {_MAX_BYTES} bytes; expected a file that save_pruned wrote")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"no pruned network in {path.parent}: {path.name} is missing; give a folder that save_pruned wrote"
        ) from error
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no text, no JSON, or no path
        raise InputError(
            f"{path} cannot be read as JSON ({error}); it is torn or foreign, copy it anew or save the network again"
        ) from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def check(document: Document) -> None:
    """Refuse what contradicts itself or the tables, without making a tensor.

    Raises:
        InputError: A class that is in no table, an option or size that is none, sizes that do not fit the tensors.
    """
    for name, tensor in document.tensors.items():
        if tensor.dtype not in DTYPES:
            raise InputError(f"tensor {name!r} has the dtype {_short(tensor.dtype)}; known: {', '.join(DTYPES)}")
        if tensor.requires_grad and (tensor.kind == "buffer" or not tensor.torch_dtype.is_floating_point):
            raise InputError(f"tensor {name!r} is a {tensor.kind} of {tensor.dtype} and cannot require a gradient")
    for name, first in document.tied.items():
        if first not in document.tensors or name in document.tensors:
            raise InputError(f"tensor {name!r} is tied to {_short(first)}, which stands for no other tensor of its own")
    shapes = {name: tuple(tensor.shape) for name, tensor in document.all_tensors().items()}
    own: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        parent, _, last = name.rpartition(".")
        own.setdefault(parent, {})[last] = shape
    for name, module in document.modules.items():
        if name.count(".") >= _MAX_DEPTH:
            raise InputError(f"module {_short(name)} lies deeper than {_MAX_DEPTH} modules")
        _check_module(name, module, own.get(name, {}), document)
    if document.is_described and "" not in document.modules:
        raise InputError("it says that it describes the whole network, and does not describe its outermost module")


def _check_module(name: str, module: ModuleEntry, own: Mapping[str, tuple[int, ...]], document: Document) -> None:
    """Refuse a module whose class is in no table, or whose sizes and options are none or do not fit its tensors."""
    kind = module.kind
    if kind in CONTAINERS:
        _check_children(name, module, document)
        return
    if module.children is not None:
        raise InputError(f"module {name!r} ({_short(kind)}) has children; only {', '.join(CONTAINERS)} have")
    if kind in REPLACEMENTS:
        if module.sizes or module.options is None:
            raise InputError(f"module {name!r} ({kind}) has to have options and no sizes")
        return
    if kind not in LAYERS:
        raise InputError(
            f"module {name!r} is of the class {_short(kind)}, which no pruned network may have, and nothing is "
            f"looked up by that name; known: {', '.join([*LAYERS, *CONTAINERS, *REPLACEMENTS])}"
        )
    layer = LAYERS[kind]
    kinds = {**layer.sizes, **(layer.attributes if module.options is not None else {})}
    if set(kinds) != set(module.values) or len(module.values) != len(module.sizes) + len(module.options or {}):
        raise InputError(f"module {name!r} ({kind}) has {sorted(module.values)}; expected {sorted(kinds)}")
    for key, value in module.values.items():
        if not kinds[key].fits(value):
            raise InputError(f"module {name!r} ({kind}) has {key} = {_short(value)}; expected {kinds[key].what}")
    problem = layer.problem(module.values, own)
    if problem is not None:
        raise InputError(f"module {name!r} ({kind}): {problem}")
    for last, shape in own.items():
        expected = layer.shape(last, module.values)
        if expected is not None and not _fits(shape, expected):
            raise InputError(
                f"module {name!r} ({kind}) has {_sizes(module)}, with which its {last} has the shape "
                f"{_text(expected)}; the tensor has {_text(shape)}"
            )


def _check_children(name: str, module: ModuleEntry, document: Document) -> None:
    children = module.children
    places = {"place"} if module.kind == "Deepened" else set()
    if children is None or module.sizes or set(module.options or {}) != places:
        raise InputError(f"module {name!r} ({module.kind}) has to have children, and options {sorted(places)}")
    if any(not child or "." in child for child in children) or len(set(children)) < len(children):
        raise InputError(f"module {name!r} has the children {_short(children)}; expected names without dots, each once")
    if places:
        place = (module.options or {})["place"]
        if type(place) is not int or place not in (1, 2) or not place < len(children) <= place + 2:
            raise InputError(f"module {name!r} is no Deepened: place {_short(place)} of {len(children)} modules")
        if children != [str(n) for n in range(len(children))]:
            raise InputError(f"module {name!r} is no Deepened: its children are {children}, expected 0, 1, ...")


def _fits(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(shape) == len(expected) and all(two in (None, one) for one, two in zip(shape, expected, strict=True))


def _sizes(module: ModuleEntry) -> str:
    return ", ".join(f"{key} {value}" for key, value in module.sizes.items())


def _text(shape: tuple[int | None, ...]) -> str:
    return f"({', '.join('any' if n is None else str(n) for n in shape)})"
