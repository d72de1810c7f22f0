"""FlatView: small CPU tensors, seen on the same memory and copied end to end.

Called by the gradient probe and the snapshot. In a network of a few thousand weights a call costs more than its
arithmetic, and a torch call that the training step does not make itself costs 5 to 15 us, a NumPy call 5, because its
code has left the caches since the last decision; copying from memoryview to memoryview, which is little more than a
memmove, costs a few tenths (measured in docs/decisions.md).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["FlatRow", "FlatView", "Floats", "gather"]

SMALL_UP_TO = 200_000  # numbers in all, 0.8 MB: above it arithmetic dominates, and copies should not lie end to end

Floats = npt.NDArray[np.float32]

_data_ptr = Tensor.data_ptr


class FlatRow:
    """A row of numbers that tensors are copied to.

    Args:
        size: Numbers in it.

    Attributes:
        numbers: The row as NumPy sees it; (size,).
        memory: The same memory, for copying.
    """

    def __init__(self, size: int) -> None:
        self.numbers: Floats = np.empty(size, np.float32)
        self.memory = self.numbers.data

    def __deepcopy__(self, memo: object) -> FlatRow:
        """A row of the same numbers; a memoryview itself cannot be copied."""
        row = FlatRow(len(self.numbers))
        row.numbers[:] = self.numbers
        return row


class FlatView:
    """Tensors of float32 on the CPU, few numbers in all, on one long row.

    Args:
        tensors: Dense, contiguous; `fits` says whether they are.

    Attributes:
        size: Numbers in all.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._ids = [*map(id, tensors)]
        self._pointers = [*map(_data_ptr, tensors)]
        self._flat: list[Floats] = [tensor.detach().numpy().reshape(-1) for tensor in tensors]
        views = [flat.data for flat in self._flat]
        ends = [*itertools.accumulate([len(view) for view in views])]
        self._places = [(slice(*ends), view) for *ends, view in zip([0, *ends], ends, views, strict=False)]
        self.size = ends[-1] if ends else 0

    def __deepcopy__(self, memo: object) -> FlatView:
        """A view of nothing: the copied tensors lie elsewhere, so their owner has to make another."""
        return FlatView([])

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
        return [*map(id, tensors)] == self._ids and [*map(_data_ptr, tensors)] == self._pointers

    def copy_to(self, row: FlatRow) -> None:
        """Copy all numbers into a row of this size."""
        memory = row.memory
        for place, view in self._places:
            memory[place] = view

    def square(self) -> float:
        """Sum of the squares of all numbers, where they lie."""
        with np.errstate(all="ignore"):
            return sum([float(flat.dot(flat)) for flat in self._flat])

    def parts_of(self, row: FlatRow, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The parts of a row as tensors on the row's memory, in the shapes of the tensors shown."""
        whole = torch.from_numpy(row.numbers)
        return [whole[place].view(tensor.shape) for (place, _), tensor in zip(self._places, tensors, strict=True)]


def gather(numbers: Sequence[Tensor]) -> Tensor:
    """Tensors of one number each as one tensor of float64, on the first one's device."""
    first = numbers[0]
    if all([number.device == first.device and number.dtype == first.dtype for number in numbers]):
        return torch.stack(list(numbers)).double()
    return torch.stack([number.to(first.device, torch.float64) for number in numbers])
