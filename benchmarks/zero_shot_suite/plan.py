"""The plan of a part: which runs are made, in which order, and which rate an arm is tuned to.

Called by zero_shot.py (what to run next) and by the summary (which of the runs that are kept count). All of it is a
function of the options and of the runs there are, so that a part that was interrupted goes on where it was.

1. Cosine at every rate of the grid, with all choosing seeds; the other tuned arms at every second rate, with half of
   their choosing seeds; every arm of ours, once for each report seed and its drawn rate.
2. The other tuned arms at their best rate and its two neighbours, with all their choosing seeds. The twins.
3. The tuned arms at their chosen rates, with all report seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from zero_shot_suite.arms import DRAWN, TUNED
from zero_shot_suite.parts import SEARCHED, Options, Part, drawn_rates, rate_grid, tuned_grid

__all__ = ["COLUMNS", "DIVERGED", "Job", "choose_rate", "count_jobs", "next_jobs", "planned_jobs", "score"]

Run = Mapping[str, Any]
Runs = Mapping[str, Run]

# Column of the tables -> what chooses a rate, and what is reported.
COLUMNS = {
    "final": ("val", "test"),
    "best": ("best_val", "best_test"),
    "averaged": ("kept_val", "kept_test"),  # the best ones, or the average at the end where validation prefers it
}
# A loss that is not finite, or more than this many times the validation loss at the run's start (the guard's own mark
# of divergence), counts as this many times that: of every arm alike, or one diverged run would decide about a mean.
DIVERGED = 2.0


@dataclass(frozen=True)
class Job:
    """One run: an arm at an initial rate with one seed of a role ("choose" or "report")."""

    arm: str
    rate: float
    role: str
    index: int

    @property
    def key(self) -> str:
        """Under which its result is kept."""
        return f"{self.arm} {self.rate:.4g} {self.role} {self.index}"


def score(run: Run, name: str) -> float:
    """A loss of a run, as it is counted; see `DIVERGED`.

    Args:
        run: What `run_job` returned.
        name: "val", "test", "best_val", "best_test", "kept_val" or "kept_test"; the last two are of the average of
            the weights where its validation loss is the lower one, and else of the best weights.
    """
    which, _, kind = name.rpartition("_")
    if which == "kept":
        is_better = score(run, "average_val") < score(run, "best_val")
        name = f"{'average' if is_better else 'best'}_{kind}"
    limit = DIVERGED * run["val0"]
    value = run[name]
    return float(limit if value is None else min(value, limit))


def choose_rate(runs: Runs, arm: str, rates: Iterable[float], n_seeds: int, name: str) -> float | None:
    """The rate with the least mean validation loss over the choosing seeds; None while a run is missing.

    Args:
        runs: What is kept.
        arm: A tuned arm.
        rates: Among which.
        n_seeds: Choosing seeds.
        name: "val" or "best_val".
    """
    means = {}
    for rate in rates:
        keys = [Job(arm, rate, "choose", index).key for index in range(n_seeds)]
        if any(key not in runs for key in keys):
            return None
        means[rate] = np.mean([score(runs[key], name) for key in keys])
    return min(means, key=lambda rate: (means[rate], rate))


def _near(part: Part, options: Options, arm: str, runs: Runs) -> list[float] | None:
    """The rates at which an arm is tuned with all its seeds; None while they are not known."""
    grid = tuned_grid(part, options)
    if arm == "cosine":
        return grid
    best = choose_rate(runs, arm, grid[::2], max(1, options.other_seeds // 2), "val")
    if best is None:
        return None
    place = grid.index(best)
    return grid[max(0, place - 1) : place + 2]


def tuned_rates(part: Part, options: Options, arm: str, runs: Runs) -> dict[str, float] | None:
    """The rate that a tuned arm is reported at, a column; None while it is not known."""
    near = _near(part, options, arm, runs)
    if near is None:
        return None
    n_seeds = options.seeds if arm == "cosine" else options.other_seeds
    found = {column: choose_rate(runs, arm, near, n_seeds, names[0]) for column, names in COLUMNS.items()}
    known = {column: rate for column, rate in found.items() if rate is not None}
    return known if len(known) == len(found) else None


def search_grid(part: Part, options: Options) -> list[float]:
    """The rates that stand for the random search over cosine's rate."""
    del part
    return rate_grid(SEARCHED, options.rates)


def _tuned_jobs(part: Part, options: Options, arm: str, runs: Runs) -> list[Job]:
    choosing, grid = range(options.seeds), tuned_grid(part, options)
    if arm == "cosine":
        rates = sorted({*grid, *search_grid(part, options)})
        jobs = [Job(arm, rate, "choose", index) for rate in rates for index in choosing]
    else:
        few = max(1, options.other_seeds // 2)
        jobs = [Job(arm, rate, "choose", index) for rate in grid[::2] for index in range(few)]
        near = _near(part, options, arm, runs) or []
        jobs += [Job(arm, rate, "choose", index) for rate in near for index in range(options.other_seeds)]
    chosen = tuned_rates(part, options, arm, runs) or {}
    jobs += [Job(arm, rate, "report", index) for rate in sorted({*chosen.values()}) for index in range(options.seeds)]
    return jobs


def planned_jobs(part: Part, options: Options, brains: Iterable[str], runs: Runs) -> list[Job]:
    """Every run of a part that is known by now to be wanted, in order, each once.

    Args:
        part: The part.
        options: How much is run.
        brains: NAMEs of the arms brain:NAME.
        runs: What is kept; decides about rates that were not chosen before.
    """
    jobs = [job for arm in TUNED for job in _tuned_jobs(part, options, arm, runs)]
    rates = drawn_rates(part, options.seeds)
    for arm in (*DRAWN, *(f"brain:{name}" for name in brains)):
        for index in range(options.seeds):
            # A twin starts from the rate of the run that it replays.
            source = (index + 1) % options.seeds if arm.startswith("yoked:") else index
            jobs.append(Job(arm, rates[source], "report", index))
    return list(dict.fromkeys(jobs))


def partner(job: Job, options: Options) -> Job | None:
    """The run that a twin replays; None for every other arm."""
    prefix, _, of = job.arm.partition(":")
    return Job(of, job.rate, "report", (job.index + 1) % options.seeds) if prefix == "yoked" else None


def next_jobs(part: Part, options: Options, brains: Iterable[str], runs: Runs) -> list[Job]:
    """The wanted runs that are not there and could be made now; none when the part is complete."""
    missing = [job for job in planned_jobs(part, options, brains, runs) if job.key not in runs]
    ready = []
    for job in missing:
        replayed = partner(job, options)
        if replayed is None or replayed.key in runs:
            ready.append(job)
    return ready


def count_jobs(part: Part, options: Options, n_brains: int) -> int:
    """Runs of a whole part, for the time left: tuned arms are taken to be reported at one and a half rates each."""
    grid = {*tuned_grid(part, options), *search_grid(part, options)}
    others = (options.rates // 2) * max(1, options.other_seeds // 2) + 3 * options.other_seeds
    others -= max(1, options.other_seeds // 2)  # the best of the first rates has half of its seeds
    report = len(TUNED) * options.seeds * 3 // 2
    return len(grid) * options.seeds + (len(TUNED) - 1) * others + report + (len(DRAWN) + n_brains) * options.seeds
