"""Saving and loading a pruned network: two files, none of which can run code.

`save_pruned` writes `pruned.json` (see `document`) and `weights.safetensors`. `load_pruned` makes the network of them,
in a copy of a fresh dense instance of the user's own class, or, where the network is made of torch's layers in
sequence, without any. Everything is checked before anything is allocated, and nothing is looked up or imported by a
name in a file: see `classes`.

Tied tensors, which one network has under several names, are saved once, under the first of them; loading makes one
tensor and puts it under each. Tensors are tied if they are one object, as in `head.weight = embedding.weight`; views of
each other are saved one by one and are apart after loading. Buffers are saved whether or not they are persistent.
What is neither parameter nor buffer, such as an attribute of the user's class, comes from the instance that is given.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from trimtab.errors import InputError, OutputError
from trimtab.pruning.classes import CONTAINERS, LAYERS, REPLACEMENTS, Layer, layer_of
from trimtab.pruning.document import (
    DTYPES,
    FORMAT,
    VERSION,
    Document,
    ModuleEntry,
    TensorEntry,
    check,
    checksum,
    read_document,
)
from trimtab.storage import atomic_write, temporary_folder
from trimtab.surgery import Deepened

__all__ = ["load_pruned", "save_pruned"]

Make = Callable[[Mapping[str, Any]], nn.Module]

_DOCUMENT = "pruned.json"
_WEIGHTS = "weights.safetensors"
_MAX_HEADER_BYTES = 1 << 26
_NOTHING: Mapping[str, Any] = MappingProxyType({})


# Saving


def save_pruned(
    model: nn.Module,
    directory: str | Path,
    *,
    extra: Mapping[str, Any] = _NOTHING,
    builder: Mapping[str, Any] | None = None,
) -> None:
    """Write a network into a folder, `pruned.json` and `weights.safetensors`, both or neither.

    Both files are written in full before the first of them gets its name. Files of an earlier call are replaced; should
    the process be killed between the two renames, the files do not belong together, which loading says.

    Args:
        model: The network, on any device, in any mode; not changed.
        directory: The folder; made if it is missing. Other files in it are left alone.
        extra: JSON-able, kept in the file as it is, NaN and infinities as null; numbers of a report.
        builder: JSON-able: what `load_pruned` hands to its `make` to get the dense network, for one that cannot be
            described by torch's layers in sequence, such as a task's.

    Raises:
        InputError: `extra` or `builder` are not JSON; the network has a tensor that is sparse, quantized, without
            values or of an unusual dtype, state beyond tensors (`get_extra_state`), or a layer whose sizes (such as
            `in_features`) are not those of its tensors.
        OutputError: The folder cannot be written, or another program's weights are in it; then nothing is changed.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"cannot save {_kind(model)}; give an nn.Module")
    folder = Path(directory)
    tensors, tied = _tensors_of(model)
    entries = {
        name: TensorEntry(
            shape=list(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            kind=_kind_of(tensor),
            requires_grad=isinstance(tensor, nn.Parameter) and tensor.requires_grad,
        )
        for name, tensor in tensors.items()
    }
    raw = save_tensors({name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()})
    document = Document(
        format=FORMAT,
        version=VERSION,
        model=type(model).__name__,
        modules=_modules_of(model),
        tensors=entries,
        tied=tied,
        is_described=False,
        builder=None if builder is None else _as_json(builder, "builder"),
        extra=_as_json(extra, "extra"),
        sha256=hashlib.sha256(raw).hexdigest(),
        checksum="",
    )
    try:
        check(document)
    except InputError as error:
        raise InputError(f"{type(model).__name__} cannot be saved: {error}") from error
    data = document.model_dump()
    data["modules"] = {name: entry.to_json() for name, entry in document.modules.items()}
    data["is_described"] = _is_described(model, document)
    data["checksum"] = checksum(data)
    _write_both(folder, json.dumps(data, indent=1, allow_nan=False) + "\n", raw)


def _as_json(value: Mapping[str, Any], what: str) -> dict[str, Any]:
    """As it will be read: keys are texts, tuples are lists, what is not finite is null."""
    if not isinstance(value, Mapping):
        raise InputError(f"{what} is a {type(value).__name__}; give a dict that JSON can hold")
    try:
        read: dict[str, Any] = json.loads(json.dumps(dict(value)), parse_constant=lambda _: None)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{what} cannot be written as JSON ({error}); give numbers, texts, lists and dicts of Python, not tensors "
            "or arrays"
        ) from error
    return read


def _kind_of(tensor: Tensor) -> Literal["parameter", "buffer"]:
    return "parameter" if isinstance(tensor, nn.Parameter) else "buffer"


def _named_tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _tensors_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Parameters and buffers, each once, under its first name; and the other names of those, with the first."""
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise InputError(
                f"module {name!r} ({type(module).__name__}) has state beyond tensors (get_extra_state), which is not "
                "saved here; keep it as buffers"
            )
    tensors: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, tensor in _named_tensors(model):
        _check_tensor(name, tensor)
        if id(tensor) in first:
            tied[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            tensors[name] = tensor
    return tensors, tied


def _check_tensor(name: str, tensor: Tensor) -> None:
    if is_lazy(tensor):
        raise InputError(f"tensor {name!r} has no shape yet (a lazy layer); run the network once before")
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        raise InputError(
            f"tensor {name!r} is sparse, quantized or without values ({tensor.device}); give plain tensors"
        )
    if tensor.dtype not in DTYPES.values():
        raise InputError(f"tensor {name!r} has the dtype {tensor.dtype}; expected one of {', '.join(DTYPES)}")


def _modules_of(model: nn.Module) -> dict[str, ModuleEntry]:
    found = ((name, _entry(module)) for name, module in model.named_modules(remove_duplicate=False))
    return {name: entry for name, entry in found if entry is not None}


def _entry(module: nn.Module) -> ModuleEntry | None:
    """What the file says of a module; None of one whose class is in no table."""
    kind = type(module).__name__
    if type(module) in CONTAINERS.values():
        options = {"place": 1 if module.layer is module[1] else 2} if isinstance(module, Deepened) else None
        return ModuleEntry(kind=kind, options=options, children=list(module._modules))
    if type(module) in REPLACEMENTS.values():
        return ModuleEntry(kind=kind, options=_options_of(module))
    layer = layer_of(module)
    if layer is None:
        return None
    sizes = {key: size.read(module, key) for key, size in layer.sizes.items()}
    if type(module) is layer.kind:
        return ModuleEntry(kind=layer.name, sizes=sizes, options=_known_options(module, layer))
    # A class of the user's own may have no such sizes, or keep its tensors in another form: then they are its own.
    if not all(size.fits(sizes[key]) for key, size in layer.sizes.items()):
        return None
    own = {name: (tensor.ndim, layer.shape(name, sizes)) for name, tensor in _named_tensors(module)}
    is_alike = all(shape is None or len(shape) == n_axes for n_axes, shape in own.values())
    return ModuleEntry(kind=layer.name, sizes=sizes) if is_alike else None


def _known_options(module: nn.Module, layer: Layer) -> dict[str, Any] | None:
    """Options and what only training depends on; None if one of them has been set to what the table does not know."""
    options = {key: kind.read(module, key) for key, kind in layer.attributes.items()}
    return options if all(kind.fits(options[key]) for key, kind in layer.attributes.items()) else None


def _options_of(module: nn.Module) -> dict[str, Any]:
    return _as_json(getattr(module, "options", {}), f"options of {type(module).__name__}")


def _is_described(model: nn.Module, document: Document) -> bool:
    """Whether the file's modules make a network of the same tensors, and nothing is hooked onto the layers."""
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return False
    try:
        _build("", document)
    except InputError:
        return False
    return True


def _write_both(folder: Path, text: str, raw: bytes) -> None:
    if (folder / _WEIGHTS).exists() and not (folder / _DOCUMENT).exists():
        raise OutputError(
            f"{folder} holds a {_WEIGHTS} but no {_DOCUMENT}, so it is somebody else's; give another folder"
        )
    for name in (_DOCUMENT, _WEIGHTS):
        if (folder / name).is_dir():
            raise OutputError(f"{folder / name} is a folder; give another folder to save into")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    new: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        new = temporary_folder(folder, "saving")
        atomic_write(new / _DOCUMENT, text)
        atomic_write(new / _WEIGHTS, raw)
        # The document first: a folder that has weights alone is never ours.
        os.replace(new / _DOCUMENT, folder / _DOCUMENT)
        os.replace(new / _WEIGHTS, folder / _WEIGHTS)
        new.rmdir()
    except (OSError, ValueError) as error:  # ValueError: no path, or an OutputError
        if new is not None:
            shutil.rmtree(new, ignore_errors=True)
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        reason = error.strerror if isinstance(error, OSError) else error
        raise OutputError(f"cannot save into {folder}: {reason or error}; give a folder that can be written") from error


# Loading


def load_pruned(
    directory: str | Path,
    model: nn.Module | None = None,
    *,
    make: Make | None = None,
    map_location: str | torch.device = "cpu",
) -> nn.Module:
    """Load a network that `save_pruned` wrote; every tensor is the saved one to the bit.

    Args:
        directory: The folder.
        model: A fresh instance of the user's own class, as it was before pruning, or already of the pruned shape. It is
            copied and not changed, neither here nor by training what is returned. Needed unless the network is made
            of torch's layers in sequence, or `make` is given. Where torch's layers (or classes derived from them)
            have other options than the saved ones, such as a stride, it is refused; what the user's own classes do
            besides is theirs.
        make: Makes a dense network of the `builder` that was saved. Asked only where no `model` is given and the file
            does not describe the network itself, on torch's device "meta", so that it draws no weights and numbers of
            a foreign builder take no memory.
        map_location: Device of what is returned.

    Returns:
        The network, in evaluation mode whatever mode it was saved in, parameters requiring gradients as they did, tied
        ones tied, tensors contiguous. Torch's random state is not touched.

    Raises:
        InputError: The files are missing, torn, foreign, changed, or of another version; they name a class that is in
            no table; or the network cannot be built from them; or `model` is of another architecture.
    """
    folder = Path(directory)
    device = _device(map_location)
    if model is not None and not isinstance(model, nn.Module):
        hint = "an instance of it" if isinstance(model, type) else "an nn.Module"
        raise InputError(f"model is {_kind(model)}; give {hint}, as it was before pruning")
    document = read_document(folder / _DOCUMENT)
    tensors = _read_tensors(folder / _WEIGHTS, document)
    try:
        network = _network(document, model, make)
        _fit(network, document, tensors, device)
    except InputError as error:
        raise InputError(f"the pruned network in {folder} cannot be loaded: {error}") from error
    return network.eval()


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"an instance of {type(value).__name__}"


def _device(map_location: object) -> torch.device:
    try:
        device = torch.device(map_location)  # type: ignore[call-overload]
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError) as error:  # AssertionError: torch without CUDA
        raise InputError(
            f"map_location is {map_location!r}, which is no device here ({str(error).splitlines()[0]}); give 'cpu', or "
            "a device that torch sees"
        ) from error
    return torch.device(device)


def _read_tensors(path: Path, document: Document) -> dict[str, Tensor]:
    """The tensors of the file, after their sizes have been compared with the document's."""
    expected = sum(entry.n_bytes for entry in document.tensors.values())
    advice = "copy it anew, or save the network again"
    try:
        size = path.stat().st_size if path.is_file() else -1
        if not expected <= size <= expected + _MAX_HEADER_BYTES:
            raise InputError(
                f"{path} is missing, or has not the {expected} bytes of its tensors and a header; {advice}"
            )
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); {advice}") from error
    if hashlib.sha256(raw).hexdigest() != document.sha256:
        raise InputError(f"{path} is not what was saved with {_DOCUMENT} (checksum); {advice}")
    try:
        tensors: dict[str, Tensor] = load_tensors(raw)
    except (SafetensorError, KeyError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(f"{path} is no file of tensors ({error}); {advice}") from error
    found = {name: _described(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    said = {name: _described(entry.shape, entry.torch_dtype) for name, entry in document.tensors.items()}
    for name in [*said, *found]:
        if said.get(name) != found.get(name):
            raise InputError(
                f"tensor {name!r} is {found.get(name, 'missing')} in {path}, {_DOCUMENT} says "
                f"{said.get(name, 'there is none')}; {advice}"
            )
    return tensors


def _described(shape: Iterable[int], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} of shape ({', '.join(map(str, shape))})"


def _network(document: Document, model: nn.Module | None, make: Make | None) -> nn.Module:
    """A network of the saved one's modules, which nobody else has; shapes and weights are set later."""
    if model is None and document.is_described:
        return _build("", document)
    if model is None and document.builder is not None and make is not None:
        model = _make(document.builder, make)
    if model is None:
        builder = "" if document.builder is None else f" or make=, a function of its builder {document.builder}"
        raise InputError(
            f"it is of the class {document.model}, which the file alone cannot build; give model=, a fresh instance as "
            f"it was before pruning{builder}"
        )
    try:
        network = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"the model cannot be copied ({error}); give a fresh instance, before any forward") from error
    _put_replacements(network, document)
    return network


def _make(builder: Mapping[str, Any], make: Make) -> nn.Module:
    """What `make` gives, with tensors without memory: a builder's numbers may be anything."""
    try:
        with torch.device("meta"):
            model = make(builder)
    except (TypeError, ValueError, LookupError, RuntimeError, OverflowError, AssertionError) as error:
        raise InputError(
            f"make fails with the builder {builder}: {error}; give model=, as it was before pruning"
        ) from error
    if not isinstance(model, nn.Module):
        raise InputError(f"make(builder) gave {_kind(model)}; expected the dense network")
    for name, module in model.named_modules():
        lost = [key for key, value in vars(module).items() if isinstance(value, Tensor) and value.is_meta]
        if lost:
            raise InputError(
                f"module {name!r} that make gave keeps the tensor {lost[0]!r}, which is no parameter or buffer and has "
                "not been saved; give model=, as it was before pruning"
            )
    return model


def _build(name: str, document: Document) -> nn.Module:
    """A module with its children, by the tables, with tensors that have the saved shapes and no memory."""
    module = _build_any(name, document)
    start = f"{name}." if name else ""
    found = {start + own: (list(tensor.shape), _kind_of(tensor)) for own, tensor in _named_tensors(module)}
    saved = {own: (entry.shape, entry.kind) for own, entry in document.all_tensors().items() if own.startswith(start)}
    for own in [*found, *saved]:
        if found.get(own) != saved.get(own):
            raise InputError(
                f"tensor {own!r} is {saved.get(own, 'missing')} in the file; with the sizes and options there it is "
                f"{found.get(own, 'missing')}; the file is foreign, save the network again"
            )
    return module


def _build_any(name: str, document: Document) -> nn.Module:
    entry = document.modules.get(name)
    if entry is None:
        raise InputError(f"module {name!r} is not described, so the network has to be given: model=")
    if entry.children is not None:
        children = OrderedDict(
            (child, _build_any(f"{name}.{child}" if name else child, document)) for child in entry.children
        )
    try:
        with torch.device("meta"):
            if entry.kind in REPLACEMENTS:
                return _build_replacement(name, entry)
            if entry.kind == "Deepened":
                return _build_deepened(list(children.values()), (entry.options or {})["place"])
            if entry.kind in CONTAINERS:
                return CONTAINERS[entry.kind](children)
            layer = LAYERS[entry.kind]
            if entry.options is None or not layer.can_be_built:
                raise InputError(f"module {name!r} ({layer.name}) cannot be built from its sizes: give model=")
            return layer.build(entry.values)
    except (TypeError, ValueError, LookupError, RuntimeError, OverflowError, AssertionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"module {name!r} ({entry.kind}) cannot be built: {error}; the file is foreign, save it again"
        ) from error


def _build_replacement(name: str, entry: ModuleEntry) -> nn.Module:
    module = REPLACEMENTS[entry.kind](**(entry.options or {}))
    made = _options_of(module)
    if made != entry.options:  # nn.Identity takes whatever it is given
        raise InputError(
            f"module {name!r} ({entry.kind}) has the options {entry.options}; made with them it has {made}; the file "
            "is foreign, save the network again"
        )
    return module


def _build_deepened(children: list[nn.Module], place: int) -> Deepened:
    behind = children[place + 1] if len(children) > place + 1 else None
    return Deepened(children[0], children[1] if place == 2 else None, children[place], behind)


def _put_replacements(network: nn.Module, document: Document) -> None:
    """Put in what stands where the dense network has something else, outer modules first."""
    kinds: dict[str, type[nn.Module]] = {**REPLACEMENTS, "Deepened": Deepened}
    names = sorted((name for name, entry in document.modules.items() if entry.kind in kinds), key=len)
    for name in names:
        entry = document.modules[name]
        parent, _, last = name.rpartition(".")
        above = dict(network.named_modules(remove_duplicate=False)).get(parent)
        current: nn.Module | None = network
        if name:
            current = None if above is None else above._modules.get(last)
        if current is None:
            raise InputError(f"the model has no module {name!r}; {_ADVICE}")
        if type(current) is kinds[entry.kind] and _entry(current) == entry:
            continue
        if above is None or not name:
            raise InputError(f"the model is {_kind(current)}, the saved network one of {entry.kind}; {_ADVICE}")
        above._modules[last] = _build(name, document)


_ADVICE = "give a fresh instance of the class that was pruned, made with the same arguments"


def _fit(network: nn.Module, document: Document, tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Set sizes and tensors, after everything has been compared."""
    modules = dict(network.named_modules(remove_duplicate=False))
    _compare_modules(modules, document)
    _compare_tensors(dict(_named_tensors(network)), document)
    for name, module in document.modules.items():
        for key, value in module.sizes.items():
            setattr(modules[name], key, tuple(value) if isinstance(value, list) else value)
    moved: dict[str, Tensor] = {}
    for name, entry in document.tensors.items():
        tensor = tensors[name].to(device)
        is_parameter = entry.kind == "parameter"
        moved[name] = nn.Parameter(tensor, requires_grad=entry.requires_grad) if is_parameter else tensor
    for name in document.all_tensors():
        parent, _, last = name.rpartition(".")
        setattr(modules[parent], last, moved[document.tied.get(name, name)])
    for network_module in modules.values():
        if isinstance(network_module, nn.RNNBase):
            network_module.flatten_parameters()


def _compare_modules(modules: Mapping[str, nn.Module], document: Document) -> None:
    for name, entry in document.modules.items():
        if name not in modules:
            raise InputError(f"the model has no module {name!r}, the saved network one of {entry.kind}; {_ADVICE}")
        module = modules[name]
        layer = layer_of(module)
        kind = layer.name if layer is not None and entry.kind in LAYERS else type(module).__name__
        if kind != entry.kind:
            raise InputError(
                f"module {name!r} of the model is {_kind(module)}, that of the saved network one of "
                f"{entry.kind}; {_ADVICE}"
            )
        if entry.children is not None and list(module._modules) != entry.children:
            raise InputError(
                f"module {name!r} of the model holds {list(module._modules)}, that of the saved network "
                f"{entry.children}; {_ADVICE}"
            )
        if layer is None or entry.options is None:
            continue
        for key, kind_of in layer.options.items():
            found = kind_of.read(module, key)
            if found != entry.options[key]:
                raise InputError(
                    f"module {name!r} of the model has {key} = {found}, that of the saved network "
                    f"{entry.options[key]}; {_ADVICE}"
                )
    for name, module in modules.items():
        layer = layer_of(module)
        if layer is not None and type(module) is layer.kind and name not in document.modules:
            raise InputError(f"the model has a module {name!r} ({layer.name}), the saved network has none; {_ADVICE}")


def _compare_tensors(own: Mapping[str, Tensor], document: Document) -> None:
    saved = document.all_tensors()
    for what, names in (
        ("lacks", [name for name in saved if name not in own]),
        ("has, and the saved network has not,", [name for name in own if name not in saved]),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise InputError(f"the model {what} the tensors {', '.join(map(repr, names[:3]))}{more}; {_ADVICE}")
    for name, tensor in own.items():
        entry = saved[name]
        kind = _kind_of(tensor)
        if is_lazy(tensor):
            raise InputError(f"tensor {name!r} of the model has no shape yet (a lazy layer); run the model once before")
        if kind != entry.kind or tensor.ndim != len(entry.shape):
            raise InputError(
                f"tensor {name!r} of the model is a {kind} of {tensor.ndim} axes, that of the saved network a "
                f"{entry.kind} of {len(entry.shape)}; {_ADVICE}"
            )
