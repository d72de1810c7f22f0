"""Batches: every sample once an epoch, windows and the tokens that follow, evaluation windows that cover the text."""

import pytest
import torch

from trimtab.errors import InputError
from trimtab.tasks.base import Split
from trimtab.training.batches import EVAL_BATCH, EpochBatches, WindowBatches, fixed_batches, fixed_windows


def make_split(n):
    return Split(torch.arange(n, dtype=torch.float32)[:, None], torch.arange(n))


def test_an_epoch_shows_every_sample_at_most_once_and_each_epoch_is_another():
    batches = EpochBatches(make_split(10), 3, torch.Generator().manual_seed(0))
    epochs = [torch.cat([batches.next()[1] for _ in range(3)]).tolist() for _ in range(4)]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert batches.epoch_samples == 9


def test_inputs_and_targets_belong_together():
    inputs, targets = EpochBatches(make_split(10), 5, torch.Generator().manual_seed(0)).next()
    assert torch.equal(inputs[:, 0].long(), targets)


@pytest.mark.parametrize("taken", [0, 1, 3, 4])
def test_the_place_in_an_epoch_is_kept(taken):
    batches = EpochBatches(make_split(10), 3, torch.Generator().manual_seed(0))
    for _ in range(taken):
        batches.next()
    state = batches.state_dict()
    expected = [batches.next()[1].tolist() for _ in range(8)]
    other = EpochBatches(make_split(10), 3, torch.Generator().manual_seed(9))
    other.load_state_dict(state)
    assert [other.next()[1].tolist() for _ in range(8)] == expected


def test_windows_begin_everywhere_and_targets_are_the_next_tokens():
    tokens = torch.arange(12, dtype=torch.uint8)
    batches = WindowBatches(tokens, 3, 200, torch.Generator().manual_seed(0))
    inputs, targets = batches.next()
    assert (inputs.shape, inputs.dtype) == ((200, 3), torch.int64)
    assert torch.equal(targets, inputs + 1)
    assert inputs[:, 0].unique().tolist() == list(range(9))  # the last window is 8, 9, 10 -> 11
    assert batches.epoch_samples == 4


def test_evaluation_windows_repeat_and_reach_from_the_first_token_to_the_last():
    tokens = torch.arange(200, dtype=torch.uint8)
    first, again = (list(fixed_windows(tokens, 9, 4, 5)) for _ in range(2))
    assert [len(inputs) for inputs, _ in first] == [4] * 5
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    places = torch.cat([inputs[:, 0] for inputs, _ in first])
    assert (places[0].item(), first[-1][1][-1, -1].item()) == (0, 199)
    assert (places.diff() >= 9).all()  # no token is asked for twice


def test_a_short_text_is_not_read_twice_at_the_same_place():
    windows = list(fixed_windows(torch.arange(6), 4, 8, 3))
    assert [inputs.tolist() for inputs, _ in windows] == [[[0, 1, 2, 3], [1, 2, 3, 4]]]


def test_whole_splits_are_read_in_order():
    split = make_split(2 * EVAL_BATCH + 1)
    sizes = [len(inputs) for inputs, _ in fixed_batches(split)]
    assert sizes == [EVAL_BATCH, EVAL_BATCH, 1]
    assert torch.equal(torch.cat([targets for _, targets in fixed_batches(split)]), split.targets)


def test_too_little_data_is_refused():
    with pytest.raises(InputError, match="batch_size 4 is more than the 3 train samples; make it smaller"):
        EpochBatches(make_split(3), 4, torch.Generator())
    with pytest.raises(InputError, match="a text of 5 tokens is too short for a block of 5"):
        WindowBatches(torch.arange(5), 5, 2, torch.Generator())
    with pytest.raises(InputError, match="a text of 5 tokens is too short for a block of 5"):
        next(fixed_windows(torch.arange(5), 5, 2, 1))
