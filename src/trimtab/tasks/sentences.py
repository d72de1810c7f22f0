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

A token is a word between blanks, numbered by a word-level model of the package tokenizers (the extra `[data]`). The
vocabulary is made from the train split of the scale alone: the most frequent words, ties in alphabetical order, after 0
(padding) and 1 (any other word). Rows are cut and padded to 32 tokens.
"""

from __future__ import annotations

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
from trimtab.tasks.data import Source, extra, find, read_parquet, stratified_cuts, train_and_held_out

__all__ = [
    "as_data",
    "encode",
    "load_sst2",
    "make_tokenizer",
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
_PADDING, _UNKNOWN = "  ", " "  # no word has a blank
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
    return as_data(sst2_texts(data_dir, scale=scale), n_words, LENGTH)


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


def as_data(parts: Sequence[tuple[list[str], npt.NDArray[np.int64]]], n_words: int, length: int) -> Data:
    """Train, val and test as tokens (B, L), of the words of train alone.

    Args:
        parts: Texts of the three, words between blanks, and their labels, (B,), each 0 or 1.
        n_words: Words to keep at most.
        length: L; longer texts are cut.
    """
    tokenizer = make_tokenizer(parts[0][0], n_words)
    train, val, test = (Split(encode(texts, tokenizer, length), torch.from_numpy(labels)) for texts, labels in parts)
    return Data(train, val, test, info={"n_classes": 2, "vocab_size": tokenizer.get_vocab_size(), "length": length})


def make_tokenizer(sentences: Sequence[str], n_words: int) -> Any:
    """A `tokenizers.Tokenizer` that numbers the most frequent words from 2 on; ties go to the alphabet.

    Args:
        sentences: Words between blanks.
        n_words: Words to keep at most.

    Raises:
        MissingExtraError: tokenizers is not installed.
    """
    tokenizers = extra("tokenizers", "text")
    blanks = tokenizers.pre_tokenizers.WhitespaceSplit()
    counted = tokenizers.Tokenizer(tokenizers.models.WordLevel())
    counted.pre_tokenizer = blanks
    counted.train_from_iterator(
        sentences, tokenizers.trainers.WordLevelTrainer(vocab_size=n_words, special_tokens=[], show_progress=False)
    )
    # Not as special tokens of the trainer, which would be found in the texts too.
    vocabulary = {_PADDING: models.PADDING, _UNKNOWN: UNKNOWN}
    vocabulary |= {word: number + len(vocabulary) for word, number in counted.get_vocab().items()}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = blanks
    return tokenizer


def encode(sentences: Sequence[str], tokenizer: Any, length: int) -> Tensor:
    """Sentences as rows of tokens, cut and padded to one length; a sentence without a word is one unknown word.

    Args:
        sentences: Words between blanks.
        tokenizer: What `make_tokenizer` gave.
        length: L.

    Returns:
        (B, L) int64.
    """
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(pad_id=models.PADDING, pad_token=_PADDING, length=length)
    rows = np.array([row.ids for row in tokenizer.encode_batch_fast(sentences)], np.int64).reshape(-1, length)
    rows[rows[:, 0] == models.PADDING, 0] = UNKNOWN
    return torch.from_numpy(rows)
