"""Trace: the operations of a forward pass as a graph, with the shape of every value.

Called by `couplings` and `layers`. torch.fx runs the forward with stand-ins for tensors, torch's own modules being
leaves; the graph is then run once on the example inputs, in evaluation and without gradients, for the shapes.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import rnn

from trimtab.errors import InputError

__all__ = ["Trace", "evaluating", "trace"]


@dataclass(frozen=True)
class Trace:
    """A forward pass.

    Attributes:
        graph: Operations in the order in which they run.
        shapes: Of what each operation returns: a torch.Size for a tensor, nested tuples of them, None for the rest.
        modules: The network's modules by name; a module that has two names stands under both.
        calls: How often each leaf module is called.
    """

    graph: fx.Graph
    shapes: dict[fx.Node, Any]
    modules: dict[str, nn.Module]
    calls: Counter[nn.Module]

    def module(self, node: fx.Node) -> nn.Module:
        """The module that a node calls."""
        return self.modules[str(node.target)]

    def node(self, module: nn.Module) -> fx.Node | None:
        """The first call of a module; None where the forward does not call it."""
        return next((n for n in self.graph.nodes if n.op == "call_module" and self.module(n) is module), None)


def trace(model: nn.Module, inputs: tuple[Any, ...]) -> Trace:
    """Trace the forward of a network.

    Args:
        model: Left as it was, modes included.
        inputs: Positional arguments of its forward.

    Raises:
        InputError: The forward cannot be traced, fails on the inputs, or does other things in training than in
            evaluation.
    """
    name = type(model).__name__
    try:
        left_out = _defaults(model, len(inputs))
        graphs = [_graph(model, training, left_out) for training in (True, False)]
    except Exception as error:  # fx raises whatever the forward makes of its stand-ins
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{name} cannot be traced by torch.fx: {reason}; units and layers can be changed only where the forward "
            "is a fixed sequence of operations, without branches or loops that depend on the data"
        ) from error
    steps = [[(node.op, str(node.target)) for node in graph.nodes] for graph in graphs]
    if steps[0] != steps[1]:
        raise InputError(
            f"{name} runs other operations in training than in evaluation; units and layers can be changed only where "
            "both are the same"
        )
    graph = graphs[1]
    runner = _Shapes(model, garbage_collect_values=True, graph=graph)
    try:
        with evaluating(model), torch.no_grad():
            runner.run(*inputs)
    except Exception as error:  # whatever the user's forward raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{name} fails on the example inputs: {type(error).__name__}: {reason}; give a batch as its forward "
            "takes it, on its device"
        ) from error
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = Counter(modules[str(node.target)] for node in graph.nodes if node.op == "call_module")
    return Trace(graph, runner.shapes, modules, calls)


@contextmanager
def evaluating(model: nn.Module, training: bool = False) -> Iterator[None]:
    """Put the network into evaluation, or into training, and every module back into its own mode at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


_BY_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_SEQUENCES = ("pack_padded_sequence", "pad_packed_sequence")  # plain Python that looks into its tensors


def _defaults(model: nn.Module, n_inputs: int) -> dict[str, None]:
    """Arguments of the forward that are None unless they are given, and are not: a forward may ask whether they are."""
    accepted = list(inspect.signature(model.forward).parameters.values())
    if any(argument.kind not in _BY_PLACE for argument in accepted):
        return {}  # of which fx takes no values
    return {argument.name: None for argument in accepted[n_inputs:] if argument.default is None}


def _graph(model: nn.Module, training: bool, left_out: dict[str, None]) -> fx.Graph:
    """Trace; functions that look into their tensors become one operation, however the forward gets at them."""
    originals = {name: getattr(rnn, name) for name in _SEQUENCES}
    with evaluating(model, training):
        try:
            for name, function in originals.items():  # called as torch.nn.utils.rnn.name
                setattr(rnn, name, _as_one_operation(function))
            return fx.Tracer(autowrap_functions=tuple(originals.values())).trace(model, left_out)  # imported by name
        finally:
            for name, function in originals.items():
                setattr(rnn, name, function)


def _as_one_operation(function: Callable[..., Any]) -> Callable[..., Any]:
    def traced(*args: Any, **kwargs: Any) -> Any:
        stand_in = next((a for a in (*args, *kwargs.values()) if isinstance(a, fx.Proxy)), None)
        if stand_in is None:
            return function(*args, **kwargs)
        return stand_in.tracer.create_proxy("call_function", function, args, kwargs)

    return traced


class _Shapes(fx.Interpreter):
    """Runs a graph and notes the shapes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shapes: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.shapes[n] = _shape(value)
        return value


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape
    if isinstance(value, (tuple, list)) and not isinstance(value, (torch.Size, rnn.PackedSequence)):
        return tuple(_shape(part) for part in value)
    return None
