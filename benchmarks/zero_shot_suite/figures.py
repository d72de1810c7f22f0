"""Statistics of the benchmark: plain arrays in, numbers out.

Called by summary.py. Symbols: M runs in the pool of a random search, N numbers of runs tried, P parts.

The expectation of a random search is exact, not simulated. Draw n of M runs with replacement and keep the one with
the least validation loss. With the pool sorted by validation loss, the kept one is number i (from 0) or a later one
with probability ((M - i) / M) ** n, so

    E[test of the best of n] = sum_i test_i * (((M - i) / M) ** n - ((M - i - 1) / M) ** n)

Runs of equal validation loss are kept with equal probability: their test losses are averaged first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.experiments.stats import expanded_tail

__all__ = [
    "CAP",
    "MIN_GROUPS",
    "bootstrap_groups",
    "crossing",
    "expected_best_of",
    "geometric_mean",
    "interval",
    "search_curve",
    "search_equivalent",
    "time_to_target",
]

Floats = npt.NDArray[np.float64]

MIN_GROUPS = 5  # as with seeds elsewhere: resampling three or four things says next to nothing about others
CAP = 256  # runs of a random search: beyond it nobody searches, and a pool of 128 runs has nothing to say
# Whole numbers up to 32, then about one in ten: what lies between is interpolated in log n.
NS = np.unique(np.concatenate((np.arange(1, 33), np.geomspace(32, CAP, 25).round()))).astype(np.float64)
_NS = tuple(NS.tolist())


def expected_best_of(ns: Floats, val: Floats, test: Floats) -> Floats:
    """Expected test loss of the best-on-validation of n runs drawn from a pool with replacement.

    Args:
        ns: Numbers of runs, 1 or more; (N,).
        val: Validation loss of each run of the pool; (M,).
        test: Its test loss; (M,).

    Returns:
        (N,).
    """
    curve: Floats = _probabilities(tuple(ns.tolist()), len(val)) @ _ranked(val, test)
    return curve


def _ranked(val: Floats, test: Floats) -> Floats:
    """Test losses in the order of the validation losses, averaged where those are equal; (M,)."""
    order = np.argsort(val, kind="stable")
    _, first, counts = np.unique(val[order], return_index=True, return_counts=True)
    ranked: Floats = np.repeat(np.add.reduceat(test[order], first) / counts, counts)
    return ranked


@functools.lru_cache(maxsize=16)
def _probabilities(ns: tuple[float, ...], size: int) -> Floats:
    """That number i of `size` is kept of n; (N, M)."""
    at_least = ((size - np.arange(size + 1)) / size) ** np.array(ns)[:, None]  # (N, M + 1): number i or a later one
    kept: Floats = at_least[:, :-1] - at_least[:, 1:]
    return kept


def search_curve(val: Floats, test: Floats) -> Floats:
    """`expected_best_of` at the numbers of runs `NS`."""
    curve: Floats = _probabilities(_NS, len(val)) @ _ranked(val, test)
    return curve


def crossing(curve: Floats, ours: float) -> float:
    """The number of runs at which a curve over `NS` first comes down to a loss; at least 1, at most `CAP`.

    Args:
        curve: Expected loss of the best of each number of runs; (N,).
        ours: The loss to be reached.

    Returns:
        Interpolated in log n; 1 if a single run is as good, `CAP` if no number of runs is.
    """
    reached = np.flatnonzero(curve <= ours)
    if len(reached) == 0:
        return float(CAP)
    place = int(reached[0])
    if place == 0:
        return 1.0
    above, below = curve[place - 1], curve[place]
    share = (above - ours) / (above - below)
    return float(NS[place - 1] * (NS[place] / NS[place - 1]) ** share)


def search_equivalent(ours: float, val: Floats, test: Floats) -> float:
    """Search-equivalent runs: how many runs of a random search give what one run of ours gives.

    Args:
        ours: Mean test loss of one run of ours.
        val: Validation losses of the pool; (M,).
        test: Its test losses; (M,).
    """
    return crossing(search_curve(val, test), ours)


def geometric_mean(ratios: Sequence[float] | Floats) -> float:
    """Geometric mean of positive numbers."""
    return float(np.exp(np.mean(np.log(np.asarray(ratios, dtype=np.float64)))))


def interval(values: Sequence[float] | Floats, n: int) -> tuple[float, float]:
    """95 % interval from bootstrap values that n things were drawn for: expanded percentiles."""
    outside = expanded_tail(n)
    low, high = np.quantile(np.asarray(values, dtype=np.float64), [outside, 1 - outside])
    return float(low), float(high)


def bootstrap_groups(
    groups: Sequence[str], figure: Callable[[list[int], np.random.Generator], float], *, n: int, seed: int = 0
) -> tuple[float, float] | None:
    """95 % bootstrap interval of a figure over members, groups resampled whole.

    Parts of one task share its data and its network: resampling them one by one would count one piece of evidence
    several times.

    Args:
        groups: The group of each member; (P,).
        figure: From the members drawn (with repetition) and a generator, for what is resampled inside, to a number.
        n: Resamples.
        seed: Fixed, so that a table made twice says the same.

    Returns:
        None with fewer than `MIN_GROUPS` groups.
    """
    names = sorted(set(groups))
    if len(names) < MIN_GROUPS:
        return None
    members = [[index for index, group in enumerate(groups) if group == name] for name in names]
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(n):
        drawn = generator.integers(0, len(names), len(names)).tolist()
        values.append(figure([index for group in drawn for index in members[group]], generator))
    return interval(values, len(names))


def time_to_target(curve: Sequence[Sequence[Any]], target: float, total_steps: int) -> float:
    """Share of the budget after which a run's validation loss was first at or below a target.

    Args:
        curve: [optimizer step, validation loss]; a loss of None is none.
        target: The loss to reach.
        total_steps: The budget.

    Returns:
        Infinity if it never was.
    """
    steps = [step for step, loss in curve if loss is not None and loss <= target]
    return steps[0] / total_steps if steps else float("inf")
