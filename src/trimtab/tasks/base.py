"""Task: what is trained, on what, with which settings and for how long.

Made by the functions behind `registry.load("task", name)`, used by `trimtab.training` and by the experiments.
A task function takes a scale ("smoke", "small" or "full") and returns a frozen `Task`; nothing is read or
downloaded before `task.load` is called.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import InputError, unknown_name
from trimtab.tasks.augmentation import Augmentation

__all__ = ["Data", "Split", "Task", "pick"]

Kind = Literal["classification", "regression", "language-modelling"]
_KINDS = ("classification", "regression", "language-modelling")
_OPTIMIZERS = ("adam", "adamw", "sgd")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Split:
    """One part of a data set, on the CPU; shared between runs, so never changed in place.

    Attributes:
        inputs: (B, ...) float32; (B, L) int64 for sentences; for text that is continued one row of tokens (N,), uint8
            (int64 beyond 256 symbols).
        targets: (B,) int64 classes or float32 numbers; empty for text, where the next token is the target.
    """

    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Data:
    """The three parts of a data set, and what a model must know of it.

    Attributes:
        train: What is trained on.
        val: What is watched while training.
        test: What is read once, at the end.
        info: Numbers that describe the set: n_classes, n_features, vocab_size, n_tokens.
    """

    train: Split
    val: Split
    test: Split
    info: Mapping[str, int | float | str]


@dataclass(frozen=True)
class Task:
    """Data, model, loss and budget of a training run.

    Attributes:
        name: Name in the registry.
        dataset: Name of the folder under the data directory; several tasks may share one.
        kind: Decides the loss and the measures.
        load: Reads the data from a data directory, or from where it is bundled or published (None).
        make_model: Builds the network for the data; it draws its weights from torch's global generator,
            which the loop lends it.
        optimizer: "sgd", "adam" or "adamw".
        lr: Initial learning rate.
        weight_decay: Decay; with "adamw" on tensors of two and more dimensions alone.
        betas: Of Adam and AdamW.
        momentum: Of SGD.
        batch_size: Samples (or windows of text) in one micro-batch.
        total_steps: Budget in optimizer steps.
        eval_every: Optimizer steps between two validations.
        grad_clip: Largest norm of the gradient; None leaves it alone.
        accumulation: Micro-batches averaged into one optimizer step.
        min_lr_factor: Where schedules end, as a share of the peak rate.
        warmup_steps: Linear warm-up of the schedules that have one.
        block_size: Tokens in a window of text.
        eval_batches: Batches of fixed windows that an evaluation of text reads (train and val).
        test_batches: The same for the test split, which is read once.
        augmentation: What may be done to its images; None where there are none.
        is_augmented: Whether it is done, to train batches alone.
    """

    name: str
    dataset: str
    kind: Kind
    load: Callable[[Path | None], Data]
    make_model: Callable[[Data], nn.Module]
    optimizer: str = "adam"
    lr: float = 1e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.0
    batch_size: int = 32
    total_steps: int = 100
    eval_every: int = 10
    grad_clip: float | None = None
    accumulation: int = 1
    min_lr_factor: float = 0.0
    warmup_steps: int = 0
    block_size: int | None = None
    eval_batches: int = 20
    test_batches: int = 100
    augmentation: Augmentation | None = None
    is_augmented: bool = False

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise unknown_name("kind of task", self.kind, _KINDS)
        if self.optimizer not in _OPTIMIZERS:
            raise unknown_name("optimizer", self.optimizer, _OPTIMIZERS)
        for field in (
            "batch_size",
            "total_steps",
            "eval_every",
            "accumulation",
            "eval_batches",
            "test_batches",
        ):
            self._check(field, _is_count(getattr(self, field)), "a whole number of at least 1")
        self._check("lr", _is_number(self.lr) and self.lr > 0, "a finite number above 0")
        for field in ("weight_decay", "momentum", "min_lr_factor"):
            value = getattr(self, field)
            self._check(field, _is_number(value) and value >= 0, "a finite number of at least 0")
        betas = self.betas
        is_pair = isinstance(betas, tuple) and len(betas) == 2 and all(_is_number(b) and 0 <= b < 1 for b in betas)
        self._check("betas", is_pair, "two numbers in [0, 1)")
        clip = self.grad_clip
        self._check("grad_clip", clip is None or (_is_number(clip) and clip > 0), "a finite number above 0, or None")
        self._check("warmup_steps", self.warmup_steps == 0 or _is_count(self.warmup_steps), "0 or a whole number")
        needs_block = self.kind == "language-modelling"
        self._check(
            "block_size",
            _is_count(self.block_size) if needs_block else self.block_size is None,
            "a whole number of at least 1 for text, and None for anything else",
        )

        self._check("augmentation", isinstance(self.augmentation, Augmentation | None), "an Augmentation, or None")
        can_be = isinstance(self.is_augmented, bool) and (self.augmentation is not None or not self.is_augmented)
        self._check("is_augmented", can_be, "False, since it has no augmentation, or True with one")

    def _check(self, field: str, is_right: bool, expected: str) -> None:
        if not is_right:
            raise InputError(f"task {self.name!r}: {field} is {getattr(self, field)!r}; expected {expected}")

    def replace(self, **changes: Any) -> Task:
        """This task with some fields changed.

        Args:
            **changes: Field names and their new values.

        Raises:
            UnknownNameError: No field has this name.
            InputError: A value that the field cannot hold.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for key in changes:
            if key not in known:
                raise unknown_name("field of a task", key, known)
        return dataclasses.replace(self, **changes)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of a batch, 0-dim.

        A classifier with one output, (B, 1), tells two classes apart: the output is the logit of class 1, and the loss
        is the binary cross-entropy, equal to the cross-entropy of the two logits 0 and that one.

        Args:
            outputs: (B, C) logits, (B,) or (B, 1) predictions, or (B, T, V) logits of text.
            targets: (B,) classes or numbers, or (B, T) next tokens.
        """
        if self.kind == "regression":
            return F.mse_loss(outputs.reshape(targets.shape), targets)
        if self.kind == "language-modelling":
            return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())
        if _is_one_logit(outputs):
            return F.binary_cross_entropy_with_logits(outputs.squeeze(1), targets.to(outputs.dtype))
        return F.cross_entropy(outputs, targets)

    def predicted_classes(self, outputs: Tensor, n_classes: int) -> Tensor:
        """The class that a classifier gives each sample; (B,) int64.

        Args:
            outputs: (B, C) logits, or (B, 1) logits of class 1, as for `loss`.
            n_classes: How many there are.

        Raises:
            InputError: There is one output a sample, and the classes are not two.
        """
        if not _is_one_logit(outputs):
            return outputs.argmax(dim=1)
        if n_classes != 2:
            raise InputError(
                f"task {self.name!r}: the network has one output, which tells two classes apart, and there are "
                f"{n_classes}; give it {n_classes} outputs"
            )
        return (outputs.squeeze(1) > 0).long()


def pick(scale: str, choices: Mapping[str, _T]) -> _T:
    """The choice of a scale.

    Raises:
        UnknownNameError: There is no such scale.
    """
    if scale not in choices:
        raise unknown_name("scale", scale, choices)
    return choices[scale]


def _is_one_logit(outputs: Tensor) -> bool:
    return outputs.dim() == 2 and outputs.shape[1] == 1


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
