"""Every registered signal keeps its contract, and the battery notices each way of breaking it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from trimtab import registry
from trimtab.run_state import RunState
from trimtab.signals import Signal
from trimtab.testing import ContractError, check_signal
from trimtab.testing.contract import make_state

RAW = {"watched_loss"}


@pytest.mark.parametrize("name", registry.names("signal"))
def test_registered_signals(name: str) -> None:
    check_signal(registry.load("signal", name), is_raw=name in RAW)


def test_only_what_is_called_raw_is_raw() -> None:
    said = {name for name, entry in registry.entries("signal").items() if "(raw)" in entry.description}
    assert said == RAW
    for name in RAW:
        with pytest.raises(ContractError, match="expected"):
            check_signal(registry.load("signal", name))


# The state after three intervals: losses as in trimtab.testing.contract, rates 0.02 from 0.01, step 30 of 100.
SMOOTHED = (2.3, 0.7 * 2.3 + 0.3 * 1.9, 0.7 * (0.7 * 2.3 + 0.3 * 1.9) + 0.3 * 1.7)
EXPECTED = {
    "train_loss_log_ratio": math.log(SMOOTHED[2] / SMOOTHED[1]),
    "val_loss_log_ratio": math.log(1.95 / 2.0),
    "val_loss_log_ratio_best": 0.0,
    "loss_slope": math.log(1.8 / 1.6),
    "generalization_gap": math.log(1.95 / SMOOTHED[2]),
    "grad_norm_log_ratio": math.log(1.0 / 2.0),
    "grad_update_cosine": 0.2,
    "update_to_weight": math.log10(0.012) + 2.5,
    "progress": 0.3,
    "lr_log_ratio_start": math.log10(2.0),
    "lr_unit": math.log(0.02 / 1e-7) / math.log(31.6 / 1e-7),
    **{f"{knob}_unit": 0.4 for knob in ("momentum", "beta2", "grad_clip", "dropout", "batch_size", "accumulation")},
    **{f"{knob}_unit": 0.4 for knob in ("optimizer", "layers", "units")},
    "turn": 0.5,
    "weight_decay_unit": math.log(0.1 / 1e-6) / math.log(1.0 / 1e-6),
    "watched_loss": 1.95,
    "interval_loss_log_ratio": math.log(1.7 / 1.9),
    "val_loss_log_ratio_start": math.log(1.95 / 2.35),
    "has_val_loss": 1.0,
    "loss_noise": math.log(0.1 / 1.7 + 0.001) + 2.0,
    "update_to_weight_min": -0.5,
    "update_to_weight_median": math.log10(0.003) + 2.5,
    "update_to_weight_max": math.log10(0.02) + 2.5,
    "last_move": 0.2,
    "rollback_memory": 0.64,
    "lr_log_ratio_bad": -1.0,
    "interval_log_ratio": math.log(10 / 20),
    "budget_log_steps": math.log10(100 / 300),
}


@pytest.mark.parametrize("name", registry.names("signal"))
def test_values(name: str) -> None:
    assert float(registry.load("signal", name)(make_state(3))[0]) == pytest.approx(EXPECTED[name], abs=1e-12)


@pytest.mark.parametrize("name", ["train_loss_log_ratio", "val_loss_log_ratio", "generalization_gap", "loss_slope"])
def test_ratios_of_negative_losses_mean_nothing(name: str) -> None:
    """A likelihood that falls from -1 to -2 got better: log(-2 / -1) would say that it doubled."""
    assert registry.load("signal", name)(make_state(3, scale=-1.0)).tolist() == [0.0]


def test_a_diverged_loss_is_the_worst_there_is_not_the_best() -> None:
    for bad in (math.nan, math.inf):
        state = make_state(2, bad=bad)
        assert registry.load("signal", "watched_loss")(state).tolist() == [1e30]


class Loose(Signal):
    def __call__(self, state: RunState) -> Any:
        return np.atleast_1d(self.formula(state))


class Single(Signal):
    def __call__(self, state: RunState) -> Any:
        return np.float64(super().__call__(state)[0])


def _last_losses(state: RunState) -> Any:
    return state.current.train_loss


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        (Signal(_last_losses, -10.0, 10.0), "when every loss is 10 times as large"),
        (Signal(lambda s: math.nan, 1.0, -1.0), "low is not below high"),
        (Signal(lambda s: np.zeros(2), -1.0, 1.0), r"expected a float64 array of shape \(1,\)"),
        (Signal(lambda s: 0.5 if s.optimizer_steps else 0.7, 0.0, 1.0), "0.7 where nothing was measured; expected 0"),
        (Loose(lambda s: 7.0, 0.0, 1.0), r"gave \[7\.\], outside its bounds"),
        (Single(lambda s: 0.0, 0.0, 1.0), "gave .*; expected a float64 array of shape"),
    ],
)
def test_each_violation_is_named(broken: Signal, text: str) -> None:
    with pytest.raises(ContractError, match=text):
        check_signal(broken)
