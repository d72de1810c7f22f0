"""Stacked networks: R small networks whose parameters lie in one tensor (R, P), run through by batched products.

Called by `trimtab.training.batched`, and has a form of its own for MLPs and CNNs; other networks are copies of a module
(`trimtab.training.functional`). Activations have the batch last, (R, features, B): reductions over classes and
products of small matrices then run along contiguous memory, which is three times as fast as the batch in the middle
(benchmarks/env_speed.py has the whole). Narrower networks are padded with zeros: a padded unit puts out
activation(0) = 0 and gets a gradient of 0, so it stays 0 under every optimizer here and needs no mask.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.errors import InputError
from trimtab.seeding import torch_generator
from trimtab.tasks.small import ModuleNetwork, Network
from trimtab.training.functional import StackedModules

__all__ = ["StackedCNN", "StackedMLP", "segments", "split_rows", "stack"]

_Key = TypeVar("_Key", bound=Hashable)
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "tanh": torch.tanh, "gelu": F.gelu}
_KERNEL = 9  # numbers in a 3 x 3 kernel


def segments(keys: Sequence[_Key]) -> list[tuple[_Key, slice]]:
    """Stretches of equal keys: one batched operation each instead of one a run."""
    out, start = [], 0
    for key, group in itertools.groupby(keys):
        end = start + len(list(group))
        out.append((key, slice(start, end)))
        start = end
    return out


def split_rows(x: Tensor, stretches: Sequence[tuple[Any, slice]]) -> Sequence[Tensor]:
    """The rows of each stretch; to differentiate slices one by one would fill a tensor of the whole for each."""
    parts: Sequence[Tensor] = torch.split(x, [where.stop - where.start for _, where in stretches])
    return parts


@dataclass(frozen=True)
class _Layer:
    """Where one layer lies in a row of parameters, and how much of it each run uses.

    Attributes:
        start: First number of its weights.
        n_in: Padded inputs (channels of a convolution).
        n_out: Padded outputs.
        kernel: Numbers per pair of channels: 9 for a convolution, 1 for a dense layer.
        used: (inputs, outputs) of each run; (0, 0) where the run has no such layer.
    """

    start: int
    n_in: int
    n_out: int
    kernel: int
    used: tuple[tuple[int, int], ...]

    @property
    def n_weights(self) -> int:
        return self.n_in * self.n_out * self.kernel

    @property
    def end(self) -> int:
        return self.start + self.n_weights + self.n_out

    @property
    def weights(self) -> slice:
        return slice(self.start, self.start + self.n_weights)

    def views(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (R, out, in x kernel) and biases (R, out, 1) on the memory of (R, P)."""
        weights = flat[:, self.weights].view(-1, self.n_out, self.n_in * self.kernel)
        return weights, flat[:, self.weights.stop : self.end].view(-1, self.n_out, 1)

    def of_run(self, run: int, row: Tensor) -> tuple[Tensor, Tensor]:
        """A run's own weights (out, in) or (out, in, 3, 3), and biases (out,); views on its row (P,)."""
        n_in, n_out = self.used[run]
        weights = row[self.weights].view(self.n_out, self.n_in, self.kernel)[:n_out, :n_in]
        biases = row[self.weights.stop : self.end][:n_out]
        if self.kernel == 1:
            return weights[:, :, 0], biases
        return weights.view(n_out, n_in, 3, 3), biases


class _Stacked:
    """What both kinds share: the places of parameters, and their first values."""

    def __init__(self, layers: list[_Layer], networks: Sequence[Network], device: torch.device) -> None:
        self.layers = layers
        self.n_parameters = layers[-1].end
        self._activations = segments([network.activation for network in networks])
        self._device = device

    def views(self, flat: Tensor) -> list[Tensor]:
        """Weights and biases of every layer, on the memory of (R, P)."""
        return [view for layer in self.layers for view in layer.views(flat)]

    def parameters_of(self, run: int, flat: Tensor) -> list[Tensor]:
        """A run's parameters in the shapes and order of the same network as `torch.nn` modules; views on (R, P)."""
        return [tensor for layer in self.layers if layer.used[run][1] for tensor in layer.of_run(run, flat[run])]

    def draw(self, seeds: Sequence[int], dtype: torch.dtype) -> Tensor:
        """First weights (R, P), as torch's modules draw them from the stream "weights" of each seed.

        Source: the default of `torch.nn.Linear` and `Conv2d`, uniform in +-1 / sqrt(fan-in), He et al. 2015 with
        a = sqrt(5).
        """
        flat = torch.zeros(len(seeds), self.n_parameters)
        for run, seed in enumerate(seeds):
            generator = torch_generator(seed, "weights")
            for layer in self.layers:
                n_in, n_out = layer.used[run]
                if n_out:
                    fan_in = n_in * layer.kernel
                    for tensor in layer.of_run(run, flat[run]):
                        is_matrix = tensor.dim() > 1
                        bound = (
                            math.sqrt(3.0) * (math.sqrt(2.0 / 6.0) / math.sqrt(fan_in))
                            if is_matrix
                            else 1 / math.sqrt(fan_in)
                        )
                        tensor.copy_(torch.empty(tensor.shape).uniform_(-bound, bound, generator=generator))
        return flat.to(self._device, dtype)

    def _activate(self, x: Tensor) -> Tensor:
        return self._by_activation(x, lambda name, part: _ACTIVATIONS[name](part))

    def _by_activation(self, x: Tensor, function: Callable[[str, Tensor], Tensor]) -> Tensor:
        """A function of (activation's name, the runs that have it), run by run in their order."""
        if len(self._activations) == 1:
            return function(self._activations[0][0], x)
        parts = split_rows(x, self._activations)
        return torch.cat([function(name, part) for (name, _), part in zip(self._activations, parts, strict=True)])


class StackedMLP(_Stacked):
    """R fully connected networks; none of their hidden layers, or one to several of any widths and numbers.

    Args:
        networks: One a run.
        n_inputs: Features of each run.
        n_outputs: Logits, or 1, of each run.
        device: Where they lie.

    Raises:
        InputError: Linear models and such with hidden layers are mixed.
    """

    def __init__(
        self, networks: Sequence[Network], n_inputs: Sequence[int], n_outputs: Sequence[int], device: torch.device
    ) -> None:
        depths = [len(network.hidden) for network in networks]
        if min(depths) == 0 < max(depths):
            raise InputError("linear models and networks with hidden layers cannot be stacked; make two batches")
        depth, width = max(depths), max((max(network.hidden, default=0) for network in networks), default=0)
        layers: list[_Layer] = []
        start = 0
        for index in range(depth + 1):
            is_last = index == depth
            used = tuple(
                _used(network.hidden, n_in, n_out, index, is_last=is_last)
                for network, n_in, n_out in zip(networks, n_inputs, n_outputs, strict=True)
            )
            n_in = max(n_inputs) if index == 0 else width
            layers.append(_Layer(start, n_in, max(n_outputs) if is_last else width, 1, used))
            start = layers[-1].end
        super().__init__(layers, networks, device)
        # Of each hidden layer the stretches of runs with one activation, None for those without this layer.
        self._stretches = [
            segments([
                network.activation if n_out else None
                for network, (_, n_out) in zip(networks, layer.used, strict=True)
            ])
            for layer in layers[:-1]
        ]  # fmt: skip

    def forward(self, parameters: Sequence[Tensor], inputs: Tensor, noise: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Outputs (R, C, B).

        Args:
            parameters: What `views` gave.
            inputs: (R, D, B).
            noise: (number of the layer, its activations (R, units, B)) -> the activations after dropout.
        """
        x = inputs
        for index in range(len(self.layers) - 1):
            x = noise(index, self._hidden(index, parameters[2 * index], parameters[2 * index + 1], x))
        return torch.baddbmm(parameters[-1], parameters[-2], x)

    def _hidden(self, index: int, weights: Tensor, biases: Tensor, x: Tensor) -> Tensor:
        """A hidden layer; a run that has it not hands on what it has, for all are padded to one width."""
        stretches = self._stretches[index]
        if all([name is not None for name, _ in stretches]):
            return self._activate(torch.baddbmm(biases, weights, x))
        parts = [
            part if name is None else _ACTIVATIONS[name](torch.baddbmm(b, w, part))
            for (name, _), w, b, part in zip(
                stretches,
                split_rows(weights, stretches),
                split_rows(biases, stretches),
                split_rows(x, stretches),
                strict=True,
            )
        ]
        return torch.cat(parts)


def _used(hidden: Sequence[int], n_in: int, n_out: int, index: int, *, is_last: bool) -> tuple[int, int]:
    """Inputs and outputs of a run's layer with this number; the last one follows its own last hidden layer."""
    widths = [n_in, *hidden]
    if is_last:
        return widths[-1], n_out
    return (widths[index], widths[index + 1]) if index < len(hidden) else (0, 0)


class StackedCNN(_Stacked):
    """R convolutional networks on square images of one channel: 3 x 3, activation, 2 x 2 maximum; then one dense layer.

    Args:
        networks: One a run, all with the same number of convolutions.
        side: Pixels along a side of every run's images.
        n_outputs: Logits, or 1, of each run.
        device: Where they lie.

    Raises:
        InputError: The numbers of convolutions differ, or the images are too small for them.
    """

    def __init__(self, networks: Sequence[Network], side: int, n_outputs: Sequence[int], device: torch.device) -> None:
        depths = {len(network.hidden) for network in networks}
        if len(depths) != 1 or 0 in depths:
            raise InputError(f"convolutional networks of {sorted(depths)} convolutions cannot be stacked; expected one")
        depth = depths.pop()
        layers: list[_Layer] = []
        start = 0
        for index in range(depth):
            used = tuple(((1, *network.hidden)[index], network.hidden[index]) for network in networks)
            layers.append(_Layer(start, max(u[0] for u in used), max(u[1] for u in used), _KERNEL, used))
            start = layers[-1].end
        pixels = (side // 2**depth) ** 2
        used = tuple((network.hidden[-1] * pixels, n_out) for network, n_out in zip(networks, n_outputs, strict=True))
        layers.append(_Layer(start, layers[-1].n_out * pixels, max(n_outputs), 1, used))
        super().__init__(layers, networks, device)

    def forward(self, parameters: Sequence[Tensor], inputs: Tensor, noise: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Outputs (R, C, B).

        Args:
            parameters: What `views` gave.
            inputs: (R, H, W, B).
            noise: See `StackedMLP.forward`; applied once, before the dense layer.
        """
        x = inputs.unsqueeze(1)  # (R, channels, H, W, B)
        for index in range(len(self.layers) - 1):
            weights, biases = parameters[2 * index], parameters[2 * index + 1]
            x = _Convolution.apply(x, weights, biases)  # type: ignore[no-untyped-call]
            x = self._by_activation(x, _activate_and_pool)
        x = noise(len(self.layers) - 2, x.flatten(1, 3))
        return torch.baddbmm(parameters[-1], parameters[-2], x)


class _Convolution(torch.autograd.Function):
    """3 x 3 convolution with padding 1: (R, in, H, W, B), (R, out, in x 9), (R, out, 1) -> (R, out, H, W, B).

    As one product with the nine shifted images; torch's grouped convolution takes 1.6 times as long here.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
        R, c, H, W, B = x.shape
        padded = F.pad(x, (0, 0, 1, 1, 1, 1))
        run, channel, row, column, _ = padded.stride()
        shifted = padded.as_strided((R, c, 3, 3, H, W, B), (run, channel, row, column, row, column, 1))
        columns = shifted.reshape(R, c * _KERNEL, H * W * B)
        ctx.save_for_backward(columns, weights)
        ctx.shape = x.shape
        return torch.baddbmm(biases, weights, columns).view(R, -1, H, W, B)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        columns, weights = ctx.saved_tensors
        R, c, H, W, B = ctx.shape
        grad = grad.reshape(R, weights.shape[1], H * W * B)
        grad_x = None
        if ctx.needs_input_grad[0]:
            shifted = torch.bmm(weights.transpose(1, 2), grad).view(R, c, _KERNEL, H, W, B)
            padded = grad.new_zeros(R, c, H + 2, W + 2, B)
            for k in range(_KERNEL):
                i, j = divmod(k, 3)
                padded[:, :, i : i + H, j : j + W] += shifted[:, :, k]
            grad_x = padded[:, :, 1:-1, 1:-1]
        return grad_x, torch.bmm(grad, columns.transpose(1, 2)), grad.sum(2, keepdim=True)


def _maximum(x: Tensor) -> Tensor:
    """Maximum over squares of 2 x 2: (R, c, H, W, B) -> (R, c, H // 2, W // 2, B); an odd row or column is left out.

    The batch lies where torch's kernel for "channels last" has its channels.
    """
    R, c, H, W, B = x.shape
    pooled = F.max_pool2d(x.reshape(R * c, H, W, B).permute(0, 3, 1, 2), 2)
    return pooled.permute(0, 2, 3, 1).reshape(R, c, H // 2, W // 2, B)


def _activate_and_pool(name: str, x: Tensor) -> Tensor:
    """Activation, then maximum over squares of 2 x 2; in the cheaper order where the activation never falls.

    The gradient is the same too, but at the ends of tanh, where unequal numbers become equal ones and its slope is 0.
    """
    if name == "gelu":
        return _maximum(F.gelu(x))
    return _ACTIVATIONS[name](_maximum(x))


def stack(
    networks: Sequence[Network | ModuleNetwork],
    examples: Sequence[Tensor],
    n_outputs: Sequence[int],
    device: torch.device,
) -> StackedMLP | StackedCNN | StackedModules:
    """The stacked form of networks of one kind.

    Args:
        networks: One a run.
        examples: A row or more of each run's inputs: (n, D), (n, 1, H, W), or what its module takes.
        n_outputs: Of each run.
        device: Where they lie.

    Raises:
        InputError: They cannot be stacked: kinds, image sizes or numbers of convolutions differ; or, where they are
            copies of one module, anything but their numbers does, or the module cannot be run so.
    """
    shapes = [tuple(example.shape[1:]) for example in examples]
    kinds = sorted({network.kind for network in networks})
    if len(kinds) != 1:
        raise InputError(f"networks of kinds {kinds} cannot be stacked; make one batch of runs a kind")
    plain = [network for network in networks if isinstance(network, Network)]
    if kinds == ["mlp"]:
        return StackedMLP(plain, [math.prod(shape) for shape in shapes], n_outputs, device)
    if kinds != ["cnn"]:
        return _stack_copies(networks, examples, n_outputs, device)
    sizes = sorted({shape[1:] for shape in shapes})
    if len(sizes) != 1 or sizes[0][0] != sizes[0][1]:
        raise InputError(f"images of sizes {sizes} cannot be stacked; expected squares of one size")
    return StackedCNN(plain, sizes[0][0], n_outputs, device)


def _stack_copies(
    networks: Sequence[Network | ModuleNetwork],
    examples: Sequence[Tensor],
    n_outputs: Sequence[int],
    device: torch.device,
) -> StackedModules:
    first = networks[0], tuple(examples[0].shape[1:]), n_outputs[0]
    for network, example, n in zip(networks, examples, n_outputs, strict=True):
        if (network, tuple(example.shape[1:]), n) != first:
            raise InputError(
                f"{network} on inputs {tuple(example.shape[1:])} with {n} outputs cannot be trained beside {first[0]} "
                f"on {first[1]} with {first[2]}: copies of one module are trained together; make one batch of runs an "
                "architecture"
            )
    return StackedModules(first[0], examples[0], n_outputs[0], device)
