"""Augmentation of images as tensors: mirrored, cropped out of a padded image, rotated, each image by its own draw.

Held by `Task.augmentation`, and applied to train batches alone where `Task.is_augmented`; called by
`trimtab.training.batches`. What is drawn is drawn on the CPU, so that a seed gives the same images on every device.

The order is that of the usual recipe (crop, mirror, rotation). Deviation from torchvision's transforms: rotation is
bilinear, where theirs takes the nearest pixel unless told otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.errors import InputError

__all__ = ["Augmentation"]


@dataclass(frozen=True)
class Augmentation:
    """What may be done to an image.

    Attributes:
        fill: Value of each channel outside of the image, which is where black is after scaling; C numbers.
        flip: Mirror one image in two, left to right.
        padding: Shift by up to this many pixels, up or down and left or right: a crop of the image with as many pixels
            put around it.
        degrees: Rotate by up to this much, to either side.

    Raises:
        InputError: A value that cannot be, or nothing that would be done.
    """

    fill: tuple[float, ...]
    flip: bool = False
    padding: int = 0
    degrees: float = 0.0

    def __post_init__(self) -> None:
        is_fill = isinstance(self.fill, tuple) and len(self.fill) > 0 and all(map(_is_number, self.fill))
        if not is_fill:
            raise InputError(f"augmentation: fill is {self.fill!r}; expected a tuple of numbers, one a channel")
        if not isinstance(self.flip, bool):
            raise InputError(f"augmentation: flip is {self.flip!r}; expected True or False")
        if isinstance(self.padding, bool) or not isinstance(self.padding, int) or self.padding < 0:
            raise InputError(f"augmentation: padding is {self.padding!r}; expected a whole number of pixels, 0 or more")
        if not (_is_number(self.degrees) and 0 <= self.degrees <= 180):
            raise InputError(f"augmentation: degrees is {self.degrees!r}; expected a number from 0 to 180")
        if not (self.flip or self.padding or self.degrees):
            raise InputError("augmentation: nothing would be done; give flip, padding or degrees, or no augmentation")

    def check(self, inputs: Tensor, task: str) -> None:
        """Check that a task's inputs are images that this fits.

        Args:
            inputs: (B, C, H, W) float.
            task: Name for messages.

        Raises:
            InputError: They are none, or have other channels.
        """
        if inputs.dim() != 4 or not inputs.is_floating_point() or inputs.shape[1] != len(self.fill):
            raise InputError(
                f"task {task!r}: augmentation is for images (B, {len(self.fill)}, height, width) in floats; its inputs "
                f"are {tuple(inputs.shape)}, {inputs.dtype}; leave is_augmented out"
            )

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Other images of the same shape; the given ones stay as they are.

        Args:
            images: (B, C, H, W) float.
            generator: CPU generator; how much is drawn depends on B alone.
        """
        n, device = len(images), images.device
        if self.flip or self.padding:
            is_flipped = torch.rand(n, generator=generator) < 0.5 if self.flip else torch.zeros(n, dtype=torch.bool)
            shifts = torch.randint(-self.padding, self.padding + 1, (2, n), generator=generator)
            images = _crop(
                images, is_flipped.to(device, non_blocking=True), shifts.to(device, non_blocking=True), self.fill
            )
        if self.degrees:
            angles = (2 * torch.rand(n, generator=generator) - 1) * math.radians(self.degrees)
            images = _rotate(images, angles.to(device, non_blocking=True), self.fill)
        return images


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _crop(images: Tensor, is_flipped: Tensor, shifts: Tensor, fill: tuple[float, ...]) -> Tensor:
    """Pixels copied from elsewhere, to the bit.

    Args:
        images: (B, C, H, W).
        is_flipped: (B,) mirrored left to right, after the crop.
        shifts: (2, B) pixels down and to the right at which the crop begins.
        fill: C values of what lies outside.
    """
    height, width = images.shape[2:]
    rows = torch.arange(height, device=images.device) + shifts[0, :, None]  # (B, H)
    columns = torch.arange(width, device=images.device).expand(len(images), width)
    columns = torch.where(is_flipped[:, None], width - 1 - columns, columns) + shifts[1, :, None]  # (B, W)
    places = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None]  # (B, H, W)
    is_inside = (
        rows.ge(0).logical_and(rows.lt(height))[:, :, None] & columns.ge(0).logical_and(columns.lt(width))[:, None]
    )
    taken = images.flatten(2).gather(2, places.flatten(1)[:, None].expand(-1, images.shape[1], -1))
    return torch.where(is_inside[:, None], taken.view_as(images), _per_channel(images, fill))


def _rotate(images: Tensor, angles: Tensor, fill: tuple[float, ...]) -> Tensor:
    """Rotated about the middle, counter-clockwise, bilinear.

    Args:
        images: (B, C, H, W).
        angles: (B,) in radians.
        fill: C values of what lies outside.
    """
    height, width = images.shape[2:]
    cos, sin, none = angles.cos(), angles.sin(), torch.zeros_like(angles)
    # Coordinates go from -1 to 1 along both sides, whatever their lengths.
    first = torch.stack((cos, -sin * (height / width), none), dim=1)
    second = torch.stack((sin * (width / height), cos, none), dim=1)
    grid = F.affine_grid(torch.stack((first, second), dim=1), list(images.shape), align_corners=False)
    outside = _per_channel(images, fill)
    return F.grid_sample(images - outside, grid, padding_mode="zeros", align_corners=False) + outside


def _per_channel(images: Tensor, fill: tuple[float, ...]) -> Tensor:
    return torch.tensor(fill, dtype=images.dtype, device=images.device).view(1, -1, 1, 1)
