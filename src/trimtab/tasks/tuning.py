"""Tasks of the study of adaptive tuning: a CNN, a bidirectional LSTM and a fully connected network, each begun alike.

Found through `registry.load("task", ...)`. Every one begins with learning rate 0.001, batches of 32, dropout 0.5, two
layers, 64 units and Adam, and on every one the knobs `lr`, `weight_decay`, `optimizer`, `batch_size`, `dropout`,
`layers` and `units` have something to move. Weight decay begins at 1e-6, the lower bound of its knob, which moves no
decay of 0.

| task | data | network | 64 units are |
|---|---|---|---|
| `cifar10-tuning` | as `cifar10-cnn` | `conv_dense` | filters of each convolution; units of the dense layer |
| `digits-tuning` | as `digits-cnn` (bundled) | `conv_dense` | the same |
| `imdb-tuning` | `trimtab.tasks.reviews` | `BiLSTMDense` | those of each direction; 128 dense ones read both |
| `sst2-tuning` | as `sst2-bilstm` | `BiLSTMDense` | the same |
| `titanic-tuning` | as `titanic-fcnn` | `mlp` | those of each dense layer |

The two layers are those that the knob `layers` counts: the two convolutions (the dense layers behind them are a
`trimtab.surgery.Head`), the LSTM and the dense layer, the two dense layers. `units` is that of the first of them; the
others keep their ratio to it.

Scales: "smoke" is 20 steps; "small" is about ten seconds on one core and 20 validations; "full" is 50 epochs, with a
validation after each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn

from trimtab.tasks import models, reviews, sentences, tabular, vision
from trimtab.tasks.base import Data, Task, pick

__all__ = ["cifar10_tuning", "digits_tuning", "imdb_tuning", "sst2_tuning", "titanic_tuning"]

UNITS = 64
DROPOUT = 0.5
EMBEDDING = 64
_SMOKE = (20, 4)  # steps, and steps between validations
_EPOCHS = 50  # of the scale "full"


def cifar10_tuning(scale: str = "small") -> Task:
    """CIFAR-10, Conv2D, MaxPool, Conv2D, MaxPool, Flatten, Dense, Output.

    The first convolution has stride 2: at stride 1 a step costs four times as much, and a run of the same seconds ends
    worse.

    Args:
        scale: "smoke" (20 steps on 640 images), "small" (600 steps on 6,000 images) or "full" (50 epochs of 45,000).
    """
    sizes, steps = pick(scale, {
        "smoke": ((640, 200, 200), _SMOKE),
        "small": ((6_000, 400, 1_000), (600, 30)),
        "full": ((45_000, 5_000, 10_000), _epochs_of(45_000)),
    })  # fmt: skip
    return _task("cifar10-tuning", "cifar10", partial(vision.load_cifar10, sizes=sizes), _cifar10_model, steps)


def digits_tuning(scale: str = "small") -> Task:
    """Digits of 8 x 8 pixels (bundled with scikit-learn), the network of `cifar10-tuning` at stride 1.

    Args:
        scale: "smoke" (20 steps), "small" (660 steps, 20 epochs) or "full" (50 epochs of 1,077).
    """
    steps = pick(scale, {"smoke": _SMOKE, "small": (660, 33), "full": _epochs_of(1_077)})
    return _task("digits-tuning", "digits", partial(vision.load_digits, is_image=True), _digits_model, steps)


def imdb_tuning(scale: str = "small") -> Task:
    """IMDb, Embedding, bidirectional LSTM, Dense, Output.

    Args:
        scale: "smoke" (20 steps), "small" (240 steps on 6,000 reviews of 64 tokens) or "full" (50 epochs of 22,414
            reviews of 200 tokens).
    """
    steps = pick(scale, {"smoke": _SMOKE, "small": (240, 12), "full": _epochs_of(22_414)})
    return _task("imdb-tuning", "imdb", partial(reviews.load_imdb, scale=scale), _bilstm_model, steps)


def sst2_tuning(scale: str = "small") -> Task:
    """SST-2, the network of `imdb-tuning`; the benchmark on a second set.

    Args:
        scale: "smoke" (20 steps), "small" (600 steps on 6,000 phrases) or "full" (50 epochs of 60,615).
    """
    steps = pick(scale, {"smoke": _SMOKE, "small": (600, 30), "full": _epochs_of(60_615)})
    return _task("sst2-tuning", "sst2", partial(sentences.load_sst2, scale=scale), _bilstm_model, steps)


def titanic_tuning(scale: str = "small") -> Task:
    """Titanic, Dense, Dense, Output.

    Args:
        scale: "smoke" (20 steps), "small" (800 steps, 50 epochs, 20 validations) or "full" (50 epochs of 535).
    """
    steps = pick(scale, {"smoke": _SMOKE, "small": (800, 40), "full": _epochs_of(535)})
    return _task("titanic-tuning", "titanic", tabular.load_titanic, _titanic_model, steps)


def _epochs_of(n_samples: int) -> tuple[int, int]:
    """Steps of all epochs, and of one; the samples left over at an epoch's end are not trained on."""
    return _EPOCHS * (n_samples // 32), n_samples // 32


def _task(
    name: str,
    dataset: str,
    load: Callable[[Path | None], Data],
    make_model: Callable[[Data], nn.Module],
    steps: tuple[int, int],
) -> Task:
    return Task(
        name=name,
        dataset=dataset,
        kind="classification",
        load=load,
        make_model=make_model,
        lr=1e-3,
        weight_decay=1e-6,
        batch_size=32,
        total_steps=steps[0],
        eval_every=steps[1],
        warmup_steps=steps[0] // 20,
    )


def _cifar10_model(data: Data) -> nn.Module:
    return models.conv_dense(3, 32, 10, units=UNITS, stride=2, dropout=DROPOUT)


def _digits_model(data: Data) -> nn.Module:
    return models.conv_dense(1, 8, 10, units=UNITS, dropout=DROPOUT)


def _bilstm_model(data: Data) -> nn.Module:
    return models.BiLSTMDense(int(data.info["vocab_size"]), EMBEDDING, 2, units=UNITS, dropout=DROPOUT)


def _titanic_model(data: Data) -> nn.Module:
    return models.mlp(int(data.info["n_features"]), [UNITS, UNITS], 2, dropout=DROPOUT)
