"""Importance: which units of a part go first.

Called by `network`. Units are ranked once, in the dense network, so that the units of a smaller width are among those
of a larger one: a search then chooses widths alone, and `evaluation` can use what it has computed again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.errors import unknown_name
from trimtab.seeding import torch_generator
from trimtab.surgery.couplings import Slot
from trimtab.surgery.layout import Spaces
from trimtab.surgery.units import importance as _surgery_importance
from trimtab.surgery.units import rows

__all__ = ["IMPORTANCE", "random_scores", "ranked", "unit_scores"]

IMPORTANCE = ("l2", "product", "incoming", "outgoing", "random")


def unit_scores(
    slots: Sequence[Slot], spaces: Spaces, space: int, kind: str, *, seed: int = 0, name: str = ""
) -> Tensor:
    """How much each unit does; larger is more.

    "l2": norm of all weights that make a unit, that it passes through (a batch norm's) and that read it; biases are
    left out. This is the group norm of Fang et al. 2023 (arXiv:2301.12900, equation 5), without its mean over layers.
    "product", "incoming" and "outgoing" are those of `Surgeon.importance`. "random" is drawn.

    Args:
        slots: Every place of the units.
        spaces: Their sizes.
        space: The set.
        kind: One of `IMPORTANCE`.
        seed: Of "random".
        name: Of the part, for "random": every part draws its own.

    Returns:
        (units,), float64, on the CPU.
    """
    if kind not in IMPORTANCE:
        raise unknown_name("importance", kind, IMPORTANCE)
    size = spaces[space].size
    if kind == "random":
        return random_scores(size, seed, name)
    if kind != "l2":
        return _surgery_importance(slots, spaces, space, kind)
    square = torch.zeros(size, dtype=torch.float64)
    for slot in slots:
        if slot.role in ("makes", "rides", "reads") and slot.dim is not None and not slot.attribute.startswith("bias"):
            weights: Tensor = getattr(slot.module, slot.attribute)
            square += rows(weights, slot.dim, slot.layout, spaces, space).double().square().sum(1).cpu()
    return square.sqrt()


def random_scores(size: int, seed: int, name: str) -> Tensor:
    """Scores drawn for the units of one part; (units,), float64, on the CPU."""
    return torch.rand(size, generator=torch_generator(seed, "random units", name), dtype=torch.float64)


def ranked(scores: Tensor) -> Tensor:
    """Units by importance, the most important first; of equal ones the first."""
    return torch.sort(scores, descending=True, stable=True).indices
