"""Gate, guard and snapshot: limits as numbers, every kind of fault, everything put back."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from toy import Toy
from trimtab.errors import InputError, UnknownNameError
from trimtab.run_state import Interval, RunState
from trimtab.safety import Gate, Guard, Safety, Snapshot, log_noise

# ---- gate -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gate", "asked", "decision", "last_change", "granted", "note"),
    [
        (Gate(), 7.0, 0, None, 7.0, ""),
        (Gate(burn_in=3), 7.0, 2, None, 1.0, "gate: burn-in"),
        (Gate(burn_in=3), 7.0, 3, None, 7.0, ""),
        (Gate(min_distance=3), 7.0, 5, 3, 1.0, "gate: too soon after the last change"),
        (Gate(min_distance=3), 7.0, 6, 3, 7.0, ""),
        (Gate(max_factor=2), 7.0, 0, None, 2.0, "gate: change too large"),
        (Gate(max_factor=2), 0.1, 0, None, 0.5, "gate: change too large"),
        (Gate(max_factor=2), 1.9, 0, None, 1.9, ""),
        (Gate(max_factor=8), 0.0, 0, None, 0.125, "gate: change too large"),
    ],
)
def test_gate(gate: Gate, asked: float, decision: int, last_change: int | None, granted: float, note: str) -> None:
    assert gate.limit(asked, 1.0, decision, last_change) == (granted, note)


@pytest.mark.parametrize(
    "limits", [{"burn_in": -1}, {"min_distance": 0}, {"max_factor": 1.0}, {"max_factor": math.nan}]
)
def test_a_gate_out_of_range(limits: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected burn_in >= 0, min_distance >= 1, max_factor > 1"):
        Gate(**limits)


@pytest.mark.parametrize("options", [{"cut": 1.0}, {"cut": math.nan}, {"max_rollbacks": 0}])
def test_safety_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected max_rollbacks >= 1 and the others above 1"):
        Safety(**options)
    with pytest.raises(UnknownNameError, match="unknown value of on_conflict 'eror'; did you mean 'error'"):
        Safety(on_conflict="eror")


# ---- guard ----------------------------------------------------------------------------------------------------------


def judged(*intervals: Interval, initial_loss: float = 2.0, finite: bool = True, noise: float = 0.0) -> str:
    """The reason that the guard gives for the last interval."""
    state = RunState(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))
    state.initial_loss = initial_loss
    guard = Guard()
    swing = math.exp(noise * math.sqrt(1.5))  # five losses up and down by this have that noise
    losses = [1.0, swing, 1.0, swing, 1.0]
    assert log_noise(losses) == pytest.approx(noise)
    reason = ""
    for interval in intervals:
        state.record(interval)
        reason = guard.judge(state, weights_are_finite=finite, losses=losses).reason
    return reason


def train(loss: float, late: float | None = None) -> Interval:
    return Interval(loss, loss, loss if late is None else late)


def val(loss: float, train_loss: float = 1.0) -> Interval:
    return Interval(train_loss, train_loss, train_loss, loss)


@pytest.mark.parametrize(
    ("intervals", "reason"),
    [
        ([train(2.0)], ""),
        ([train(3.99)], ""),
        ([train(4.01)], "the train loss 4.01 is above 2 x its initial 2"),
        ([train(2.5, late=4.5)], "the train loss 4.5 is above 2 x its initial 2"),
        ([train(4.5, late=2.5)], ""),  # it has come back by itself
        ([train(0.9), train(2.99)], ""),  # above 3 x the best, but not above 1.5 x the initial one
        ([train(0.9), train(3.2)], "the train loss 3.2 is above 3 x its best 0.9"),
        ([train(1.2), train(3.2)], ""),
        ([train(math.nan)], "the train loss is not finite"),
        ([train(math.inf)], "the train loss is not finite"),
        ([train(0.0), train(1e9)], "the train loss 1e+09 is above 2 x its initial 2"),  # a best of 0 hides nothing
        ([Interval(5.0, 5.0, math.nan)], "the train loss 5 is above 2 x its initial 2"),  # an interval of one step
        ([val(3.0), val(5.9)], ""),
        ([val(3.0), val(6.1)], "the validation loss 6.1 is above 2 x its initial 3"),
        ([val(3.0), val(1.5), val(4.6)], "the validation loss 4.6 is above 3 x its best 1.5"),
        ([val(3.0), val(math.inf)], "the validation loss inf is above 2 x its initial 3"),
        ([val(3.0), val(2.0, train_loss=50.0)], ""),  # where both are known, validation counts
        ([val(3.0), train(50.0)], "the train loss 50 is above 2 x its initial 2"),  # none in this interval
        ([val(1e9, train_loss=1e9)], "the train loss 1e+09 is above 2 x its initial 2"),  # the very first one
        # What was learned is lost: both are above 3 x their best and half of what they were at first.
        (
            [val(3.0), val(0.4, 0.3), val(1.51, 1.01)],
            "what was learned is lost: the validation loss was 0.4 and is 1.51 again",
        ),
        ([val(3.0), val(0.4, 0.3), val(1.51, 0.99)], ""),  # the rows are still known by heart
        ([val(3.0), val(0.4, 0.3), val(1.49, 1.01)], ""),
        ([val(3.0), val(0.6, 0.3), val(1.79, 1.01)], ""),
        ([val(3.0), val(0.4, 0.4), val(1.51, 1.19)], ""),
        ([val(3.0), val(0.4, 0.3), train(1.9)], ""),  # the train loss alone says less
        ([val(3.0), val(0.4, 0.3), train(0.3), val(1.6, 1.9)], ""),  # what the interval before ended at is not known
        ([val(3.0), val(0.4, 0.3), val(1.6, 0.3), val(1.6, 1.9)], ""),  # it had ended there, too
        ([val(math.inf), val(math.inf)], ""),  # a validation that never was a number says nothing
    ],
)
def test_guard(intervals: list[Interval], reason: str) -> None:
    assert judged(*intervals) == reason


def test_a_weight_that_is_not_finite_is_a_fault() -> None:
    assert judged(train(1.0), finite=False) == "a weight is not finite"


def test_multiples_of_negative_losses_mean_nothing() -> None:
    assert judged(train(-3.0), train(50.0), initial_loss=-1.0) == ""
    assert judged(train(-3.0), train(3.9), initial_loss=2.0) == ""
    assert judged(train(math.nan), initial_loss=-1.0) == "the train loss is not finite"


def test_noise_widens_the_limits_of_the_train_loss_alone() -> None:
    factor = math.exp(1.5 * 0.5)
    assert judged(train(4.0 * factor * 0.99), noise=0.5) == ""
    assert "is above 4.23 x its initial 2" in judged(train(4.0 * factor * 1.01), noise=0.5)
    assert judged(val(3.0), val(6.1), noise=0.5) == "the validation loss 6.1 is above 2 x its initial 3"
    lost = (val(3.0), val(0.4, 0.2), val(1.6, 1.5))
    assert judged(*lost, noise=0.2) == "what was learned is lost: the validation loss was 0.4 and is 1.6 again"
    assert judged(*lost, noise=0.5) == ""
    assert judged(train(math.nan), noise=100.0) == "the train loss is not finite"


def test_log_noise() -> None:
    growth = [1.5**n for n in range(10)]
    assert log_noise(growth) == pytest.approx(0.0, abs=1e-12)  # a steady rise is no noise
    rng = np.random.default_rng(0)
    for spread in (0.1, 0.5, 2.0):
        losses = np.exp(spread * rng.normal(size=4000) - 0.001 * np.arange(4000)).tolist()
        assert log_noise(losses) == pytest.approx(spread, rel=0.1)
    assert log_noise([1.0, 2.0]) == log_noise([]) == 0.0
    assert log_noise([1.0, -1.0, 2.0, 3.0]) == log_noise([1.0, math.nan, 2.0]) == log_noise([1.0, math.inf, 1.0]) == 0.0


def test_the_guard_gives_up_after_so_many_in_a_row() -> None:
    state = RunState(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))
    state.initial_loss = 1.0
    guard = Guard(max_rollbacks=2)
    kinds = []
    for loss in (math.nan, math.nan, 1.0, math.nan, math.nan, math.nan):
        state.record(train(loss))
        kinds.append(guard.judge(state, weights_are_finite=True).kind)
    assert kinds == ["roll_back", "roll_back", "ok", "roll_back", "roll_back", "give_up"]
    assert (guard.in_a_row, guard.total) == (3, 5)
    other = Guard(max_rollbacks=2)
    other.load_state_dict(guard.state_dict())
    assert other.state_dict() == {"in_a_row": 3, "total": 5, "has_gone_back": False, "has_begun": True}


def test_until_an_interval_was_good_the_train_loss_counts_beside_the_validation_loss() -> None:
    """Reported before the first step, the validation loss rises little where the first steps kill a network's units."""
    state = RunState(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))
    state.initial_loss = 2.3
    state.note_val_loss(2.3)
    guard, reasons = Guard(), []
    for train_loss in (6.0, 4.7, 4.5, 6.0):
        before = state.summary
        state.record(val(2.8, train_loss))
        reasons.append(guard.judge(state, weights_are_finite=True).reason)
        if reasons[-1]:
            state.summary = before
    faults = [f"the train loss {loss:g} is above 2 x its initial 2.3" for loss in (6.0, 4.7)]
    assert reasons == [*faults, "", ""]


def test_what_was_lost_is_gone_back_to_once() -> None:
    """What a roll-back gives back may have been ruined after its validation; then training on is better."""
    state = RunState(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))
    state.initial_loss = 2.0
    guard, kinds = Guard(), []
    for interval in (val(3.0), val(0.4, 0.3), val(1.6, 1.9), val(1.7, 1.9), val(0.3, 0.2), val(1.6, 1.9)):
        before = state.summary
        state.record(interval)
        kinds.append(guard.judge(state, weights_are_finite=True).kind)
        if kinds[-1] == "roll_back":
            state.summary = before
    assert kinds == ["ok", "ok", "roll_back", "ok", "ok", "roll_back"]
    other = Guard()
    other.load_state_dict(guard.state_dict())
    assert other.has_gone_back
    other.load_state_dict({"in_a_row": 0, "total": 1})  # of a checkpoint of before
    assert not other.has_gone_back
    assert other.has_begun


# ---- snapshot -------------------------------------------------------------------------------------------------------

OPTIMIZERS = ["sgd", "momentum", "adam", "adamw", "rmsprop", "adagrad"]


def frozen(toy: Toy) -> list[Any]:
    """Everything that a snapshot of weights, buffers and optimizer state has to bring back."""
    state = toy.state()
    return [_plain(state["model"]), _plain(state["optimizer"]["state"])]


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), value.tolist())
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("on_cpu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # small float32 networks are copied end to end
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_snapshot_brings_everything_back_in_place(
    optimizer: str, dtype: torch.dtype, on_cpu: bool, device: torch.device
) -> None:
    toy = Toy(optimizer, 0.05, batch_norm=True, dtype=dtype, device=device)
    snapshot = Snapshot(toy.optimizer, toy.model, on_cpu=on_cpu)
    for first in (0, 3, 4):  # before the optimizer has a state, and after
        for _ in range(first):
            toy.step()
        kept = frozen(toy)
        places = [p.data_ptr() for p in toy.model.parameters()]
        snapshot.take()
        for _ in range(5):
            toy.step()
        assert frozen(toy) != kept
        snapshot.restore()
        assert frozen(toy) == kept
        assert [p.data_ptr() for p in toy.model.parameters()] == places
        toy.step()
        snapshot.restore()
        assert frozen(toy) == kept, "the copy itself was trained on"


def test_a_snapshot_of_a_large_network_brings_everything_back() -> None:
    model = nn.Sequential(nn.Linear(600, 400), nn.BatchNorm1d(400), nn.Linear(400, 1))
    optimizer = torch.optim.Adam(model.parameters())
    snapshot = Snapshot(optimizer, model)

    def train_a_step() -> None:
        model(torch.ones(2, 600) * torch.tensor([[1.0], [2.0]])).square().mean().backward()
        optimizer.step()

    for _ in range(2):
        train_a_step()
    snapshot.take()
    kept = _plain([model.state_dict(), optimizer.state_dict()["state"]])
    train_a_step()
    snapshot.restore()
    assert _plain([model.state_dict(), optimizer.state_dict()["state"]]) == kept
    n_numbers = 600 * 400 + 400 + 2 * 400 + 400 + 1
    assert snapshot.size_bytes == 4 * (3 * n_numbers + 2 * 400) + 8 + 4 * len(list(model.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_was_copied_for_the_sum_of_weights_is_kept_or_not(dtype: torch.dtype) -> None:
    toy = Toy("adam", 0.05, batch_norm=True, dtype=dtype)
    toy.step()
    snapshot = Snapshot(toy.optimizer, toy.model)
    snapshot.take()
    first = frozen(toy)
    toy.step()
    snapshot.sum_of_weights()
    snapshot.restore()  # the copy made for the sum is of weights that were bad
    assert frozen(toy) == first
    toy.step()
    second = frozen(toy)
    snapshot.sum_of_weights()
    snapshot.keep()
    for _ in range(2):
        toy.step()
        snapshot.restore()
        assert frozen(toy) == second
    toy.step()
    third = frozen(toy)
    snapshot.keep()  # nothing was copied since: it takes one
    toy.step()
    snapshot.restore()
    assert frozen(toy) == third


def test_without_the_model_buffers_stay() -> None:
    toy = Toy(batch_norm=True)
    snapshot = Snapshot(toy.optimizer)
    snapshot.take()
    before = toy.model[1].running_mean.clone()
    toy.step()
    snapshot.restore()
    assert not torch.equal(toy.model[1].running_mean, before)


def test_a_snapshot_follows_an_optimizer_whose_state_was_loaded() -> None:
    toy = Toy("adam", 0.01)
    toy.step()
    snapshot = Snapshot(toy.optimizer, toy.model)
    snapshot.take()
    kept = frozen(toy)
    toy.optimizer.load_state_dict(toy.state()["optimizer"])  # other tensors from now on
    toy.step()
    snapshot.restore()
    assert frozen(toy) == kept
    toy.step()
    kept = frozen(toy)
    snapshot.take()
    toy.step()
    snapshot.restore()
    assert frozen(toy) == kept


def test_a_snapshots_state_rolls_back_another_run() -> None:
    toy = Toy("adam", 0.01, batch_norm=True)
    for _ in range(3):
        toy.step()
    snapshot = Snapshot(toy.optimizer, toy.model)
    snapshot.take()
    kept, state = frozen(toy), snapshot.state_dict()
    toy.step()
    other = Toy("adam", 0.01, batch_norm=True)
    again = Snapshot(other.optimizer, other.model)
    again.check(state)
    again.load_state_dict(state)
    other.step()
    again.restore()
    assert frozen(other) == kept
    with pytest.raises(InputError, match="this state is of an optimizer with the parameters"):
        Snapshot(torch.optim.SGD([nn.Parameter(torch.zeros(2))], 0.1)).check(state)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_sum_of_weights_shows_one_that_is_not_finite(dtype: torch.dtype, bad: float) -> None:
    weights = [nn.Parameter(torch.ones(40, 3, dtype=dtype)), nn.Parameter(torch.ones(5, dtype=dtype))]
    snapshot = Snapshot(torch.optim.SGD(weights, 0.1))
    assert math.isfinite(float(snapshot.sum_of_weights()))
    with torch.no_grad():
        weights[0][7, 1] = bad
    assert not math.isfinite(float(snapshot.sum_of_weights()))


def test_infinities_of_both_signs_do_not_cancel() -> None:
    for size in (4, 300_000):
        weight = nn.Parameter(torch.zeros(size))
        snapshot = Snapshot(torch.optim.SGD([weight], 0.1))
        with torch.no_grad():
            weight[0], weight[1] = math.inf, -math.inf
        assert not math.isfinite(float(snapshot.sum_of_weights()))
