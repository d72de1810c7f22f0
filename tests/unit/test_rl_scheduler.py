"""RLScheduler in the loops that people write: groups, tensors, the end, reports, bad input."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import trimtab
from toy import Toy
from toy_scheduler import STEPS, flat, make, replay, run, saved
from trimtab import brains
from trimtab.errors import ConflictError, InputError

# ---- it is a torch scheduler ----------------------------------------------------------------------------------------


def test_it_is_a_torch_scheduler() -> None:
    toy = Toy("adam", 0.01)
    scheduler = make(toy)
    assert isinstance(scheduler, lr_scheduler.LRScheduler)
    assert scheduler.optimizer is toy.optimizer
    assert scheduler.base_lrs == [0.01]
    assert scheduler.last_epoch == 0
    run(toy, scheduler, 3)
    assert scheduler.last_epoch == 3
    assert scheduler.get_last_lr() == toy.rates
    assert "initial_lr" in toy.optimizer.param_groups[0]


def test_no_warning_about_the_order_of_calls() -> None:
    """torch warns when step() of a scheduler comes before the optimizer's: ours must neither miss nor invent it."""
    toy = Toy()
    scheduler = make(toy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(toy, scheduler, 5)


def test_the_optimizers_step_is_left_as_it_was() -> None:
    """torch wraps it for each of its schedulers, at a cost in every step."""
    toy = Toy()
    make(toy)
    assert "step" not in vars(toy.optimizer)
    other = Toy()
    lr_scheduler.ConstantLR(other.optimizer)
    wrapped = other.optimizer.step
    make(other)
    assert other.optimizer.step is wrapped


def test_a_deep_copy_goes_on_by_itself() -> None:
    toy = Toy("adam", 0.01)
    scheduler = make(toy)
    run(toy, scheduler, 9)
    other = copy.deepcopy(scheduler)
    kept = [float(p.detach().sum()) for group in other.optimizer.param_groups for p in group["params"]]
    assert other.last_epoch == 9
    assert other.decisions == scheduler.decisions
    run(toy, scheduler, 9)
    assert (other.last_epoch, scheduler.last_epoch) == (9, 18)
    assert [float(p.detach().sum()) for group in other.optimizer.param_groups for p in group["params"]] == kept


def test_repr_and_state_say_which_brain_it_is() -> None:
    toy = Toy()
    scheduler = make(toy)
    text = repr(scheduler)
    assert text.startswith("RLScheduler(brain='default' (ppo), total_steps=40, step=0, lr=[0.1], running, snapshots")
    assert scheduler.state_dict()["brain"] == "default (ppo)"
    quiet = repr(make(Toy(), rollback=False))
    assert quiet.endswith("no snapshots)")


def test_the_order_of_zero_grad_does_not_matter() -> None:
    ends = []
    for order in ("before the scheduler", "after the scheduler", "set to zero"):
        toy = Toy("adam", 0.01)
        scheduler = make(toy)
        for t in range(STEPS):
            loss = toy.forward(t)
            loss.backward()
            toy.optimizer.step()
            if order == "before the scheduler":
                toy.optimizer.zero_grad()
            scheduler.step(loss)
            if order == "after the scheduler":
                toy.optimizer.zero_grad()
            if order == "set to zero":
                toy.optimizer.zero_grad(set_to_none=False)
        ends.append((toy.weights(), scheduler.decisions))
    assert len(ends[0][1]) > 10
    for weights, decisions in ends[1:]:
        assert torch.equal(weights, ends[0][0])
        assert decisions == ends[0][1]


# ---- groups ---------------------------------------------------------------------------------------------------------


def test_two_groups_keep_their_ratio() -> None:
    toy = Toy("adam", 0.02, two_groups=True)
    scheduler = make(toy)
    for first, second in run(toy, scheduler, STEPS - 1):
        assert second == pytest.approx(first / 4, rel=1e-14)
    assert len({row.written for row in scheduler.decisions}) > 5
    assert scheduler.base_lrs == [0.02, 0.005]


def test_a_group_with_rate_0_stays_frozen_and_is_not_the_reference() -> None:
    toy = Toy("sgd", 0.1)
    optimizer = torch.optim.SGD(
        [{"params": toy.model[0].parameters(), "lr": 0.0}, {"params": toy.model[-1].parameters(), "lr": 0.1}]
    )
    toy.optimizer = optimizer
    frozen = toy.model[0].weight.clone()
    rates = run(toy, make(toy))
    assert all(first == 0.0 for first, _ in rates)
    assert len({second for _, second in rates}) > 10
    assert torch.equal(toy.model[0].weight, frozen)


def test_a_tensor_rate_is_filled_in_place() -> None:
    rate = torch.tensor(0.01, dtype=torch.float64)
    toy, twin = Toy("adam", rate), Toy("adam", 0.01)
    scheduler = make(toy)
    other = make(twin)
    for _ in range(STEPS):
        scheduler.step(toy.step())
        other.step(twin.step())
        assert toy.optimizer.param_groups[0]["lr"] is rate
    assert [row.read_back for row in scheduler.decisions] == pytest.approx(
        [row.read_back for row in other.decisions], rel=1e-6
    )
    copy = scheduler.get_last_lr()[0]
    assert isinstance(copy, torch.Tensor)
    copy.fill_(9.0)
    assert float(rate) != 9.0


@pytest.mark.parametrize("base", ["constant", "cosine"])
def test_a_group_added_in_mid_run_keeps_its_ratio_from_then_on(base: str) -> None:
    toy = Toy("sgd", 0.1)
    scheduler = make(toy, brain=replay(0.1, 0.05, 0.2, 0.2, base=base))
    run(toy, scheduler, 14)
    late = nn.Parameter(torch.ones(3))
    late.grad = torch.zeros(3)
    present = toy.rates[0]
    toy.optimizer.add_param_group({"params": [late], "lr": present * 3})
    scheduler.step(toy.step())
    for first, second in run(toy, scheduler, 24):
        assert second == pytest.approx(3 * first, rel=1e-12)


def test_a_roll_back_after_a_group_was_added_leaves_the_new_weights_alone() -> None:
    toy = Toy("adam", 0.01, poison={17})
    scheduler = make(toy, brain=replay(0.01))
    run(toy, scheduler, 14)
    late = nn.Parameter(torch.ones(3))
    toy.optimizer.add_param_group({"params": [late], "lr": 0.01})
    run(toy, scheduler, 6)
    assert scheduler.decisions[-1].source == "guard"
    assert torch.equal(late.detach(), torch.ones(3))
    assert torch.isfinite(toy.weights()).all()
    run(toy, scheduler, 10)
    assert scheduler.status == "running"


# ---- the end, and no end --------------------------------------------------------------------------------------------


def test_beyond_total_steps_the_last_rate_is_held_with_one_warning() -> None:
    toy = Toy("adam", 0.01)
    scheduler = make(toy, total_steps=20)
    run(toy, scheduler, 20)
    held = toy.rates
    with pytest.warns(RuntimeWarning, match="more often than total_steps=20; the last rate is held"):
        scheduler.step(toy.step())
    assert set(map(tuple, run(toy, scheduler, 20))) == {tuple(held)}
    assert scheduler.status == "over"


def test_the_warning_points_at_the_callers_line() -> None:
    toy = Toy()
    scheduler = make(toy, total_steps=3, brain=replay(0.1))
    run(toy, scheduler, 3)
    with pytest.warns(RuntimeWarning) as caught:
        scheduler.step(toy.step())
    assert Path(caught[0].filename) == Path(__file__)


def test_an_unknown_horizon_decays_towards_no_end() -> None:
    toy = Toy("adam", 0.001)
    scheduler = make(toy, total_steps=None)
    rates = [rate for (rate,) in run(toy, scheduler, 400)]
    assert scheduler.status == "running"
    assert [row.optimizer_step for row in scheduler.decisions] == [2, 4, 6, 8, 10, 12, 14, *range(64, 401, 50)]
    changes = {t for t in range(1, 400) if rates[t] != rates[t - 1]}
    assert changes <= {row.optimizer_step - 1 for row in scheduler.decisions}
    assert "default (uwhg)" in scheduler.state_dict()["brain"]


def test_the_budget_scales_the_decisions() -> None:
    toy = Toy("adam", 0.001)
    scheduler = make(toy, total_steps=1000)
    run(toy, scheduler, 1000)
    steps = [row.optimizer_step for row in scheduler.decisions]
    assert steps[:7] == [10, 20, 30, 40, 50, 60, 107]
    assert len(steps) == 6 + 19  # the last decision point is the run's end, where nothing is asked
    assert toy.rates == [0.0]  # the cosine's end


# ---- validation -----------------------------------------------------------------------------------------------------


def test_report_and_best_state() -> None:
    toy = Toy(batch_norm=True)
    scheduler = make(toy, model=toy.model)
    with pytest.raises(InputError, match="needs a finite validation loss"):
        scheduler.best_state()
    run(toy, scheduler, 5)
    scheduler.report(val_loss=torch.tensor(0.5), accuracy=0.75)
    best = toy.weights()
    run(toy, scheduler, 5)
    scheduler.report(val_loss=0.6)
    state = scheduler.best_state()
    assert torch.equal(torch.cat([value.double().reshape(-1) for value in state.values()]), best)
    toy.model.load_state_dict(state)
    assert torch.equal(toy.weights(), best)


def test_best_state_without_the_model_names_the_argument() -> None:
    scheduler = make(Toy())
    scheduler.report(val_loss=0.5)
    with pytest.raises(InputError, match=r"best_state\(\) needs the model: give it as model="):
        scheduler.best_state()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, r"report\(\) was given nothing"),
        ({"accuracy": 97.5}, r"accuracy is 97.5; expected a number in \[0, 1\]"),
        ({"val_loss": "good"}, "val_loss is 'good'; expected one number"),
        ({"val_loss": torch.zeros(3)}, "val_loss is .*expected one number"),
    ],
)
def test_a_wrong_report_is_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        make(Toy()).report(**arguments)


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"optimizer": None}, "optimizer is a NoneType; expected a torch.optim.Optimizer"),
        ({"optimizer": nn.Linear(2, 2)}, "optimizer is a Linear; expected"),
        ({"total_steps": 0}, "total_steps is 0; expected"),
        ({"total_steps": "many"}, "total_steps is 'many'; expected"),
        ({"total_steps": 1e3}, r"total_steps is 1000\.0; expected"),
        ({"model": "net"}, "model is a str; expected"),
        ({"seed": -1}, "seed is -1; expected"),
        ({"seed": 1.5}, r"seed is 1\.5; expected"),
        ({"seed": None}, "seed is None; expected"),
        ({"rollback": "gpu"}, "rollback is 'gpu'; expected True, False or 'cpu'"),
        ({"rollback": None}, "rollback is None; expected"),
        ({"rollback": 1}, "rollback is 1; expected"),
        ({"on_conflict": "ignore"}, "unknown value of on_conflict 'ignore'"),
        ({"on_conflict": None}, "unknown value of on_conflict 'None'"),
        ({"brain": "no/such/folder"}, "no brain in no/such/folder"),
        ({"brain": "defualt"}, "no brain in defualt.*or 'default'"),
        ({"brain": None}, "brain is a NoneType; expected"),
        ({"brain": 5}, "brain is a int; expected"),
    ],
)
def test_a_wrong_argument_is_one_error_that_names_it(options: dict[str, Any], text: str) -> None:
    toy = Toy()
    arguments = {"optimizer": toy.optimizer, "total_steps": 10, **options}
    with pytest.raises(InputError, match=text):
        trimtab.RLScheduler(arguments.pop("optimizer"), arguments.pop("total_steps"), **arguments)
    assert toy.rates == [0.1]
    assert "initial_lr" not in toy.optimizer.param_groups[0]
    make(toy)  # nothing of the failed try is left behind


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (0.0, "lr is 0 in every param group"),
        (float("nan"), "param group 0 has lr nan; expected a finite number"),
        (float("inf"), "param group 0 has lr inf; expected a finite number"),
        (-0.1, r"param group 0 has lr -0\.1; expected a finite number"),
        (torch.tensor(float("nan")), "param group 0 has lr nan; expected a finite number"),
        ("0.1", "param group 0 has lr '0.1'; expected a finite number"),
        (None, "param group 0 has lr None; expected a finite number"),
        (torch.zeros(2), "param group 0 has lr .*; expected a finite number"),
    ],
)
def test_a_rate_that_cannot_be_controlled_is_refused(rate: Any, text: str) -> None:
    toy = Toy()
    toy.optimizer.param_groups[0]["lr"] = rate
    with pytest.raises(InputError, match=text):
        make(toy)


def test_step_without_a_loss_says_what_is_missing() -> None:
    toy = Toy()
    scheduler = make(toy)
    toy.step()
    with pytest.raises(InputError, match=r"needs the loss of the step just taken: call scheduler\.step\(loss\)"):
        scheduler.step()
    for wrong in ("0.1", torch.zeros(2), [1.0], True):
        with pytest.raises(InputError, match="one number; got"):
            scheduler.step(wrong)  # type: ignore[arg-type]
    assert scheduler.last_epoch == 0


def test_conflicts() -> None:
    toy = Toy()
    cosine = lr_scheduler.CosineAnnealingLR(toy.optimizer, 10)
    with pytest.raises(ConflictError, match="CosineAnnealingLR is attached to the optimizer"):
        make(toy)
    with pytest.warns(RuntimeWarning, match="CosineAnnealingLR is attached"):
        scheduler = make(toy, on_conflict="warn")
    assert scheduler.status == "conflict"
    for _ in range(4):
        scheduler.step(toy.step())
        cosine.step()
    assert toy.rates == cosine.get_last_lr()
    assert [row.source for row in scheduler.decisions] == ["conflict"]


def test_a_plateau_that_steps_beside_it_is_found_and_named() -> None:
    toy = Toy("adam", 0.01)
    scheduler = make(toy, brain=replay(0.01))
    plateau = lr_scheduler.ReduceLROnPlateau(toy.optimizer, patience=0)
    for _ in range(2):
        plateau.step(1.0)
    loss = toy.step()
    with pytest.raises(ConflictError, match=r"has lr=0\.001 where 0\.01 was written.*ReduceLROnPlateau"):
        scheduler.step(loss)


def test_one_scheduler_after_another() -> None:
    toy = Toy()
    scheduler = make(toy, total_steps=10, brain=replay(0.05, every=5))
    run(toy, scheduler, 10)
    assert scheduler.status == "over"
    second = make(toy, total_steps=10, brain=replay(0.03, every=5))  # the first writes nothing any more
    run(toy, second, 10)
    assert toy.rates == [0.03]
    third = make(Toy(), total_steps=10)
    assert third.status == "running"


# ---- the brains that we ship ----------------------------------------------------------------------------------------


CONTROLLERS = [name for name in brains.descriptions() if name != "pruning"]  # which is trimtab.prune's


@pytest.mark.parametrize("name", CONTROLLERS)
def test_every_shipped_brain_moves_the_rate_and_resumes_to_the_bit(name: str) -> None:
    whole, half = Toy("adam", 1e-4), Toy("adam", 1e-4)
    one, first = make(whole, 100, brain=name), make(half, 100, brain=name)
    rates = run(whole, one, 100)
    run(half, first, 43)
    state, moved = saved(first.state_dict(), "torch"), Toy("adam", 1e-4)
    moved.load(half.state())
    second = make(moved, 100, brain=name)
    second.load_state_dict(state)
    assert run(moved, second, 57) == rates[43:]
    assert flat(second.state_dict()) == flat(one.state_dict())
    assert len({decision.setting for decision in one.decisions}) > 5
    assert all(decision.read_back == decision.written for decision in one.decisions)


def test_a_learned_brain_hands_over_to_the_rule_outside_its_horizons() -> None:
    for name in CONTROLLERS:
        if brains.folder_of(name) is None:
            continue
        toy = Toy("adam", 1e-3)
        scheduler = make(toy, 100_000, brain=name)
        run(toy, scheduler, 2_001)  # two of its early decisions
        notes = {decision.note for decision in scheduler.decisions if decision.source == "agent"}
        assert all("budget_log_steps" in note and "the rule uwhg decides" in note for note in notes)
        assert notes
