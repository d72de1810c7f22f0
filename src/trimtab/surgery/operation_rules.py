"""Operation rules: what becomes of units in functions and methods of tensors: x + y, torch.cat, F.relu, x.flatten(1).

Called by `couplings`. An operation is known by its name, and only if it is torch's own, or Python's on a tensor.
"""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.nn.utils import rnn

from trimtab.surgery.layout import Axes, Layout, leaves, plain
from trimtab.surgery.module_rules import flattened

if TYPE_CHECKING:
    from trimtab.surgery.couplings import Couplings, Value

__all__ = ["operation_name", "operation_value"]

_EACH_NUMBER = (
    "add", "sub", "mul", "div", "truediv", "floordiv", "pow", "iadd", "isub", "imul", "itruediv", "neg", "abs",
    "exp", "log", "sqrt", "rsqrt", "square", "reciprocal", "sign", "clamp", "clip", "clamp_min", "clamp_max",
    "maximum", "minimum", "where", "masked_fill", "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or",
    "logical_not", "and_", "or_", "invert", "isnan", "rsub", "sin", "cos", "erf", "lerp", "addcmul", "relu",
    "relu_", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "tanh", "sigmoid", "hardtanh",
    "hardsigmoid", "hardswish", "softplus", "softsign", "tanhshrink", "logsigmoid", "threshold", "rrelu", "dropout",
    "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "contiguous", "clone",
    "detach", "to", "float", "double", "half", "bfloat16", "type", "cpu", "cuda", "requires_grad_", "zeros_like",
    "ones_like",
)  # fmt: skip
_NO_VALUES = ("size", "dim", "numel", "stride", "is_floating_point", "new_zeros", "new_ones", "new_full", "new_empty")
_REDUCTIONS = (
    "sum", "mean", "amax", "amin", "max", "min", "std", "var", "prod", "all", "any", "argmax", "argmin",
    "logsumexp", "norm", "median", "mode", "count_nonzero", "nansum", "nanmean",
)  # fmt: skip


def operation_name(target: Any) -> str | None:
    """Name of an operation; None where it is not one of torch's own."""
    if isinstance(target, str):  # a method; the forward's stand-ins are tensors
        return target
    name = getattr(target, "__name__", "")
    if target is builtins.getattr or target in (rnn.pack_padded_sequence, rnn.pad_packed_sequence):
        return str(name)
    known = any(getattr(module, name, None) is target for module in (torch, F, operator, torch.Tensor))
    return str(name) if known else None


def operation_value(c: Couplings, node: fx.Node) -> Value:
    """Value of an operation; units that go through an unknown one may not be changed."""
    name, inputs = operation_name(node.target), c.arguments(node)
    where = f"the operation {name or getattr(node.target, '__name__', str(node.target))!r} (node {node.name!r})"
    if not any(True for _ in leaves(inputs)):  # of sizes and constants: torch.zeros(...) carries no units
        return c.fixed(c.trace.shapes[node])
    rule = _RULES.get(name or "") or _RULES.get((name or "").rstrip("_"))  # x.add_(y) is as x.add(y)
    value = rule(c, node, where, inputs) if rule is not None else NotImplemented
    if value is NotImplemented:
        c.refuse(inputs, f"they go through {where}, of which it is not known that it keeps units apart")
        return c.fixed(c.trace.shapes[node])
    return value


def _constant(node: fx.Node, place: int, *names: str, default: Any = None) -> Any:
    """An argument as the forward gives it, by its place (the tensor's is 0) or one of its names."""
    if len(node.args) > place:
        return node.args[place]
    return next((node.kwargs[name] for name in names if name in node.kwargs), default)


def _several(node: fx.Node, *names: str) -> list[Any]:
    """Arguments after the tensor that may come one by one or as one sequence: x.view(2, 3), x.view((2, 3))."""
    given: Any = [node.kwargs[name] for name in names if name in node.kwargs]
    rest: list[Any] = list(node.args[1:]) or given
    if len(rest) == 1 and isinstance(rest[0], (tuple, list)):
        rest = list(rest[0])
    return rest


def _each_number(c: Couplings, node: fx.Node, where: str, inputs: Sequence[Value]) -> Value:
    """Place by place, with broadcasting: places that meet become one set."""
    tensors = list(leaves(inputs))
    n_axes = max(len(axes.layouts) for axes in tensors)
    result: list[Layout] = []
    for place in range(-n_axes, 0):
        layouts = [axes.layouts[place] for axes in tensors if len(axes.layouts) >= -place]
        sizes = [c.spaces.size(layout) for layout in layouts]
        full = max(sizes)
        for layout, size in zip(layouts, sizes, strict=True):
            if size != full:
                c.spaces.refuse([layout], f"{where} repeats the only one of them")
        # A plain axis of one place is repeated, whatever the other's length becomes.
        meet = [x for x, size in zip(layouts, sizes, strict=True) if size == full and (size > 1 or x != plain(1))]
        result.append(c.spaces.tie(meet, where) if meet else layouts[0])
    return Axes(tuple(result))


def _reduction(c: Couplings, node: fx.Node, where: str, inputs: Sequence[Value]) -> Value:
    if len(list(leaves(inputs))) > 1:  # torch.max(x, y)
        return _each_number(c, node, where, inputs)
    first = inputs[0]
    if not isinstance(first, Axes):
        return NotImplemented
    place = 2 if operation_name(node.target) in ("norm",) else 1
    dims = _constant(node, place, "dim", "axis")
    if isinstance(dims, fx.Node):
        return NotImplemented
    n = len(first.layouts)
    over = set(range(n)) if dims is None else {d % n for d in ((dims,) if isinstance(dims, int) else dims)}
    keep = bool(node.kwargs.get("keepdim", _constant(node, place + 1, "keepdim", default=False)))
    c.spaces.refuse([first.layouts[d] for d in over], f"{where} goes over them")
    kept = [plain(1) if d in over else layout for d, layout in enumerate(first.layouts) if keep or d not in over]
    shape = c.trace.shapes[node]
    if type(shape) is tuple:  # max over an axis: (values, indices)
        return tuple(Axes(tuple(kept)) for _ in shape)
    return Axes(tuple(kept)) if len(shape) == len(kept) else NotImplemented


def _softmax(c: Couplings, node: fx.Node, where: str, inputs: Sequence[Value]) -> Value:
    dim = _constant(node, 1, "dim")
    over = inputs[0].layouts if not isinstance(dim, int) else [inputs[0].layouts[dim]]
    c.spaces.refuse(over, f"{where} normalises over them")
    return inputs[0]


def _flatten(c: Couplings, node: fx.Node, where: str, inputs: Sequence[Value]) -> Value:
    start, end = _constant(node, 1, "start_dim", default=0), _constant(node, 2, "end_dim", default=-1)
    return flattened(c, inputs[0], start, end, where)


def _reshape(c: Couplings, node: fx.Node, where: str, inputs: Sequence[Value]) -> Value:
    """Neighbouring axes may become one; an axis of units may not be divided, nor its new length be written out."""
    sizes, new = _several(node, "shape", "size"), list(c.trace.shapes[node])
    old = list(inputs[0].layouts)
    if len(sizes) != len(new):
        return NotImplemented
    result: list[Layout] = []
    while len(result) < len(new):
        size, taken = new[len(result)], old[:1]
        del old[:1]
        while old and (_product(c, taken) < size or (_product(c, taken) == size and len(result) == len(new) - 1)):
            taken.append(old.pop(0))
        if not taken:
            taken = [plain(1)]
        if _product(c, taken) != size:
            whole = _product(c, taken)
            if len(taken) > 1 or c.spaces.in_layout(taken[0]) or whole % size:
                if size != 1:
                    return NotImplemented
                old[:0], taken = taken, [plain(1)]  # a new axis of one place
            else:  # an axis without units is divided
                old.insert(0, plain(whole // size))
                taken = [plain(size)]
        layout = c.spaces.merge(taken, where)
        if not _follows(c, sizes[len(result)], layout):
            c.spaces.refuse([layout], f"{where} writes out their number: {size}; with -1 in its place it would follow")
        result.append(layout)
    return Axes(tuple(result)) if not old else NotImplemented


def _product(c: Couplings, layouts: Sequence[Layout]) -> int:
    product = 1
    for layout in layouts:
        product *= c.spaces.size(layout)
    return product


def _follows(c: Couplings, size: Any, layout: Layout) -> bool:
    """Whether a size given to a reshape changes with the units: -1, or computed from the shape of such a tensor."""
    carried = c.spaces.in_layout(layout)
    if not carried or size == -1:
        return True
    read: set[int] = set()
    pending = [size] if isinstance(size, fx.Node) else []
    while pending:
        node = pending.pop()
        value = c.values[node]
        if value is None:
            pending += node.all_input_nodes
        for axes in leaves([value]):
            read |= {space for part in axes.layouts for space in c.spaces.in_layout(part)}
    return carried <= read


def _squeeze(c: Couplings, node: fx.Node, where: str, inputs: Sequence[Value]) -> Value:
    dims, layouts = _several(node, "dim"), inputs[0].layouts
    n = len(layouts)
    if not all(isinstance(dim, int) for dim in dims):
        return NotImplemented
    gone = {d % n for d in dims} if dims else set(range(n))
    gone = {d for d in gone if c.spaces.size(layouts[d]) == 1}
    c.spaces.refuse([layouts[d] for d in gone], f"{where} drops the axis, as long as it is one long")
    return Axes(tuple(layout for d, layout in enumerate(layouts) if d not in gone))


def _unsqueeze(c: Couplings, node: fx.Node, where: str, inputs: Sequence[Value]) -> Value:
    layouts = list(inputs[0].layouts)
    layouts.insert(_constant(node, 1, "dim") % (len(layouts) + 1), plain(1))
    return Axes(tuple(layouts))


def _permute(c: Couplings, node: fx.Node, where: str, inputs: Sequence[Value]) -> Value:
    return Axes(tuple(inputs[0].layouts[d] for d in _several(node, "dims")))


def _transpose(c: Couplings, node: fx.Node, where: str, inputs: Sequence[Value]) -> Value:
    layouts = list(inputs[0].layouts)
    name = operation_name(node.target)
    one = 0 if name == "t" else _constant(node, 1, "dim0", "axis0")
    two = 1 if name == "t" else _constant(node, 2, "dim1", "axis1")
    layouts[one], layouts[two] = layouts[two], layouts[one]
    return Axes(tuple(layouts))


def _cat(c: Couplings, node: fx.Node, where: str, inputs: Sequence[Value]) -> Value:
    tensors = list(leaves([inputs[0]]))
    dim = _constant(node, 1, "dim", "axis", default=0) % len(tensors[0].layouts)
    result = []
    for place, layouts in enumerate(zip(*(axes.layouts for axes in tensors), strict=True)):
        joined = tuple(segment for layout in layouts for segment in layout)
        result.append(joined if place == dim else c.spaces.tie(layouts, where))
    return Axes(tuple(result))


def _stack(c: Couplings, node: fx.Node, where: str, inputs: Sequence[Value]) -> Value:
    tensors = list(leaves([inputs[0]]))
    result = [c.spaces.tie(layouts, where) for layouts in zip(*(axes.layouts for axes in tensors), strict=True)]
    result.insert(_constant(node, 1, "dim", default=0) % (len(result) + 1), plain(len(tensors)))
    return Axes(tuple(result))


def _parts(c: Couplings, node: fx.Node, where: str, inputs: Sequence[Value]) -> Value:
    """chunk, split, unbind: parts along an axis, which may not carry units."""
    is_unbind = operation_name(node.target) == "unbind"
    dim = _constant(node, 1 if is_unbind else 2, "dim", default=0)
    layouts = list(inputs[0].layouts)
    dim %= len(layouts)
    c.spaces.refuse([layouts[dim]], f"{where} divides them into parts")
    parts = []
    for shape in c.trace.shapes[node]:
        middle = [] if is_unbind else [plain(shape[dim])]
        parts.append(Axes((*layouts[:dim], *middle, *layouts[dim + 1 :])))
    return tuple(parts)


def _getitem(c: Couplings, node: fx.Node, where: str, inputs: Sequence[Value]) -> Value:
    index: Any = node.args[1]
    if isinstance(inputs[0], tuple):
        return inputs[0][index] if isinstance(index, (int, slice)) else NotImplemented
    if inputs[0] is None:
        return NotImplemented
    indices = list(index) if isinstance(index, tuple) else [index]
    if not all(part is None or part is Ellipsis or isinstance(part, (int, slice, fx.Node)) for part in indices):
        return NotImplemented
    if any(isinstance(part, fx.Node) and c.values[part] is not None for part in indices):
        return NotImplemented  # indexed by a tensor
    layouts = list(inputs[0].layouts)
    missing = len(layouts) - sum(part is not None and part is not Ellipsis for part in indices)
    at = indices.index(Ellipsis) if Ellipsis in indices else len(indices)
    indices[at : at + 1] = [slice(None)] * missing
    result: list[Layout] = []
    shape = list(c.trace.shapes[node])
    for part in indices:
        if part is None:
            result.append(plain(1))
            continue
        layout = layouts.pop(0)
        if part == slice(None):
            result.append(layout)
            continue
        c.spaces.refuse([layout], f"{where} takes some of them by their place")
        if isinstance(part, slice):
            result.append(plain(shape[len(result)]))
    return Axes(tuple(result))


def _getattr(c: Couplings, node: fx.Node, where: str, inputs: Sequence[Value]) -> Value:
    name, value = node.args[1], inputs[0]
    if not isinstance(value, Axes):
        return NotImplemented
    if name in ("T", "mT") and len(value.layouts) >= 2 and (name == "mT" or len(value.layouts) == 2):
        return Axes((*value.layouts[:-2], value.layouts[-1], value.layouts[-2]))
    if name == "data":
        return value
    return None if name in ("shape", "device", "dtype", "ndim", "is_cuda", "requires_grad") else NotImplemented


def _matmul(c: Couplings, node: fx.Node, where: str, inputs: Sequence[Value]) -> Value:
    tensors = list(leaves(inputs))
    if len(tensors) != 2 or min(len(axes.layouts) for axes in tensors) < 2:
        return NotImplemented
    one, two = (axes.layouts for axes in tensors)
    c.spaces.refuse([one[-1], two[-2]], f"{where} sums over them")
    c.spaces.refuse([*one[:-2], *two[:-2]], f"{where} has them as its batch")
    batch = c.fixed(c.trace.shapes[node][:-2]).layouts
    return Axes((*batch, one[-2], two[-1]))


def _pool(c: Couplings, node: fx.Node, where: str, inputs: Sequence[Value]) -> Value:
    n_axes = int((operation_name(node.target) or "")[-2])
    axes, shape = inputs[0], c.trace.shapes[node]
    if type(shape) is tuple:
        return NotImplemented
    c.spaces.refuse(axes.layouts[-n_axes:], f"{where} goes over them")
    return Axes((*axes.layouts[:-n_axes], *c.fixed(shape[-n_axes:]).layouts))


def _resize(c: Couplings, node: fx.Node, where: str, inputs: Sequence[Value]) -> Value:
    """Resizing and padding: the axes behind the channels get another length."""
    axes, shape = inputs[0], c.trace.shapes[node]
    changed = [size != c.spaces.size(layout) for size, layout in zip(shape, axes.layouts, strict=True)]
    c.spaces.refuse([x for x, is_new in zip(axes.layouts, changed, strict=True) if is_new], f"{where} resizes it")
    return Axes(tuple(plain(n) if new else x for n, new, x in zip(shape, changed, axes.layouts, strict=True)))


def _none(c: Couplings, node: fx.Node, where: str, inputs: Sequence[Value]) -> Value:
    return c.fixed(c.trace.shapes[node])


def _packed(c: Couplings, node: fx.Node, where: str, inputs: Sequence[Value]) -> Value:
    """A packed sequence is seen as the padded tensor that it was."""
    if operation_name(node.target) == "pad_packed_sequence":
        return (inputs[0], None)
    c.spaces.refuse(inputs[0].layouts[:2], f"{where} packs them as time or batch")
    return inputs[0]


_Rule = Callable[["Couplings", fx.Node, str, Sequence[Any]], Any]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(_EACH_NUMBER, _each_number),
    **dict.fromkeys(_NO_VALUES, _none),
    **dict.fromkeys(_REDUCTIONS, _reduction),
    **dict.fromkeys(("softmax", "log_softmax"), _softmax),
    **dict.fromkeys(("view", "reshape"), _reshape),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims", "t"), _transpose),
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    **dict.fromkeys(("chunk", "split", "unbind"), _parts),
    **dict.fromkeys(("matmul", "bmm"), _matmul),
    **{f"{kind}_pool{k}d": _pool for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for k in (1, 2, 3)},
    **dict.fromkeys(("interpolate", "pad"), _resize),
    **dict.fromkeys(("pack_padded_sequence", "pad_packed_sequence"), _packed),
    "flatten": _flatten,
    "squeeze": _squeeze,
    "unsqueeze": _unsqueeze,
    "permute": _permute,
    "stack": _stack,
    "getitem": _getitem,
    "getattr": _getattr,
}
