"""FlatView: small CPU tensors, seen as NumPy arrays on the same memory and copied end to end.

Called by the gradient probe and the snapshot. In a network of a few thousand weights a call costs more than its
arithmetic, and a torch call that the training step does not make itself costs 5 to 15 us, because its code has left
the caches since the last decision; copying through NumPy views costs a few (measured in docs/decisions.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["FlatView", "Floats", "gather"]

SMALL_UP_TO = 200_000  # numbers in all, 0.8 MB: above it arithmetic dominates, and copies should not lie end to end

Floats = npt.NDArray[np.float32]


class FlatView:
    """Tensors of float32 on the CPU, few numbers in all, on one long row.

    Args:
        tensors: Dense, contiguous; `fits` says whether they are.

    Attributes:
        size: Numbers in all.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._ids = [*map(id, tensors)]
        self._pointers = [tensor.data_ptr() for tensor in tensors]
        self._views = [tensor.detach().numpy().reshape(-1) for tensor in tensors]
        ends = np.cumsum([view.size for view in self._views]).tolist()
        self._places = list(zip(self._views, [0, *ends], ends, strict=False))
        self.size: int = ends[-1] if ends else 0

    @staticmethod
    def fits(tensors: Sequence[Tensor]) -> bool:
        """Whether tensors are of the kind that this class is for."""
        numbers = 0
        for tensor in tensors:
            if not (tensor.is_cpu and tensor.dtype is torch.float32 and tensor.layout is torch.strided):
                return False
            if not tensor.is_contiguous():
                return False
            numbers += tensor.numel()
        return 0 < numbers <= SMALL_UP_TO

    def shows(self, tensors: Sequence[Tensor]) -> bool:
        """Whether it is these tensors, still on the memory they lay on, that it shows."""
        return [*map(id, tensors)] == self._ids and [tensor.data_ptr() for tensor in tensors] == self._pointers

    def copy_to(self, row: Floats) -> None:
        """Copy all numbers into a row; (size,)."""
        for view, start, end in self._places:
            row[start:end] = view

    def rows_of(self, row: Floats, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The parts of a row as tensors on the row's memory, in the shapes of the tensors shown."""
        whole = torch.from_numpy(row)
        return [
            whole[start:end].view(tensor.shape) for (_, start, end), tensor in zip(self._places, tensors, strict=True)
        ]


def gather(numbers: Sequence[Tensor]) -> Tensor:
    """Tensors of one number each as one tensor of float64, on the first one's device."""
    first = numbers[0]
    if all([number.device == first.device and number.dtype == first.dtype for number in numbers]):
        return torch.stack(list(numbers)).double()
    return torch.stack([number.to(first.device, torch.float64) for number in numbers])
