"""Where the batches of a run come from: shuffled epochs of samples, or random windows of a text.

Called by the loop. Both hold their own generator and can be saved and restored in mid-epoch, to the bit.
Order is drawn on the CPU, so that a seed gives the same order on every device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from trimtab.errors import InputError
from trimtab.seeding import torch_generator
from trimtab.tasks.augmentation import Augmentation
from trimtab.tasks.base import Split, Task

__all__ = ["Batches", "EpochBatches", "WindowBatches", "augmentation_of", "fixed_batches", "fixed_windows"]

EVAL_BATCH = 128  # samples; larger ones cost convolutions up to twice the time (caches), smaller ones cost MLPs


class Batches(Protocol):
    """A stream of train batches without an end."""

    epoch_samples: float  # samples (or windows) in one pass over the data, at the batch size it began with
    batch_size: int  # of the next micro-batch; may be written at any time, at most `n_samples`
    n_samples: int  # the largest batch there can be

    def next(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the next micro-batch."""

    def example(self, size: int) -> Tensor:
        """Inputs of a micro-batch of this size, always the same; the stream stays where it is."""

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where another stream was."""


class EpochBatches:
    """Every sample at most once an epoch, in an order drawn anew for each; an incomplete batch is left out.

    `batch_size` may change in the middle of an epoch: none comes twice, and fewer than a batch are left out.

    Args:
        split: Train split, on the device of the run.
        batch_size: Samples in a batch.
        generator: CPU generator that the orders are drawn from.
        augmentation: What is done to the images of a batch, and the CPU generator that it draws from, which is another
            one, so that the order stays the same; None leaves them alone.

    Raises:
        InputError: The split is smaller than one batch.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        generator: torch.Generator,
        augmentation: tuple[Augmentation, torch.Generator] | None = None,
    ) -> None:
        self._split = split
        self.batch_size = batch_size
        self._generator = generator
        self._augmentation = augmentation
        self._n = self.n_samples = len(split.inputs)
        if self._n < batch_size:
            raise InputError(f"batch_size {batch_size} is more than the {self._n} train samples; make it smaller")
        self.epoch_samples = float(self._n // batch_size * batch_size)
        self._order = torch.empty(0, dtype=torch.int64)
        self._position = self._n  # the first order is drawn with the first batch

    def next(self) -> tuple[Tensor, Tensor]:
        """(B, ...) inputs and (B,) targets."""
        size = self.batch_size
        end = self._position + size
        if end > self._n:
            order = torch.randperm(self._n, generator=self._generator)
            self._order = order.to(self._split.inputs.device, non_blocking=True)  # else it waits for the device
            end = size
        rows = self._order[end - size : end]
        self._position = end
        inputs, targets = self._split.inputs.index_select(0, rows), self._split.targets.index_select(0, rows)
        if self._augmentation is not None:
            augment, generator = self._augmentation
            inputs = augment(inputs, generator)
        return inputs, targets

    def example(self, size: int) -> Tensor:
        """(B, ...) inputs: the first ones of the split, as they are."""
        return self._split.inputs[:size]

    def state_dict(self) -> dict[str, Any]:
        """The epoch's order, the place in it, the generator of the next, and that of the augmentation."""
        state = {
            "order": self._order.to("cpu", copy=True),
            "position": self._position,
            "generator": self._generator.get_state(),
        }
        return state if self._augmentation is None else state | {"augmentation": self._augmentation[1].get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`.

        Raises:
            InputError: The order is not one of this split, or only one of the two streams is augmented.
        """
        if ("augmentation" in state) != (self._augmentation is not None):
            there = "with" if "augmentation" in state else "without"
            raise InputError(
                f"the state is of a run {there} augmentation and this one is not; set the task's is_augmented alike"
            )
        if len(state["order"]) not in (0, self._n):
            raise InputError(f"the state holds an order of {len(state['order'])} samples, the train split {self._n}")
        self._order = state["order"].to(self._split.inputs.device, copy=True)
        self._position = state["position"]
        self._generator.set_state(state["generator"])
        if self._augmentation is not None:
            self._augmentation[1].set_state(state["augmentation"])


class WindowBatches:
    """Windows of a text that begin anywhere, drawn with replacement.

    Args:
        tokens: (N,) train tokens, on the device of the run.
        block_size: T, tokens in a window.
        batch_size: B, windows in a batch.
        generator: CPU generator that the places are drawn from.

    Raises:
        InputError: The text is shorter than one window and its next token.
    """

    def __init__(self, tokens: Tensor, block_size: int, batch_size: int, generator: torch.Generator) -> None:
        _check_length(tokens, block_size)
        self._tokens = tokens
        self.batch_size = batch_size
        self._generator = generator
        self._n_places = self.n_samples = len(tokens) - block_size
        self._offsets = torch.arange(block_size + 1, device=tokens.device)
        self.epoch_samples = len(tokens) / block_size

    def next(self) -> tuple[Tensor, Tensor]:
        """(B, T) tokens and the (B, T) tokens that follow them, int64."""
        places = torch.randint(self._n_places, (self.batch_size,), generator=self._generator)
        return _windows(self._tokens, places.to(self._tokens.device, non_blocking=True), self._offsets)

    def example(self, size: int) -> Tensor:
        """(B, T) tokens: windows that begin at the first tokens of the text."""
        places = torch.arange(min(size, self.n_samples), device=self._tokens.device)
        return _windows(self._tokens, places, self._offsets)[0]

    def state_dict(self) -> dict[str, Any]:
        """The generator."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self._generator.set_state(state["generator"])


def augmentation_of(task: Task, train: Split, seed: int) -> tuple[Augmentation, torch.Generator] | None:
    """What a task does to its train batches, with a generator of its own; None where it does nothing.

    Args:
        task: Says what, and whether.
        train: Its train split.
        seed: Root seed of the run.

    Raises:
        InputError: The split holds no images that the augmentation fits.
    """
    if not task.is_augmented or task.augmentation is None:
        return None
    task.augmentation.check(train.inputs, task.name)
    return task.augmentation, torch_generator(seed, "augmentation")


def fixed_batches(split: Split) -> Iterator[tuple[Tensor, Tensor]]:
    """The whole split, in its order."""
    for low in range(0, len(split.inputs), EVAL_BATCH):
        yield split.inputs[low : low + EVAL_BATCH], split.targets[low : low + EVAL_BATCH]


def fixed_windows(tokens: Tensor, block_size: int, batch_size: int, n_batches: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same windows at every call, spread evenly over the text.

    Even places need no seed and tell more than drawn ones: they overlap only where the text is too short for
    them.

    Raises:
        InputError: The text is shorter than one window and its next token.
    """
    _check_length(tokens, block_size)
    offsets = torch.arange(block_size + 1, device=tokens.device)
    last = len(tokens) - block_size - 1
    places = torch.linspace(0, last, min(n_batches * batch_size, last + 1), dtype=torch.float64).long()
    for part in torch.split(places.to(tokens.device), batch_size):
        yield _windows(tokens, part, offsets)


def _windows(tokens: Tensor, places: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    windows = tokens[places[:, None] + offsets].long()
    return windows[:, :-1], windows[:, 1:]


def _check_length(tokens: Tensor, block_size: int) -> None:
    if len(tokens) <= block_size:
        raise InputError(f"a text of {len(tokens)} tokens is too short for a block of {block_size}")
