"""What is exported to ONNX computes what PyTorch computes, or is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import surgery_networks as networks
from trimtab.errors import InputError, MissingExtraError, OutputError, RunFailedError
from trimtab.pruning import onnx
from trimtab.pruning.onnx import export_onnx
from trimtab.surgery import Surgeon

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason='needs pip install "trimtab[prune]"')


def run(path: Path, *inputs: Tensor) -> list[np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})


@pytest.mark.parametrize("name", ["cnn", *(pytest.param(x, marks=pytest.mark.slow) for x in ("residual", "lstm"))])
def test_a_pruned_network_is_exported_and_compared(name: str, tmp_path: Path) -> None:
    model, inputs = networks.make(name, torch.float32)
    surgeon = Surgeon(model, inputs)
    for group in surgeon.groups:
        if group.refusal is None and group.size > 1:
            surgeon.narrow(group.name, group.size // 2)
    path = tmp_path / "new" / "net.onnx"
    model.train()
    difference = export_onnx(model, inputs, path)
    assert model.training
    with torch.no_grad():
        expected = model.eval()(inputs).numpy()
    (found,) = run(path, inputs)
    assert float(np.abs(found - expected).max()) == pytest.approx(difference, rel=1e-6, abs=0)
    assert difference is not None
    assert difference <= 1e-6 * np.abs(expected).max()
    assert [entry.name for entry in path.parent.iterdir()] == ["net.onnx"]


class Two(nn.Module):
    """Several inputs, one of them not read, and several outputs, one of them whole numbers."""

    def forward(self, x: Tensor, unused: Tensor, y: Tensor) -> dict[str, Any]:
        return {"sum": x + y, "most": (x * y).argmax(1)}


def test_several_inputs_and_outputs(tmp_path: Path) -> None:
    x, y = torch.rand(3, 4), torch.rand(3, 4)
    assert export_onnx(Two(), (x, torch.zeros(1), y), tmp_path / "net.onnx") == 0.0
    found = run(tmp_path / "net.onnx", x, torch.zeros(1), y)
    assert np.array_equal(found[0], (x + y).numpy())
    assert np.array_equal(found[1], (x * y).argmax(1).numpy())


def test_without_check_nothing_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    model, inputs = networks.make("mlp", torch.float32)
    text = r'ONNX needs the package onnxruntime, .* pip install "trimtab\[prune\]"; or give check=False'
    with pytest.raises(MissingExtraError, match=text):
        export_onnx(model, inputs, tmp_path / "net.onnx")
    assert export_onnx(model, inputs, tmp_path / "net.onnx", check=False) is None
    monkeypatch.undo()
    with torch.no_grad():
        assert np.allclose(run(tmp_path / "net.onnx", inputs)[0], model(inputs).numpy(), atol=1e-6)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r'package onnxscript, .*; pip install "trimtab\[prune\]"$'):
        export_onnx(nn.Linear(2, 2), torch.ones(1, 2), tmp_path / "net.onnx", check=False)


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_what_cannot_be_exported_is_one_error_and_leaves_nothing(tmp_path: Path) -> None:
    linear, ones = nn.Linear(2, 2), torch.ones(1, 2)
    tries: list[tuple[Any, Any, str]] = [
        (3, ones, "cannot export an instance of int; give an nn.Module"),
        (linear, "x", "example_inputs is str; give a tensor, or a tuple"),
        (linear, torch.ones(1, 3), "the network fails on the example inputs: .*; give a batch as it is used with"),
        (linear, ones * float("nan"), "numbers that are not finite on the example inputs, with which nothing can be"),
        (Branches(), ones, "Branches cannot be exported to ONNX: .*; its forward has to be what torch.export takes"),
    ]
    for model, inputs, text in tries:
        with pytest.raises(InputError, match=text) as caught:
            export_onnx(model, inputs, tmp_path / "new" / "net.onnx")
        assert "\x1b" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_difference_above_the_tolerance_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = onnx._outputs
    monkeypatch.setattr(onnx, "_outputs", lambda *given: [output * (1 + 1e-3) for output in outputs(*given)])
    (tmp_path / "net.onnx").write_text("the one before")
    with pytest.raises(RunFailedError, match=r"onnxruntime differs from PyTorch by .*, where the largest output is .*"):
        export_onnx(nn.Linear(2, 2), torch.ones(1, 2), tmp_path / "net.onnx")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("net.onnx", "the one before")]


def test_the_tolerance_is_half_of_the_digits() -> None:
    expected = np.array([2.0, 1e-3], dtype=np.float32)
    allowed = 2.0 * np.sqrt(np.finfo(np.float32).eps)
    assert onnx._difference(expected + np.float32(0.9 * allowed), expected) == pytest.approx(0.9 * allowed, rel=1e-3)
    for found in (expected + np.float32(1.1 * allowed), expected * np.float32("nan")):
        with pytest.raises(RunFailedError, match="differs from PyTorch by"):
            onnx._difference(found, expected)
    with pytest.raises(RunFailedError, match=r"differs from PyTorch by 1, .* and 0 is allowed"):
        onnx._difference(np.array([4]), np.array([3]))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        export_onnx(nn.Linear(2, 2), torch.ones(1, 2), tmp_path / "file" / "net.onnx")
