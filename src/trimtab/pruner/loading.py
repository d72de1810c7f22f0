"""Loading: `trimtab.load_pruned`, which also makes the networks of our tasks.

A pruned network of a task is saved with a builder, JSON that says which task it is of; `builder_of` makes it.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from trimtab import registry
from trimtab.errors import InputError
from trimtab.pruning import saving
from trimtab.tasks.base import Data

__all__ = ["builder_of", "load_pruned"]


def load_pruned(
    directory: str | Path, model: nn.Module | None = None, *, map_location: str | torch.device = "cpu"
) -> nn.Module:
    """Load a pruned network that `PruneResult.save` or `trimtab prune` wrote; every tensor is the saved one.

    No file runs code: a task is looked up by name in our registry alone.

    Args:
        directory: The folder, with `pruned.json` and `weights.safetensors`.
        model: A fresh instance of the user's own class, as it was before pruning; it is copied and not changed. Not
            needed for networks of torch's layers in sequence and for those of tasks.
        map_location: Device of what is returned.

    Returns:
        The network, in evaluation.

    Raises:
        InputError: The files are missing, torn, foreign or changed, or the network cannot be built from them, or
            `model` is of another architecture.
    """
    return saving.load_pruned(directory, model, make=_make, map_location=map_location)


def builder_of(task: str, scale: str, data: Data) -> dict[str, Any]:
    """What a file says of a task's dense network.

    Args:
        task: Registered name.
        scale: "smoke", "small" or "full".
        data: What the network was made for.
    """
    return {"task": task, "scale": scale, "info": dict(data.info), "shape": list(data.train.inputs.shape[1:])}


def _make(builder: Mapping[str, Any]) -> nn.Module:
    """A task's dense network; asked on torch's device "meta"."""
    task, scale, info, shape = (builder.get(key) for key in ("task", "scale", "info", "shape"))
    is_right = isinstance(task, str) and isinstance(scale, str) and isinstance(info, dict) and isinstance(shape, list)
    if not is_right or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape or ()):
        raise InputError(
            f"the builder {reprlib.repr(dict(builder))} is of no task; expected task, scale, info and shape, as "
            "`trimtab prune` writes them; or give model="
        )
    inputs = torch.empty(0, *(shape or ()))
    model: nn.Module = registry.load("task", str(task))(str(scale)).make_model(
        SimpleNamespace(info=info, train=SimpleNamespace(inputs=inputs))
    )
    return model
