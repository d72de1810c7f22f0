"""Pool: the rows of one small task in random order, before they become train, val, score and test.

Made by the sources (bundled, generated_vectors, generated_images, python_source), cut by `families`. A row is in one
split alone, since splits are consecutive stretches of the pool; what inputs and targets are standardised with comes
from the train rows alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from trimtab.tasks.base import Split

__all__ = [
    "MAX_LABEL_NOISE",
    "SCORE_ROWS",
    "TEST_ROWS",
    "TRAIN_ROWS",
    "VAL_ROWS",
    "Pool",
    "Sizes",
    "cut",
    "draw_sizes",
    "flip_labels",
    "log_uniform",
    "log_uniform_count",
]

TRAIN_ROWS = (64, 1024)  # at least the largest batch; at most what a horizon of 2000 steps passes often
VAL_ROWS = (64, 128)
SCORE_ROWS = (128, 256)
TEST_ROWS = (128, 256)
MAX_LABEL_NOISE = 0.2

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Sizes:
    """Rows of each split."""

    train: int
    val: int
    score: int
    test: int

    @property
    def total(self) -> int:
        """Rows of all four."""
        return self.train + self.val + self.score + self.test


@dataclass(frozen=True)
class Pool:
    """Rows in random order, and what was drawn to make them.

    Attributes:
        inputs: (N, D), or (N, H, W) of images, or (N, T) characters; any float.
        targets: (N,) int64 classes, or float numbers.
        n_outputs: Classes, or 1 for numbers.
        drawn: By name, what was drawn for these rows.
        scaling: "feature": each feature to mean 0 and deviation 1 over the train rows; "whole": one mean and one
            deviation for all of an image's pixels; "none": the inputs are meant as they are.
    """

    inputs: Array
    targets: Array
    n_outputs: int
    drawn: Mapping[str, float | str]
    scaling: Literal["feature", "whole", "none"]


def draw_sizes(
    generator: np.random.Generator, available: int | None = None, train_rows: tuple[int, int] = TRAIN_ROWS
) -> Sizes:
    """Draw the rows of each split.

    Train is log-uniform, the others uniform, within the ranges above. From a set of few rows train gets at most half;
    what is left goes to val, score and test in equal parts, each at most what was drawn for it.

    Args:
        generator: What the sizes are drawn from.
        available: Rows that there are, at least 128; None where there are as many as are wanted.
        train_rows: Least and most rows of train.
    """
    most = train_rows[1] if available is None else min(train_rows[1], available // 2)
    train = log_uniform_count(generator, min(train_rows[0], most), most)
    wanted = [int(generator.integers(low, high + 1)) for low, high in (VAL_ROWS, SCORE_ROWS, TEST_ROWS)]
    if available is None:
        return Sizes(train, *wanted)
    left, given = available - train, []
    for place, rows in enumerate(wanted):
        given.append(min(rows, left // (3 - place)))
        left -= given[-1]
    return Sizes(train, *given)


def flip_labels(labels: Array, n_classes: int, share: float, generator: np.random.Generator) -> Array:
    """Give each label, with probability `share`, one of the other classes, all equally likely; (N,) int64."""
    is_wrong = generator.random(len(labels)) < share
    shift = generator.integers(1, n_classes, size=len(labels))
    return np.where(is_wrong, (labels + shift) % n_classes, labels)


def cut(pool: Pool, sizes: Sizes) -> tuple[Split, Split, Split, Split]:
    """Train, val, score and test: consecutive rows of the pool, standardised over the train rows.

    Args:
        pool: At least `sizes.total` rows; the rest is left out.
        sizes: Rows of each split.

    Returns:
        Inputs (N, D) or (N, 1, H, W) float32; targets (N,) int64 classes, or float32 numbers that have mean 0 and
        deviation 1 over the train rows.
    """
    inputs, targets = pool.inputs[: sizes.total], pool.targets[: sizes.total]
    if pool.scaling == "feature":
        inputs = _standardised(inputs, sizes.train, axis=0)
    elif pool.scaling == "whole":
        inputs = _standardised(inputs, sizes.train, axis=None)
    if inputs.ndim == 3:
        inputs = inputs[:, None]
    if targets.dtype != np.int64:
        targets = _standardised(targets, sizes.train, axis=0).astype(np.float32)
    all_inputs, all_targets = torch.from_numpy(inputs.astype(np.float32)), torch.from_numpy(targets)
    counts = [sizes.train, sizes.val, sizes.score, sizes.test]
    parts = zip(torch.split(all_inputs, counts), torch.split(all_targets, counts), strict=True)
    # Cloned: a split that someone keeps does not keep the others.
    train, val, score, test = (Split(part.clone(), numbers.clone()) for part, numbers in parts)
    return train, val, score, test


def log_uniform(generator: np.random.Generator, low: float, high: float) -> float:
    """A number whose logarithm is uniform between those of `low` and `high`, both above 0."""
    return math.exp(generator.uniform(math.log(low), math.log(high)))


def log_uniform_count(generator: np.random.Generator, low: int, high: int) -> int:
    """A whole number in [low, high], log-uniform; both ends have their share."""
    return min(int(log_uniform(generator, low, high + 1)), high)


def _standardised(values: Array, n_train: int, axis: int | None) -> Array:
    """Mean 0 and deviation 1 over the first `n_train` rows; what is constant there is only centred."""
    train = values[:n_train]
    deviation = np.asarray(train.std(axis=axis))
    standardised: Array = (values - train.mean(axis=axis)) / np.where(deviation > 0, deviation, 1.0)
    return standardised
