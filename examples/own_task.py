"""A task of one's own, in twenty lines: what is trained, on what, and for how long.

    trimtab run demo --tasks examples/own_task.py:two_moons --arms constant,uwhg --scale smoke --out runs/moons

The function behind the colon takes a scale and gives the task. Nothing is read before `load` is called.
"""

from pathlib import Path

import torch
from sklearn.datasets import make_moons
from torch import nn

from trimtab.tasks.base import Data, Split, Task


def load(data_dir: Path | None) -> Data:
    """Points (1000, 2) in two classes, cut into train, val and test; `data_dir` is what --data-dir names."""
    points, labels = make_moons(1000, noise=0.2, random_state=0)
    inputs, targets = torch.tensor(points, dtype=torch.float32), torch.tensor(labels)
    train, val, test = (Split(inputs[rows], targets[rows]) for rows in (slice(600), slice(600, 800), slice(800, 1000)))
    return Data(train, val, test, info={"n_classes": 2})


def make_model(data: Data) -> nn.Module:
    """An MLP; its weights come from a generator that the run lends."""
    return nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, int(data.info["n_classes"])))


def two_moons(scale: str = "small") -> Task:
    """The task; what is not said here, such as Adam at 0.001 and batches of 32, is the default of `Task`."""
    return Task("two_moons", "moons", "classification", load, make_model, total_steps=60 if scale == "smoke" else 600)
