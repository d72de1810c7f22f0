"""Text tasks: splits by share, vocabularies, presets."""

import os
import zipfile
from pathlib import Path

import pytest
import torch

from trimtab.errors import InputError, MissingDataError
from trimtab.tasks.models import GPTConfig
from trimtab.tasks.text import enwik8_gpt, shakespeare_gpt, text8_gpt

REAL = os.environ.get("TRIMTAB_DATA")


def write(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return folder


def lengths(data):
    return [len(part.inputs) for part in (data.train, data.val, data.test)]


def test_a_small_enwik8_is_cut_by_share_and_keeps_its_bytes(tmp_path):
    content = bytes(range(256)) * 40 + b"tail"
    data = enwik8_gpt("smoke").load(write(tmp_path, "enwik8/enwik8", content))
    assert lengths(data) == [9219, 512, 513]  # of 10244
    joined = torch.cat([data.train.inputs, data.val.inputs, data.test.inputs])
    assert bytes(joined.tolist()) == content
    assert data.info == {"vocab_size": 256, "n_tokens": 10244}
    assert data.train.inputs.dtype == torch.uint8


def test_an_archive_gives_what_the_plain_file_gives(tmp_path):
    content = b"the cat sat on the mat " * 100
    plain = text8_gpt("smoke").load(write(tmp_path / "a", "text8/text8", content))
    (tmp_path / "b" / "text8").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "b" / "text8" / "text8.zip", "w") as archive:
        archive.writestr("text8", content)
    packed = text8_gpt("smoke").load(tmp_path / "b")
    assert torch.equal(plain.test.inputs, packed.test.inputs)


def test_text8_numbers_blank_and_letters_in_order_and_refuses_others(tmp_path):
    content = b" abcdefghijklmnopqrstuvwxyz" * 30
    data = text8_gpt("smoke").load(write(tmp_path, "text8/text8", content + b"\n"))
    assert data.train.inputs[:27].tolist() == list(range(27))
    assert data.info == {"vocab_size": 27, "n_tokens": 810}
    with pytest.raises(InputError, match="text8 holds b'A'; expected a to z and blanks only"):
        text8_gpt("smoke").load(write(tmp_path, "text8/text8", content + b"A"))


def test_shakespeare_numbers_characters_in_sorted_order(tmp_path):
    text = "baé" * 300
    data = shakespeare_gpt("smoke").load(write(tmp_path, "shakespeare_char/input.txt", text.encode()))
    assert data.train.inputs[:3].tolist() == [1, 0, 2]
    assert data.info == {"vocab_size": 3, "n_tokens": 900}
    many = "".join(map(chr, range(1000, 1300))) * 4
    data = shakespeare_gpt("smoke").load(write(tmp_path, "shakespeare_char/input.txt", many.encode()))
    assert data.train.inputs.dtype == torch.int64
    assert data.train.inputs[299].item() == 299


def test_texts_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(
        InputError, match="enwik8: 600 tokens are too few; 5 % of them must be more than the block of 32"
    ):
        enwik8_gpt("smoke").load(write(tmp_path, "enwik8/enwik8", b"x" * 600))
    with pytest.raises(InputError, match="enwik8: 0 tokens are too few"):
        enwik8_gpt("smoke").load(write(tmp_path, "enwik8/enwik8", b""))
    with pytest.raises(InputError, match=r"input\.txt: .*; expected text in UTF-8"):
        shakespeare_gpt("smoke").load(write(tmp_path, "shakespeare_char/input.txt", b"\xff\xfe" * 900))


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (shakespeare_gpt, "shakespeare_char/input.txt"),
        (enwik8_gpt, "enwik8/enwik8 or enwik8/enwik8.zip"),
        (text8_gpt, "text8/text8 or text8/text8.zip"),
    ],
)
def test_a_missing_text_says_what_was_looked_for(tmp_path, make, wanted):
    with pytest.raises(MissingDataError, match=f"looked for {wanted} in .*Get it with `curl"):
        make().load(tmp_path)
    with pytest.raises(MissingDataError, match=f"which would hold {wanted}. Get it with `curl"):
        make().load(None)


def test_presets_are_the_published_ones(tmp_path):
    small, full, wikipedia = shakespeare_gpt("small"), shakespeare_gpt("full"), enwik8_gpt("full")
    assert (small.batch_size, small.block_size, small.total_steps, small.lr, small.warmup_steps) == (
        12, 64, 2000, 1e-3, 100)  # fmt: skip
    assert small.lr * small.min_lr_factor == pytest.approx(1e-4)
    assert (small.betas, small.weight_decay, small.grad_clip, small.optimizer) == (
        (0.9, 0.99),
        0.1,
        1.0,
        "adamw",
    )
    assert (full.batch_size, full.block_size, full.total_steps, full.eval_every, full.eval_batches) == (
        64, 256, 5000, 250, 200)  # fmt: skip
    assert (wikipedia.batch_size, wikipedia.lr, wikipedia.total_steps, wikipedia.warmup_steps) == (
        32, 5e-4, 100_000, 200)  # fmt: skip
    assert wikipedia.lr * wikipedia.min_lr_factor == pytest.approx(5e-5)
    data = enwik8_gpt("full").load(write(tmp_path, "enwik8/enwik8", b"x" * 6000))
    assert enwik8_gpt("small").make_model(data).config == GPTConfig(256, 64, 4, 4, 128)


@pytest.mark.skipif(REAL is None, reason="TRIMTAB_DATA names no folder with the real sets")
def test_real_shakespeare():
    data = shakespeare_gpt().load(Path(REAL))
    assert lengths(data) == [1003854, 55770, 55770]
    assert data.info == {"vocab_size": 65, "n_tokens": 1115394}
    assert data.train.inputs[:5].tolist() == [18, 47, 56, 57, 58]  # "First", as nanoGPT numbers it
