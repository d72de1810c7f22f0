"""A pre-trained BERT as files: its sizes, its weights and its word pieces, read without running anything in them.

Called by `trimtab.tasks.bert`. transformers' own `from_pretrained` is not used: it takes more from a folder than
numbers (attention kernels that config.json names are fetched from the hub and run, an adapter beside the weights may be
pickled), it draws at random what the file lacks, and it writes reports and progress to the terminal. Here config.json
gives known sizes alone, `model.safetensors` must hold every weight in its shape, and no other file is opened.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trimtab.errors import InputError, MissingExtraError
from trimtab.tasks import hub
from trimtab.tasks.data import Source, extra, find
from trimtab.tasks.models import PADDING

__all__ = ["check_weights", "fill", "find_folder", "read_sizes", "word_pieces"]

_SOURCE = Source(
    "bert-base-uncased",
    "Get it with `hf download google-bert/bert-base-uncased config.json model.safetensors tokenizer.json --local-dir "
    "DIR/bert-base-uncased` and give --data-dir DIR, or take --scale small, whose network is drawn at random; see "
    "docs/data.md",
)
_REPO_ID = "google-bert/bert-base-uncased"
_CONFIG, _WEIGHTS, _PIECES = _FILES = ("config.json", "model.safetensors", "tokenizer.json")
# What is taken from config.json, with BERT base's values, and what it may not say otherwise.
_SIZES = {
    "vocab_size": 30_522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3_072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
}
_FIXED = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "layer_norm_eps": 1e-12,
    "pad_token_id": PADDING,
    "position_embedding_type": "absolute",
    "is_decoder": False,
}
_BODY = "bert."  # what the names of its weights begin with; others are of the heads that it was pre-trained with
_OLD_NAMES = {".gamma": ".weight", ".beta": ".bias"}  # of layer norms, in files made from TensorFlow's
_NO_WEIGHTS = ".position_ids"  # 0, 1, 2 ..., which old files hold too
_FLOATS = ("F16", "BF16", "F32", "F64")  # as safetensors calls them


def find_folder(data_dir: Path | None) -> Path:
    """The folder of the pre-trained network: under the data directory, else from the hub.

    Raises:
        MissingDataError: It is not there; says how to get it.
    """
    if data_dir is None:
        found = hub.fetch(_SOURCE, _REPO_ID, {name: name for name in _FILES}, kind="model")
        return found[_CONFIG][0].parent
    for name in _FILES:
        find(_SOURCE, data_dir, name)
    return data_dir / _SOURCE.dataset


def read_sizes(folder: Path) -> dict[str, int]:
    """The sizes that config.json names, as `transformers.BertConfig` calls them; those it leaves out are BERT base's.

    Raises:
        InputError: It cannot be read, is not of a BERT, or a size is no whole number of at least 1.
    """
    path = folder / _CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}; expected the configuration of {_REPO_ID}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} holds no configuration; expected that of {_REPO_ID}")
    for name, value in _FIXED.items():
        if config.get(name, value) != value:
            raise InputError(f"{path}: {name} is {config[name]!r}; expected {value!r}, as in {_REPO_ID}")
    sizes = {name: config.get(name, value) for name, value in _SIZES.items()}
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InputError(f"{path}: {name} is {size!r}; expected a whole number of at least 1")
    if sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise InputError(
            f"{path}: hidden_size is {sizes['hidden_size']}; expected a multiple of num_attention_heads, "
            f"{sizes['num_attention_heads']}"
        )
    return sizes


def word_pieces(texts: Sequence[str], folder: Path, length: int, vocab_size: int) -> Tensor:
    """Word pieces (B, length) of the network's own tokenizer, cut and padded.

    Args:
        texts: B of them.
        folder: Of the network.
        length: Pieces of a text at most, [CLS] and [SEP] among them.
        vocab_size: Pieces that the network knows.

    Raises:
        InputError: The file cannot be read, or is of another network.
    """
    path = folder / _PIECES
    try:
        tokenizer: Any = extra("tokenizers", _SOURCE.dataset).Tokenizer.from_file(str(path))
    except Exception as error:
        if isinstance(error, MissingExtraError):
            raise
        raise InputError(f"cannot read {path}: {error}; expected the tokenizer of {_REPO_ID}") from error
    highest = max(tokenizer.get_vocab().values(), default=0)
    if tokenizer.token_to_id("[PAD]") != PADDING or highest >= vocab_size:
        raise InputError(
            f"{path} does not fit the network, which knows {vocab_size} pieces and pads with {PADDING}: its pieces go "
            f"up to {highest}, and [PAD] is {tokenizer.token_to_id('[PAD]')}; expected the tokenizer of {_REPO_ID}"
        )
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(pad_id=PADDING, length=length)
    rows = [row.ids for row in tokenizer.encode_batch_fast([text.replace("<br />", " ") for text in texts])]
    return torch.tensor(rows, dtype=torch.int64)


def check_weights(network: nn.Module, folder: Path) -> None:
    """Check that the file has all weights of a network but those of its head, in their shapes, and none besides.

    Args:
        network: A `BertForSequenceClassification` of the sizes that `read_sizes` gave, on whatever device.
        folder: Of the files.

    Raises:
        InputError: The file is broken, or a weight is missing, too many, of another shape, or no floating point.
    """
    expected = {name: tuple(weight.shape) for name, weight in _body(network).items()}
    with _opened(folder) as (path, file, names):
        slices = {new: file.get_slice(name) for new, name in names.items()}
        shapes = {new: tuple(part.get_shape()) for new, part in slices.items()}
        for name in sorted(shapes.keys() | expected.keys()):
            if shapes.get(name) != expected.get(name):
                raise InputError(
                    f"{path} is of another network than {_CONFIG} beside it: {name} has shape "
                    f"{shapes.get(name, 'none')}; expected {expected.get(name, 'no such weight')}"
                )
            if slices[name].get_dtype() not in _FLOATS:
                raise InputError(
                    f"{path}: {name} is of type {slices[name].get_dtype()}; expected one of {', '.join(_FLOATS)}"
                )


def fill(network: nn.Module, folder: Path) -> None:
    """Write the pre-trained weights into a network, all but those of its head, which stay as they were drawn.

    Args:
        network: What `check_weights` found right.
        folder: Of the files.

    Raises:
        InputError: The file is broken.
    """
    with _opened(folder) as (_, file, names), torch.no_grad():
        for name, weight in _body(network).items():
            weight.copy_(file.get_tensor(names[name]))


def _body(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in network.named_parameters() if name.startswith(_BODY)}


@contextmanager
def _opened(folder: Path) -> Iterator[tuple[Path, Any, dict[str, str]]]:
    """The file of the weights, and for each name of today that which it has there."""
    path = folder / _WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            there = [name for name in file.keys() if name.startswith(_BODY)]  # noqa: SIM118 (it is no dict)
            yield path, file, {_new_name(name): name for name in there if not name.endswith(_NO_WEIGHTS)}
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {path}: {error}; expected the weights of {_REPO_ID}") from error


def _new_name(name: str) -> str:
    for old, new in _OLD_NAMES.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name
