"""VGG-16 with batch norm in the form that is used on images of 32 x 32: one dense layer instead of three.

Called by `trimtab.tasks.deep_vision`. Source: Simonyan, Zisserman 2014, *Very Deep Convolutional Networks for
Large-Scale Image Recognition*, arXiv:1409.1556, table 1, column D. Deviations: batch norm behind each convolution,
which keeps its bias; one dense layer from the 512 filters of the last stage, of which five poolings leave one place, to
the classes; no dropout. For ten classes and three channels that makes 14,728,266 parameters, the number published for
this form (Sun et al. 2023, arXiv:2306.16869, table 7). Forms with a second dense layer of 512 have 14,990,922.
"""

from __future__ import annotations

from torch import nn

from trimtab.tasks.models import scaled_width

__all__ = ["SIDE", "vgg16"]

SIDE = 32  # of the images: each of five poolings halves it
_STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # filters, and convolutions


def vgg16(n_classes: int, *, channels: int = 3, width: float = 1.0) -> nn.Sequential:
    """Thirteen convolutions in five stages and a dense layer: (B, channels, 32, 32) -> (B, n_classes).

    Weights are torch's default ones.

    Args:
        n_classes: Logits.
        channels: Of an image.
        width: Factor on the 64 to 512 filters of the stages; the results are rounded.

    Raises:
        InputError: `width` leaves a layer no filter.
    """
    layers: list[nn.Module] = []
    for base, count in _STAGES:
        filters = scaled_width(base, width)
        for _ in range(count):
            layers += [nn.Conv2d(channels, filters, 3, padding=1), nn.BatchNorm2d(filters), nn.ReLU()]
            channels = filters
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, n_classes))
