"""Image tasks: digits (bundled with scikit-learn), MNIST and CIFAR-10.

Found through `registry.load("task", ...)`. Splits are fixed: they depend on no run's seed.

| set | scale | train / val / test |
|---|---|---|
| digits | all | 1077 / 360 / 360, stratified |
| MNIST | full | 50,000 / 10,000 cut from its train part, stratified / its 10,000 test images |
| MNIST | small | 6,000 / 500 / 2,000 of those, stratified: a run takes well under a minute on one core |
| MNIST | smoke | 640 / 200 / 200 of those |
| CIFAR-10 | full | 45,000 / 5,000 cut from its train part, stratified / its 10,000 test images |
| CIFAR-10 | small | 6,000 / 400 / 1,000 of those, stratified |
| CIFAR-10 | smoke | 640 / 200 / 200 of those |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from trimtab.errors import InputError
from trimtab.tasks import hub, models
from trimtab.tasks.augmentation import Augmentation
from trimtab.tasks.base import Data, Split, Task, pick
from trimtab.tasks.data import Source, decode_images, find, read_parquet, stratified_cuts, train_and_held_out

__all__ = [
    "CIFAR10_AUGMENTATION",
    "MNIST_AUGMENTATION",
    "cifar10_cnn",
    "digits_cnn",
    "digits_mlp",
    "load_cifar10",
    "load_digits",
    "load_mnist",
    "mnist_cnn",
    "mnist_mlp",
]


_PADDING = 4  # pixels of a crop, as in He et al. 2016, arXiv:1512.03385, section 4.2
_DEGREES = 10.0  # of a rotation, as the learning-rate write-up has it


@dataclass(frozen=True)
class _ImageSet:
    """Images in ten classes on the hub: where they are, how they are cut, how their pixels are scaled."""

    source: Source
    repo_id: str
    folder: str  # of the Parquet files, in the repository
    column: str  # of the images
    size: tuple[int, int]  # height and width
    held_share: int  # one in this many train images is held out for validation
    mean: tuple[float, ...]  # one a channel
    std: tuple[float, ...]
    border: int = 0  # black pixels that are put around an image
    flip: bool = False  # whether a mirrored image is one of its class

    @property
    def augmentation(self) -> Augmentation:
        """Mirrored where that may be, cropped and rotated; black is what lies outside."""
        black = tuple(-mean / std for mean, std in zip(self.mean, self.std, strict=True))
        return Augmentation(black, flip=self.flip, padding=_PADDING, degrees=_DEGREES)


_MNIST = _ImageSet(
    Source(
        "mnist",
        "Get it with `hf download ylecun/mnist --repo-type dataset --local-dir DIR` and give --data-dir DIR; "
        "see docs/data.md",
    ),
    "ylecun/mnist",
    folder="mnist",
    column="image",
    size=(28, 28),
    held_share=6,
    mean=(0.1307,),  # of the 60,000 train images, as PyTorch's MNIST example has them
    std=(0.3081,),
)
_CIFAR10 = _ImageSet(
    Source(
        "cifar10",
        "Get it with `hf download uoft-cs/cifar10 --repo-type dataset --local-dir DIR/cifar10` and give "
        "--data-dir DIR; see docs/data.md",
    ),
    "uoft-cs/cifar10",
    folder="plain_text",
    column="img",
    size=(32, 32),
    held_share=10,
    mean=(0.4914, 0.4822, 0.4465),  # of the 50,000 train images: red, green, blue
    std=(0.2470, 0.2435, 0.2616),
    flip=True,
)
MNIST_AUGMENTATION = _MNIST.augmentation
CIFAR10_AUGMENTATION = _CIFAR10.augmentation
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
        load=partial(load_digits, is_image=is_image),
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
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    return images, labels


def load_digits(data_dir: Path | None, *, is_image: bool) -> Data:
    """Read the digits.

    Args:
        data_dir: Not looked at: the set lies in scikit-learn.
        is_image: Inputs (B, 1, 8, 8) instead of (B, 64); in [0, 1] both times.
    """
    images, labels = _bundled_digits()
    parts = stratified_cuts(labels, _DIGITS_SIZES, "digits")
    inputs = torch.from_numpy((images / 16).astype(np.float32))  # 17 grey levels -> [0, 1]
    if is_image:
        inputs = inputs.view(-1, 1, 8, 8)
    targets = torch.from_numpy(labels.astype(np.int64))
    train, val, test = (Split(inputs[rows], targets[rows]) for rows in map(torch.from_numpy, parts))
    return Data(train, val, test, info={"n_classes": 10, "n_features": 64})


def mnist_mlp(scale: str = "small") -> Task:
    """MNIST, MLP 784-128-10, Adam.

    Args:
        scale: "smoke" (20 steps on 640 images), "small" (300 steps on 6,000 images) or "full" (5 epochs of
            50,000).
    """
    return _image_task("mnist-mlp", _MNIST, _mnist_mlp_model, pick(scale, {
        "smoke": ((640, 200, 200), 32, 20, 5),
        "small": ((6_000, 500, 2_000), 32, 300, 10),
        "full": ((50_000, 10_000, 10_000), 64, 3_905, 100),
    }))  # fmt: skip


def mnist_cnn(scale: str = "small") -> Task:
    """MNIST, the convolutional network of PyTorch's example (conv32, conv64, pool, dense 128, dropout), Adam.

    Args:
        scale: "smoke" (20 steps on 640 images), "small" (200 steps on 6,000 images) or "full" (5 epochs of
            50,000).
    """
    return _image_task("mnist-cnn", _MNIST, _mnist_model, pick(scale, {
        "smoke": ((640, 200, 200), 32, 20, 5),
        "small": ((6_000, 500, 2_000), 32, 200, 10),
        "full": ((50_000, 10_000, 10_000), 64, 3_905, 100),
    }))  # fmt: skip


def cifar10_cnn(scale: str = "small") -> Task:
    """CIFAR-10, two convolutions with pooling (32, 64) and a dense layer of 64 with dropout, Adam.

    Args:
        scale: "smoke" (20 steps on 640 images), "small" (250 steps on 6,000 images) or "full" (20 epochs of
            45,000).
    """
    return _image_task("cifar10-cnn", _CIFAR10, _cifar10_model, pick(scale, {
        "smoke": ((640, 200, 200), 32, 20, 5),
        "small": ((6_000, 400, 1_000), 32, 250, 25),
        "full": ((45_000, 5_000, 10_000), 64, 14_060, 200),
    }))  # fmt: skip


def _image_task(
    name: str,
    images: _ImageSet,
    make_model: Callable[[Data], nn.Module],
    preset: tuple[tuple[int, int, int], int, int, int],
) -> Task:
    """A task of 0.05 warm-up on a set from the hub; the preset is (sizes of the splits, batch, steps, every)."""
    sizes, batch_size, steps, every = preset
    return Task(
        name=name,
        dataset=images.source.dataset,
        kind="classification",
        load=partial(_load_images, images=images, sizes=sizes),
        make_model=make_model,
        batch_size=batch_size,
        total_steps=steps,
        eval_every=every,
        warmup_steps=steps // 20,
        augmentation=images.augmentation,
    )


def _mnist_model(data: Data) -> nn.Module:
    return models.mnist_cnn(int(data.info["n_classes"]))


def _mnist_mlp_model(data: Data) -> nn.Module:
    return nn.Sequential(nn.Flatten(), *models.mlp(28 * 28, [128], int(data.info["n_classes"])))


def _cifar10_model(data: Data) -> nn.Module:
    return models.cifar10_cnn(int(data.info["n_classes"]))


def load_mnist(data_dir: Path | None, *, sizes: tuple[int, int, int], border: int = 0) -> Data:
    """Read MNIST, scaled to zero mean and unit deviation: inputs (B, 1, 28 + 2 border, 28 + 2 border).

    Args:
        data_dir: Folder with the folder `mnist`; None for the hub.
        sizes: Images of train, val and test; more than there are give all.
        border: Pixels put around an image, black as its background is; the scaling is that without them.

    Raises:
        MissingDataError: It is not there.
        InputError: A file is broken, or not what it should be.
    """
    return _load_images(data_dir, images=replace(_MNIST, border=border), sizes=sizes)


def load_cifar10(data_dir: Path | None, *, sizes: tuple[int, int, int]) -> Data:
    """Read CIFAR-10, scaled to zero mean and unit deviation: inputs (B, 3, 32, 32).

    Args:
        data_dir: Folder with the folder `cifar10`; None for the hub.
        sizes: Images of train, val and test; more than there are give all.

    Raises:
        MissingDataError: It is not there.
        InputError: A file is broken, or not what it should be.
    """
    return _load_images(data_dir, images=_CIFAR10, sizes=sizes)


def _load_images(data_dir: Path | None, *, images: _ImageSet, sizes: tuple[int, int, int]) -> Data:
    source, folder = images.source, images.folder
    name = source.dataset
    if data_dir is None:
        patterns = {split: f"{folder}/{split}-*.parquet" for split in ("train", "test")}
        paths = hub.fetch(source, images.repo_id, patterns)
    else:
        # A repository downloaded as it is has its files in a folder of their own.
        paths = {
            split: find(source, data_dir, f"{split}.parquet", f"{split}-*.parquet", f"{folder}/{split}-*.parquet")
            for split in ("train", "test")
        }
    table = read_parquet(paths["train"], name, (images.column, "label"))
    labels = np.asarray(table["label"].to_numpy())
    train, val = train_and_held_out(labels, images.held_share, sizes[:2], name)
    test_table = read_parquet(paths["test"], name, (images.column, "label"))
    test_labels = np.asarray(test_table["label"].to_numpy())
    test = stratified_cuts(test_labels, (min(sizes[2], len(test_labels)),), f"{name} test")[0]
    return Data(
        _images(table, labels, train, images),
        _images(table, labels, val, images),
        _images(test_table, test_labels, test, images),
        info={"n_classes": 10},
    )


def _images(table: Any, labels: npt.NDArray[Any], rows: npt.NDArray[np.int64], images: _ImageSet) -> Split:
    name = images.source.dataset
    if len(rows) == 0 or labels[rows].min() < 0 or labels[rows].max() > 9:
        raise InputError(f"{name}: a split is empty or has labels outside 0..9; expected ten classes, 0 to 9")
    cells = table[images.column].take(rows).to_pylist()
    pixels = decode_images(cells, name, images.size, is_colour=len(images.mean) == 3)
    channels_last = torch.from_numpy(pixels).to(torch.float32).view(len(rows), *images.size, len(images.mean))
    if images.border:
        channels_last = F.pad(channels_last, (0, 0, *(images.border,) * 4))
    inputs = channels_last.div_(255).sub_(torch.tensor(images.mean)).div_(torch.tensor(images.std))
    return Split(inputs.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels[rows].astype(np.int64)))
