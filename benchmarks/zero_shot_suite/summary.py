"""From the runs that are kept to the figures of the tables, as JSON types.

Called by zero_shot.py --table. A ratio is the mean test loss of an arm's runs over the mean test loss of the
reference's report runs; over parts the geometric mean is taken.

Intervals: of a geometric mean, bootstrap over tasks (parts of one task together); of search-equivalent runs, over tasks
and, inside each, over seeds; of several brains together, over tasks and brains. Each is of 95 % for itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from zero_shot_suite import figures
from zero_shot_suite.arms import DRAWN, TUNED
from zero_shot_suite.parts import SEARCHED, tuned_grid
from zero_shot_suite.plan import COLUMNS, DIVERGED, Job, planned_jobs, score, search_grid, tuned_rates
from zero_shot_suite.store import Kept

__all__ = ["summarize"]

Floats = npt.NDArray[np.float64]

_N_TASKS = 10_000  # resamples over tasks: cheap
_N_SEEDS = 4_000  # resamples over tasks and seeds
_N_CURVES = 300  # of a part's random search
GOALS = {"ratio": 1.02, "worst": 1.10, "search_equivalent": 30.0, "time_to_target": 0.6}


@dataclass(frozen=True)
class _Column:
    """One part under one way of choosing weights: "final", "best" or "averaged".

    Attributes:
        kept: The part.
        losses: Arm -> its test loss with each report seed; (n,).
        initial_rates: Arm -> the initial rate of each of those runs.
        tuned: Tuned arm -> its rate.
        best_arm: The tuned arm with the least validation loss on the choosing seeds that all of them have.
        pool: Validation and test losses of cosine at the rates of the random search; each (rates, seeds).
    """

    kept: Kept
    losses: dict[str, Floats]
    initial_rates: dict[str, list[float]]
    tuned: dict[str, float]
    best_arm: str
    pool: tuple[Floats, Floats]

    @property
    def reference(self) -> float:
        """Mean test loss of tuned cosine."""
        return float(self.losses["cosine"].mean())

    @property
    def best_reference(self) -> float:
        """Mean test loss of the best-tuned arm."""
        return float(self.losses[self.best_arm].mean())

    @functools.cached_property
    def curve(self) -> Floats:
        """Random search over cosine's rate, as a ratio to tuned cosine; (N,)."""
        return figures.search_curve(*(losses.ravel() for losses in self.pool)) / self.reference

    @functools.cached_property
    def resampled_curves(self) -> Floats:
        """Logarithms of the same from seeds drawn anew, so often that it is enough to draw among them; (_, N)."""
        n_seeds = self.pool[0].shape[1]
        generator = np.random.default_rng(0)
        curves = []
        for _ in range(_N_CURVES):
            drawn = generator.integers(0, n_seeds, n_seeds)
            curves.append(figures.search_curve(*(losses[:, drawn].ravel() for losses in self.pool)) / self.reference)
        return np.log(np.stack(curves))

    def ratio(self, arm: str, reference: str | None = None) -> float:
        """Mean test loss of an arm over that of another; None: of tuned cosine."""
        return float(self.losses[arm].mean() / self.losses[reference or "cosine"].mean())

    def resampled_ratio(self, arm: str, generator: np.random.Generator) -> float:
        """Ratio to tuned cosine, from report seeds drawn anew; tuned cosine as it is."""
        losses = self.losses[arm]
        return float(losses[generator.integers(0, len(losses), len(losses))].mean() / self.reference)


def _column(kept: Kept, column: str) -> _Column | None:
    """None while a tuned arm of the part is not complete."""
    part, options, runs = kept.part, kept.options, kept.runs
    val_name, test_name = COLUMNS[column]
    tuned = {arm: (tuned_rates(part, options, arm, runs) or {}).get(column) for arm in TUNED}
    losses: dict[str, Floats] = {}
    initial_rates: dict[str, list[float]] = {}
    for arm, rate in tuned.items():
        keys = [Job(arm, rate or 0.0, "report", index).key for index in range(options.seeds)]
        if rate is None or any(key not in runs for key in keys):
            return None
        losses[arm] = np.array([score(runs[key], test_name) for key in keys])
        initial_rates[arm] = [rate] * options.seeds
    planned = planned_jobs(part, options, kept.brains, runs)
    for arm in (*DRAWN, *(f"brain:{name}" for name in kept.brains)):
        jobs = sorted((job for job in planned if job.arm == arm), key=lambda job: job.index)
        found = [runs.get(job.key) for job in jobs]
        if any(run is None or (column != "final" and run["best_step"] is None) for run in found):
            continue  # not run, or it has no validation loss
        losses[arm] = np.array([score(run, test_name) for run in found if run is not None])
        initial_rates[arm] = [job.rate for job in jobs]
    known = {arm: rate for arm, rate in tuned.items() if rate is not None}
    chosen = {
        arm: np.mean([score(runs[Job(arm, rate, "choose", i).key], val_name) for i in range(options.other_seeds)])
        for arm, rate in known.items()
    }
    cosine = [
        [runs[Job("cosine", rate, "choose", i).key] for i in range(options.seeds)]
        for rate in search_grid(part, options)
    ]
    pool = (
        np.array([[score(run, val_name) for run in row] for row in cosine]),
        np.array([[score(run, test_name) for run in row] for row in cosine]),
    )
    best_arm = min(chosen, key=lambda arm: (chosen[arm], arm))
    return _Column(kept, losses, initial_rates, known, best_arm, pool)


def summarize(parts: Sequence[Kept], show: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """All figures of the tables.

    Args:
        parts: What is kept; a part that lacks runs of a tuned arm is named and left out.
        show: Told what is worked out at the moment: the intervals of all parts take a minute.

    Returns:
        head, incomplete (names), and for each of "final", "best" and "averaged": parts (a list), arms (arm -> figures
        over parts), brains (figures of all brains together; None without two), differences, goals.
    """
    summary: dict[str, Any] = {"head": _head(parts), "incomplete": []}
    for column in COLUMNS:
        made = [(kept.part.name, _column(kept, column)) for kept in parts]
        summary["incomplete"] = [name for name, item in made if item is None]
        columns = [item for _, item in made if item is not None]
        summary[column] = _over_parts(columns, column, show) if columns else None
    if summary["final"] is not None:
        _compare_averaging(summary["best"], summary["averaged"])
    return summary


def _compare_averaging(best: dict[str, Any], averaged: dict[str, Any]) -> None:
    """Add what averaging is worth: an arm with it over tuned cosine without."""
    for arm, row in averaged["arms"].items():
        pairs = [
            (part["arms"][arm]["test_loss"] / other["tuned_cosine_loss"], part["task"])
            for part, other in zip(averaged["parts"], best["parts"], strict=True)
            if arm in part["arms"]
        ]
        row["over_best_weights"] = _mean_and_interval([ratio for ratio, _ in pairs], [task for _, task in pairs])


def _head(parts: Sequence[Kept]) -> dict[str, Any]:
    first = parts[0]
    return {
        "machine": first.machine,
        "machines": len({str(sorted(kept.machine.items())) for kept in parts}),
        "options": {kept.part.name: kept.options.to_json() for kept in parts},
        "is_trial": any(kept.options.is_trial for kept in parts),
        "cpu_s": sum(kept.seconds for kept in parts),
        "runs": sum(len(kept.runs) for kept in parts),
        "largest_run_s": max(run["seconds"] for kept in parts for run in kept.runs.values()),
        "arms": {arm: sorted({kept.arms[arm] for kept in parts if arm in kept.arms}) for arm in _arms_of(parts)},
    }


def _arms_of(parts: Sequence[Kept]) -> list[str]:
    return list(dict.fromkeys(arm for kept in parts for arm in kept.arms))


def _over_parts(columns: Sequence[_Column], column: str, show: Callable[[str], None]) -> dict[str, Any]:
    arms = [arm for arm in dict.fromkeys(arm for c in columns for arm in c.losses)]
    rows = {}
    for index, arm in enumerate(arms):
        show(f"intervals, {column} weights: arm {index + 1} of {len(arms)}")
        rows[arm] = _arm_row(arm, columns, column)
    data: dict[str, Any] = {
        "parts": [_part_row(item, column) for item in columns],
        "arms": rows,
        "cosine_at_random": _search_row(columns),
        "brains": _brains(columns),
    }
    ours = [arm for arm in arms if arm in ("default", "default-loss") or arm.startswith("brain:")]
    against = ("uwhg", "default-cosine", "prodigy-cosine", "placebo:default", "yoked:default")
    data["differences"] = [
        _difference(arm, other, columns) for arm in ours for other in against if all(other in c.losses for c in columns)
    ]
    data["goals"] = {arm: _goals(arm, data) for arm in ours if data["arms"][arm]["n_parts"] == len(columns)}
    return data


def _part_row(item: _Column, column: str) -> dict[str, Any]:
    kept = item.kept
    grid = tuned_grid(kept.part, kept.options)
    arms = {}
    for arm, losses in item.losses.items():
        is_tuned = arm in TUNED
        arms[arm] = {
            "ratio": item.ratio(arm),
            "over_best": float(losses.mean() / item.best_reference),
            "test_loss": float(losses.mean()),
            "stderr": float(losses.std(ddof=1) / math.sqrt(len(losses))),
            "search_equivalent": None if is_tuned else figures.crossing(item.curve, item.ratio(arm)),
            "time_to_target": _time(arm, [item]) if column == "final" else None,
            "budget": _budget(arm, item) if arm.startswith("brain:") else None,
        }
    return {
        "part": kept.part.name,
        "task": kept.part.task_name,
        "optimizer": kept.part.task().optimizer,
        "total_steps": kept.part.task().total_steps,
        "seconds_a_run": kept.seconds / len(kept.runs),
        "runs": len(kept.runs),
        "tuned_cosine_loss": item.reference,
        "tuned_rates": item.tuned,
        "at_edge": [arm for arm, rate in item.tuned.items() if rate in (grid[0], grid[-1])],
        "best_arm": item.best_arm,
        "diverged": _diverged(item, COLUMNS[column][1]),
        "cosine_at_random": float(item.curve[0]),
        "arms": arms,
    }


def _budget(arm: str, item: _Column) -> dict[str, Any] | None:
    """What a brain's report runs took, means over runs; None of runs that were made before it was kept."""
    runs = [run for run in item.kept.runs.values() if run["arm"] == arm and "spent" in run]
    if not runs:
        return None
    means = {name: float(np.mean([run[name] for run in runs])) for name in ("steps", "samples", "flops")}
    share = float(np.mean([run["spent"] for run in runs])) / item.kept.part.task().total_steps
    return {**means, "share": share, "masked": sorted({name for run in runs for name in run["masked"]})}


def _diverged(item: _Column, name: str) -> dict[str, int]:
    """Arm -> how many of its report runs count as diverged."""
    counts: dict[str, int] = {}
    for run in item.kept.runs.values():
        if run["role"] == "report" and run["arm"] in item.losses and _is_beyond(run, name):
            counts[run["arm"]] = counts.get(run["arm"], 0) + 1
    return counts


def _is_beyond(run: dict[str, Any], name: str) -> bool:
    return score(run, name) >= DIVERGED * run["val0"]


def _of(arm: str, columns: Sequence[_Column]) -> list[_Column]:
    return [item for item in columns if arm in item.losses]


def _mean_and_interval(ratios: Sequence[float], tasks: Sequence[str]) -> dict[str, Any]:
    logs = np.log(np.asarray(ratios))

    def figure(drawn: list[int], _: np.random.Generator) -> float:
        return float(logs[drawn].mean())

    found = figures.bootstrap_groups(tasks, figure, n=_N_TASKS)
    ends = None if found is None else [math.exp(found[0]), math.exp(found[1])]
    return {"mean": figures.geometric_mean(ratios), "interval": ends}


def _arm_row(arm: str, columns: Sequence[_Column], column: str) -> dict[str, Any]:
    mine = _of(arm, columns)
    tasks = [item.kept.part.task_name for item in mine]
    ratios = [item.ratio(arm) for item in mine]
    worst = int(np.argmax(ratios))
    over_best = [float(item.losses[arm].mean() / item.best_reference) for item in mine]
    row = {
        "n_parts": len(mine),
        "ratio": _mean_and_interval(ratios, tasks),
        "over_best": _mean_and_interval(over_best, tasks),
        "worst": {"ratio": ratios[worst], "part": mine[worst].kept.part.name},
        "worst_over_best": max(over_best),
        "by_decade": _by_decade(arm, mine) if arm not in TUNED else None,
        "time_to_target": _time(arm, mine) if column == "final" else None,
        "search_equivalent": None,
    }
    if arm not in TUNED:
        row["search_equivalent"] = _search_equivalent(arm, mine, tasks)
    return row


def _by_decade(arm: str, columns: Sequence[_Column]) -> dict[str, float]:
    """Geometric mean over parts of the mean test loss of runs from a decade of initial rates, over tuned cosine."""
    found = {}
    for low in range(int(SEARCHED[0]), int(SEARCHED[1])):
        ratios = []
        for item in columns:
            is_in = np.array([low <= math.log10(rate) < low + 1 for rate in item.initial_rates[arm]])
            if is_in.any():
                ratios.append(float(item.losses[arm][is_in].mean()) / item.reference)
        if ratios:
            found[f"1e{low}..1e{low + 1}"] = figures.geometric_mean(ratios)
    return found


def _time(arm: str, columns: Sequence[_Column]) -> float | None:
    """Median over all runs of the share of the budget at which tuned cosine's end with the same seed was reached."""
    shares = []
    for item in columns:
        kept = item.kept
        for index, rate in enumerate(item.initial_rates[arm]):
            run = kept.runs[Job(arm, rate, "report", index).key]
            target = score(kept.runs[Job("cosine", item.tuned["cosine"], "report", index).key], "val")
            shares.append(figures.time_to_target(run["curve"], target, kept.part.task().total_steps))
    median = float(np.median(shares))
    return median if math.isfinite(median) else None


def _search_equivalent(arm: str, columns: Sequence[_Column], tasks: Sequence[str]) -> dict[str, Any]:
    """Over parts together: the n at which the geometric means over parts of the search and of ours are equal."""
    logs = np.stack([np.log(item.curve) for item in columns])
    ours = figures.geometric_mean([item.ratio(arm) for item in columns])

    def figure(drawn: list[int], generator: np.random.Generator) -> float:
        curves = [columns[index].resampled_curves[generator.integers(_N_CURVES)] for index in drawn]
        ratios = [columns[index].resampled_ratio(arm, generator) for index in drawn]
        return figures.crossing(np.exp(np.mean(curves, axis=0)), figures.geometric_mean(ratios))

    found = figures.bootstrap_groups(tasks, figure, n=_N_SEEDS)
    each = [figures.crossing(item.curve, item.ratio(arm)) for item in columns]
    return {
        "runs": figures.crossing(np.exp(logs.mean(axis=0)), ours),
        "interval": None if found is None else list(found),
        "median_of_parts": float(np.median(each)),
    }


def _search_row(columns: Sequence[_Column]) -> dict[str, float]:
    """Random search over cosine's rate: geometric mean over parts after 1, 3, 10, ... runs."""
    curve = np.exp(np.mean([np.log(item.curve) for item in columns], axis=0))
    return {str(n): float(curve[int(np.searchsorted(figures.NS, n))]) for n in (1, 3, 10, 30, figures.CAP)}


def _difference(arm: str, other: str, columns: Sequence[_Column]) -> dict[str, Any]:
    mine = _of(arm, columns)
    ratios = [item.ratio(arm, other) for item in mine]
    return {"arm": arm, "other": other, **_mean_and_interval(ratios, [item.kept.part.task_name for item in mine])}


def _brains(columns: Sequence[_Column]) -> dict[str, Any] | None:
    """All brains together, with an interval over tasks and over brains."""
    names = [arm for arm in dict.fromkeys(arm for c in columns for arm in c.losses) if arm.startswith("brain:")]
    complete = [arm for arm in names if all(arm in item.losses for item in columns)]
    if len(complete) < 2:
        return None
    logs = np.log([[item.ratio(arm) for arm in complete] for item in columns])  # (P, brains)
    rule = np.log([item.ratio("uwhg") for item in columns]) if all("uwhg" in c.losses for c in columns) else None
    tasks = [item.kept.part.task_name for item in columns]

    def both(table: Floats) -> Callable[[list[int], np.random.Generator], float]:
        def figure(drawn: list[int], generator: np.random.Generator) -> float:
            return float(table[drawn][:, generator.integers(0, len(complete), len(complete))].mean())

        return figure

    rows: dict[str, Any] = {"names": complete}
    for key, table in (("ratio", logs), ("over_uwhg", None if rule is None else logs - rule[:, None])):
        if table is not None:
            found = figures.bootstrap_groups(tasks, both(table), n=_N_TASKS)
            ends = None if found is None else [math.exp(end) for end in found]
            rows[key] = {"mean": math.exp(float(table.mean())), "interval": ends}
    return rows


def _goals(arm: str, data: dict[str, Any]) -> dict[str, bool | None]:
    """Goal -> whether it is reached; None where nothing can be said."""
    row = data["arms"][arm]
    rule = next((row for row in data["differences"] if (row["arm"], row["other"]) == (arm, "uwhg")), None)
    over_rule = None if rule is None or rule["interval"] is None else rule["interval"][1] < 1.0
    time = row["time_to_target"]
    return {
        "ratio": row["ratio"]["mean"] <= GOALS["ratio"],
        "worst": row["worst"]["ratio"] <= GOALS["worst"],
        "search_equivalent": row["search_equivalent"]["runs"] >= GOALS["search_equivalent"],
        "better_than_uwhg": over_rule,
        "time_to_target": time is not None and time <= GOALS["time_to_target"],
    }
