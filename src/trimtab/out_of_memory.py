"""What to do when a batch does not fit in memory: split it, halve the size, and remember.

Called by the sampler of the knob `batch_size` and by the training loop.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import InputError

__all__ = ["count_rows", "free_memory", "half_of", "split_batch"]


def half_of(size: int, known: int | None) -> int:
    """The largest size from now on, after one did not fit.

    Args:
        size: What did not fit.
        known: What was the largest so far; None where memory never ran out.

    Raises:
        InputError: The size is 1.
    """
    if size < 2:
        raise InputError(f"a batch of {size} does not fit in memory, and cannot be halved; take a smaller model")
    return size // 2 if known is None else min(known, size // 2)


def count_rows(batch: Any) -> int:
    """Samples in a batch: rows of its first tensor.

    Raises:
        InputError: There is none in it.
    """
    if isinstance(batch, Tensor) and batch.dim() > 0:
        return len(batch)
    items = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (list, tuple)) else ()
    for item in items:
        if isinstance(item, (Tensor, dict, list, tuple)):
            return count_rows(item)
    raise InputError(f"a batch of type {type(batch).__name__}; expected tensors, or lists, tuples and dicts of them")


def split_batch(batch: Any, size: int) -> list[Any]:
    """Parts of at most so many samples, as equal as can be, of the same form as the batch.

    Raises:
        InputError: Something in it is no tensor with the samples along its first axis.
    """
    rows = count_rows(batch)
    n_parts = math.ceil(rows / size)
    ends = [rows * part // n_parts for part in range(n_parts + 1)]
    return [_cut(batch, low, high, rows) for low, high in itertools.pairwise(ends)]


def _cut(batch: Any, low: int, high: int, rows: int) -> Any:
    if isinstance(batch, Tensor) and batch.dim() > 0 and len(batch) == rows:
        return batch[low:high]
    if isinstance(batch, dict):
        return {key: _cut(item, low, high, rows) for key, item in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*[_cut(item, low, high, rows) for item in batch])
    if isinstance(batch, (list, tuple)):
        return type(batch)(_cut(item, low, high, rows) for item in batch)
    shape = f" of shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else ""
    raise InputError(
        f"a batch of {rows} samples holds a {type(batch).__name__}{shape}, which cannot be split; expected tensors "
        "with the samples along the first axis, in lists, tuples and dicts"
    )


def free_memory() -> None:
    """Give back what torch keeps of the device's memory for later."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
