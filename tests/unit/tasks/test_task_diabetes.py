"""Diabetes: statistics of train alone, a stratified cut, a network that learns something, resumption."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trimtab import registry
from trimtab.tasks import diabetes
from trimtab.tasks.diabetes import load_diabetes
from trimtab.training.loop import TrainingLoop

TASK = "diabetes-mlp"


@pytest.fixture(scope="module")
def data():
    return load_diabetes(None)


def rows_of(part) -> set[float]:
    return {round(float(value), 5) for value in part.inputs.double().sum(1)}


def test_parts_are_disjoint_and_hold_every_tenth_of_the_target(data):
    parts = (data.train, data.val, data.test)
    assert [tuple(part.inputs.shape) for part in parts] == [(266, 10), (88, 10), (88, 10)]
    assert {part.inputs.dtype for part in parts} == {part.targets.dtype for part in parts} == {torch.float32}
    rows = [rows_of(part) for part in parts]
    assert len(rows[0] | rows[1] | rows[2]) == 442
    for part in (data.val, data.test):
        below = (part.targets[:, None] < data.train.targets.quantile(torch.tensor([0.25, 0.5, 0.75]))).float().mean(0)
        assert below.tolist() == pytest.approx([0.25, 0.5, 0.75], abs=0.06)


def test_means_and_deviations_are_those_of_train_alone(data, monkeypatch):
    assert data.train.inputs.mean(0).abs().max() < 1e-5
    assert data.train.targets.mean().abs() < 1e-5
    torch.testing.assert_close(data.train.inputs.std(0, correction=0), torch.ones(10))
    features, target = diabetes._bundled()
    assert 25 <= target.min() < target.max() <= 346
    assert data.info["target_mean"] == pytest.approx(152, abs=8)
    raw = data.test.targets.double() * data.info["target_std"] + data.info["target_mean"]
    assert set(raw.round().long().tolist()) <= set(target.astype(int).tolist())
    # Other patients outside of train change nothing in it; the target's tenths stay, so that the cut does.
    train = {round(float(value), 3) for value in data.train.targets.double() * data.info["target_std"]}
    outside = np.array([round(float(t - data.info["target_mean"]), 3) not in train for t in target])
    other = np.where(outside[:, None], features + 1000.0, features)
    monkeypatch.setattr(diabetes, "_bundled", lambda: (other, target))
    changed = load_diabetes(None)
    assert outside.any()
    assert torch.equal(changed.train.inputs, data.train.inputs)
    assert not torch.equal(changed.test.inputs, data.test.inputs)


def test_the_network_has_its_size_and_beats_the_mean(data):
    task = registry.load("task", TASK)("small")
    assert (task.name, task.kind, task.batch_size, task.total_steps, task.eval_every) == (
        TASK,
        "regression",
        64,
        200,
        4,
    )
    assert (task.optimizer, task.lr, task.betas, task.weight_decay) == ("adam", 1e-3, (0.9, 0.999), 0.0)
    loop = TrainingLoop(task, data, seed=0)
    assert sum(p.numel() for p in loop.model.parameters()) == 10 * 64 + 64 + 64 * 64 + 64 + 64 + 1 == 4_929
    first = loop.evaluate("val")
    assert first["mse"] == first["loss"] == pytest.approx(1.0, abs=0.25)  # it says about 0 to everybody
    while not loop.is_over():
        loop.step()
    assert loop.evaluate("val")["mse"] < 0.75


def test_a_restored_run_goes_on_to_the_bit(data):
    task = registry.load("task", TASK)("smoke")
    first, second = (TrainingLoop(task, data, seed=seed) for seed in (0, 1))
    for _ in range(3):
        first.step()
    second.load_state_dict(first.state_dict())
    assert [first.step().item() for _ in range(6)] == [second.step().item() for _ in range(6)]
    assert first.evaluate("val") == second.evaluate("val")
