"""Module rules: what becomes of units in torch's modules, and where the modules keep parameters for each unit.

Called by `couplings`. Only the very classes named here are known; a subclass may compute something else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from trimtab.surgery.layout import Axes, Layout, plain

if TYPE_CHECKING:
    from trimtab.surgery.couplings import Couplings, Value

__all__ = ["CONVOLUTIONS", "KNOWN", "RECURRENT", "has_batch_norm_rule", "module_value"]

CONVOLUTIONS: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}  # axes of space
RECURRENT: dict[type[nn.Module], int] = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}  # gates
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_EACH_NUMBER = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh,
    nn.Sigmoid, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardshrink, nn.Softplus, nn.Softshrink, nn.Softsign,
    nn.Tanhshrink, nn.LogSigmoid, nn.Threshold, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip
_POOLS: dict[type[nn.Module], int] = {
    **{getattr(nn, f"{kind}Pool{k}d"): k for kind in ("Max", "Avg", "AdaptiveMax", "AdaptiveAvg") for k in (1, 2, 3)},
    nn.LPPool1d: 1, nn.LPPool2d: 2, nn.LPPool3d: 3, nn.ZeroPad1d: 1, nn.ZeroPad2d: 2, nn.ZeroPad3d: 3,
    nn.ReflectionPad1d: 1, nn.ReflectionPad2d: 2, nn.ReplicationPad1d: 1, nn.ReplicationPad2d: 2,
}  # fmt: skip


def module_value(c: Couplings, node: fx.Node) -> Value:
    """Value of a module's call; units that go through an unknown module may not be changed."""
    module, inputs = c.trace.module(node), c.arguments(node)
    where = f"module {str(node.target)!r} ({type(module).__name__})"
    rule = _RULES.get(type(module))
    if rule is not None and inputs and isinstance(inputs[0], Axes):
        return rule(c, node, where, inputs)
    c.refuse(inputs, f"they go through {where}, of which it is not known that it keeps units apart")
    return c.fixed(c.trace.shapes[node])


def has_batch_norm_rule(module: nn.Module) -> bool:
    """Whether a module is a batch norm that the rules know."""
    return type(module) in _BATCH_NORMS


def _linear(c: Couplings, node: fx.Node, where: str, inputs: Sequence[Value]) -> Value:
    module: Any = c.trace.module(node)
    name, (*others, features) = str(node.target), inputs[0].layouts
    units = c.spaces.new(module.out_features, name)
    c.add(name, module, ("weight", 1, features, "reads"), ("in_features", None, features, "size"))
    c.add(name, module, ("weight", 0, units, "makes"), ("bias", 0, units, "makes"))
    c.add(name, module, ("out_features", None, units, "size"))
    return Axes((*others, units))


def _convolution(c: Couplings, node: fx.Node, where: str, inputs: Sequence[Value]) -> Value:
    module: Any = c.trace.module(node)
    name, n_axes = str(node.target), CONVOLUTIONS[type(module)]
    *batch, channels = inputs[0].layouts[:-n_axes]
    space = inputs[0].layouts[-n_axes:]
    c.spaces.refuse(space, f"{where} slides over them")
    sizes = c.trace.shapes[node][-n_axes:]
    depthwise = module.groups == module.in_channels == module.out_channels > 1
    if depthwise:
        units = channels
        c.add(name, module, ("weight", 0, units, "rides"), ("bias", 0, units, "rides"), ("groups", None, units, "size"))
    else:
        units = c.spaces.new(module.out_channels, name)
        c.add(name, module, ("weight", 1, channels, "reads"))
        c.add(name, module, ("weight", 0, units, "makes"), ("bias", 0, units, "makes"))
    c.add(name, module, ("in_channels", None, channels, "size"), ("out_channels", None, units, "size"))
    if module.groups > 1 and not depthwise:
        reason = f"{where} has {module.groups} groups of channels, whose borders would move"
        c.spaces.refuse([channels, units], reason)
    return Axes((*batch, units, *c.fixed(sizes).layouts))


def _batch_norm(c: Couplings, node: fx.Node, where: str, inputs: Sequence[Value]) -> Value:
    module: Any = c.trace.module(node)
    name, axes = str(node.target), inputs[0]
    place = 1
    if type(module) in _INSTANCE_NORMS:  # (C, ...) without a batch is allowed there
        place = len(axes.layouts) - int(type(module).__name__[-2]) - 1
    units = axes.layouts[place]
    c.spaces.refuse((*axes.layouts[:place], *axes.layouts[place + 1 :]), f"{where} averages over them")
    c.add(name, module, ("weight", 0, units, "rides"), ("bias", 0, units, "rides"))
    c.add(name, module, ("running_mean", 0, units, "holds"), ("running_var", 0, units, "holds"))
    c.add(name, module, ("num_features", None, units, "size"))
    return axes


def _layer_norm(c: Couplings, node: fx.Node, where: str, inputs: Sequence[Value]) -> Value:
    """Mean and variance of the features stay as they are only if every unit is copied equally often."""
    module: Any = c.trace.module(node)
    name, axes = str(node.target), inputs[0]
    n_axes = len(module.normalized_shape)
    normed = axes.layouts[-n_axes:]
    for index, layout in enumerate(normed):
        c.add(name, module, ("weight", index, layout, "rides"), ("normalized_shape", index, layout, "size"))
        if getattr(module, "bias", None) is not None:
            c.add(name, module, ("bias", index, layout, "rides"))
    _only_whole_multiples(c, normed, where)
    return axes


def _group_norm(c: Couplings, node: fx.Node, where: str, inputs: Sequence[Value]) -> Value:
    module: Any = c.trace.module(node)
    name, axes = str(node.target), inputs[0]
    units = axes.layouts[1]
    c.add(name, module, ("weight", 0, units, "rides"), ("bias", 0, units, "rides"))
    c.add(name, module, ("num_channels", None, units, "size"))
    if module.num_groups == 1:
        _only_whole_multiples(c, axes.layouts[1:], where)
    elif module.num_groups == module.num_channels:
        c.add(name, module, ("num_groups", None, units, "size"))
        c.spaces.refuse(axes.layouts[2:], f"{where} averages over them")
    else:
        c.spaces.refuse(axes.layouts[1:], f"{where} has {module.num_groups} groups of channels, whose borders move")
    return axes


def _only_whole_multiples(c: Couplings, normed: Sequence[Layout], where: str) -> None:
    """Units that are normalised together: one set may grow to a whole multiple, several may not be changed."""
    found = {space for layout in normed for space in c.spaces.in_layout(layout)}
    pure = all(segment.space is not None for layout in normed if c.spaces.in_layout(layout) for segment in layout)
    if len(found) == 1 and pure and sum(bool(c.spaces.in_layout(layout)) for layout in normed) == 1:
        known = c.spaces[found.pop()]
        known.whole_multiples = known.whole_multiples or (
            f"{where} normalises over them: its mean and variance stay as they are only if each is copied equally often"
        )
    else:
        c.spaces.refuse(normed, f"{where} normalises over them together with others, so that its statistics would move")


def _embedding(c: Couplings, node: fx.Node, where: str, inputs: Sequence[Value]) -> Value:
    module: Any = c.trace.module(node)
    name = str(node.target)
    units = c.spaces.new(module.embedding_dim, name)
    c.add(name, module, ("weight", 1, units, "makes"), ("embedding_dim", None, units, "size"))
    c.refuse(inputs, f"{where} takes them as indices")
    if module.max_norm is not None or module.sparse:
        c.spaces.refuse([units], f"{where} has {'sparse gradients' if module.sparse else 'a largest norm of its rows'}")
    return Axes((*inputs[0].layouts, units))


def _recurrent(c: Couplings, node: fx.Node, where: str, inputs: Sequence[Value]) -> Value:
    """All layers and directions have one hidden size: unit i of each is one unit, changed in all of them at once."""
    module: Any = c.trace.module(node)
    name, (*others, features) = str(node.target), inputs[0].layouts
    directions, gates = 1 + module.bidirectional, RECURRENT[type(module)]
    units = c.spaces.new(module.hidden_size, name)
    for layer in range(module.num_layers):
        read = features if layer == 0 else units * directions
        for suffix in ("", "_reverse")[:directions]:
            end = f"l{layer}{suffix}"
            c.add(name, module, (f"weight_ih_{end}", 0, units * gates, "makes"), (f"weight_ih_{end}", 1, read, "reads"))
            c.add(
                name, module, (f"weight_hh_{end}", 0, units * gates, "makes"), (f"weight_hh_{end}", 1, units, "reads")
            )
            if module.bias:
                biases = (f"bias_ih_{end}", f"bias_hh_{end}")
                c.add(name, module, *((bias, 0, units * gates, "makes") for bias in biases))
    c.add(name, module, ("input_size", None, features, "size"), ("hidden_size", None, units, "size"))
    if getattr(module, "proj_size", 0):
        c.spaces.refuse([features, units], f"{where} projects its states to {module.proj_size}")
        return c.fixed(c.trace.shapes[node])
    if any(value is not None for value in inputs[1:]):
        c.refuse(inputs[1:], f"they are the first state of {where}")
        c.spaces.refuse([units], f"the forward gives {where} its first state, of fixed size")
    batch = [] if len(others) < 2 else others[:1] if module.batch_first else others[1:]
    state = Axes((plain(module.num_layers * directions), *batch, units))
    output = Axes((*others, units * directions))
    return (output, (state, state)) if type(module) is nn.LSTM else (output, state)


def _each_number(c: Couplings, node: fx.Node, where: str, inputs: Sequence[Value]) -> Value:
    return inputs[0]


def _prelu(c: Couplings, node: fx.Node, where: str, inputs: Sequence[Value]) -> Value:
    module: Any = c.trace.module(node)
    if module.num_parameters > 1:
        units = inputs[0].layouts[1]
        c.add(str(node.target), module, ("weight", 0, units, "rides"), ("num_parameters", None, units, "size"))
    return inputs[0]


def _pool(c: Couplings, node: fx.Node, where: str, inputs: Sequence[Value]) -> Value:
    n_axes = _POOLS[type(c.trace.module(node))]
    c.spaces.refuse(inputs[0].layouts[-n_axes:], f"{where} goes over them")
    return _with_last_axes(c, inputs[0], n_axes, c.trace.shapes[node])


def _with_last_axes(c: Couplings, axes: Axes, n_axes: int, shape: Any) -> Value:
    """The value whose last axes have new sizes; (values, indices) where a pooling returns both."""
    if type(shape) is tuple:
        return tuple(_with_last_axes(c, axes, n_axes, part) for part in shape)
    return Axes((*axes.layouts[:-n_axes], *c.fixed(shape[-n_axes:]).layouts))


def _flatten(c: Couplings, node: fx.Node, where: str, inputs: Sequence[Value]) -> Value:
    module: Any = c.trace.module(node)
    return flattened(c, inputs[0], module.start_dim, module.end_dim, where)


def flattened(c: Couplings, axes: Axes, start: int, end: int, where: str) -> Axes:
    """The value with the axes from `start` to `end`, both included, as one."""
    n = len(axes.layouts)
    start, end = start % n, end % n
    merged = c.spaces.merge(axes.layouts[start : end + 1], where)
    return Axes((*axes.layouts[:start], merged, *axes.layouts[end + 1 :]))


def _softmax(c: Couplings, node: fx.Node, where: str, inputs: Sequence[Value]) -> Value:
    module: Any = c.trace.module(node)
    axes = inputs[0]
    over = axes.layouts if module.dim is None else [axes.layouts[module.dim]]
    c.spaces.refuse(over, f"{where} normalises over them")
    return axes


_Rule = Callable[["Couplings", fx.Node, str, Sequence[Any]], Any]
_RULES: dict[type[nn.Module], _Rule] = {
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    nn.PReLU: _prelu,
    nn.Flatten: _flatten,
    nn.Softmax: _softmax,
    nn.LogSoftmax: _softmax,
    nn.GroupNorm: _group_norm,
    **dict.fromkeys((nn.LayerNorm, nn.RMSNorm), _layer_norm),
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    **dict.fromkeys(RECURRENT, _recurrent),
    **dict.fromkeys((*_BATCH_NORMS, *_INSTANCE_NORMS), _batch_norm),
    **dict.fromkeys(_EACH_NUMBER, _each_number),
    **dict.fromkeys(_POOLS, _pool),
}
KNOWN = frozenset(_RULES)  # classes of modules that there is a rule for
