"""BERT classifiers of the learning-rate study: IMDb and SST-2, through transformers (the extra `[hf]`).

Found through `registry.load("task", ...)`. BERT has a start of its own: AdamW at 5e-5, batches of 16, no weight decay;
three epochs (Devlin et al. 2019, arXiv:1810.04805, appendix A.3).

| scale | network | tokens | epochs |
|---|---|---|---|
| full | BERT base, pre-trained (`google-bert/bert-base-uncased`) | its word pieces: SST-2 64, IMDb 256 | 3 |
| small | 2 layers of 128, drawn at random | words of train: SST-2 34, IMDb 66 | 3 |
| smoke | the same | the same | half a one |

The random network is of the size of Google's BERT tiny. Its words and splits are those of `trimtab.tasks.reviews` and
`trimtab.tasks.sentences`, from the train split alone, with [CLS] in front and [SEP] behind; the pre-trained one reads
the word pieces that it was trained with. Either way 0 is padding, which attention does not see.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import InputError, MissingExtraError
from trimtab.tasks import hub, reviews, sentences
from trimtab.tasks.base import Data, Split, Task, pick
from trimtab.tasks.data import Source, extra, find
from trimtab.tasks.models import PADDING

__all__ = ["BertClassifier", "imdb_bert", "sst2_bert"]

_WEIGHTS = Source(
    "bert-base-uncased",
    "Get it with `hf download google-bert/bert-base-uncased config.json model.safetensors tokenizer.json --local-dir "
    "DIR/bert-base-uncased` and give --data-dir DIR, or take --scale small, whose network is drawn at random; see "
    "docs/data.md",
)
_REPO_ID = "google-bert/bert-base-uncased"
_FILES = ("config.json", "model.safetensors", "tokenizer.json")
_RANDOM = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
_BATCH = 16
_EPOCHS = 3
_SMOKE = (20, 5)  # steps, and steps between validations
_TRAIN = {"imdb": {"small": 6_000, "full": 22_414}, "sst2": {"small": 6_000, "full": 60_615}}
_PIECES = {"imdb": 256, "sst2": 64}  # word pieces of a text at most, [CLS] and [SEP] among them


def imdb_bert(scale: str = "small") -> Task:
    """IMDb, BERT.

    Args:
        scale: "smoke" (20 steps, 2 layers), "small" (1,125 steps, 2 layers) or "full" (4,200 steps, BERT base).
    """
    return _task("imdb-bert", "imdb", scale)


def sst2_bert(scale: str = "small") -> Task:
    """SST-2, BERT.

    Args:
        scale: "smoke" (20 steps, 2 layers), "small" (1,125 steps, 2 layers) or "full" (11,364 steps, BERT base).
    """
    return _task("sst2-bert", "sst2", scale)


def _task(name: str, dataset: str, scale: str) -> Task:
    """Whole epochs, and five validations in each; warm-up over a tenth, as in BERT's own code."""
    per_epoch = {key: n_train // _BATCH for key, n_train in _TRAIN[dataset].items()}
    steps = {key: (_EPOCHS * count, count // 5) for key, count in per_epoch.items()}
    total, every = pick(scale, {"smoke": _SMOKE, **steps})
    return Task(
        name=name,
        dataset=dataset,
        kind="classification",
        load=partial(_load, name=name, dataset=dataset, scale=scale),
        make_model=_model,
        optimizer="adamw",
        lr=5e-5,
        batch_size=_BATCH,
        total_steps=total,
        eval_every=every,
        warmup_steps=total // 10,
    )


def _load(data_dir: Path | None, *, name: str, dataset: str, scale: str) -> Data:
    """Inputs (B, L), tokens from [CLS] to [SEP] and padding; `info` says where weights are, where there are some."""
    if importlib.util.find_spec("transformers") is None:
        raise MissingExtraError(
            f'{name} needs the package transformers, which is not installed; pip install "trimtab[hf]"'
        )
    if scale != "full":
        load = reviews.load_imdb if dataset == "imdb" else sentences.load_sst2
        return _between_marks(load(data_dir, scale=scale))
    folder = _weights(data_dir)
    parts = (reviews.imdb_texts if dataset == "imdb" else sentences.sst2_texts)(data_dir, scale=scale)
    length = _PIECES[dataset]
    train, val, test = (Split(_pieces(texts, folder, length), torch.from_numpy(labels)) for texts, labels in parts)
    return Data(train, val, test, info={"n_classes": 2, "length": length, "weights": str(folder)})


def _between_marks(data: Data) -> Data:
    """The same texts with [CLS] in front and [SEP] behind the last word; these two get the next numbers."""
    first, last = int(data.info["vocab_size"]), int(data.info["vocab_size"]) + 1

    def mark(part: Split) -> Split:
        n, length = part.inputs.shape
        tokens = torch.full((n, length + 2), PADDING, dtype=torch.int64)
        tokens[:, 0] = first
        tokens[:, 1:-1] = part.inputs
        tokens[torch.arange(n), part.inputs.ne(PADDING).sum(1) + 1] = last
        return Split(tokens, part.targets)

    info = {**data.info, "vocab_size": last + 1, "length": int(data.info["length"]) + 2}
    return Data(mark(data.train), mark(data.val), mark(data.test), info=info)


def _weights(data_dir: Path | None) -> Path:
    """The folder of the pre-trained network.

    Raises:
        MissingDataError: It is not there; says how to get it.
    """
    if data_dir is None:
        found = hub.fetch(_WEIGHTS, _REPO_ID, {name: name for name in _FILES}, kind="model")
        return found[_FILES[0]][0].parent
    for name in _FILES:
        find(_WEIGHTS, data_dir, name)
    return data_dir / _WEIGHTS.dataset


def _pieces(texts: Sequence[str], folder: Path, length: int) -> Tensor:
    """Word pieces (B, length) of a pre-trained network's own tokenizer, cut and padded."""
    path = folder / "tokenizer.json"
    try:
        tokenizer = extra("tokenizers", _WEIGHTS.dataset).Tokenizer.from_file(str(path))
    except Exception as error:
        if isinstance(error, MissingExtraError):
            raise
        raise InputError(f"cannot read {path}: {error}; expected the tokenizer of {_REPO_ID}") from error
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(pad_id=PADDING, length=length)
    rows = [encoding.ids for encoding in tokenizer.encode_batch([text.replace("<br />", " ") for text in texts])]
    return torch.tensor(rows, dtype=torch.int64)


class BertClassifier(nn.Module):
    """transformers' BERT with a dense layer on its pooled first state: tokens (B, L) -> (B, n_classes).

    Args:
        network: A `BertForSequenceClassification`.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits; attention sees no padding.

        Args:
            tokens: (B, L) int64, filled up with `PADDING` behind.
        """
        logits: Tensor = self.network(input_ids=tokens, attention_mask=tokens.ne(PADDING).long()).logits
        return logits


def _model(data: Data) -> nn.Module:
    transformers: Any = importlib.import_module("transformers")
    n_classes = int(data.info["n_classes"])
    if "weights" not in data.info:
        config = transformers.BertConfig(vocab_size=int(data.info["vocab_size"]), num_labels=n_classes, **_RANDOM)
        return BertClassifier(transformers.BertForSequenceClassification(config))
    folder = str(data.info["weights"])
    try:
        network = transformers.BertForSequenceClassification.from_pretrained(
            folder, num_labels=n_classes, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot read the network in {folder}: {error}; expected {', '.join(_FILES)}") from error
    return BertClassifier(network.float())
