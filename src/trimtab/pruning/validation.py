"""Validation: a set that networks are scored on.

Made by `trimtab.pruner` from the pair that the user gives; `evaluation` scores configurations on it with memory.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trimtab.errors import InputError
from trimtab.pruning.scores import score_sum

__all__ = ["BATCH_SIZE", "Validation"]

BATCH_SIZE = 256


class Validation:
    """Inputs and targets, in batches.

    Args:
        pair: (inputs, targets): inputs a tensor or a tuple of the forward's positional arguments, targets as
            `trimtab.pruning.scores.score_sum` takes them; samples along the first axis of each.
        model: The dense network, which is tried on the first batch.
        n_inputs: Positional arguments of its forward.
        batch_size: Samples that go through a network at once.

    Attributes:
        batches: (inputs, targets) of each batch.

    Raises:
        InputError: Inputs and targets have not the same number of samples, or do not fit the network.
    """

    def __init__(self, pair: object, model: nn.Module, n_inputs: int, *, batch_size: int = BATCH_SIZE) -> None:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise InputError(f"validation is {type(pair).__name__}; expected a pair (inputs, targets)")
        inputs, targets = pair
        given = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
        tensors = [*given, targets]
        if not all(isinstance(tensor, Tensor) and tensor.ndim > 0 for tensor in tensors):
            kinds = ", ".join(type(tensor).__name__ for tensor in tensors)
            raise InputError(f"validation has {kinds}; expected (inputs, targets), tensors with samples along axis 0")
        sizes = {len(tensor) for tensor in tensors}
        if len(sizes) > 1 or 0 in sizes:
            raise InputError(f"validation has {sorted(sizes)} samples; expected as many inputs as targets, and some")
        if len(given) != n_inputs:
            raise InputError(
                f"validation has {len(given)} inputs; the example inputs are {n_inputs}: give the same positional "
                "arguments of the forward"
            )
        self.batches: list[tuple[tuple[Tensor, ...], Tensor]] = [
            (tuple(part), part_of_targets)
            for *part, part_of_targets in zip(*(tensor.split(batch_size) for tensor in tensors), strict=True)
        ]
        self._try(model)

    @torch.no_grad()
    def _try(self, model: nn.Module) -> None:
        """Say a wrong shape now, and not after a search has begun."""
        first, targets = self.batches[0]
        try:
            outputs = model(*first)
        except Exception as error:  # whatever the user's forward raises
            reason = f"{type(error).__name__}: {error}"
            raise InputError(
                f"the network fails on the validation inputs: {reason}; give them as in training"
            ) from error
        score_sum(outputs, targets)

    @torch.no_grad()
    def rate(self, model: nn.Module) -> float:
        """Mean score of a network: accuracy, or minus the mean squared error."""
        found = [score_sum(model(*inputs), targets) for inputs, targets in self.batches]
        return sum(of_batch for of_batch, _ in found) / sum(n for _, n in found)
