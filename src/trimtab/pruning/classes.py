"""What a saved network may consist of: fixed tables of classes, with their sizes, options and shapes of tensors.

Called by `document` and `saving`. A name in a file means a class of these tables or nothing: no other name is looked up
and nothing is imported by one. Values are in JSON's form here: tuples are lists.

`LAYERS` are layers of torch.nn whose sizes a pruned network has other numbers for, or that it can be built from again.
`CONTAINERS` hold others and call them in order. `REPLACEMENTS` may stand where the dense network has something else;
one of them has a property `options`, from JSON's types, which are the keyword arguments that make it (or has neither
options nor arguments), and registers its tensors without looking at their numbers, since it is made on torch's device
"meta".
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from trimtab.pruning.pruned_attention import PrunedAttention
from trimtab.surgery import Deepened, Head

__all__ = ["CONTAINERS", "LAYERS", "REPLACEMENTS", "Kind", "Layer", "layer_of"]

Values = Mapping[str, Any]
Shape = tuple[int | None, ...]  # None: any length

_LIMIT = 1 << 31


@dataclass(frozen=True)
class Kind:
    """What a value may be.

    Attributes:
        what: In words, for errors.
        fits: Whether a value is one.
        is_presence: It is read as whether the module's attribute is there, which is how the layers keep `bias`.
    """

    what: str
    fits: Callable[[Any], bool]
    is_presence: bool = False

    def read(self, module: nn.Module, name: str) -> Any:
        """The attribute of a module in JSON's form; None where it has none."""
        value = getattr(module, name, None)
        if self.is_presence:
            return value is not None
        return list(value) if isinstance(value, (tuple, list)) else value


def _is_int(value: Any, lowest: int) -> bool:
    return type(value) is int and lowest <= value < _LIMIT


def _is_number(value: Any) -> bool:
    return _is_int(value, 1 - _LIMIT) or (type(value) is float and math.isfinite(value))


def _ints(lowest: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and 1 <= len(value) <= 8 and all(_is_int(n, lowest) for n in value)


def _or(kind: Kind, what: str, fits: Callable[[Any], bool]) -> Kind:
    return Kind(f"{kind.what} or {what}", lambda value: kind.fits(value) or fits(value))


def _text(*choices: str) -> Kind:
    return Kind(f"one of {', '.join(choices)}", lambda value: type(value) is str and value in choices)


def _maybe(kind: Kind) -> Kind:
    return _or(kind, "null", lambda value: value is None)


def _per_axis(n_axes: int, lowest: int) -> Kind:
    fits = _ints(lowest)
    return Kind(
        f"a list of {n_axes} whole numbers from {lowest} up", lambda value: fits(value) and len(value) == n_axes
    )


_SIZE = Kind("a whole number from 1 up", lambda value: _is_int(value, 1))
_COUNT = Kind("a whole number from 0 up", lambda value: _is_int(value, 0))
_AXIS = Kind("a whole number", lambda value: _is_int(value, -64))
_SHAPE = Kind("a list of whole numbers from 1 up", _ints(1))
_STEPS = _or(_SHAPE, "one", _SIZE.fits)  # kernels and strides
_EDGES = Kind("whole numbers from 0 up", lambda value: _COUNT.fits(value) or _ints(0)(value))
_TARGET = Kind(
    "whole numbers from 1 up or null",
    lambda value: all(n is None or _is_int(n, 1) for n in (value if isinstance(value, list) else [value])),
)
_NUMBER = Kind("a number", _is_number)
_FLAG = Kind("true or false", lambda value: type(value) is bool)
_HAS = Kind("true or false", lambda value: type(value) is bool, is_presence=True)


@dataclass(frozen=True)
class Layer:
    """One class of layers.

    Attributes:
        kind: The class.
        sizes: Attributes that pruning changes, which are arguments of the constructor too.
        options: Attributes that pruning leaves alone and on which the outputs in evaluation depend, likewise.
        training: Attributes on which only training depends, likewise.
        shape: Shape of its tensor of this name, by its sizes and options; None for a tensor that it does not know.
        problem: Why these sizes and options, with tensors of these names, are none; None where they are.
        can_be_built: Whether the three are all that the constructor needs.
    """

    kind: type[nn.Module]
    sizes: Mapping[str, Kind] = field(default_factory=dict)
    options: Mapping[str, Kind] = field(default_factory=dict)
    training: Mapping[str, Kind] = field(default_factory=dict)
    shape: Callable[[str, Values], Shape | None] = lambda name, values: None
    problem: Callable[[Values, Collection[str]], str | None] = lambda values, names: None
    can_be_built: bool = True

    @property
    def name(self) -> str:
        """Of the class, as the file has it."""
        return self.kind.__name__

    @property
    def attributes(self) -> dict[str, Kind]:
        """Options and what only training depends on."""
        return {**self.options, **self.training}

    def build(self, values: Values) -> nn.Module:
        """A layer with these sizes and options, on the device that torch makes tensors on now."""
        return self.kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def _fixed(**shapes: Callable[[Values], Shape]) -> Callable[[str, Values], Shape | None]:
    return lambda name, values: shapes[name](values) if name in shapes else None


def _kernel(values: Values, n_axes: int) -> Shape:
    return tuple(values["kernel_size"]) if "kernel_size" in values else (None,) * n_axes


def _indivisible(values: Values, groups: str, *sizes: str) -> str | None:
    wrong = [size for size in sizes if values[size] % values[groups]]
    return f"{wrong[0]} {values[wrong[0]]} is no multiple of {groups} {values[groups]}" if wrong else None


def _convolution(kind: type[nn.Module], n_axes: int, transposed: bool) -> Layer:
    one, two = ("in_channels", "out_channels") if transposed else ("out_channels", "in_channels")
    steps, edges = _per_axis(n_axes, 1), _per_axis(n_axes, 0)
    padding = edges if transposed else _or(edges, "'same' or 'valid'", lambda value: value in ("same", "valid"))
    options = {"kernel_size": steps, "stride": steps, "padding": padding, "dilation": steps, "bias": _HAS}
    options |= {"output_padding": edges} if transposed else {}
    return Layer(
        kind,
        {"in_channels": _SIZE, "out_channels": _SIZE, "groups": _SIZE},
        {**options, "padding_mode": _text("zeros", "reflect", "replicate", "circular")},
        shape=_fixed(
            weight=lambda v: (v[one], v[two] // v["groups"], *_kernel(v, n_axes)),
            bias=lambda v: (v["out_channels"],),
        ),
        problem=lambda v, names: _indivisible(v, "groups", "in_channels", "out_channels"),
    )


def _norm(kind: type[nn.Module]) -> Layer:
    names = ("weight", "bias", "running_mean", "running_var")
    return Layer(
        kind,
        {"num_features": _SIZE},
        {"eps": _NUMBER, "affine": _FLAG, "track_running_stats": _FLAG},
        {"momentum": _maybe(_NUMBER)},
        shape=_fixed(num_batches_tracked=lambda v: (), **{name: lambda v: (v["num_features"],) for name in names}),
    )


_RECURRENT_TENSOR = re.compile(r"(weight|bias)_(ih|hh|hr)_l(\d{1,9})(_reverse)?", re.ASCII)


def _recurrent(kind: type[nn.Module], gates: int, **more: Kind) -> Layer:
    is_lstm = kind is nn.LSTM

    def shape(name: str, values: Values) -> Shape | None:
        match = _RECURRENT_TENSOR.fullmatch(name)
        if match is None:
            return None
        what, side, layer = match[1], match[2], int(match[3])
        hidden = values["hidden_size"]
        out = values.get("proj_size") or hidden
        if what == "bias":
            return (gates * hidden,)
        if side == "hr":
            return (out, hidden)
        if side == "hh":
            return (gates * hidden, out)
        directions = None if "bidirectional" not in values else 1 + values["bidirectional"]
        above = None if directions is None else directions * out
        return (gates * hidden, values["input_size"] if layer == 0 else above)

    def problem(values: Values, names: Collection[str]) -> str | None:
        if values.get("proj_size", 0) >= values["hidden_size"]:
            return f"proj_size {values['proj_size']} is not below hidden_size {values['hidden_size']}"
        found = sum(name.startswith("weight_ih_l") for name in names)
        if "num_layers" in values and values["num_layers"] * (1 + values["bidirectional"]) != found:
            return (
                f"num_layers {values['num_layers']} with bidirectional {values['bidirectional']} does not go with "
                f"{found} tensors weight_ih_l*"
            )
        return None

    return Layer(
        kind,
        {"input_size": _SIZE, "hidden_size": _SIZE, **({"proj_size": _COUNT} if is_lstm else {})},
        {"num_layers": _SIZE, "bias": _FLAG, "batch_first": _FLAG, "bidirectional": _FLAG, **more},
        {"dropout": _NUMBER},
        shape,
        problem,
    )


def _cell(kind: type[nn.Module], gates: int, **more: Kind) -> Layer:
    return Layer(
        kind,
        {"input_size": _SIZE, "hidden_size": _SIZE},
        {"bias": _FLAG, **more},
        shape=_fixed(
            weight_ih=lambda v: (gates * v["hidden_size"], v["input_size"]),
            weight_hh=lambda v: (gates * v["hidden_size"], v["hidden_size"]),
            bias_ih=lambda v: (gates * v["hidden_size"],),
            bias_hh=lambda v: (gates * v["hidden_size"],),
        ),
    )


def _attention() -> Layer:
    def problem(values: Values, names: Collection[str]) -> str | None:
        if values["num_heads"] * values["head_dim"] != values["embed_dim"]:
            return f"num_heads {values['num_heads']} x head_dim {values['head_dim']} is not {values['embed_dim']}"
        return None

    return Layer(
        nn.MultiheadAttention,
        {"embed_dim": _SIZE, "num_heads": _SIZE, "head_dim": _SIZE, "kdim": _SIZE, "vdim": _SIZE},
        {"batch_first": _FLAG, "add_zero_attn": _FLAG},
        shape=_fixed(
            in_proj_weight=lambda v: (3 * v["embed_dim"], v["embed_dim"]),
            in_proj_bias=lambda v: (3 * v["embed_dim"],),
            q_proj_weight=lambda v: (v["embed_dim"], v["embed_dim"]),
            k_proj_weight=lambda v: (v["embed_dim"], v["kdim"]),
            v_proj_weight=lambda v: (v["embed_dim"], v["vdim"]),
            bias_k=lambda v: (1, 1, v["embed_dim"]),
            bias_v=lambda v: (1, 1, v["embed_dim"]),
        ),
        problem=problem,
        can_be_built=False,  # head_dim is none of the constructor's arguments
    )


def _embedding(kind: type[nn.Module], can_be_built: bool, **options: Kind) -> Layer:
    return Layer(
        kind,
        {"num_embeddings": _SIZE, "embedding_dim": _SIZE},
        {"max_norm": _maybe(_NUMBER), "norm_type": _NUMBER, **options},
        {"padding_idx": _maybe(_COUNT), "scale_grad_by_freq": _FLAG, "sparse": _FLAG},
        shape=_fixed(weight=lambda v: (v["num_embeddings"], v["embedding_dim"])),
        can_be_built=can_be_built,
    )


_NONLINEARITY = _text("tanh", "relu")
_WHOLE_SHAPE = _fixed(weight=lambda v: tuple(v["normalized_shape"]), bias=lambda v: tuple(v["normalized_shape"]))
_MAX_POOL = {
    "kernel_size": _STEPS, "stride": _STEPS, "padding": _EDGES, "dilation": _STEPS, "return_indices": _FLAG,
    "ceil_mode": _FLAG,
}  # fmt: skip
_MEAN_POOL = {
    "kernel_size": _STEPS, "stride": _STEPS, "padding": _EDGES, "ceil_mode": _FLAG, "count_include_pad": _FLAG,
}  # fmt: skip
_INPLACE = {"inplace": _FLAG}


def _linear() -> Layer:
    return Layer(
        nn.Linear,
        {"in_features": _SIZE, "out_features": _SIZE},
        {"bias": _HAS},
        shape=_fixed(weight=lambda v: (v["out_features"], v["in_features"]), bias=lambda v: (v["out_features"],)),
    )


def _bilinear() -> Layer:
    return Layer(
        nn.Bilinear,
        {"in1_features": _SIZE, "in2_features": _SIZE, "out_features": _SIZE},
        {"bias": _HAS},
        shape=_fixed(
            weight=lambda v: (v["out_features"], v["in1_features"], v["in2_features"]),
            bias=lambda v: (v["out_features"],),
        ),
    )


def _group_norm() -> Layer:
    return Layer(
        nn.GroupNorm,
        {"num_groups": _SIZE, "num_channels": _SIZE},
        {"eps": _NUMBER, "affine": _FLAG},
        shape=_fixed(weight=lambda v: (v["num_channels"],), bias=lambda v: (v["num_channels"],)),
        problem=lambda v, names: _indivisible(v, "num_groups", "num_channels"),
    )


def _with_weights() -> list[Layer]:
    return [
        _linear(),
        _bilinear(),
        *(_convolution(kind, n, False) for n, kind in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), 1)),
        *(
            _convolution(kind, n, True)
            for n, kind in enumerate((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), 1)
        ),
        *(_norm(kind) for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)),
        *(_norm(kind) for kind in (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)),
        Layer(
            nn.LayerNorm,
            {"normalized_shape": _SHAPE},
            {"eps": _NUMBER, "elementwise_affine": _FLAG, "bias": _HAS},
            shape=_WHOLE_SHAPE,
        ),
        Layer(
            nn.RMSNorm,
            {"normalized_shape": _SHAPE},
            {"eps": _maybe(_NUMBER), "elementwise_affine": _FLAG},
            shape=_WHOLE_SHAPE,
        ),
        _group_norm(),
        _embedding(nn.Embedding, True),
        _embedding(nn.EmbeddingBag, False, mode=_text("sum", "mean", "max"), include_last_offset=_FLAG),
        _recurrent(nn.LSTM, 4),
        _recurrent(nn.GRU, 3),
        _recurrent(nn.RNN, 1, nonlinearity=_NONLINEARITY),
        _cell(nn.LSTMCell, 4),
        _cell(nn.GRUCell, 3),
        _cell(nn.RNNCell, 1, nonlinearity=_NONLINEARITY),
        _attention(),
        Layer(nn.PReLU, {"num_parameters": _SIZE}, shape=_fixed(weight=lambda v: (v["num_parameters"],))),
    ]


def _without_weights() -> list[Layer]:
    adaptive = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
    adaptive_max = (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
    dropouts = (
        nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
    )  # fmt: skip
    return [
        *(
            Layer(kind, options=_INPLACE)
            for kind in (nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Mish, nn.Hardsigmoid, nn.Hardswish)
        ),
        *(Layer(kind) for kind in (nn.Sigmoid, nn.Tanh, nn.Softsign, nn.LogSigmoid, nn.Tanhshrink)),
        *(Layer(kind, options={"alpha": _NUMBER, **_INPLACE}) for kind in (nn.ELU, nn.CELU)),
        *(Layer(kind, options={"dim": _maybe(_AXIS)}) for kind in (nn.Softmax, nn.LogSoftmax)),
        *(Layer(kind, options={"lambd": _NUMBER}) for kind in (nn.Softshrink, nn.Hardshrink)),
        Layer(nn.LeakyReLU, options={"negative_slope": _NUMBER, **_INPLACE}),
        Layer(nn.RReLU, options={"lower": _NUMBER, "upper": _NUMBER, **_INPLACE}),
        Layer(nn.GELU, options={"approximate": _text("none", "tanh")}),
        Layer(nn.Hardtanh, options={"min_val": _NUMBER, "max_val": _NUMBER, **_INPLACE}),
        Layer(nn.Softplus, options={"beta": _NUMBER, "threshold": _NUMBER}),
        Layer(nn.Threshold, options={"threshold": _NUMBER, "value": _NUMBER, **_INPLACE}),
        Layer(nn.GLU, options={"dim": _AXIS}),
        *(Layer(kind, training={"p": _NUMBER, **_INPLACE}) for kind in dropouts),
        *(Layer(kind, options=_MAX_POOL) for kind in (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)),
        Layer(nn.AvgPool1d, options=_MEAN_POOL),
        *(
            Layer(kind, options={**_MEAN_POOL, "divisor_override": _maybe(_SIZE)})
            for kind in (nn.AvgPool2d, nn.AvgPool3d)
        ),
        *(Layer(kind, options={"output_size": _TARGET}) for kind in adaptive),
        *(Layer(kind, options={"output_size": _TARGET, "return_indices": _FLAG}) for kind in adaptive_max),
        Layer(nn.Flatten, options={"start_dim": _AXIS, "end_dim": _AXIS}),
    ]


LAYERS: dict[str, Layer] = {layer.name: layer for layer in (*_with_weights(), *_without_weights())}
CONTAINERS: dict[str, type[nn.Sequential]] = {"Sequential": nn.Sequential, "Head": Head, "Deepened": Deepened}
REPLACEMENTS: dict[str, type[nn.Module]] = {"Identity": nn.Identity, "PrunedAttention": PrunedAttention}

_BY_CLASS = {layer.kind: layer for layer in LAYERS.values()}


def layer_of(module: nn.Module) -> Layer | None:
    """The table's layer that a module is, or whose class it is derived from; None where it is none."""
    return next((_BY_CLASS[kind] for kind in type(module).__mro__ if kind in _BY_CLASS), None)
