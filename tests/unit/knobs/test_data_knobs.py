"""Batch size in mid-epoch, prefetching workers included; out of memory; accumulation."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from trimtab import Controller, ControlSpec, registry
from trimtab.agents.base import Actions, Timing
from trimtab.errors import InputError, UnknownNameError
from trimtab.knobs.data import Accumulation, BatchSize, ResizableBatchSampler
from trimtab.out_of_memory import count_rows, split_batch
from trimtab.run_state import RunState
from trimtab.training.loop import TrainingLoop

N = 500


def optimizer_of_one() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)


def bound(loader: Any, **options: Any) -> tuple[BatchSize, RunState]:
    knob, state = BatchSize(**options), RunState(optimizer_of_one(), loader=loader)
    knob.bind(state)
    return knob, state


# ---- the sampler ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_workers", [0, 2])
def test_over_an_epoch_with_five_changes_each_index_comes_once(n_workers: int) -> None:
    sampler = ResizableBatchSampler(N, 16)
    loader = DataLoader(TensorDataset(torch.arange(N)), batch_sampler=sampler, num_workers=n_workers)
    knob, state = bound(loader, low=2, high=200)
    changes = {2: 64, 4: 5, 7: 33, 8: 128, 9: 20}
    sizes, seen = [], []
    for number, (rows,) in enumerate(loader, 1):
        sizes.append(len(rows))
        seen += rows.tolist()
        if number in changes:
            knob.write(state, np.array([changes[number]]))
            assert knob.read(state).tolist() == [changes[number]]
    assert sorted(seen) == list(range(N))
    late = 2 * n_workers  # torch's prefetch_factor is 2
    wanted, size = [], 16
    for number in range(len(sizes)):
        size = changes.get(number - late, size)
        wanted.append(size)
    assert sizes[:-1] == wanted[:-1]
    assert sizes[-1] <= wanted[-1]


def test_each_epoch_has_another_order_and_a_seed_fixes_them() -> None:
    def epochs(seed: int) -> list[list[list[int]]]:
        sampler = ResizableBatchSampler(10, 4, seed=seed)
        return [list(sampler) for _ in range(3)]

    assert epochs(1) == epochs(1) != epochs(2)
    assert len({str(epoch) for epoch in epochs(1)}) == 3
    assert [len(batch) for batch in epochs(1)[0]] == [4, 4, 2]
    assert list(ResizableBatchSampler(5, 2, shuffle=False)) == [[0, 1], [2, 3], [4]]
    assert list(ResizableBatchSampler([0] * 5, 2, shuffle=False, drop_last=True)) == [[0, 1], [2, 3]]


def test_another_sampler_gives_the_order() -> None:
    own = RandomSampler(range(20), generator=torch.Generator().manual_seed(3))
    again = RandomSampler(range(20), generator=torch.Generator().manual_seed(3))
    rows = [index for batch in ResizableBatchSampler(own, 6) for index in batch]
    assert rows == list(again)


def test_the_length_follows_the_size() -> None:
    sampler = ResizableBatchSampler(100, 10)
    assert len(sampler) == 10
    batches = iter(sampler)
    next(batches), next(batches)
    sampler.resize(30)
    assert len(sampler) == 2 + 3
    assert [len(batch) for batch in batches] == [30, 30, 20]
    assert len(ResizableBatchSampler(100, 30, drop_last=True)) == 3


@pytest.mark.parametrize("taken", [0, 1, 3, 7])
def test_a_resumed_epoch_goes_on_where_it_was(taken: int) -> None:
    def take(batches: Any, count: int) -> list[list[int]]:
        return [next(batches) for _ in range(count)]

    one = ResizableBatchSampler(40, 7, seed=5)
    batches = iter(one)
    take(batches, min(taken, 2))
    one.resize(3)
    take(batches, taken - min(taken, 2))
    other = ResizableBatchSampler(40, 7, seed=0)
    other.load_state_dict(one.state_dict())
    assert list(other) == list(batches)
    assert list(other) == list(one)  # and so is the epoch after it
    assert other.batch_size == 3


def test_batches_that_workers_drew_ahead_are_drawn_again() -> None:
    one = ResizableBatchSampler(40, 8, seed=5)
    drawn = list(one)
    other = ResizableBatchSampler(40, 8)
    other.load_state_dict(one.state_dict(n_consumed=2))
    assert list(other) == drawn[2:]
    with pytest.raises(InputError, match="n_consumed is 6; expected a number from 0 to the 5 drawn"):
        one.state_dict(n_consumed=6)
    with pytest.raises(InputError, match="the state holds an order of 40 samples; expected 41"):
        ResizableBatchSampler(41, 8).load_state_dict(one.state_dict())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0, 4), "batch_size is 4; expected a whole number from 1 to 0"),
        ((10, 0), "batch_size is 0; expected a whole number from 1 to 10"),
        ((10, 11), "batch_size is 11; expected a whole number from 1 to 10"),
        ((10, 2.5), "batch_size is 2.5; expected"),
        ((10, True), "batch_size is True; expected"),
        ((None, 4), "source is a NoneType; expected a data set, a sampler, or a length"),
    ],
)
def test_what_a_sampler_refuses(arguments: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        ResizableBatchSampler(*arguments)
    with pytest.raises(InputError, match="seed is -1; expected a whole number"):
        ResizableBatchSampler(10, 2, seed=-1)


# ---- the knob -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", [None, DataLoader([1, 2, 3], batch_size=2), [1, 2]])
def test_a_loader_whose_size_is_fixed_is_refused_by_name(loader: Any) -> None:
    with pytest.raises(InputError, match=r"the knob 'batch_size' cannot act on loader=\w+: give the TrainingLoop, a "):
        bound(loader)


def test_the_upper_bound_is_at_most_the_number_of_samples() -> None:
    knob, _ = bound(ResizableBatchSampler(50, 20))
    assert (knob.low, knob.high) == (16.0, 50.0)
    knob, _ = bound(ResizableBatchSampler(10, 4))
    assert (knob.low, knob.high) == (5.0, 10.0)


def test_what_the_knob_refuses() -> None:
    with pytest.raises(UnknownNameError, match="unknown rate_scaling of the knob 'batch_size' 'linar'; did you mean"):
        BatchSize(rate_scaling="linar")  # type: ignore[arg-type]
    knob, state = bound(ResizableBatchSampler(50, 20))
    for bad in (16.5, 0.0):
        with pytest.raises(InputError, match=f"batch_size: got {bad}; expected a whole number of 1 or more"):
            knob.write(state, np.array([bad]))


# ---- out of memory --------------------------------------------------------------------------------------------------


class Fits:
    """A train step for which memory ends at so many rows; remembers what it was given."""

    def __init__(self, most: int) -> None:
        self.most, self.seen, self.sizes = most, [], []

    def __call__(self, batch: Any) -> float:
        rows = batch[0]
        if len(rows) > self.most:
            raise torch.OutOfMemoryError(f"fake: {len(rows)} rows")
        self.seen += rows.tolist()
        self.sizes.append(len(rows))
        return 0.5


@pytest.mark.parametrize("n_workers", [0, 2])
def test_out_of_memory_is_halved_and_remembered_and_no_sample_is_lost(n_workers: int) -> None:
    sampler = ResizableBatchSampler(N, 16)
    loader = DataLoader(TensorDataset(torch.arange(N)), batch_sampler=sampler, num_workers=n_workers)
    fits, n_steps = Fits(40), 0
    for number, batch in enumerate(loader):
        if number == 1:
            sampler.resize(100)
        for loss in sampler.steps(fits, batch):
            assert loss == 0.5
            n_steps += 1
    assert sorted(fits.seen) == list(range(N))
    assert n_steps == len(fits.sizes)
    assert (sampler.batch_size, sampler.max_batch_size) == (25, 25)  # 100, 50, 25
    assert max(fits.sizes) == 25
    with pytest.raises(InputError, match="batch_size is 26; expected a whole number from 1 to 25"):
        sampler.resize(26)


def test_a_single_sample_that_does_not_fit_is_the_end() -> None:
    sampler = ResizableBatchSampler(8, 4)
    with pytest.raises(torch.OutOfMemoryError, match="fake: 1 rows"):
        list(sampler.steps(Fits(0), [torch.arange(4)]))


def test_batches_of_every_form_are_split() -> None:
    pair = namedtuple("pair", "x y")
    x = torch.arange(5)
    parts = split_batch({"a": x, "b": [pair(x + 10, x + 20)]}, 2)
    assert [part["a"].tolist() for part in parts] == [[0], [1, 2], [3, 4]]
    assert [part["b"][0].y.tolist() for part in parts] == [[20], [21, 22], [23, 24]]
    assert count_rows((x, 3)) == 5
    with pytest.raises(InputError, match="a batch of 5 samples holds a int, which cannot be split"):
        split_batch((x, 3), 2)
    with pytest.raises(InputError, match=r"holds a Tensor of shape \(4,\), which cannot be split"):
        split_batch((x, x[:4]), 2)
    with pytest.raises(InputError, match="a batch of type str; expected tensors"):
        count_rows("abc")


def controlled(loader: Any, optimizer: Any, model: Any = None, **options: Any) -> Controller:
    spec = ControlSpec(
        knobs=("lr", "batch_size"),
        knob_options={"batch_size": options},
        actions=Actions("set"),
        timing=Timing(every=2),
    )
    return Controller("constant", optimizer=optimizer, model=model, loader=loader, spec=spec, total_steps=40)


@pytest.mark.parametrize(("scaling", "rate"), [("none", 0.1), ("linear", 0.05), ("sqrt", 0.1 * 0.5**0.5)])
def test_the_controller_records_what_memory_did(scaling: str, rate: float) -> None:
    sampler = ResizableBatchSampler(N, 64)
    optimizer = optimizer_of_one()
    controller = controlled(sampler, optimizer, rate_scaling=scaling)
    (fits, decisions), batches = (Fits(40), []), iter(sampler)
    for _ in range(2):
        for loss in sampler.steps(fits, [torch.tensor(next(batches))]):
            decisions += controller.step(loss)
    found = [(d.knob, d.source, d.before, d.setting, d.read_back) for d in decisions]
    assert found[0] == ("batch_size", "memory", 32.0, 32.0, 32.0)
    assert decisions[0].note == "out of memory at a batch_size of 64: at most 32 from now on"
    assert [d.source for d in decisions] == (["memory"] if scaling == "none" else ["memory", "follow"])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)
    assert controller.status == "running"
    if scaling != "none":
        assert found[1] == ("lr", "follow", 0.1, pytest.approx(rate), pytest.approx(rate))
        assert decisions[1].note == f"follows 'batch_size': x {rate / 0.1:.4g}"


def test_scaling_needs_the_rate_among_the_knobs() -> None:
    spec = ControlSpec(knobs=("batch_size",), knob_options={"batch_size": {"rate_scaling": "linear"}})
    with pytest.raises(InputError, match="a move of the knob 'batch_size' moves the rate too, so 'lr' must be among"):
        Controller("constant", optimizer=optimizer_of_one(), loader=ResizableBatchSampler(N, 64), spec=spec)


# ---- our own loop ---------------------------------------------------------------------------------------------------


def make_loop(**changes: Any) -> TrainingLoop:
    task = registry.load("task", "digits-mlp")("smoke").replace(**changes)
    return TrainingLoop(task, task.load(None), seed=3)


def test_the_loop_changes_its_batches_in_mid_epoch_and_repeats_none() -> None:
    loop = make_loop()
    seen: list[int] = []
    inner = loop._batches.next

    def spy() -> tuple[Tensor, Tensor]:
        inputs, targets = inner()
        end = loop._batches._position
        seen.extend(loop._batches._order[end - len(inputs) : end].tolist())
        return inputs, targets

    loop._batches.next = spy
    n = loop.n_samples
    for size in (32, 100, 7, 64, 16, 50):
        loop.resize(size)
        loop.step()
    while len(seen) + 50 <= n:
        loop.step()
    assert len(seen) == len(set(seen)) > n - 50
    assert loop.samples_seen == len(seen)
    with pytest.raises(InputError, match=f"batch_size is 0; expected a whole number from 1 to {n}"):
        loop.resize(0)


def test_what_was_changed_in_a_loop_is_resumed_to_the_bit() -> None:
    one, other = make_loop(), make_loop()
    one.resize(48)
    one.accumulation, one.grad_clip = 3, 0.1
    one.step()
    other.load_state_dict(one.state_dict())
    assert (other.batch_size, other.accumulation, other.grad_clip) == (48, 3, 0.1)
    for _ in range(3):
        assert torch.equal(one.step(), other.step())
    assert one.samples_seen == other.samples_seen == 4 * 48 * 3


class RunsOut(nn.Module):
    """Fails on more rows than so many."""

    def __init__(self, inner: nn.Module, most: int) -> None:
        super().__init__()
        self.inner, self.most, self.sizes = inner, most, []

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError("fake")
        self.sizes.append(len(x))
        return self.inner(x)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_loop_puts_the_same_samples_through_in_smaller_parts(accumulation: int) -> None:
    whole, loop = make_loop(accumulation=accumulation), make_loop(accumulation=accumulation)
    loop.model = RunsOut(loop.model, 10)
    expected, loss = whole.step(), loop.step()
    torch.testing.assert_close(loss, expected)
    for a, b in zip(whole.model.parameters(), loop.model.inner.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
    assert loop.model.sizes == [8] * 4 * accumulation
    assert (loop.batch_size, loop.max_batch_size, loop.samples_seen) == (8, 8, 32 * accumulation)
    assert loop.step().isfinite()
    assert loop.samples_seen == 40 * accumulation
    loop.model.most = 0
    with pytest.raises(torch.OutOfMemoryError, match="fake"):
        loop.step()


def test_a_controlled_loop_goes_on_after_memory_ran_out() -> None:
    loop = make_loop()
    inner = loop.model.forward
    fits = RunsOut(nn.Identity(), 20)
    loop.model.forward = lambda x: inner(fits(x))
    controller = controlled(loop, loop.optimizer, loop.model, low=4)
    decisions = [decision for _ in range(4) for decision in controller.step(loop.step())]
    assert [(d.knob, d.source, d.setting) for d in decisions] == [("batch_size", "memory", 16.0)]
    assert controller.read_knobs()["batch_size"] == 16.0
    saved = controller.state_dict()
    del controller  # else it would be a second writer of the rate
    again = controlled(loop, loop.optimizer, loop.model, low=4)
    again.load_state_dict(saved)
    assert again.state_dict()["hand"] == saved["hand"]
    assert again._hand._knobs[1].high == 16.0


def test_accumulation() -> None:
    loop = make_loop()
    knob, state = Accumulation(), RunState(loop.optimizer, loop.model, loop)
    assert knob.bind(state).tolist() == [1.0]
    knob.write(state, np.array([4]))
    loop.step()
    assert loop.samples_seen == 4 * 32
    with pytest.raises(InputError, match="the knob 'accumulation' cannot act on loader=NoneType: give a loop with a"):
        Accumulation().bind(RunState(loop.optimizer))
