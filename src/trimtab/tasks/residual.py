"""ResNet-18 in the form that is used on small images: a stem of 3 x 3 without stride, and no pooling behind it.

Called by `trimtab.tasks.deep_vision`. Source: He, Zhang, Ren, Sun 2015, *Deep Residual Learning for Image Recognition*,
arXiv:1512.03385: basic blocks, the numbers of blocks and filters of table 1. Deviations: the stem, which for images of
32 x 32 has a stride of 1, 3 x 3 filters, and no max-pooling behind it; projections wherever a shape changes (the
paper's option B). For ten classes and three channels that makes 11,173,962 parameters, the number published for this
form (Sun et al. 2023, arXiv:2306.16869, table 7).

torch.fx traces it, so that `trimtab.surgery` can change its filters: those of a block's first convolution alone, those
of all that is added up in a stage together.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.tasks.models import scaled_width

__all__ = ["ResNet18"]

_STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))  # filters, and stride of the first block
_BLOCKS = 2  # in each stage


class ResNet18(nn.Module):
    """Stem, four stages of two basic blocks, mean over the places, dense layer: (B, channels, H, W) -> (B, n_classes).

    Weights are torch's default ones. H and W are at least 8, of any parity.

    Args:
        n_classes: Logits.
        channels: Of an image.
        width: Factor on the 64, 128, 256 and 512 filters of the stages; the results are rounded.

    Raises:
        InputError: `width` leaves a layer no filter.
    """

    def __init__(self, n_classes: int, *, channels: int = 3, width: float = 1.0) -> None:
        super().__init__()
        filters = scaled_width(_STAGES[0][0], width)
        self.conv = _convolution(channels, filters, 3)
        self.norm = nn.BatchNorm2d(filters)
        blocks: list[nn.Module] = []
        for base, stride in _STAGES:
            for place in range(_BLOCKS):
                blocks.append(_Block(filters, scaled_width(base, width), stride if place == 0 else 1))
                filters = scaled_width(base, width)
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(filters, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits; (B, channels, H, W) -> (B, n_classes)."""
        x = F.relu(self.norm(self.conv(images)))
        logits: Tensor = self.head(self.pool(self.blocks(x)).flatten(1))
        return logits


class _Block(nn.Module):
    """Two convolutions with batch norm, and the input added to their result, projected where its shape is another."""

    def __init__(self, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _convolution(channels, filters, 3, stride)
        self.norm1 = nn.BatchNorm2d(filters)
        self.conv2 = _convolution(filters, filters, 3)
        self.norm2 = nn.BatchNorm2d(filters)
        # By the stride, not by the numbers of filters, which may become equal or unequal when the network is pruned.
        self.shortcut: nn.Module = (
            nn.Identity()
            if stride == 1
            else nn.Sequential(_convolution(channels, filters, 1, stride), nn.BatchNorm2d(filters))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def _convolution(channels: int, filters: int, size: int, stride: int = 1) -> nn.Conv2d:
    """Without bias, which the batch norm behind it has."""
    return nn.Conv2d(channels, filters, size, stride=stride, padding=size // 2, bias=False)
