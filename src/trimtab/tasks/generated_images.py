"""Generated small images with one channel, as pools: four kinds, in most of which what counts may be anywhere.

Called by `families`. In `shifted-prototypes` a class is a small pattern at any place of the image; in `gratings` it is
the direction of a wave of any phase, in `textures` the correlation between neighbouring pixels of a random field: in
these two the mean image is 0 for every class, and a linear model hardly does better than chance. In `smooth-fields` it
is a smooth picture under another one that changes from image to image, which a linear model tells nearly as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt

from trimtab.tasks.pools import Pool, Sizes, log_uniform

__all__ = ["CLASSES_BY_SIDE", "IMAGES", "LARGE_IMAGES", "LARGE_SIDES", "PIXEL_NOISE", "SIDES"]

SIDES = {4: 0.15, 6: 0.25, 8: 0.6}  # pixels: how likely
LARGE_SIDES = {16: 1.0}
CLASSES_BY_SIDE = {4: (2, 4), 6: (2, 6), 8: (2, 10), 16: (5, 10)}  # a smaller image has not room for more
# Deviation, of a signal with deviation about 1; textures are the hardest to tell apart without it.
PIXEL_NOISE = {
    "gratings": (0.1, 1.0),
    "shifted-prototypes": (0.1, 1.0),
    "smooth-fields": (0.1, 1.0),
    "textures": (0.05, 0.3),
}
CONTRAST = (0.7, 1.3)
WAVES_PER_PIXEL = (0.25, 0.375)
FIELD_BLUR = (0.7, 1.2)  # deviation of the blur, pixels
FIELD_STRENGTH = (0.5, 1.5)  # of the picture that changes, against the one that tells the class

Floats = npt.NDArray[np.float64]
Classes = npt.NDArray[np.int64]
_Drawn = dict[str, float | str]
_Kind = Callable[[np.random.Generator, Classes, int, int], tuple[Floats, _Drawn]]


def _shifted_prototypes(
    generator: np.random.Generator, labels: Classes, n_classes: int, side: int
) -> tuple[Floats, _Drawn]:
    """A pattern of 5/8 of the side, at a random place on an empty image, with a random contrast."""
    width = side * 5 // 8
    prototypes = generator.standard_normal((n_classes, width, width))
    prototypes *= side / width / np.sqrt((prototypes**2).mean(axis=(1, 2), keepdims=True))  # deviation 1 with the empty
    images = np.zeros((len(labels), side, side))
    corners = generator.integers(0, side - width + 1, size=(len(labels), 2))
    rows = corners[:, 0, None, None] + np.arange(width)[:, None]
    columns = corners[:, 1, None, None] + np.arange(width)
    contrast = generator.uniform(*CONTRAST, size=(len(labels), 1, 1))
    images[np.arange(len(labels))[:, None, None], rows, columns] = prototypes[labels] * contrast
    return images, {}


def _gratings(generator: np.random.Generator, labels: Classes, n_classes: int, side: int) -> tuple[Floats, _Drawn]:
    """A plane wave; directions of a class lie within a quarter of the way to the next class."""
    step = math.pi / n_classes
    angle = step * (labels + generator.uniform(-0.25, 0.25, size=len(labels)))
    rate = 2 * math.pi * generator.uniform(*WAVES_PER_PIXEL, size=len(labels))
    phase = generator.uniform(0, 2 * math.pi, size=len(labels))
    x, y = np.meshgrid(np.arange(side), np.arange(side))
    along = np.cos(angle)[:, None, None] * x + np.sin(angle)[:, None, None] * y
    return math.sqrt(2) * np.sin(rate[:, None, None] * along + phase[:, None, None]), {}


def _textures(generator: np.random.Generator, labels: Classes, n_classes: int, side: int) -> tuple[Floats, _Drawn]:
    """White noise seen through the random 3 x 3 filter of the class, on a torus."""
    filters = np.zeros((n_classes, side, side))
    filters[:, :3, :3] = generator.standard_normal((n_classes, 3, 3))
    filters /= np.sqrt((filters**2).sum(axis=(1, 2), keepdims=True))
    noise = generator.standard_normal((len(labels), side, side))
    return _filtered(noise, np.fft.rfft2(filters)[labels]), {}


def _smooth_fields(generator: np.random.Generator, labels: Classes, n_classes: int, side: int) -> tuple[Floats, _Drawn]:
    """The smooth picture of the class, moved by at most one pixel on a torus, plus a smooth picture of its own."""
    blur = generator.uniform(*FIELD_BLUR)
    strength = log_uniform(generator, *FIELD_STRENGTH)
    squared = np.fft.fftfreq(side)[:, None] ** 2 + np.fft.rfftfreq(side) ** 2  # (cycles per pixel)^2
    low_pass = np.exp(-2 * (math.pi * blur) ** 2 * squared)
    prototypes = _unit(_filtered(generator.standard_normal((n_classes, side, side)), low_pass))
    changes = _unit(_filtered(generator.standard_normal((len(labels), side, side)), low_pass))
    down, right = generator.integers(-1, 2, size=(2, len(labels)))
    rows = (np.arange(side) + down[:, None])[:, :, None] % side
    columns = (np.arange(side) + right[:, None])[:, None, :] % side
    images = prototypes[labels[:, None, None], rows, columns] + strength * changes
    return images, {"blur": blur, "strength": strength}


def _images(name: str, generator: np.random.Generator, sizes: Sizes, *, are_large: bool = False) -> Pool:
    sides = LARGE_SIDES if are_large else SIDES
    side = int(generator.choice(list(sides), p=list(sides.values())))
    low, high = CLASSES_BY_SIDE[side]
    n_classes = int(generator.integers(low, high + 1))
    labels = generator.integers(0, n_classes, size=sizes.total)
    images, drawn = _KINDS[name](generator, labels, n_classes, side)
    noise = log_uniform(generator, *PIXEL_NOISE[name])
    images = images + noise * generator.standard_normal(images.shape)
    return Pool(images, labels, n_classes, drawn | {"pixel_noise": noise}, "whole")


def _filtered(images: Floats, response: npt.NDArray[np.float64] | npt.NDArray[np.complex128]) -> Floats:
    """Images (N, H, W) through filters given by their Fourier transform, on a torus."""
    filtered: Floats = np.fft.irfft2(np.fft.rfft2(images) * response, s=images.shape[1:])
    return filtered


def _unit(images: Floats) -> Floats:
    """Each image with a mean square of 1."""
    unit: Floats = images / np.sqrt((images**2).mean(axis=(1, 2), keepdims=True))
    return unit


_KINDS: dict[str, _Kind] = {
    "gratings": _gratings,
    "shifted-prototypes": _shifted_prototypes,
    "smooth-fields": _smooth_fields,
    "textures": _textures,
}
_Maker = Callable[[np.random.Generator, Sizes], Pool]
IMAGES: dict[str, _Maker] = {name: partial(_images, name) for name in _KINDS}
LARGE_IMAGES: dict[str, _Maker] = {name: partial(_images, name, are_large=True) for name in _KINDS}
