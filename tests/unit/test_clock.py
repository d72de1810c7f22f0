"""The clock of a run: what is spent, and after how many optimizer steps the next decision falls."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from trimtab.agents.base import Timing
from trimtab.clock import Clock, affordable_steps, steps_until


def test_without_a_loop_time_is_the_number_of_steps() -> None:
    clock = Clock(None, 10)
    clock.aim(Timing(every=4), None)
    assert clock.steps_left == 4
    clock.read(4)
    assert (clock.spent, clock.cost, clock.at(7), clock.line) == (4, 1, 7, 0)
    clock.aim(Timing(every=4), None)
    assert clock.steps_left == 4
    clock.read(8)
    clock.aim(Timing(every=4), None)
    assert clock.steps_left == 2  # the last one falls on the end
    assert not clock.is_used_up
    clock.read(10)
    assert clock.is_used_up


def test_dear_steps_pass_over_times_of_decision_and_never_beyond_the_budget() -> None:
    loop = SimpleNamespace(spent=5.0, step_cost=1.0)  # it was begun before the controller was made
    clock = Clock(loop, 20)
    clock.aim(Timing(every=2), None)
    assert (clock.spent, clock.steps_left) == (0, 2)
    loop.spent, loop.step_cost = 7.0, 7.0
    clock.read(2)
    assert (clock.spent, clock.at(3), clock.line) == (2, 9, 1)
    clock.aim(Timing(every=2), None)
    assert clock.steps_left == 1  # to 9, over 4, 6 and 8
    loop.spent = 14.0
    clock.read(3)
    assert clock.line == 1  # as was foreseen
    clock.aim(Timing(every=2), None)
    assert clock._target == 10
    assert clock.steps_left == 1
    loop.spent = 21.0
    clock.read(4)
    assert clock.is_used_up  # 16 of 20: a step of 7 is too dear
    loop.step_cost = 2.0
    clock.read(4)
    assert not clock.is_used_up


def test_sums_of_costs_that_are_not_exact_lose_no_step() -> None:
    spent = math.fsum([0.1] * 7) + 1e-12
    assert affordable_steps(1.0 - spent, 0.1) == 3
    assert steps_until(1.0, spent, 0.1) == 3
    assert steps_until(0.7, spent, 0.1) == 0


def test_it_goes_on_from_its_state() -> None:
    loop = SimpleNamespace(spent=0.0, step_cost=3.0)
    clock = Clock(loop, 100)
    clock.aim(Timing(every=None, n_decisions=10), None)
    loop.spent = 12.0
    clock.read(4)
    clock.aim(Timing(every=None, n_decisions=10), None)
    other = Clock(SimpleNamespace(spent=0.0, step_cost=3.0), 100)
    other.load_state_dict(clock.state_dict())
    assert other.state_dict() == clock.state_dict()
    assert other.steps_left == clock.steps_left == 3  # to 20 from 12
    assert other.at(5) == 15.0


@pytest.mark.parametrize("cost", [1.0, 2.0, 5.0, 0.5, 2 / 3])
def test_decisions_fall_on_the_same_shares_whatever_a_step_costs(cost: float) -> None:
    loop = SimpleNamespace(spent=0.0, step_cost=cost)
    clock, timing, step, found = Clock(loop, 400), Timing(every=None, n_decisions=20, early_decisions=3), 0, []
    while not clock.is_used_up:
        clock.aim(timing, None)
        step += clock.steps_left
        loop.spent = step * cost
        clock.read(step)
        found.append(clock.spent)
    plain = [4, 8, 12, *(12 + 19 * n for n in range(1, 21)), 400]
    assert len(found) == len(plain) - (plain[-2] >= 400)
    assert all(0 <= mine - theirs < cost for mine, theirs in zip(found[:-1], plain, strict=False))
    assert 400 - cost < found[-1] <= 400 + 1e-6
