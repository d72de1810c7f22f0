"""Image tasks of deep networks: ResNet-18 and VGG-16 on CIFAR-10 and MNIST, Adam, learning rate 0.001.

Found through `registry.load("task", ...)`.

| scale | width | CIFAR-10, train / val / test | MNIST, train / val / test | batch | epochs |
|---|---|---|---|---|---|
| full | 1 | 45,000 / 5,000 / 10,000 | 50,000 / 10,000 / 10,000 | 64 | 50 |
| small | 1/4 | 6,000 / 1,000 / 2,000 | 6,000 / 1,000 / 2,000 | 64 | 10 |
| smoke | 1/8 | 640 / 200 / 200 | 640 / 200 / 200 | 32 | 1 |

ResNet-18 reads MNIST's images as they are, 28 x 28. VGG-16 halves its images five times, so it gets them with two black
pixels around: 32 x 32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn

from trimtab.tasks import vision
from trimtab.tasks.base import Data, Task, pick
from trimtab.tasks.residual import ResNet18
from trimtab.tasks.vgg import SIDE, vgg16

__all__ = ["cifar10_resnet18", "cifar10_vgg16", "mnist_resnet18", "mnist_vgg16"]

_WIDTHS = {"smoke": 1 / 8, "small": 1 / 4, "full": 1.0}
_CIFAR10_SIZES = {"smoke": (640, 200, 200), "small": (6_000, 1_000, 2_000), "full": (45_000, 5_000, 10_000)}
_MNIST_SIZES = {"smoke": (640, 200, 200), "small": (6_000, 1_000, 2_000), "full": (50_000, 10_000, 10_000)}
_BATCH_AND_EPOCHS = {"smoke": (32, 1), "small": (64, 10), "full": (64, 50)}
_MNIST_SIDE = 28


def cifar10_resnet18(scale: str = "small") -> Task:
    """CIFAR-10, ResNet-18.

    Args:
        scale: "smoke" (20 steps, an eighth of the width), "small" (930 steps, a quarter) or "full" (35,150 steps).
    """
    return _cifar10_task("cifar10-resnet18", scale, _resnet18)


def cifar10_vgg16(scale: str = "small") -> Task:
    """CIFAR-10, VGG-16 with batch norm.

    Args:
        scale: "smoke" (20 steps, an eighth of the width), "small" (930 steps, a quarter) or "full" (35,150 steps).
    """
    return _cifar10_task("cifar10-vgg16", scale, _vgg16)


def mnist_resnet18(scale: str = "small") -> Task:
    """MNIST, ResNet-18.

    Args:
        scale: "smoke" (20 steps, an eighth of the width), "small" (930 steps, a quarter) or "full" (39,050 steps).
    """
    return _mnist_task("mnist-resnet18", scale, _resnet18, 0)


def mnist_vgg16(scale: str = "small") -> Task:
    """MNIST in a black border, VGG-16 with batch norm.

    Args:
        scale: "smoke" (20 steps, an eighth of the width), "small" (930 steps, a quarter) or "full" (39,050 steps).
    """
    return _mnist_task("mnist-vgg16", scale, _vgg16, (SIDE - _MNIST_SIDE) // 2)


_Network = Callable[..., nn.Module]  # (data, width)


def _cifar10_task(name: str, scale: str, network: _Network) -> Task:
    sizes = pick(scale, _CIFAR10_SIZES)
    return _task(name, scale, "cifar10", partial(vision.load_cifar10, sizes=sizes), network, sizes[0])


def _mnist_task(name: str, scale: str, network: _Network, border: int) -> Task:
    sizes = pick(scale, _MNIST_SIZES)
    return _task(name, scale, "mnist", partial(vision.load_mnist, sizes=sizes, border=border), network, sizes[0])


def _task(
    name: str, scale: str, dataset: str, load: Callable[[Path | None], Data], network: _Network, n_train: int
) -> Task:
    """Whole epochs, a validation after each (at "smoke" after a quarter of one); warm-up over a twentieth."""
    batch_size, epochs = pick(scale, _BATCH_AND_EPOCHS)
    steps = epochs * (n_train // batch_size)
    return Task(
        name=name,
        dataset=dataset,
        kind="classification",
        load=load,
        make_model=partial(network, width=pick(scale, _WIDTHS)),
        batch_size=batch_size,
        total_steps=steps,
        eval_every=steps // max(epochs, 4),
        warmup_steps=steps // 20,
        augmentation=vision.CIFAR10_AUGMENTATION if dataset == "cifar10" else vision.MNIST_AUGMENTATION,
    )


def _resnet18(data: Data, width: float) -> nn.Module:
    return ResNet18(int(data.info["n_classes"]), channels=data.train.inputs.shape[1], width=width)


def _vgg16(data: Data, width: float) -> nn.Module:
    return vgg16(int(data.info["n_classes"]), channels=data.train.inputs.shape[1], width=width)
