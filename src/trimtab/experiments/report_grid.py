"""The tables of a study that was run from several initial rates, made from results.json alone.

Called by report.py. What an arm cost stands beside its name, as in every table that compares arms.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.experiments import words
from trimtab.experiments.document import Table
from trimtab.experiments.grid import DIVERGED
from trimtab.experiments.report_tables import COST, rate

__all__ = ["grid_tables"]

Row = Mapping[str, Any]


def grid_tables(entries: Sequence[Row], rows: Sequence[Row], tuned_arm: str | None) -> list[Table]:
    """The tables of one task; none where it was run from one rate alone.

    Args:
        entries: Of results.json's "grid", those of the task.
        rows: Of results.json's "arms", those of the task.
        tuned_arm: The arm whose rate was tuned, or None.
    """
    if not entries:
        return []
    by_arm = {row["id"]: row for row in rows}
    return [
        _one_run(entries, by_arm, tuned_arm),
        _best_tuned(entries, by_arm, tuned_arm),
        _measures(entries, by_arm),
    ]


def _one_run(entries: Sequence[Row], rows: Mapping[str, Row], tuned_arm: str | None) -> Table:
    ordered = sorted(entries, key=lambda entry: (bool(entry["missing_lrs"]), entry["one_run"]["mean"], entry["id"]))
    tuned = rows.get(tuned_arm or "")
    table = [
        [
            entry["id"],
            words.cost(rows[entry["id"]]["cost"]),
            _rates(entry),
            _mean(entry["one_run"]),
            str(entry["n_diverged"]),
            _mean(entry["one_run"]["over_tuned"]),
            _mean(entry["one_run"]["over_yoked"]),
        ]
        for entry in ordered
    ]
    price = f" ({tuned_arm}: {words.cost(tuned['cost'])})" if tuned is not None else ""
    caption = (
        "What one run gives: mean test loss from a rate of the grid drawn at random, each as likely. Interval of 95 %: "
        "bootstrap over rates and seeds, each drawn with replacement by itself, widened for their small number; under "
        "five seeds, or five rates, there is none. An arm that lacks runs from a rate stands last, without what "
        "needs them all. "
        f"A loss that is not finite, or above {DIVERGED:g} times the validation loss before training, counts as that: "
        f"such runs are the diverged ones. Ratios are of means over the same seeds{price}: below one is a gain."
    )
    columns = ["arm", COST, "rates x seeds", "mean test loss", "diverged"]
    return Table(caption, [*columns, "over the tuned schedule", "over its yoked twin"], table)


def _best_tuned(entries: Sequence[Row], rows: Mapping[str, Row], tuned_arm: str | None) -> Table:
    known = [entry for entry in entries if entry["best_tuned"] is not None]
    ordered = sorted(known, key=lambda entry: (entry["best_tuned"]["test_loss"]["mean"], entry["id"]))
    table = [_tuned_row(rows[tuned_arm])] if tuned_arm is not None and tuned_arm in rows else []
    for entry in ordered:
        found = entry["best_tuned"]
        ratio = found["over_tuned"]
        table.append(
            [
                entry["id"],
                words.cost(rows[entry["id"]]["cost"]),
                _price(found),
                _chosen(found["initial_lrs"]),
                words.summary(found["test_loss"]),
                "–" if ratio is None else words.number(ratio),
            ]
        )
    caption = (
        "Best-tuned: for each seed the rate with the lowest mean final validation loss over the other seeds, and at it "
        "the test loss of this seed. The price is the runs that one such choice takes; it comes on top of the cost "
        "before use. The choices of two seeds share most of their runs, so that these intervals are a little too "
        "narrow; ratios are of means, without an interval."
    )
    if tuned_arm in rows:
        caption += f" First {tuned_arm}, whose rate was chosen on seeds of its own, and whose price is its cost."
    name = tuned_arm or "the tuned schedule"
    return Table(caption, ["arm", COST, "price of tuning", "rates chosen", "test loss", f"over {name}"], table)


def _tuned_row(row: Row) -> list[str]:
    loss = row["metrics"]["test_loss"]
    chosen = f"{rate(row['initial_lr'])} ({loss['n']})"
    return [row["id"], words.cost(row["cost"]), "in its cost", chosen, words.summary(loss), "1"]


def _measures(entries: Sequence[Row], rows: Mapping[str, Row]) -> Table:
    table = []
    for entry in entries:
        n_runs = len(entry["initial_lrs"]) * len(entry["seeds"])
        steps, n_reached = entry["steps_to_threshold"], entry["n_reached"]
        convergence = "not by half of the runs" if steps is None else words.number(steps)
        table.append(
            [
                entry["id"],
                words.cost(rows[entry["id"]]["cost"]),
                "–" if entry["total_train_time"] is None else words.number(entry["total_train_time"]),
                "–" if n_reached is None else convergence,
                "–" if n_reached is None else f"{n_reached} of {n_runs}",
                words.number(entry["test_accuracy"]),
                words.number(entry["final_val_loss"]),
                "takes no rate" if entry["initial_lrs"] == [None] else words.number(entry["robustness"], digits=3),
            ]
        )
    caption = (
        "The measures of the study, means over all rates and seeds. Training time: validations included, runs to learn "
        "from left out. Convergence: median optimizer steps to the threshold that the table of speed names, a run that "
        "never gets there counting as the last (a dash: there is none); it shows at the next validation. Final "
        f"validation loss: diverged runs count as {DIVERGED:g} times what they began with, as above. Robustness: worst "
        "of its means over the best, by initial rate."
    )
    columns = ["arm", COST, "training time, s", "convergence, steps", "reached by", "test accuracy"]
    return Table(caption, [*columns, "final validation loss", "robustness: worst / best"], table)


def _rates(entry: Row) -> str:
    if entry["initial_lrs"] == [None]:
        return f"takes no rate x {len(entry['seeds'])}"
    n_rates = len(entry["initial_lrs"])
    of = f" of {n_rates + len(entry['missing_lrs'])}" if entry["missing_lrs"] else ""
    return f"{n_rates}{of} x {len(entry['seeds'])}"


def _mean(entry: Row | None) -> str:
    if entry is None:
        return "–"
    return f"{words.number(entry['mean'])} {words.interval(entry['interval'])}".strip()


def _price(found: Row) -> str:
    if not found["runs"]:
        return "none: it takes no rate"
    text = words.count(found["runs"], "run")
    return text + (
        f", and {words.count(found['learning_runs'], 'run')} to learn from" if found["learning_runs"] else ""
    )


def _chosen(rates: Sequence[float | None]) -> str:
    """Rates and how often each was chosen, as in "0.001 (4), 0.01 (1)"."""
    if None in rates:
        return "–"
    counts = Counter(value for value in rates if value is not None)
    return ", ".join(f"{rate(value)} ({n})" for value, n in sorted(counts.items()))
