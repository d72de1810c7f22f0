"""RunState: sums of what was measured, against numbers worked out by hand; one run and several alike."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from trimtab.run_state import Interval, RunState


def make(total_steps: int | None = 100) -> RunState:
    return RunState(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), total_steps=total_steps)


def test_summaries_of_three_intervals() -> None:
    state = make()
    assert math.isnan(state.summary.smoothed_loss)
    for train, validation in ((4.0, math.nan), (2.0, 3.0), (3.0, 5.0)):
        state.record(Interval(train_loss=train, val_loss=validation))
    summary = state.summary
    assert (summary.best_train_loss, summary.initial_val_loss, summary.best_val_loss) == (2.0, 3.0, 3.0)
    assert summary.previous_smoothed_loss == pytest.approx(0.7 * 4 + 0.3 * 2)
    assert summary.smoothed_loss == pytest.approx(0.7 * (0.7 * 4 + 0.3 * 2) + 0.3 * 3)
    assert state.current.train_loss == 3.0
    assert state.previous.train_loss == 2.0
    assert state.watched_loss() == 5.0


def test_the_train_loss_is_watched_where_there_is_no_validation() -> None:
    state = make()
    state.record(Interval(train_loss=4.0))
    assert state.watched_loss() == 4.0


def test_a_loss_that_is_not_a_number_does_not_poison_the_summaries() -> None:
    state = make()
    for train in (4.0, math.nan, 2.0):
        state.record(Interval(train_loss=train, val_loss=train))
    assert state.summary.best_train_loss == state.summary.best_val_loss == 2.0
    assert state.summary.initial_val_loss == 4.0


def test_several_runs_are_each_as_one() -> None:
    columns = [(4.0, 3.0), (2.0, math.nan), (3.0, 5.0), (math.nan, 1.0)]
    singles = [make() for _ in columns]
    many = make()
    for scale in (1.0, 0.5, 0.8):
        for single, (train, validation) in zip(singles, columns, strict=True):
            single.record(Interval(train_loss=scale * train, val_loss=scale * validation))
        both = scale * np.array(columns)
        many.record(Interval(train_loss=both[:, 0], val_loss=both[:, 1]))
    for name in many.summary._fields[2:]:
        alone = np.array([getattr(single.summary, name) for single in singles])
        np.testing.assert_array_equal(getattr(many.summary, name), alone, err_msg=name)
    np.testing.assert_array_equal(many.watched_loss(), [single.watched_loss() for single in singles])


def test_progress() -> None:
    state = make(total_steps=40)
    seen = []
    for step in (0, 10, 40, 55):
        state.optimizer_steps = state.spent = step
        seen.append(state.progress)
    assert seen == [0.0, 0.25, 1.0, 1.0]
    assert math.isnan(make(total_steps=None).progress)


def test_the_state_comes_back_from_json() -> None:
    for losses in ((4.0, 3.0), (np.array([4.0, 2.0]), np.array([3.0, math.nan]))):
        state = make()
        state.settings["lr"] = losses[0]
        state.initial_settings["lr"] = losses[1]
        state.optimizer_steps = state.spent = 7
        state.initial_loss = losses[0]
        state.record(Interval(*losses))
        state.record(Interval(*losses, val_loss=losses[1]))
        other = make(total_steps=5)
        other.load_state_dict(json.loads(json.dumps(state.state_dict())))
        assert other.total_steps == 100
        assert json.dumps(other.state_dict()) == json.dumps(state.state_dict())
        assert type(other.current.train_loss) is type(state.current.train_loss)
