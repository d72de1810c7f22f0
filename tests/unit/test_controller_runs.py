"""Controller: runs that go wrong, runs that end, best weights, bad input, states of something else."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from recorder import Recorder, controlled
from toy import Toy
from trimtab.agents.base import Base, Timing
from trimtab.agents.scripted import RandomMoves, Replay
from trimtab.brain import Brain
from trimtab.controller import Controller
from trimtab.errors import InputError, UnknownNameError
from trimtab.safety import Safety
from trimtab.spec import ControlSpec, make_agent

# ---- the run goes wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "adamw"])
def test_a_rate_of_a_million_is_rolled_back(optimizer: str) -> None:
    lr = 0.1 if optimizer in ("sgd", "momentum") else 0.01
    agent = Replay([[lr], [1e6], [lr], [lr]], Timing(every=10))
    toy = Toy(optimizer, lr)
    spec = ControlSpec.for_agent(agent, knob_options={"lr": {"high": 1e7}})
    controller = Controller(agent, optimizer=toy.optimizer, model=toy.model, total_steps=60, spec=spec)
    weights = None
    for t in range(60):
        controller.step(toy.step())
        if t == 19:
            assert toy.rates == [1e6]
            weights = toy.weights()
        if t == 29:
            assert torch.equal(toy.weights(), weights), "not rolled back to the interval's start"
    assert torch.isfinite(toy.weights()).all()
    guard = [row for row in controller.decisions if row.source == "guard"]
    assert guard
    assert guard[0].before == 1e6
    assert guard[0].read_back == 2e5
    assert "rolled back to the start of the interval, rate / 5" in guard[0].note
    assert controller.n_rollbacks == len(guard)
    assert toy.val_loss() < math.log(3)


@pytest.mark.parametrize("before_training", [2.0, None])
def test_a_first_validation_loss_goes_with_the_interval_that_is_undone(before_training: float | None) -> None:
    toy = Toy("adam", 0.01)
    controller = Controller("constant", optimizer=toy.optimizer, total_steps=40, every=10)
    if before_training is not None:
        controller.report(val_loss=before_training)
    losses = [1.0, *[1000.0] * 9, *[1.0] * 10]
    known = []
    for t, loss in enumerate(losses):
        if t in (5, 15):
            controller.report(val_loss={5: 900.0, 15: 1.2}[t])
        controller.step(loss)
        known.append(controller.state.summary.initial_val_loss)
    assert controller.n_rollbacks == 1
    if before_training is None:
        assert math.isnan(known[9])
        assert known[19] == 1.2
    else:
        assert known[9] == known[19] == 2.0


@pytest.mark.parametrize("reports_validation", [False, True])
def test_a_rate_of_a_million_written_by_the_knob_itself_is_rolled_back(reports_validation: bool) -> None:
    toy = Toy()
    controller = Controller("constant", optimizer=toy.optimizer, total_steps=200, every=10)
    if reports_validation:
        controller.report(val_loss=toy.val_loss())
    knob = controller._hand._knobs[0]
    for t in range(200):
        controller.step(toy.step())
        if t == 42:
            knob.write(controller.state, np.array([1e6]))
    assert torch.isfinite(toy.weights()).all()
    assert controller.n_rollbacks >= 1
    first = next(row for row in controller.decisions if row.source == "guard")
    assert (first.optimizer_step, first.read_back) == (50, 0.1 / 5)
    assert "rolled back to the start of the interval, rate / 5" in first.note
    assert toy.val_loss() < math.log(3)


def test_a_validation_loss_first_measured_after_a_divergence_does_not_hide_it() -> None:
    toy = Toy(lr=1e6)
    controller = Controller("constant", optimizer=toy.optimizer, total_steps=40, every=10)
    start = toy.weights()
    for t in range(10):
        controller.step(toy.step(), val_loss=toy.val_loss() if t == 9 else None)
    assert controller.n_rollbacks == 1
    assert torch.equal(toy.weights(), start)


def test_a_nan_loss_is_rolled_back_and_training_goes_on() -> None:
    toy = Toy("adam", 0.01, poison={17})
    controller = Controller("constant", optimizer=toy.optimizer, total_steps=60, every=10)
    for _ in range(60):
        controller.step(toy.step())
    assert torch.isfinite(toy.weights()).all()
    assert [(row.source, row.optimizer_step) for row in controller.decisions] == [("guard", 20)]
    assert "the train loss is not finite" in controller.decisions[0].note or "weight" in controller.decisions[0].note
    assert toy.rates == [pytest.approx(0.002)]
    assert controller.status == "over"


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "adamw", "rmsprop", "adagrad"])
def test_the_guard_gives_up_and_the_best_weights_stay_whatever_follows(optimizer: str) -> None:
    toy = Toy(optimizer, 0.01, poison=range(20, 300), weight_decay=0.1)
    controller = Controller(
        "constant", optimizer=toy.optimizer, model=toy.model, every=5, safety=Safety(max_rollbacks=3)
    )
    best = None
    for t in range(100):
        is_due = controller.is_due
        controller.step(toy.step(), val_loss=1.0 / (t + 1) if t == 9 else 5.0 if is_due else None)
        if t == 9:
            best = toy.weights()
    last = controller.decisions[-1]
    assert controller.status == "gave_up"
    assert [row.source for row in controller.decisions] == ["guard"] * 3 + ["gave_up"]
    assert (last.index, last.optimizer_step, last.read_back) == (7, 40, 0.0)
    assert "after 3 roll-backs in a row: gave up, kept the weights of the best validation loss" in last.note
    assert toy.rates == [0.0]
    assert torch.equal(toy.weights(), best)  # 0 times a NaN gradient is NaN: a rate of 0 alone would not keep them


def test_giving_up_without_a_model_keeps_the_last_good_interval() -> None:
    agent = Recorder(every=5)
    toy = Toy(poison=range(12, 300))
    controller = Controller(agent, optimizer=toy.optimizer, safety=Safety(max_rollbacks=1))
    kept = None
    for t in range(40):
        controller.step(toy.step())
        if t == 9:
            kept = toy.weights()
    assert controller.status == "gave_up"
    assert "kept the weights of the last good interval" in controller.decisions[-1].note
    assert torch.equal(toy.weights(), kept)
    assert agent.transitions[-1][2].tolist() == [controller.spec.penalty]


def test_a_good_interval_between_starts_the_count_anew() -> None:
    toy = Toy(poison={7, 17, 27, 37})
    controller = Controller(
        "constant", optimizer=toy.optimizer, total_steps=50, every=5, safety=Safety(max_rollbacks=1)
    )
    for _ in range(50):
        controller.step(toy.step())
    assert controller.n_rollbacks == 4
    assert controller.status == "over"


def test_buffers_are_rolled_back_with_the_model_and_the_record_says_so_without() -> None:
    for with_model in (True, False):
        toy = Toy(batch_norm=True, poison={12})
        controller = Controller(
            "constant", optimizer=toy.optimizer, total_steps=20, every=5, model=toy.model if with_model else None
        )
        for t in range(15):
            controller.step(toy.step())
            if t == 9:
                mean, parameters = toy.model[1].running_mean.clone(), [p.clone() for p in toy.model.parameters()]
        assert torch.equal(toy.model[1].running_mean, mean) == with_model
        assert all(torch.equal(a, b) for a, b in zip(toy.model.parameters(), parameters, strict=True))
        assert ("buffers were not rolled back" in controller.decisions[-1].note) != with_model


def test_without_roll_back_nothing_is_ever_copied() -> None:
    toy = Toy(poison={7})
    controller = Controller("constant", optimizer=toy.optimizer, every=5, safety=Safety(rollback=False))
    for _ in range(20):
        controller.step(toy.step())
    assert controller.snapshot_bytes == 0
    assert controller.state_dict()["snapshot"]["tensors"] == []
    assert controller.decisions == []
    assert torch.isnan(toy.weights()).any()


@pytest.mark.usefixtures("unwatched")
def test_noisy_losses_of_single_rows_do_not_end_a_run() -> None:
    """Batches of one: the first loss may be far below all that follow, without anything having gone wrong.

    The guard may take that for a divergence, but each roll-back shows it another loss of good weights.
    """
    n_rollbacks = []
    for seed in range(16):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.zeros(3, requires_grad=True)
        optimizer = torch.optim.SGD([weight], lr=1e-3)
        controller = Controller("constant", optimizer=optimizer, total_steps=200, every=10)
        for _ in range(200):
            row = torch.randn(3, generator=generator)
            target = row.sum() + torch.randn((), generator=generator)
            loss = (row @ weight - target) ** 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            controller.step(loss)
        n_rollbacks.append(controller.n_rollbacks)
        assert controller.status == "over"
    assert max(n_rollbacks) <= 3
    assert sum(n_rollbacks) <= 8, n_rollbacks


# ---- intervals, epochs, the end -------------------------------------------------------------------------------------


def test_is_due_says_when_to_validate() -> None:
    toy = Toy()
    controller = Controller(Recorder(every=4), optimizer=toy.optimizer, total_steps=10)
    due = []
    for _ in range(12):
        due.append(controller.is_due)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            controller.step(toy.step())
    assert [t for t, is_due in enumerate(due) if is_due] == [3, 7, 9]


def test_every_epoch_is_the_length_of_the_loader() -> None:
    toy = Toy()
    controller = Controller(Recorder(), optimizer=toy.optimizer, every="epoch", loader=[0] * 7)
    for _ in range(22):
        controller.step(toy.step())
    assert [row.optimizer_step for row in controller.decisions] == [7, 14, 21]


def test_an_interval_of_one_step_is_measured_too() -> None:
    toy = Toy()
    agent = Recorder(signals=("update_to_weight", "grad_update_cosine"), every=1)
    controller = Controller(agent, optimizer=toy.optimizer, total_steps=10)
    seen = []
    for _ in range(9):
        controller.step(toy.step())
        seen.append(controller.last_observation)
    assert seen[0] == [0.0, 0.0]  # no update lies before the first step
    assert all(ratio != 0 and cosine != 0 for ratio, cosine in seen[1:]), seen


def test_beyond_the_budget_the_last_rate_is_held_and_said_once() -> None:
    toy = Toy()
    controller = Controller("exponential", optimizer=toy.optimizer, total_steps=10)
    for _ in range(10):
        controller.step(toy.step())
    held = toy.rates
    with pytest.warns(RuntimeWarning, match="more often than total_steps=10; the last rate is held"):
        controller.step(toy.step())
    for _ in range(5):
        controller.step(toy.step())
    assert toy.rates == held == [pytest.approx(0.1 * 0.01)]
    assert controller.status == "over"


@pytest.mark.usefixtures("unwatched")
def test_when_control_is_over_the_optimizers_steps_are_no_longer_measured() -> None:
    for n_steps in range(2, 12):
        toy, controller = controlled(Recorder(every=3), n_steps)
        looks = []
        controller._probe._look = lambda looks=looks: looks.append(1)
        for _ in range(25):
            toy.step()
        assert looks == [], n_steps


# ---- best state -----------------------------------------------------------------------------------------------------


def test_best_state_is_the_model_at_its_best_validation_loss() -> None:
    toy = Toy(batch_norm=True)
    controller = Controller("constant", optimizer=toy.optimizer, model=toy.model)
    weights = {}
    for t, val_loss in enumerate([0.9, 0.5, 0.7, 0.5, math.nan, 0.6]):
        controller.step(toy.step())
        controller.report(val_loss=val_loss)
        weights[t] = toy.weights()
    best = controller.best_state()
    assert torch.equal(torch.cat([value.double().reshape(-1) for value in best.values()]), weights[1])
    best["0.weight"].zero_()  # a copy: the next one is whole
    assert not torch.equal(controller.best_state()["0.weight"], best["0.weight"])
    assert list(best) == list(toy.model.state_dict())


def test_best_state_without_model_or_report_names_what_is_missing() -> None:
    toy = Toy()
    with pytest.raises(InputError, match=r"best_state\(\) needs the model: give it as model="):
        Controller("constant", optimizer=toy.optimizer).best_state()
    controller = Controller("constant", optimizer=toy.optimizer, model=toy.model)
    with pytest.raises(InputError, match=r"needs a .*validation loss: call report\(val_loss="):
        controller.best_state()
    controller.report(val_loss=math.nan)  # a diverged model is never the best
    with pytest.raises(InputError, match="validation loss"):
        controller.best_state()


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"optimizer": "adam"}, "optimizer is a str; expected a torch.optim.Optimizer"),
        ({"model": "net"}, "model is a str; expected a torch.nn.Module or None"),
        ({"total_steps": 0}, "total_steps is 0"),
        ({"total_steps": -3}, "total_steps is -3"),
        ({"total_steps": 2.5}, "total_steps is 2.5"),
        ({"total_steps": True}, "total_steps is True"),
        ({"every": 0}, "every is 0"),
        ({"every": "batch"}, "every is 'batch'"),
        ({"every": "epoch"}, "needs the data loader with a known length"),
        ({"every": "epoch", "loader": iter([1])}, "needs the data loader with a known length"),
        ({"knobs": ("lrr",)}, "unknown knob 'lrr'; did you mean 'lr'"),
        ({"knobs": "lr"}, r"knobs 'lr'; expected a sequence"),
        ({"knobs": ()}, "expected a sequence of one or more"),
        ({"knobs": 5}, "knobs 5; expected a sequence"),
        ({"mode": "train"}, "unknown mode 'train'"),
        ({"spec": ControlSpec(), "every": 3}, "give either spec, or knobs and every, not both"),
        ({"safety": {"rollback": False}}, "safety is a dict; expected a trimtab.Safety"),
        ({"spec": {"knobs": ["lr"]}}, "spec is a dict; expected a trimtab.ControlSpec"),
    ],
)
def test_a_wrong_argument_is_one_error_that_names_it(changes: dict[str, Any], text: str) -> None:
    toy = Toy()
    arguments = {"optimizer": toy.optimizer, "total_steps": 10, **changes}
    with pytest.raises(InputError, match=text):
        Controller("constant", **arguments)
    assert toy.rates == [0.1]


def test_an_agent_that_is_none_is_refused() -> None:
    toy = Toy()
    with pytest.raises(UnknownNameError, match="unknown agent 'cosin'; did you mean 'cosine'"):
        Controller("cosin", optimizer=toy.optimizer)
    with pytest.raises(InputError, match="agent_or_brain is a int; expected an Agent, a Brain or an agent's name"):
        Controller(7, optimizer=toy.optimizer)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="'cosine' needs the number of optimizer steps; give total_steps"):
        Controller("cosine", optimizer=toy.optimizer)
    assert toy.rates == [0.1]


@pytest.mark.parametrize("loss", [None, "0.3", True, [1.0, 2.0], {"a": 1}, torch.zeros(2), torch.zeros(0)])
def test_a_loss_that_is_not_one_number_is_refused_at_once(loss: Any) -> None:
    toy = Toy()
    controller = Controller("constant", optimizer=toy.optimizer)
    with pytest.raises(InputError, match=r"step\(\) needs the loss of the step just taken, one number"):
        controller.step(loss)


@pytest.mark.parametrize("loss", [1, 0.5, np.float32(0.5), torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([[2]])])
def test_a_loss_may_be_any_one_number(loss: Any) -> None:
    toy = Toy()
    controller = Controller(Recorder(every=2), optimizer=toy.optimizer)
    for _ in range(2):
        controller.step(loss)
    assert controller.last_interval is not None
    assert controller.last_interval.train_loss == float(np.asarray(loss).reshape(()))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, r"report\(\) was given nothing"),
        ({"val_loss": "low"}, "val_loss is 'low'; expected one number"),
        ({"val_loss": torch.zeros(2)}, "val_loss is .*; expected one number"),
        ({"metrics": {"f1": 0.5}}, "unknown metric 'f1'.*known: accuracy"),
        ({"metrics": {"accuracy": 50.0}}, r"accuracy is 50.0; expected a number in \[0, 1\]"),
        ({"metrics": {"accuracy": "high"}}, r"accuracy is 'high'; expected a number in \[0, 1\]"),
    ],
)
def test_a_report_of_something_else_is_refused(arguments: dict[str, Any], text: str) -> None:
    toy = Toy()
    controller = Controller("constant", optimizer=toy.optimizer)
    with pytest.raises(InputError, match=text):
        controller.report(**arguments)


def test_a_brain_keeps_its_spec() -> None:
    agent = make_agent("uwhg")
    brain = Brain(agent, ControlSpec.for_agent(agent))
    toy = Toy()
    controller = Controller(brain, optimizer=toy.optimizer, total_steps=100)
    assert controller.agent is agent
    assert controller.spec == brain.spec
    with pytest.raises(InputError, match=r"made for another spec .*timing"):
        Controller(brain, optimizer=Toy().optimizer, total_steps=100, every=3)


# ---- state ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unwatched")
def test_a_state_of_something_else_is_refused_and_changes_nothing() -> None:
    toy, controller = controlled("constant", 20)
    other = Controller("uwhg", optimizer=Toy().optimizer, total_steps=20)
    with pytest.raises(InputError, match="this state is of the agent 'constant', the controller has 'uwhg'"):
        other.load_state_dict(controller.state_dict())
    fresh = Controller("constant", optimizer=Toy().optimizer, total_steps=30)
    with pytest.raises(InputError, match="total_steps"):
        fresh.load_state_dict(controller.state_dict())
    unguarded = Controller("constant", optimizer=Toy().optimizer, total_steps=20, safety=Safety(rollback=False))
    with pytest.raises(InputError, match="rollback"):
        unguarded.load_state_dict(controller.state_dict())
    for key in controller.state_dict():
        torn = controller.state_dict()
        del torn[key]
        twin = Controller("constant", optimizer=Toy().optimizer, total_steps=20)
        with pytest.raises(InputError, match=key):
            twin.load_state_dict(torn)
        assert twin.status == "running"
        assert twin.state.optimizer_steps == 0
    assert toy.rates == [0.1]


def test_a_random_agent_with_two_knobs_moves_each_by_itself() -> None:
    toy = Toy("adamw", 0.01, weight_decay=0.1)
    agent = RandomMoves(factors=(0.5, 1.0, 2.0), every=5, seed=1, n_knobs=2)
    spec = ControlSpec.for_agent(agent, knobs=("lr", "weight_decay"))
    controller = Controller(agent, optimizer=toy.optimizer, total_steps=60, spec=spec)
    for _ in range(60):
        controller.step(toy.step())
    pairs = {(row.index, row.knob): row.action for row in controller.decisions}
    assert len(pairs) == 22
    assert any(pairs[index, "lr"] != pairs[index, "weight_decay"] for index in range(11))
    assert controller.read_knobs() == {
        "lr": toy.rates[0],
        "weight_decay": toy.optimizer.param_groups[0]["weight_decay"],
    }


def test_an_agent_that_moves_fewer_knobs_than_there_are_is_refused_before_training() -> None:
    toy = Toy("adamw", 0.01, weight_decay=0.1)
    with pytest.raises(InputError, match="one column a knob"):
        Controller("uwhg", optimizer=toy.optimizer, total_steps=50, knobs=("lr", "weight_decay"))


def test_the_base_stays_under_a_changed_level() -> None:
    toy = Toy()
    agent = Replay([[0.2]], Timing(every=10), Base("cosine"))
    controller = Controller(agent, optimizer=toy.optimizer, total_steps=40)
    for _ in range(25):
        controller.step(toy.step())
    assert toy.rates[0] == pytest.approx(0.2 * (1 + math.cos(math.pi * 25 / 40)) / 2, rel=1e-14)
