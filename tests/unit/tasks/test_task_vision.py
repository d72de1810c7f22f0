"""Digits, MNIST and CIFAR-10: splits, shapes, and what is refused."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from trimtab.errors import InputError, MissingDataError
from trimtab.tasks import hub
from trimtab.tasks.vision import cifar10_cnn, digits_cnn, digits_mlp, mnist_cnn, mnist_mlp

REAL = os.environ.get("TRIMTAB_DATA")


def write_mnist(folder: Path, n_train: int, n_test: int, size: int = 28) -> None:
    """Images whose top left pixel is their label, in the hub's layout."""
    arrow = pytest.importorskip("pyarrow", reason="the extra [data] is not installed")
    image = pytest.importorskip("PIL.Image", reason="the extra [data] is not installed")
    import pyarrow.parquet as parquet

    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", n_train), ("test", n_test)):
        cells, labels = [], [row % 10 for row in range(count)]
        for label in labels:
            pixels = np.zeros((size, size), np.uint8)
            pixels[0, 0] = label
            buffer = io.BytesIO()
            image.fromarray(pixels).save(buffer, "PNG")
            cells.append({"bytes": buffer.getvalue(), "path": None})
        parquet.write_table(arrow.table({"image": cells, "label": labels}), folder / f"{name}-00000-of-00001.parquet")


def write_cifar10(folder: Path, n_train: int = 1200, n_test: int = 210) -> None:
    """Images whose top left pixel is (label, 2 label, 255), as the hub's repository has them."""
    arrow = pytest.importorskip("pyarrow", reason="the extra [data] is not installed")
    image = pytest.importorskip("PIL.Image", reason="the extra [data] is not installed")
    import pyarrow.parquet as parquet

    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", n_train), ("test", n_test)):
        cells, labels = [], [row % 10 for row in range(count)]
        for label in labels:
            pixels = np.zeros((32, 32, 3), np.uint8)
            pixels[0, 0] = (label, 2 * label, 255)
            buffer = io.BytesIO()
            image.fromarray(pixels).save(buffer, "PNG")
            cells.append({"bytes": buffer.getvalue(), "path": None})
        parquet.write_table(arrow.table({"img": cells, "label": labels}), folder / f"{name}-00000-of-00001.parquet")


@pytest.mark.parametrize(("make", "shape"), [(digits_mlp, (64,)), (digits_cnn, (1, 8, 8))])
def test_digits_need_no_data_directory_and_are_cut_in_proportion(make, shape):
    data = make().load(None)
    parts = [data.train, data.val, data.test]
    assert [tuple(part.inputs.shape) for part in parts] == [(1077, *shape), (360, *shape), (360, *shape)]
    counts = torch.stack([part.targets.bincount(minlength=10) for part in parts])
    assert counts.sum(0).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (counts[1] - counts[2]).abs().max() <= 1
    assert (data.train.inputs.min().item(), data.train.inputs.max().item()) == (0.0, 1.0)
    assert make().make_model(data)(data.val.inputs).shape == (360, 10)


def test_digits_are_the_same_for_both_networks_and_at_every_call():
    flat, image, again = (
        digits_mlp().load(None),
        digits_cnn("full").load(None),
        digits_mlp().load(Path("ignored")),
    )
    assert torch.equal(flat.test.inputs, image.test.inputs.flatten(1))
    assert torch.equal(flat.test.inputs, again.test.inputs)


def test_mnist_is_read_from_a_folder_and_cut_by_label(tmp_path):
    write_mnist(tmp_path / "mnist", 1200, 210)
    data = mnist_cnn("smoke").load(tmp_path)
    assert [len(part.targets) for part in (data.train, data.val, data.test)] == [640, 200, 200]
    assert data.val.targets.bincount().tolist() == [20] * 10
    pixel = (data.train.inputs[:, 0, 0, 0] * 0.3081 + 0.1307) * 255
    assert torch.equal(pixel.round().long(), data.train.targets)  # every image kept its own label
    assert data.train.inputs.shape == (640, 1, 28, 28)
    assert mnist_cnn("smoke").make_model(data)(data.val.inputs[:3]).shape == (3, 10)


def test_the_mlp_reads_the_same_mnist(tmp_path):
    write_mnist(tmp_path / "mnist", 1200, 210)
    images, flat = mnist_cnn("smoke").load(tmp_path), mnist_mlp("smoke").load(tmp_path)
    assert torch.equal(images.train.inputs, flat.train.inputs)
    model = mnist_mlp("smoke").make_model(flat)
    assert sum(parameter.numel() for parameter in model.parameters()) == 784 * 128 + 128 + 128 * 10 + 10
    assert model(flat.val.inputs[:3]).shape == (3, 10)


@pytest.mark.parametrize("folder", ["cifar10", "cifar10/plain_text"])
def test_cifar10_is_read_in_colour_and_cut_by_label(tmp_path, folder):
    write_cifar10(tmp_path / folder)
    data = cifar10_cnn("smoke").load(tmp_path)
    # One train image in ten is held out: of 1,200 fewer than the 200 that are asked for.
    assert [len(part.targets) for part in (data.train, data.val, data.test)] == [640, 120, 200]
    assert data.val.targets.bincount().tolist() == [12] * 10
    assert data.train.inputs.shape == (640, 3, 32, 32)
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    pixel = ((data.train.inputs[:, :, 0, 0] * std + mean) * 255).round().long()
    labels = data.train.targets
    assert torch.equal(pixel, torch.stack((labels, 2 * labels, torch.full_like(labels, 255)), dim=1))
    model = cifar10_cnn("smoke").make_model(data)
    assert sum(parameter.numel() for parameter in model.parameters()) == 896 + 18_496 + 262_208 + 650
    assert model(data.val.inputs[:3]).shape == (3, 10)


def test_cifar10_is_not_found_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(MissingDataError, match=r"looked for cifar10/train.parquet or .* or cifar10/plain_text/train-"):
        cifar10_cnn().load(tmp_path)


def test_mnist_of_another_image_size_is_refused(tmp_path):
    write_mnist(tmp_path / "mnist", 1200, 210, size=27)
    with pytest.raises(InputError, match="mnist: row 0 is no image of 28 x 28"):
        mnist_cnn("smoke").load(tmp_path)


def test_a_torn_parquet_file_is_one_error(tmp_path):
    write_mnist(tmp_path / "mnist", 1200, 210)
    path = tmp_path / "mnist" / "train-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"cannot read .*train-00000-of-00001.parquet: .*; expected a Parquet file"):
        mnist_cnn("smoke").load(tmp_path)


def test_a_missing_column_is_named(tmp_path):
    write_mnist(tmp_path / "mnist", 1200, 210)
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"img": [1]}), tmp_path / "mnist" / "train.parquet")
    with pytest.raises(InputError, match="has no column image, label; expected: image, label"):
        mnist_cnn("smoke").load(tmp_path)


def test_with_a_data_directory_the_hub_is_not_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_CHILD", "raise SystemExit('asked')")
    with pytest.raises(MissingDataError, match=r"looked for mnist/train.parquet or mnist/train-\*.parquet or"):
        mnist_cnn().load(tmp_path)


@pytest.mark.skipif(REAL is None, reason="TRIMTAB_DATA names no folder with the real sets")
def test_real_mnist_at_small_scale():
    data = mnist_cnn("small").load(Path(REAL))
    assert [len(part.targets) for part in (data.train, data.val, data.test)] == [6000, 500, 2000]
    assert abs(data.train.inputs.mean().item()) < 0.02
    assert abs(data.train.inputs.std().item() - 1) < 0.02


@pytest.mark.skipif(REAL is None, reason="TRIMTAB_DATA names no folder with the real sets")
def test_real_cifar10_at_small_scale():
    data = cifar10_cnn("small").load(Path(REAL))
    assert [len(part.targets) for part in (data.train, data.val, data.test)] == [6000, 400, 1000]
    assert data.train.inputs.mean((0, 2, 3)).abs().max() < 0.03
    assert (data.train.inputs.std((0, 2, 3)) - 1).abs().max() < 0.03


@pytest.mark.slow
@pytest.mark.skipif(REAL is None, reason="TRIMTAB_DATA names no folder with the real sets")
def test_real_mnist_at_full_scale():
    data = mnist_cnn("full").load(Path(REAL))
    assert [len(part.targets) for part in (data.train, data.val, data.test)] == [50_000, 10_000, 10_000]
    assert data.test.targets.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    small = mnist_cnn("small").load(Path(REAL))
    assert {row.tobytes() for row in small.train.inputs.numpy()}.isdisjoint(
        {row.tobytes() for row in data.val.inputs.numpy()}
    )
