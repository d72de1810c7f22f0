"""What steps cost: FLOPs of a training loop, at other batch sizes, with accumulation, and of another network."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from trimtab import Controller, ControlSpec, registry
from trimtab.agents.base import Actions, Base, Timing
from trimtab.agents.scripted import Replay
from trimtab.cost import count_cost
from trimtab.tasks.base import Data, Split
from trimtab.tasks.models import BiLSTM, cifar10_cnn
from trimtab.training import loop as module
from trimtab.training.loop import TrainingLoop


def make_loop(**changes: Any) -> TrainingLoop:
    task = registry.load("task", "digits-mlp")("smoke").replace(**changes)
    return TrainingLoop(task, task.load(None), seed=0)


def test_cost_is_in_proportion_to_the_samples_of_an_optimizer_step() -> None:
    loop = make_loop(total_steps=40, accumulation=2)
    assert (loop.step_cost, loop.spent) == (1.0, 0.0)
    loop.step()
    loop.resize(96)
    loop.accumulation = 3
    assert loop.step_cost == 4.5
    loop.step()
    assert (loop.spent, loop.steps_done, loop.samples_seen) == (5.5, 2, 64 + 288)
    assert loop.flops_used == count_cost(loop.model, torch.zeros(352, 64)).step_flops
    assert loop.flops_budget == 40 * count_cost(loop.model, torch.zeros(64, 64)).step_flops


def test_a_run_ends_before_the_step_that_its_budget_does_not_pay_for() -> None:
    loop = make_loop(total_steps=10)
    loop.resize(96)
    while not loop.is_over():
        loop.step()
    assert (loop.steps_done, loop.spent) == (3, 9.0)
    loop.resize(32)
    assert not loop.is_over()  # one more as the task has them
    loop.step()
    assert loop.is_over()


def test_a_run_goes_on_from_its_state_with_what_it_has_spent() -> None:
    loop, other = make_loop(total_steps=10), make_loop(total_steps=10)
    loop.resize(80)
    loop.step()
    other.load_state_dict(loop.state_dict())
    assert (other.spent, other.step_cost) == (2.5, 2.5)


def test_nothing_is_counted_while_only_samples_change_and_once_for_each_shape(monkeypatch: Any) -> None:
    counted: list[int] = []

    def count(model: nn.Module, example: Any) -> Any:
        counted.append(sum(p.numel() for p in model.parameters()))
        return count_cost(model, example)

    monkeypatch.setattr(module, "count_cost", count)
    loop = make_loop(total_steps=40)
    for size in (32, 64, 16):
        loop.resize(size)
        loop.step()
    assert counted == []
    first = loop.model
    small = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    loop.model = small
    loop.optimizer = torch.optim.Adam(small.parameters(), 1e-3)
    loop.resize(32)
    wanted = count_cost(small, torch.zeros(32, 64)).step_flops / count_cost(first, torch.zeros(32, 64)).step_flops
    assert loop.step_cost == wanted
    loop.step()
    loop.step()
    assert loop.spent == pytest.approx(1 + 2 + 0.5 + 2 * wanted)
    assert sorted(counted) == sorted([sum(p.numel() for p in net.parameters()) for net in (small, first)])


@pytest.mark.parametrize(
    ("model", "row"),
    [
        (cifar10_cnn(10), torch.zeros(3, 32, 32)),
        (BiLSTM(50, 8, 8, 2), torch.ones(12, dtype=torch.int64)),
    ],
)
def test_what_is_counted_is_in_proportion_to_the_samples(model: nn.Module, row: torch.Tensor) -> None:
    flops = {size: count_cost(model, row.expand(size, *row.shape)).step_flops for size in (2, 6)}
    assert flops[6] == 3 * flops[2] > 0


def test_text_is_counted_by_its_windows() -> None:
    task = registry.load("task", "shakespeare-gpt")("smoke").replace(total_steps=3, batch_size=2)
    text = torch.arange(500).remainder(20).to(torch.uint8)
    split, nothing = Split(text, torch.empty(0, dtype=torch.int64)), {"n_tokens": 500, "vocab_size": 20}
    loop = TrainingLoop(task, Data(split, split, split, nothing), seed=0)
    loop.step()
    windows = torch.zeros(2, task.block_size or 0, dtype=torch.int64)
    assert loop.flops_used == count_cost(loop.model, windows).step_flops > 0


# ---- under a controller ---------------------------------------------------------------------------------------------


class Setter(Replay):
    """Asks at every decision for a size of the batch, in turn."""

    def __init__(self, sizes: list[int], every: int, base: str = "constant") -> None:
        super().__init__([[1.0]], Timing(every=every))
        self._sizes, self._seen = sizes, 0
        self.progress: list[float] = []

    def predict(self, observation: Any, state: Any = None, *_args: Any, **_options: Any) -> Any:
        number = 0 if state is None else int(state[0])
        self.progress.append(float(observation[0, 0]))
        return np.array([[1e-3, float(self._sizes[number % len(self._sizes)])]]), (np.array(number + 1),)


def controlled(sizes: list[int], total_steps: int, every: int, base: str) -> tuple[TrainingLoop, Controller, Setter]:
    loop = make_loop(total_steps=total_steps, lr=1e-3)
    agent = Setter(sizes, every)
    spec = ControlSpec(
        knobs=("lr", "batch_size"), actions=Actions("set"), timing=Timing(every=every), base=Base(base),
        signals=("progress",),
    )  # fmt: skip
    controller = Controller(
        agent, optimizer=loop.optimizer, model=loop.model, loader=loop, total_steps=total_steps, spec=spec
    )
    return loop, controller, agent


def test_progress_schedule_and_decisions_follow_what_is_spent() -> None:
    loop, controller, agent = controlled([128], 40, 5, "cosine")
    rates, spent = [], []
    while not loop.is_over():
        spent.append(loop.spent)
        rates.append(loop.optimizer.param_groups[0]["lr"])
        controller.step(loop.step())
    # Five steps at 32, then eight at 128, which are worth four each, and the three that are left pay for none.
    assert spent == [0, 1, 2, 3, 4, 5, 9, 13, 17, 21, 25, 29, 33]
    assert rates == pytest.approx([1e-3 * (1 + math.cos(math.pi * share / 40)) / 2 for share in spent], rel=1e-12)
    assert controller.status == "over"
    # Due after 5, 10, 15, ..., 40: at the first step at or after it; the last is the run's end.
    steps = [decision.optimizer_step for decision in controller.decisions if decision.knob == "lr"]
    assert steps == [5, 7, 8, 9, 10, 12]
    assert agent.progress[1:] == [5 / 40, 13 / 40, 17 / 40, 21 / 40, 25 / 40, 33 / 40]
    assert controller.state.progress == 37 / 40


def test_a_move_that_leaves_no_step_ends_the_run() -> None:
    loop, controller, _ = controlled([128], 12, 10, "constant")
    while not loop.is_over():
        controller.step(loop.step())
    assert (loop.steps_done, loop.spent, controller.status) == (10, 10.0, "over")


@pytest.mark.parametrize("saved_at", [3, 6, 8, 11])
def test_it_goes_on_as_if_never_stopped(saved_at: int) -> None:
    def go_on(loop: TrainingLoop, controller: Controller, count: int) -> list[tuple[float, float]]:
        rows = []
        while count and not loop.is_over():
            rate = loop.optimizer.param_groups[0]["lr"]
            loss = loop.step()
            controller.step(loss)
            rows.append((rate, float(loss)))
            count -= 1
        return rows

    loop, controller, _ = controlled([64, 16, 100], 40, 6, "cosine")
    rows = go_on(loop, controller, saved_at)
    saved = loop.state_dict(), controller.state_dict()
    rows += go_on(loop, controller, 100)
    other, again, _ = controlled([64, 16, 100], 40, 6, "cosine")
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    assert go_on(other, again, 100) == rows[saved_at:]
    assert (other.spent, again.status) == (loop.spent, "over")
