"""Scores: how good a network's outputs are; higher is better.

Called by `evaluation`, and by whatever compares a pruned network with the dense one.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from trimtab.errors import InputError

__all__ = ["check_classes", "is_probability", "score_sum"]


def score_sum(outputs: Any, targets: Tensor, threshold: float = 0.0) -> tuple[float, int]:
    """Sum of the scores of a batch, and how many there are.

    Args:
        outputs: (..., C) logits, or (B,) or (B, 1): one logit for two classes, or a number.
        targets: (...) whole numbers, the classes; or numbers of the shape of the outputs, but for axes of one place at
            the end. On any device.
        threshold: Above which the one number for two classes says 1: 0 for a logit, 0.5 for a probability.

    Returns:
        With classes the places that are right, and all places: accuracy. With numbers minus the sum of squared errors.
        NaN where one of the outputs is.

    Raises:
        InputError: They do not go together.
    """
    if not isinstance(outputs, Tensor):
        raise InputError(
            f"the network puts out {type(outputs).__name__}; validation=(inputs, targets) takes networks that put out "
            "one tensor: give evaluate=, a function of the network, instead"
        )
    targets, is_number = targets.to(outputs.device), targets.is_floating_point()
    if outputs.isnan().any():  # an argmax would find a class in it
        return math.nan, targets.numel()
    if is_number and _without_ones(outputs) == _without_ones(targets):
        error = (outputs.reshape(targets.shape).double() - targets.double()).square().sum()
        return -float(error), targets.numel()
    if not is_number and outputs.ndim == targets.ndim + 1 and outputs.shape[:-1] == targets.shape:
        chosen = outputs.argmax(-1) if outputs.shape[-1] > 1 else (outputs[..., 0] > threshold).long()
        return float((chosen == targets.long()).sum()), targets.numel()
    if not is_number and outputs.shape == targets.shape:
        return float(((outputs > threshold).long() == targets.long()).sum()), targets.numel()
    raise InputError(
        f"the network puts out {tuple(outputs.shape)} and the targets are {targets.dtype} {tuple(targets.shape)}; "
        "expected classes (int64) of the outputs' shape without its last axis, or numbers (float) of its shape"
    )


def is_probability(outputs: Tensor, targets: Tensor) -> bool:
    """Whether outputs are one probability for two classes, as behind a sigmoid: all of them from 0 to 1."""
    is_one = outputs.shape == targets.shape or outputs.shape == (*targets.shape, 1)
    return is_one and not targets.is_floating_point() and bool((outputs >= 0).all() and (outputs <= 1).all())


def check_classes(outputs: Tensor, targets: Tensor) -> None:
    """Refuse classes that the network has no output for; negative ones, which losses leave out, are none of any.

    Raises:
        InputError: Naming the largest.
    """
    if targets.is_floating_point() or targets.ndim > outputs.ndim:
        return
    n_classes = max(2, outputs.shape[-1]) if outputs.ndim == targets.ndim + 1 else 2
    largest = int(targets.max())
    if largest >= n_classes:
        raise InputError(
            f"the targets have a class {largest} and the network puts out {tuple(outputs.shape)}: classes 0 to "
            f"{n_classes - 1}; give the targets that it was trained on"
        )


def _without_ones(tensor: Tensor) -> tuple[int, ...]:
    shape = tuple(tensor.shape)
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape
