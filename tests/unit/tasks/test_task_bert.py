"""BERT: marks around words, word pieces, errors of what is missing; with transformers: sizes, padding, resumption."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_task_reviews import write_imdb
from test_task_sentences import write_sst2

from trimtab import registry
from trimtab.cost import count_cost
from trimtab.errors import InputError, MissingDataError, MissingExtraError
from trimtab.places import dropout_places
from trimtab.tasks import bert, bert_files, hub
from trimtab.tasks.base import Data, Split
from trimtab.tasks.models import PADDING
from trimtab.training.loop import TrainingLoop

NAMES = ["imdb-bert", "sst2-bert"]
SIZES = {"vocab_size": 7, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 16, "max_position_embeddings": 64}  # fmt: skip
NEEDS_IT = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="the extra [hf] is not installed"
)


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


def write_network(folder, **changes):
    """A small BERT as transformers writes it, with the heads of pre-training, beside its tokenizer; the network."""
    import transformers

    if not folder.exists():
        write_tokenizer(folder)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        network = transformers.BertForPreTraining(transformers.BertConfig(**(SIZES | changes)))
    network.save_pretrained(folder)
    return network


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
    pieces = bert_files.word_pieces(["Goodly<br />bad", "good " * 9], tmp_path / "bert-base-uncased", 6, 7)
    assert pieces.tolist() == [[2, 4, 6, 5, 3, 0], [2, 4, 4, 4, 4, 3]]
    (tmp_path / "bert-base-uncased" / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"cannot read .*tokenizer.json: .*; expected the tokenizer of google-bert/"):
        registry.load("task", "sst2-bert")("full").load(tmp_path)
    write_tokenizer(tmp_path / "other")
    with pytest.raises(
        InputError, match=r"does not fit the network, which knows 6 pieces and pads with 0: its pieces "
    ):
        bert_files.word_pieces(["good"], tmp_path / "other", 6, 6)
    for text in ('"[PAD]":0', '"[PAD]": 0'):
        path = tmp_path / "other" / "tokenizer.json"
        path.write_text(path.read_text().replace(text, text.replace("PAD", "END")))
    with pytest.raises(InputError, match=r"and \[PAD\] is None; expected the tokenizer of google-bert/"):
        bert_files.word_pieces(["good"], tmp_path / "other", 6, 7)


@NEEDS_IT
def test_a_pre_trained_network_is_read_and_its_head_is_the_runs_own(tmp_path, capfd):
    saved = write_network(tmp_path / "bert-base-uncased").state_dict()
    write_sst2(tmp_path / "sst2")
    task = registry.load("task", "sst2-bert")("full")
    data = task.load(tmp_path)
    capfd.readouterr()
    before = torch.get_rng_state()
    first, again, other = (TrainingLoop(task, data, seed=seed) for seed in (0, 0, 1))
    assert first.step().item() == again.step().item() == pytest.approx(0.69, abs=0.3)
    read = {name.removeprefix("network."): value for name, value in other.model.state_dict().items()}
    body = {name for name in saved if name.startswith("bert.")}
    assert {name for name in read if name not in body} == {"classifier.weight", "classifier.bias"}
    assert [name for name in body if not torch.equal(read[name], saved[name])] == []
    fresh = TrainingLoop(task, data, seed=0).model.network.classifier.weight
    assert not torch.equal(fresh, read["classifier.weight"])
    assert fresh.std().item() == pytest.approx(0.02, abs=0.01)  # as BERT's other weights are drawn
    assert torch.equal(torch.get_rng_state(), before)
    assert capfd.readouterr() == ("", "")  # no report, no progress bar


@NEEDS_IT
def test_names_and_types_of_old_files_are_read(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "bert-base-uncased"
    saved = write_network(folder).state_dict()
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value.half()
        for name, value in load_file(folder / "model.safetensors").items()
    }
    assert sum(name.endswith((".gamma", ".beta")) for name in old) == 8
    save_file(old | {"bert.embeddings.position_ids": torch.arange(64)[None]}, folder / "model.safetensors")
    network = bert._model(weights_at(folder), name="sst2-bert").network
    for name, value in network.named_parameters():
        if name.startswith("bert."):
            assert torch.equal(value, saved[name].half().float()), name


def weights_at(folder) -> Data:
    part = Split(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    return Data(part, part, part, {"n_classes": 2, "length": 4, "weights": str(folder)})


@NEEDS_IT
@pytest.mark.parametrize(
    ("text", "changes"),
    [
        (r"model.safetensors is of another network than config.json beside it: bert.encoder.layer.1.attention.output."
         r"LayerNorm.bias has shape none; expected \(8,\)", {"num_hidden_layers": 2}),
        (r"intermediate.dense.bias has shape \(16,\); expected \(24,\)", {"intermediate_size": 24}),
        (r"config.json: hidden_size is 9; expected a multiple of num_attention_heads, 2", {"hidden_size": 9}),
        (r"config.json: num_hidden_layers is 'x'; expected a whole number of at least 1", {"num_hidden_layers": "x"}),
        (r"config.json: model_type is 'gpt2'; expected 'bert', as in google-bert/", {"model_type": "gpt2"}),
        (r"config.json: hidden_act is 'relu'; expected 'gelu', as in google-bert/", {"hidden_act": "relu"}),
        (r"the network in .* reads 63 word pieces at most; sst2-bert needs 64", {"max_position_embeddings": 63}),
    ],
)  # fmt: skip
def test_a_configuration_of_another_network_is_refused(text, changes, tmp_path):
    folder = tmp_path / "bert-base-uncased"
    write_network(folder)
    write_sst2(tmp_path / "sst2")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    task = registry.load("task", "sst2-bert")("full")
    with pytest.raises(InputError, match=text):
        task.make_model(task.load(tmp_path))


class Shell:
    """What a pickle can do to whoever loads it."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@NEEDS_IT
def test_pickled_weights_are_never_opened(tmp_path):
    folder, mark = tmp_path / "bert-base-uncased", tmp_path / "was_run"
    write_network(folder)
    torch.save({"bert": Shell(mark)}, folder / "pytorch_model.bin")
    torch.save({"bert": Shell(mark)}, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"attn_implementation": "someone/kernel", "auto_map": {"AutoModel": "x--y"}}
    path.write_text(json.dumps(config))
    bert._model(weights_at(folder), name="sst2-bert")  # the numbers alone are read
    shutil.copy(folder / "pytorch_model.bin", folder / "model.safetensors")
    with pytest.raises(InputError, match=r"cannot read .*model.safetensors: .*; expected the weights of google-bert/"):
        bert._model(weights_at(folder), name="sst2-bert")
    (folder / "model.safetensors").unlink()
    with pytest.raises(MissingDataError, match=r"looked for bert-base-uncased/model.safetensors in "):
        registry.load("task", "sst2-bert")("full").load(tmp_path)
    assert not mark.exists()


@NEEDS_IT
def test_weights_in_whole_numbers_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "bert-base-uncased"
    write_network(folder)
    weights = load_file(folder / "model.safetensors")
    weights["bert.pooler.dense.bias"] = torch.zeros(8, dtype=torch.int8)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"bert.pooler.dense.bias is of type I8; expected one of F16, BF16, F32, F64"):
        bert._model(weights_at(folder), name="sst2-bert")


def test_a_package_that_is_broken_is_the_same_error(monkeypatch):
    def broken(name):
        raise ImportError("no such library")

    task = registry.load("task", "imdb-bert")("smoke")
    monkeypatch.setattr(bert.importlib, "import_module", broken)
    with pytest.raises(MissingExtraError, match=r'imdb-bert needs .*; pip install "trimtab\[hf\]"'):
        task.make_model(weights_at("nowhere"))


IMPORTED = """
import sys
import trimtab.cli, trimtab.training.loop
from trimtab import registry
for name in registry.names("task"):
    for scale in ("smoke", "small", "full"):
        registry.load("task", name)(scale)
print(sorted({"transformers", "tokenizers"} & set(sys.modules)))
"""


@NEEDS_IT
def test_nothing_but_a_network_of_bert_imports_transformers():
    source = Path(bert.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, timeout=200,
                          env=os.environ | {"PYTHONPATH": str(source)})  # fmt: skip
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_the_start_is_berts_own(name):
    smoke, small, full = (registry.load("task", name)(scale) for scale in ("smoke", "small", "full"))
    n_train = 22_414 if name == "imdb-bert" else 60_615
    for task in (smoke, small, full):
        assert (task.optimizer, task.lr, task.weight_decay, task.batch_size) == ("adamw", 5e-5, 0.0, 16)
    assert (smoke.total_steps, small.total_steps, full.total_steps) == (640 // 16, 3 * 375, 3 * (n_train // 16))


def test_sizes_are_the_published_ones():
    transformers = pytest.importorskip("transformers", reason="the extra [hf] is not installed")
    with torch.device("meta"):
        base = transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=2))
        tiny = transformers.BertForSequenceClassification(
            transformers.BertConfig(vocab_size=30_522, num_labels=2, **bert._RANDOM)
        )
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (base, tiny)]
    assert sizes == [109_482_240 + 2 * 769, 4_385_920 + 2 * 129]


@NEEDS_IT
def test_the_cost_of_a_step_is_that_of_the_closed_form():
    part = Split(torch.ones(3, 10, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
    with torch.random.fork_rng():
        model = bert._model(Data(part, part, part, {"n_classes": 2, "length": 10, "vocab_size": 9}), name="sst2-bert")
    # A word: four products of 128 x 128 and two of 128 x 512 a layer; a text: attention, twice; pooler and head once.
    words, pairs = 2 * (4 * 128**2 + 2 * 128 * 512), 2 * 2 * 10**2 * 128
    forward = 2 * 3 * (10 * words + pairs + 128**2 + 2 * 128)
    assert count_cost(model, part.inputs).forward_flops == forward


@NEEDS_IT
def test_the_knob_dropout_acts_in_attention_too():
    part = Split(torch.ones(3, 10, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
    with torch.random.fork_rng():
        model = bert._model(Data(part, part, part, {"n_classes": 2, "length": 10, "vocab_size": 9}), name="sst2-bert")
    inside = model.network.bert.encoder.layer[0].attention.self.dropout
    places = dropout_places(model)
    assert (inside, "p") in places
    for module, name in places:
        setattr(module, name, 0.0)
    with torch.no_grad(), torch.random.fork_rng():
        assert torch.equal(model(part.inputs), model(part.inputs))
        inside.p = 0.5
        assert not torch.equal(model(part.inputs), model(part.inputs))


@NEEDS_IT
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
