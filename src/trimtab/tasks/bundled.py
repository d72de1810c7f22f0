"""Real tables that come with scikit-learn, as pools: wine, breast cancer, iris, and diabetes cut into classes.

Called by `families`. They are tiny, so every draw takes other rows for train, val, score and test. Nothing is read
from outside scikit-learn; each table is read once a process.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.tasks.pools import Pool, Sizes

__all__ = ["BUNDLED", "DIABETES_CLASSES", "N_ROWS"]

N_ROWS = {"breast-cancer": 569, "diabetes": 442, "iris": 149, "wine": 178}  # distinct rows
DIABETES_CLASSES = (2, 5)

Table = tuple[npt.NDArray[np.float64], npt.NDArray[Any]]


@lru_cache(maxsize=len(N_ROWS))
def _table(name: str) -> Table:
    """Inputs (N, D) and targets (N,). Iris holds one row twice; once is enough, lest it be in two splits."""
    from sklearn import datasets

    load = getattr(datasets, f"load_{name.replace('-', '_')}")
    inputs, targets = load(return_X_y=True)
    _, first = np.unique(np.column_stack((inputs, targets)), axis=0, return_index=True)
    rows = np.sort(first)
    return inputs[rows], targets[rows]


def _classified(name: str, generator: np.random.Generator, sizes: Sizes) -> Pool:
    inputs, targets = _table(name)
    rows = generator.permutation(len(inputs))[: sizes.total]
    return Pool(inputs[rows], targets[rows].astype(np.int64), int(targets.max()) + 1, {}, "feature")


def _diabetes(generator: np.random.Generator, sizes: Sizes) -> Pool:
    """The progression of the disease, cut at quantiles into classes of equal size."""
    inputs, targets = _table("diabetes")
    n_classes = int(generator.integers(DIABETES_CLASSES[0], DIABETES_CLASSES[1] + 1))
    edges = np.quantile(targets, np.arange(1, n_classes) / n_classes)
    rows = generator.permutation(len(inputs))[: sizes.total]
    return Pool(inputs[rows], np.digitize(targets[rows], edges).astype(np.int64), n_classes, {}, "feature")


BUNDLED: dict[str, Callable[[np.random.Generator, Sizes], Pool]] = {
    "breast-cancer": partial(_classified, "breast-cancer"),
    "diabetes": _diabetes,
    "iris": partial(_classified, "iris"),
    "wine": partial(_classified, "wine"),
}
