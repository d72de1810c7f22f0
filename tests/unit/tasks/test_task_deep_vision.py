"""ResNet-18 and VGG-16: sizes in closed form, what surgery may change, and the tasks that train them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_task_vision import write_cifar10, write_mnist
from torch import nn

from trimtab import registry
from trimtab.cost import count_cost
from trimtab.errors import InputError
from trimtab.surgery import Surgeon
from trimtab.tasks.residual import ResNet18
from trimtab.tasks.vgg import vgg16
from trimtab.training.loop import TrainingLoop

REAL = os.environ.get("TRIMTAB_DATA")
NAMES = ["cifar10-resnet18", "cifar10-vgg16", "mnist-resnet18", "mnist-vgg16"]
VGG_FILTERS = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
OUTPUT = "they are an output of the network, whose size is the task's"


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def draw(make) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def resnet_parameters(channels: int, n_classes: int, base: int) -> int:
    """3 x 3 and 1 x 1 weights without bias, two numbers of batch norm a filter, and the dense layer."""
    total, before = 9 * channels * base + 2 * base, base
    for filters in (base, 2 * base, 4 * base, 8 * base):
        total += 9 * before * filters + 3 * 9 * filters**2 + 4 * 2 * filters
        total += before * filters + 2 * filters if filters != before else 0
        before = filters
    return total + (before + 1) * n_classes


def vgg_parameters(channels: int, n_classes: int, divisor: int) -> int:
    """3 x 3 weights, bias, two numbers of batch norm a filter, and the dense layer."""
    total = 0
    for filters in (n // divisor for n in VGG_FILTERS):
        total += 9 * channels * filters + 3 * filters
        channels = filters
    return total + (channels + 1) * n_classes


def test_resnet_has_its_published_size():
    with torch.device("meta"):
        model, gray, narrow = ResNet18(10), ResNet18(10, channels=1), ResNet18(7, width=0.25)
    assert count(model) == 11_173_962 == resnet_parameters(3, 10, 64)
    assert count(gray) == 11_173_962 - 2 * 9 * 64
    assert count(narrow) == resnet_parameters(3, 7, 16)


def test_vgg_has_its_published_size():
    with torch.device("meta"):
        model, gray, narrow = vgg16(10), vgg16(10, channels=1), vgg16(7, width=0.25)
    assert count(model) == 14_728_266 == vgg_parameters(3, 10, 1)
    assert count(gray) == 14_728_266 - 2 * 9 * 64
    assert count(narrow) == vgg_parameters(3, 7, 4)
    kinds = [type(layer).__name__ for layer in model]
    assert [kinds.count(kind) for kind in ("Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d", "Linear")] == [
        13,
        13,
        13,
        5,
        1,
    ]


def test_multiply_adds_are_those_of_the_closed_form():
    # Places behind the stem and the stages: 32 x 32, 32 x 32, 16 x 16, 8 x 8, 4 x 4; at half the width.
    stem, first = 9 * 3 * 32 * 1024, 4 * 9 * 32**2 * 1024
    later = [(9 * f * f // 2 + 3 * 9 * f * f + f * f // 2) * (32 * 32 // f) ** 2 for f in (64, 128, 256)]
    image = torch.zeros(1, 3, 32, 32)
    assert count_cost(ResNet18(10, width=0.5), image).forward_flops == 2 * (stem + first + sum(later) + 256 * 10)
    macs, channels, place = 0, 3, 0
    for side, n in zip((32, 16, 8, 4, 2), (2, 2, 3, 3, 3), strict=True):
        for filters in (f // 4 for f in VGG_FILTERS[place : place + n]):
            macs += 9 * channels * filters * side**2
            channels = filters
        place += n
    assert count_cost(vgg16(10, width=0.25), image).forward_flops == 2 * (macs + 128 * 10)


def test_a_block_adds_its_projected_input_to_what_its_convolutions_make():
    model = draw(lambda: ResNet18(10, width=0.125)).eval()
    block = model.blocks[2]
    assert isinstance(model.blocks[1].shortcut, nn.Identity)
    x = torch.randn(2, 8, 10, 10, generator=torch.Generator().manual_seed(0))
    y = block.norm2(block.conv2(F.relu(block.norm1(block.conv1(x)))))
    projected = block.shortcut[1](F.conv2d(x, block.shortcut[0].weight, stride=2))
    assert y.shape == projected.shape == (2, 16, 5, 5)
    assert torch.equal(block(x), F.relu(y + projected))
    assert torch.equal(model.blocks[1](torch.zeros(1, 8, 4, 4)), torch.zeros(1, 8, 4, 4))


def test_surgery_may_change_every_filter_of_the_resnet():
    model = draw(lambda: ResNet18(10, width=0.125))
    groups = Surgeon(model, torch.zeros(2, 3, 32, 32)).groups
    assert {group.name: group.refusal for group in groups if group.refusal} == {"head": OUTPUT}
    convolutions = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    assert {name for group in groups[:-1] for name in group.producers} == convolutions
    assert [group.producers for group in groups if len(group.producers) > 1] == [
        ("conv", "blocks.0.conv2", "blocks.1.conv2"),
        ("blocks.2.conv2", "blocks.2.shortcut.0", "blocks.3.conv2"),
        ("blocks.4.conv2", "blocks.4.shortcut.0", "blocks.5.conv2"),
        ("blocks.6.conv2", "blocks.6.shortcut.0", "blocks.7.conv2"),
    ]


def test_surgery_may_change_every_filter_of_the_vgg():
    model = draw(lambda: vgg16(10, width=0.125))
    groups = Surgeon(model, torch.zeros(2, 3, 32, 32)).groups
    assert [(group.kind, group.size) for group in groups[:-1]] == [("Conv2d", n // 8) for n in VGG_FILTERS]
    assert [group.refusal for group in groups] == [None] * 13 + [OUTPUT]


@pytest.mark.parametrize("make", [ResNet18, vgg16])
def test_narrowed_networks_are_smaller_and_go_on(make):
    model = draw(lambda: make(10, width=0.25))
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    surgeon = Surgeon(model, images)
    before = surgeon.cost
    for group in surgeon.groups[:-1]:
        surgeon.narrow(group.name, group.size // 2)
    assert surgeon.cost == count_cost(make(10, width=0.125), images)
    assert surgeon.cost.forward_flops < before.forward_flops / 3
    model(images).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("make", [ResNet18, vgg16])
@pytest.mark.parametrize("width", [0, -1.0, 0.001, float("inf"), float("nan")])
def test_a_width_without_a_filter_is_refused(make, width):
    with pytest.raises(
        InputError, match=r"width is .*; expected a factor that leaves at least one of 64 filters: 0.25"
    ):
        make(10, width=width)


@pytest.mark.parametrize("name", NAMES)
def test_scales_are_widths_and_whole_epochs(name):
    smoke, small, full = (registry.load("task", name)(scale) for scale in ("smoke", "small", "full"))
    per_epoch = 45_000 // 64 if full.dataset == "cifar10" else 50_000 // 64
    assert (smoke.batch_size, smoke.total_steps, smoke.eval_every) == (32, 20, 5)
    assert (small.batch_size, small.total_steps, small.eval_every) == (64, 10 * 93, 93)
    assert (full.batch_size, full.total_steps, full.eval_every) == (64, 50 * per_epoch, per_epoch)
    for task in (smoke, small, full):
        assert (task.optimizer, task.lr, task.betas, task.weight_decay) == ("adam", 1e-3, (0.9, 0.999), 0.0)
        assert task.name == name
    assert [task.make_model.keywords["width"] for task in (smoke, small, full)] == [0.125, 0.25, 1.0]


def test_vgg_reads_mnist_in_a_black_border_and_resnet_as_it_is(tmp_path):
    write_mnist(tmp_path / "mnist", 1200, 210)
    framed = registry.load("task", "mnist-vgg16")("smoke").load(tmp_path)
    plain = registry.load("task", "mnist-resnet18")("smoke").load(tmp_path)
    assert (framed.train.inputs.shape, plain.train.inputs.shape) == ((640, 1, 32, 32), (640, 1, 28, 28))
    assert torch.equal(framed.val.inputs[:, :, 2:-2, 2:-2], plain.val.inputs)
    black = (torch.zeros(1) - 0.1307) / 0.3081
    for edge in (framed.test.inputs[:, :, :2], framed.test.inputs[..., -2:]):
        assert torch.equal(edge, black.expand_as(edge))
    assert torch.equal(framed.test.targets, plain.test.targets)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_taken_and_every_weight_moves(name, tmp_path):
    write_cifar10(tmp_path / "cifar10", 800, 200)
    write_mnist(tmp_path / "mnist", 800, 200)
    task = registry.load("task", name)("smoke")
    loop = TrainingLoop(task, task.load(tmp_path), seed=0)
    before = {key: value.clone() for key, value in loop.model.named_parameters()}
    assert loop.step().item() == pytest.approx(2.3, abs=0.5)  # log 10: it knows nothing yet
    # But for biases in front of batch norm, which takes them out again: their gradient is rounding.
    weights = {key: value for key, value in loop.model.named_parameters() if key.endswith("weight")}
    assert [key for key, value in weights.items() if torch.equal(value, before[key])] == []
    assert loop.evaluate("val")["n_samples"] == {"cifar10": 80, "mnist": 133}[task.dataset]


@pytest.mark.parametrize("name", ["cifar10-resnet18", "mnist-vgg16"])
def test_a_restored_run_goes_on_to_the_bit(name, tmp_path):
    write_cifar10(tmp_path / "cifar10", 800, 200)
    write_mnist(tmp_path / "mnist", 800, 200)
    task = registry.load("task", name)("smoke")
    data = task.load(tmp_path)
    first, second = (TrainingLoop(task, data, seed=seed) for seed in (0, 1))
    first.step()
    second.load_state_dict(first.state_dict())
    assert [first.step().item() for _ in range(2)] == [second.step().item() for _ in range(2)]
    assert first.evaluate("val") == second.evaluate("val")  # the running statistics of batch norm too
    states = [dict(loop.model.state_dict()) for loop in (first, second)]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.skipif(REAL is None, reason="TRIMTAB_DATA names no folder with the real sets")
@pytest.mark.parametrize("name", NAMES)
def test_a_step_on_the_real_sets(name):
    task = registry.load("task", name)("smoke")
    data = task.load(Path(REAL))
    assert [len(part.targets) for part in (data.train, data.val, data.test)] == [640, 200, 200]
    loop = TrainingLoop(task, data, seed=0)
    assert loop.step().item() == pytest.approx(2.3, abs=0.5)
