"""Scores: how good a network's outputs are; higher is better.

Called by `evaluation`, and by whatever compares a pruned network with the dense one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from trimtab.errors import InputError

__all__ = ["score_sum"]


def score_sum(outputs: Any, targets: Tensor) -> tuple[float, int]:
    """Sum of the scores of a batch, and how many there are.

    Args:
        outputs: (..., C) logits, or (B,) or (B, 1): one logit for two classes, or a number.
        targets: (...) whole numbers, the classes; or numbers of the shape of the outputs.

    Returns:
        With classes the places that are right, and all places: accuracy. With numbers minus the sum of squared errors.

    Raises:
        InputError: They do not go together.
    """
    if not isinstance(outputs, Tensor):
        raise InputError(
            f"the network puts out {type(outputs).__name__}; validation=(inputs, targets) takes networks that put out "
            "one tensor: give evaluate=, a function of the network, instead"
        )
    is_number = targets.is_floating_point()
    if is_number and outputs.numel() == targets.numel():
        error = (outputs.reshape(targets.shape).double() - targets.double()).square().sum()
        return -float(error), targets.numel()
    if not is_number and outputs.ndim == targets.ndim + 1 and outputs.shape[:-1] == targets.shape:
        chosen = outputs.argmax(-1) if outputs.shape[-1] > 1 else (outputs[..., 0] > 0).long()
        return float((chosen == targets.long()).sum()), targets.numel()
    if not is_number and outputs.shape == targets.shape:
        return float(((outputs > 0).long() == targets.long()).sum()), targets.numel()
    raise InputError(
        f"the network puts out {tuple(outputs.shape)} and the targets are {targets.dtype} {tuple(targets.shape)}; "
        "expected classes (int64) of the outputs' shape without its last axis, or numbers (float) of its shape"
    )
