"""Every registered reward keeps its contract, and the battery notices each way of breaking it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from trimtab import registry
from trimtab.run_state import Interval
from trimtab.testing import ContractError, check_reward
from trimtab.testing.contract import make_state


@pytest.mark.parametrize("name", registry.names("reward"))
def test_registered_rewards(name: str) -> None:
    check_reward(registry.load("reward", name), is_ranked=name == "score_rank")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("negative_loss", -1.95),
        ("improvement", 2.0 - 1.95),
        ("log_improvement", math.log(2.0 / 1.95)),
        ("accuracy_improvement", 0.1),
    ],
)
def test_values(name: str, value: float) -> None:
    assert float(registry.load("reward", name)(make_state(3))[0]) == pytest.approx(value, abs=1e-12)


def test_score_rank_shares_the_rank_of_equal_losses() -> None:
    state = make_state(3, n_runs=5)
    state.groups = np.array([7, 7, 7, 7, 7])
    state.score_loss = np.array([0.5, 0.1, 0.5, np.nan, 0.9])
    assert registry.load("reward", "score_rank")(state).tolist() == [0.125, 0.5, 0.125, -0.5, -0.25]


def test_without_validation_the_train_loss_counts() -> None:
    state = make_state(0)
    for loss in (3.0, 2.0):
        state.record(Interval(loss, loss, loss))
    assert registry.load("reward", "improvement")(state).tolist() == [1.0]
    assert registry.load("reward", "negative_loss")(state).tolist() == [-2.0]
    assert registry.load("reward", "log_improvement")(state).tolist() == [pytest.approx(math.log(1.5))]
    assert registry.load("reward", "accuracy_improvement")(state).tolist() == [0.0]


def test_the_log_of_negative_losses_is_no_reward() -> None:
    """From -1 to -2 is better; log(-1 / -2) would punish it."""
    state = make_state(0)
    for loss in (-1.0, -2.0):
        state.record(Interval(loss, loss, loss))
    assert registry.load("reward", "log_improvement")(state).tolist() == [0.0]
    assert registry.load("reward", "improvement")(state).tolist() == [1.0]


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        (lambda state: 0.0, "expected a float64 array"),
        (lambda state: np.zeros((1, 1)), "expected a float64 array"),
        (
            lambda state: np.atleast_1d(np.asarray(state.current.val_loss, dtype=np.float64)),
            "nothing was measured|finite",
        ),
        (lambda state: np.zeros_like(np.atleast_1d(np.asarray(state.settings["lr"]))), "expected more for it"),
        (
            lambda state: np.ones_like(np.atleast_1d(np.asarray(state.settings["lr"]))),
            "nothing was measured; expected 0",
        ),
    ],
)
def test_each_violation_is_named(broken: Any, text: str) -> None:
    with pytest.raises(ContractError, match=text):
        check_reward(broken)
