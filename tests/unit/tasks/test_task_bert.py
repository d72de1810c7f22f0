"""BERT: marks around words, word pieces, errors of what is missing; with transformers: sizes, padding, resumption."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from test_task_reviews import write_imdb
from test_task_sentences import write_sst2

from trimtab import registry
from trimtab.errors import InputError, MissingDataError, MissingExtraError
from trimtab.tasks import bert, hub
from trimtab.tasks.base import Data, Split
from trimtab.tasks.models import PADDING
from trimtab.training.loop import TrainingLoop

NAMES = ["imdb-bert", "sst2-bert"]


@pytest.fixture
def _has_transformers(monkeypatch):
    """Loading data asks whether the package is there, and needs nothing of it."""
    monkeypatch.setattr(bert.importlib.util, "find_spec", lambda name: object())


def write_tokenizer(folder) -> None:
    """Of a few words, in the form of BERT's own."""
    tokenizers = pytest.importorskip("tokenizers", reason="the extra [data] is not installed")
    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "good": 4, "bad": 5, "##ly": 6}
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(words, unk_token="[UNK]"))
    made.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    folder.mkdir(parents=True)
    made.save(str(folder / "tokenizer.json"))
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text(json.dumps({}))


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_extra_is_one_error_before_any_data_is_read(name, monkeypatch, tmp_path):
    monkeypatch.setattr(bert.importlib.util, "find_spec", lambda name: None)
    text = rf'{name} needs the package transformers, which is not installed; pip install "trimtab\[hf\]"'
    with pytest.raises(MissingExtraError, match=text):
        registry.load("task", name)("smoke").load(tmp_path)


@pytest.mark.usefixtures("_has_transformers")
def test_missing_weights_are_one_error_before_any_text_is_read(tmp_path, monkeypatch):
    task = registry.load("task", "sst2-bert")("full")
    with pytest.raises(MissingDataError, match=r"no bert-base-uncased data: looked for bert-base-uncased/config"
                       r".json in .*hf download google-bert/bert-base-uncased .*or take --scale small"):  # fmt: skip
        task.load(tmp_path)
    asked = []
    monkeypatch.setattr(hub, "fetch", lambda source, repo, patterns, kind: asked.append((repo, kind)) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        task.load(None)
    assert asked == [("google-bert/bert-base-uncased", "model")]


@pytest.mark.usefixtures("_has_transformers")
def test_words_of_train_alone_stand_between_two_marks(tmp_path):
    write_sst2(tmp_path / "sst2")
    plain = registry.load("task", "sst2-lstm")("smoke").load(tmp_path)
    data = registry.load("task", "sst2-bert")("smoke").load(tmp_path)
    assert data.info == {"n_classes": 2, "vocab_size": 504, "length": 34}
    for part, words in ((data.train, plain.train), (data.val, plain.val), (data.test, plain.test)):
        assert torch.equal(part.targets, words.targets)
        assert (part.inputs[:, 0] == 502).all()
        lengths = words.inputs.ne(PADDING).sum(1)
        assert (part.inputs.gather(1, lengths[:, None] + 1) == 503).all()
        assert torch.equal(part.inputs.ne(PADDING).sum(1), lengths + 2)
        assert torch.equal(part.inputs[:, 1:-1].where(part.inputs[:, 1:-1] < 502, PADDING), words.inputs)


def test_a_text_that_fills_its_row_keeps_its_last_word():
    part = Split(torch.tensor([[2, 3, 4], [2, 0, 0]]), torch.tensor([0, 1]))
    marked = bert._between_marks(Data(part, part, part, {"vocab_size": 5, "length": 3, "n_classes": 2}))
    assert marked.train.inputs.tolist() == [[5, 2, 3, 4, 6], [5, 2, 6, 0, 0]]
    assert marked.info == {"vocab_size": 7, "length": 5, "n_classes": 2}


@pytest.mark.usefixtures("_has_transformers")
def test_a_pre_trained_network_reads_its_own_word_pieces(tmp_path):
    write_tokenizer(tmp_path / "bert-base-uncased")
    write_sst2(tmp_path / "sst2")
    data = registry.load("task", "sst2-bert")("full").load(tmp_path)
    assert data.info == {"n_classes": 2, "length": 64, "weights": str(tmp_path / "bert-base-uncased")}
    assert [len(part.inputs) for part in (data.train, data.val, data.test)] == [900, 100, 250]
    assert data.train.inputs.shape == (900, 64)
    assert data.train.inputs[:, 1].tolist() == [(5, 4)[label] for label in data.train.targets.tolist()]
    pieces = bert._pieces(["Goodly<br />bad", "good " * 9], tmp_path / "bert-base-uncased", 6)
    assert pieces.tolist() == [[2, 4, 6, 5, 3, 0], [2, 4, 4, 4, 4, 3]]
    (tmp_path / "bert-base-uncased" / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"cannot read .*tokenizer.json: .*; expected the tokenizer of google-bert/"):
        registry.load("task", "sst2-bert")("full").load(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_the_start_is_berts_own(name):
    small, full = (registry.load("task", name)(scale) for scale in ("small", "full"))
    n_train = 22_414 if name == "imdb-bert" else 60_615
    for task in (small, full):
        assert (task.optimizer, task.lr, task.weight_decay, task.batch_size) == ("adamw", 5e-5, 0.0, 16)
    assert (small.total_steps, full.total_steps) == (3 * 375, 3 * (n_train // 16))


def test_sizes_are_the_published_ones():
    transformers = pytest.importorskip("transformers", reason="the extra [hf] is not installed")
    with torch.device("meta"):
        base = transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=2))
        tiny = transformers.BertForSequenceClassification(
            transformers.BertConfig(vocab_size=30_522, num_labels=2, **bert._RANDOM)
        )
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (base, tiny)]
    assert sizes == [109_482_240 + 2 * 769, 4_385_920 + 2 * 129]


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="the extra [hf] is not installed")
@pytest.mark.parametrize("name", NAMES)
def test_a_random_network_is_trained_and_a_restored_run_goes_on_to_the_bit(name, tmp_path):
    write_imdb(tmp_path / "imdb")
    write_sst2(tmp_path / "sst2")
    task = registry.load("task", name)("smoke")
    data = task.load(tmp_path)
    before = torch.get_rng_state()
    first, second = (TrainingLoop(task, data, seed=seed) for seed in (0, 1))
    assert first.step().item() == pytest.approx(0.69, abs=0.15)
    second.load_state_dict(first.state_dict())
    assert [first.step().item() for _ in range(3)] == [second.step().item() for _ in range(3)]
    assert first.evaluate("val") == second.evaluate("val")
    assert torch.equal(torch.get_rng_state(), before)
    first.model.eval()
    tokens = data.val.inputs[:2]
    with torch.no_grad():
        torch.testing.assert_close(
            first.model(torch.nn.functional.pad(tokens, (0, 5))), first.model(tokens), rtol=1e-4, atol=1e-5
        )
