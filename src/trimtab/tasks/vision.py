"""Image tasks: digits (bundled with scikit-learn) and MNIST.

Found through `registry.load("task", ...)`. Splits are fixed: they depend on no run's seed.

| set | scale | train / val / test |
|---|---|---|
| digits | all | 1077 / 360 / 360, stratified |
| MNIST | full | 50,000 / 10,000 cut from its train part, stratified / its 10,000 test images |
| MNIST | small | 6,000 / 500 / 2,000 of those, stratified: a run takes well under a minute on one core |
| MNIST | smoke | 640 / 200 / 200 of those |
"""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from trimtab.errors import InputError
from trimtab.tasks import hub, models
from trimtab.tasks.base import Data, Split, Task, pick
from trimtab.tasks.data import Source, decode_images, find, read_parquet, stratified_cuts

__all__ = ["digits_cnn", "digits_mlp", "mnist_cnn"]

_MNIST = Source(
    "mnist",
    "Get it with `hf download ylecun/mnist --repo-type dataset --local-dir DIR` and give --data-dir DIR; "
    "see docs/data.md",
)
_MNIST_MEAN, _MNIST_STD = 0.1307, 0.3081  # of the 60,000 train images, as PyTorch's MNIST example has them
_DIGITS_SIZES = (1077, 360, 360)
# Steps and steps between validations; 660 steps are 20 epochs, and the set is too small for more.
_DIGITS_STEPS = {"smoke": (60, 5), "small": (660, 20), "full": (660, 20)}


def digits_mlp(scale: str = "small") -> Task:
    """Digits of 8 x 8 pixels, MLP 64-64-10, Adam.

    Args:
        scale: "smoke" (60 steps), "small" or "full" (660 steps, 20 epochs).
    """
    return _digits("digits-mlp", scale, is_image=False)


def digits_cnn(scale: str = "small") -> Task:
    """Digits of 8 x 8 pixels, two convolutions, Adam.

    Args:
        scale: "smoke" (60 steps), "small" or "full" (660 steps, 20 epochs).
    """
    return _digits("digits-cnn", scale, is_image=True)


def _digits(name: str, scale: str, *, is_image: bool) -> Task:
    steps, every = pick(scale, _DIGITS_STEPS)
    return Task(
        name=name,
        dataset="digits",
        kind="classification",
        load=partial(_load_digits, is_image=is_image),
        make_model=_digits_cnn_model if is_image else _digits_mlp_model,
        batch_size=32,
        total_steps=steps,
        eval_every=every,
        warmup_steps=steps // 20,
    )


def _digits_mlp_model(data: Data) -> nn.Module:
    return models.mlp(int(data.info["n_features"]), [64], int(data.info["n_classes"]))


def _digits_cnn_model(data: Data) -> nn.Module:
    return models.digits_cnn(int(data.info["n_classes"]))


@lru_cache(maxsize=1)
def _bundled_digits() -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return images, labels


def _load_digits(data_dir: Path | None, *, is_image: bool) -> Data:
    """The data directory is not looked at: the set lies in scikit-learn."""
    images, labels = _bundled_digits()
    parts = stratified_cuts(labels, _DIGITS_SIZES, "digits")
    inputs = torch.from_numpy((images / 16).astype(np.float32))  # 17 grey levels -> [0, 1]
    if is_image:
        inputs = inputs.view(-1, 1, 8, 8)
    targets = torch.from_numpy(labels.astype(np.int64))
    train, val, test = (Split(inputs[rows], targets[rows]) for rows in map(torch.from_numpy, parts))
    return Data(train, val, test, info={"n_classes": 10, "n_features": 64})


def mnist_cnn(scale: str = "small") -> Task:
    """MNIST, the convolutional network of PyTorch's example (conv32, conv64, pool, dense 128, dropout), Adam.

    Args:
        scale: "smoke" (20 steps on 640 images), "small" (200 steps on 6,000 images) or "full" (5 epochs of
            50,000).
    """
    sizes, batch_size, steps, every = pick(scale, {
        "smoke": ((640, 200, 200), 32, 20, 5),
        "small": ((6_000, 500, 2_000), 32, 200, 10),
        "full": ((50_000, 10_000, 10_000), 64, 3_905, 100),
    })  # fmt: skip
    return Task(
        name="mnist-cnn",
        dataset="mnist",
        kind="classification",
        load=partial(_load_mnist, sizes=sizes),
        make_model=_mnist_model,
        batch_size=batch_size,
        total_steps=steps,
        eval_every=every,
        warmup_steps=steps // 20,
    )


def _mnist_model(data: Data) -> nn.Module:
    return models.mnist_cnn(int(data.info["n_classes"]))


def _load_mnist(data_dir: Path | None, *, sizes: tuple[int, int, int]) -> Data:
    if data_dir is None:
        paths = hub.fetch(_MNIST, "ylecun/mnist", {"train": "mnist/train-*.parquet", "test": "mnist/test-*.parquet"})
    else:
        paths = {split: find(_MNIST, data_dir, f"{split}.parquet", f"{split}-*.parquet") for split in ("train", "test")}
    table = read_parquet(paths["train"], "mnist", ("image", "label"))
    labels = np.asarray(table["label"].to_numpy())
    # The cut into 50,000 and 10,000 comes first, so that a smaller scale takes its parts from the same sides.
    held = len(labels) // 6
    pool, held_out = stratified_cuts(labels, (len(labels) - held, held), "mnist")
    train = pool[stratified_cuts(labels[pool], (sizes[0],), "mnist train")[0]] if sizes[0] < len(pool) else pool
    val = held_out[stratified_cuts(labels[held_out], (sizes[1],), "mnist val")[0]] if sizes[1] < held else held_out
    test_table = read_parquet(paths["test"], "mnist", ("image", "label"))
    test_labels = np.asarray(test_table["label"].to_numpy())
    test = stratified_cuts(test_labels, (min(sizes[2], len(test_labels)),), "mnist test")[0]
    return Data(
        _images(table, labels, train),
        _images(table, labels, val),
        _images(test_table, test_labels, test),
        info={"n_classes": 10},
    )


def _images(table: Any, labels: npt.NDArray[Any], rows: npt.NDArray[np.int64]) -> Split:
    if len(rows) == 0 or labels[rows].min() < 0 or labels[rows].max() > 9:
        raise InputError("mnist: a split is empty or has labels outside 0..9; expected the digits 0 to 9")
    pixels = decode_images(table["image"].take(rows).to_pylist(), "mnist", (28, 28))
    inputs = torch.from_numpy(pixels).to(torch.float32).div_(255).sub_(_MNIST_MEAN).div_(_MNIST_STD)
    return Split(inputs.unsqueeze(1), torch.from_numpy(labels[rows].astype(np.int64)))
