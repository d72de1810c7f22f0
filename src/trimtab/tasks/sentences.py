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
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from trimtab.errors import InputError
from trimtab.tasks import hub, models
from trimtab.tasks.base import Data, Split, Task, pick
from trimtab.tasks.data import Rows, Source, find, read_parquet, stratified_cuts, train_and_held_out

__all__ = [
    "encode",
    "load_sst2",
    "make_split",
    "make_vocabulary",
    "read_texts",
    "sst2_bilstm",
    "sst2_mlp",
    "sst2_texts",
]

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
    return Task(
        name=name,
        dataset=_SOURCE.dataset,
        kind="classification",
        load=partial(load_sst2, scale=scale),
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


def load_sst2(data_dir: Path | None, *, scale: str) -> Data:
    """Read SST-2: inputs (B, `LENGTH`), tokens.

    Args:
        data_dir: Folder with the folder `sst2`; None for the hub.
        scale: "smoke", "small" or "full".

    Raises:
        MissingDataError: It is not there.
        InputError: A file is broken, or not what it should be.
        UnknownNameError: There is no such scale.
    """
    _, n_words = pick(scale, _PRESETS)
    train, val, test = sst2_texts(data_dir, scale=scale)
    vocabulary = make_vocabulary(train[0], n_words)
    splits = [
        make_split(texts, labels, np.arange(len(labels)), vocabulary, LENGTH) for texts, labels in (train, val, test)
    ]
    info = {"n_classes": 2, "vocab_size": len(vocabulary) + 2, "length": LENGTH}
    return Data(splits[0], splits[1], splits[2], info=info)


def sst2_texts(data_dir: Path | None, *, scale: str) -> list[tuple[list[str], npt.NDArray[np.int64]]]:
    """Sentences of train, val and test, and their labels, (B,).

    Args:
        data_dir: As for `load_sst2`.
        scale: As for `load_sst2`.

    Raises:
        MissingDataError: It is not there.
        InputError: A file is broken, or not what it should be.
        UnknownNameError: There is no such scale.
    """
    sizes, _ = pick(scale, _PRESETS)
    if data_dir is None:
        paths = hub.fetch(_SOURCE, "nyu-mll/glue", {name: f"sst2/{name}-*.parquet" for name in ("train", "validation")})
    else:
        paths = {
            name: find(_SOURCE, data_dir, f"{name}.parquet", f"{name}-*.parquet") for name in ("train", "validation")
        }
    expected = "SST-2's train and validation sets (its test set has no labels)"
    (sentences, labels), (test_sentences, test_labels) = (
        read_texts(paths[name], "sst2", "sentence", expected) for name in ("train", "validation")
    )
    train, val = train_and_held_out(labels, _HELD_SHARE, sizes[:2], "sst2")
    test = stratified_cuts(test_labels, (min(sizes[2], len(test_labels)),), "sst2 test")[0]
    parts = [([sentences[row] for row in rows], labels[rows]) for rows in (train, val)]
    return [*parts, ([test_sentences[row] for row in test], test_labels[test])]


def read_texts(
    paths: Sequence[Path], dataset: str, column: str, expected: str
) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Read texts and their labels from Parquet files.

    Args:
        paths: Of one set, in order.
        dataset: Name for messages.
        column: Of the texts; that of the labels is "label".
        expected: What the files should be, for messages.

    Returns:
        B texts, and their labels, (B,), each 0 or 1.

    Raises:
        InputError: A file is broken, lacks a column, holds no row, no text in a row, or another label.
    """
    table = read_parquet(paths, dataset, (column, "label"))
    labels = np.asarray(table["label"].to_numpy())
    if len(labels) == 0 or not np.isin(labels, (0, 1)).all():
        raise InputError(f"{paths[0]}: it is empty, or a label is neither 0 nor 1; expected {expected}")
    texts: list[str] = table[column].to_pylist()
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{paths[0]}: the column {column} holds something that is no text; expected {expected}")
    return texts, labels.astype(np.int64)


def make_split(
    sentences: Sequence[str] | Mapping[int, str],
    labels: npt.NDArray[np.int64],
    rows: Rows,
    vocabulary: dict[str, int],
    length: int,
) -> Split:
    """A split of some rows of a set.

    Args:
        sentences: By row, words between blanks; those of other rows are not looked at.
        labels: Of the whole set.
        rows: Those of the split, B of them.
        vocabulary: Word -> number.
        length: L; longer sentences are cut.

    Returns:
        Inputs (B, L) and targets (B,), both int64.
    """
    return Split(encode([sentences[int(row)] for row in rows], vocabulary, length), torch.from_numpy(labels[rows]))


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
