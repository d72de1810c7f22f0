"""Knobs of the data: batch size, in the middle of an epoch, and gradient accumulation; and a sampler that can do it.

Called through the registry, and by users, whose `DataLoader` takes `ResizableBatchSampler` as its `batch_sampler`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sized
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler
from typing_extensions import override

from trimtab.errors import InputError, unknown_name
from trimtab.knobs.base import Knob
from trimtab.out_of_memory import count_rows, free_memory, half_of, split_batch
from trimtab.run_state import Array, RunState

__all__ = ["Accumulation", "BatchSize", "ResizableBatchSampler"]

_EXPONENTS = {"none": 0.0, "linear": 1.0, "sqrt": 0.5}


class ResizableBatchSampler(Sampler[list[int]]):
    """Batches of indices whose size may change at any time; each index comes exactly once an epoch.

    For `DataLoader(data, batch_sampler=sampler)`. A change acts on the next batch that is drawn. Workers draw ahead:
    with them it acts `num_workers * prefetch_factor` batches late (torch's `prefetch_factor` is 2), and nothing is lost
    or repeated all the same, since the batches drawn before are still delivered.

    Args:
        source: The data set, or its length; or another sampler of indices, whose order is taken.
        batch_size: Size to begin with.
        shuffle: Draw a new order for each epoch; not for a sampler.
        seed: Seed of the orders.
        drop_last: Leave out a last batch that is smaller than the size.

    Attributes:
        max_batch_size: What memory was found to hold; None where it never ran out.

    Raises:
        InputError: An argument is wrong; the message names it.
    """

    def __init__(
        self,
        source: Sized | int | Sampler[int],
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        self._sampler = source if isinstance(source, Sampler) else None
        if not isinstance(source, (int, Sized)) or isinstance(source, bool):
            raise InputError(f"source is a {type(source).__name__}; expected a data set, a sampler, or a length")
        self.n_samples = source if isinstance(source, int) else len(source)
        for name, value in (("shuffle", shuffle), ("drop_last", drop_last)):
            if not isinstance(value, bool):
                raise InputError(f"{name} is {value!r}; expected True or False")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise InputError(f"seed is {seed!r}; expected a whole number of 0 or more")
        self.max_batch_size: int | None = None
        self._drop_last = drop_last
        self._shuffle = shuffle and self._sampler is None
        self._generator = torch.Generator().manual_seed(seed)
        self._order = torch.empty(0, dtype=torch.int64)
        self._sizes: list[int] = []  # of the batches of this epoch that were drawn
        self._is_resumed = False
        self._batch_size = 1
        self.resize(batch_size)

    @property
    def batch_size(self) -> int:
        """Size of the next batch that is drawn."""
        return self._batch_size

    def resize(self, batch_size: int) -> None:
        """Draw batches of this size from now on.

        Raises:
            InputError: It is no whole number from 1 to the number of samples, or more than memory was found to hold.
        """
        most = self.n_samples if self.max_batch_size is None else min(self.n_samples, self.max_batch_size)
        self._batch_size = check_size(batch_size, most)

    def __len__(self) -> int:
        """Batches of this epoch: those drawn, and the rest at the present size."""
        drawn = sum(self._sizes)
        left = self.n_samples - drawn if drawn < self.n_samples else 0
        return len(self._sizes) + (left // self._batch_size if self._drop_last else -(-left // self._batch_size))

    def __iter__(self) -> Iterator[list[int]]:
        if not self._is_resumed:
            self._order = self._draw_order()
            self._sizes = []
        self._is_resumed = False
        order, sizes = self._order, self._sizes  # of this epoch, even if another is begun beside it
        position = sum(sizes)
        while position < len(order):
            rows: list[int] = order[position : position + self._batch_size].tolist()
            if self._drop_last and len(rows) < self._batch_size:
                return
            position += len(rows)
            sizes.append(len(rows))
            yield rows

    def _draw_order(self) -> Tensor:
        if self._sampler is not None:
            return torch.tensor(list(self._sampler), dtype=torch.int64)
        if self._shuffle:
            return torch.randperm(self.n_samples, generator=self._generator)
        return torch.arange(self.n_samples)

    def note_out_of_memory(self, size: int) -> None:
        """Take in that a batch of this size did not fit: half of it is the largest from now on.

        Raises:
            InputError: The size is 1, which cannot be halved.
        """
        self.max_batch_size = half_of(size, self.max_batch_size)
        self._batch_size = min(self._batch_size, self.max_batch_size)

    def steps(self, train_step: Callable[[Any], Any], batch: Any) -> Iterator[Any]:
        """Train on a batch, in parts if it does not fit in memory.

        In place of the body of a loop::

            for batch in loader:
                for loss in sampler.steps(train_step, batch):
                    controller.step(loss)

        Where `train_step` raises `torch.OutOfMemoryError`, the size is halved for good, and the samples of the batch in
        hand are trained on in smaller parts, an optimizer step each; so are larger batches that workers drew ahead.

        Args:
            train_step: From a batch to the loss of one optimizer step: clears the gradients, forward, backward, step.
            batch: As the loader gives it: tensors with the samples along the first axis, in lists, tuples and dicts.

        Yields:
            What `train_step` returned; mostly once.

        Raises:
            torch.OutOfMemoryError: A single sample does not fit.
            InputError: The batch cannot be split.
        """
        parts = [batch]
        while parts:
            part = parts.pop(0)
            size = count_rows(part)
            if self.max_batch_size is not None and size > self.max_batch_size:
                parts = [*split_batch(part, self.max_batch_size), *parts]
                continue
            try:
                result = train_step(part)
            except torch.OutOfMemoryError:
                if size < 2:
                    raise
                result = _FAILED
            if result is _FAILED:  # outside of the handler: the error holds what filled the memory
                self.note_out_of_memory(size)
                free_memory()
                parts = [part, *parts]
                continue
            yield result

    def state_dict(self, n_consumed: int | None = None) -> dict[str, Any]:
        """Where the epoch is, the order in it, and the generator of the next.

        Args:
            n_consumed: Batches of this epoch that the loop has used; None: all that were drawn, which is right without
                workers. With them it has to be said, since they have drawn ahead.

        Raises:
            InputError: More than were drawn.
        """
        count = len(self._sizes) if n_consumed is None else n_consumed
        if not 0 <= count <= len(self._sizes):
            raise InputError(f"n_consumed is {n_consumed!r}; expected a number from 0 to the {len(self._sizes)} drawn")
        return {
            "order": self._order.clone(),
            "sizes": self._sizes[:count],
            "generator": self._generator.get_state(),
            "batch_size": self._batch_size,
            "max_batch_size": self.max_batch_size,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`: the next iteration goes on with the epoch where it was.

        Raises:
            InputError: The state is of another number of samples.
        """
        if self._sampler is None and len(state["order"]) not in (0, self.n_samples):
            raise InputError(f"the state holds an order of {len(state['order'])} samples; expected {self.n_samples}")
        self._order = state["order"].clone()
        self._sizes = list(state["sizes"])
        self._generator.set_state(state["generator"])
        self._batch_size = state["batch_size"]
        self.max_batch_size = state["max_batch_size"]
        self._is_resumed = 0 < sum(self._sizes) < len(self._order)


_FAILED = object()


def check_size(size: object, most: int) -> int:
    """The size.

    Raises:
        InputError: It is no whole number from 1 to `most`.
    """
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= most:
        raise InputError(f"batch_size is {size!r}; expected a whole number from 1 to {most}")
    return size


class BatchSize(Knob):
    """Samples in a batch, of a `TrainingLoop` or of a loader with a `ResizableBatchSampler`.

    It acts on the next batch drawn; with workers see there. Out of memory is taken in where it happens
    (`TrainingLoop.step`, `ResizableBatchSampler.steps`): the size is halved, which the controller records as a decision
    of the source "memory", and half of what failed is the upper bound from then on.

    Args:
        low: Smallest size that a controller may choose; default 16.
        high: Largest; default 128; at most the number of samples.
        rate_scaling: What a change does to the rate: "none", "linear" (rate x new / old) or "sqrt" (its root). It is
            recorded as a second decision, and needs the knob "lr".

    Raises:
        UnknownNameError: No such scaling.
    """

    name = "batch_size"
    is_whole = True

    def __init__(
        self, low: float = 16, high: float = 128, *, rate_scaling: Literal["none", "linear", "sqrt"] = "none"
    ) -> None:
        super().__init__(low, high)
        if rate_scaling not in _EXPONENTS:
            raise unknown_name("rate_scaling of the knob 'batch_size'", rate_scaling, _EXPONENTS)
        self.rate_scaling = rate_scaling
        self.moves_rate = rate_scaling != "none"
        self._written = 0
        self._place: Any = None  # that holds the size

    @override
    def bind(self, state: RunState) -> Array:
        place = self._place = _resizable(state)
        if place is None:
            raise InputError(
                f"the knob 'batch_size' cannot act on loader={type(state.loader).__name__}: give the TrainingLoop, a "
                "trimtab.knobs.data.ResizableBatchSampler, or a DataLoader made with one as its batch_sampler"
            )
        limits = [self.high, place.n_samples, *([] if place.max_batch_size is None else [place.max_batch_size])]
        self._bound(min(limits))
        self._written = int(place.batch_size)
        return np.array([float(self._written)])

    def _bound(self, high: float) -> None:
        self.high = float(high)
        if self.low >= self.high:  # the bounds stay in order; a range of one size is no range, and 1 is the least
            self.low = max(1.0, self.high // 2)

    @override
    def get(self, state: RunState) -> float:
        return float(self._place.batch_size)

    @override
    def put(self, state: RunState, value: float) -> None:
        size = int(value)
        place = self._place
        if size != place.batch_size:
            place.resize(size)
        self._written = size

    @override
    def find_conflict(self, state: RunState) -> str | None:
        place = self._place
        present = int(place.batch_size)
        if present == self._written or _has_fallen_back(place, self._written):
            return None
        return f"batch_size is {present} where {self._written} was written"

    @override
    def find_forced(self, state: RunState) -> tuple[float, str] | None:
        place = self._place
        if not _has_fallen_back(place, self._written):
            return None
        before, self._written = self._written, int(place.batch_size)
        self._bound(min(self.high, place.max_batch_size))
        return float(self._written), f"out of memory at a batch_size of {before}: at most {self.high:g} from now on"

    @override
    def consequences(self, state: RunState, before: float, now: float) -> Mapping[str, float]:
        exponent = _EXPONENTS[self.rate_scaling]
        return {"lr": (now / before) ** exponent} if exponent and before > 0 else {}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"written": self._written, "bounds": [self.low, self.high]}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._written = state["written"]
        self.low, self.high = state["bounds"]


def _has_fallen_back(place: Any, written: int) -> bool:
    """Whether a smaller size than was written stands there because memory ran out."""
    return place.max_batch_size is not None and place.batch_size == place.max_batch_size < written


class Accumulation(Knob):
    """Micro-batches averaged into one optimizer step, of a `TrainingLoop` or another loop with `accumulation`.

    It acts at the next optimizer step.

    Args:
        low: Smallest number that a controller may choose; default 1.
        high: Largest; default 16.
    """

    name = "accumulation"
    is_whole = True

    def __init__(self, low: float = 1, high: float = 16) -> None:
        super().__init__(low, high)
        self._written = 0

    @override
    def bind(self, state: RunState) -> Array:
        found = getattr(state.loader, "accumulation", None)
        if isinstance(found, bool) or not isinstance(found, int) or found < 1:
            raise InputError(
                f"the knob 'accumulation' cannot act on loader={type(state.loader).__name__}: give a loop with a "
                "number 'accumulation', such as TrainingLoop, as loader=..."
            )
        self._written = found
        return np.array([float(found)])

    @override
    def get(self, state: RunState) -> float:
        return float(state.loader.accumulation)  # type: ignore[union-attr]

    @override
    def put(self, state: RunState, value: float) -> None:
        state.loader.accumulation = self._written = int(value)  # type: ignore[union-attr]

    @override
    def find_conflict(self, state: RunState) -> str | None:
        present = self.get(state)
        return None if present == self._written else f"accumulation is {present:g} where {self._written} was written"

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"written": self._written}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._written = state["written"]


def _resizable(state: RunState) -> Any:
    """What holds the batch size, or None: the loader itself, or its batch sampler."""
    for place in (state.loader, getattr(state.loader, "batch_sampler", None)):
        if all(hasattr(place, name) for name in ("resize", "batch_size", "max_batch_size", "n_samples")):
            return place
    return None
