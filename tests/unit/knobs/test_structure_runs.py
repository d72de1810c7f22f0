"""Runs whose network changes: what the controller holds of them follows, and what was saved goes on to the bit."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import trimtab.envs
from toy import Toy, seeded
from trimtab import Controller, ControlSpec, InputError, registry
from trimtab.agents.base import Actions, Timing
from trimtab.agents.scripted import Replay
from trimtab.errors import ConflictError
from trimtab.knobs.units import Units
from trimtab.records import Decision
from trimtab.run_state import RunState
from trimtab.safety import Gate, Safety
from trimtab.surgery import Surgeon, replay
from trimtab.training.loop import TrainingLoop

pytestmark = pytest.mark.usefixtures("unwatched")

KNOBS = ("lr", "layers", "units")
DOCUMENTATION = (Path(__file__).parents[3] / "docs" / "knobs.md").read_text(encoding="utf-8")


class Growing(Toy):
    """The toy with ReLU, a batch norm and dropout: 4-8-3."""

    def __init__(self, optimizer: str = "adam", lr: float = 0.01, *, norm: bool = True, **options: Any) -> None:
        super().__init__(optimizer, lr, **options)
        with seeded(9):
            norms = [nn.BatchNorm1d(8)] if norm else []
            self.model = nn.Sequential(nn.Linear(4, 8), *norms, nn.ReLU(), nn.Dropout(0.0), nn.Linear(8, 3))
        self.optimizer = type(self.optimizer)(self.model.parameters(), lr=lr)


def control(toy: Toy, rows: list[tuple[float, ...]], every: int = 3, **options: Any) -> Controller:
    knobs = {
        "knobs": KNOBS,
        "knob_options": {"units": {"low": 2, "high": 64, "noise": 0.02}},
        **options.pop("spec", {}),
    }
    agent = Replay(rows, Timing(every=every))
    spec = ControlSpec.for_agent(agent, **knobs)
    options.setdefault("example_inputs", toy.inputs[:8])
    return Controller(agent, optimizer=toy.optimizer, model=toy.model, spec=spec, **options)


def advance(toy: Toy, controller: Controller, n_steps: int, *, validates: bool = False) -> list[float]:
    losses = []
    for _ in range(n_steps):
        losses.append(float(toy.step()))
        if validates and controller.is_due:
            controller.report(val_loss=toy.val_loss())
        controller.step(losses[-1])
    return losses


ROWS = [(0.01, 2, 12), (0.01, 3, 5), (0.02, 1, 20), (0.01, 2, 9)]


def test_a_decision_has_the_cost_of_the_new_network() -> None:
    toy = Growing()
    controller = control(toy, ROWS)
    advance(toy, controller, 3)
    rate, layers, units = controller.decisions
    assert rate.cost is None
    # 4-8-3 with a batch norm of 16: 83 numbers. A layer more: 72 and 16 of its batch norm.
    assert layers.cost is not None
    assert (layers.cost["parameters_before"], layers.cost["parameters"]) == (83, 171)
    forward = 2 * 8 * (4 * 8 + 8 * 3), 2 * 8 * (4 * 8 + 8 * 8 + 8 * 3)
    # A training step: forward, and twice that backward, but for the gradient of the inputs.
    assert layers.cost["step_flops_before"] == 3 * forward[0] - 2 * 8 * 4 * 8
    assert layers.cost["step_flops"] == 3 * forward[1] - 2 * 8 * 4 * 8
    assert units.cost is not None
    assert units.cost["step_flops_before"] == layers.cost["step_flops"]
    assert (layers.setting, layers.read_back, units.setting, units.read_back) == (2, 2, 12, 12)
    rows = [json.loads(json.dumps(decision.to_json())) for decision in controller.decisions]
    assert "cost" not in rows[0]
    assert [Decision.from_json(row) for row in rows] == controller.decisions


def test_the_optimizer_trains_what_was_put_in() -> None:
    toy = Growing()
    controller = control(toy, ROWS)
    advance(toy, controller, 3)
    before = {name: value.detach().clone() for name, value in toy.model.named_parameters()}
    advance(toy, controller, 2)
    assert len(before) == 10
    assert all(not torch.equal(before[name], value) for name, value in toy.model.named_parameters())


def states(toy: Toy, controller: Controller) -> Any:
    return copy.deepcopy((toy.state(), controller.state_dict()))


@pytest.mark.parametrize(
    ("optimizer", "order", "saved_at"),
    [
        ("adam", "controller first", 4),
        ("adam", "replayed by hand", 6),
        ("adam", "replayed by hand", 10),
        ("sgd", "controller first", 6),
        ("sgd", "controller first", 10),
        ("sgd", "replayed by hand", 4),
    ],
)
def test_a_resumed_run_on_a_fresh_model_equals_the_uninterrupted_one(optimizer: str, order: str, saved_at: int) -> None:
    toy = Growing(optimizer)
    controller = control(toy, ROWS, total_steps=16, average=True)
    losses = advance(toy, controller, saved_at, validates=True)
    of_toy, of_controller = states(toy, controller)
    plan = json.loads(json.dumps(controller.plan))
    losses += advance(toy, controller, 16 - saved_at, validates=True)
    fresh = Growing(optimizer)
    if order == "replayed by hand":
        replay(fresh.model, fresh.inputs[:8], plan, fresh.optimizer)
        fresh.load(of_toy)
    again = control(fresh, ROWS, total_steps=16, average=True)
    again.load_state_dict(of_controller)
    if order == "controller first":
        fresh.load(of_toy)
    assert advance(fresh, again, 16 - saved_at, validates=True) == losses[saved_at:]
    assert torch.equal(fresh.weights(), toy.weights())
    assert again.decisions == controller.decisions
    assert again.plan == controller.plan
    assert again.read_knobs() == controller.read_knobs() == {"lr": 0.01, "layers": 2.0, "units": 9.0}
    theirs, ours = again.best_state(), controller.best_state()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    averages = []
    for run, its in ((toy, controller), (fresh, again)):
        with its.averaged([(run.inputs,)]):
            averages.append(run.weights())
    assert torch.equal(*averages)


def test_a_network_that_could_not_be_rolled_back_is_refused() -> None:
    toy = Growing()
    controller = control(toy, ROWS)
    advance(toy, controller, 4)
    saved = copy.deepcopy(controller.state_dict())
    fresh = Growing()
    replay(fresh.model, fresh.inputs[:8], controller.plan)
    fresh.optimizer = torch.optim.Adam(fresh.model.parameters(), 0.01)
    again = control(fresh, ROWS)
    with pytest.raises(InputError, match=r"was replayed without its optimizer.*give replay\(...\) the optimizer"):
        again.load_state_dict(saved)
    fresh.optimizer = torch.optim.Adam(fresh.model.parameters(), 0.01)
    control(fresh, ROWS, safety=Safety(rollback=False)).load_state_dict({**saved, "guard": None})


@pytest.mark.parametrize("saved_at", [2, 4, 7])
def test_a_state_of_another_network_is_refused_and_the_shape_put_back(saved_at: int) -> None:
    toy = Growing()
    controller = control(toy, ROWS)
    advance(toy, controller, saved_at)
    saved = copy.deepcopy(controller.state_dict())
    fresh = Growing()
    with seeded(1):
        fresh.model[4] = nn.Linear(8, 4)  # another task
    fresh.optimizer = torch.optim.Adam(fresh.model.parameters(), 0.01)
    again = control(fresh, ROWS)
    with pytest.raises(InputError, match="this state is of an optimizer with the parameters"):
        again.load_state_dict(saved)
    assert again.plan == []
    assert again.read_knobs() == {"lr": 0.01, "layers": 1.0, "units": 8.0}
    assert len(advance(fresh, again, 4)) == 4


# ---- roll-back, averages, best weights ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resumed", "batch_norm", "small_up_to"),
    # Copied tensor by tensor; end to end; end to end at first, and too large for it after the change.
    [(False, True, 200_000), (True, True, 200_000), (True, False, 200_000), (False, False, 250), (True, False, 250)],
)
@pytest.mark.parametrize("poisoned", [4, 7])
def test_a_roll_back_takes_back_a_change_that_has_not_proved_good(
    resumed: bool, batch_norm: bool, small_up_to: int, poisoned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.flat.SMALL_UP_TO", small_up_to)
    monkeypatch.setattr("trimtab.controller._log.warning", lambda *_: None)

    def begin() -> tuple[Growing, Controller]:
        toy = Growing(poison=[poisoned], norm=batch_norm)
        return toy, control(toy, [ROWS[0]])

    toy, controller = begin()
    calm = Growing(norm=batch_norm)
    beside = control(calm, [ROWS[0]])
    advance(calm, beside, 2)
    losses = [float(calm.step())]  # the change is made after it
    if poisoned == 7:
        beside.step(losses[0])
        advance(calm, beside, 3)
    there, moments = calm.weights(), copy.deepcopy(calm.optimizer.state_dict()["state"])
    advance(toy, controller, poisoned)
    if resumed:
        of_toy, of_controller = states(toy, controller)
        toy, controller = begin()
        controller.load_state_dict(of_controller)
        toy.load(of_toy)
    advance(toy, controller, 6 - poisoned if poisoned == 4 else 2)
    assert torch.equal(toy.weights(), there)
    now = toy.optimizer.state_dict()["state"]
    assert now.keys() == moments.keys()
    for key, entry in now.items():
        assert all(torch.equal(torch.as_tensor(entry[name]), torch.as_tensor(moments[key][name])) for name in entry)
    last = controller.decisions[-3:]
    if poisoned == 4:  # in the first interval after the change
        assert [(row.knob, row.source, row.setting) for row in last] == [
            ("layers", "follow", 1), ("units", "follow", 8), ("lr", "guard", 0.002),
        ]  # fmt: skip
        assert last[0].note == "rolled back to the network of before"
        made = controller.decisions[1:3]
        assert last[0].cost == {
            "step_flops_before": made[1].cost["step_flops"], "step_flops": made[0].cost["step_flops_before"],
            "parameters_before": made[1].cost["parameters"], "parameters": made[0].cost["parameters_before"],
        }  # fmt: skip
        assert last[1].cost is None
        assert controller.plan == []
        assert controller.read_knobs() == {"lr": 0.002, "layers": 1.0, "units": 8.0}
    else:  # in the second, and the change was good in the first
        assert [(row.knob, row.source) for row in last] == [("layers", "agent"), ("units", "agent"), ("lr", "guard")]
        assert controller.read_knobs() == {"lr": 0.002, "layers": 2.0, "units": 12.0}
    assert controller.n_rollbacks == 1
    assert all(map(math.isfinite, advance(toy, controller, 6)))
    assert controller.read_knobs() == {"lr": 0.01, "layers": 2.0, "units": 12.0}


def test_a_change_that_ruins_the_network_is_taken_back_instead_of_giving_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.controller._log.warning", lambda *_: None)
    toy = Growing("adam", 0.02)
    rows = [*[(0.02, 1, 32)] * 7, (0.02, 1, 2), (0.004, 1, 32)]
    controller = control(toy, rows, every=10, safety=Safety(max_rollbacks=1))
    advance(toy, controller, 80, validates=True)
    assert controller.read_knobs()["units"] == 2
    with torch.no_grad():  # what two units are left with shouts
        toy.model[-1].weight.mul_(60)
    ruined = toy.val_loss()
    advance(toy, controller, 40, validates=True)
    assert (controller.n_rollbacks, controller.status) == (1, "running")
    assert [(row.knob, row.note) for row in controller.decisions if row.source == "follow"] == [
        ("units", "rolled back to the network of before")
    ]
    assert controller.read_knobs()["units"] == 32
    assert toy.val_loss() < 0.5 < 10 < ruined


def test_the_average_begins_anew_at_a_change() -> None:
    toy = Growing()
    controller = control(toy, [(0.01, 1, 8), ROWS[0]], average=True)
    advance(toy, controller, 5)
    with controller.averaged([(toy.inputs,)]):
        pass
    advance(toy, controller, 1)
    with (
        pytest.raises(InputError, match="there is no average of the weights yet"),
        controller.averaged([(toy.inputs,)]),
    ):
        pass
    advance(toy, controller, 1)
    now = toy.weights()
    with controller.averaged([(toy.inputs,)]):
        parameters = torch.cat([p.detach().double().reshape(-1) for p in toy.model.parameters()])
    assert torch.equal(toy.weights(), now)
    of_now = torch.cat([p.detach().double().reshape(-1) for p in toy.model.parameters()])
    assert torch.equal(parameters, of_now)  # one look: the average is the weights


def test_the_best_weights_come_with_the_plan_of_their_shape() -> None:
    toy = Growing()
    controller = control(toy, ROWS)
    advance(toy, controller, 4)
    controller.report(val_loss=0.5)
    best, outputs = toy.weights(), toy.val_loss()
    advance(toy, controller, 4)
    controller.report(val_loss=0.6)
    assert controller.best_plan == controller.plan[: len(controller.best_plan)] != controller.plan
    fresh = Growing()
    replay(fresh.model, fresh.inputs[:8], controller.best_plan)
    fresh.model.load_state_dict(controller.best_state())
    assert torch.equal(fresh.weights(), best)
    assert fresh.val_loss() == outputs
    controller.report(val_loss=0.4)
    assert controller.best_plan == controller.plan
    assert controller.best_state().keys() == toy.model.state_dict().keys()


@pytest.mark.parametrize("knobs", [KNOBS, ("layers", "units")])
def test_giving_up_puts_the_best_weights_back_in_their_shape(knobs: tuple[str, ...]) -> None:
    toy = Growing(poison=range(7, 100))
    rows = [row[-len(knobs) :] for row in ROWS]
    controller = control(toy, rows, safety=Safety(max_rollbacks=1), spec={"knobs": knobs})
    advance(toy, controller, 4)
    controller.report(val_loss=0.5)
    best, shapes = toy.weights(), [tuple(p.shape) for p in toy.model.parameters()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trimtab.controller._log.warning", lambda *_: None)
        advance(toy, controller, 8)
    assert controller.status == "gave_up"
    assert controller.decisions[-1].note.endswith("kept the weights of the best validation loss, control ended")
    assert [tuple(p.shape) for p in toy.model.parameters()] == shapes
    assert torch.equal(toy.weights(), best)
    assert {name: controller.read_knobs()[name] for name in ("layers", "units")} == {"layers": 2.0, "units": 12.0}
    assert controller.state.settings["units"] == 12.0
    kept = [parameter.detach().clone() for parameter in toy.model.parameters()]
    advance(toy, controller, 3)
    assert all(torch.equal(one, two) for one, two in zip(kept, toy.model.parameters(), strict=True))


# ---- beside others --------------------------------------------------------------------------------------------------


def test_another_writer_is_found() -> None:
    toy = Growing()
    controller = control(toy, ROWS)
    advance(toy, controller, 4)
    toy.model[0] = nn.Linear(4, 12)
    with pytest.raises(ConflictError, match="module '0', whose units were written, is another one now: somebody else"):
        advance(toy, controller, 2)
    toy = Growing()
    controller = control(toy, ROWS)
    advance(toy, controller, 4)
    Surgeon(toy.model, toy.inputs[:8], toy.optimizer).narrow("0", 7)
    with pytest.raises(ConflictError, match="module '0' has 7 units where 12 were written: somebody else writes it"):
        advance(toy, controller, 2)


def test_a_placebo_leaves_the_network_alone_to_the_bit() -> None:
    toy, plain = Growing(), Growing()
    controller = control(toy, ROWS, mode="placebo")
    advance(toy, controller, 9)
    for _ in range(9):
        plain.step()
    assert controller.plan == []
    assert torch.equal(toy.weights(), plain.weights())
    assert {decision.note for decision in controller.decisions} == {"placebo: decided, not written"}


def test_the_gate_and_the_bounds_limit_a_move() -> None:
    toy = Growing()
    controller = control(toy, [(0.01, 9, 50)], safety=Safety(gate=Gate(max_factor=2.0)))
    advance(toy, controller, 3)
    _, layers, units = controller.decisions
    assert (layers.asked, layers.setting) == (9, 2)  # a factor of 2 is 0.3 of the range from 1 to 4
    assert (units.asked, units.setting, units.note) == (50, 16, "gate: change too large")


def test_a_network_outside_of_the_bounds_is_not_moved_against_what_was_asked() -> None:
    toy = Growing()
    rows = [(0.01, 1, 5), (0.01, 1, 9)]
    controller = control(toy, rows, spec={"knob_options": {"units": {"low": 16, "high": 64}}})
    advance(toy, controller, 6)
    less, more = controller.decisions[2], controller.decisions[5]
    assert (less.before, less.asked, less.setting, less.read_back) == (8, 5, 8, 8)
    assert (more.before, more.asked, more.setting, more.read_back) == (8, 9, 16, 16)
    assert less.note == more.note == "bounds [16, 64]"


def test_what_cannot_be_taken_out_is_not_granted() -> None:
    toy = Growing()
    with seeded(3):
        toy.model = nn.Sequential(
            nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)
        )
    toy.optimizer = torch.optim.Adam(toy.model.parameters(), 0.01)
    controller = control(toy, [(0.01, 3, 6), (0.01, 1, 6)], spec={"knob_options": {"units": {"group": "2", "low": 2}}})
    advance(toy, controller, 6)
    taken = controller.decisions[4]
    assert (taken.knob, taken.asked, taken.setting, taken.read_back) == ("layers", 1, 2, 2)
    assert taken.note == "layers: none of the 2 hidden layers can be taken out (not '2', that 'units' is read from)"


def test_a_network_that_takes_no_layer_is_masked_with_the_reason() -> None:
    toy = Toy("adam", 0.01)
    controller = control(toy, [(0.01, 2, 12)], spec={"masks": True, "signals": ("layers_unit", "units_unit")})
    assert list(controller.masked) == ["layers"]
    assert "its activation is Tanh" in controller.masked["layers"]
    advance(toy, controller, 3)
    assert controller.last_observation == [0.0, pytest.approx(math.log(8 / 2) / math.log(64 / 2))]
    assert [decision.knob for decision in controller.decisions] == ["lr", "units"]
    saved = copy.deepcopy(controller.state_dict())
    fresh = Toy("adam", 0.01)
    again = control(fresh, [(0.01, 2, 12)], spec={"masks": True, "signals": ("layers_unit", "units_unit")})
    again.load_state_dict(saved)
    assert again.read_knobs() == controller.read_knobs()
    blind = control(Toy("adam", 0.01), [(0.01, 2, 12)], spec={"masks": True}, example_inputs=None)
    assert set(blind.masked) == {"layers", "units"}
    assert "give Controller(example_inputs=...)" in blind.masked["units"]


# ---- in a loop, in environments -------------------------------------------------------------------------------------


def make_loop(seed: int = 1) -> TrainingLoop:
    task = registry.load("task", "digits-cnn")("smoke").replace(total_steps=12)
    return TrainingLoop(task, task.load(None), seed=seed)


def test_a_loop_goes_back_to_a_smaller_and_on_to_a_larger_network_to_the_bit() -> None:
    loop = make_loop()
    state, knob = RunState(loop.optimizer, loop.model, loop), Units(4, 64)
    knob.bind(state)

    def steps(n: int) -> list[float]:
        return [float(loop.step()) for _ in range(n)]

    steps(2)
    small = loop.state_dict()
    knob.write(state, np.array([24]))
    after = steps(2)
    large = loop.state_dict()
    assert [entry["operation"] for entry in large["plan"]] == ["widen", "widen"]
    knob.write(state, np.array([6]))
    further = steps(3)
    model, optimizer = loop.model, loop.optimizer
    loop.load_state_dict(small)
    knob.adopt(state)
    assert knob.read(state).tolist() == [16.0]
    assert loop.state_dict()["plan"] == []
    assert equal(loop.state_dict(), small)
    knob.write(state, np.array([24]))
    assert steps(2) == after
    assert equal(loop.state_dict(), large)
    loop.load_state_dict(large)
    knob.adopt(state)
    knob.write(state, np.array([6]))
    assert steps(3) == further
    assert (loop.model, loop.optimizer) == (model, optimizer)
    fresh = make_loop()
    fresh.load_state_dict(large)
    assert equal(fresh.state_dict(), large)


def equal(one: Any, two: Any) -> bool:
    """Nests of dicts and lists with tensors in them, to the bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return list(one) == list(two) and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(equal, one, two))
    return bool(one == two)


def test_an_environment_moves_them() -> None:
    spec = ControlSpec(
        knobs=("lr", "units", "layers"), knob_options={"units": {"low": 8, "high": 128}},
        signals=("units_unit", "layers_unit"), actions=Actions("multiply", (0.5, 1.0, 2.0)), timing=Timing(every=4),
    )  # fmt: skip
    env = gymnasium.make(trimtab.envs.TRAINING, task="digits-mlp", scale="smoke", spec=spec, lr=1e-3).unwrapped
    observation, infos = env.reset(seed=3)
    assert (infos["units"], infos["layers"]) == (64.0, 1.0)
    assert observation.tolist() == [0.75, 0.0]
    observation, _, _, _, infos = env.step(np.array([1, 2, 2]))
    assert (infos["units"], infos["layers"]) == (128.0, 2.0)
    assert observation.tolist() == [1.0, pytest.approx(1 / 3)]
    *_, infos = env.step(np.array([1, 0, 0]))
    assert (infos["units"], infos["layers"]) == (64.0, 1.0)
    assert math.isfinite(infos["val_loss"])


@pytest.mark.parametrize("knob", ["units", "layers"])
def test_batches_of_runs_refuse_them_by_name(knob: str) -> None:
    spec = ControlSpec(knobs=("lr", knob), signals=("progress",))
    with pytest.raises(InputError, match=f"the knob '{knob}' is not known to batches of runs, which have lr"):
        gymnasium.make_vec(trimtab.envs.TRAINING, num_envs=4, families=("mlp",), spec=spec)


def test_the_example_of_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = DOCUMENTATION.split("## `units` and `layers`")[1]
    code = section.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    with seeded(5):
        exec(compile(code, "docs/knobs.md", "exec"), names)
    first, second = names["controller"], names["fresh_controller"]
    assert any(decision.cost for decision in first.decisions)
    assert second.decisions[: len(first.decisions)] == first.decisions
    assert names["best"](names["inputs"]).shape == (64, 3)
    names["train"](*names["run"], 50)
    ours, theirs = names["model"].state_dict(), names["fresh"].state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
