"""Tasks of the study of pruning: two small networks whose widths are to be chosen, and one of seconds.

Found through `registry.load("task", ...)`. Every one begins with learning rate 0.001, weight decay 0.0001 and Adam, and
has neither dropout nor normalisation. `full` is the study's write-up: 50 epochs, batches of 128. `small` is what a
study of five seeds can afford on two cores. Validation is larger than elsewhere, since widths are chosen on it.

| task | network | full | small |
|---|---|---|---|
| `cifar10-pruning` | conv 32, conv 64, pooling, dense 512 | 45,000 / 5,000 / 10,000 | 6,000 / 1,000 / 10,000 |
| `imdb-pruning` | embedding 64, LSTM 128, dense 64, one logit | 22,414 / 2,490 / 25,000 | 22,414 / 1,000 / 5,000 |
| `digits-pruning` | conv 16, conv 32, pooling, dense 64 | 1,077 / 360 / 360 | 1,077 / 360 / 360 |

`smoke` has 640 / 200 / 200 samples, and all digits. `cifar10-pruning` has 6,447,562 parameters and 21,655,936
multiply-adds an image. `imdb-pruning` has 19,669,056 a review of 200 tokens (`full`); its words and tokens by scale
stand in `trimtab.tasks.reviews`. Its output is the number that the write-up's sigmoid is applied to.

An LSTM that is read behind the last word needs many reviews before it learns: with 64 tokens, the validation accuracy
was 0.71 after 10 epochs of 6,000 reviews and 0.77 after 5 of 22,414 (one seed), so that `small` has them all. One of
its 1,000 validation reviews begins with the same 64 tokens as another review of train.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn

from trimtab.tasks import models, reviews, vision
from trimtab.tasks.base import Data, Task, pick

__all__ = ["cifar10_pruning", "digits_pruning", "imdb_pruning"]

_EPOCHS = 50  # of the scale "full"


def cifar10_pruning(scale: str = "small") -> Task:
    """CIFAR-10, Conv2D 32, Conv2D 64, MaxPool, Flatten, Dense 512, Output.

    Args:
        scale: "smoke" (20 steps on 640 images), "small" (10 epochs of 6,000 images, batches of 64) or "full" (50 epochs
            of 45,000, batches of 128).
    """
    sizes, batch_size, steps, every = pick(scale, {
        "smoke": ((640, 200, 200), 32, 20, 5),
        "small": ((6_000, 1_000, 10_000), 64, 10 * 93, 93),
        "full": ((45_000, 5_000, 10_000), 128, _EPOCHS * 351, 351),
    })  # fmt: skip
    load = partial(vision.load_cifar10, sizes=sizes)
    return _task("cifar10-pruning", "cifar10", load, _cifar10_model, (batch_size, steps, every))


def digits_pruning(scale: str = "small") -> Task:
    """Digits of 8 x 8 pixels (bundled with scikit-learn), the form of `cifar10-pruning` with 16, 32 and 64 units.

    Batches are of 32, the set being small.

    Args:
        scale: "smoke" or "small" (20 epochs of 1,077 images, a second), or "full" (50 epochs).
    """
    steps = pick(scale, {"smoke": 20 * 33, "small": 20 * 33, "full": _EPOCHS * 33})
    return _task("digits-pruning", "digits", partial(vision.load_digits, is_image=True), _digits_model, (32, steps, 33))


def imdb_pruning(scale: str = "small") -> Task:
    """IMDb, Embedding 64, LSTM 128 in one direction, Dense 64, one logit.

    Args:
        scale: "smoke" (20 steps on 640 reviews of 64 tokens), "small" (5 epochs of 22,414 reviews of 64 tokens, batches
            of 64) or "full" (50 epochs of 22,414 reviews of 200 tokens, batches of 128).
    """
    sizes, batch_size, steps, every = pick(scale, {
        "smoke": (None, 32, 20, 5),
        "small": ((22_414, 1_000, 5_000), 64, 5 * 350, 350),
        "full": (None, 128, _EPOCHS * 175, 175),
    })  # fmt: skip
    load = partial(reviews.load_imdb, scale=scale, sizes=sizes)
    return _task("imdb-pruning", "imdb", load, _imdb_model, (batch_size, steps, every))


def _task(
    name: str,
    dataset: str,
    load: Callable[[Path | None], Data],
    make_model: Callable[[Data], nn.Module],
    preset: tuple[int, int, int],
) -> Task:
    """A task of 0.05 warm-up; the preset is (batch, steps, steps between validations)."""
    batch_size, steps, every = preset
    return Task(
        name=name,
        dataset=dataset,
        kind="classification",
        load=load,
        make_model=make_model,
        lr=1e-3,
        weight_decay=1e-4,
        batch_size=batch_size,
        total_steps=steps,
        eval_every=every,
        warmup_steps=steps // 20,
    )


def _cifar10_model(data: Data) -> nn.Module:
    return models.two_convolutions(3, 32, int(data.info["n_classes"]), (32, 64, 512))


def _digits_model(data: Data) -> nn.Module:
    return models.two_convolutions(1, 8, int(data.info["n_classes"]), (16, 32, 64))


def _imdb_model(data: Data) -> nn.Module:
    return models.LSTMDense(int(data.info["vocab_size"]), 64, units=128, dense=64)
