"""LSTM classifiers of the learning-rate study: sizes in closed form, packing, words of train alone, resumption."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from test_task_reviews import rows_of, write_imdb
from test_task_sentences import write_sst2

from trimtab import registry
from trimtab.tasks.data import train_and_held_out
from trimtab.tasks.models import PADDING, PackedLSTM
from trimtab.tasks.sentences import UNKNOWN
from trimtab.training.loop import TrainingLoop

REAL = os.environ.get("TRIMTAB_DATA")
NAMES = ["imdb-lstm", "imdb-bilstm", "sst2-lstm"]


def draw(*sizes: int, is_bidirectional: bool = False) -> PackedLSTM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PackedLSTM(*sizes, is_bidirectional=is_bidirectional)


def size(name: str, scale: str, vocab_size: int) -> int:
    with torch.device("meta"):
        split = type("Empty", (), {"info": {"vocab_size": vocab_size, "n_classes": 2}})()
        model = registry.load("task", name)(scale).make_model(split)
    return sum(parameter.numel() for parameter in model.parameters())


def test_sizes_are_those_of_the_closed_form():
    # Embedding, four gates a direction (weights of input and state, two biases), dense layer.
    gates = 4 * 128 * (128 + 128 + 2)
    assert size("imdb-lstm", "full", 10_002) == 10_002 * 128 + gates + 2 * 129 == 1_412_610
    assert size("imdb-bilstm", "full", 10_002) == 10_002 * 128 + 2 * gates + 2 * 257 == 1_544_962
    assert size("sst2-lstm", "full", 10_002) == 1_412_610
    assert size("sst2-lstm", "small", 2_002) == 2_002 * 64 + 4 * 64 * 130 + 2 * 65 == 161_538
    assert size("imdb-bilstm", "smoke", 502) == 502 * 32 + 2 * 4 * 32 * 66 + 2 * 65 == 33_090


@pytest.mark.parametrize("is_bidirectional", [False, True])
def test_a_row_does_not_depend_on_the_padding_beside_it(is_bidirectional):
    model = draw(20, 6, 5, 2, is_bidirectional=is_bidirectional)
    alone = model(torch.tensor([[3, 4]]))
    for tokens in ([[3, 4, 0, 0, 0]], [[3, 4, 0, 0], [7, 8, 9, 10]], [[3, 4], [7, 8]], [[3, 4, 0], [7, 0, 0]]):
        torch.testing.assert_close(model(torch.tensor(tokens))[:1], alone, rtol=1e-6, atol=1e-7)
    model.tokens.weight.data[PADDING] = 7.0  # whatever stands there is not read
    torch.testing.assert_close(model(torch.tensor([[3, 4, 0, 0], [7, 8, 9, 1]]))[:1], alone, rtol=1e-6, atol=1e-7)
    assert (model(torch.tensor([[3, 4, 5]])) - alone).abs().max() > 1e-4  # and a word is


def test_the_output_reads_the_state_behind_the_last_word():
    tokens = torch.tensor([[3, 4, 4, 0]])
    model = draw(20, 6, 5, 2)
    states, _ = model.lstm(model.tokens(tokens[:, :3]))
    torch.testing.assert_close(model(tokens), model.head(states[:, -1]))
    both = draw(20, 6, 5, 2, is_bidirectional=True)
    states, _ = both.lstm(both.tokens(tokens[:, :3]))
    torch.testing.assert_close(both(tokens), both.head(torch.cat((states[:, -1, :5], states[:, 0, 5:]), dim=1)))


@pytest.mark.parametrize("name", NAMES)
def test_scales_are_whole_epochs_from_the_write_ups_start(name):
    smoke, small, full = (registry.load("task", name)(scale) for scale in ("smoke", "small", "full"))
    per_epoch = 22_414 // 64 if full.dataset == "imdb" else 60_615 // 64
    assert (smoke.batch_size, smoke.total_steps, smoke.eval_every) == (32, 20, 5)
    assert (small.batch_size, small.total_steps, small.eval_every) == (64, 10 * 93, 93)
    assert (full.batch_size, full.total_steps, full.eval_every) == (64, 50 * per_epoch, per_epoch)
    for task in (smoke, small, full):
        assert (task.optimizer, task.lr, task.betas, task.weight_decay) == ("adam", 1e-3, (0.9, 0.999), 0.0)
        assert task.name == name


@pytest.mark.parametrize("name", ["imdb-lstm", "imdb-bilstm"])
def test_words_of_reviews_are_those_of_train_alone(name, tmp_path):
    train, test = rows_of("train", 800), rows_of("test", 250)
    write_imdb(tmp_path / "a" / "imdb", train, test)
    _, in_val = train_and_held_out(torch.tensor([label for _, label in train]).numpy(), 10, (640, 200), "imdb")
    for row in in_val:
        train[row] = (f"aaa aaa aaa aaa {row}", train[row][1])
    write_imdb(tmp_path / "b" / "imdb", train, [(f"aaa aaa {row}", label) for row, (_, label) in enumerate(test)])
    before, after = (registry.load("task", name)("smoke").load(tmp_path / folder) for folder in "ab")
    assert torch.equal(before.train.inputs, after.train.inputs)
    assert before.info == after.info
    assert set(after.val.inputs.flatten().tolist()) == set(after.test.inputs.flatten().tolist()) == {PADDING, UNKNOWN}


def test_words_of_sentences_are_those_of_train_alone(tmp_path):
    write_sst2(tmp_path / "sst2")
    data = registry.load("task", "sst2-lstm")("smoke").load(tmp_path)
    # Behind the label a row has the name of its set, and a word of its own: of these, train's alone are numbered.
    assert (data.train.inputs[:, 2] > UNKNOWN).sum() == 497
    assert set(data.val.inputs[:, 2].tolist()) == set(data.test.inputs[:, 1].tolist()) == {UNKNOWN}


@pytest.mark.parametrize("name", NAMES)
def test_a_restored_run_goes_on_to_the_bit(name, tmp_path):
    write_imdb(tmp_path / "imdb")
    write_sst2(tmp_path / "sst2")
    task = registry.load("task", name)("smoke")
    data = task.load(tmp_path)
    first, second = (TrainingLoop(task, data, seed=seed) for seed in (0, 1))
    before = {key: value.clone() for key, value in first.model.named_parameters()}
    assert first.step().item() == pytest.approx(0.69, abs=0.1)  # log 2: it knows nothing yet
    assert [key for key, value in first.model.named_parameters() if torch.equal(value, before[key])] == []
    second.load_state_dict(first.state_dict())
    losses = [[loop.step().item() for _ in range(21)] for loop in (first, second)]  # into the next epoch
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]
    assert first.evaluate("val") == second.evaluate("val")


@pytest.mark.skipif(REAL is None, reason="TRIMTAB_DATA names no folder with the real sets")
@pytest.mark.parametrize("name", ["imdb-bilstm", "sst2-lstm"])
def test_a_step_on_the_real_sets(name):
    task = registry.load("task", name)("smoke")
    data = task.load(Path(REAL))
    assert [len(part.targets) for part in (data.train, data.val, data.test)] == [640, 200, 200]
    assert TrainingLoop(task, data, seed=0).step().item() == pytest.approx(0.69, abs=0.1)
