"""SmallTask: what one short training run needs, but for its rate and seed: four splits, network, optimizer.

Drawn by `families`, trained many at once by the batched trainer, or one by one, through `to_task`, by the ordinary
loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import nn

from trimtab.errors import InputError, unknown_name
from trimtab.tasks.base import Data, Split, Task
from trimtab.tasks.sequence_models import CharGRU, CharTransformer

__all__ = ["ACTIVATIONS", "SEQUENCE_KINDS", "ModuleNetwork", "Network", "SmallTask"]

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "tanh": nn.Tanh}
SEQUENCE_KINDS = ("attention", "recurrent")
_KINDS = ("attention", "cnn", "mlp", "recurrent")
_SPLITS = ("train", "val", "score", "test")
_OPTIMIZERS = ("adam", "adamw", "sgd")


@dataclass(frozen=True)
class Network:
    """Shape of a small network.

    Attributes:
        kind: "mlp", "cnn", "attention" or "recurrent".
        hidden: Of an MLP the widths of its hidden layers, () for a linear model; of a CNN the channels of each 3 x 3
            convolution (padding 1), which is followed by the activation and max pooling of 2 x 2; then the image is
            flattened for one linear layer; of attention the width of each block, all the same; of a recurrent network
            the units of each GRU layer.
        activation: "relu", "tanh", or "gelu" (the exact one); of attention that of the MLPs in its blocks, of a
            recurrent network always "tanh".
        dropout: Probability, after each hidden layer's activation of an MLP, and before the linear layer of a CNN; 0 of
            the others.
        heads: Of attention, a divisor of its width; 1 of the others.

    Raises:
        UnknownNameError: No such kind or activation.
        InputError: Widths that are no whole numbers of at least 1, none where the kind needs one, a dropout outside
            [0, 1) or where there is no place for it, or heads or an activation that do not fit the kind.
    """

    kind: Literal["mlp", "cnn", "attention", "recurrent"]
    hidden: tuple[int, ...]
    activation: Literal["relu", "tanh", "gelu"]
    dropout: float = 0.0
    heads: int = 1

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise unknown_name("kind of network", self.kind, _KINDS)
        if self.activation not in ACTIVATIONS:
            raise unknown_name("activation", self.activation, ACTIVATIONS)
        if any(not isinstance(width, int) or isinstance(width, bool) or width < 1 for width in self.hidden):
            raise InputError(f"hidden is {self.hidden!r}; expected a tuple of whole numbers of at least 1")
        if self.kind == "cnn" and not self.hidden:
            raise InputError('hidden of a cnn is (); expected at least one convolution, or the kind "mlp"')
        if not self.hidden and self.dropout:
            raise InputError(
                f"dropout is {self.dropout!r} with hidden (); expected 0, a linear model has no place for it"
            )
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout is {self.dropout!r}; expected a number in [0, 1)")
        self._check_sequence_kinds()

    def _check_sequence_kinds(self) -> None:
        if self.kind in SEQUENCE_KINDS and (not self.hidden or self.dropout):
            raise InputError(
                f"hidden {self.hidden!r} and dropout {self.dropout!r} of kind {self.kind!r}; expected one width or "
                "more, and no dropout, for which it has no place"
            )
        if self.kind == "recurrent" and self.activation != "tanh":
            raise InputError(f"activation of a recurrent network is {self.activation!r}; expected 'tanh', a GRU's own")
        if self.kind != "attention":
            if self.heads != 1:
                raise InputError(f"heads is {self.heads!r} of kind {self.kind!r}; expected 1, only attention has more")
            return
        is_whole = isinstance(self.heads, int) and not isinstance(self.heads, bool)
        if len(set(self.hidden)) != 1 or not is_whole or self.heads < 1 or self.hidden[0] % self.heads:
            raise InputError(
                f"hidden {self.hidden!r} and heads {self.heads!r} of attention; expected one width for all blocks, "
                "such as (16, 16), and a number of heads that divides it"
            )

    def make(self, input_shape: tuple[int, ...], n_outputs: int) -> nn.Module:
        """The network as plain torch modules; weights come from torch's default initialisation.

        Args:
            input_shape: (D,) for an MLP, (1, H, W) for a CNN; each pooling halves H and W, rounding down; (T,)
                characters for attention and recurrent networks.
            n_outputs: Logits, or 1 for a number; of sequences also the size of the alphabet.

        Returns:
            A module (B, *input_shape) -> (B, n_outputs).

        Raises:
            InputError: The shape is not one for this kind of network, or too small for so many poolings.
        """
        self.check(input_shape)
        if self.kind == "attention":
            width, n_blocks = self.hidden[0], len(self.hidden)
            activation = ACTIVATIONS[self.activation]
            return CharTransformer(n_outputs, input_shape[0], width, n_blocks, self.heads, activation)
        if self.kind == "recurrent":
            return CharGRU(n_outputs, self.hidden)
        layers: list[nn.Module] = []
        dropout = [nn.Dropout(self.dropout)] if self.dropout > 0 else []
        size = input_shape[0]
        for width in self.hidden:
            if self.kind == "mlp":
                layers += [nn.Linear(size, width), ACTIVATIONS[self.activation](), *dropout]
            else:
                layers += [nn.Conv2d(size, width, 3, padding=1), ACTIVATIONS[self.activation](), nn.MaxPool2d(2)]
            size = width
        if self.kind == "cnn":
            shrink = 2 ** len(self.hidden)
            size *= (input_shape[1] // shrink) * (input_shape[2] // shrink)
            layers += [nn.Flatten(), *dropout]
        return nn.Sequential(*layers, nn.Linear(size, n_outputs))

    def check(self, input_shape: tuple[int, ...]) -> None:
        """Raise an InputError if inputs of this shape do not fit."""
        if self.kind in SEQUENCE_KINDS:
            if len(input_shape) != 1:
                raise InputError(f"inputs of shape {input_shape} for kind {self.kind!r}; expected characters, (T,)")
        elif self.kind == "mlp":
            if len(input_shape) != 1:
                raise InputError(f"inputs of shape {input_shape} for an mlp; expected vectors, (D,)")
        elif len(input_shape) != 3 or input_shape[0] != 1 or min(input_shape[1:]) < 2 ** len(self.hidden):
            least = 2 ** len(self.hidden)
            raise InputError(
                f"inputs of shape {input_shape} for a cnn with {len(self.hidden)} convolutions; expected (1, H, W) "
                f"with H and W at least {least}, since each convolution halves them"
            )


@dataclass(frozen=True)
class ModuleNetwork:
    """A network of one's own, where a `SmallTask` has a `Network`.

    The ordinary loop trains any module. Many at once are trained as copies of one module, which has to work on each row
    of a batch alone, draw no random numbers and change no buffer; see `trimtab.training.functional`.

    Attributes:
        make: (shape of one row, outputs) -> a new module (B, *shape) -> (B, outputs), which draws its first weights
            from torch's global generator. Runs that are trained at once share one and the same.
        name: Says in errors which it is.

    Raises:
        InputError: `make` cannot be called, or the name is none.
    """

    make: Callable[[tuple[int, ...], int], nn.Module]
    name: str
    # What code that reads the shape of a `Network` finds here; dropout of a module's own is the module's.
    kind: ClassVar[str] = "module"
    hidden: ClassVar[tuple[int, ...]] = ()
    activation: ClassVar[str] = "its own"
    dropout: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        if not callable(self.make) or isinstance(self.make, nn.Module):
            raise InputError(
                f"make of a ModuleNetwork is {type(self.make).__name__!r}; expected a function of (input_shape, "
                "n_outputs) that returns a new module each time"
            )
        if not isinstance(self.name, str) or not self.name:
            raise InputError(f"name of a ModuleNetwork is {self.name!r}; expected a text that says which network it is")

    def check(self, input_shape: tuple[int, ...]) -> None:
        """Nothing: what fits is the module's to know."""


@dataclass(frozen=True, eq=False)
class SmallTask:
    """Data, network and optimizer of a short run; rate, horizon and seeds are the run's own.

    Attributes:
        family: "mlp", "image_mlp" (an MLP on flattened images), "wide_mlp" (a wider one on larger images), "cnn",
            "quadratic" (a linear model with squared error), "attention", "recurrent", or a name of one's own.
        source: Where its rows come from.
        kind: "classification" (cross-entropy) or "regression" (mean squared error).
        train: What is trained on; inputs (N, D), (N, 1, H, W) or (N, T) float32, targets (N,) int64 classes or
            float32. In (N, T) stand characters, whole numbers of 0 to n_outputs - 1; the target is the next one.
        val: What may be watched.
        score: What a controller in training is judged by, at the end of the run; never watched.
        test: What a report is made from.
        n_outputs: Classes, or 1 for regression.
        network: Its shape, or a module of one's own.
        optimizer: "sgd", "adam" or "adamw"; as `trimtab.training.loop.make_optimizer` makes them.
        momentum: Of SGD; 0 for the others.
        betas: Of Adam and AdamW.
        weight_decay: Added to the gradient by SGD and Adam; decoupled, and on matrices and filters alone, in AdamW.
        batch_size: Rows of an optimizer step.
        drawn: By name, what else was drawn: label noise, condition number, and so on; for records and tests.

    Raises:
        UnknownNameError: No such optimizer or kind.
        InputError: Splits that do not fit each other, the network or the batch size; numbers out of range.
    """

    family: str
    source: str
    kind: Literal["classification", "regression"]
    train: Split
    val: Split
    score: Split
    test: Split
    n_outputs: int
    network: Network | ModuleNetwork
    optimizer: Literal["sgd", "adam", "adamw"]
    momentum: float
    betas: tuple[float, float]
    weight_decay: float
    batch_size: int
    drawn: Mapping[str, float | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in ("classification", "regression"):
            raise unknown_name("kind of task", self.kind, ("classification", "regression"))
        if self.optimizer not in _OPTIMIZERS:
            raise unknown_name("optimizer", self.optimizer, _OPTIMIZERS)
        if self.kind == "regression" and self.n_outputs != 1:
            raise self._error(f"n_outputs is {self.n_outputs} for a regression; expected 1")
        for name in _SPLITS:
            self._check_split(name, getattr(self, name))
        self.network.check(self.input_shape)
        if self.network.kind in SEQUENCE_KINDS:
            self._check_characters()
        if not 1 <= self.batch_size <= len(self.train.inputs):
            rows = len(self.train.inputs)
            raise self._error(f"batch_size is {self.batch_size}; expected 1 to {rows}, the rows of train")
        numbers = {"momentum": self.momentum, "betas[0]": self.betas[0], "betas[1]": self.betas[1]}
        for name, value in numbers.items():
            if not 0 <= value < 1:
                raise self._error(f"{name} is {value!r}; expected a number in [0, 1)")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise self._error(f"weight_decay is {self.weight_decay!r}; expected a finite number of at least 0")

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(D,), (1, H, W) or (T,); of a module of one's own anything."""
        return tuple(self.train.inputs.shape[1:])

    @property
    def n_features(self) -> int:
        """Numbers in one row: D, H x W, or T."""
        return math.prod(self.input_shape)

    def to_task(self, *, total_steps: int, lr: float = 1e-3, eval_every: int | None = None) -> tuple[Task, Data]:
        """The same run for `trimtab.training.TrainingLoop`, which trains exactly this network.

        The loop has three splits; score stays here.

        Args:
            total_steps: Budget in optimizer steps.
            lr: Initial learning rate.
            eval_every: Optimizer steps between two validations; None: a twentieth of the budget.

        Returns:
            The task, whose `load` gives the data whatever the folder, and the data.

        Raises:
            InputError: A number that a task cannot hold.
        """
        sizes = {"n_features": self.n_features}
        if self.kind == "classification":
            sizes["n_classes"] = self.n_outputs
        data = Data(self.train, self.val, self.test, sizes)
        task = Task(
            name=f"{self.family}/{self.source}",
            dataset=self.source,
            kind=self.kind,
            load=partial(_given, data),
            make_model=partial(_model, self.network, self.input_shape, self.n_outputs),
            optimizer=self.optimizer,
            lr=lr,
            weight_decay=self.weight_decay,
            betas=self.betas,
            momentum=self.momentum,
            batch_size=self.batch_size,
            total_steps=total_steps,
            eval_every=max(1, total_steps // 20) if eval_every is None else eval_every,
        )
        return task, data

    def _check_split(self, name: str, split: Split) -> None:
        inputs, targets = split.inputs, split.targets
        wanted = torch.int64 if self.kind == "classification" else torch.float32
        if inputs.dtype != torch.float32 or targets.dtype != wanted:
            raise self._error(f"{name} holds {inputs.dtype} and {targets.dtype}; expected torch.float32 and {wanted}")
        if inputs.shape[1:] != self.train.inputs.shape[1:] or targets.shape != inputs.shape[:1] or not len(inputs):
            given = f"inputs of shape {tuple(inputs.shape)} and targets of shape {tuple(targets.shape)}"
            wanted_shape = f"(N, {', '.join(map(str, self.input_shape))})"
            raise self._error(f"{name} has {given}; expected {wanted_shape} and (N,) with N at least 1")
        if self.kind == "classification" and not (int(targets.min()) >= 0 and int(targets.max()) < self.n_outputs):
            raise self._error(f"{name} has classes outside 0..{self.n_outputs - 1}, of which n_outputs speaks")

    def _check_characters(self) -> None:
        if self.kind != "classification":
            raise self._error(f"kind is {self.kind!r} with a network of kind {self.network.kind!r}; it tells a class")
        for name in _SPLITS:
            inputs = getattr(self, name).inputs
            if not bool(((inputs >= 0) & (inputs < self.n_outputs) & (inputs == inputs.floor())).all()):
                raise self._error(
                    f"{name} has inputs that are no characters of a network of kind {self.network.kind!r}; expected "
                    f"whole numbers of 0 to {self.n_outputs - 1}, n_outputs being the size of the alphabet"
                )

    def _error(self, text: str) -> InputError:
        return InputError(f"small task {self.family}/{self.source}: {text}")


def _given(data: Data, data_dir: Path | None) -> Data:
    """The data whatever the folder: nothing is read."""
    return data


def _model(network: Network | ModuleNetwork, input_shape: tuple[int, ...], n_outputs: int, data: Data) -> nn.Module:
    return network.make(input_shape, n_outputs)
