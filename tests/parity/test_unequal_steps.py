"""Runs of a batch that take unequal numbers of steps in an interval, as equal budgets with unequal batches ask for."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from trimtab.errors import InputError
from trimtab.seeding import numpy_generator
from trimtab.tasks.families import draw_task
from trimtab.tasks.small import SmallTask
from trimtab.training.batched import BatchedTraining

SETTINGS = {
    "sgd": {"optimizer": "sgd", "momentum": 0.9},
    "adam with decay": {"optimizer": "adam", "weight_decay": 0.01},
    "adamw": {"optimizer": "adamw", "betas": (0.8, 0.95), "weight_decay": 0.1},
}


def make(seed: int, **settings: object) -> SmallTask:
    task = draw_task("mlp", numpy_generator(seed, "unequal steps"), batch_size=8)
    return dataclasses.replace(task, network=dataclasses.replace(task.network, dropout=0.0), **settings)


@pytest.mark.parametrize("name", SETTINGS)
def test_runs_of_unequal_steps_end_together_and_each_is_as_if_alone(name: str) -> None:
    tasks = [make(seed, **SETTINGS[name]) for seed in range(4)]
    rates, seeds = [0.01] * 4, [3, 4, 5, 6]
    uneven = BatchedTraining(tasks, seeds, rates, dtype=torch.float64)
    uneven.run(4)
    first = uneven.parameters.clone()
    uneven.resize(np.array([16, 8, 4, 40]))
    counts = np.array([6, 12, 13, 0])
    factors = np.random.default_rng(0).random((13, 4))
    stats = uneven.run(counts, factors)
    losses = stats.losses.numpy()
    assert stats.counts.tolist() == [6, 12, 13, 0]
    assert np.isnan(losses).sum(0).tolist() == [7, 1, 0, 13]
    assert torch.equal(uneven.parameters[3], first[3])
    for run, count in enumerate(counts):
        alone = BatchedTraining([tasks[run]], [seeds[run]], [0.01], dtype=torch.float64)
        alone.run(4)
        if count:
            alone.resize(np.array([[16, 8, 4, 40][run]]))
            own = alone.run(int(count), factors[13 - count :, run].tolist())
            np.testing.assert_allclose(losses[13 - count :, run], own.losses[:, 0], rtol=1e-9, atol=1e-12)
            measured = stats.norms[:, :, run][~stats.norms[:, :, run].isnan().any(1)]
            torch.testing.assert_close(measured, own.norms[:, :, 0], rtol=1e-7, atol=1e-10)
        assert uneven.optimizer.steps[run, 0] == 4 + count
        pairs = zip(uneven.parameters_of(run), alone.parameters_of(0), strict=True)
        for mine, theirs in pairs:
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_wrong_numbers_of_steps_are_refused() -> None:
    training = BatchedTraining([make(0)] * 2, [1, 2], [0.1, 0.1])
    with pytest.raises(InputError, match=r"expected 1 step or more, and a factor for each"):
        training.run(np.array([2, -1]))
    with pytest.raises(InputError, match=r"expected 1 step or more, and a factor for each"):
        training.run(np.array([2, 1]), [1.0])
    assert training.run(np.array([0, 0])).losses.shape == (0, 2)
