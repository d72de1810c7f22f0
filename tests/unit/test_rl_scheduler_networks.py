"""RLScheduler with what runs are made of: scalers, devices, optimizers, odd parameters and dtypes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import trimtab
from toy import OPTIMIZERS, Toy, seeded
from toy_scheduler import STEPS, brain_of, flat, make, replay, run, saved
from trimtab.agents.q_learning import QLearning
from trimtab.errors import BrainError

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


@pytest.mark.parametrize(("brain", "early"), [("default", 6), ("default-open", 7)])
def test_nothing_moves_on_what_was_not_measured(brain: str, early: int) -> None:
    """Every step of the first decisions skipped: nothing was measured, so nothing may be concluded from it."""
    toy = Toy("sgd", 0.1)
    scheduler = make(toy, total_steps=200, brain=brain)
    for _ in range(14):
        scheduler.step(toy.forward(0).detach())  # no optimizer.step() at all
    assert scheduler.skipped_steps == 14
    assert len(scheduler.decisions) == early
    assert {row.setting for row in scheduler.decisions} == {0.1}


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
    monkeypatch.setattr("trimtab.meter._is_near", lambda loss: False)  # as of a loss on a device: one here is read
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
    assert max(at_decisions) <= 6, at_decisions
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
    assert flat(after) == flat(before)


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
            before = flat(optimizer.state_dict()["state"])
        loss = optimizer.step(closure)
        scheduler.step(loss * float("nan") if t == 8 else loss)
    assert scheduler.decisions[-1].source == "guard"
    assert flat(optimizer.state_dict()["state"]) == before


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
    assert scheduler._controller._meter._losses == [loss.item()]


def test_a_brain_that_learns_goes_on_learning_here() -> None:
    agent = QLearning(every=4)
    toy = Toy()
    scheduler = make(toy, brain=brain_of(agent))
    run(toy, scheduler)
    assert scheduler.brain.agent is agent
    assert agent.n_updates == 9  # decisions after 4, 8 .. 36; the budget's end gives the last one its reward


def test_the_seed_is_the_explorations() -> None:
    paths = []
    for seed in (0, 0, 1):
        toy = Toy()
        scheduler = make(toy, brain=brain_of(QLearning(every=2, epsilon=1.0)), seed=seed)
        run(toy, scheduler)
        paths.append([row.action for row in scheduler.decisions])
    assert paths[0] == paths[1] != paths[2]


def test_a_broken_brain_folder_is_a_brain_error(tmp_path: Path) -> None:
    (tmp_path / "brain.json").write_text("{")
    with pytest.raises(BrainError, match="torn or foreign"):
        make(Toy(), brain=tmp_path)
