"""The probe's statistics, against a plain reference worked out here from copies of every step."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from toy import OPTIMIZERS, Toy
from trimtab.flat import SMALL_UP_TO, FlatRow, FlatView
from trimtab.gradients import GradientProbe, measure_each, measure_rows


class Reference:
    """Weights before each step, and the gradient of each step, kept in full."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.weights: list[Tensor] = []
        self.gradients: list[Tensor] = []
        optimizer.register_step_pre_hook(self._look)

    def _look(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.weights.append(torch.cat([p.detach().double().reshape(-1).cpu() for p in parameters]))
        self.gradients.append(torch.cat([p.grad.double().reshape(-1).cpu() for p in parameters]))

    def at(self, step: int) -> tuple[float, float, float]:
        """|g_t|, cos(g_t, u_(t-1)), |u_(t-1)| / |theta_t|, with u_(t-1) = theta_(t-1) - theta_t."""
        update = self.weights[step - 1] - self.weights[step]
        gradient, weights = self.gradients[step], self.weights[step]
        cosine = torch.dot(gradient, update) / gradient.norm() / update.norm()
        return float(gradient.norm()), float(cosine), float(update.norm() / weights.norm())

    def mean(self, steps: list[int]) -> tuple[float, ...]:
        return tuple(np.mean([self.at(step) for step in steps], axis=0).tolist())


def collect(probe: GradientProbe) -> tuple[float, float, float]:
    return probe.collect([row if isinstance(row, list) else row.tolist() for row in probe.pending()])


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_statistics_equal_the_reference(optimizer: str, device: torch.device) -> None:
    toy = Toy(optimizer, 0.01, device=device)
    reference, probe = Reference(toy.optimizer), GradientProbe(toy.optimizer)
    start = 0
    # The last step of an interval is measured, and every tenth before it, as long as a step lies before it in it.
    for length in (7, 25, 2, 10, 31):
        probe.aim(length)
        for _ in range(length):
            toy.step()
        measured = [step for step in range(start + length - 1, start, -10)]
        assert len(probe.pending()) == len(measured)
        assert collect(probe) == pytest.approx(reference.mean(measured), rel=1e-4)
        start += length
    assert probe.n_steps == start


def test_a_decision_at_every_step_measures_every_step() -> None:
    toy = Toy("adam", 0.01)
    reference, probe = Reference(toy.optimizer), GradientProbe(toy.optimizer)
    for step in range(6):
        probe.aim(1)
        toy.step()
        found = collect(probe)
        if step == 0:
            assert all(math.isnan(value) for value in found)
        else:
            assert found == pytest.approx(reference.at(step), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_equal_the_reference(dtype: torch.dtype) -> None:
    toy = Toy("sgd", 0.5, dtype=dtype)
    reference, probe = Reference(toy.optimizer), GradientProbe(toy.optimizer)
    probe.aim(12)
    for _ in range(12):
        toy.step()
    rel = 1e-12 if dtype == torch.float64 else 0.02
    assert collect(probe) == pytest.approx(reference.mean([1, 11]), rel=rel)


def test_a_large_network_equals_the_reference() -> None:
    model = nn.Linear(500, 500)
    assert sum(p.numel() for p in model.parameters()) > SMALL_UP_TO
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    reference, probe = Reference(optimizer), GradientProbe(optimizer)
    probe.aim(3)
    for step in range(3):
        optimizer.zero_grad()
        (model(torch.full((2, 500), 0.1 + step)) - 1).square().mean().backward()
        optimizer.step()
    assert collect(probe) == pytest.approx(reference.at(2), rel=1e-4)


def test_both_ways_of_measuring_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    triples = [[torch.randn(shape, generator=generator) for shape in ((3, 4), (5,))] for _ in range(3)]
    flat = [np.concatenate([tensor.numpy().ravel() for tensor in tensors]) for tensors in triples]
    assert measure_rows(*flat) == pytest.approx(measure_each(*triples).tolist(), rel=1e-5)


def test_zero_grad_between_the_steps_changes_nothing() -> None:
    found = []
    for is_cleared in (False, True):
        toy = Toy("adam", 0.01)
        probe = GradientProbe(toy.optimizer)
        probe.aim(9)
        for _ in range(9):
            toy.step()
            if is_cleared:
                toy.optimizer.zero_grad()
        found.append(collect(probe))
    assert found[0] == found[1]


def test_after_forgetting_the_next_measurement_is_of_new_weights() -> None:
    toy = Toy("sgd", 0.1)
    probe = GradientProbe(toy.optimizer)
    probe.aim(2)
    toy.step()
    probe.forget()
    toy.step()
    assert probe.pending() == []


def test_what_cannot_be_used_is_left_out() -> None:
    probe = GradientProbe(torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1))
    rows = [[0.0, 1.0, 2.0, 0.0], [1.0, 2.0, math.inf, math.nan], [0.5, 2.0, 4.0, 1.0], [math.inf, 1.0, 1.0, math.inf]]
    norm, cosine, ratio = probe.collect(rows)
    assert norm == pytest.approx((2 + 4 + 1) / 3)
    assert cosine == pytest.approx(1.0 / 0.5 / 4.0)
    assert ratio == pytest.approx((1 / 2 + 0.5 / 2) / 2)
    assert all(math.isnan(value) for value in probe.collect([]))


def test_an_overflow_is_quiet() -> None:
    toy = Toy("sgd", 1e30)
    probe = GradientProbe(toy.optimizer)
    probe.aim(6)
    for _ in range(6):
        toy.step()
    collect(probe)


def test_frozen_it_keeps_the_weights_whatever_the_gradients() -> None:
    toy = Toy("adam", 0.1, poison={3, 4})
    probe = GradientProbe(toy.optimizer)
    for _ in range(3):
        toy.step()
    kept = toy.weights()
    probe.freeze()
    for _ in range(4):
        toy.step()
    assert torch.equal(toy.weights(), kept)
    assert probe.n_steps == 7


def test_closed_or_let_go_it_looks_no_more() -> None:
    toy = Toy()
    probe = GradientProbe(toy.optimizer)
    probe.close()
    toy.step()
    assert probe.n_steps == 0
    other = GradientProbe(toy.optimizer)
    other.freeze()
    del other  # the optimizer's hook does not keep it alive
    before = toy.weights()
    toy.step()
    assert not torch.equal(toy.weights(), before)


# ---- flat views -----------------------------------------------------------------------------------------------------


def test_a_flat_view_shows_and_copies() -> None:
    tensors = [torch.arange(6.0).reshape(2, 3), torch.tensor(7.0), torch.zeros(0), torch.tensor([8.0, 9.0])]
    view = FlatView(tensors)
    row = FlatRow(view.size)
    view.copy_to(row)
    assert row.numbers.tolist() == [0, 1, 2, 3, 4, 5, 7, 8, 9]
    tensors[0].add_(10)
    assert row.numbers[0] == 0
    assert view.shows(tensors)
    assert not view.shows([tensors[0].clone(), *tensors[1:]])
    assert [part.tolist() for part in view.parts_of(row, tensors)][:2] == [[[0, 1, 2], [3, 4, 5]], 7]
    moved = nn.Parameter(torch.ones(2))
    other = FlatView([moved])
    moved.data = torch.zeros(2)  # the same object on other memory, as after module.to
    assert not other.shows([moved])


@pytest.mark.parametrize(
    ("tensors", "fits"),
    [
        ([torch.zeros(3)], True),
        ([torch.zeros(SMALL_UP_TO)], True),
        ([torch.zeros(SMALL_UP_TO), torch.zeros(1)], False),
        ([torch.zeros(3), torch.zeros(3, dtype=torch.float64)], False),
        ([torch.zeros(3, 4).t()], False),
        ([torch.zeros(3).to_sparse()], False),
        ([], False),
        ([torch.zeros(0)], False),
    ],
)
def test_what_fits_into_a_flat_view(tensors: list[Tensor], fits: bool) -> None:
    assert FlatView.fits(tensors) == fits


@pytest.mark.parametrize("is_small", [True, False], ids=["on one row", "tensor by tensor"])
def test_layer_ratios_are_of_matrices_and_in_order(is_small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_small:
        monkeypatch.setattr(FlatView, "fits", staticmethod(lambda tensors: False))
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3), nn.Linear(3, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    probe = GradientProbe(optimizer)
    probe.needs_layers = True
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    weights: list[list[Tensor]] = []
    probe.aim(12)
    for _ in range(12):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        weights.append([p.detach().clone().double() for p in model.parameters() if p.dim() == 2])
        optimizer.step()
    found = collect(probe)
    assert all(math.isfinite(value) for value in found)
    # Measured before steps 1 and 11: weights there against those one step earlier.
    ratios = [
        np.mean([float((weights[t - 1][i] - weights[t][i]).norm() / weights[t][i].norm()) for t in (1, 11)])
        for i in range(4)
    ]
    assert probe.layer_ratios == pytest.approx((min(ratios), sorted(ratios)[1], max(ratios)), rel=1e-4)
    probe.aim(1)
    collect(probe)
    assert all(math.isnan(value) for value in probe.layer_ratios)
