"""Text tasks: next character (or byte) with a small GPT.

Found through `registry.load("task", ...)`. The first 90 % of a text are train, the next 5 % val, the last 5 %
test, by position, so that no window of one lies in another. nanoGPT has no test part: its val is our val and
test together.

| scale | setting |
|---|---|
| full | the write-up's (FINDINGS 1): 6 layers, 6 heads, width 384, block 256, dropout .2; meant for a GPU |
| small | nanoGPT's CPU setting: 4 layers, 4 heads, width 128, block 64, batch 12, dropout 0, 2,000 steps |
| smoke | 1 layer, width 32, block 32, 60 steps |
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.errors import InputError
from trimtab.tasks.base import Data, Split, Task, pick
from trimtab.tasks.data import Source, find, read_bytes
from trimtab.tasks.models import GPT, GPTConfig

__all__ = ["enwik8_gpt", "shakespeare_gpt", "text8_gpt"]

_SHAKESPEARE = Source(
    "shakespeare_char",
    "Get it with `curl --create-dirs -o DIR/shakespeare_char/input.txt https://raw.githubusercontent.com/karpathy/"
    "char-rnn/master/data/tinyshakespeare/input.txt` and give --data-dir DIR; see docs/data.md",
)
_WIKIPEDIA = (
    "Get it with `curl --create-dirs -o DIR/{0}/{0}.zip http://mattmahoney.net/dc/{0}.zip` and give "
    "--data-dir DIR; see docs/data.md"
)
_ENWIK8 = Source("enwik8", _WIKIPEDIA.format("enwik8"))
_TEXT8 = Source("text8", _WIKIPEDIA.format("text8"))
_TEXT8_ALPHABET = b" abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class _Preset:
    """What a scale decides, for the network and for its training."""

    shape: tuple[int, int, int]  # layers, heads, width
    block_size: int
    dropout: float
    settings: dict[str, Any]


_SMOKE = _Preset(
    (1, 1, 32),
    32,
    0.0,
    {
        "batch_size": 8,
        "total_steps": 60,
        "eval_every": 5,
        "warmup_steps": 5,
        "eval_batches": 4,
        "test_batches": 8,
        "lr": 1e-3,
        "min_lr_factor": 0.1,
    },
)
_SMALL = _Preset(
    (4, 4, 128),
    64,
    0.0,
    {
        "batch_size": 12,
        "total_steps": 2_000,
        "eval_every": 50,
        "warmup_steps": 100,
        "eval_batches": 20,
        "test_batches": 70,
        "lr": 1e-3,
        "min_lr_factor": 0.1,
    },
)
_FULL = _Preset((6, 6, 384), 256, 0.2, {"eval_batches": 200})
_FULL_SHAKESPEARE = {
    "batch_size": 64,
    "total_steps": 5_000,
    "eval_every": 250,
    "warmup_steps": 100,
    "test_batches": 200,
    "lr": 1e-3,
    "min_lr_factor": 0.1,
}
_FULL_WIKIPEDIA = {
    "batch_size": 32,
    "total_steps": 100_000,
    "eval_every": 1_000,
    "warmup_steps": 200,
    "test_batches": 600,
    "lr": 5e-4,
    "min_lr_factor": 0.1,
}


def shakespeare_gpt(scale: str = "small") -> Task:
    """Tiny Shakespeare by characters (65 of them), GPT.

    Args:
        scale: "smoke", "small" (nanoGPT's CPU setting) or "full" (FINDINGS section 1).
    """
    return _task("shakespeare-gpt", "shakespeare_char", scale, _load_shakespeare, _FULL_SHAKESPEARE)


def enwik8_gpt(scale: str = "small") -> Task:
    """The first 100 MB of Wikipedia by bytes, GPT.

    Args:
        scale: "smoke", "small" (nanoGPT's CPU setting) or "full" (FINDINGS section 1).
    """
    return _task("enwik8-gpt", "enwik8", scale, _load_enwik8, _FULL_WIKIPEDIA)


def text8_gpt(scale: str = "small") -> Task:
    """Cleaned Wikipedia by characters (a to z and blank), GPT.

    Args:
        scale: "smoke", "small" (nanoGPT's CPU setting) or "full" (FINDINGS section 1).
    """
    return _task("text8-gpt", "text8", scale, _load_text8, _FULL_WIKIPEDIA)


def _task(
    name: str,
    dataset: str,
    scale: str,
    read: Callable[[Path | None], tuple[Tensor, int]],
    full: dict[str, Any],
) -> Task:
    preset = pick(scale, {"smoke": _SMOKE, "small": _SMALL, "full": _FULL})
    settings = preset.settings | (full if scale == "full" else {})
    return Task(
        name=name,
        dataset=dataset,
        kind="language-modelling",
        load=partial(_load, read=read, dataset=dataset, block_size=preset.block_size),
        make_model=partial(_model, preset=preset),
        optimizer="adamw",
        weight_decay=0.1,
        betas=(0.9, 0.99),
        grad_clip=1.0,
        block_size=preset.block_size,
        **settings,
    )


def _model(data: Data, *, preset: _Preset) -> nn.Module:
    layers, heads, width = preset.shape
    return GPT(GPTConfig(int(data.info["vocab_size"]), preset.block_size, layers, heads, width, preset.dropout))


def _load(
    data_dir: Path | None, *, read: Callable[[Path | None], tuple[Tensor, int]], dataset: str, block_size: int
) -> Data:
    tokens, vocab_size = read(data_dir)
    count = len(tokens)
    bounds = (0, count * 90 // 100, count * 95 // 100, count)
    parts = [tokens[low:high] for low, high in itertools.pairwise(bounds)]
    if min(map(len, parts)) <= block_size:
        raise InputError(
            f"{dataset}: {count} tokens are too few; 5 % of them must be more than the block of {block_size}"
        )
    none = torch.empty(0, dtype=torch.int64)
    train, val, test = (Split(part, none) for part in parts)
    return Data(train, val, test, info={"vocab_size": vocab_size, "n_tokens": count})


def _load_shakespeare(data_dir: Path | None) -> tuple[Tensor, int]:
    """Characters numbered in sorted order, as nanoGPT's prepare.py does."""
    path = find(_SHAKESPEARE, data_dir, "input.txt")[0]
    try:
        text = read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read {path}: {error}; expected text in UTF-8") from error
    codes, tokens = np.unique(np.frombuffer(text.encode("utf-32-le"), dtype="<u4"), return_inverse=True)
    return torch.from_numpy(tokens.astype(np.uint8 if len(codes) <= 256 else np.int64)), len(codes)


def _load_enwik8(data_dir: Path | None) -> tuple[Tensor, int]:
    raw = read_bytes(find(_ENWIK8, data_dir, "enwik8", "enwik8.zip")[0])
    return _bytes_as_tokens(raw), 256  # every byte, seen or not: nothing of val and test decides the vocabulary


def _load_text8(data_dir: Path | None) -> tuple[Tensor, int]:
    path = find(_TEXT8, data_dir, "text8", "text8.zip")[0]
    raw = read_bytes(path).rstrip(b"\n")
    foreign = raw.translate(None, _TEXT8_ALPHABET)
    if foreign:
        raise InputError(f"{path} holds {foreign[:1]!r}; expected a to z and blanks only")
    order = bytes(max(0, _TEXT8_ALPHABET.find(bytes([value]))) for value in range(256))
    return _bytes_as_tokens(raw.translate(order)), len(_TEXT8_ALPHABET)


def _bytes_as_tokens(raw: bytes) -> Tensor:
    # bytearray: torch wants memory that could be written.
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
