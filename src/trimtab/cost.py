"""cost: what a network costs: FLOPs of a forward pass and of a training step, parameters, bytes.

Called by `trimtab.surgery`, which puts the cost before and after a change in its record, and by whatever keeps a budget
in FLOPs. Counted by torch's `FlopCounterMode` on one real forward and backward pass, because shapes may depend on the
data (packed sequences). Two FLOPs are one multiplication and one addition; only matrix products, convolutions and
attention are counted, and nothing for what is done element by element (activations, normalisation, optimizer).

Where torch's counter alone is wrong (measured with torch 2.13):

- LSTM layers that run as one kernel (float32 on CPU, all on CUDA) count 0. Their formula is given here: forward
  2 x tokens x entries of weight_ih and weight_hh, backward twice that. An LSTM that torch takes apart (float64 on CPU,
  packed sequences on CPU) is counted product by product, so that its backward is smaller by the gradients that nobody
  needs: those of the first hidden state, and of an input without gradient.
- Attention in one kernel on CPU counts 0; the formula that torch has for the kernels of CUDA is used.
- `nn.TransformerEncoder` counts 0 in evaluation without gradients, where it runs as one kernel. Here gradients are on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from trimtab.errors import InputError

__all__ = ["Cost", "as_inputs", "count_by_module", "count_cost", "size_of"]


@dataclass(frozen=True)
class Cost:
    """What a network costs for one batch of example inputs.

    Attributes:
        forward_flops: Of one forward pass; two a multiply-add.
        step_flops: Of one forward and one backward pass to all parameters that need a gradient.
        parameters: Numbers in all parameters, shared ones once.
        bytes: Of all parameters and buffers, shared ones once.
    """

    forward_flops: int
    step_flops: int
    parameters: int
    bytes: int


def as_inputs(example_inputs: object) -> tuple[Any, ...]:
    """Example inputs as the positional arguments of a forward pass.

    Args:
        example_inputs: One tensor, or a tuple or list of positional arguments.

    Raises:
        InputError: It is none of them, or empty.
    """
    if isinstance(example_inputs, Tensor):
        return (example_inputs,)
    if isinstance(example_inputs, (tuple, list)) and example_inputs:
        return tuple(example_inputs)
    raise InputError(
        f"example_inputs is {type(example_inputs).__name__}; give a tensor, or a tuple of the forward's positional "
        "arguments, as they come out of your loader"
    )


def size_of(model: nn.Module) -> tuple[int, int]:
    """Parameters of a network, and bytes of its parameters and buffers, shared ones once."""
    parameters = list(model.parameters())
    tensors = [*parameters, *model.buffers()]
    return sum(p.numel() for p in parameters), sum(t.numel() * t.element_size() for t in tensors)


def count_cost(model: nn.Module, example_inputs: object) -> Cost:
    """Count one forward and one backward pass of the network, which is left as it was.

    The pass is run in training mode (some kernels have no backward in evaluation); buffers are put back, no `.grad` is
    touched and torch's generators are where they were. Hooks on modules are called.

    Args:
        model: Anywhere; its device is used.
        example_inputs: A tensor, or a tuple of the forward's positional arguments; a batch of the size to be counted.

    Raises:
        InputError: The network fails on the inputs.
    """
    inputs = as_inputs(example_inputs)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with _left_as_it_was(model), torch.enable_grad(), _counter() as mode:
        outputs = _run(model, inputs)
        forward = mode.get_total_flops()
        leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if leaves and parameters:
            torch.autograd.grad([leaf.sum() for leaf in leaves], parameters, allow_unused=True)
        step = mode.get_total_flops()
    return Cost(forward, step, *size_of(model))


def count_by_module(model: nn.Module, example_inputs: object) -> dict[str, int]:
    """FLOPs of one forward pass by dotted module name, what modules hold included; the whole network's under "".

    Counted as in `count_cost`, which see for arguments and errors.
    """
    with _left_as_it_was(model), torch.enable_grad(), _counter() as mode:
        _run(model, as_inputs(example_inputs))
        counts = {name: sum(of_operation.values()) for name, of_operation in mode.get_flop_counts().items()}
    root = type(model).__name__
    found = {name.removeprefix(f"{root}."): n for name, n in counts.items() if name.startswith(f"{root}.")}
    return found | {"": counts.get("Global", 0)}


def _counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=_FORMULAS)


def _run(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()  # of a batch of one there is nothing to average, and it counts nothing
    try:
        return model(*inputs)
    except Exception as error:  # whatever the user's forward raises
        raise InputError(
            f"{type(model).__name__} fails on the example inputs: {type(error).__name__}: {error}; give inputs "
            "that the network takes in training, on its device"
        ) from error


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Put modes, buffers and random generators back at the end."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            with torch.no_grad():
                for buffer, saved in buffers:
                    buffer.copy_(saved)


def _tokens(input_shape: Sequence[int]) -> int:
    """Places of a sequence batch, (L, B, features) or packed (tokens, features)."""
    return math.prod(input_shape[:-1])


def _mkldnn_forward(input_shape: Any, weight_ih: Any, weight_hh: Any, *_: Any, **__: Any) -> int:
    return 2 * _tokens(input_shape) * int(math.prod(weight_ih) + math.prod(weight_hh))


def _mkldnn_backward(input_shape: Any, weight_ih: Any, weight_hh: Any, *_: Any, **__: Any) -> int:
    return 2 * _mkldnn_forward(input_shape, weight_ih, weight_hh)


def _cudnn_forward(input_shape: Any, weights: Any, *_: Any, **__: Any) -> int:
    """Biases are the vectors among the weights."""
    return 2 * _tokens(input_shape) * sum(int(math.prod(weight)) for weight in weights if len(weight) == 2)


def _cudnn_backward(input_shape: Any, weights: Any, *_: Any, **__: Any) -> int:
    return 2 * _cudnn_forward(input_shape, weights)


def _attention_forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward(grad_out: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad_out, query, key, value))  # type: ignore[no-untyped-call]


_FORMULAS: dict[Any, Any] = {
    torch.ops.aten.mkldnn_rnn_layer: _mkldnn_forward,
    torch.ops.aten.mkldnn_rnn_layer_backward: _mkldnn_backward,
    torch.ops.aten._cudnn_rnn: _cudnn_forward,
    torch.ops.aten._cudnn_rnn_backward: _cudnn_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
