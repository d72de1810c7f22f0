"""The dense network of a piece of work: trained once, by the task's own settings, and kept.

Called by `job`. Its rate is the task's, under the task's warm-up and a cosine: after 10 epochs the CNN of
`cifar10-pruning` has 57.1 % on test with them, and 55.4 % at a constant rate, as in the study's write-up (one seed).
A killed training goes on from its last checkpoint. `dense/` holds the network as `trimtab.load_pruned` reads it,
`dense.json` what is to be said of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from trimtab.agents.scripted import cosine_factor
from trimtab.errors import InputError
from trimtab.experiments.pruning.ground import Ground, HeldOut, accuracy, costs_of
from trimtab.pruner.loading import builder_of, load_pruned
from trimtab.pruning.saving import save_pruned
from trimtab.storage import load_state, read_json, save_state, write_json
from trimtab.training.loop import TrainingLoop

__all__ = ["dense_network", "load_dense", "step", "trade_off"]

_CHECKPOINT_EVERY_S = 15.0  # as in the other studies
_GIGA = 1e9

Tell = Callable[[int, int], None]  # optimizer steps done, of how many


def dense_network(ground: Ground, tell: Tell) -> tuple[nn.Module, dict[str, Any]]:
    """The dense network, on the device and in evaluation, and its record; trained, loaded, or read if it was before.

    Raises:
        InputError: The network that was to be loaded is none of this task.
    """
    folder, record = ground.folder / "dense", ground.folder / "dense.json"
    if record.is_file():
        return load_pruned(folder, map_location=ground.device), read_json(record)
    given = ground.job["model"]
    if given is None:
        loop, seconds = _trained(ground, tell)
        model, steps = loop.model.eval(), loop.steps_done
    else:
        model, steps, seconds = load_dense(ground, given), 0, 0.0
    test = HeldOut(ground.test)
    numbers: dict[str, Any] = {
        "accuracy": {"val": accuracy(model, ground.val), "test": test.accuracy(model)},
        **costs_of(model, ground.examples),
    }
    found = {
        "schema": 1, "task": ground.task.name, "seed": ground.job["seed"], **numbers,
        "trade_off": trade_off(numbers["accuracy"]["test"], numbers["flops"]), "optimizer_steps": steps,
        "lr": ground.task.lr, "schedule": "cosine", "loaded_from": given, "test_reads": test.reads,
        "times": {"training_s": seconds},
    }  # fmt: skip
    save_pruned(model, folder, builder=builder_of(ground.task.name, ground.job["scale"], ground.data))
    write_json(record, found)
    _checkpoint(ground).unlink(missing_ok=True)
    return load_pruned(folder, map_location=ground.device), found


def load_dense(ground: Ground, directory: str | Path) -> nn.Module:
    """A network that was saved before, to be pruned (further).

    Raises:
        InputError: It cannot be loaded, or does not take the task's inputs.
    """
    model = load_pruned(directory, map_location=ground.device)
    try:
        accuracy(model, ground.val)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise InputError(
            f"the network in {directory} does not fit the task {ground.task.name!r}: {error}; give one of that task"
        ) from error
    return model


def trade_off(accuracy_of_it: float, flops: int) -> float:
    """Accuracy x (1 / FLOPs), per GFLOP of a forward pass of one sample."""
    return accuracy_of_it / (flops / _GIGA)


def _trained(ground: Ground, tell: Tell) -> tuple[TrainingLoop, float]:
    """The loop at its end, and the seconds that training took, over all its parts."""
    path = _checkpoint(ground)
    loop, before_s = _new_loop(ground), 0.0
    if path.is_file():
        try:
            saved = load_state(path)
            loop.load_state_dict(saved["loop"])
            before_s = float(saved["training_s"])
        except InputError:  # torn by the machine, not by us: begin again
            loop = _new_loop(ground)
    begun = last = time.monotonic()
    while not loop.is_over():
        step(loop)
        tell(loop.steps_done, loop.total_steps)
        now = time.monotonic()
        if now - last > _CHECKPOINT_EVERY_S:
            save_state(path, {"loop": loop.state_dict(), "training_s": before_s + now - begun})
            last = now
    return loop, before_s + time.monotonic() - begun


def step(loop: TrainingLoop) -> None:
    """One optimizer step at the rate that the schedule has for it."""
    factor = cosine_factor(loop.task.warmup_steps, loop.task.min_lr_factor)(loop.steps_done, loop.total_steps)
    for group in loop.optimizer.param_groups:
        group["lr"] = loop.task.lr * factor
    loop.step()


def _new_loop(ground: Ground) -> TrainingLoop:
    return TrainingLoop(ground.task, ground.data, seed=ground.seed("run"), device=str(ground.device))


def _checkpoint(ground: Ground) -> Path:
    return ground.folder / "dense-checkpoint.safetensors"
