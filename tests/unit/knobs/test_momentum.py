"""Momentum and beta2: where they act, ratios, zeros, moments that a change leaves alone, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from trimtab.errors import InputError
from trimtab.knobs.momentum import Beta2, Momentum
from trimtab.run_state import RunState


def make(kind: Any, *options: dict[str, Any], **shared: Any) -> torch.optim.Optimizer:
    return kind([{"params": [nn.Parameter(torch.ones(3))], **given} for given in options or ({},)], **shared)


def momenta(optimizer: torch.optim.Optimizer, key: str = "momentum") -> list[float]:
    return [group[key] if key == "momentum" else group["betas"][0] for group in optimizer.param_groups]


def step(optimizer: torch.optim.Optimizer, n_steps: int = 1) -> None:
    for t in range(n_steps):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.tensor([1.0, -2.0, 0.5]) * (1 + 0.1 * t)
        optimizer.step()


def test_groups_keep_the_ratio_of_what_is_new_and_zeros_stay() -> None:
    optimizer = make(torch.optim.SGD, {}, {"momentum": 0.95}, {"momentum": 0.0}, lr=0.1, momentum=0.9)
    knob, state = Momentum(), RunState(optimizer)
    assert knob.bind(state).tolist() == [0.9]
    knob.write(state, np.array([0.8]))
    assert momenta(optimizer) == pytest.approx([0.8, 0.9, 0.0], abs=1e-12)
    knob.write(state, np.array([0.98]))
    assert momenta(optimizer) == pytest.approx([0.98, 0.99, 0.0], abs=1e-12)


def test_a_ratio_that_would_go_below_zero_stops_there_and_comes_back() -> None:
    optimizer = make(torch.optim.SGD, {}, {"momentum": 0.5}, lr=0.1, momentum=0.9)
    knob, state = Momentum(), RunState(optimizer)
    knob.bind(state)
    knob.write(state, np.array([0.5]))
    assert momenta(optimizer) == [0.5, 0.0]
    knob.write(state, np.array([0.9]))
    assert momenta(optimizer) == pytest.approx([0.9, 0.5], abs=1e-12)


def test_where_all_have_zero_all_move() -> None:
    optimizer = make(torch.optim.SGD, {}, {}, lr=0.1)
    knob, state = Momentum(), RunState(optimizer)
    assert knob.bind(state).tolist() == [0.0]
    knob.write(state, np.array([0.7]))
    assert momenta(optimizer) == [0.7, 0.7]


def test_a_group_added_later_keeps_its_ratio_from_then_on() -> None:
    optimizer = make(torch.optim.SGD, lr=0.1, momentum=0.9)
    knob, state = Momentum(), RunState(optimizer)
    knob.bind(state)
    knob.write(state, np.array([0.8]))
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "momentum": 0.9})
    knob.write(state, np.array([0.8]))
    assert momenta(optimizer) == pytest.approx([0.8, 0.9], abs=1e-12)
    knob.write(state, np.array([0.9]))
    assert momenta(optimizer) == pytest.approx([0.9, 0.95], abs=1e-12)


@pytest.mark.parametrize(("knob", "index"), [(Momentum(), 0), (Beta2(), 1)])
def test_a_change_leaves_corrected_moments_as_they_are(knob: Any, index: int) -> None:
    optimizer = make(torch.optim.Adam, lr=0.0, betas=(0.9, 0.99))
    state = RunState(optimizer)
    knob.bind(state)
    step(optimizer, 7)
    entry = optimizer.state[optimizer.param_groups[0]["params"][0]]
    key = ("exp_avg", "exp_avg_sq")[index]
    other = ("exp_avg", "exp_avg_sq")[1 - index]
    kept = entry[other].clone()
    before = entry[key] / (1 - optimizer.param_groups[0]["betas"][index] ** 7)
    knob.write(state, np.array([0.999]))
    beta = optimizer.param_groups[0]["betas"][index]
    assert beta == 0.999
    torch.testing.assert_close(entry[key] / (1 - beta**7), before, rtol=1e-5, atol=0)
    assert torch.equal(entry[other], kept)
    assert knob.has_touched_state
    # Without this it would be (1 - 0.9^7) / (1 - 0.999^7) = 75 times what it was.


def test_writing_the_same_value_touches_nothing() -> None:
    optimizer = make(torch.optim.Adam, lr=0.01)
    knob, state = Momentum(), RunState(optimizer)
    knob.bind(state)
    step(optimizer, 3)
    before = optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"].clone()
    knob.write(state, np.array([0.9]))
    assert torch.equal(optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"], before)
    assert not knob.has_touched_state


def test_a_momentum_raised_from_zero_begins_with_the_next_gradient() -> None:
    optimizer = make(torch.optim.SGD, lr=0.1, momentum=0.9)
    knob, state = Momentum(), RunState(optimizer)
    knob.bind(state)
    step(optimizer, 5)
    knob.write(state, np.array([0.0]))
    step(optimizer, 2)
    knob.write(state, np.array([0.9]))
    parameter = optimizer.param_groups[0]["params"][0]
    before = parameter.detach().clone()
    step(optimizer)
    torch.testing.assert_close(before - parameter.detach(), 0.1 * parameter.grad)


@pytest.mark.parametrize(
    ("kind", "knob", "text"),
    [
        (
            torch.optim.Adagrad,
            Momentum(),
            "Adagrad has no momentum in its param groups: the knob 'momentum' cannot act",
        ),
        (torch.optim.SGD, Beta2(), r"SGD has no beta2 \(betas\[1\]\) in its param groups: the knob 'beta2' cannot act"),
    ],
)
def test_an_optimizer_without_is_refused_by_name(kind: Any, knob: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        knob.bind(RunState(make(kind, lr=0.1)))


def test_a_tensor_is_refused() -> None:
    optimizer = make(torch.optim.SGD, lr=0.1, momentum=0.9)
    optimizer.param_groups[0]["momentum"] = torch.tensor(0.9)
    with pytest.raises(InputError, match=r"param group 0 has the momentum tensor\(0.9000\); expected a plain number"):
        Momentum().bind(RunState(optimizer))


def test_rmsprop_has_a_momentum_of_its_own() -> None:
    optimizer = make(torch.optim.RMSprop, lr=0.1, momentum=0.5)
    knob, state = Momentum(), RunState(optimizer)
    knob.bind(state)
    knob.write(state, np.array([0.75]))
    assert momenta(optimizer) == [0.75]


def test_units_are_those_of_what_is_new() -> None:
    knob = Momentum(0.0, 0.999)
    assert knob.from_unit(np.array([0.0, 1 / 3, 2 / 3, 1.0])) == pytest.approx([0.0, 0.9, 0.99, 0.999], abs=1e-12)
    assert knob.move_one(0.9, 10.0) == pytest.approx(0.99)
    assert knob.move_one(0.99, 0.1) == pytest.approx(0.9)
    with pytest.raises(InputError, match=r"momentum: bounds \[0.5, 1.0\]; expected 0 <= low < high < 1"):
        Momentum(0.5, 1.0)
