"""Part: units of a network that are pruned together, and the numbers of them that may be chosen.

Made by `network`, read by everything that chooses. A choice for a whole network is a `Configuration`: one width for
each part, in the order of the parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.errors import InputError

__all__ = ["MAX_LEVELS", "Configuration", "Part", "check_configuration", "width_grid"]

Configuration = tuple[int, ...]

NARROW = 4  # blocks, below which a part goes in quarters
MAX_LEVELS = 16  # widths of one part: more make the search longer and no network better


@dataclass(frozen=True)
class Part:
    """Units that go together, and how many may stay.

    Attributes:
        name: Of the first layer that makes them, or of the module that holds them.
        kind: That layer's class, "heads" of attention, or "feed-forward" of a transformer's layer.
        size: Units of the dense network.
        widths: Numbers of units to choose from, ascending, `size` last; 0 first where the layer can be taken out.
        layers: Layers that make the units, several where residual additions tie them.
    """

    name: str
    kind: str
    size: int
    widths: tuple[int, ...]
    layers: tuple[str, ...]


def width_grid(size: int, multiple: int, max_levels: int = MAX_LEVELS) -> tuple[int, ...]:
    """Multiples of `multiple` up to a size, and the size; every k-th of them where there are more than `max_levels`.

    Kernels work in blocks: an LSTM of 55 units is slower than one of 64 (FINDINGS section 4). Narrow parts, of fewer
    than four such blocks, go in quarters, so that there is something to choose.

    >>> width_grid(32, 8), width_grid(12, 8)
    ((8, 16, 24, 32), (3, 6, 9, 12))
    """
    step = multiple * max(1, math.ceil(size / multiple / max_levels))
    if size < NARROW * multiple:
        step = max(1, size // NARROW)
    return (*range(step, size, step), size)


def check_configuration(configuration: Sequence[int], parts: Sequence[Part]) -> Configuration:
    """The configuration as a tuple.

    Raises:
        InputError: It has not one of its widths for each part.
    """
    if len(configuration) != len(parts):
        raise InputError(
            f"configuration {tuple(configuration)} has {len(configuration)} widths; expected {len(parts)}, one for "
            f"each of {', '.join(part.name for part in parts)}"
        )
    for width, part in zip(configuration, parts, strict=True):
        is_whole = isinstance(width, int) and not isinstance(width, bool)
        if not is_whole or not (1 <= width <= part.size or width in part.widths):
            least = "0 (the layer is taken out) or " if part.widths[0] == 0 else ""
            raise InputError(f"width {width!r} of {part.name!r}; expected {least}1 to {part.size}")
    return tuple(configuration)
