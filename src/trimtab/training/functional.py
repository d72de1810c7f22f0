"""StackedModules: R copies of any one module whose parameters lie in one tensor (R, P), run through by `torch.func`.

Called by `trimtab.training.stacked` for what it has no form of its own for: attention, recurrent networks, and modules
of a user's own. The copies differ in their numbers alone; `vmap` of `functional_call` turns the products of one into
batched ones. It asks more of a module than the ordinary loop does, and looks, before anything is trained, whether a
module gives it: each row of a batch is worked on alone, no random number is drawn, no buffer changes, training and
evaluation are the same, and `vmap` knows all that the module does.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel  # the plain form of attention: vmap runs the others one by one
from torch.nn.parameter import is_lazy

from trimtab.errors import InputError
from trimtab.seeding import scoped_global_rng, torch_generator
from trimtab.tasks.small import ModuleNetwork, Network

__all__ = ["EXAMPLE_ROWS", "StackedModules"]

EXAMPLE_ROWS = 4  # of a task's inputs, which a module is tried on
_FAILURES = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError)
_RELATIVE, _ABSOLUTE = 1e-4, 1e-5  # what products in another order may change in single precision


@dataclass(frozen=True)
class _Matrix:
    """Where a matrix or kernel lies in a row of parameters."""

    weights: slice


class StackedModules:
    """R copies of one module, each with parameters of its own.

    Args:
        network: Of every run; makes the module.
        example: A few rows of inputs, (n, *shape); what the module is tried on.
        n_outputs: Logits, or 1, of every run.
        device: Where they lie.

    Attributes:
        layers: Places of the matrices and kernels.
        n_parameters: P: numbers that learn, in the order of `module.parameters()`, without padding.

    Raises:
        InputError: The module cannot be trained this way; it says why, and what to do.
    """

    def __init__(self, network: Network | ModuleNetwork, example: Tensor, n_outputs: int, device: torch.device) -> None:
        self._network, self._n_outputs, self._device = network, n_outputs, device
        self._shape = tuple(example.shape[1:])
        if isinstance(network, ModuleNetwork):  # our own are known to be right
            with scoped_global_rng(None, torch.device("cpu")):
                _Trial(self._name, example, n_outputs).check(self._make(0), self._make(1))
        self._module = self._make(0).to(device)
        learned = {name: tensor for name, tensor in self._module.named_parameters() if tensor.requires_grad}
        self._names = list(learned)
        self._shapes = [tensor.shape for tensor in learned.values()]
        ends = [0, *itertools.accumulate(tensor.numel() for tensor in learned.values())]
        self._places = [slice(start, end) for start, end in itertools.pairwise(ends)]
        self.n_parameters = ends[-1]
        self.layers = [
            _Matrix(place) for place, shape in zip(self._places, self._shapes, strict=True) if len(shape) > 1
        ]
        self._given: dict[str, Tensor] = {}
        self._call = vmap(self._call_one)

    @property
    def _name(self) -> str:
        return self._network.name if isinstance(self._network, ModuleNetwork) else self._network.kind

    def _make(self, seed: int) -> nn.Module:
        """The module that `TrainingLoop` makes of this seed, in training mode."""
        with scoped_global_rng([torch_generator(seed, "weights").get_state()], torch.device("cpu")):
            module = self._network.make(self._shape, self._n_outputs)
        if not isinstance(module, nn.Module):
            raise InputError(f"make of network {self._name!r} gave {type(module).__name__!r}; expected a torch module")
        return module.train()

    def views(self, flat: Tensor) -> list[Tensor]:
        """Every parameter (R, *its shape), on the memory of (R, P)."""
        return [
            flat[:, place].view(-1, *shape) for place, shape in zip(self._places, self._shapes, strict=True)
        ]  # fmt: skip

    def parameters_of(self, run: int, flat: Tensor) -> list[Tensor]:
        """A run's parameters that learn, as its module lists them; views on (R, P)."""
        return [view[run] for view in self.views(flat)]

    def draw(self, seeds: Sequence[int], dtype: torch.dtype) -> Tensor:
        """First weights (R, P): those that the module itself draws from the stream "weights" of each seed.

        Its buffers, and parameters that do not learn, are kept beside them, of each run its own.

        Raises:
            InputError: The module's parameters change from one making to the next.
        """
        rows: dict[int, Tensor] = {}
        fixed: dict[int, dict[str, Tensor]] = {}
        for seed in dict.fromkeys(seeds):
            module = self._make(seed)
            tensors = {name: tensor.detach() for name, tensor in _tensors(module)}
            learned = [tensors.pop(name, None) for name in self._names]
            if [None if tensor is None else tensor.shape for tensor in learned] != self._shapes:
                raise InputError(
                    f"network {self._name!r} made modules with different parameters; expected the same shapes each time"
                )
            rows[seed] = torch.cat([tensor.flatten() for tensor in learned if tensor is not None])
            fixed[seed] = {name: _as(tensor, dtype).to(self._device) for name, tensor in tensors.items()}
        self._given = {name: _stacked([fixed[seed][name] for seed in seeds]) for name in fixed[seeds[0]]}
        return torch.stack([rows[seed] for seed in seeds]).to(self._device, dtype)

    def forward(self, parameters: Sequence[Tensor], inputs: Tensor, noise: object = None) -> Tensor:
        """Outputs (R, C, B).

        Args:
            parameters: What `views` gave.
            inputs: (R, *shape, B), images of one channel without it.
            noise: Not used: a module with dropout is not taken in the first place.
        """
        rows = inputs.movedim(-1, 1)
        learned = dict(zip(self._names, parameters, strict=True))
        with sdpa_kernel(SDPBackend.MATH):
            outputs: Tensor = self._call(learned, self._given, rows.reshape(*rows.shape[:2], *self._shape))
        return outputs.transpose(1, 2)

    def _call_one(self, learned: dict[str, Tensor], given: dict[str, Tensor], inputs: Tensor) -> Tensor:
        outputs: Tensor = functional_call(self._module, {**learned, **given}, (inputs,))
        return outputs


class _Trial:
    """Whether a module can be trained as one of many.

    Args:
        name: Of the network.
        example: Rows of inputs, (n, *shape).
        n_outputs: Wanted of each row.
    """

    def __init__(self, name: str, example: Tensor, n_outputs: int) -> None:
        self._name, self._example, self._n_outputs = name, example, n_outputs

    def check(self, module: nn.Module, other: nn.Module) -> None:
        """Try two modules that were made alike from different seeds; both are worn out by it.

        Raises:
            InputError: They cannot.
        """
        if any(map(is_lazy, module.parameters())):
            raise self._error("has parameters without a shape", "let make run it once, or take modules that are whole")
        before = {name: tensor.detach().clone() for name, tensor in _tensors(module)}
        state = torch.get_rng_state()
        outputs = self._run(module)
        if not torch.equal(state, torch.get_rng_state()):
            raise self._error(
                "draws random numbers in forward, which copies of it would share", "make it without dropout (p=0)"
            )
        changed = [name for name, tensor in _tensors(module) if not _same(before[name], tensor.detach(), 0.0, 0.0)]
        if changed:
            raise self._error(
                f"changes {changed[0]!r} in forward",
                "normalise by LayerNorm or GroupNorm instead of batch norm with running statistics",
            )
        self._check_outputs(module, outputs)
        self._check_copies([module, other])

    def _check_outputs(self, module: nn.Module, outputs: Tensor) -> None:
        n_rows = len(self._example)
        if outputs.shape != (n_rows, self._n_outputs):
            raise self._error(
                f"makes outputs of shape {tuple(outputs.shape)} of {n_rows} rows",
                f"let it make {self._n_outputs} of each, {(n_rows, self._n_outputs)}",
            )
        half = n_rows // 2
        if half and not _same(outputs[:half], self._run(module, self._example[:half])):
            raise self._error(
                "gives a row another output where other rows stand beside it",
                "normalise by LayerNorm or GroupNorm instead of batch norm",
            )
        learned = [(name, tensor) for name, tensor in module.named_parameters() if tensor.requires_grad]
        if not learned:
            raise self._error("has no parameters that learn", "give it some")
        gradients = torch.autograd.grad(outputs.sum(), [tensor for _, tensor in learned], allow_unused=True)
        for (name, _), gradient in zip(learned, gradients, strict=True):
            if gradient is None:
                raise self._error(f"does not use its parameter {name!r}", "leave it out, or set requires_grad to False")
        evaluated = self._run(module.eval())
        module.train()
        if not _same(outputs, evaluated):
            raise self._error("computes something else in evaluation than in training", "let it do the same in both")

    def _check_copies(self, modules: Sequence[nn.Module]) -> None:
        """Whether one module with the numbers of another is the other."""
        alone = [self._run(module).detach() for module in modules]
        tensors = [{name: tensor.detach() for name, tensor in _tensors(module)} for module in modules]
        shapes = [{name: tensor.shape for name, tensor in of_one.items()} for of_one in tensors]
        if shapes[0] != shapes[1]:
            raise self._error("has parameters of other shapes each time it is made", "make the same each time")
        module, twice = copy.deepcopy(modules[0]), torch.stack([self._example, self._example])
        stacked = {name: torch.stack([of_one[name] for of_one in tensors]) for name in tensors[0]}
        try:
            with sdpa_kernel(SDPBackend.MATH):
                together = vmap(lambda given, rows: functional_call(module, given, (rows,)))(stacked, twice)
        except _FAILURES as error:
            raise self._error(f"cannot be run by torch.func.vmap: {error}", "write that part in other ways") from error
        if not all([_same(one, row) for one, row in zip(alone, together, strict=True)]):
            raise self._error(
                "depends on more than its parameters and buffers",
                "make the same each time, and keep tensors that are drawn as buffers",
            )

    def _run(self, module: nn.Module, inputs: Tensor | None = None) -> Tensor:
        try:
            outputs: Tensor = module(self._example if inputs is None else inputs)
        except _FAILURES as error:
            shape = tuple(self._example.shape)
            raise self._error(f"cannot read inputs of shape {shape}: {error}", "make it for this shape") from error
        return outputs

    def _error(self, why: str, what_to_do: str) -> InputError:
        return InputError(
            f"network {self._name!r} cannot be trained in a batch, since it {why}; {what_to_do}, or train its runs one "
            "by one with TrainingLoop"
        )


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers; what is shared stands once."""
    return [*module.named_parameters(), *module.named_buffers()]


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """(R, ...); of equal ones all rows are one piece of memory."""
    if all([_same(tensors[0], tensor, 0.0, 0.0) for tensor in tensors]):
        return tensors[0].expand(len(tensors), *tensors[0].shape)
    return torch.stack(list(tensors))


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _same(one: Tensor, other: Tensor, relative: float = _RELATIVE, absolute: float = _ABSOLUTE) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=relative, atol=absolute, equal_nan=True)
