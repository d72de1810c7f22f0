"""Accuracies and their differences in words, the same in tables and goals: per cent, and points of a per cent.

Called by `goals` and `tables`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.experiments.stats import BETTER, MIN_SEEDS, TOO_FEW, WORSE
from trimtab.experiments.words import MINUS, count

__all__ = ["against", "per_cent", "points", "short"]

Entry = Mapping[str, Any]


def per_cent(entry: Entry) -> str:
    """An accuracy over seeds: mean with its interval, or with fewer than five seeds mean and range.

    >>> per_cent({"n": 2, "mean": 0.5, "interval": None, "min": 0.45, "max": 0.55})
    '50.0 (45.0 to 55.0)'
    """
    if entry["mean"] is None:
        return "–"
    if entry["interval"] is not None:
        low, high = entry["interval"]
        return f"{100 * entry['mean']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    if entry["n"] == 1:
        return f"{100 * entry['mean']:.1f}"
    return f"{100 * entry['mean']:.1f} ({100 * entry['min']:.1f} to {100 * entry['max']:.1f})"


def short(difference: Entry | None) -> str:
    """A paired difference in points, for a table: mean, interval where there is one.

    >>> short({"n": 5, "mean": -0.0125, "interval": [-0.02, 0.001]})
    '−1.2 [−2.0, +0.1]'
    """
    if difference is None or difference["n"] == 0:
        return "–"
    text = _signed(difference["mean"])
    if difference["interval"] is not None:
        text += f" [{', '.join(_signed(value) for value in difference['interval'])}]"
    return text


def points(difference: Entry) -> str:
    """A paired difference as part of a sentence: "+1.2 points [+0.3, +2.1] over 5 seeds"."""
    n = difference["n"]
    if n == 0:
        return "nothing to compare, since no seed has both"
    text = f"{_signed(difference['mean'])} points"
    if difference["interval"] is not None:
        text += f" [{', '.join(_signed(value) for value in difference['interval'])}]"
    elif difference["verdict"] == TOO_FEW:
        text += f" ({TOO_FEW}: {n} of the {MIN_SEEDS} needed)"
    return f"{text} over {count(n, 'seed')}"


def against(name: str, difference: Entry) -> str | None:
    """The verdict as "better than uniform: +1.2 points ..."; None where no difference is shown."""
    if difference["verdict"] not in (BETTER, WORSE):
        return None
    return f"{difference['verdict']} than {name}: {points(difference)}"


def _signed(value: float) -> str:
    """Points of a per cent; a zero has no sign."""
    text = f"{100 * abs(value):.1f}"
    return text if float(text) == 0 else ("+" if value > 0 else MINUS) + text
