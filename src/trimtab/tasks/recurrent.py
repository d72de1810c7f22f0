"""LSTM classifiers of the learning-rate study: IMDb and SST-2, Adam, learning rate 0.001, no weight decay.

Found through `registry.load("task", ...)`. The network is `models.PackedLSTM`: embedding, one LSTM that reads each
text to its end and no further, dense layer on the last state (`imdb-bilstm`: on those of both directions). Words,
lengths and splits are those of `trimtab.tasks.reviews` and `trimtab.tasks.sentences`.

| scale | embedding and units | IMDb, train / val / test | SST-2, train / val / test | batch | epochs |
|---|---|---|---|---|---|
| full | 128 | 22,414 / 2,490 / 25,000 | 60,615 / 6,734 / 872 | 64 | 50 |
| small | 64 | 6,000 / 400 / 1,000 | 6,000 / 600 / 872 | 64 | 10 |
| smoke | 32 | 640 / 200 / 200 | 640 / 200 / 200 | 32 | 1 |
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn

from trimtab.tasks import models, reviews, sentences
from trimtab.tasks.base import Data, Task, pick

__all__ = ["imdb_bilstm", "imdb_lstm", "sst2_lstm"]

_UNITS = {"smoke": 32, "small": 64, "full": 128}
_BATCH_AND_EPOCHS = {"smoke": (32, 1), "small": (64, 10), "full": (64, 50)}
_IMDB_TRAIN = {"smoke": 640, "small": 6_000, "full": 22_414}
_SST2_TRAIN = {"smoke": 640, "small": 6_000, "full": 60_615}


def imdb_lstm(scale: str = "small") -> Task:
    """IMDb, LSTM in one direction.

    Args:
        scale: "smoke" (20 steps), "small" (930 steps on 6,000 reviews of 64 tokens) or "full" (17,500 steps on 22,414
            reviews of 200 tokens).
    """
    return _imdb_task("imdb-lstm", scale, is_bidirectional=False)


def imdb_bilstm(scale: str = "small") -> Task:
    """IMDb, bidirectional LSTM.

    Args:
        scale: "smoke" (20 steps), "small" (930 steps on 6,000 reviews of 64 tokens) or "full" (17,500 steps on 22,414
            reviews of 200 tokens).
    """
    return _imdb_task("imdb-bilstm", scale, is_bidirectional=True)


def sst2_lstm(scale: str = "small") -> Task:
    """SST-2, LSTM in one direction.

    Args:
        scale: "smoke" (20 steps), "small" (930 steps on 6,000 phrases) or "full" (47,350 steps on 60,615).
    """
    load = partial(sentences.load_sst2, scale=scale)
    return _task("sst2-lstm", "sst2", scale, load, pick(scale, _SST2_TRAIN), is_bidirectional=False)


def _imdb_task(name: str, scale: str, *, is_bidirectional: bool) -> Task:
    load = partial(reviews.load_imdb, scale=scale)
    return _task(name, "imdb", scale, load, pick(scale, _IMDB_TRAIN), is_bidirectional=is_bidirectional)


def _task(
    name: str, dataset: str, scale: str, load: Callable[[Path | None], Data], n_train: int, *, is_bidirectional: bool
) -> Task:
    """Whole epochs, a validation after each (at "smoke" after a quarter of one); warm-up over a twentieth."""
    batch_size, epochs = pick(scale, _BATCH_AND_EPOCHS)
    steps = epochs * (n_train // batch_size)
    return Task(
        name=name,
        dataset=dataset,
        kind="classification",
        load=load,
        make_model=partial(_model, units=pick(scale, _UNITS), is_bidirectional=is_bidirectional),
        batch_size=batch_size,
        total_steps=steps,
        eval_every=steps // max(epochs, 4),
        warmup_steps=steps // 20,
    )


def _model(data: Data, *, units: int, is_bidirectional: bool) -> nn.Module:
    n_classes, vocab_size = int(data.info["n_classes"]), int(data.info["vocab_size"])
    return models.PackedLSTM(vocab_size, units, units, n_classes, is_bidirectional=is_bidirectional)
