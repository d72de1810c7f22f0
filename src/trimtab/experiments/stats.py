"""What may be said from a few seeds: summaries, paired differences, intervals, verdicts.

Called by results.py. Everything here takes plain numbers and returns frozen records.

    seeds    interval                                              verdict
    < 5      none; values and range only                           "too few seeds to say"
    5..10    Student's t (paired, where it is a difference)        from the interval
    > 10     BCa bootstrap of the mean, fixed seed                 from the interval

Source of BCa: Efron 1987, "Better Bootstrap Confidence Intervals", JASA 82; as in scipy.stats.bootstrap. It is
undefined where every resample has the same mean (all values equal) and where the estimate lies outside the
resamples; the t interval stands in there, and its method then reads "t (BCa undefined)".
Intervals are of 95 %, each for itself: nothing is corrected for the number of comparisons in a study.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = [
    "BETTER",
    "LEVEL",
    "MIN_SEEDS",
    "NO_DIFFERENCE",
    "TOO_FEW",
    "WORSE",
    "Comparison",
    "Interval",
    "Summary",
    "compare",
    "expanded_tail",
    "is_finite",
    "mean_interval",
    "summarize",
]

BETTER = "better"
WORSE = "worse"
NO_DIFFERENCE = "no difference shown"
TOO_FEW = "too few seeds to say"

LEVEL = 0.95
MIN_SEEDS = 5  # with four, a 95 % t interval is 1.6 standard deviations to each side: it says next to nothing
_MAX_T_SEEDS = 10  # the bootstrap covers too little below about ten values
_N_RESAMPLES = 9999
_INFINITE = 1e39
_BOOTSTRAP_SEED = 20261121  # fixed, so that a report written twice says the same


@dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval of a mean, and how it was found: "t", "bca" or "t (BCa undefined)"."""

    low: float
    high: float
    method: str


@dataclass(frozen=True)
class Summary:
    """One number over seeds.

    Attributes:
        values: One a seed, in the order of the seeds; None where the seed has no finite value.
        n: How many seeds have one.
        mean: Over those; None without any.
        stderr: Standard error of the mean; None with fewer than two.
        minimum: Smallest value.
        maximum: Largest value.
        interval: Of the mean; None with fewer than five.
    """

    values: tuple[float | None, ...]
    n: int
    mean: float | None
    stderr: float | None
    minimum: float | None
    maximum: float | None
    interval: Interval | None

    def to_json(self) -> dict[str, Any]:
        """Plain dict of JSON types, as it stands in results.json."""
        return {
            "values": list(self.values),
            "n": self.n,
            "mean": self.mean,
            "stderr": self.stderr,
            "min": self.minimum,
            "max": self.maximum,
            "interval": [self.interval.low, self.interval.high] if self.interval else None,
            "method": self.interval.method if self.interval else None,
        }


@dataclass(frozen=True)
class Comparison:
    """An arm against a reference, seed by seed: difference = arm - reference.

    Attributes:
        seeds: The seeds both have a finite value for, sorted.
        differences: One for each of them.
        mean: Of the differences; None without any.
        reference_mean: Mean of the reference over the same seeds.
        interval: Of the mean difference; None with fewer than five.
        verdict: "better", "worse", "no difference shown" or "too few seeds to say".
        identical: Whether every difference is 0, to the bit.
        left_out: Seeds that one of the two has and the other has not.
    """

    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    mean: float | None
    reference_mean: float | None
    interval: Interval | None
    verdict: str
    identical: bool
    left_out: tuple[int, ...]

    def to_json(self, metric: str) -> dict[str, Any]:
        """Plain dict of JSON types, as it stands in results.json."""
        relative = self.mean / abs(self.reference_mean) if self.mean is not None and self.reference_mean else None
        return {
            "metric": metric,
            "mean": self.mean,
            "reference_mean": self.reference_mean,
            "interval": [self.interval.low, self.interval.high] if self.interval else None,
            "method": self.interval.method if self.interval else None,
            "n": len(self.seeds),
            "seeds": list(self.seeds),
            "values": list(self.differences),
            "relative": relative,
            "verdict": self.verdict,
            "identical": self.identical,
            "left_out_seeds": list(self.left_out),
        }


def summarize(values: Sequence[float | None]) -> Summary:
    """Summarise one number over seeds.

    Args:
        values: One a seed; None, NaN and infinities count as missing, are kept as None and left out of the mean.

    >>> summarize([1.0, None, 3.0]).mean
    2.0
    """
    kept = tuple(float(value) if is_finite(value) and value is not None else None for value in values)
    finite = [value for value in kept if value is not None]
    if not finite:
        return Summary(kept, 0, None, None, None, None, None)
    stderr = float(np.std(finite, ddof=1) / math.sqrt(len(finite))) if len(finite) > 1 else None
    mean = float(np.mean(finite))
    return Summary(kept, len(finite), mean, stderr, min(finite), max(finite), mean_interval(finite))


def compare(
    arm: Mapping[int, float | None], reference: Mapping[int, float | None], *, lower_is_better: bool = True
) -> Comparison:
    """Compare an arm with a reference over the seeds that both have a finite value for.

    Args:
        arm: Seed -> value.
        reference: Seed -> value.
        lower_is_better: Whether a negative difference is a gain.

    >>> compare({0: 1.0, 1: 2.0}, {0: 1.5, 1: 2.5}).verdict
    'too few seeds to say'
    """
    ours = {seed: float(value) for seed, value in arm.items() if value is not None and is_finite(value)}
    theirs = {seed: float(value) for seed, value in reference.items() if value is not None and is_finite(value)}
    seeds = tuple(sorted(ours.keys() & theirs.keys()))
    left_out = tuple(sorted((arm.keys() | reference.keys()) - set(seeds)))
    differences = tuple(ours[seed] - theirs[seed] for seed in seeds)
    if not seeds:
        return Comparison((), (), None, None, None, TOO_FEW, False, left_out)
    interval = mean_interval(differences)
    return Comparison(
        seeds=seeds,
        differences=differences,
        mean=float(np.mean(differences)),
        reference_mean=float(np.mean([theirs[seed] for seed in seeds])),
        interval=interval,
        verdict=_verdict(interval, lower_is_better),
        identical=all(difference == 0.0 for difference in differences),
        left_out=left_out,
    )


def mean_interval(values: Sequence[float], *, n_resamples: int = _N_RESAMPLES) -> Interval | None:
    """The 95 % interval of a mean: None below five values, t up to ten, BCa above.

    Args:
        values: Finite numbers.
        n_resamples: Resamples of the bootstrap.

    >>> mean_interval([0.0, 0.0, 0.0, 0.0, 0.0])
    Interval(low=0.0, high=0.0, method='t')
    >>> mean_interval([1.0, 2.0]) is None
    True
    """
    if len(values) < MIN_SEEDS:
        return None
    data = np.asarray(values, dtype=np.float64)
    if len(values) <= _MAX_T_SEEDS:
        return _t_interval(data, "t")
    return _bca_interval(data, n_resamples) or _t_interval(data, "t (BCa undefined)")


def is_finite(value: float | None) -> bool:
    """Whether there is a number, and it is neither NaN nor beyond what 32 bits hold, which is infinite to a loss."""
    return value is not None and math.isfinite(value) and abs(value) < _INFINITE


def expanded_tail(n: int) -> float:
    """Share of draws on each side of an expanded percentile interval: 0.001 of 5 values, 0.006 of 8, not 0.025.

    The middle 95 % of bootstrap draws are too narrow where few values are drawn from; this takes as many more as
    Student's t is wider than the normal (Hesterberg 2015, "What Teachers Should Know About the Bootstrap", The American
    Statistician 69:371-386).

    Args:
        n: Values, or groups of them, that are drawn from; 2 or more.
    """
    from scipy import stats

    wide = math.sqrt(n / (n - 1)) * stats.t.ppf(0.5 + LEVEL / 2, n - 1)
    return float(stats.norm.cdf(-wide))


def _t_interval(data: np.ndarray[Any, np.dtype[np.float64]], method: str) -> Interval:
    from scipy import stats

    mean = float(data.mean())
    if np.all(data == data[0]):
        mean = float(data[0])  # the mean of n equal numbers may differ from them in the last bit
        return Interval(mean, mean, method)
    half = float(stats.t.ppf(0.5 + LEVEL / 2, len(data) - 1) * data.std(ddof=1) / math.sqrt(len(data)))
    return Interval(mean - half, mean + half, method)


def _bca_interval(data: np.ndarray[Any, np.dtype[np.float64]], n_resamples: int) -> Interval | None:
    if np.all(data == data[0]):
        return None
    from scipy import stats

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns where BCa is undefined; its NaN is what we go by
        found = stats.bootstrap(
            (data,),
            np.mean,
            n_resamples=n_resamples,
            confidence_level=LEVEL,
            method="BCa",
            rng=np.random.default_rng(_BOOTSTRAP_SEED),
        ).confidence_interval
    low, high = float(found.low), float(found.high)
    return Interval(low, high, "bca") if math.isfinite(low) and math.isfinite(high) else None


def _verdict(interval: Interval | None, lower_is_better: bool) -> str:
    if interval is None:
        return TOO_FEW
    if interval.high < 0.0:
        return BETTER if lower_is_better else WORSE
    if interval.low > 0.0:
        return WORSE if lower_is_better else BETTER
    return NO_DIFFERENCE
