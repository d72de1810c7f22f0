"""Numbers, differences and costs in words, the same in conclusion, tables and plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.experiments.stats import BETTER, MIN_SEEDS, TOO_FEW, WORSE

__all__ = ["cost", "count", "difference", "interval", "listing", "number", "summary"]

MINUS = "\N{MINUS SIGN}"


def number(value: float | None, *, digits: int = 4, signed: bool = False) -> str:
    """A number with four significant digits, a dash where there is none.

    >>> number(0.123456), number(12345.6), number(0.00001), number(None)
    ('0.1235', '12,346', '1e-05', '–')
    """
    if value is None:
        return "–"
    if value == 0:
        return "0"
    magnitude = abs(value)
    if magnitude >= 10**digits or magnitude == int(magnitude):
        text = f"{magnitude:,.0f}"
    elif magnitude < 1e-3:
        text = f"{magnitude:.{digits - 1}g}"
    else:
        text = f"{magnitude:#.{digits}g}".rstrip(".")  # trailing zeros say how well it is known
    sign = MINUS if value < 0 else "+" if signed else ""
    return sign + text


def interval(low_high: Sequence[float] | None, *, signed: bool = False) -> str:
    """An interval in brackets; nothing where there is none."""
    if low_high is None:
        return ""
    return "[" + ", ".join(number(value, digits=3, signed=signed) for value in low_high) + "]"


def count(n: int, noun: str) -> str:
    """A count with its noun: 1 seed, 2 seeds."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def listing(names: Sequence[str]) -> str:
    """Names as a sentence has them: "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def summary(entry: Mapping[str, Any]) -> str:
    """One number over seeds: mean and interval, or with fewer than five seeds the range and every value."""
    if entry["n"] == 0:
        return "–"
    if entry["mean"] is None:
        return f"reached by {entry['n']} of {len(entry['values'])}"
    if entry["interval"] is not None:
        return f"{number(entry['mean'])} {interval(entry['interval'])}"
    values = ", ".join(number(value) for value in entry["values"] if value is not None)
    if entry["n"] == 1:
        return f"{values} (one seed)"
    return f"{number(entry['min'])} to {number(entry['max'])} ({values})"


def difference(entry: Mapping[str, Any]) -> str:
    """A difference and its verdict as half a sentence."""
    n = entry["n"]
    if n == 0:
        return "nothing to compare, since no seed has a value on both sides"
    if entry["verdict"] == TOO_FEW:
        low, high = (number(pick(entry["values"]), digits=3, signed=True) for pick in (min, max))
        return f"{TOO_FEW} ({n} of the {MIN_SEEDS} needed; differences from {low} to {high})"
    if entry["identical"]:
        return f"identical to the bit over {count(n, 'seed')}, that is {entry['verdict']}"
    size = f"{number(entry['mean'], digits=3, signed=True)} {interval(entry['interval'], signed=True)}"
    if entry["verdict"] in (BETTER, WORSE) and entry.get("relative") is not None:
        return f"{entry['verdict']} by {abs(entry['relative']):.1%} ({size}, {count(n, 'seed')})"
    return f"{entry['verdict']} ({size}, {count(n, 'seed')})"


def cost(entry: Mapping[str, Any]) -> str:
    """What an arm cost before it was used, and what a search costs each time."""
    parts = []
    if entry.get("taught"):
        networks, steps = entry["taught"].get("networks"), entry["taught"].get("optimizer_steps")
        known = [count(n, noun) for n, noun in ((networks, "earlier network"), (steps, "step")) if n is not None]
        parts.append(
            f"brain taught on {', '.join(known)}" if known else "brain taught before, at a cost it does not say"
        )
    if entry["learning_runs"] or entry["learning_optimizer_steps"]:
        runs, steps = entry["learning_runs"], entry["learning_optimizer_steps"]
        parts.append(f"learned in {count(runs, 'run')}, {count(steps, 'step')}")
    if entry["tuning_runs"]:
        runs, steps = entry["tuning_runs"], entry["tuning_optimizer_steps"]
        parts.append(f"tuned in {count(runs, 'run')}, {count(steps, 'step')}")
    if entry["search_trials"]:
        trials, flops = entry["search_trials"], entry["search_flops"]
        parts.append(f"searched in {count(trials, 'trial')}, {number(flops / 1e9)} GFLOPs in all")
    return "; ".join(parts) or "none"
