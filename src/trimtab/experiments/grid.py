"""What an arm gives from every initial rate: one run from a rate that nobody tuned, and the best rate with its price.

Called by results.py, for studies with several initial rates. Everything is counted over the grid of rates x seeds that
an arm was run on; an arm that takes no rate has a grid of one row, since it gives the same whatever rate is written.

A loss that is not finite, or above `DIVERGED` times the validation loss before training, counts as that much: a run
that blew up must cost its arm something, but not outweigh all others; benchmarks/zero_shot.py counts alike.

    one run     mean over the grid. Interval: bootstrap, rates and seeds drawn with replacement, each by itself, and the
                mean taken over the drawn rows and columns; 9,999 draws. Of a ratio, both sides have the same draws, so
                that a seed that is hard for both does not count twice. Percentiles of so few rates and seeds are too
                narrow: of 1,000 grids of 5 x 5 normal numbers the middle 95 % of the draws held the true mean in 84 %.
                So they are taken further out (expanded percentiles, Hesterberg 2015, "What Teachers Should Know About
                the Bootstrap", The American Statistician 69:371-386), as far as Student's t is wider than the normal:
                then 94 % did, of ratios 93 %, of single rows of 5 seeds 92 %, of their ratios 91 %. Below five seeds,
                and below five rates where there is more than one, there is no interval.
    best-tuned  for every seed the rate with the lowest mean final validation loss over the *other* seeds, and at it the
                test loss of this seed: no rate is chosen on the seed that it is reported on. The price of one such
                choice is the runs on the other seeds. The means over seeds share most of these runs, so that their
                interval is a little too narrow.
    robustness  worst over best of the mean final validation losses, by rate, as they count: a rate from which runs blow
                up makes an arm less robust, and must not fall out of the number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.experiments.metrics import threshold_crossing
from trimtab.experiments.plan import choose_rate
from trimtab.experiments.reading import Arm, Run, StudyFolder
from trimtab.experiments.stats import MIN_SEEDS, expanded_tail, is_finite, summarize

__all__ = ["DIVERGED", "collect_grid"]

Floats = npt.NDArray[np.float64]

DIVERGED = 2.0
_N_RESAMPLES = 9_999
_SEED = 20261122  # fixed, so that a report written twice says the same
_ROLES = ("report", "sensitivity")


class _Grid:
    """One arm's runs on one task, by rate and seed.

    Attributes:
        rates: Ascending; one None where the arm takes no rate.
        seeds: Those that every rate has a finished run of, ascending.
        test: Test losses as they count; (rates, seeds).
        val: Final validation losses as they count; (rates, seeds).
        runs: The runs, rate after rate.
        n_diverged: Runs whose test loss counts as that of a run that blew up.
    """

    def __init__(self, runs: Sequence[Run], *, takes_rate: bool) -> None:
        cells: dict[float | None, dict[int, Run]] = {}
        for run in runs:
            if run.is_over and run.status != "failed" and _start(run) is not None:
                cells.setdefault(run.initial_lr if takes_rate else None, {})[run.seed] = run
        self.rates = sorted(cells, key=lambda rate: rate or 0.0)
        self.seeds = sorted(set.intersection(*(set(row) for row in cells.values()))) if cells else []
        self.runs = [cells[rate][seed] for rate in self.rates for seed in self.seeds]
        shape = (len(self.rates), len(self.seeds))
        self.test = np.array([_counted(run, "test_loss") for run in self.runs]).reshape(shape)
        self.val = np.array([_counted(run, "final_val_loss") for run in self.runs]).reshape(shape)
        self.n_diverged = sum(_counted(run, "test_loss") >= _limit(run) for run in self.runs)

    def columns(self, seeds: Sequence[int]) -> Floats:
        """Test losses of some of the seeds; (rates, len(seeds))."""
        return self.test[:, [self.seeds.index(seed) for seed in seeds]]


def collect_grid(
    study: StudyFolder, rows: Sequence[Mapping[str, Any]], thresholds: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Of each arm on each task what its grid gives; nothing of tasks that were run from one rate alone.

    Args:
        study: What was read.
        rows: The entries of results.json's "arms".
        thresholds: Task -> its entry of "thresholds".
    """
    found = []
    for task in study.tasks:
        grids = {arm.id: _grid_of(study, arm, task) for arm in study.arms}
        if max((len(grid.rates) for grid in grids.values()), default=0) < 2:
            continue
        tuned = grids.get(study.tuned_arm or "")
        for arm in study.arms:
            row = next((row for row in rows if (row["id"], row["task"]) == (arm.id, task)), None)
            if row is not None and arm.id != study.tuned_arm and grids[arm.id].seeds:
                twin = next((grids[a.id] for a in study.arms if a.of == arm.id and a.kind == "yoked"), None)
                missing = _missing(study, arm, task, grids[arm.id])
                found.append(_entry(grids[arm.id], missing, row, tuned, twin, thresholds[task]["value"]))
    return found


def _missing(study: StudyFolder, arm: Arm, task: str, grid: _Grid) -> list[float]:
    """Rates of the plan from which the arm has no finished run: what it gives from the others is not the whole."""
    if grid.rates == [None]:
        return []
    planned = {rate for rate in (*(study.plan.get("sensitivity_lrs") or ()), study.rate(arm, task)) if rate is not None}
    return sorted(planned - set(grid.rates))


def _grid_of(study: StudyFolder, arm: Arm, task: str) -> _Grid:
    roles = ("report",) if arm.id == study.tuned_arm else _ROLES
    runs = [run for role in roles for run in study.of(arm=arm.id, task=task, role=role)]
    return _Grid(runs, takes_rate=not arm.chooses_rate and arm.id != study.tuned_arm)


def _entry(
    grid: _Grid,
    missing: list[float],
    row: Mapping[str, Any],
    tuned: _Grid | None,
    twin: _Grid | None,
    threshold: float | None,
) -> dict[str, Any]:
    crossings = [threshold_crossing(run.series, threshold)[0] for run in grid.runs]
    accuracy = [run.metrics.get("test_accuracy") for run in grid.runs]
    return {
        "id": row["id"],
        "task": row["task"],
        "initial_lrs": grid.rates,
        "missing_lrs": missing,
        "seeds": grid.seeds,
        "test_loss": grid.test.tolist(),
        "n_diverged": grid.n_diverged,
        "final_val_loss": float(grid.val.mean()),
        "robustness": _robustness(grid),
        "test_accuracy": summarize(accuracy).mean,
        "total_train_time": summarize([run.times.get("total_train_time") for run in grid.runs]).mean,
        "steps_to_threshold": _median(crossings),
        "n_reached": None if threshold is None else sum(step is not None for step in crossings),
        "one_run": {
            "mean": float(grid.test.mean()),
            "interval": _interval(grid.test, None),
            "over_tuned": None if missing else _ratio(grid, tuned),
            "over_yoked": _ratio(grid, twin),
        },
        "best_tuned": None if missing else _best_tuned(grid, row, tuned),
    }


def _robustness(grid: _Grid) -> float | None:
    """See the head of the file; None of an arm that takes no rate."""
    means = grid.val.mean(axis=1)
    return float(means.max() / means.min()) if len(means) > 1 and means.min() > 0 else None


def _best_tuned(grid: _Grid, row: Mapping[str, Any], tuned: _Grid | None) -> dict[str, Any] | None:
    """See the head of the file; None where there are no other seeds to choose on."""
    n_rates, n_seeds = grid.test.shape
    if n_rates > 1 and n_seeds < 2:
        return None
    chosen: list[float | None] = []
    values: list[float | None] = []
    for place in range(n_seeds):
        others = np.delete(grid.val, place, axis=1)
        rate = choose_rate({float(k): others[k].tolist() for k in range(n_rates)}) if n_rates > 1 else 0
        at = int(rate or 0)
        chosen.append(grid.rates[at])
        values.append(float(grid.test[at, place]))
    runs = n_rates * (n_seeds - 1) if n_rates > 1 else 0
    over = None
    seeds = [] if tuned is None else [seed for seed in grid.seeds if seed in tuned.seeds]
    if tuned is not None and seeds:
        reference = float(tuned.columns(seeds).mean())
        ours = float(np.mean([values[grid.seeds.index(seed)] for seed in seeds]))
        over = ours / reference if reference > 0 else None
    return {
        "initial_lrs": chosen,
        "runs": runs,
        "learning_runs": runs * int(row["cost"]["learning_runs"]),
        "test_loss": summarize(values).to_json(),
        "over_tuned": over,
    }


def _ratio(grid: _Grid, reference: _Grid | None) -> dict[str, Any] | None:
    """Mean test loss over that of a reference, on the seeds of both; a reference of one rate stands for all rates."""
    if reference is None:
        return None
    seeds = [seed for seed in grid.seeds if seed in reference.seeds]
    if not seeds or reference.rates not in (grid.rates, [None]):
        return None
    ours, theirs = grid.columns(seeds), reference.columns(seeds)
    theirs = np.broadcast_to(theirs, ours.shape)
    if not theirs.mean() > 0:
        return None  # a share of no loss at all
    return {"mean": float(ours.mean() / theirs.mean()), "interval": _interval(ours, theirs)}


def _interval(losses: Floats, reference: Floats | None) -> list[float] | None:
    """95 % of the mean, or of the ratio of two means; None with too few seeds or rates, see the head of the file."""
    n_rates, n_seeds = losses.shape
    fewest = min(n_rates, n_seeds) if n_rates > 1 else n_seeds
    if fewest < MIN_SEEDS:
        return None
    rng = np.random.default_rng(_SEED)
    rates = rng.multinomial(n_rates, np.full(n_rates, 1 / n_rates), _N_RESAMPLES)
    seeds = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), _N_RESAMPLES)
    sums = np.einsum("br,rs,bs->b", rates, losses, seeds)
    below = np.ones_like(losses) if reference is None else reference
    scale = np.einsum("br,rs,bs->b", rates, below, seeds)
    outside = expanded_tail(fewest)
    low, high = np.quantile(sums / scale, [outside, 1 - outside])
    return [float(low), float(high)]


def _median(steps: Sequence[float | None]) -> float | None:
    """Of optimizer steps, where a run that never gets there comes last; None where half of them or more do not."""
    ordered = sorted(math.inf if step is None else step for step in steps)
    middle = ordered[len(ordered) // 2] if ordered else math.inf  # the upper one of two
    return middle if math.isfinite(middle) else None


def _start(run: Run) -> float | None:
    """Validation loss before training; None of a run that wrote none."""
    first = run.series[0].get("val_loss") if run.series else None
    return float(first) if is_finite(first) and first is not None else None


def _limit(run: Run) -> float:
    return DIVERGED * (_start(run) or 0.0)


def _counted(run: Run, name: str) -> float:
    value = run.metrics.get(name)
    return min(float(value), _limit(run)) if is_finite(value) and value is not None else _limit(run)
