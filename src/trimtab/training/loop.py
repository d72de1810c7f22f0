"""TrainingLoop: one training run that can be stepped, evaluated, saved and restored to the bit.

Called by the experiments and by environments; whoever controls the run writes to `loop.optimizer` between
steps. The caller owns the clock: the loop counts steps and stops nobody.

The budget is one of training FLOPs: those of the task's `total_steps` at the task's own batch size, accumulation and
network. It is kept in optimizer steps of that cost (`spent`, `step_cost`), so that where nothing changes the cost of a
step it is a number of steps, and no FLOP has to be counted.

What is drawn comes from one seed and four independent streams, "data order", "augmentation", "weights" and "dropout",
so the same seed gives the same start whatever is done to the run later. No global generator is seeded: it is lent to
the model for drawing its weights, and for each step if the model has dropout, and put back. A model that
draws from it in other ways (noise in `forward`) is outside what is saved.

On CUDA the state is restored to the bit too; that two runs from one state stay equal to the bit needs kernels
that are deterministic, which PyTorch leaves to the process (`torch.use_deterministic_algorithms`).
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from trimtab.cost import count_cost
from trimtab.errors import InputError, unknown_name
from trimtab.out_of_memory import count_rows, free_memory, half_of, split_batch
from trimtab.places import dropout_places
from trimtab.seeding import derive_seed, scoped_global_rng, torch_generator
from trimtab.surgery import Surgeon
from trimtab.tasks.base import Data, Split, Task
from trimtab.training.batches import (
    Batches,
    EpochBatches,
    WindowBatches,
    augmentation_of,
    fixed_batches,
    fixed_windows,
)
from trimtab.training.own_optimizers import evaluated_weights

__all__ = ["TrainingLoop", "make_optimizer"]

_PRECISIONS = ("auto", "bf16", "float32")
_SPLITS = ("test", "train", "val")
ROUNDING = 1e-6  # of an optimizer step: sums of costs such as 2 / 3 are not exact
_SETTINGS = ("accumulation", "batch_size", "grad_clip", "max_batch_size")  # what may differ from the task's


class TrainingLoop:
    """One training run of a task.

    Args:
        task: What is trained, and how.
        data: What `task.load` gave; not changed, so runs may share it.
        seed: Root seed of data order, initial weights and dropout.
        device: "cpu", "cuda" or "cuda:N".
        precision: "float32"; "bf16" for autocast; "auto" is bf16 where the device is CUDA and has it.

    Attributes:
        model: The network, in training mode between calls.
        optimizer: A plain torch optimizer; what is written to its param groups acts at the next step.
        precision: What "auto" came to.
        steps_done: Optimizer steps taken.
        samples_seen: Samples (or windows) trained on.
        spent: What of the budget is used up, in optimizer steps of the task's own cost.
        accumulation: Micro-batches averaged into one optimizer step; may be written between steps, as may
            `grad_clip` and, through `resize`, `batch_size`.
        grad_clip: Largest norm of the gradient; None leaves it alone.
        max_batch_size: What memory was found to hold; None where it never ran out.
        test_reads: How often the test split was evaluated.

    Raises:
        InputError: A device that is not there, or a train split smaller than a batch.
        UnknownNameError: No such precision.
    """

    def __init__(self, task: Task, data: Data, *, seed: int, device: str = "cpu", precision: str = "float32") -> None:
        self.task = task
        self.device = _find_device(device)
        self.precision = _choose_precision(precision, self.device)
        self.steps_done = 0
        self.samples_seen = 0
        self.spent = 0.0
        self.test_reads = 0
        self.accumulation = task.accumulation
        self.grad_clip = task.grad_clip
        self.max_batch_size: int | None = None
        self._splits = {"train": data.train, "val": data.val, "test": data.test}
        for name, split in self._splits.items():
            self._splits[name] = Split(split.inputs.to(self.device), split.targets.to(self.device))
        self._n_classes = int(data.info["n_classes"]) if task.kind == "classification" else 0
        # Drawn on the CPU, so that every device starts from the same weights.
        with scoped_global_rng([torch_generator(seed, "weights").get_state()], torch.device("cpu")):
            model = task.make_model(data)
        self.model = model.to(self.device).train()
        self.optimizer = make_optimizer(task, self.model, is_fused=self.device.type == "cuda")
        self._batches = self._make_batches(seed)
        self._dropout_states = _generator_states(derive_seed(seed, "dropout"), self.device)
        self._dropout_places = dropout_places(self.model)
        self._surgeon: Surgeon | None = None
        # By the sizes of its parameters a network is told from what it was before units or layers were changed.
        self._sizes = self._first_sizes = self._parameter_sizes()
        self._flops: dict[tuple[int, ...], int] = {}
        self._data = data

    def _make_batches(self, seed: int) -> Batches:
        generator = torch_generator(seed, "data order")
        train = self._splits["train"]
        if self.task.block_size is not None:
            return WindowBatches(train.inputs, self.task.block_size, self.task.batch_size, generator)
        return EpochBatches(train, self.task.batch_size, generator, augmentation_of(self.task, train, seed))

    @property
    def total_steps(self) -> int:
        """Budget in optimizer steps of the task's own cost."""
        return self.task.total_steps

    @property
    def step_cost(self) -> float:
        """What the next optimizer step costs: its training FLOPs over those of a step as the task has it."""
        self._sizes = self._parameter_sizes()
        return self._cost()

    def _cost(self) -> float:
        task = self.task
        samples = self.batch_size * self.accumulation / (task.batch_size * task.accumulation)
        if self._sizes == self._first_sizes:
            return samples
        return samples * self._example_flops(self._sizes) / self._example_flops(self._first_sizes)

    @property
    def flops_budget(self) -> int:
        """Training FLOPs of the whole budget, as `trimtab.cost` counts them."""
        return self._in_flops(self.total_steps)

    @property
    def flops_used(self) -> int:
        """Training FLOPs so far."""
        return self._in_flops(self.spent)

    def _in_flops(self, steps: float) -> int:
        samples = steps * self.task.batch_size * self.task.accumulation
        return round(samples * self._example_flops(self._first_sizes) / min(self.task.batch_size, self.n_samples))

    def _example_flops(self, sizes: tuple[int, ...]) -> int:
        """Training FLOPs of one pass over the example by the present network, or by the one at the start.

        Counted once for each shape of the network: all that is counted is in proportion to the samples, so that one
        count serves every batch size.
        """
        if sizes not in self._flops:
            model = self.model
            if sizes != self._parameter_sizes():  # the one at the start is there no more
                with scoped_global_rng([torch.Generator().get_state()], torch.device("cpu")):
                    model = self.task.make_model(self._data).to(self.device)
            with self._autocast():
                self._flops[sizes] = count_cost(model, self._batches.example(self.task.batch_size)).step_flops
        return self._flops[sizes]

    def _parameter_sizes(self) -> tuple[int, ...]:
        return tuple([p.numel() for group in self.optimizer.param_groups for p in group["params"]])

    @property
    def epoch(self) -> float:
        """Passes over the train split so far; for text, in tokens."""
        return self.samples_seen / self._batches.epoch_samples

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the train split at the task's own batch size, rounded up."""
        return math.ceil(self._batches.epoch_samples / (self.task.batch_size * self.task.accumulation))

    @property
    def batch_size(self) -> int:
        """Samples (or windows) in the next micro-batch."""
        return self._batches.batch_size

    @property
    def n_samples(self) -> int:
        """The largest batch that the train split can give."""
        return self._batches.n_samples

    def resize(self, batch_size: int) -> None:
        """Take micro-batches of this size from the next step on, in the middle of an epoch too.

        Raises:
            InputError: It is no whole number from 1 to the number of samples, or more than memory was found to hold.
        """
        most = self.n_samples if self.max_batch_size is None else min(self.n_samples, self.max_batch_size)
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or not 1 <= batch_size <= most:
            raise InputError(f"batch_size is {batch_size!r}; expected a whole number from 1 to {most}")
        self._batches.batch_size = batch_size

    @property
    def surgeon(self) -> Surgeon:
        """What changes the shape of the model; all who do so use this one, so that `state_dict` follows.

        Raises:
            InputError: The model cannot be traced.
        """
        if self._surgeon is None:
            task, inputs = self.task, self._splits["train"].inputs
            if task.block_size is None:
                inputs = inputs[: task.batch_size]
            else:
                inputs, _ = next(fixed_windows(inputs, task.block_size, task.batch_size, 1))
            self._surgeon = Surgeon(self.model, inputs, self.optimizer)
        return self._surgeon

    def is_over(self) -> bool:
        """Whether the budget is used up: what is left does not pay for another optimizer step."""
        return self.spent + self.step_cost > self.total_steps + ROUNDING

    def step(self) -> Tensor:
        """One optimizer step; gradients stay readable until the next.

        Where memory runs out, the same samples are put through in micro-batches of half the size, and half is the
        largest batch size from then on.

        Returns:
            Mean loss of its micro-batches, 0-dim, detached, on the device; nothing waits for the device.

        Raises:
            torch.OutOfMemoryError: A single sample does not fit.
        """
        self._clear_gradients()
        self._sizes = self._parameter_sizes()
        cost = self._cost()
        if any(getattr(module, name) > 0 for module, name in self._dropout_places):
            with scoped_global_rng(self._dropout_states, self.device):
                loss = self._gradients()
        else:
            loss = self._gradients()
        if self.grad_clip is not None:
            clip_grad_norm_(self.model.parameters(), self.grad_clip)
        self.optimizer.step()
        self.steps_done += 1
        self.spent += cost
        return loss

    def _clear_gradients(self) -> None:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def _gradients(self) -> Tensor:
        """Gradients of the mean loss over the step's micro-batches, and that loss."""
        count, size = self.accumulation, self.batch_size
        taken: list[tuple[Tensor, Tensor]] = []
        losses: list[Tensor] = []
        is_held = False
        try:
            for _ in range(count):
                taken.append(self._batches.next())
                losses.append(self._backward(taken[-1], count))
            is_held = True
        except torch.OutOfMemoryError:
            if size < 2:
                raise
        self.samples_seen += size * count
        if not is_held:  # outside of the handler: the error holds what filled the memory
            taken += [self._batches.next() for _ in range(count - len(taken))]
            return self._in_parts(taken)
        return losses[0] if count == 1 else torch.stack(losses).mean()

    def _backward(self, batch: tuple[Tensor, Tensor], divisor: float) -> Tensor:
        """Add the gradients of the loss / divisor; the loss itself, detached."""
        inputs, targets = batch
        with self._autocast():
            loss = self.task.loss(self.model(inputs), targets)
        (loss if divisor == 1 else loss / divisor).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _in_parts(self, taken: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The same gradients and loss from smaller micro-batches, after memory ran out."""
        total = sum(map(count_rows, taken))
        while True:
            size = self.max_batch_size = half_of(self.batch_size, self.max_batch_size)
            self._batches.batch_size = size
            self._clear_gradients()
            free_memory()
            parts = [part for batch in taken for part in split_batch(batch, size)]
            shares = [count_rows(part) / total for part in parts]
            try:
                losses = [self._backward(part, 1 / share) for part, share in zip(parts, shares, strict=True)]
            except torch.OutOfMemoryError:
                if size < 2:
                    raise
                continue
            return torch.stack([loss * share for loss, share in zip(losses, shares, strict=True)]).sum()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def evaluate(self, split: str) -> dict[str, float]:
        """Measure the model; dropout is off, and neither weights nor random state move.

        Args:
            split: "train", "val" or "test". For text, fixed windows of it; else all of it.

        Returns:
            loss, n_samples, n_batches; accuracy and f1 (mean over the classes that occur) of a
            classification; mse of a regression; n_tokens of text.

        Raises:
            UnknownNameError: No such split.
        """
        if split not in _SPLITS:
            raise unknown_name("split", split, _SPLITS)
        self.test_reads += split == "test"
        self.model.eval()
        try:
            with torch.no_grad(), scoped_global_rng(None, self.device), evaluated_weights(self.optimizer):
                return self._measure(split)
        finally:
            self.model.train()

    def _measure(self, split: str) -> dict[str, float]:
        task, part = self.task, self._splits[split]
        if task.block_size is None:
            batches = fixed_batches(part)
        else:
            count = task.test_batches if split == "test" else task.eval_batches
            batches = fixed_windows(part.inputs, task.block_size, task.batch_size, count)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        table = torch.zeros(self._n_classes**2, dtype=torch.int64, device=self.device)
        n_samples = n_batches = 0
        for inputs, targets in batches:
            with self._autocast():
                outputs = self.model(inputs)
                total += task.loss(outputs, targets).double() * len(inputs)
            if self._n_classes:
                cells = targets * self._n_classes + task.predicted_classes(outputs, self._n_classes)
                table += torch.bincount(cells, minlength=self._n_classes**2)
            n_samples += len(inputs)
            n_batches += 1
        loss = float(total) / n_samples if n_samples else math.nan
        measured = {"loss": loss, "n_samples": n_samples, "n_batches": n_batches}
        if task.kind == "regression":
            measured["mse"] = loss
        if task.block_size is not None:
            measured["n_tokens"] = n_samples * task.block_size
        if self._n_classes:
            measured |= _scores(table.view(self._n_classes, self._n_classes).double().cpu())
        return measured

    def state_dict(self) -> dict[str, Any]:
        """Everything the rest of the run depends on, copied: further steps do not change it."""
        state: dict[str, Any] = _copy({
            "task": self.task.name,
            "steps_done": self.steps_done,
            "samples_seen": self.samples_seen,
            "spent": self.spent,
            "test_reads": self.test_reads,
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "batches": self._batches.state_dict(),
            "dropout": self._dropout_states,
            "settings": {name: getattr(self, name) for name in _SETTINGS},
            "plan": [] if self._surgeon is None else self._surgeon.plan,
        })  # fmt: skip
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, to the bit; the state is copied and may be loaded again.

        Args:
            state: What `state_dict` of a loop of the same task, on the same kind of device, gave.

        Raises:
            InputError: The state is of another task, model or device; the loop may then hold part of it.
        """
        if state.get("task") != self.task.name:
            raise InputError(f"the state is of task {state.get('task')!r}, the loop runs {self.task.name!r}")
        if len(state["dropout"]) != len(self._dropout_states):
            raise InputError(f"the state was saved on another kind of device than {self.device}; go on there")
        state = _copy(state)  # an optimizer keeps the tensors it is given, and changes them
        if state.get("plan") or self._surgeon is not None:
            self.surgeon.follow(state.get("plan", []))
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise InputError(f"the state does not fit the model of task {self.task.name!r}: {error}") from error
        self._batches.load_state_dict(state["batches"])
        self._dropout_states = state["dropout"]
        settings = state["settings"]
        self.accumulation, self.grad_clip = settings["accumulation"], settings["grad_clip"]
        self.max_batch_size, self._batches.batch_size = settings["max_batch_size"], settings["batch_size"]
        self.steps_done = state["steps_done"]
        self.samples_seen = state["samples_seen"]
        self.spent = state["spent"]
        self.test_reads = state["test_reads"]


def make_optimizer(task: Task, model: nn.Module, *, is_fused: bool = False) -> torch.optim.Optimizer:
    """The plain torch optimizer that a task names.

    AdamW has nanoGPT's two groups: tensors of two and more dimensions with weight decay, the rest without.
    The others have one group.

    Args:
        task: Names the optimizer and its settings.
        model: Whose parameters that learn are optimized.
        is_fused: Ask for the fused implementation (CUDA); else torch chooses.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fused = True if is_fused else None
    if task.optimizer == "sgd":
        return torch.optim.SGD(parameters, task.lr, task.momentum, weight_decay=task.weight_decay, fused=fused)
    if task.optimizer == "adam":
        return torch.optim.Adam(parameters, task.lr, task.betas, weight_decay=task.weight_decay, fused=fused)
    groups = [
        {
            "params": [parameter for parameter in parameters if parameter.dim() >= 2],
            "weight_decay": task.weight_decay,
        },
        {"params": [parameter for parameter in parameters if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], task.lr, task.betas, fused=fused)


def _find_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"unknown device {name!r}; expected cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name!r} cannot be used; expected cpu, cuda or cuda:N")
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            raise InputError(
                f"there is no device {name!r}: torch sees {torch.cuda.device_count()} CUDA devices; use cpu"
            )
        return torch.device("cuda", device.index if device.index is not None else torch.cuda.current_device())
    return device


def _choose_precision(name: str, device: torch.device) -> str:
    if name not in _PRECISIONS:
        raise unknown_name("precision", name, _PRECISIONS)
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        return "bf16" if has_bf16 else "float32"
    if name == "bf16" and device.type == "cuda" and not has_bf16:
        raise InputError(f"device {device} has no bf16; use precision float32 or auto")
    return name


def _generator_states(seed: int, device: torch.device) -> list[Tensor]:
    """States as `scoped_global_rng` wants them: the CPU's, and the device's if it is CUDA."""
    states = [torch.Generator().manual_seed(seed).get_state()]
    if device.type == "cuda":
        states.append(torch.Generator(device).manual_seed(seed).get_state())
    return states


def _scores(table: Tensor) -> dict[str, float]:
    """Accuracy and macro F1 from counts of (true class, predicted class); (C, C)."""
    right = table.diagonal()
    both = table.sum(0) + table.sum(1)  # times predicted plus times true
    occurs = both > 0
    return {
        "accuracy": float(right.sum() / table.sum()),
        "f1": float((2 * right[occurs] / both[occurs]).mean()),
    }


def _copy(value: Any) -> Any:
    """A nest of dicts, lists and tuples with every tensor cloned."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copy(item) for item in value)
    return value
