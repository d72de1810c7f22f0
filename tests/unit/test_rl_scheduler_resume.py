"""RLScheduler saved and loaded: resumed equals uninterrupted, to the bit, at every step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import trimtab
from toy import Toy
from toy_scheduler import STEPS, brain_of, flat, make, replay, run, saved
from trimtab.agents.q_learning import QLearning
from trimtab.brain import Brain
from trimtab.errors import InputError

# ---- saved and loaded -----------------------------------------------------------------------------------------------


ARMS: dict[str, Callable[[], Brain | str]] = {
    "default": lambda: "default",
    "q_learning": lambda: brain_of(QLearning(epsilon=0.5, every=4, base="cosine")),
    "plateau": lambda: brain_of(trimtab.registry.load("agent", "plateau")(patience=1, every=3, factor=0.5)),
    "replay": lambda: replay(0.01, 0.02, 0.03, 0.02, every=7),
}


def _resumable(arm: str, optimizer: str, poison: set[int], two_groups: bool) -> tuple[Toy, trimtab.RLScheduler]:
    toy = Toy(optimizer, 0.01, two_groups=two_groups, batch_norm=not two_groups, poison=poison)
    return toy, make(toy, brain=ARMS[arm](), model=toy.model)


def _advance(toy: Toy, scheduler: trimtab.RLScheduler, stop: int) -> list[tuple[torch.Tensor, list[float]]]:
    path = []
    while toy.t < stop:
        if toy.t % 5 == 2:
            scheduler.report(val_loss=toy.val_loss())
        scheduler.step(toy.step())
        path.append((toy.weights(), toy.rates))
    return path


@pytest.mark.usefixtures("unwatched")
@pytest.mark.parametrize("order", ["optimizer first", "scheduler first"])
@pytest.mark.parametrize(
    ("arm", "optimizer", "poison", "two_groups"),
    [
        ("default", "adam", set(), False),
        ("default", "momentum", {17, 30}, False),
        ("default", "adamw", {33}, True),
        ("q_learning", "sgd", {21}, True),
        ("plateau", "rmsprop", {9}, False),
        ("replay", "adagrad", {25}, False),
    ],
)
def test_resumed_equals_uninterrupted_at_every_step(
    arm: str, optimizer: str, poison: set[int], two_groups: bool, order: str
) -> None:
    """Save after step k, load into fresh objects, go on: weights, rates, decisions to the bit, roll-backs included."""
    toy, scheduler = _resumable(arm, optimizer, poison, two_groups)
    states = []
    path = []
    for k in range(STEPS + 1):
        states.append(saved((toy.state(), scheduler.state_dict()), "pickle" if k % 2 else "torch"))
        path += _advance(toy, scheduler, k + 1) if k < STEPS else []
    decisions, best = scheduler.decisions, scheduler.best_state()
    assert sum(row.source == "guard" for row in decisions) >= bool(poison)
    for k, (run_state, own_state) in enumerate(states):
        fresh, again = _resumable(arm, optimizer, poison, two_groups)
        if order == "optimizer first":
            fresh.load(run_state)
            again.load_state_dict(own_state)
        else:
            again.load_state_dict(own_state)
            fresh.load(run_state)
        assert again.decisions == decisions[: len(again.decisions)]
        for (weights, rates), (expected, expected_rates) in zip(_advance(fresh, again, STEPS), path[k:], strict=True):
            assert rates == expected_rates, k
            assert torch.equal(weights.nan_to_num(9e9), expected.nan_to_num(9e9)), k
        assert again.decisions == decisions, k
        assert all(torch.equal(value, best[key]) for key, value in again.best_state().items()), k
        assert again.status == scheduler.status


def test_a_scheduler_built_after_the_optimizer_was_loaded_resumes_too() -> None:
    toy = Toy("adam", 0.01)
    scheduler = make(toy)
    _advance(toy, scheduler, 20)
    run_state, own_state = saved((toy.state(), scheduler.state_dict()), "torch")
    path = _advance(toy, scheduler, STEPS)
    fresh = Toy("adam", 0.01)
    fresh.load(run_state)
    again = make(fresh)
    again.load_state_dict(own_state)
    for (weights, rates), (expected, expected_rates) in zip(_advance(fresh, again, STEPS), path, strict=True):
        assert torch.equal(weights, expected)
        assert rates == expected_rates
    assert again.base_lrs == scheduler.base_lrs == [0.01]


def test_a_tensor_rate_resumes_to_the_bit() -> None:
    def fresh() -> tuple[Toy, trimtab.RLScheduler]:
        toy = Toy("adam", torch.tensor(0.01))
        return toy, make(toy)

    toy, scheduler = fresh()
    _advance(toy, scheduler, 17)
    run_state, own_state = saved((toy.state(), scheduler.state_dict()), "torch")
    path = _advance(toy, scheduler, STEPS)
    other, again = fresh()
    again.load_state_dict(own_state)
    other.load(run_state)
    for (weights, rates), (expected, expected_rates) in zip(_advance(other, again, STEPS), path, strict=True):
        assert torch.equal(weights, expected)
        assert rates == expected_rates


def test_the_state_goes_through_our_own_files_too(tmp_path: Path) -> None:
    from trimtab.storage import load_state, save_state

    toy, scheduler = _resumable("q_learning", "adam", {13}, False)
    _advance(toy, scheduler, 18)
    save_state(tmp_path / "state.safetensors", scheduler.state_dict())
    run_state = saved(toy.state(), "torch")
    path = _advance(toy, scheduler, STEPS)
    fresh, again = _resumable("q_learning", "adam", {13}, False)
    fresh.load(run_state)
    again.load_state_dict(load_state(tmp_path / "state.safetensors"))
    for (weights, rates), (expected, expected_rates) in zip(_advance(fresh, again, STEPS), path, strict=True):
        assert torch.equal(weights, expected)
        assert rates == expected_rates


def test_a_saved_state_does_not_move_with_the_run() -> None:
    toy, scheduler = _resumable("q_learning", "adam", set(), False)
    _advance(toy, scheduler, 18)
    state = scheduler.state_dict()
    before = saved(state, "torch")
    _advance(toy, scheduler, STEPS)
    assert flat(state) == flat(before)


def test_a_gave_up_state_stays_given_up() -> None:
    toy = Toy("sgd", 0.1, poison=range(8, 999))
    scheduler = make(toy, total_steps=None, brain=replay(0.1, every=2))
    run(toy, scheduler, 60)
    assert scheduler.status == "gave_up"
    kept = toy.weights()
    run_state, own_state = saved((toy.state(), scheduler.state_dict()), "torch")
    fresh = Toy("sgd", 0.1, poison=range(999))
    again = make(fresh, total_steps=None, brain=replay(0.1, every=2))
    fresh.load(run_state)
    again.load_state_dict(own_state)
    run(fresh, again, 5)
    assert fresh.rates == [0.0]
    assert torch.equal(fresh.weights(), kept)


def test_states_of_something_else_are_refused() -> None:
    toy = Toy()
    scheduler = make(toy)
    cosine = lr_scheduler.CosineAnnealingLR(Toy().optimizer, 10).state_dict()
    with pytest.raises(InputError, match=r"this is no state of an RLScheduler: it has the keys \['T_max'"):
        scheduler.load_state_dict(cosine)
    other = make(Toy(), brain=replay(0.1)).state_dict()
    with pytest.raises(InputError, match="this state is of the agent 'replay', the controller has 'ppo'"):
        scheduler.load_state_dict(other)
    longer = make(Toy(), total_steps=77).state_dict()
    with pytest.raises(InputError, match="saved with total_steps: 77, the controller has 40"):
        scheduler.load_state_dict(longer)
    with pytest.raises(InputError, match="saved with rollback: no roll-back, the controller has roll-back"):
        scheduler.load_state_dict(make(Toy(), rollback=False).state_dict())
    small = torch.optim.SGD([nn.Parameter(torch.zeros(3))], 0.1)
    with pytest.raises(InputError, match=r"of an optimizer with the parameters \[\(3,\)\], this one has"):
        scheduler.load_state_dict(trimtab.RLScheduler(small, STEPS).state_dict())
    assert scheduler.last_epoch == 0
    run(toy, scheduler)
    assert scheduler.status == "over"


@pytest.mark.usefixtures("unwatched")
def test_resumed_equals_uninterrupted_with_parameters_that_get_no_gradient() -> None:
    """What was copied for the next measurement must find its own parameters again, not the first ones of that size."""

    def fresh() -> tuple[Toy, trimtab.RLScheduler]:
        toy = Toy("adam", 0.01)
        groups = [{"params": [nn.Parameter(torch.full((5,), 9.0))]}, {"params": list(toy.model.parameters())}]
        toy.optimizer = torch.optim.Adam(groups, 0.01)
        return toy, make(toy)

    toy, scheduler = fresh()
    states, path = [], []
    for k in range(STEPS):
        states.append(saved((toy.state(), scheduler.state_dict()), "torch"))
        path += _advance(toy, scheduler, k + 1)
    for k, (run_state, own_state) in enumerate(states):
        other, again = fresh()
        other.load(run_state)
        again.load_state_dict(own_state)
        for (weights, rates), (expected, expected_rates) in zip(_advance(other, again, STEPS), path[k:], strict=True):
            assert rates == expected_rates, k
            assert torch.equal(weights, expected), k
