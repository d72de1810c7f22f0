"""SST-2: vocabulary, padding, splits, what is refused."""

import os
from collections import Counter
from pathlib import Path

import pytest
import torch

from trimtab.errors import InputError, MissingDataError
from trimtab.tasks import hub
from trimtab.tasks.models import PADDING, BiLSTM, MeanEmbedding
from trimtab.tasks.sentences import LENGTH, UNKNOWN, encode, make_tokenizer, sst2_bilstm, sst2_mlp

REAL = os.environ.get("TRIMTAB_DATA")


@pytest.fixture(autouse=True)
def _fixed_weights():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def write_sst2(folder: Path, n_train: int = 1000, n_validation: int = 250) -> None:
    """Row i of a set is the word "word<i>" after "good" or "bad", which is its label; the sets name themselves."""
    arrow = pytest.importorskip("pyarrow", reason="the extra [data] is not installed")
    import pyarrow.parquet as parquet

    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", n_train), ("validation", n_validation)):
        rows = range(count)
        sentences = [f"{('bad', 'good')[row % 2]} {name} {name}{row} " for row in rows]
        table = arrow.table({"sentence": sentences, "label": [row % 2 for row in rows], "idx": list(rows)})
        parquet.write_table(table, folder / f"{name}-00000-of-00001.parquet")


def words_of(tokenizer) -> dict[str, int]:
    """The words that it numbers, without what stands for padding and for any other word."""
    assert tokenizer.token_to_id("  ") == PADDING == 0
    assert tokenizer.token_to_id(" ") == UNKNOWN == 1
    return {word: number for word, number in tokenizer.get_vocab().items() if word.strip()}


def test_a_vocabulary_is_sorted_by_count_and_then_by_word():
    pytest.importorskip("tokenizers", reason="the extra [data] is not installed")
    sentences = ["c b a", "b c", "b  d", "c", " a "]
    assert words_of(make_tokenizer(sentences, 10)) == {"b": 2, "c": 3, "a": 4, "d": 5}
    assert words_of(make_tokenizer(sentences, 3)) == {"b": 2, "c": 3, "a": 4}
    assert words_of(make_tokenizer([], 3)) == {}


def test_sentences_are_cut_padded_and_never_empty():
    pytest.importorskip("tokenizers", reason="the extra [data] is not installed")
    tokenizer = make_tokenizer(["b b c"], 2)
    tokens = encode(["b c x", "c c c c c", " ", ""], tokenizer, 4)
    assert tokens.tolist() == [[2, 3, 1, 0], [3, 3, 3, 3], [1, 0, 0, 0], [1, 0, 0, 0]]
    assert tokens.dtype == torch.int64
    assert encode([], tokenizer, 4).shape == (0, 4)
    assert encode(["c [UNK] [PAD]c"], tokenizer, 4).tolist() == [[3, 1, 1, 0]]  # these are words as any other


def test_words_are_numbered_as_plain_counting_would_have_it():
    pytest.importorskip("tokenizers", reason="the extra [data] is not installed")
    draws = torch.randint(0, 40, (60, 12), generator=torch.Generator().manual_seed(1)).float().mul(0.3).exp().int()
    texts = [" ".join(f"wört{number}" for number in row) for row in draws.tolist()]
    counts = Counter(" ".join(texts[:40]).split())
    ranked = sorted(counts, key=lambda word: (-counts[word], word))[:25]
    known = {word: number for number, word in enumerate(ranked, start=2)}
    assert len(counts) > 25
    expected = [[known.get(word, UNKNOWN) for word in text.split()[:10]] for text in texts]
    assert encode(texts, make_tokenizer(texts[:40], 25), 10).tolist() == expected


@pytest.mark.parametrize("make", [MeanEmbedding, BiLSTM])
def test_padding_does_not_change_the_output(make):
    model = make(20, 6, 5, 2)
    short = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
    padded = torch.cat((short, torch.zeros(2, 9, dtype=torch.int64)), dim=1)
    torch.testing.assert_close(model(padded), model(short), rtol=1e-6, atol=1e-7)
    # A row is the same in whatever company: beside a longer one, and alone.
    mixed = torch.tensor([[3, 4, 0, 0, 0], [7, 8, 9, 10, 11]])
    torch.testing.assert_close(model(mixed)[:1], model(torch.tensor([[3, 4]])), rtol=1e-6, atol=1e-7)
    assert (model(padded) - model(padded.roll(1, 0))).abs().max() > 1e-4  # and the words do change it


@pytest.mark.parametrize("make", [MeanEmbedding, BiLSTM])
def test_padding_learns_nothing(make):
    model = make(20, 6, 5, 2)
    model.tokens.weight.data[PADDING] = 7.0  # whatever stands there
    tokens = torch.tensor([[3, 4, 0, 0], [5, 6, 7, 8]])
    before = model(tokens)
    before.sum().backward()
    assert model.tokens.weight.grad[PADDING].abs().max() == 0
    model.tokens.weight.data[PADDING] = 0.0
    torch.testing.assert_close(model(tokens), before, rtol=1e-6, atol=1e-7)


def test_the_mean_and_the_last_states_are_what_they_say():
    model = MeanEmbedding(20, 6, 5, 2)
    tokens = torch.tensor([[3, 4, 4, 0]])
    mean = (model.tokens.weight[3] + 2 * model.tokens.weight[4]) / 3
    torch.testing.assert_close(model(tokens)[0], model.mlp(mean))
    model = BiLSTM(20, 6, 5, 2)
    outputs, _ = model.lstm(model.tokens(tokens[:, :3]))
    last = torch.cat((outputs[:, -1, :5], outputs[:, 0, 5:]), dim=1)
    torch.testing.assert_close(model(tokens), model.head(last))


@pytest.mark.parametrize("make", [sst2_mlp, sst2_bilstm])
def test_a_small_set_is_cut_and_its_validation_set_is_test(tmp_path, make):
    write_sst2(tmp_path / "sst2")
    data = make("smoke").load(tmp_path)
    assert [tuple(part.inputs.shape) for part in (data.train, data.val, data.test)] == [
        (640, LENGTH), (100, LENGTH), (200, LENGTH)]  # fmt: skip
    assert data.val.targets.bincount().tolist() == [50, 50]
    assert data.info == {"n_classes": 2, "vocab_size": 502, "length": LENGTH}
    train, val, test = (part.inputs[:, 2].tolist() for part in (data.train, data.val, data.test))
    # The third word is a row's own: 497 of those of train have numbers, none of val or test has.
    assert sum(number > UNKNOWN for number in train) == 497
    assert set(val) == set(test) == {UNKNOWN}
    assert set(data.test.inputs[:, 1].tolist()) == {UNKNOWN}  # "validation" is in no row of train
    assert make("smoke").make_model(data)(data.val.inputs).shape == (100, 2)


def test_the_first_word_tells_the_label_in_every_split(tmp_path):
    write_sst2(tmp_path / "sst2")
    data = sst2_mlp("smoke").load(tmp_path)
    good = int(data.train.inputs[data.train.targets == 1][0, 0])
    for part in (data.train, data.val, data.test):
        assert torch.equal(part.inputs[:, 0].eq(good), part.targets.eq(1))


def test_a_set_without_labels_is_refused(tmp_path):
    write_sst2(tmp_path / "sst2")
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"sentence": ["a"], "label": [-1]})
    pyarrow.parquet.write_table(table, tmp_path / "sst2" / "validation.parquet")
    with pytest.raises(InputError, match=r"validation.parquet: .* a label is neither 0 nor 1; expected SST-2's"):
        sst2_mlp("smoke").load(tmp_path)


def test_missing_data_says_what_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_CHILD", "raise SystemExit('asked')")
    with pytest.raises(
        MissingDataError, match=r"looked for sst2/train.parquet or sst2/train-\*.parquet in .*hf download"
    ):
        sst2_mlp().load(tmp_path)


@pytest.mark.skipif(REAL is None, reason="TRIMTAB_DATA names no folder with the real sets")
def test_real_sst2_at_small_scale():
    data = sst2_bilstm("small").load(Path(REAL))
    assert [len(part.targets) for part in (data.train, data.val, data.test)] == [6000, 600, 872]
    assert data.test.targets.bincount().tolist() == [428, 444]
    assert data.info["vocab_size"] == 2002
    full = sst2_mlp("full").load(Path(REAL))
    assert [len(part.targets) for part in (full.train, full.val, full.test)] == [60_615, 6_734, 872]
    assert full.info["vocab_size"] == 10_002
    words = data.test.inputs.ne(PADDING)
    assert (data.test.inputs[words] == UNKNOWN).float().mean().item() == pytest.approx(0.21, abs=0.03)
