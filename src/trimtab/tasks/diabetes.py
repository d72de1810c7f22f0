"""Diabetes: how far the disease has come a year later, from ten numbers about a patient. A regression.

Found through `registry.load("task", "diabetes-mlp")`. The 442 patients come with scikit-learn (Efron et al. 2004,
"Least angle regression") and are cut with a fixed seed into 60 / 20 / 20 %: 266 / 88 / 88, in every one of which tenths
of the target have their share.

scikit-learn can give the features scaled by means and deviations of all 442 patients, test included. Ours are raw, and
scaled by those of train; so is the target, whose raw values go from 25 to 346: a network that always says the train
mean has a mean squared error of about 1, and one of m is m times `target_std` squared in raw units.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from trimtab.tasks import models
from trimtab.tasks.base import Data, Split, Task, pick
from trimtab.tasks.data import stratified_cuts

__all__ = ["diabetes_mlp", "load_diabetes"]

_SIZES = (266, 88, 88)
_N_BINS = 10  # of equal size, of the target: what the cut is stratified by
# Steps and steps between validations; an epoch is 4 batches of 64, and 200 steps are 50 epochs.
_STEPS = {"smoke": (20, 4), "small": (200, 4), "full": (200, 4)}


def diabetes_mlp(scale: str = "small") -> Task:
    """Diabetes, MLP 10-64-64-1, mean squared error, Adam; 4,929 parameters.

    Args:
        scale: "smoke" (20 steps), "small" or "full" (200 steps, 50 epochs).
    """
    steps, every = pick(scale, _STEPS)
    return Task(
        name="diabetes-mlp",
        dataset="diabetes",
        kind="regression",
        load=load_diabetes,
        make_model=_model,
        batch_size=64,
        total_steps=steps,
        eval_every=every,
        warmup_steps=steps // 20,
    )


def _model(data: Data) -> nn.Module:
    return models.mlp(int(data.info["n_features"]), [64, 64], 1)


@lru_cache(maxsize=1)
def _bundled() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    from sklearn import datasets

    features, target = datasets.load_diabetes(return_X_y=True, scaled=False)
    return features, target


def load_diabetes(data_dir: Path | None) -> Data:
    """Read the patients: inputs (B, 10), targets (B,), each of zero mean and unit deviation over train.

    Args:
        data_dir: Not looked at: the set lies in scikit-learn.
    """
    features, target = _bundled()
    bins = np.digitize(target, np.quantile(target, np.arange(1, _N_BINS) / _N_BINS))
    parts = stratified_cuts(bins, _SIZES, "diabetes")
    train = parts[0]
    inputs = (features - features[train].mean(0)) / features[train].std(0)
    mean, std = float(target[train].mean()), float(target[train].std())
    splits = [
        Split(
            torch.from_numpy(inputs[rows].astype(np.float32)),
            torch.from_numpy(((target[rows] - mean) / std).astype(np.float32)),
        )
        for rows in parts
    ]
    info = {"n_features": features.shape[1], "target_mean": mean, "target_std": std}
    return Data(splits[0], splits[1], splits[2], info=info)
