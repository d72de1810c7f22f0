"""Allocations: rules that say without learning how wide each part may be. What a learned agent has to beat.

Called by `trimtab.pruner` (two of them seed its search) and by the study. Sources: uniform and global thresholds as in
Torch-Pruning (Fang et al. 2023, arXiv:2301.12900), LAMP (Lee et al. 2021, arXiv:2010.07611, equation 3) on whole units,
random search as in Li et al. 2022 (arXiv:2205.11921).

`uniform`, `by_threshold` give widths to the unit, so that they come as near to the budget as they can; `on_grid` brings
them to the widths that a search chooses from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import InputError, unknown_name
from trimtab.pruning.budget import Budget
from trimtab.pruning.parts import Configuration

__all__ = ["THRESHOLDS", "by_threshold", "draw", "every", "greedy", "on_grid", "uniform"]

THRESHOLDS = ("global", "lamp")
_MOST = 20_000  # configurations of which all are scored


def uniform(budget: Budget) -> Configuration:
    """The same share of every part's units, the largest that keeps to the budget."""
    sizes = budget.network.dense
    shares = sorted({width / size for size in set(sizes) for width in range(1, size + 1)})
    return _largest(budget, [_at_least(budget, [int(share * n + 1e-9) for n in sizes]) for share in shares])


def by_threshold(budget: Budget, kind: str) -> Configuration:
    """The units that score above one threshold for all parts, the lowest that keeps to the budget.

    Args:
        budget: To keep to.
        kind: "global": a unit's squared norm over the mean of its part's. "lamp": over the sum of those of its part
            that are not smaller than it.
    """
    if kind not in THRESHOLDS:
        raise unknown_name("threshold", kind, THRESHOLDS)
    scores = []
    for score, order in zip(budget.network.scores, budget.network.orders, strict=True):
        square = score.square()[order]  # descending
        scores.append(square / square.mean() if kind == "global" else square / square.cumsum(0))
    thresholds = torch.unique(torch.cat(scores)).flip(0)  # from few units to many
    choices = [[int((score >= threshold).sum()) for score in scores] for threshold in thresholds.tolist()]
    return _largest(budget, [_at_least(budget, widths) for widths in choices])


def on_grid(budget: Budget, configuration: Sequence[int]) -> Configuration:
    """The nearest below on the grid of widths; what that leaves of the budget goes to the parts that lost most."""
    parts = budget.network.parts
    widths = [max(w for w in part.widths if w <= width or w == part.widths[0]) for width, part in zip(
        configuration, parts, strict=True)]  # fmt: skip
    widths = [max(width, least) for width, least in zip(widths, budget.floor, strict=True)]
    while True:
        lost = sorted(
            range(len(parts)), key=lambda place: (widths[place] - configuration[place]) / parts[place].size
        )  # the most negative first
        for place in lost:
            wider = next((w for w in parts[place].widths if w > widths[place]), None)
            if wider is not None and widths[place] < configuration[place]:
                raised = [*widths[:place], wider, *widths[place + 1 :]]
                if budget.fits(raised):
                    widths = raised
                    break
        else:
            return tuple(widths)


def greedy(budget: Budget, score: Callable[[Configuration], float]) -> Configuration:
    """From the dense network, step by step, the narrower width that loses least for what it saves.

    Args:
        budget: To keep to.
        score: Of a configuration, higher is better; called a few dozen times.
    """
    parts = budget.network.parts
    now = budget.network.dense
    known = score(now)
    while not budget.fits(now):
        best: tuple[float, Configuration, float] | None = None
        for place, part in enumerate(parts):
            narrower = [width for width in part.widths if width < now[place]]
            if not narrower:
                continue
            tried = (*now[:place], narrower[-1], *now[place + 1 :])
            saved = budget.cost(now) - budget.cost(tried)
            if saved <= 0:
                continue
            found = score(tried)
            loss = (known - found) / saved
            if best is None or loss < best[0]:
                best = (loss, tried, found)
        if best is None:  # only taking layers out is left, and that saves nothing
            return budget.floor
        _, now, known = best
    return now


def draw(budget: Budget, generator: np.random.Generator) -> Configuration:
    """A configuration at random that uses the budget up.

    Part after part one of the widths with which it can still be kept; then, in random order, each part as wide as
    still fits. Without the second, draws lie far below the budget, the deeper the network the farther, and a search
    among them is no rival to anything.
    """
    chosen: list[int] = []
    for _ in budget.network.parts:
        chosen.append(int(generator.choice(budget.open_widths(chosen))))
    for place in generator.permutation(len(chosen)):
        wider = [width for width in budget.network.parts[place].widths if width > chosen[place]]
        options = [(*chosen[:place], width, *chosen[place + 1 :]) for width in reversed(wider)]
        chosen = list(next((option for option in options if budget.fits(option)), chosen))
    return tuple(chosen)


def every(budget: Budget) -> list[Configuration]:
    """All configurations that keep to the budget, with widths of the grid.

    Raises:
        InputError: The network has too many.
    """
    n = math.prod(len(part.widths) for part in budget.network.parts)
    if n > _MOST:
        raise InputError(
            f"the network has {n:,} configurations and all of them were to be scored; expected at most {_MOST:,}: "
            "raise multiple, or search"
        )
    found: list[Configuration] = [()]
    for _ in budget.network.parts:
        found = [(*chosen, width) for chosen in found for width in budget.open_widths(chosen)]
    return found


def random_orders(budget: Budget, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Units of every part in random order: which units stay is drawn, how many is not."""
    return tuple(torch.randperm(part.size, generator=generator) for part in budget.network.parts)


def _at_least(budget: Budget, widths: Sequence[int]) -> Configuration:
    return tuple(max(width, least) for width, least in zip(widths, budget.floor, strict=True))


def _largest(budget: Budget, ascending: Sequence[Configuration]) -> Configuration:
    """The last of configurations that grow, by bisection; the smallest keeps to the budget."""
    low, high = 0, len(ascending)
    while high - low > 1:
        middle = (low + high) // 2
        if budget.fits(ascending[middle]):
            low = middle
        else:
            high = middle
    return ascending[low] if budget.fits(ascending[low]) else budget.floor
