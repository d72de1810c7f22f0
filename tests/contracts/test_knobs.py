"""Every registered knob keeps its contract, and the battery notices each way of breaking it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from trimtab import registry
from trimtab.knobs.data import Accumulation, BatchSize
from trimtab.knobs.momentum import Momentum
from trimtab.knobs.optimizer import LearningRate, WeightDecay
from trimtab.knobs.switch import OptimizerChoice
from trimtab.run_state import Array, RunState
from trimtab.surgery import Surgeon
from trimtab.testing import ContractError, check_knob


def two_groups() -> torch.optim.Optimizer:
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    groups = [{"params": [first]}, {"params": [second], "lr": 0.003, "weight_decay": 0.02}]
    return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)


KEYS = {"lr": "lr", "weight_decay": "weight_decay"}


class PlainLoop:
    """What the knobs of the data ask of a loop."""

    def __init__(self) -> None:
        self.batch_size, self.max_batch_size, self.n_samples = 32, None, 1000
        self.accumulation = 2

    def __iter__(self) -> Any:
        return iter(())

    def resize(self, batch_size: int) -> None:
        self.batch_size = batch_size


def whole_run() -> RunState:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.2), nn.Linear(2, 2), nn.Dropout1d(0.4))
    return RunState(two_groups(), model, PlainLoop())


def shapely_run() -> RunState:
    """A network whose shape can be changed."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 2))
    state = RunState(torch.optim.Adam(model.parameters(), 0.01), model)
    state.example_inputs = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    return state


def set_groups(key: str, value: Any) -> Callable[[RunState], None]:
    return lambda state: state.optimizer.param_groups[1].update({key: value})


def replace_class(state: RunState) -> None:
    state.optimizer.__class__ = torch.optim.Adam if type(state.optimizer) is not torch.optim.Adam else torch.optim.SGD


# Each knob as somebody else would write it.
DISTURBED: dict[str, Callable[[RunState], Any]] = {
    "lr": set_groups("lr", 0.7),
    "weight_decay": set_groups("weight_decay", 0.7),
    "momentum": set_groups("betas", (0.77, 0.999)),
    "beta2": set_groups("betas", (0.9, 0.777)),
    "grad_clip": lambda state: state.optimizer._optimizer_step_pre_hooks.clear(),
    "optimizer": replace_class,
    "batch_size": lambda state: state.loader.resize(77),
    "accumulation": lambda state: setattr(state.loader, "accumulation", 15),
    "dropout": lambda state: setattr(state.model[3], "p", 0.33),
    "units": lambda state: state.model.__setitem__(0, nn.Linear(5, 12)),
    "layers": lambda state: Surgeon(state.model, state.example_inputs, state.optimizer).deepen("0"),
}
RUNS = {"units": shapely_run, "layers": shapely_run}


@pytest.mark.parametrize("name", registry.names("knob"))
def test_registered_knobs(name: str) -> None:
    check_knob(registry.load("knob", name)(), RUNS.get(name, whole_run), key=KEYS.get(name), disturb=DISTURBED[name])


def test_knobs_with_bounds() -> None:
    check_knob(LearningRate(1e-3, 1.0), two_groups, key="lr")
    check_knob(LearningRate(hold_decay=True), two_groups, key="lr")
    check_knob(WeightDecay(1e-4, 0.5), two_groups, key="weight_decay")


class Rounds(LearningRate):
    def put(self, state: RunState, value: float) -> None:
        super().put(state, round(value, 3))


class ForgetsTheSecond(LearningRate):
    def put(self, state: RunState, value: float) -> None:
        state.optimizer.param_groups[0]["lr"] = value
        self._written[0] = value


class ReplacesTensors(LearningRate):
    def put(self, state: RunState, value: float) -> None:
        for group in state.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"] = group["lr"].clone()
        super().put(state, value)


class TakesAnything(LearningRate):
    def check_values(self, values: Any) -> Array:
        return np.abs(np.atleast_1d(np.asarray(values)))


class WritesThenRefuses(LearningRate):
    def write(self, state: RunState, values: Array) -> None:
        state.optimizer.param_groups[0]["lr"] = 7.0
        super().write(state, values)


class SeesNoConflict(LearningRate):
    def find_conflict(self, state: RunState, **_options: Any) -> str | None:
        return None


class StateIsEmpty(LearningRate):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class WrongUnits(LearningRate):
    def to_unit(self, values: Array) -> Array:
        return super().to_unit(values) ** 2


class FindsAFloat(LearningRate):
    def bind(self, state: RunState) -> Any:
        return float(super().bind(state)[0])


class DecaysEverything(WeightDecay):
    def put(self, state: RunState, value: float) -> None:
        super().put(state, value)
        state.optimizer.param_groups[-1]["weight_decay"] = state.optimizer.param_groups[-1]["weight_decay"] or value


@pytest.mark.parametrize(
    ("broken", "key", "text"),
    [
        (Rounds(), "lr", "wrote .* read back"),
        (ForgetsTheSecond(), "lr", "x0.5 turned .* expected every ratio kept"),
        (ReplacesTensors(), "lr", "replaced a tensor value instead of filling it in place"),
        (TakesAnything(), "lr", "NaN: expected an InputError, but it was accepted"),
        (WritesThenRefuses(), "lr", "NaN was refused, but something was written"),
        (SeesNoConflict(), "lr", "did not notice that somebody else wrote param group 0"),
        (StateIsEmpty(), "lr", "a loaded state is not the one that was saved"),
        (WrongUnits(), "lr", "to_unit does not undo from_unit"),
        (FindsAFloat(), "lr", r"bind gave 0\.01; expected a float64 array of shape \(1,\)"),
        (DecaysEverything(), "weight_decay", "a group with 0 became"),
    ],
)
def test_each_violation_is_named(broken: Any, key: str, text: str) -> None:
    with pytest.raises(ContractError, match=text):
        check_knob(broken, two_groups, key=key)


class HalfSizes(BatchSize):
    def from_unit(self, units: Array) -> Array:
        return super().from_unit(units) + 0.5 * (units > 0.5)


class DrawsNoSmaller(BatchSize):
    def move(self, values: Array, factors: Array) -> Array:
        return super().move(values, np.maximum(factors, 1.0))


class RoundsOnReading(BatchSize):
    def get(self, state: RunState) -> float:
        return super().get(state) + (super().get(state) > 100)


class TakesHalves(Accumulation):
    def check_values(self, values: Any) -> Array:
        return super().check_values(
            np.floor(values) if isinstance(values, np.ndarray) and values.dtype == "f8" else values
        )


class NeverAnother(OptimizerChoice):
    def find_conflict(self, state: RunState) -> str | None:
        return None


class AnyChoice(OptimizerChoice):
    def __init__(self, choices: Any = ("sgd", "adam", "adamw")) -> None:
        super().__init__(("sgd", "adam", "adamw"))


class ForgetsBounds(Momentum):
    def clip(self, values: Array) -> Array:
        return values


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        (HalfSizes(), "from_unit gives .*, not whole numbers"),
        (DrawsNoSmaller(), "a move by the factor 0.999 turned"),
        (RoundsOnReading(), "wrote 128.0, read back 129.0"),
        (TakesHalves(), "half a number: expected an InputError, but it was accepted"),
        (NeverAnother(), "did not notice what somebody else wrote"),
        (AnyChoice(), r"choices \(\): expected an InputError, but it was accepted"),
        (ForgetsBounds(), "clip leaves .* outside its bounds"),
    ],
)
def test_each_violation_of_whole_and_categorical_knobs_is_named(broken: Any, text: str) -> None:
    with pytest.raises(ContractError, match=text):
        check_knob(broken, whole_run, disturb=DISTURBED[broken.name])


def test_hold_decay_keeps_the_product_and_a_group_without_decay() -> None:
    optimizer = two_groups()
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "weight_decay": 0.0})
    knob, state = LearningRate(hold_decay=True), RunState(optimizer)
    knob.bind(state)
    for rate in (0.05, 1e-4, 0.01):
        knob.write(state, np.array([rate]))
        products = [group["lr"] * group["weight_decay"] for group in optimizer.param_groups]
        assert products == pytest.approx([0.01 * 0.1, 0.003 * 0.02, 0.0], rel=1e-12)
    knob.put(state, 0.0)
    assert [group["weight_decay"] for group in optimizer.param_groups][:2] == pytest.approx([0.1, 0.02])


def test_without_hold_decay_the_decay_is_left_alone() -> None:
    optimizer = two_groups()
    knob, state = LearningRate(), RunState(optimizer)
    knob.bind(state)
    knob.write(state, np.array([0.5]))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.02]


def test_a_knob_that_cannot_act_says_so() -> None:
    bare = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match="weight_decay is 0 in every param group"):
        WeightDecay().bind(RunState(bare))
    with pytest.raises(ValueError, match="hold_decay=True, but no param group has a positive weight_decay"):
        LearningRate(hold_decay=True).bind(RunState(bare))
    del bare.param_groups[0]["weight_decay"]
    with pytest.raises(ValueError, match="SGD has no 'weight_decay' in its param groups: the knob 'weight_decay'"):
        WeightDecay().bind(RunState(bare))
