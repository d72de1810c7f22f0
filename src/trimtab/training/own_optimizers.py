"""Optimizers that claim to need no schedule, or no learning rate: Schedule-Free and Prodigy, put into a loop.

Called by trimtab.experiments.single and by benchmarks/zero_shot.py; the packages are the extra `baselines`. Sources:
Defazio et al. 2024, "The Road Less Scheduled", arXiv:2405.15682 (schedulefree); Mishchenko and Defazio 2023, "Prodigy",
arXiv:2306.06101 (prodigyopt). Both are used as their authors publish them, with the task's betas, decay and warm-up.
Prodigy's `safeguard_warmup`, advised under a warm-up, is left off: with it test losses were 0.88 to 1.25 (mean 1.03) of
those without, and the rate found within 5 % (digits-mlp and titanic-fcnn, 300 steps, 15 of them warm-up, 4 seeds each).

Schedule-Free keeps two sets of weights: one that gradients are taken at, one that is evaluated. `TrainingLoop.evaluate`
measures the second, through `evaluated_weights`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trimtab.errors import InputError, MissingExtraError, unknown_name

if TYPE_CHECKING:
    from trimtab.training.loop import TrainingLoop

__all__ = ["OWN_OPTIMIZERS", "check_own_optimizer", "evaluated_weights", "import_extra", "put_in"]

# Name -> its package.
OWN_OPTIMIZERS: Mapping[str, str] = {"schedule-free": "schedulefree", "prodigy": "prodigyopt"}


def check_own_optimizer(name: str) -> None:
    """Refuse an optimizer that cannot be made here.

    Raises:
        UnknownNameError: It is none of ours.
        MissingExtraError: Its package is not installed.
    """
    if name not in OWN_OPTIMIZERS:
        raise unknown_name("own_optimizer", name, OWN_OPTIMIZERS)
    import_extra(OWN_OPTIMIZERS[name])


def import_extra(package: str) -> Any:
    """A package of the extra `baselines`.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingExtraError(
            f'this needs the package {package}, which is not installed; pip install "trimtab[baselines]"'
        ) from error


def put_in(loop: TrainingLoop, name: str) -> None:
    """Replace the optimizer of a loop that has taken no step.

    Args:
        loop: Its task says rate, betas, decay, momentum and warm-up; its groups are kept. Prodigy takes a rate of 1,
            as its authors recommend, whatever the task's.
        name: "schedule-free" or "prodigy". Prodigy's update is Adam's, also where the task trains with SGD.

    Raises:
        InputError: Schedule-Free on a network with batch norm, whose statistics would be of the wrong weights, or
            on a task whose momentum or first beta, by which it interpolates, is 0.
        UnknownNameError: No such optimizer.
        MissingExtraError: Its package is not installed.
    """
    check_own_optimizer(name)
    package, task = import_extra(OWN_OPTIMIZERS[name]), loop.task
    if name == "schedule-free" and any(
        isinstance(module, nn.modules.batchnorm._BatchNorm) for module in loop.model.modules()
    ):
        raise InputError(
            f"schedule-free on {task.name}: batch norm keeps statistics of the weights that gradients are taken at, "
            "not of those that are evaluated; take a task without it"
        )
    share = "momentum" if task.optimizer == "sgd" else "betas[0]"
    if name == "schedule-free" and not (task.momentum if task.optimizer == "sgd" else task.betas[0]):
        raise InputError(
            f"schedule-free on {task.name}: {share} of the task is 0, and it interpolates by that; take a task where "
            "it is above 0, or another optimizer"
        )
    groups = [{key: group[key] for key in ("params", "weight_decay")} for group in loop.optimizer.param_groups]
    if name == "prodigy":
        loop.optimizer = package.Prodigy(groups, lr=1.0, betas=task.betas)
        return
    options: dict[str, Any] = {"lr": task.lr, "warmup_steps": task.warmup_steps}
    if task.optimizer == "sgd":
        loop.optimizer = package.SGDScheduleFree(groups, momentum=task.momentum, **options)
    else:
        loop.optimizer = package.AdamWScheduleFree(groups, betas=task.betas, **options)
    loop.optimizer.train()  # type: ignore[attr-defined]


@contextmanager
def evaluated_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Put the weights that count into the model while they are measured; of ordinary optimizers they are there.

    Afterwards the others are back to the bit: a way there and back by interpolation would round, and a run would depend
    on how often it was looked at.
    """
    if not any(group.get("train_mode") for group in optimizer.param_groups):
        yield
        return
    weights = [weight.detach() for group in optimizer.param_groups for weight in group["params"]]
    kept = [weight.clone() for weight in weights]
    optimizer.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        optimizer.train()  # type: ignore[attr-defined]
        for weight, before in zip(weights, kept, strict=True):
            weight.copy_(before)
