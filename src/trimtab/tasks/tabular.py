"""Titanic: who survived, from 18 features of a passenger.

Found through `registry.load("task", "titanic-fcnn")`. Kaggle's train.csv is the only part with labels, so val
and test are cut from it, with a fixed seed, stratified: 60 / 20 / 20 % (535 / 178 / 178 of 891). Every
statistic that a feature uses (means, deviations, medians, categories) comes from the train split alone.

The features: age, siblings, parents and children, log fare (standardised); age unknown, cabin known, female;
class (3); port (3; unknown: the commonest); title out of the name (the 4 commonest, and "other").
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from trimtab.errors import InputError
from trimtab.tasks import models
from trimtab.tasks.base import Data, Split, Task, pick
from trimtab.tasks.data import Rows, Source, find, read_parquet, stratified_cuts

__all__ = ["load_titanic", "titanic_fcnn"]

_SOURCE = Source(
    "titanic",
    "Kaggle gives it after a login (https://www.kaggle.com/c/titanic/data), the hub is not tried: save "
    "train.csv as DIR/titanic/train.csv and give --data-dir DIR; see docs/data.md",
)
_NUMBERS = ("Age", "SibSp", "Parch", "Fare")
_TEXTS = ("Pclass", "Name", "Sex", "Cabin", "Embarked")
_COLUMNS = ("Survived", *_NUMBERS, *_TEXTS)
_N_TITLES = 4

Columns = dict[str, list[Any]]
Floats = npt.NDArray[np.float64]


def titanic_fcnn(scale: str = "small") -> Task:
    """Titanic, MLP 18-64-64-2, Adam.

    Args:
        scale: "smoke" (48 steps), "small" or "full" (660 steps, 41 epochs).
    """
    steps, every = pick(scale, {"smoke": (48, 4), "small": (660, 20), "full": (660, 20)})
    return Task(
        name="titanic-fcnn",
        dataset="titanic",
        kind="classification",
        load=load_titanic,
        make_model=_model,
        batch_size=32,
        total_steps=steps,
        eval_every=every,
        warmup_steps=steps // 20,
    )


def _model(data: Data) -> nn.Module:
    return models.mlp(int(data.info["n_features"]), [64, 64], 2)


def load_titanic(data_dir: Path | None) -> Data:
    """Read the passengers with labels: inputs (B, 18).

    Args:
        data_dir: Folder with the folder `titanic`; None is an error that says how to get it.

    Raises:
        MissingDataError: It is not there.
        InputError: The file is broken, or not what it should be.
    """
    path = find(_SOURCE, data_dir, "train.parquet", "train.csv")[0]
    columns = _read_csv(path) if path.suffix == ".csv" else _read_parquet(path)
    labels = np.array([_label(value, path) for value in columns["Survived"]], dtype=np.int64)
    n_held = len(labels) // 5
    train, val, test = stratified_cuts(labels, (len(labels) - 2 * n_held, n_held, n_held), "titanic")
    if n_held == 0:
        raise InputError(f"{path} has {len(labels)} rows; expected at least 5, to be cut into train, val and test")
    features = _features(columns, train)
    splits = [
        Split(torch.from_numpy(features[rows].astype(np.float32)), torch.from_numpy(labels[rows]))
        for rows in (train, val, test)
    ]
    return Data(splits[0], splits[1], splits[2], info={"n_classes": 2, "n_features": features.shape[1]})


def _read_parquet(path: Path) -> Columns:
    columns: Columns = read_parquet([path], "titanic", _COLUMNS).to_pydict()
    return columns


def _read_csv(path: Path) -> Columns:
    """Kaggle's own file; an empty cell is None."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise InputError(f"{path} has no column {', '.join(missing)}; expected: {', '.join(_COLUMNS)}")
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read {path}: {error}; expected Kaggle's train.csv") from error
    return {name: [row[name] or None for row in rows] for name in _COLUMNS}


def _label(value: Any, path: Path) -> int:
    if str(value) not in ("0", "1"):
        raise InputError(f"{path}: Survived is {value!r} in a row; expected 0 or 1 in every row (train, not test)")
    return int(value)


def _features(columns: Columns, train: Rows) -> Floats:
    """(B, 18) from the columns; statistics are taken over the rows of `train` alone."""
    numbers = {name: _numbers(columns[name], name) for name in _NUMBERS}
    age_unknown = np.isnan(numbers["Age"])
    numbers["Fare"] = np.log1p(numbers["Fare"])  # fares span 0 to 512
    blocks = [_standardised(numbers[name], train) for name in _NUMBERS]
    blocks += [age_unknown.astype(float)]
    blocks += [np.array([cabin is not None for cabin in columns["Cabin"]], dtype=float)]
    blocks += [np.array([sex == "female" for sex in columns["Sex"]], dtype=float)]
    blocks += _one_hot([str(value) for value in columns["Pclass"]], train, _sorted_values)
    ports = columns["Embarked"]
    common = _commonest([ports[row] for row in train if ports[row] is not None], 1)
    blocks += _one_hot([port if port is not None else "".join(common) for port in ports], train, _sorted_values)
    titles = [_title(name) for name in columns["Name"]]
    kept = _commonest([titles[row] for row in train], _N_TITLES)
    blocks += [np.array([title == keep for title in titles], dtype=float) for keep in kept]
    blocks += [np.array([title not in kept for title in titles], dtype=float)]
    return np.stack(blocks, axis=1)


def _numbers(values: Sequence[Any], name: str) -> Floats:
    try:
        return np.array([np.nan if value is None else float(value) for value in values])
    except ValueError as error:
        raise InputError(f"titanic: column {name} holds something that is no number: {error}") from error


def _standardised(values: Floats, train: Rows) -> Floats:
    """Unknown values become the train median; then zero mean and unit deviation over train."""
    known = values[train][~np.isnan(values[train])]
    filled = np.where(np.isnan(values), np.median(known) if len(known) else 0.0, values)
    deviation = filled[train].std()
    standardised: Floats = (filled - filled[train].mean()) / (deviation if deviation > 0 else 1.0)
    return standardised


def _one_hot(values: list[str], train: Rows, choose: Callable[[list[str]], list[str]]) -> list[Floats]:
    """One column a category of train; a value that train lacks is all zeros."""
    categories = choose([values[row] for row in train])
    return [np.array([value == category for value in values], dtype=float) for category in categories]


def _sorted_values(values: list[str]) -> list[str]:
    return sorted(set(values))


def _commonest(values: list[str], count: int) -> list[str]:
    """The most frequent values; ties go to the alphabet."""
    ranked = sorted(Counter(values).items(), key=lambda item: (-item[1], item[0]))
    return [value for value, _ in ranked[:count]]


def _title(name: Any) -> str:
    """From "Braund, Mr. Owen Harris", "Mr"; empty where there is none."""
    match = re.search(r",\s*([^.,]+)\.", str(name))
    return match.group(1).strip() if match else ""
