"""IMDb: words, vocabulary, splits, what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from trimtab.errors import InputError, MissingDataError, UnknownNameError
from trimtab.tasks import hub
from trimtab.tasks.data import train_and_held_out
from trimtab.tasks.models import PADDING
from trimtab.tasks.reviews import load_imdb, split_words
from trimtab.tasks.sentences import UNKNOWN

REAL = os.environ.get("TRIMTAB_DATA")


def rows_of(name: str, count: int) -> list[tuple[str, int]]:
    """All negative reviews, then all positive: "Bad, " or "Good, ", the set, and a word that is the row's own."""
    return [(f"{('Bad', 'Good')[2 * row // count]},<br />{name} {name}{row}", 2 * row // count) for row in range(count)]


def write_imdb(folder: Path, train=None, test=None, pattern: str = "{}.parquet") -> None:
    arrow = pytest.importorskip("pyarrow", reason="the extra [data] is not installed")
    import pyarrow.parquet as parquet

    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train or rows_of("train", 800)), ("test", test or rows_of("test", 250))):
        table = arrow.table({"text": [text for text, _ in rows], "label": [label for _, label in rows]})
        parquet.write_table(table, folder / pattern.format(name))


def test_words_are_lower_case_with_punctuation_apart():
    text = "It's a <br /><br />GREAT film--no, really!  Zoë's 10/10 &c."
    assert split_words(text) == "it's a great film - - no , really ! zoë's 10 / 10 & c ."
    assert split_words(text, 3) == "it's a great"
    assert split_words(" <br />") == ""


def test_a_small_set_is_cut_in_proportion_though_all_negative_reviews_come_first(tmp_path):
    write_imdb(tmp_path / "imdb")
    data = load_imdb(tmp_path, scale="smoke")
    assert [tuple(part.inputs.shape) for part in (data.train, data.val, data.test)] == [(640, 64), (80, 64), (200, 64)]
    assert [part.targets.bincount().tolist() for part in (data.train, data.val, data.test)] == [
        [320, 320], [40, 40], [100, 100]]  # fmt: skip
    assert data.info == {"n_classes": 2, "vocab_size": 502, "length": 64}
    first = {int(label): set(data.train.inputs[data.train.targets == label, 0].tolist()) for label in (0, 1)}
    assert first[0] != first[1]
    for part in (data.train, data.val, data.test):  # the first word tells the label everywhere
        assert all(set(part.inputs[part.targets == label, 0].tolist()) == first[label] for label in (0, 1))
    # The fourth word is a row's own: 496 of train's are in the vocabulary beside bad, good, the comma and "train".
    own = [part.inputs[:, 3] for part in (data.train, data.val, data.test)]
    assert (own[0] > UNKNOWN).sum() == 496
    assert set(own[1].tolist()) == set(own[2].tolist()) == {UNKNOWN}
    assert set(data.test.inputs[:, 2].tolist()) == {UNKNOWN}  # "test" is in no review of train
    again = load_imdb(tmp_path, scale="smoke")
    assert torch.equal(data.train.inputs, again.train.inputs)


def test_the_vocabulary_is_that_of_train_alone(tmp_path):
    train, test = rows_of("train", 800), rows_of("test", 250)
    write_imdb(tmp_path / "a" / "imdb", train, test)
    before = load_imdb(tmp_path / "a", scale="smoke")
    labels = torch.tensor([label for _, label in train]).numpy()
    in_train, in_val = train_and_held_out(labels, 10, (640, 200), "imdb")
    assert not set(in_train) & set(in_val)
    assert (len(in_train), len(in_val)) == (640, 80)
    for row in in_val:
        train[row] = (f"aaa aaa aaa aaa {row}", train[row][1])
    test = [(f"aaa aaa {row}", label) for row, (_, label) in enumerate(test)]
    write_imdb(tmp_path / "b" / "imdb", train, test)
    after = load_imdb(tmp_path / "b", scale="smoke")
    assert torch.equal(before.train.inputs, after.train.inputs)
    assert before.info == after.info
    assert set(after.val.inputs.flatten().tolist()) == set(after.test.inputs.flatten().tolist()) == {PADDING, UNKNOWN}


def test_a_review_that_train_has_twice_is_taken_once(tmp_path):
    train = [(f"the same {row // 2}", row // 400) for row in range(800)]
    write_imdb(tmp_path / "imdb", train)
    data = load_imdb(tmp_path, scale="smoke")
    assert (len(data.train.targets), len(data.val.targets)) == (360, 40)
    assert not set(data.train.inputs[:, 2].tolist()) & set(data.val.inputs[:, 2].tolist()) - {UNKNOWN}
    assert data.train.inputs[:, 2].unique().numel() == 360


@pytest.mark.parametrize("pattern", ["{}-00000-of-00001.parquet", "plain_text/{}-00000-of-00001.parquet"])
def test_the_names_of_the_hub_are_found(tmp_path, pattern):
    (tmp_path / "imdb" / "plain_text").mkdir(parents=True)
    write_imdb(tmp_path / "imdb", pattern=pattern)
    assert len(load_imdb(tmp_path, scale="small").train.targets) == 720


def test_wrong_files_are_refused(tmp_path, monkeypatch):
    write_imdb(tmp_path / "imdb", test=[("a", -1)])
    text = r"test.parquet: it is empty, or a label is neither 0 nor 1; expected IMDb's train and test sets"
    with pytest.raises(InputError, match=text):
        load_imdb(tmp_path, scale="smoke")
    write_imdb(tmp_path / "imdb", test=[("a", 1), (None, 0)])
    with pytest.raises(InputError, match=r"test.parquet: the column text holds something that is no text; expected"):
        load_imdb(tmp_path, scale="smoke")
    write_imdb(tmp_path / "imdb", train=rows_of("train", 40))
    with pytest.raises(UnknownNameError, match="unknown scale 'smal'"):
        load_imdb(tmp_path, scale="smal")
    with pytest.raises(MissingDataError, match=r"looked for imdb/train.parquet or imdb/train-\*.parquet or .*hf downl"):
        load_imdb(tmp_path / "none", scale="smoke")
    asked = []
    monkeypatch.setattr(hub, "fetch", lambda source, repo_id, patterns: asked.append((repo_id, patterns)) or {})
    with pytest.raises(KeyError):
        load_imdb(None, scale="smoke")
    assert asked == [("stanfordnlp/imdb", {"train": "plain_text/train-*.parquet", "test": "plain_text/test-*.parquet"})]


@pytest.mark.skipif(REAL is None, reason="TRIMTAB_DATA names no folder with the real sets")
def test_real_imdb_at_small_scale():
    data = load_imdb(Path(REAL), scale="small")
    assert data.info == {"n_classes": 2, "vocab_size": 2002, "length": 64}
    assert [len(part.targets) for part in (data.train, data.val, data.test)] == [6000, 400, 1000]
    shares = [part.targets.float().mean().item() for part in (data.train, data.val, data.test)]
    assert shares == pytest.approx([0.5, 0.5, 0.5], abs=0.003)  # repetitions are not as frequent in both classes
    words = data.test.inputs.ne(PADDING)
    assert words.float().mean() > 0.98
    assert (data.test.inputs[words] == UNKNOWN).float().mean().item() == pytest.approx(0.16, abs=0.06)
