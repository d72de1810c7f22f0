"""BatchedTraining: R small networks trained at once, each with data, order, weights and settings of its own.

Called by environments; it knows no reinforcement learning. Every run is the run that `TrainingLoop` makes of the same
task and seed (tests/parity/test_batched.py), for a hundredth to a tenth of its cost. The caller owns the clock and
the rates: `optimizer.lr` and `optimizer.weight_decay` act at the next step, and so do `optimizer.set_momentum`,
`set_dropout`, `resize` and, after `watch_squares`, `optimizer.switch`. Runs may have batches of different sizes: all
are as wide as the largest, and what is beyond a run's own size counts for nothing.

What is drawn comes from each run's own streams "data order" and "weights", those of `TrainingLoop`, and for dropout
from a hash of the run's seed, the step and the unit, so that a run does not depend on those beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.errors import InputError, unknown_name
from trimtab.seeding import derive_seed, torch_generator
from trimtab.tasks.base import Split
from trimtab.tasks.small import ModuleNetwork, Network, SmallTask
from trimtab.training.batched_optimizer import ALGORITHMS, BatchedOptimizer
from trimtab.training.functional import EXAMPLE_ROWS
from trimtab.training.stacked import segments, split_rows, stack

__all__ = ["BatchedTraining", "IntervalStats"]

_SPLITS = ("train", "val", "score", "test")
_EVAL_IMAGES = 1024  # of all runs at once on a CPU: with more, what convolutions keep leaves its caches
MEASURE_EVERY = 10  # steps between two measurements within an interval: those of `trimtab.gradients`


class IntervalStats(NamedTuple):
    """What was measured in some steps of R runs.

    Attributes:
        losses: Train loss of every step, (n, R). All runs end with the last row; NaN before a run's first step.
        norms: |u|, |theta|, |g| and <g, u> at each measured step, (m, 4, R); u is the update before, as
            theta_t = theta_(t-1) - u; NaN before a run's second step.
        layer_ratios: |u| / |theta| of each matrix or kernel, (m, layers, R); NaN where a run has no such layer, or as
            above.
        counts: Steps of each run, (R,).
    """

    losses: Tensor
    norms: Tensor
    layer_ratios: Tensor
    counts: npt.NDArray[np.int64]


class BatchedTraining:
    """R training runs that step together.

    Args:
        tasks: What each run trains; a task may stand for several runs, and its data are then stored once. All have
            one batch size and networks that can be stacked: MLPs, CNNs of one depth and image size, or copies of one
            module (attention, recurrent, a user's own). Runs of one activation, optimizer and kind are faster side by
            side.
        seeds: Root seed of each run, (R,).
        lr: Initial rate of each run, (R,).
        device: Where they run.
        dtype: Of weights and data.

    Attributes:
        n_runs: R.
        optimizer: Holds the rates and decays, to be written in place.
        parameters: (R, P), padding included.

    Raises:
        InputError: The tasks cannot be trained as one batch.
    """

    def __init__(
        self,
        tasks: Sequence[SmallTask],
        seeds: Sequence[int],
        lr: Sequence[float],
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.n_runs = len(tasks)
        if not tasks or not len(seeds) == len(lr) == self.n_runs:
            raise InputError(f"{len(tasks)} tasks, {len(seeds)} seeds, {len(lr)} rates; expected one of each a run")
        sizes = sorted({task.batch_size for task in tasks})
        if len(sizes) != 1:
            raise InputError(f"batch sizes {sizes} cannot be trained together; make one batch of runs a size")
        self._sizes = np.full(self.n_runs, sizes[0], dtype=np.int64)
        self._shares: Tensor | None = None  # of each row in its run's loss, (R, B); None where all sizes are equal
        self._device = torch.device(device)
        self._network = stack(
            [task.network for task in tasks],
            [task.train.inputs[:EXAMPLE_ROWS] for task in tasks],
            [task.n_outputs for task in tasks],
            self._device,
        )
        self.parameters = self._network.draw(seeds, dtype)
        self._views = [view.requires_grad_() for view in self._network.views(self.parameters)]
        self._gradient = torch.zeros_like(self.parameters)
        # Of runs whose last interval was a single step: their weights before it, to be compared at the next one.
        self._is_lone = np.zeros(self.n_runs, dtype=np.bool_)
        self._before_lone = self.parameters.detach()
        decays = torch.zeros(self._network.n_parameters, dtype=torch.bool)
        for layer in self._network.layers:
            decays[layer.weights] = True
        self.optimizer = BatchedOptimizer(
            [task.optimizer for task in tasks],
            [task.momentum for task in tasks],
            [task.betas for task in tasks],
            decays,
            self.parameters,
        )
        self.optimizer.lr[:, 0] = torch.tensor(lr, dtype=dtype)
        self.optimizer.weight_decay[:, 0] = torch.tensor([task.weight_decay for task in tasks], dtype=dtype)
        self.optimizer.look_at_decay()
        distinct = list({id(task): task for task in tasks}.values())
        places = {id(task): place for place, task in enumerate(distinct)}
        self._task_of = torch.tensor([places[id(task)] for task in tasks], device=self._device)
        self._kinds = segments([task.kind for task in tasks])
        self._data = {
            name: _Padded([getattr(task, name) for task in distinct], self._task_of, dtype, self._device)
            for name in _SPLITS
        }
        self._orders = _Orders([len(task.train.inputs) for task in tasks], seeds, sizes[0], self._device)
        n_outputs = [task.n_outputs for task in tasks]
        self._no_class: Tensor | None = None
        if min(n_outputs) != max(n_outputs):
            beyond = torch.arange(max(n_outputs)) >= torch.tensor(n_outputs).unsqueeze(1)
            is_class = torch.tensor([task.kind == "classification" for task in tasks]).unsqueeze(1)
            self._no_class = torch.zeros(beyond.shape, dtype=dtype).masked_fill(beyond & is_class, -math.inf)
            self._no_class = self._no_class.unsqueeze(2).to(self._device)
        self._drop = _Dropout([task.network for task in tasks], seeds, dtype, self._device)
        self.steps_done = 0

    @property
    def batch_sizes(self) -> npt.NDArray[np.int64]:
        """Samples in the batches of each run; (R,)."""
        return self._sizes.copy()

    @property
    def n_samples(self) -> npt.NDArray[np.int64]:
        """The largest batch of each run: its train samples; (R,)."""
        return self._orders.counts

    @property
    def dropout(self) -> npt.NDArray[np.float64]:
        """Dropout of each run; NaN where its network has no place for one; (R,)."""
        return self._drop.probabilities

    def set_dropout(self, values: npt.NDArray[np.float64]) -> None:
        """Write the dropout of the runs that have one; (R,)."""
        self._drop.write(values)

    def resize(self, sizes: npt.NDArray[np.int64]) -> None:
        """Take batches of these sizes from the next step on, in the middle of an epoch too; (R,).

        With dropout the masks of a run then depend on the size of the largest batch beside it.

        Raises:
            InputError: A size is not between 1 and the run's train samples.
        """
        if sizes.shape != (self.n_runs,) or (sizes < 1).any() or (sizes > self.n_samples).any():
            raise InputError(
                f"batch sizes {sizes.tolist()}; expected one for each run, from 1 to its train samples "
                f"{self.n_samples.tolist()}"
            )
        if (sizes == self._sizes).all():
            return
        self._sizes = sizes.astype(np.int64)
        self._orders.resize(self._sizes)
        inside = torch.arange(int(sizes.max())) < torch.from_numpy(self._sizes).unsqueeze(1)
        shares = inside.to(self.parameters.dtype) / torch.from_numpy(self._sizes).unsqueeze(1)
        self._shares = None if sizes.min() == sizes.max() else shares.to(self._device)

    def watch_squares(self) -> None:
        """Keep what `optimizer.switch` needs from now on; to be called before the first step."""
        inside = torch.zeros_like(self.parameters)
        for run in range(self.n_runs):
            for own in self._network.parameters_of(run, inside):
                own.fill_(1.0)
        self.optimizer.watch(inside.bool())

    # ---- training -----------------------------------------------------------------------------------------------

    def run(
        self,
        n_steps: int | npt.NDArray[np.int64],
        factors: Sequence[float] | npt.NDArray[np.float64] | None = None,
    ) -> IntervalStats:
        """Take so many optimizer steps, and measure as a gradient probe does: at the last, and every tenth before it.

        Args:
            n_steps: At least 1; of a single step nothing but the loss is measured, until the step after it. Or a number
                for each run, (R,), from 0 on: all end together, and those with fewer begin later and are until then
                what they were.
            factors: What rates are multiplied with in each step, (n,), or (n, R) where runs differ; None: 1.

        Raises:
            InputError: No step was asked for, or there are not as many factors as steps.
        """
        counts = np.broadcast_to(np.asarray(n_steps), (self.n_runs,)).astype(np.int64)
        n = int(counts.max())
        is_wrong = n_steps < 1 if isinstance(n_steps, int) else bool((counts < 0).any())
        if is_wrong or (factors is not None and len(factors) != n):
            raise InputError(f"run({n_steps}) with factors {factors}; expected 1 step or more, and a factor for each")
        losses, norms, ratios = [], [], []
        before: Tensor | None = None
        own = torch.from_numpy(counts).to(self._device)
        is_uneven = int(counts.min()) < n
        begun = self.snapshot() if is_uneven else {}
        if n:
            self.optimizer.plan([1.0] * n if factors is None else factors, n - own if is_uneven else None)
        for left, rows in zip(range(n, 0, -1), self._orders.next(counts), strict=True):
            if is_uneven:
                if left < n and (counts == left).any():
                    self._put_back(begun, own == left)
                # What is wider belongs to runs that have not begun.
                rows = rows[:, : int(self._sizes[counts >= left].max())]
            loss = self._backward(rows)
            losses.append(loss.where(own >= left, math.nan) if is_uneven else loss)
            if before is not None:
                row, layers = self._measure(before)
                norms.append(row.where(own > left, math.nan))
                ratios.append(layers.where(own > left, math.nan))
                before = None
            if (is_next := self._is_lone & (counts == left)).any():
                self._is_lone &= ~is_next
                if left == 1 or left % MEASURE_EVERY == 2:  # else a probe does not look at an interval's first step
                    at = torch.from_numpy(is_next).to(self._device)
                    row, layers = self._measure(self._before_lone)
                    norms.append(row.where(at, math.nan))
                    ratios.append(layers.where(at, math.nan))
            if left % MEASURE_EVERY == 2:
                before = self.parameters.clone()
            if left == 1 and (lone := counts == 1).any():
                at = torch.from_numpy(lone).to(self._device).unsqueeze(1)
                self._before_lone = torch.where(at, self.parameters, self._before_lone)
                self._is_lone |= lone
            self.optimizer.step(self._gradient)
            self.steps_done += 1
        if is_uneven:
            self._put_back(begun, own == 0)
        return IntervalStats(
            torch.stack(losses) if losses else self.parameters.new_zeros((0, self.n_runs)),
            torch.stack(norms) if norms else self.parameters.new_zeros((0, 4, self.n_runs)),
            torch.stack(ratios) if ratios else self.parameters.new_zeros((0, len(self._network.layers), self.n_runs)),
            counts,
        )

    def _backward(self, rows: Tensor) -> Tensor:
        """Losses (R,) of the batches of these rows (R, B); their gradients go to `_gradient`."""
        inputs, targets = self._data["train"].take(rows)
        self._drop.steps_done = self.steps_done
        outputs = self._network.forward(self._views, inputs, self._drop if self._drop.is_needed else _keep)
        each = self._losses(outputs, targets)
        losses = each.mean(1) if self._shares is None else (each * self._shares[:, : rows.shape[1]]).sum(1)
        gradients = torch.autograd.grad(losses.sum(), self._views)
        torch.cat([gradient.flatten(1) for gradient in gradients], 1, out=self._gradient)
        return losses.detach()

    def _losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of every sample; (R, C, B), (R, B) -> (R, B)."""
        if self._no_class is not None:
            outputs = outputs + self._no_class
        parts = []
        for (kind, _), given, wanted in zip(
            self._kinds, split_rows(outputs, self._kinds), split_rows(targets, self._kinds), strict=True
        ):
            if kind == "classification":
                parts.append(F.cross_entropy(given, wanted.long(), reduction="none"))
            else:
                parts.append((given[:, 0] - wanted) ** 2)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _measure(self, before: Tensor) -> tuple[Tensor, Tensor]:
        """[|u|, |theta|, |g|, <g, u>] (4, R), and |u| / |theta| of each layer's weights (layers, R)."""
        now, gradient = self.parameters, self._gradient
        update = before - now
        row = torch.stack([
            torch.linalg.vector_norm(update, dim=1),
            torch.linalg.vector_norm(now, dim=1),
            torch.linalg.vector_norm(gradient, dim=1),
            torch.linalg.vecdot(gradient, update, dim=1),
        ])  # fmt: skip
        places = [layer.weights for layer in self._network.layers]
        ratios = [
            torch.linalg.vector_norm(update[:, place], dim=1) / torch.linalg.vector_norm(now[:, place], dim=1)
            for place in places
        ]
        return row, torch.stack(ratios) if ratios else row.new_zeros((0, self.n_runs))

    # ---- looking ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, split: str) -> Tensor:
        """Mean loss over a split, without dropout; (R,).

        Raises:
            UnknownNameError: No such split.
        """
        if split not in _SPLITS:
            raise unknown_name("split", split, _SPLITS)
        data = self._data[split]
        losses = [self._losses(self._network.forward(self._views, x, _keep), y) for x, y in data.whole()]
        return data.mean(torch.cat(losses, 1))

    def are_finite(self) -> Tensor:
        """Whether every weight of a run is finite; (R,), bool."""
        squares: Tensor = torch.linalg.vecdot(self.parameters, self.parameters, dim=1)
        return squares.isfinite()

    def parameters_of(self, run: int) -> list[Tensor]:
        """A run's parameters as the same network in `torch.nn` modules lists them; views on `parameters`."""
        return self._network.parameters_of(run, self.parameters)

    # ---- keeping and putting back -------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Tensor]:
        """Weights and optimizer state of all runs, copied; of use until a run's algorithm is switched."""
        kinds = torch.tensor([ALGORITHMS.index(name) for name in self.optimizer.names])
        return {**{name: tensor.clone() for name, tensor in self._kept().items()}, "algorithms": kinds}

    def restore(self, snapshot: dict[str, Tensor], runs: Tensor) -> None:
        """Put weights and optimizer state of some runs back; their data go on where they are.

        Args:
            snapshot: What `snapshot` gave.
            runs: Which runs; (R,), bool.

        Raises:
            InputError: One of them had another algorithm when the snapshot was taken.
        """
        had = [ALGORITHMS[number] for number in snapshot["algorithms"].tolist()]
        chosen = runs.tolist()
        for run, (old, new) in enumerate(zip(had, self.optimizer.names, strict=True)):
            if chosen[run] and old != new:
                raise InputError(
                    f"run {run} is at {new!r}, the snapshot is of {old!r}, whose moments mean something else; take one "
                    "after each switch"
                )
        self._is_lone &= ~runs.cpu().numpy()  # what would be measured of them next is of a past that is no more
        self._put_back(snapshot, runs)

    @torch.no_grad()
    def _put_back(self, snapshot: dict[str, Tensor], runs: Tensor) -> None:
        for name, tensor in self._kept().items():
            axis = 1 if name == "moments" else 0
            places = runs.nonzero().squeeze(1)
            tensor.index_copy_(axis, places, snapshot[name].index_select(axis, places))

    def _kept(self) -> dict[str, Tensor]:
        return {"parameters": self.parameters, "moments": self.optimizer.moments, "steps": self.optimizer.steps}


class _Dropout:
    """Dropout of the runs that have it, by each one's own probability; equal seeds share their masks' numbers."""

    def __init__(
        self,
        networks: Sequence[Network | ModuleNetwork],
        seeds: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.is_needed = any(network.dropout > 0 for network in networks)
        self.steps_done = 0
        self._now = np.array([network.dropout if network.dropout > 0 else math.nan for network in networks])
        depth = max(len(network.hidden) for network in networks)
        self._parts = [self._of_layer(layer, networks, seeds, dtype, device) for layer in range(depth)]
        self._masks: dict[int, Tensor] = {}

    @property
    def probabilities(self) -> npt.NDArray[np.float64]:
        """Of each run; NaN where it has none; (R,)."""
        return self._now.copy()

    def write(self, values: npt.NDArray[np.float64]) -> None:
        """Other probabilities, for the runs that have one; (R,)."""
        self._now = np.where(np.isnan(self._now), np.nan, values)
        now = torch.from_numpy(self._now)
        for layer, (runs, keep, seeds, seed_of) in enumerate(self._parts):
            if len(runs):
                new = (1 - now.to(runs.device)[runs]).to(keep).view(-1, 1, 1)
                self._parts[layer] = (runs, new, seeds, seed_of)

    @staticmethod
    def _of_layer(
        layer: int,
        networks: Sequence[Network | ModuleNetwork],
        seeds: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> tuple[Tensor, ...]:
        """The runs with dropout in a layer, what each keeps, the distinct seeds, and which is whose."""
        runs = [run for run, network in enumerate(networks) if network.dropout > 0 and len(network.hidden) > layer]
        keep = torch.tensor([1 - networks[run].dropout for run in runs], dtype=dtype, device=device)
        distinct = sorted({seeds[run] for run in runs})
        numbers = torch.tensor([derive_seed(seed, "dropout") for seed in distinct], device=device)
        seed_of = torch.tensor([distinct.index(seeds[run]) for run in runs], device=device)
        return torch.tensor(runs, device=device), keep.view(-1, 1, 1), numbers, seed_of

    def __call__(self, layer: int, x: Tensor) -> Tensor:
        """Activations (R, units, B) of a layer, after dropout."""
        runs, keep, seeds, seed_of = self._parts[layer]
        if not len(runs):
            return x
        mask = self._masks.get(layer)  # of all runs, 1 for those without: written anew at every step
        if mask is None or mask.shape != x.shape:
            mask = self._masks[layer] = torch.ones_like(x, requires_grad=False)
        uniform = hashed_uniform(seeds, self.steps_done * 16 + layer, x.shape[1:])
        mask.index_copy_(0, runs, (uniform[seed_of] < keep) / keep)
        return x * mask


class _Padded:
    """One split of several tasks as (tasks, N, ...), shorter ones padded, and each run's way to its own."""

    def __init__(self, splits: Sequence[Split], task_of: Tensor, dtype: torch.dtype, device: torch.device) -> None:
        rows = [len(split.inputs) for split in splits]
        self._n = max(rows)
        first = splits[0].inputs
        self._shape = first.shape[1:] if first.dim() > 2 else (max(split.inputs.shape[1] for split in splits),)
        inputs = torch.zeros(len(splits), self._n, *self._shape, dtype=dtype)
        targets = torch.zeros(len(splits), self._n, dtype=dtype)  # classes too: small whole numbers
        for place, split in enumerate(splits):
            n, d = split.inputs.shape[:2]
            inputs[place, :n, :d] = split.inputs.to(dtype)
            targets[place, :n] = split.targets.to(dtype)
        self._inputs = inputs.to(device).flatten(0, 1)
        self._targets = targets.to(device).flatten()
        self._task_of = task_of
        self._start = (task_of * self._n).unsqueeze(1)
        counts = torch.tensor(rows, device=device)[task_of].unsqueeze(1)
        inside = torch.arange(self._n, device=device) < counts
        self._weights = inside.to(dtype) / counts
        self._all = torch.where(inside, torch.arange(self._n, device=device), 0)
        self._whole: list[tuple[Tensor, Tensor]] | None = None

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (R, B) of each run's split: inputs with the batch last, and targets (R, B)."""
        places = (rows + self._start).flatten()
        inputs = self._inputs.index_select(0, places).view(*rows.shape, -1).transpose(1, 2)
        if len(self._shape) > 1:
            shape = self._shape[1:] if len(self._shape) == 3 and self._shape[0] == 1 else self._shape
            inputs = inputs.contiguous().view(len(rows), *shape, rows.shape[1])
        return inputs, self._targets.index_select(0, places).view(rows.shape)

    def whole(self) -> list[tuple[Tensor, Tensor]]:
        """Every row of each run's split, in parts; the same at every call and kept, for decision after decision."""
        if self._whole is None:
            is_image, is_cpu = len(self._shape) > 1, self._all.device.type == "cpu"
            count = max(1, _EVAL_IMAGES // len(self._all)) if is_image and is_cpu else self._n
            self._whole = [self.take(part) for part in torch.split(self._all, count, 1)]
        return self._whole

    def mean(self, values: Tensor) -> Tensor:
        """Mean over each run's own rows; (R, N) -> (R,)."""
        return torch.where(self._weights > 0, values * self._weights, 0.0).sum(1)


class _Orders:
    """Which rows come next in each run: `EpochBatches` for R runs; those of one seed and count share one order."""

    def __init__(self, counts: Sequence[int], seeds: Sequence[int], batch_size: int, device: torch.device) -> None:
        if min(counts) < batch_size:
            raise InputError(f"batch_size {batch_size} is more than the {min(counts)} train samples; make it smaller")
        self.counts = np.array(counts, dtype=np.int64)
        self._batch_size = batch_size
        self._device = device
        keys = list(zip(seeds, counts, strict=True))
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        self._numbers = [numbers[key] for key in keys]
        self._order_of = torch.tensor(self._numbers, device=device)
        self._counts = [count for _, count in numbers]
        self._generators = [torch_generator(seed, "data order") for seed, _ in numbers]
        # Batches that are left of each order's epoch; NumPy's slices cost a tenth of torch's.
        self._left = [np.zeros((0, batch_size), np.int64) for _ in numbers]
        # The orders of each epoch that some run is still in or has not come to, by the epoch's number from 0.
        self._epochs: list[dict[int, npt.NDArray[np.int64]]] = [{} for _ in numbers]
        self._n_epochs = [0 for _ in numbers]
        self._sizes: npt.NDArray[np.int64] | None = None  # of each run, once they have been changed
        self._places: list[tuple[int, int]] = []  # then: the epoch of each run, and the samples it has had of it

    def resize(self, sizes: npt.NDArray[np.int64]) -> None:
        """Batches of these sizes from now on; (R,)."""
        if self._sizes is None:
            for number in self._numbers:
                used = self._counts[number] // self._batch_size - len(self._left[number])
                # Before the first order is drawn every run stands at the end of an epoch that there was not.
                place = used * self._batch_size if self._n_epochs[number] else self._counts[number]
                self._places.append((self._n_epochs[number] - 1, place))
        self._sizes = sizes

    def next(self, n_steps: npt.NDArray[np.int64]) -> Tensor:
        """Rows of the next batches, (n, R, B), padded with row 0 where sizes differ; those of a run are the last ones.

        Args:
            n_steps: Of each run; (R,).
        """
        longest = int(n_steps.max())
        if self._sizes is None and int(n_steps.min()) == longest:
            rows = np.stack([self._take(number, longest) for number in range(len(self._counts))], 1)
            return torch.from_numpy(rows).to(self._device).index_select(1, self._order_of)
        if self._sizes is None:
            self.resize(np.full(len(self._numbers), self._batch_size))
        sizes = np.asarray(self._sizes)
        rows = np.zeros((longest, len(self._numbers), int(sizes.max())), np.int64)
        for run, (size, count) in enumerate(zip(sizes.tolist(), n_steps.tolist(), strict=True)):
            if count:
                rows[longest - count :, run, :size] = self._take_own(run, size, count)
        for number, known in enumerate(self._epochs):
            oldest = min(place[0] for place, own in zip(self._places, self._numbers, strict=True) if own == number)
            self._epochs[number] = {epoch: order for epoch, order in known.items() if epoch >= oldest}
        return torch.from_numpy(rows).to(self._device)

    def _draw(self, number: int) -> npt.NDArray[np.int64]:
        """The order of the next epoch."""
        order: npt.NDArray[np.int64] = torch.randperm(
            self._counts[number], generator=self._generators[number]
        ).numpy()  # fmt: skip
        if self._sizes is None:
            self._epochs[number].clear()
        self._epochs[number][self._n_epochs[number]] = order
        self._n_epochs[number] += 1
        return order

    def _take(self, number: int, n_steps: int) -> npt.NDArray[np.int64]:
        """Batches of one order; (n, B)."""
        count, size = self._counts[number], self._batch_size
        parts, missing = [self._left[number]], n_steps - len(self._left[number])
        while missing > 0:
            order = self._draw(number)
            parts.append(order[: count // size * size].reshape(-1, size))
            missing -= len(parts[-1])
        batches = np.concatenate(parts)
        self._left[number] = batches[n_steps:]
        return batches[:n_steps]

    def _take_own(self, run: int, size: int, n_steps: int) -> npt.NDArray[np.int64]:
        """Batches of one run at its own place; (n, size)."""
        number, parts = self._numbers[run], []
        epoch, place = self._places[run]
        while n_steps > 0:
            whole = min(n_steps, (self._counts[number] - place) // size)
            if whole:
                parts.append(self._epochs[number][epoch][place : place + whole * size].reshape(whole, size))
                place, n_steps = place + whole * size, n_steps - whole
            if n_steps:
                epoch, place = epoch + 1, 0
                if epoch == self._n_epochs[number]:
                    self._draw(number)
        self._places[run] = (epoch, place)
        return np.concatenate(parts)


def hashed_uniform(seeds: Tensor, count: int, shape: Sequence[int]) -> Tensor:
    """Numbers in [0, 1) that depend on seed, count and place alone; (R,), -> (R, *shape), float32.

    Source: the finaliser of MurmurHash3 (public domain), on 64-bit whole numbers that wrap around.
    """
    places = torch.arange(math.prod(shape), device=seeds.device)
    mixed = (seeds.unsqueeze(1) ^ (count * 0x9E3779B97F4A7C1 % (1 << 62))) + places * 0x2545F4914F6CDD1D
    for factor in (-49064778989728563, -4265267296055464877):
        mixed = (mixed ^ ((mixed >> 33) & 0x7FFFFFFF)) * factor
    mixed = mixed ^ ((mixed >> 33) & 0x7FFFFFFF)
    return ((mixed & 0xFFFFFF).to(torch.float32) / (1 << 24)).view(len(seeds), *shape)


def _keep(_layer: int, x: Tensor) -> Tensor:
    return x
