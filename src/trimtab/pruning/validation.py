"""Validation: a set that networks are scored on.

Made by `trimtab.pruner` from the pair that the user gives; `evaluation` scores configurations on it with memory.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import InputError
from trimtab.pruning.calibration import SAMPLES
from trimtab.pruning.scores import check_classes, is_probability, score_sum

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
        threshold: Of `score_sum`: 0.5 where the dense network puts out probabilities of one class, else 0.

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
        self.threshold = 0.0
        self._try(model, targets)

    @torch.no_grad()
    def _try(self, model: nn.Module, all_targets: Tensor) -> None:
        """Say a wrong shape now, and not after a search has begun."""
        first, targets = self.batches[0]
        try:
            outputs = model(*(tensor.clone() for tensor in first))  # a forward may work on its inputs in place
        except Exception as error:  # whatever the user's forward raises
            reason = f"{type(error).__name__}: {error}"
            raise InputError(
                f"the network fails on the validation inputs: {reason}; give them as in training"
            ) from error
        score_sum(outputs, targets)
        check_classes(outputs, all_targets)
        self.threshold = 0.5 if is_probability(outputs, targets) else 0.0

    def is_guess(self, score: float) -> bool:
        """Whether a score is no better than what a network gets that always answers the same.

        That is the share of the most frequent class, and two standard errors of it; or minus the variance of numbers.
        """
        targets = torch.cat([of_batch for _, of_batch in self.batches])
        if targets.is_floating_point():
            return score <= -float(targets.double().var(0, correction=0).mean())
        counts = torch.unique(targets[targets >= 0], return_counts=True)[1]  # negative ones are no class
        share = float(counts.max()) / targets.numel() if len(counts) else 0.0
        return score <= share + 2.0 * math.sqrt(share * (1.0 - share) / targets.numel())

    @property
    def calibration(self) -> list[tuple[Tensor, ...]]:
        """Inputs, without targets, that batch-norm statistics may be taken of; `SAMPLES` or one batch more."""
        found: list[tuple[Tensor, ...]] = []
        n = 0
        for inputs, targets in self.batches:
            if len(targets) > 1 and n < SAMPLES:  # one sample has no variance
                found.append(inputs)
                n += len(targets)
        return found

    @torch.no_grad()
    def rate(self, model: nn.Module) -> float:
        """Mean score of a network: accuracy, or minus the mean squared error."""
        found = [self.score_sum(model(*(x.clone() for x in inputs)), targets) for inputs, targets in self.batches]
        return sum(of_batch for of_batch, _ in found) / sum(n for _, n in found)

    def score_sum(self, outputs: Any, targets: Tensor) -> tuple[float, int]:
        """Sum of the scores of a batch of outputs, and how many there are."""
        return score_sum(outputs, targets, self.threshold)
