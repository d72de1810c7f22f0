"""RLScheduler in the loops that people write: order of calls, groups, tensors, scalers, pickles, resumed runs."""

from __future__ import annotations

import io
import pickle
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils._python_dispatch import TorchDispatchMode

import trimtab
from toy import OPTIMIZERS, Toy, seeded
from trimtab.agents.base import Base, Timing
from trimtab.agents.q_learning import QLearning
from trimtab.agents.scripted import Replay
from trimtab.brain import Brain
from trimtab.errors import BrainError, ConflictError, InputError
from trimtab.records import Decision
from trimtab.spec import ControlSpec

STEPS = 40


def make(toy: Toy, total_steps: int | None = STEPS, **options: Any) -> trimtab.RLScheduler:
    return trimtab.RLScheduler(toy.optimizer, total_steps, **options)


def replay(*settings: float, every: int = 10, base: str = "constant", high: float | None = None) -> Brain:
    agent = Replay([[setting] for setting in settings], Timing(every=every), Base(base))
    options = {} if high is None else {"lr": {"high": high}}
    return Brain(agent, ControlSpec.for_agent(agent, knob_options=options))


def run(toy: Toy, scheduler: trimtab.RLScheduler, n_steps: int = STEPS) -> list[list[float]]:
    rates = []
    for _ in range(n_steps):
        scheduler.step(toy.step())
        rates.append(toy.rates)
    return rates


def trace(scheduler: trimtab.RLScheduler) -> list[Decision]:
    return scheduler.decisions


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


def test_repr_and_state_say_which_brain_it_is() -> None:
    toy = Toy()
    scheduler = make(toy)
    text = repr(scheduler)
    assert text.startswith("RLScheduler(brain='default' (uwhg), total_steps=40, step=0, lr=[0.1], running, snapshots")
    assert scheduler.state_dict()["brain"] == "default (uwhg)"
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
        ends.append((toy.weights(), trace(scheduler)))
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


# ---- gradient scalers -----------------------------------------------------------------------------------------------


def test_steps_skipped_by_a_gradient_scaler_are_known_and_the_run_goes_on() -> None:
    toy = Toy("adam", 0.01)
    scheduler = make(toy)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    moved = []
    for t in range(STEPS):
        before = toy.weights()
        toy.optimizer.zero_grad()
        loss = toy.forward(t)
        scaler.scale(loss).backward()
        if t in (5, 6, 20):
            toy.model[0].weight.grad[0, 0] = float("inf")
        scaler.step(toy.optimizer)
        scaler.update()
        scheduler.step(loss)
        moved.append(not torch.equal(before, toy.weights()))
    assert [t for t, has_moved in enumerate(moved) if not has_moved] == [5, 6, 20]
    assert scheduler.skipped_steps == 3
    assert scheduler.last_epoch == STEPS
    assert [row.source for row in scheduler.decisions] == ["agent"] * len(scheduler.decisions)


def test_steps_that_a_fused_optimizer_skips_by_itself_are_known() -> None:
    toy = Toy("adam", 0.01)
    toy.optimizer = torch.optim.Adam(toy.model.parameters(), 0.01, fused=True)
    scheduler = make(toy)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for t in range(STEPS):
        toy.optimizer.zero_grad()
        loss = toy.forward(t)
        scaler.scale(loss).backward()
        if t in (5, 6, 20):
            toy.model[0].weight.grad[0, 0] = float("inf")
        scaler.step(toy.optimizer)
        scaler.update()
        scheduler.step(loss)
    assert scheduler.skipped_steps == 3
    assert scheduler.status == "over"
    assert [row.source for row in scheduler.decisions] == ["agent"] * len(scheduler.decisions)


def test_scaled_gradients_give_the_decisions_of_unscaled_ones() -> None:
    """A fused optimizer unscales the gradient itself: the probe must not see it 65,536 times too large."""
    seen = []
    for scale in (None, 2.0**16):
        toy = Toy("adam", 0.01)
        toy.optimizer = torch.optim.Adam(toy.model.parameters(), 0.01, fused=True)
        scheduler = make(toy)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        norms = []
        for t in range(STEPS):
            toy.optimizer.zero_grad()
            loss = toy.forward(t)
            scaler.scale(loss).backward()
            scaler.step(toy.optimizer)
            scaler.update()
            scheduler.step(loss)
            interval = scheduler._controller.last_interval
            norms.append(0.0 if interval is None else float(np.nan_to_num(interval.grad_norm)))
        seen.append((norms, [row.read_back for row in scheduler.decisions]))
    assert seen[0][0] == pytest.approx(seen[1][0], rel=1e-4)
    assert seen[0][1] == pytest.approx(seen[1][1], rel=1e-4)


def test_a_rule_does_not_move_on_what_was_not_measured() -> None:
    """Every step of the first decisions skipped: nothing was measured, so nothing may be concluded from it."""
    toy = Toy("sgd", 0.1)
    scheduler = make(toy, total_steps=200)
    for _ in range(14):
        scheduler.step(toy.forward(0).detach())  # no optimizer.step() at all
    assert scheduler.skipped_steps == 14
    assert len(scheduler.decisions) == 7
    assert {row.setting for row in scheduler.decisions} == {0.1}


# ---- saved and loaded -----------------------------------------------------------------------------------------------


def saved(value: Any, how: str) -> Any:
    if how == "pickle":
        return pickle.loads(pickle.dumps(value))  # noqa: S301 (what users do; ours holds no code)
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


ARMS: dict[str, Callable[[], Brain | str]] = {
    "default": lambda: "default",
    "q_learning": lambda: _brain(QLearning(epsilon=0.5, every=4, base="cosine")),
    "plateau": lambda: _brain(trimtab.registry.load("agent", "plateau")(patience=1, every=3, factor=0.5)),
    "replay": lambda: replay(0.01, 0.02, 0.03, 0.02, every=7),
}


def _brain(agent: Any) -> Brain:
    return Brain(agent, ControlSpec.for_agent(agent))


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
    decisions, best = trace(scheduler), scheduler.best_state()
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
        assert trace(again) == decisions, k
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
    assert _flat(state) == _flat(before)


def _flat(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist().__repr__()
    if isinstance(value, dict):
        return {key: _flat(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_flat(item) for item in value]
    return repr(value)


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
    with pytest.raises(InputError, match="this state is of the agent 'replay', the controller has 'uwhg'"):
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


# ---- no synchronisation ---------------------------------------------------------------------------------------------


class Counting(TorchDispatchMode):
    """Counts the operators that would wait for a device."""

    WAITS = ("_local_scalar_dense", "item", "equal", "nonzero", "is_nonzero", "allclose")

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.WAITS:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lr", ["float", "tensor"])
@pytest.mark.parametrize("width", [8, 1024])  # small networks are measured in NumPy, large ones in torch
def test_nothing_waits_for_the_device_between_decisions(lr: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: Counter[str] = Counter()
    for name in ("tolist", "item", "cpu", "__float__", "__bool__", "__int__"):
        original = getattr(torch.Tensor, name)

        def counted(self: torch.Tensor, *args: Any, _name: str = name, _call: Any = original) -> Any:
            reads[_name] += 1
            return _call(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    with seeded(1):
        model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))
        hidden = nn.Linear(width, width) if width > 8 else nn.Identity()
    parameters = [*model.parameters(), *hidden.parameters()]
    rate: Any = torch.tensor(0.01) if lr == "tensor" else 0.01
    optimizer = torch.optim.SGD(parameters, rate, foreach=False)
    scheduler = trimtab.RLScheduler(optimizer, brain=replay(*[0.01, 0.02] * 20, every=10))
    inputs = torch.ones(2, 4)
    at_steps, at_decisions = [], []
    for _ in range(60):
        n_decisions = len(scheduler.decisions)
        optimizer.zero_grad()
        loss = model[2](hidden(model[1](model[0](inputs)))).square().mean()
        loss.backward()
        reads.clear()
        with Counting() as counting:
            optimizer.step()
            own = sum(reads.values()) + sum(counting.seen.values()) if lr == "tensor" else 0  # torch reads the rate
            scheduler.step(loss)
        total = sum(reads.values()) + sum(counting.seen.values()) - own
        (at_decisions if len(scheduler.decisions) > n_decisions else at_steps).append(total)
    assert at_steps == [0] * 54
    assert len(at_decisions) == 6
    # On the CPU, where nothing waits, each of the ten losses may be read by itself.
    assert max(at_decisions) <= 2 * 10 + 4, at_decisions
    assert len(set(at_decisions)) == 1, at_decisions


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_nothing_waits_for_a_cuda_device_between_decisions() -> None:
    toy = Toy("sgd", 0.01, device="cuda")
    scheduler = make(toy, total_steps=None, brain=replay(*[0.01, 0.02] * 20, every=10))
    for t in range(45):
        toy.optimizer.zero_grad()
        loss = toy.forward(t)
        loss.backward()
        torch.cuda.set_sync_debug_mode("default" if (t + 1) % 10 == 0 else "error")
        try:
            toy.optimizer.step()
            scheduler.step(loss)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(scheduler.decisions) == 4


def test_it_works_on_each_device(device: torch.device) -> None:
    toy = Toy("adam", 0.01, device=device, batch_norm=True, poison={23})
    scheduler = make(toy, model=toy.model)
    run(toy, scheduler, 30)
    state = scheduler.state_dict()
    run_state = toy.state()
    run(toy, scheduler, 10)
    assert torch.isfinite(toy.weights()).all()
    assert [row.source for row in scheduler.decisions].count("guard") == 1
    fresh = Toy("adam", 0.01, device=device, batch_norm=True, poison={23})
    again = make(fresh, model=fresh.model)
    again.load_state_dict(saved(state, "torch"))
    fresh.load(run_state)
    run(fresh, again, 10)
    assert torch.equal(fresh.weights(), toy.weights())
    assert again.decisions == scheduler.decisions


def test_the_snapshot_on_the_cpu_rolls_back_the_same(device: torch.device) -> None:
    ends = []
    for rollback in (True, "cpu"):
        toy = Toy("adam", 0.01, device=device, poison={23})
        scheduler = make(toy, rollback=rollback)
        run(toy, scheduler)
        ends.append(toy.weights())
        kept = scheduler._controller._snapshot._tensors
        assert {tensor.device.type for tensor in kept} <= ({"cpu"} if rollback == "cpu" else {device.type, "cpu"})
    assert torch.equal(*ends)


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
    assert steps[:7] == [10, 20, 30, 40, 50, 60, 70]
    assert len(steps) == 7 + 19 or len(steps) == 7 + 20
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


# ---- what networks are made of --------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_any_optimizer_of_torch_is_controlled_and_rolled_back(optimizer: str) -> None:
    toy = Toy(optimizer, 0.01, poison={23})
    scheduler = make(toy, model=toy.model)
    run(toy, scheduler)
    assert torch.isfinite(toy.weights()).all()
    assert [row.source for row in scheduler.decisions].count("guard") == 1
    assert scheduler.status == "over"


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_after_a_roll_back_everything_is_as_at_the_intervals_start(optimizer: str) -> None:
    toy = Toy(optimizer, 0.01, batch_norm=True, poison={23})
    scheduler = make(toy, brain=replay(0.01), model=toy.model)
    run(toy, scheduler, 20)
    before = toy.state()
    run(toy, scheduler, 10)
    after = toy.state()
    after["optimizer"]["param_groups"][0]["lr"] = before["optimizer"]["param_groups"][0]["lr"]
    after["t"] = before["t"]
    assert _flat(after) == _flat(before)


def test_a_rate_of_a_million_is_survived() -> None:
    toy = Toy("adam", 0.01)
    scheduler = make(toy, total_steps=80, brain=replay(0.01, 0.01, 1e6, 0.01, 0.01, high=1e7), model=toy.model)
    run(toy, scheduler, 80)
    assert torch.isfinite(toy.weights()).all()
    assert any(row.source == "guard" and row.before == 1e6 for row in scheduler.decisions)
    assert toy.val_loss() < 1.0


def test_frozen_and_unused_parameters_do_not_matter() -> None:
    ends = []
    for extra in (False, True):
        toy = Toy("adam", 0.01)
        if extra:
            frozen, unused = nn.Parameter(torch.ones(5), requires_grad=False), nn.Parameter(torch.ones(7))
            toy.optimizer.add_param_group({"params": [frozen, unused]})
        scheduler = make(toy)
        run(toy, scheduler)
        ends.append((toy.weights(), [row.read_back for row in scheduler.decisions]))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


def test_a_parameter_that_gets_its_gradient_only_sometimes() -> None:
    toy = Toy("adam", 0.01)
    sometimes = nn.Parameter(torch.ones(8, 4))  # the shape of the first layer's weight
    toy.optimizer.add_param_group({"params": [sometimes]})
    scheduler = make(toy)
    for t in range(STEPS):
        sometimes.grad = torch.ones(8, 4) if t % 2 else None
        loss = toy.forward(t)
        toy.model.zero_grad()
        loss.backward()
        toy.optimizer.step()
        scheduler.step(loss)
    assert scheduler.status == "over"
    assert all(np.isfinite(row.read_back) for row in scheduler.decisions)


def test_sparse_gradients_do_not_break_it() -> None:
    with seeded(0):
        embedding, head = nn.Embedding(10, 4, sparse=True), nn.Linear(4, 1)
    optimizer = torch.optim.SGD([*embedding.parameters(), *head.parameters()], 0.1)
    scheduler = trimtab.RLScheduler(optimizer, STEPS)
    for t in range(STEPS):
        optimizer.zero_grad()
        loss = (head(embedding(torch.tensor([t % 10, (t + 3) % 10]))) - 1).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step(loss)
    assert scheduler.status == "over"
    interval = scheduler._controller.last_interval
    assert interval is not None
    assert 0 < float(interval.update_ratio) < 1  # of the dense part


def test_sparse_gradients_alone_are_nothing_measured() -> None:
    with seeded(0):
        embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = torch.optim.SparseAdam(embedding.parameters(), 0.01)
    scheduler = trimtab.RLScheduler(optimizer, STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = embedding(torch.tensor([0, 1])).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step(loss)
    assert {row.setting for row in scheduler.decisions} == {0.01}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    toy = Toy("adam", 0.01, dtype=dtype, poison={23})
    scheduler = make(toy, model=toy.model)
    run(toy, scheduler)
    assert torch.isfinite(toy.weights()).all()
    assert [row.source for row in scheduler.decisions].count("guard") == 1
    assert all(p.dtype == dtype for p in toy.model.parameters())


def test_parameters_of_mixed_dtypes_and_a_loss_of_another() -> None:
    with seeded(0):
        first, second = nn.Linear(4, 4), nn.Linear(4, 1).to(torch.bfloat16)
    optimizer = torch.optim.AdamW([*first.parameters(), *second.parameters()], 0.01)
    scheduler = trimtab.RLScheduler(optimizer, STEPS)
    for t in range(STEPS):
        optimizer.zero_grad()
        loss = second(first(torch.ones(2, 4)).to(torch.bfloat16)).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step(loss.float() if t % 2 else loss)
    assert scheduler.status == "over"


def test_large_half_precision_weights_are_not_taken_for_infinite() -> None:
    weight = nn.Parameter(torch.full((300, 300), 1.5, dtype=torch.float16))  # they add up to 135,000 > 65,504
    optimizer = torch.optim.SGD([weight], 1e-3)
    scheduler = trimtab.RLScheduler(optimizer, brain=replay(1e-3, every=5))
    for _ in range(20):
        weight.grad = torch.full_like(weight, 1e-3)
        optimizer.step()
        scheduler.step(1.0)
    assert [row.source for row in scheduler.decisions] == ["agent"] * 4


def test_an_optimizer_that_keeps_lists_in_its_state_is_rolled_back() -> None:
    """L-BFGS keeps lists of past steps, which it changes in place."""
    with seeded(0):
        target, weight = torch.randn(5), nn.Parameter(torch.zeros(5))
    optimizer = torch.optim.LBFGS([weight], lr=0.1, max_iter=2)
    scheduler = trimtab.RLScheduler(optimizer, brain=replay(0.1, every=5))
    for t in range(10):

        def closure(t: int = t) -> torch.Tensor:
            optimizer.zero_grad()
            loss = ((weight - target) ** 4).sum()
            loss.backward()
            return loss

        if t == 5:
            before = _flat(optimizer.state_dict()["state"])
        loss = optimizer.step(closure)
        scheduler.step(loss * float("nan") if t == 8 else loss)
    assert scheduler.decisions[-1].source == "guard"
    assert _flat(optimizer.state_dict()["state"]) == before


def test_a_loss_tensor_that_is_used_again_counts_as_it_was() -> None:
    """Gradient accumulation often adds up in one tensor and zeroes it for the next step."""
    toy = Toy()
    scheduler = make(toy, total_steps=None, brain=replay(0.1, every=4))
    total = torch.zeros(())
    for value in (4.0, 2.0, 1.0, 1.0):
        total.zero_()
        total += value
        toy.step()
        scheduler.step(total)
        total.zero_()
    interval = scheduler._controller.last_interval
    assert interval is not None
    assert (interval.train_loss, interval.first_half_loss, interval.second_half_loss) == (2.0, 3.0, 1.0)


def test_the_loss_is_kept_without_its_graph() -> None:
    toy = Toy()
    scheduler = make(toy)
    loss = toy.forward(0)
    loss.backward()
    toy.optimizer.step()
    scheduler.step(loss)
    assert all(kept.grad_fn is None for kept in scheduler._controller._meter._losses)


def test_a_brain_that_learns_goes_on_learning_here() -> None:
    agent = QLearning(every=4)
    toy = Toy()
    scheduler = make(toy, brain=_brain(agent))
    run(toy, scheduler)
    assert scheduler.brain.agent is agent
    assert agent.n_updates == 9  # decisions after 4, 8 .. 36; the budget's end gives the last one its reward


def test_the_seed_is_the_explorations() -> None:
    paths = []
    for seed in (0, 0, 1):
        toy = Toy()
        scheduler = make(toy, brain=_brain(QLearning(every=2, epsilon=1.0)), seed=seed)
        run(toy, scheduler)
        paths.append([row.action for row in scheduler.decisions])
    assert paths[0] == paths[1] != paths[2]


def test_a_broken_brain_folder_is_a_brain_error(tmp_path: Path) -> None:
    (tmp_path / "brain.json").write_text("{")
    with pytest.raises(BrainError, match="torn or foreign"):
        make(Toy(), brain=tmp_path)
