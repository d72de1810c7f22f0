"""Scripted schedules through the Controller equal torch's own schedulers, in chained and in closed form, to 1e-12."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from trimtab.agents.base import Agent
from trimtab.controller import Controller
from trimtab.safety import Safety
from trimtab.spec import make_agent

STEPS = 1000
RATES = (0.1, 0.003)


def make_optimizer() -> torch.optim.Optimizer:
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    return torch.optim.SGD([{"params": [first], "lr": RATES[0]}, {"params": [second], "lr": RATES[1]}], lr=1.0)


def ours(agent: Agent, losses: list[float] | None = None, every: int | None = None) -> np.ndarray:
    """Rates before each step and after the last; (STEPS + 1, 2)."""
    optimizer = make_optimizer()
    controller = Controller(agent, optimizer=optimizer, total_steps=STEPS, every=every, safety=Safety(rollback=False))
    rates = [[group["lr"] for group in optimizer.param_groups]]
    for t in range(STEPS):
        optimizer.step()
        controller.step(1.0 if losses is None else losses[t])
        rates.append([group["lr"] for group in optimizer.param_groups])
    return np.array(rates)


def torchs(make: Callable[[torch.optim.Optimizer], Any], *, closed: bool = False) -> np.ndarray:
    optimizer = make_optimizer()
    scheduler = make(optimizer)
    rates = [[group["lr"] for group in optimizer.param_groups]]
    for _ in range(STEPS):
        optimizer.step()
        scheduler.step()
        rates.append(scheduler._get_closed_form_lr() if closed else [group["lr"] for group in optimizer.param_groups])
    return np.array(rates)


def assert_equal(mine: np.ndarray, theirs: np.ndarray) -> None:
    assert mine.shape == theirs.shape == (STEPS + 1, 2)
    np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-12 * max(RATES))
    assert len(np.unique(mine[:, 0])) > 1


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize(("step_size", "gamma"), [(100, 0.5), (334, 0.1), (7, 0.99)])
def test_step_equals_step_lr(step_size: int, gamma: float, closed: bool) -> None:
    agent = make_agent("step", {"step_size": step_size, "gamma": gamma})
    assert_equal(ours(agent), torchs(lambda o: lr_scheduler.StepLR(o, step_size, gamma), closed=closed))


def test_step_by_default_takes_a_third_of_the_budget() -> None:
    assert_equal(ours(make_agent("step")), torchs(lambda o: lr_scheduler.StepLR(o, 334, 0.1)))


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("gamma", [0.999, 0.9954, 1.001])
def test_exponential_equals_exponential_lr(gamma: float, closed: bool) -> None:
    agent = make_agent("exponential", {"gamma": gamma})
    assert_equal(ours(agent), torchs(lambda o: lr_scheduler.ExponentialLR(o, gamma), closed=closed))


def test_exponential_by_default_leaves_a_hundredth() -> None:
    rates = ours(make_agent("exponential"))
    np.testing.assert_allclose(rates[-1], np.array(RATES) / 100, rtol=1e-12)
    assert_equal(rates, torchs(lambda o: lr_scheduler.ExponentialLR(o, 0.01 ** (1 / STEPS))))


@pytest.mark.parametrize("closed", [False, True])
def test_cosine_equals_cosine_annealing_lr(closed: bool) -> None:
    mine = ours(make_agent("cosine"))
    assert_equal(mine, torchs(lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS), closed=closed))
    assert mine[-1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("min_factor", [0.1, 0.5])
def test_cosine_with_a_floor_equals_cosine_annealing_lr_with_eta_min(min_factor: float, closed: bool) -> None:
    """eta_min is one number for all groups in torch and a share of each group's rate here: compared group by group."""
    mine = ours(make_agent("cosine", {"min_factor": min_factor}))
    for group, rate in enumerate(RATES):
        theirs = torchs(
            lambda o, r=rate: lr_scheduler.CosineAnnealingLR(o, STEPS, eta_min=min_factor * r), closed=closed
        )
        np.testing.assert_allclose(mine[:, group], theirs[:, group], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("warmup", [1, 50, 333])
def test_cosine_with_warm_up_equals_sequential_lr(warmup: int) -> None:
    def make(optimizer: torch.optim.Optimizer) -> Any:
        first = lr_scheduler.LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup)
        then = lr_scheduler.CosineAnnealingLR(optimizer, STEPS - warmup)
        return lr_scheduler.SequentialLR(optimizer, [first, then], [warmup])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR itself calls step(epoch), which torch deprecates
        theirs = torchs(make)
    assert_equal(ours(make_agent("cosine", {"warmup_steps": warmup})), theirs)


@pytest.mark.parametrize(
    ("warmup_share", "decay_share", "min_factor"), [(0.05, 0.2, 0.0), (0.0, 0.5, 0.1), (0.3, 0.7, 0.0)]
)
def test_wsd_equals_its_closed_form(warmup_share: float, decay_share: float, min_factor: float) -> None:
    """Written anew from Hu et al. 2024, section 4, as a LambdaLR: rise, hold, straight line down."""
    rise, fall = int(warmup_share * STEPS), int(decay_share * STEPS)

    def factor(step: int) -> float:
        if step < rise:
            return float(np.interp(step, [0, rise], [1 / (rise + 1), 1]))
        return float(np.interp(step, [rise, STEPS - fall, STEPS], [1, 1, min_factor]))

    options = {"warmup_share": warmup_share, "decay_share": decay_share, "min_factor": min_factor}
    assert_equal(ours(make_agent("wsd", options)), torchs(lambda o: lr_scheduler.LambdaLR(o, factor)))


@pytest.mark.parametrize(
    ("factor", "patience", "threshold", "cooldown"),
    [(0.5, 10, 1e-4, 0), (0.97, 0, 1e-4, 0), (0.7, 3, 0.05, 5), (0.9, 2, 0.0, 1), (0.1, 20, 1e-2, 40)],
)
def test_plateau_equals_reduce_lr_on_plateau(factor: float, patience: int, threshold: float, cooldown: int) -> None:
    """The same losses, one a decision; noise around a falling line, with flats and steps back."""
    rng = np.random.default_rng(5)
    losses = (np.exp(-np.arange(STEPS) / 300) + 0.1 * rng.random(STEPS) + 0.3 * (np.arange(STEPS) % 170 > 120)).tolist()
    losses[400] = math.inf
    options = {"factor": factor, "patience": patience, "threshold": threshold, "cooldown": cooldown, "every": 1}
    mine = ours(make_agent("plateau", options), losses)
    optimizer = make_optimizer()
    scheduler = lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=factor, patience=patience, threshold=threshold, cooldown=cooldown, eps=0.0
    )
    rates = [[group["lr"] for group in optimizer.param_groups]]
    for loss in losses:
        scheduler.step(loss)
        rates.append([group["lr"] for group in optimizer.param_groups])
    # Our knob stops at its lower bound, and the last decision, at the budget's end, writes nothing.
    theirs = np.array(rates)
    free = theirs[:-1, 0] > 1.1e-7
    assert free.sum() > 100
    np.testing.assert_allclose(mine[:-1][free], theirs[:-1][free], rtol=1e-12)
    assert len(np.unique(mine[:, 0])) > 3


def test_plateau_takes_a_loss_that_is_not_a_number_as_torch_does() -> None:
    losses = [1.0] + [math.nan] * 6 + [0.5, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4]
    agent = make_agent("plateau", {"factor": 0.5, "patience": 2, "every": 1})
    optimizer, twin = make_optimizer(), make_optimizer()
    controller = Controller(agent, optimizer=optimizer, safety=Safety(rollback=False))
    scheduler = lr_scheduler.ReduceLROnPlateau(twin, factor=0.5, patience=2, eps=0.0)
    for loss in losses:
        optimizer.step()
        controller.step(loss)
        scheduler.step(loss)
        assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] for group in twin.param_groups]
    assert optimizer.param_groups[0]["lr"] < 0.1


def test_constant_is_no_schedule_at_all() -> None:
    assert np.array_equal(ours(make_agent("constant")), np.tile(RATES, (STEPS + 1, 1)))


@pytest.mark.parametrize(("kind", "rate"), [("SGD", 0.1), ("Adam", 1e-3), ("AdamW", 1e-3)])
def test_default_cosine_starts_from_the_optimizers_default_rate(kind: str, rate: float) -> None:
    optimizer = getattr(torch.optim, kind)([nn.Parameter(torch.zeros(2))], lr=0.0423)
    controller = Controller(make_agent("default-cosine"), optimizer=optimizer, total_steps=100)
    for t in range(100):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate * (1 + math.cos(math.pi * t / 100)) / 2, rel=1e-12)
        optimizer.step()
        controller.step(1.0)


def test_default_cosine_knows_no_rate_for_another_optimizer() -> None:
    optimizer = torch.optim.RMSprop([nn.Parameter(torch.zeros(2))], lr=0.01)
    with pytest.raises(ValueError, match=r"'RMSprop'.*known: Adam, AdamW, SGD"):
        Controller(make_agent("default-cosine"), optimizer=optimizer, total_steps=100)
    assert optimizer.param_groups[0]["lr"] == 0.01
