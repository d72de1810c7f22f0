"""BERT classifiers of the learning-rate study: IMDb and SST-2, through transformers (the extra `[hf]`).

Found through `registry.load("task", ...)`. BERT has a start of its own: AdamW at 5e-5, batches of 16, no weight decay;
three epochs (Devlin et al. 2019, arXiv:1810.04805, appendix A.3).

| scale | network | tokens | epochs |
|---|---|---|---|
| full | BERT base, pre-trained (`google-bert/bert-base-uncased`) | its word pieces: SST-2 64, IMDb 256 | 3 |
| small | 2 layers of 128, drawn at random | words of train: SST-2 34, IMDb 66 | 3 |
| smoke | the same | the same | 1 |

BERT base has the published 109,482,240 parameters (with its pooler, without the layer of 1,538 on top). The random
network is of the size of Google's BERT tiny but for its words: 735,874 at "small". Its words and splits are those of
`trimtab.tasks.reviews` and `trimtab.tasks.sentences`, from the train split alone, with [CLS] in front and [SEP] behind;
the pre-trained one reads the word pieces that it was trained with. Either way 0 is padding, which attention skips.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import InputError, MissingExtraError
from trimtab.tasks import reviews, sentences
from trimtab.tasks.base import Data, Split, Task, pick
from trimtab.tasks.bert_files import check_weights, fill, find_folder, read_sizes, word_pieces
from trimtab.tasks.models import PADDING

__all__ = ["BertClassifier", "imdb_bert", "sst2_bert"]

_RANDOM = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
_BATCH = 16
_EPOCHS = 3
_SMOKE = (40, 10)  # steps, and steps between validations: an epoch of 640
_TRAIN = {"imdb": {"small": 6_000, "full": 22_414}, "sst2": {"small": 6_000, "full": 60_615}}
_PIECES = {"imdb": 256, "sst2": 64}  # word pieces of a text at most, [CLS] and [SEP] among them


def imdb_bert(scale: str = "small") -> Task:
    """IMDb, BERT.

    Args:
        scale: "smoke" (40 steps, 2 layers), "small" (1,125 steps, 2 layers) or "full" (4,200 steps, BERT base).
    """
    return _task("imdb-bert", "imdb", scale)


def sst2_bert(scale: str = "small") -> Task:
    """SST-2, BERT.

    Args:
        scale: "smoke" (40 steps, 2 layers), "small" (1,125 steps, 2 layers) or "full" (11,364 steps, BERT base).
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
        make_model=partial(_model, name=name),
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
        raise _missing(name)
    if scale != "full":
        load = reviews.load_imdb if dataset == "imdb" else sentences.load_sst2
        return _between_marks(load(data_dir, scale=scale))
    folder, length = find_folder(data_dir), _PIECES[dataset]
    sizes = read_sizes(folder)
    if length > sizes["max_position_embeddings"]:
        raise InputError(
            f"the network in {folder} reads {sizes['max_position_embeddings']} word pieces at most; {name} needs "
            f"{length}, as BERT base has them"
        )
    parts = (reviews.imdb_texts if dataset == "imdb" else sentences.sst2_texts)(data_dir, scale=scale)
    train, val, test = (
        Split(word_pieces(texts, folder, length, sizes["vocab_size"]), torch.from_numpy(labels))
        for texts, labels in parts
    )
    return Data(train, val, test, info={"n_classes": 2, "length": length, "weights": str(folder)})


def _missing(name: str) -> MissingExtraError:
    return MissingExtraError(
        f'{name} needs the package transformers, which is not installed; pip install "trimtab[hf]"'
    )


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


def _model(data: Data, *, name: str) -> nn.Module:
    try:
        transformers: Any = importlib.import_module("transformers")
        config_of, network_of = transformers.BertConfig, transformers.BertForSequenceClassification
    except ImportError as error:
        raise _missing(name) from error
    n_classes = int(data.info["n_classes"])
    if "weights" not in data.info:
        config = config_of(**_RANDOM, vocab_size=int(data.info["vocab_size"]), num_labels=n_classes)
        return BertClassifier(network_of(config))
    folder = Path(str(data.info["weights"]))
    config = config_of(**read_sizes(folder), num_labels=n_classes)
    with torch.device("meta"):
        check_weights(network_of(config), folder)
    network = network_of(config)
    fill(network, folder)
    return BertClassifier(network)
