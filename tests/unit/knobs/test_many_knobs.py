"""All knobs at once, one in turn, and those that a model has not: the controller's side, and random sequences."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from toy import Toy
from trimtab import Controller, ControlSpec, InputError, registry
from trimtab.agents.base import Actions, Timing
from trimtab.agents.scripted import RandomMoves, Replay
from trimtab.records import Decision
from trimtab.safety import Gate, Safety
from trimtab.training.loop import TrainingLoop

FACTORS = (0.2, 0.5, 1.0, 2.0, 5.0)
ALL = (
    "lr", "weight_decay", "momentum", "beta2", "grad_clip", "optimizer", "batch_size", "accumulation", "dropout",
    "layers", "units",
)  # fmt: skip
OPTIONS = {
    "batch_size": {"low": 4, "high": 64}, "accumulation": {"high": 4}, "lr": {"low": 1e-5, "high": 0.3},
    "layers": {"high": 3}, "units": {"low": 2, "high": 24, "noise": 0.01},
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("unwatched")


class BiLSTM(nn.Module):
    """Reads a digit row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True, dropout=0.2)
        self.readout = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.readout(self.rows(x.view(-1, 8, 8))[0][:, -1])
        return out


MODELS: dict[str, Any] = {
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 10)),
    "cnn": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout2d(0.1),
        nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(36, 10),
    ),
    "bilstm": BiLSTM,
}  # fmt: skip


class Sequence(Replay):
    """Given moves, one row a decision; then none."""

    def __init__(self, moves: list[list[int]], n_columns: int) -> None:
        super().__init__([[1.0]], Timing(every=2))
        self._moves, self._n_columns = moves, n_columns

    def predict(self, observation: Any, state: Any = None, *_args: Any, **_options: Any) -> Any:
        number = 0 if state is None else int(state[0])
        keep = [FACTORS.index(1.0)] * self._n_columns
        return np.array([self._moves[number] if number < len(self._moves) else keep]), (np.array(number + 1),)


def make_run(model: str, moves: list[list[int]], optimizer: str = "adam", **options: Any) -> tuple[Any, Controller]:
    task = registry.load("task", "digits-mlp")("smoke").replace(
        make_model=lambda data: MODELS[model](), optimizer=optimizer, momentum=0.9, weight_decay=0.01, lr=1e-2
    )
    loop = TrainingLoop(task, task.load(None), seed=1)
    spec = ControlSpec(
        knobs=ALL,
        knob_options=OPTIONS,
        actions=Actions("multiply", FACTORS),
        timing=Timing(every=2),
        masks=True,
        **options,
    )
    agent = Sequence(moves, spec.n_moved)
    return loop, Controller(agent, optimizer=loop.optimizer, model=loop.model, loader=loop, spec=spec)


def advance(loop: TrainingLoop, controller: Controller, n_steps: int, poisoned: int = 0) -> list[float]:
    losses = []
    for _ in range(n_steps):
        losses.append(float(loop.step()))
        controller.step(math.nan if loop.steps_done == poisoned else losses[-1])  # a NaN has the guard roll back
    return losses


SEQUENCES = {
    "moves": st.lists(st.lists(st.integers(0, 4), min_size=11, max_size=11), min_size=1, max_size=5),
    "optimizer": st.sampled_from(["sgd", "adam", "adamw"]),
    "saved_at": st.integers(1, 9),
    "loop_first": st.booleans(),
    "poisoned": st.sampled_from([0, 3, 6, 7]),
}


@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(**SEQUENCES)
def test_any_sequence_of_moves_is_coherent_and_resumed_to_the_bit(
    model: str, moves: list[list[int]], optimizer: str, saved_at: int, loop_first: bool, poisoned: int
) -> None:
    check_sequence(model, moves, optimizer, saved_at, loop_first, poisoned)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(**SEQUENCES)
def test_many_sequences_of_moves(
    model: str, moves: list[list[int]], optimizer: str, saved_at: int, loop_first: bool, poisoned: int
) -> None:
    check_sequence(model, moves, optimizer, saved_at, loop_first, poisoned)


def own_of(controller: Controller) -> list[Any]:
    return [decision for decision in controller.decisions if decision.source == "agent"]


def check_sequence(
    model: str, moves: list[list[int]], optimizer: str, saved_at: int, loop_first: bool, poisoned: int
) -> None:
    loop, controller = make_run(model, moves, optimizer)
    losses = advance(loop, controller, saved_at, poisoned)
    saved, kept = loop.state_dict(), copy.deepcopy(controller.state_dict())
    losses += advance(loop, controller, 12 - saved_at, poisoned)
    assert all(map(math.isfinite, losses))
    # Decisions lie apart by what is spent, so that where all steps became cheap the next one may not have come yet.
    assert controller.n_rollbacks >= (0 < poisoned < controller.decisions[-1].optimizer_step)
    for decision in controller.decisions:
        assert decision.read_back == decision.written, decision
    read = controller.read_knobs()
    assert read["batch_size"] == loop.batch_size
    assert read["accumulation"] == loop.accumulation
    listed = [parameter for group in loop.optimizer.param_groups for parameter in group["params"]]
    assert sorted(map(id, listed)) == sorted(map(id, loop.model.parameters()))
    assert {id(parameter) for parameter in loop.optimizer.state} <= set(map(id, listed))
    for parameter in listed:
        for key, value in loop.optimizer.state.get(parameter, {}).items():
            assert key == "step" or value.shape == parameter.shape
    assert set(controller.masked) == ({"layers"} if model == "bilstm" else set())
    ends = {name: value.clone() for name, value in loop.model.state_dict().items()}
    shape = controller.plan
    switched = any(
        d.knob == "optimizer" and " -> " in d.note and d.optimizer_step >= saved_at for d in own_of(controller)
    )
    # A fresh run, and then the very run that went on: both go to where it was saved. (Torch loads no state of an SGD
    # into an optimizer that is an Adam by now.)
    for other, again in [make_run(model, moves, optimizer), *([] if switched else [(loop, controller)])]:
        for part, state in [(other, saved), (again, kept)] if loop_first else [(again, kept), (other, saved)]:
            part.load_state_dict(copy.deepcopy(state))
        assert all(torch.equal(saved["model"][name], value) for name, value in other.model.state_dict().items())
        assert advance(other, again, 12 - saved_at, poisoned) == losses[saved_at:]
        assert again.read_knobs() == read
        assert again.plan == shape
        theirs = other.model.state_dict()
        assert list(theirs) == list(ends)
        assert all(torch.equal(ends[name], theirs[name]) for name in ends)
    assert [d.to_json() for d in again.decisions] == [d.to_json() for d in controller.decisions]


def test_knobs_that_are_never_moved_leave_the_run_as_it_is_to_the_bit() -> None:
    loop, controller = make_run("mlp", [])
    plain = make_run("mlp", [])[0]
    assert advance(loop, controller, 8) == [float(plain.step()) for _ in range(8)]


# ---- in turn --------------------------------------------------------------------------------------------------------


def test_in_turn_each_decision_moves_one_knob() -> None:
    loop, controller = make_run("mlp", [[3]] * 12, turns=True)
    own: list[Decision] = []
    while len(own) < 11:  # of steps it takes fewer, as their batches grow
        advance(loop, controller, 1)
        own = [decision for decision in controller.decisions if decision.source == "agent"]
    assert [(decision.index, decision.knob) for decision in own] == [(n, ALL[n]) for n in range(11)]
    assert all(
        decision.setting > decision.before for decision in own if decision.knob not in ("optimizer", "grad_clip")
    )
    assert controller.state.turn == 0.0  # decision 11 is that of the first knob again


def test_the_signal_says_whose_turn_it_is() -> None:
    seen = []

    class Watches(RandomMoves):
        def predict(self, observation: Any, *args: Any, **options: Any) -> Any:
            seen.append(float(observation[0, 0]))
            return super().predict(observation, *args, **options)

    toy = Toy("adam", 0.01, weight_decay=0.1)
    spec = ControlSpec(
        knobs=("lr", "weight_decay", "momentum"), actions=Actions("multiply", (0.5, 1.0, 2.0)), signals=("turn",),
        timing=Timing(every=2), turns=True,
    )  # fmt: skip
    controller = Controller(Watches([0.5, 1.0, 2.0]), optimizer=toy.optimizer, spec=spec)
    for _ in range(8):
        controller.step(toy.step())
    assert seen[1:] == [0.0, 0.5, 1.0, 0.0]  # the first call, before any step, is the controller's check of the shape


# ---- what a model has not -------------------------------------------------------------------------------------------


def masked_spec(**options: Any) -> ControlSpec:
    return ControlSpec(
        knobs=("lr", "dropout", "batch_size", "momentum"), actions=Actions("multiply", FACTORS), timing=Timing(every=2),
        signals=("dropout_unit", "lr_unit"), **options,
    )  # fmt: skip


def test_a_knob_that_cannot_act_is_refused_by_name_or_masked() -> None:
    toy = Toy("adam", 0.01)
    agent = Sequence([[3, 3, 3, 3]], 4)
    with pytest.raises(InputError, match="Sequential has no dropout"):
        Controller(agent, optimizer=toy.optimizer, model=toy.model, spec=masked_spec())
    controller = Controller(agent, optimizer=toy.optimizer, model=toy.model, spec=masked_spec(masks=True))
    assert set(controller.masked) == {"dropout", "batch_size"}
    assert "Sequential has no dropout" in controller.masked["dropout"]
    for _ in range(3):
        controller.step(toy.step())
    assert [decision.knob for decision in controller.decisions] == ["lr", "momentum"]
    assert set(controller.read_knobs()) == {"lr", "momentum"}
    assert controller.read_knobs()["momentum"] == pytest.approx(0.95)
    assert controller.last_observation[0] == 0.0
    saved = copy.deepcopy(controller.state_dict())
    again = Controller(agent, optimizer=toy.optimizer, model=toy.model, spec=masked_spec(masks=True))
    again.load_state_dict(saved)
    assert again.read_knobs() == controller.read_knobs()


def test_masked_knobs_have_no_turn() -> None:
    toy = Toy("adam", 0.01)
    spec = ControlSpec(
        knobs=("lr", "dropout", "momentum"), actions=Actions("multiply", FACTORS), timing=Timing(every=2), turns=True,
        masks=True,
    )  # fmt: skip
    controller = Controller(Sequence([[3]] * 4, 1), optimizer=toy.optimizer, model=toy.model, spec=spec)
    for _ in range(8):
        controller.step(toy.step())
    assert [decision.knob for decision in controller.decisions] == ["lr", "momentum"] * 2


def test_the_rate_is_never_masked_and_one_knob_has_to_be_left() -> None:
    model = nn.Linear(2, 2)
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.raises(InputError, match="lr is 0 in every param group"):
        Controller("constant", optimizer=still, model=model, spec=ControlSpec(masks=True))
    with pytest.raises(InputError, match="no knob can act on this run: Linear has no dropout"):
        Controller("constant", optimizer=still, model=model, spec=ControlSpec(knobs=("dropout",), masks=True))


# ---- the gate -------------------------------------------------------------------------------------------------------


def test_the_gate_limits_a_move_on_the_knobs_own_scale() -> None:
    toy = Toy("adam", 0.01)
    spec = ControlSpec(knobs=("lr", "momentum"), actions=Actions("multiply", FACTORS), timing=Timing(every=2))
    controller = Controller(
        Sequence([[4, 4]], 2), optimizer=toy.optimizer, spec=spec, safety=Safety(gate=Gate(max_factor=2.0))
    )
    for _ in range(2):
        controller.step(toy.step())
    rate, momentum = controller.decisions
    assert (rate.asked, rate.setting) == pytest.approx((0.05, 0.02))
    assert (momentum.asked, momentum.setting) == pytest.approx((0.98, 0.95))
    assert rate.note == momentum.note == "gate: change too large"


# ---- agents by name -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("turns", "n_columns"), [(False, 3), (True, 1)])
def test_an_agent_by_its_name_moves_as_many_knobs_as_the_spec_has(turns: bool, n_columns: int) -> None:
    toy = Toy("adam", 0.01)
    signals = ("turn",) if turns else ()
    spec = ControlSpec(
        knobs=("lr", "momentum", "beta2"), actions=RandomMoves([0.5, 1.0, 2.0]).needs.actions, signals=signals,
        timing=Timing(every=2), turns=turns,
    )  # fmt: skip
    controller = Controller("random", optimizer=toy.optimizer, spec=spec, total_steps=20)
    action, _ = controller.agent.predict(np.zeros((1, len(signals))))
    assert action.shape == (1, n_columns)
