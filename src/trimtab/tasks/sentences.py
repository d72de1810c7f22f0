"""Sentence tasks: SST-2, whether a sentence of a film review is positive.

Found through `registry.load("task", ...)`. The published test set has no labels, so the published validation set is
the test split, and val is cut from the train set with a fixed seed, stratified. The train set holds phrases of the
sentences beside the sentences themselves: a phrase of val may be part of a sentence of train, which makes val easier
than test (whole sentences of other reviews).

| scale | train / val / test | words |
|---|---|---|
| full | 60,615 / 6,734 / 872 | 10,000 |
| small | 6,000 / 600 / 872 | 2,000 |
| smoke | 640 / 200 / 200 | 500 |

A token is a word between blanks. The vocabulary is made from the train split of the scale alone: the most frequent
words, ties in alphabetical order, after 0 (padding) and 1 (any other word). Rows are cut and padded to 32 tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from trimtab.errors import InputError
from trimtab.tasks import hub, models
from trimtab.tasks.base import Data, Split, Task, pick
from trimtab.tasks.data import Rows, Source, find, read_parquet, stratified_cuts

__all__ = ["encode", "make_vocabulary", "sst2_bilstm", "sst2_mlp"]

_SOURCE = Source(
    "sst2",
    'Get it with `hf download nyu-mll/glue --repo-type dataset --include "sst2/*" --local-dir DIR` and give '
    "--data-dir DIR; see docs/data.md",
)
_HELD_SHARE = 10  # one train row in ten is held out for validation
LENGTH = 32  # tokens; of the 872 test sentences 8 % are longer, of the train phrases 2 %
UNKNOWN = 1  # after models.PADDING
_PRESETS = {
    "smoke": ((640, 200, 200), 500),
    "small": ((6_000, 600, 872), 2_000),
    "full": ((60_615, 6_734, 872), 10_000),
}


def sst2_mlp(scale: str = "small") -> Task:
    """SST-2, mean of 32 learned numbers a token, MLP 32-64-2, Adam.

    Args:
        scale: "smoke" (20 steps), "small" (400 steps on 6,000 phrases) or "full" (3 epochs of 60,615).
    """
    return _task(
        "sst2-mlp", scale, _mlp_model, pick(scale, {"smoke": (20, 5), "small": (400, 20), "full": (5682, 200)})
    )


def sst2_bilstm(scale: str = "small") -> Task:
    """SST-2, embeddings of 32, bidirectional LSTM of 32 each way, Adam.

    Args:
        scale: "smoke" (20 steps), "small" (300 steps on 6,000 phrases) or "full" (3 epochs of 60,615).
    """
    return _task(
        "sst2-bilstm", scale, _bilstm_model, pick(scale, {"smoke": (20, 5), "small": (300, 20), "full": (5682, 200)})
    )


def _task(name: str, scale: str, make_model: Callable[[Data], nn.Module], steps: tuple[int, int]) -> Task:
    sizes, n_words = pick(scale, _PRESETS)
    return Task(
        name=name,
        dataset=_SOURCE.dataset,
        kind="classification",
        load=partial(_load, sizes=sizes, n_words=n_words),
        make_model=make_model,
        batch_size=32,
        total_steps=steps[0],
        eval_every=steps[1],
        warmup_steps=steps[0] // 20,
    )


def _mlp_model(data: Data) -> nn.Module:
    return models.MeanEmbedding(int(data.info["vocab_size"]), 32, 64, 2)


def _bilstm_model(data: Data) -> nn.Module:
    return models.BiLSTM(int(data.info["vocab_size"]), 32, 32, 2)


def _load(data_dir: Path | None, *, sizes: tuple[int, int, int], n_words: int) -> Data:
    if data_dir is None:
        paths = hub.fetch(_SOURCE, "nyu-mll/glue", {name: f"sst2/{name}-*.parquet" for name in ("train", "validation")})
    else:
        paths = {
            name: find(_SOURCE, data_dir, f"{name}.parquet", f"{name}-*.parquet") for name in ("train", "validation")
        }
    sentences, labels = _read(paths["train"])
    test_sentences, test_labels = _read(paths["validation"])
    # The cut into train and held-out comes first, so that a smaller scale takes its parts from the same sides.
    held = len(labels) // _HELD_SHARE
    pool, held_out = stratified_cuts(labels, (len(labels) - held, held), "sst2")
    train = pool[stratified_cuts(labels[pool], (sizes[0],), "sst2 train")[0]] if sizes[0] < len(pool) else pool
    val = held_out[stratified_cuts(labels[held_out], (sizes[1],), "sst2 val")[0]] if sizes[1] < held else held_out
    test = stratified_cuts(test_labels, (min(sizes[2], len(test_labels)),), "sst2 test")[0]
    vocabulary = make_vocabulary([sentences[row] for row in train], n_words)
    return Data(
        _split(sentences, labels, train, vocabulary),
        _split(sentences, labels, val, vocabulary),
        _split(test_sentences, test_labels, test, vocabulary),
        info={"n_classes": 2, "vocab_size": len(vocabulary) + 2, "length": LENGTH},
    )


def _read(paths: Sequence[Path]) -> tuple[list[str], npt.NDArray[Any]]:
    table = read_parquet(paths, "sst2", ("sentence", "label"))
    labels = np.asarray(table["label"].to_numpy())
    if len(labels) == 0 or not np.isin(labels, (0, 1)).all():
        raise InputError(
            f"{paths[0]}: it is empty, or a label is neither 0 nor 1; expected SST-2's train and validation sets (its "
            "test set has no labels)"
        )
    sentences: list[str] = table["sentence"].to_pylist()
    return sentences, labels


def _split(sentences: Sequence[str], labels: npt.NDArray[Any], rows: Rows, vocabulary: dict[str, int]) -> Split:
    tokens = encode([sentences[row] for row in rows], vocabulary, LENGTH)
    return Split(tokens, torch.from_numpy(labels[rows].astype(np.int64)))


def make_vocabulary(sentences: Sequence[str], n_words: int) -> dict[str, int]:
    """Number the most frequent words from 2 on; ties go to the alphabet.

    Args:
        sentences: Words between blanks.
        n_words: Words to keep at most.

    >>> make_vocabulary(["b a", "b c a", "b"], 2)
    {'b': 2, 'a': 3}
    """
    counts = Counter(word for sentence in sentences for word in sentence.split())
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return {word: number for number, (word, _) in enumerate(ranked[:n_words], start=UNKNOWN + 1)}


def encode(sentences: Sequence[str], vocabulary: dict[str, int], length: int) -> Tensor:
    """Sentences as rows of tokens, cut and padded to one length; a sentence without a word is one unknown word.

    Args:
        sentences: Words between blanks.
        vocabulary: Word -> number; other words become `UNKNOWN`.
        length: L.

    Returns:
        (B, L) int64.
    """
    rows = np.full((len(sentences), length), models.PADDING, dtype=np.int64)
    for row, sentence in zip(rows, sentences, strict=True):
        tokens = [vocabulary.get(word, UNKNOWN) for word in sentence.split()[:length]] or [UNKNOWN]
        row[: len(tokens)] = tokens
    return torch.from_numpy(rows)
