"""ONNX: a network written for other runtimes, and compared there with what PyTorch computes.

Called by users, the command line and reports. Needs the extra `trimtab[prune]`.
"""

from __future__ import annotations

import copy
import importlib
import logging
import math
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from trimtab.cost import as_inputs
from trimtab.errors import InputError, MissingExtraError, RunFailedError
from trimtab.storage import atomic_write

__all__ = ["export_onnx"]

_MAX_BYTES = 2_000_000_000  # protobuf, which the file is made of, ends at 2 GiB
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
Array = npt.NDArray[Any]


def export_onnx(model: nn.Module, example_inputs: object, path: str | Path, *, check: bool = True) -> float | None:
    """Write a network as one ONNX file, whole or not at all.

    The network is copied to the CPU and into evaluation mode first; it is not changed itself. The file takes inputs of
    exactly the shapes of `example_inputs`, the batch included.

    With `check` the new file is run by onnxruntime on `example_inputs`, before it gets its name. A floating-point
    output may differ from PyTorch's by sqrt(eps) of its dtype times the largest number in it, that is by half of the
    digits: 3.5e-4 in float32, 1.5e-8 in float64. Both sum the same products in another order and take other
    approximations of exp and tanh, which costs a few units in the last place a layer (at most 1e-6 of the largest
    number in our tests); an operation that has been exported wrongly shows in the first digits. Other outputs have to
    be equal.

    Args:
        model: The network.
        example_inputs: A tensor, or a tuple of the forward's positional arguments.
        path: The file; its folder is made if it is missing, a file of this name is replaced.
        check: Whether to compare.

    Returns:
        The largest absolute difference of an output, in the output's own unit; None without `check`.

    Raises:
        MissingExtraError: onnx or onnxscript are not installed, or onnxruntime is not and `check` asks for it.
        InputError: The network fails on the inputs, has outputs that are not finite, is larger than 2 GB, or has
            something in it that torch.onnx does not export.
        RunFailedError: What onnxruntime computes is something else; nothing is written.
        OutputError: The file cannot be written.
    """
    for package in ("onnx", "onnxscript", *(["onnxruntime"] if check else [])):
        _import(package)
    inputs = tuple(_to_cpu(value) for value in as_inputs(example_inputs))
    network = _copy_on_cpu(model)
    expected = _outputs(network, inputs)
    raw = _export(network, inputs)
    difference = _compare(raw, inputs, expected) if check else None
    atomic_write(Path(path), raw)
    return difference


def _import(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        without = "; or give check=False" if package == "onnxruntime" else ""
        raise MissingExtraError(
            f'ONNX needs the package {package}, which is not installed; pip install "trimtab[prune]"{without}'
        ) from error


def _to_cpu(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_to_cpu(item) for item in value)
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _copy_on_cpu(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise InputError(f"cannot export an instance of {type(model).__name__}; give an nn.Module")
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if size > _MAX_BYTES:
        raise InputError(f"the network takes {size} bytes; one ONNX file holds at most {_MAX_BYTES}, prune it further")
    try:
        return copy.deepcopy(model).cpu().eval()
    except (RuntimeError, TypeError) as error:
        raise InputError(f"the model cannot be copied ({error}); give one that can be, before any forward") from error


@torch.no_grad()
def _outputs(network: nn.Module, inputs: tuple[Any, ...]) -> list[Array]:
    """What PyTorch computes, flat, in the order in which ONNX has its outputs."""
    try:
        outputs = [tensor.numpy().copy() for tensor in _tensors(network(*inputs))]
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, AssertionError) as error:
        raise InputError(
            f"the network fails on the example inputs: {error}; give a batch as it is used with"
        ) from error
    if not outputs:
        raise InputError("the network gives no tensor; ONNX needs at least one output")
    if not all(np.isfinite(output).all() for output in outputs):
        raise InputError(
            "the network gives numbers that are not finite on the example inputs, with which nothing can be "
            "compared; give others"
        )
    return outputs


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, tuple, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _export(network: nn.Module, inputs: tuple[Any, ...]) -> bytes:
    with warnings.catch_warnings(), _quiet("torch.onnx"):
        warnings.simplefilter("ignore")  # the exporter's own, about itself
        try:
            program = torch.onnx.export(network, inputs, dynamo=True, verbose=False)
        except torch.onnx.OnnxExporterError as error:
            reason = _COLOUR.sub("", str(error.__cause__ or error))
            lines = [line.strip() for line in reason.splitlines() if line.strip()] or [type(error).__name__]
            raise InputError(
                f"{type(network).__name__} cannot be exported to ONNX: {lines[0]}; its forward has to be what "
                "torch.export takes, without branches on data"
            ) from error
    if program is None:
        raise InputError("this torch does not export to ONNX through torch.export; upgrade torch")
    raw: bytes = program.model_proto.SerializeToString()
    return raw


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Without a library's warnings in its log, which are about what else could be installed."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _compare(raw: bytes, inputs: tuple[Any, ...], expected: list[Array]) -> float:
    runtime = _import("onnxruntime")
    state = _import("onnxruntime.capi.onnxruntime_pybind11_state")
    own = [kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    errors: tuple[type[Exception], ...] = (RuntimeError, ValueError, *own)
    try:
        options = runtime.SessionOptions()
        options.log_severity_level = 3  # errors; it writes warnings to the console
        session = runtime.InferenceSession(raw, options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]
        given = [tensor.numpy() for tensor in _tensors(inputs)]
        found = session.run(None, dict(zip(names, given, strict=True)))
    except errors as error:
        raise RunFailedError(f"onnxruntime cannot run what was exported: {error}; nothing was written") from error
    if [output.shape for output in found] != [output.shape for output in expected]:
        raise RunFailedError(
            f"onnxruntime gives outputs of the shapes {_shapes(found)}, PyTorch {_shapes(expected)}; nothing was "
            "written"
        )
    return max((_difference(one, two) for one, two in zip(found, expected, strict=True)), default=0.0)


def _shapes(outputs: Iterable[Array]) -> str:
    return ", ".join(str(output.shape) for output in outputs)


def _difference(found: Array, expected: Array) -> float:
    """Largest absolute difference, refused above the tolerance that `export_onnx` states."""
    if expected.size == 0:
        return 0.0
    is_real = np.issubdtype(expected.dtype, np.floating)
    scale = float(np.abs(expected.astype(np.float64)).max())
    tolerance = math.sqrt(np.finfo(expected.dtype).eps) * scale if is_real else 0.0
    difference = float(np.abs(found.astype(np.float64) - expected.astype(np.float64)).max())
    if not difference <= tolerance:  # NaN is above it
        raise RunFailedError(
            f"onnxruntime differs from PyTorch by {difference:.3g}, where the largest output is {scale:.3g} and "
            f"{tolerance:.3g} is allowed; nothing was written"
        )
    return difference
