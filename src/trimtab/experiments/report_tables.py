"""The tables of a report, made from results.json alone.

Called by report.py. Every table that compares arms has what an arm cost before it was used beside its name, so
that no gain stands there without its price.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.experiments import words
from trimtab.experiments.document import Table

__all__ = ["COST", "plan_table", "rate", "result_tables"]

COST = "cost before use"
_MEANINGS = {
    "tuned": "the tuned schedule",
    "placebo": "its placebo: decisions against none",
    "yoked": "its yoked twin: control against a schedule",
    "user": "your configuration",
    "constant": "the constant rate",
    "default-cosine": "the default rate with cosine",
    "rule": "a rule that learns nothing",
    "same schedule and rate": "its base schedule at the same rate",
    "search": "a search",
    "fewer runs": "the same, with fewer runs to learn from",
    "same agent": "the same agent with other settings",
}

# What an arm brings from before: shown among its options.
_EARLIER = ("brain", "learn_runs", "learn_tasks", "experience")

Row = Mapping[str, Any]


def plan_table(arms: Sequence[Mapping[str, Any]], tasks: Sequence[str], rates: Mapping[tuple[str, str], Any]) -> Table:
    """What each arm is.

    Args:
        arms: Of study.json.
        tasks: Of the study.
        rates: (arm, task) -> initial rate.
    """
    rows = []
    names_knobs = any(list(arm.get("knobs") or ()) not in ([], ["lr"]) for arm in arms)
    for arm in arms:
        given = {
            **(arm.get("options") or {}),
            **{key: arm[key] for key in _EARLIER if _is_learned(arm) and arm.get(key)},
        }
        options = ", ".join(f"{name}={value}" for name, value in given.items())
        knobs = ", ".join(_knob(name, arm) for name in arm.get("knobs") or ("lr",))
        rows.append(
            [
                str(arm["id"]),
                _kind(arm),
                " over ".join(str(name) for name in (arm.get("agent") or arm["id"], arm.get("own_optimizer")) if name),
                str(arm.get("base") or "–"),
                options or "–",
                *([knobs] if names_knobs else []),
                *(rate(rates.get((str(arm["id"]), task))) for task in tasks),
            ]
        )
    columns = ["arm", "kind", "agent", "base schedule", "options", *(["knobs"] if names_knobs else [])]
    columns += [f"initial rate, {task}" for task in tasks]
    return Table(
        "Arms. A dash under the rates: chosen by a search, or not known before a run of the arm has begun.",
        columns,
        rows,
    )


def result_tables(rows: Sequence[Row], threshold: Mapping[str, Any]) -> list[Table]:
    """All tables of one task.

    Args:
        rows: The entries of results.json's "arms" on the task.
        threshold: The task's entry of "thresholds".
    """
    tables = [_outcome(rows), _differences(rows), _budget(rows), _trainer(rows)]
    tables += [_speed(rows, threshold), _control(rows), _searches(rows)]
    tables += [table for table in (_sensitivity(rows),) if table is not None]
    return [table for table in tables if table.rows]


def _kind(arm: Row) -> str:
    """A kind, and of what; of a search how it searches, as in `search (random, 10 trials, budget shared)`."""
    text = str(arm["kind"]) + (f" of {arm['of']}" if arm.get("of") else "")
    search = arm.get("search")
    if not search:
        return text
    parts = [search["method"], *([words.count(search["trials"], "trial")] if search.get("trials") else [])]
    return f"{text} ({', '.join([*parts, 'budget ' + search['budget']])})"


def _is_learned(arm: Row) -> bool:
    return bool(arm["kind"] == "learned")


def _knob(name: str, arm: Row) -> str:
    """A knob and its options, as in `units (high=128, noise=0.01)`."""
    options = ((arm.get("knob_options") or {}).get(name) or {}).items()
    return name + (f" ({', '.join(f'{key}={value}' for key, value in options)})" if options else "")


def rate(value: Any) -> str:
    """An initial rate as people write it."""
    return "–" if value is None else f"{value:g}"


def _outcome(rows: Sequence[Row]) -> Table:
    scores = [
        (name, head)
        for name, head in (("test_accuracy", "test accuracy"), ("test_f1", "test F1"), ("test_mse", "test MSE"))
        if any(row["metrics"][name]["n"] for row in rows)
    ]
    losses = [
        ("test_loss", "test loss"),
        ("best_val_loss", "best validation loss"),
        ("final_val_loss", "final validation loss"),
        ("final_train_loss", "final training loss"),
    ]
    ordered = sorted(rows, key=lambda row: _or_last(row["metrics"]["test_loss"]["mean"]))
    table = [
        [
            row["id"],
            words.cost(row["cost"]),
            rate(row["initial_lr"]),
            _seeds(row["status"]),
            *(words.summary(row["metrics"][name]) for name, _ in [*losses[:1], *scores, *losses[1:]]),
        ]
        for row in ordered
    ]
    heads = [head for _, head in [*losses[:1], *scores, *losses[1:]]]
    caption = "Outcome, by mean test loss. Mean and 95 % interval; under five seeds the range and every value."
    return Table(caption, ["arm", COST, "initial rate", "runs", *heads], table)


def _differences(rows: Sequence[Row]) -> Table:
    table = []
    for row in rows:
        for reference, entry in row["differences"].items():
            table.append(
                [
                    row["id"],
                    words.cost(row["cost"]),
                    f"{reference} ({'; '.join(_MEANINGS[role] for role in entry['roles'])})",
                    words.difference(entry) + _left_out(entry),
                    words.difference(entry["second"]) + _left_out(entry["second"]),
                ]
            )
    return Table(
        "Differences, arm minus reference, paired by seed: below zero is a gain. Only the gain over the yoked twin "
        "speaks for control rather than for a better schedule.",
        ["arm", COST, "gain over", "test loss", "best validation loss"],
        table,
    )


def _left_out(entry: Mapping[str, Any]) -> str:
    n = len(entry["left_out_seeds"])
    return f"; {words.count(n, 'seed')} without a value on both sides left out" if n else ""


def _budget(rows: Sequence[Row]) -> Table:
    """What each arm used of its budget; nothing where it was not recorded."""
    table = []
    for row in rows:
        flops, share = row["metrics"]["flops"], row["metrics"]["budget_used"]
        table.append(
            [
                row["id"],
                words.cost(row["cost"]),
                "–" if flops["mean"] is None else words.number(flops["mean"] / 1e9),
                "–" if share["mean"] is None else f"{share['mean']:.2%}",
                *(_mean(row, name) for name in ("optimizer_steps", "samples", "total_train_time")),
            ]
        )
    caption = (
        "Budget used, means over seeds. Training FLOPs are those of matrix products, convolutions and attention, "
        "forward and backward; a run ends where what is left of its budget pays for no further step."
    )
    columns = ["arm", COST, "training GFLOPs", "share of the budget", "optimizer steps", "samples", "training time, s"]
    return Table(caption, columns, table if any(row["metrics"]["flops"]["n"] for row in rows) else [])


def _trainer(rows: Sequence[Row]) -> Table:
    names = ["eval_loss", "eval_accuracy", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "epoch"]
    shown = [name for name in names if any(row["metrics"][name]["n"] for row in rows)]
    table = [[row["id"], words.cost(row["cost"]), *(_mean(row, name) for name in shown)] for row in rows]
    caption = "Evaluation under the names that trainers use, means over seeds."
    return Table(caption, ["arm", COST, *shown], table if shown else [])


def _speed(rows: Sequence[Row], threshold: Mapping[str, Any]) -> Table:
    columns = [
        ("steps_to_threshold", "steps to threshold"),
        ("epochs_to_threshold", "epochs to threshold"),
        ("steps_to_plateau", "steps to plateau"),
        ("epochs_to_plateau", "epochs to plateau"),
        ("total_train_time", "training time, s"),
        ("avg_inference_tokens_per_second", "tokens per second"),
    ]
    shown = [(name, head) for name, head in columns if any(row["metrics"][name]["n"] for row in rows)]
    differ = len({row["n_validations"] for row in rows} - {None}) > 1
    table = [
        [
            row["id"],
            words.cost(row["cost"]),
            *([words.number(row["n_validations"])] if differ else []),
            *(_mean(row, name) for name, _ in shown),
        ]
        for row in rows
    ]
    if threshold["arm"] is None:
        first = "No threshold: no baseline has a final validation loss."
    else:
        what = "the tuned schedule" if threshold["is_tuned"] else "the best baseline, there being no tuned schedule"
        loss = words.number(threshold["value"])
        first = f"Threshold: {loss}, the mean final validation loss of {threshold['arm']} ({what})."
    caption = (
        f"Speed, means over seeds. {first} Plateau: the first interval from which the validation loss, smoothed over "
        "three, improves by less than 1 % until the end. A mean is given where every seed gets there."
    )
    if differ:
        caption += " Validations: of one run, after its start."
    columns_shown = [*(["validations"] if differ else []), *(head for _, head in shown)]
    return Table(caption, ["arm", COST, *columns_shown], table if shown else [])


def _control(rows: Sequence[Row]) -> Table:
    table = []
    for row in rows:
        spread = row["stability"] or {}
        share = row["metrics"]["controller_share"]["mean"]
        cost = row["cost"]
        table.append(
            [
                row["id"],
                words.cost(cost),
                *(_mean(row, name) for name in ("n_decisions", "n_interventions", "n_rollbacks")),
                "–" if share is None else f"{share:.2%}",
                ", ".join(f"{knob} {value:.3f}" for knob, value in spread.items()) or "–",
                "–" if cost["uses_to_pay_back"] is None else f"{cost['uses_to_pay_back']:g}",
                cost["uses_to_pay_back_why"],
            ]
        )
    return Table(
        "Control, means over seeds. Spread of the knobs: mean over the run of the standard deviation across seeds of "
        "log10 of the knob (0.3 is a factor of two). Pays back after: training runs until the tuning runs that the "
        "arm saves have cost as much as learning it.",
        ["arm", COST, "decisions", "interventions", "rollbacks", "controller's share of time", "spread of knobs",
         "pays back after", "because"],
        table,
    )  # fmt: skip


def _searches(rows: Sequence[Row]) -> Table:
    """What searches found, a line for each seed."""
    table = []
    for row in rows:
        found = row.get("search") or {"seeds": []}
        for place, seed in enumerate(found["seeds"]):
            values, trials = found["values"][place], found["trials"][place]
            aside = [(found["pruned"][place], "stopped"), (found["idle"][place], "without a step")]
            table.append(
                [
                    row["id"],
                    words.cost(row["cost"]),
                    str(seed),
                    "–" if trials is None else ", ".join([f"{trials}", *(f"{n} {what}" for n, what in aside if n)]),
                    ", ".join(f"{name} {_value(value)}" for name, value in (values or {}).items()) or "–",
                    _of_seed(row["metrics"]["final_val_loss"], row["seeds"], seed),
                    _of_seed(found["one_run_val_loss"], found["seeds"], seed),
                ]
            )
    return Table(
        "Searches, seed by seed. The winner is the trial with the lowest validation loss at its end; it alone is read "
        "on test. One run: the first trial, with values drawn at random and, of a shared "
        "budget, its share.",
        ["arm", COST, "seed", "trials", "values of the winner", "final validation loss", "that of one run"],
        table,
    )


def _of_seed(entry: Row, seeds: Sequence[int], seed: int) -> str:
    return words.number(entry["values"][list(seeds).index(seed)])


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _sensitivity(rows: Sequence[Row]) -> Table | None:
    known = [row for row in rows if row["sensitivity"]]
    if not known:
        return None
    rates = sorted({value for row in known for value in row["sensitivity"]["initial_lrs"]})
    table = []
    for row in known:
        entry = row["sensitivity"]
        found = dict(
            zip(
                entry["initial_lrs"],
                zip(entry["final_val_loss"], entry["runs_without_a_finite_loss"], strict=True),
                strict=True,
            )
        )
        table.append(
            [
                row["id"],
                words.cost(row["cost"]),
                words.number(entry["worst_over_best"], digits=3),
                words.number(entry["geometric_spread"], digits=3),
                *(_rate_cell(found.get(value)) for value in rates),
                str(len(entry["seeds"])),
            ]
        )
    return Table(
        "Sensitivity to the initial rate: mean final validation loss by initial rate, over the seeds that all rates "
        "of the arm share; geometric spread is exp of the standard deviation of their logarithms.",
        ["arm", COST, "worst / best", "geometric spread", *(f"from {value:g}" for value in rates), "seeds"],
        table,
    )


def _rate_cell(found: tuple[float | None, int] | None) -> str:
    if found is None:
        return "not run"
    loss, lost = found
    if loss is None:
        return "no finite loss"
    return words.number(loss) + (f" ({lost} not finite)" if lost else "")


def _mean(row: Row, name: str) -> str:
    entry = row["metrics"][name]
    if entry["n"] and entry["mean"] is None:
        return words.summary(entry)
    if not entry["n"]:
        return "not reached" if "_to_" in name and row["n_seeds"] else "–"
    return words.number(entry["mean"])


def _seeds(status: Mapping[str, Any]) -> str:
    """Runs done of runs planned, and what became of the others."""
    names = (("gave_up", "gave up"), ("failed", "failed"), ("unfinished", "unfinished"), ("not_started", "not started"),
             ("without_a_test_loss", "without a finite test loss"))  # fmt: skip
    others = [f"{status[key]} {name}" for key, name in names if status[key]]
    return ", ".join([f"{status['done']} of {status['planned']} done", *others])


def _or_last(value: float | None) -> float:
    return float("inf") if value is None else float(value)
