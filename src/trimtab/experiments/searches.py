"""One job that is a search: its trials one after another, their winner, and a result like that of any other run.

Called by trimtab.experiments.single in a worker process; searches run beside each other, trials do not.
docs/searches.md says what each method does with its budget. The trial with the lowest validation loss at its end wins;
it alone is read on test, once, with the weights that it ended with. In the folder of the run:

    trial-007/trial.json            values, budget, losses after each part, status; written when the trial is over
    trial-007/weights.safetensors   of the best trial so far, until the search is over
    optuna.db                       of tpe
    pbt.jsonl                       of pbt: for each round and member who was copied, and which values were moved
    series.jsonl                    the trials in the order in which they trained: what was spent, the best loss so far

A search that was killed goes on with the trial (of pbt, the member's turn) that was under way, and ends as one that was
not killed, but for times. A trial that is under way is trained anew.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from trimtab.errors import InputError
from trimtab.experiments.jobs import Job, Progress, inference_speed, load_data, make_task
from trimtab.experiments.pbt import Population, check_population
from trimtab.experiments.search_methods import (
    PARTS,
    Drawn,
    Listed,
    Method,
    Tpe,
    count_idle,
    import_optuna,
    random_values,
)
from trimtab.experiments.search_space import Space
from trimtab.experiments.trials import Record, Setup, TrialRun, loss_of, read_record, trial_folder, write_record
from trimtab.storage import RunDirectory, append_lines
from trimtab.training.loop import TrainingLoop

__all__ = ["check_search", "check_searches", "run_search"]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A search, worked out.

    Attributes:
        setup: What its trials share.
        loop: Of a run that no trial is: it says what budgets are in FLOPs.
        method: "grid", "random", "tpe" or "pbt".
        trials: How many there are; of tpe, how many whole ones the budget pays for.
        run_steps: Budget of one run, in optimizer steps of the task's own cost.
        total: Budget of all trials together.
    """

    setup: Setup
    loop: TrainingLoop
    method: str
    trials: int
    run_steps: int
    total: int


def check_searches(jobs: Iterable[Job], data_dir: str | None) -> None:
    """As `check_search`, of many; the data that it read is let go of, since it is the workers that need it.

    Raises:
        InputError: One of them cannot be run.
    """
    for job in sorted(jobs, key=lambda job: str(job["task"])):
        check_search(job, data_dir)
    load_data.cache_clear()


def check_search(job: Job, data_dir: str | None) -> None:
    """Check, without training, that a search can be run: its space on its task's network and data, trials, budget.

    Raises:
        InputError: It cannot; the message names the arm.
        MissingExtraError: The method needs a package that is not installed.
    """
    try:
        _plan({**job, "device": "cpu", "precision": "float32"}, data_dir)  # who checks needs no other device
        if job["search"]["method"] == "tpe":
            import_optuna()
    except InputError as error:
        raise type(error)(f"arm {job['arm']!r} on {job['task']!r}: {error}") from error


def run_search(job: Job, folder: RunDirectory, data_dir: str | None, progress: Progress) -> dict[str, Any]:
    """Run or resume a search.

    Args:
        job: `trimtab.experiments.plan.Job` as JSON, with a `search`.
        folder: Of the run.
        data_dir: Folder with the data sets, or None.
        progress: Called after every part of a trial with what all trials have spent, and the losses.

    Returns:
        What result.json holds.
    """
    plan = _plan(job, data_dir)
    if not (folder.path / "run.json").exists():
        folder.start(_header(plan))
    if plan.method == "pbt":
        records, choosing = _run_population(plan, folder, progress), 0.0
    else:
        records, choosing = _run_trials(plan, folder, progress)
    result = _result(plan, folder, records, choosing)
    folder.finish(result)
    for record in records:
        for path in trial_folder(folder.path, record["number"]).glob("*.safetensors"):
            path.unlink()
    return result


# ---- before the first trial -------------------------------------------------------------------------------------


def _plan(job: Job, data_dir: str | None) -> _Plan:
    search = job["search"]
    method = search["method"]
    space = Space(job["knobs"], job["knob_options"])
    if method == "pbt":
        check_population(space, search["trials"])
    n_parts = math.ceil(1 / search["interval"] - 1e-9) if method == "pbt" else PARTS
    setup = Setup(job, load_data(job["task"], job["scale"], data_dir), space, n_parts)
    loop = space.fit(setup.make_loop, setup.seed, masks=search["masks"])
    TrialRun(setup, random_values(job, space, 0), make_task(job).total_steps)  # says what cannot act, before anything
    trials, run_steps = _count_trials(search, space), make_task(job).total_steps
    total = run_steps * (trials if search["budget"] == "each" else 1)
    if trials > total:
        raise InputError(
            f"search: {trials} trials share a budget of {run_steps} optimizer steps; give at most as many trials as "
            "steps, or budget: each"
        )
    return _Plan(setup, loop, method, trials, run_steps, total)


def _count_trials(search: Mapping[str, Any], space: Space) -> int:
    given = search.get("trials")
    if search["method"] != "grid":
        return int(given or 0)
    size = len(space.grid(search["points"]))
    if given is not None and given != size:
        raise InputError(
            f"search: trials is {given}, but the grid has {size} points ({search['points']} values of each of "
            f"{', '.join(space.knobs)}); leave trials out, or change points or space"
        )
    return size


def _header(plan: _Plan) -> dict[str, Any]:
    job, loop = plan.setup.job, plan.loop
    has_rate = "lr" not in plan.setup.space.knobs
    return {
        "schema": 1,
        **{key: job[key] for key in ("study", "arm", "task", "role", "seed", "agent", "kind", "of", "options")},
        "dataset": loop.task.dataset,
        "initial_lr": loop.task.lr if has_rate else None,
        "start": {"lr": loop.task.lr} if has_rate else {},
        "total_steps": plan.run_steps,
        "flops_budget": loop.flops_budget,
        "job": dict(job),
        "search": {
            **job["search"],
            "trials": plan.trials,
            "total_steps_of_all_trials": plan.total,
            "space": plan.setup.space.bounds(),
            "masked": plan.setup.space.masked,
        },
        "device": str(loop.device),
        "precision": loop.precision,
    }


# ---- the trials -------------------------------------------------------------------------------------------------


def _run_trials(plan: _Plan, folder: RunDirectory, progress: Progress) -> tuple[list[Record], float]:
    """Trials one after another; and the seconds that choosing them took."""
    records: list[Record] = []
    choosing = 0.0
    method = _method(plan, folder)
    try:
        while steps := method.steps(records):
            number = len(records)
            path = trial_folder(folder.path, number)
            record = read_record(path)
            if record is None or not method.knows(number):
                started = time.perf_counter()
                values = method.ask(number)
                choosing += time.perf_counter() - started
                if record is None:
                    say = _say(plan, math.fsum(record["spent"] for record in records), progress)
                    record = _run_trial(plan, folder, records, values, steps, method, say)
                else:  # its trial.json was written, and then the search was killed
                    record = read_record(path, values) or record
                    for row in record["rows"]:
                        method.should_stop(row)
                method.tell(record)
            records.append(record)
    finally:
        method.close()
    return records, choosing


def _method(plan: _Plan, folder: RunDirectory) -> Method:
    setup, trials = plan.setup, plan.trials
    if plan.method == "tpe":
        return Tpe(folder.path / "optuna.db", setup.job, setup.space, trials, plan.total)
    if plan.method == "grid":
        return Listed(setup.space.grid(setup.job["search"]["points"]), plan.total)
    return Drawn(setup.job, setup.space, trials, plan.total)


def _run_trial(
    plan: _Plan,
    folder: RunDirectory,
    before: Sequence[Record],
    values: dict[str, Any],
    steps: int,
    method: Method,
    say: Callable[[TrialRun], None],
) -> Record:
    """Train one trial, and keep its weights if it is the best so far."""
    run = TrialRun(plan.setup, values, steps)

    def should_stop(row: dict[str, Any]) -> bool:
        say(run)
        return method.should_stop(row)

    is_stopped = run.run(should_stop)
    number = len(before)
    record = run.record(number, is_stopped=is_stopped)
    path = trial_folder(folder.path, number)
    best = _winner(before) if before else None
    if best is None or loss_of(record) < loss_of(best):
        run.save(path / "weights.safetensors")
        write_record(path, record)  # from here on it is over, and another trial's weights are of no use
        if best is not None:
            (trial_folder(folder.path, best["number"]) / "weights.safetensors").unlink(missing_ok=True)
    else:
        write_record(path, record)
    return record


def _run_population(plan: _Plan, folder: RunDirectory, progress: Progress) -> list[Record]:
    steps = [plan.total // plan.trials + (number < plan.total % plan.trials) for number in range(plan.trials)]
    spent = [0.0] * plan.trials

    def say(member: int, run: TrialRun) -> None:
        spent[member] = 0.0
        _say(plan, math.fsum(spent), progress)(run)
        spent[member] = run.loop.spent

    return Population(plan.setup, steps, folder.path, say).train()


def _say(plan: _Plan, spent: float, progress: Progress) -> Callable[[TrialRun], None]:
    """What the progress bar shows, counted over all trials."""

    def say(run: TrialRun) -> None:
        row = run.rows[-1]
        now = spent + run.loop.spent
        news = {"total_steps": plan.total, "optimizer_step": round(now), "spent": now}
        progress({**news, "train_loss": row["train_loss"], "val_loss": row["val_loss"]})

    return say


# ---- the end ----------------------------------------------------------------------------------------------------


def _winner(records: Sequence[Record]) -> Record:
    """The lowest validation loss at the end; of equal ones the first."""
    return min(records, key=lambda record: (loss_of(record), record["number"]))


def _result(plan: _Plan, folder: RunDirectory, records: Sequence[Record], choosing: float) -> dict[str, Any]:
    """Measure the winner: validation again (timed), and test, for the only time."""
    winner = _winner(records)
    run = TrialRun(plan.setup, winner["values"], winner["total_steps"])
    name = f"round-{plan.setup.n_parts}" if plan.method == "pbt" else "weights"
    run.load(trial_folder(folder.path, winner["number"]) / f"{name}.safetensors")
    loop = run.loop
    started = time.perf_counter()
    val = loop.evaluate("val")
    eval_runtime = time.perf_counter() - started
    test = loop.evaluate("test")
    sums = {
        key: math.fsum(record[key] for record in records) for key in ("spent", "samples", "optimizer_step", "epoch")
    }
    training, validation = (math.fsum(record["times"][key] for record in records) for key in ("training", "validation"))
    folder.series.unlink(missing_ok=True)
    append_lines(folder.series, _series(plan, records))
    return {
        "status": "done",
        "error": None,
        "metrics": {
            "final_train_loss": winner["rows"][-1]["train_loss"],
            "final_val_loss": val["loss"],
            "best_val_loss": _best(winner["rows"]),
            "test_loss": test["loss"],
            "test_accuracy": test.get("accuracy"),
            "test_f1": test.get("f1"),
            "test_mse": test.get("mse"),
            "eval_loss": val["loss"],
            "eval_accuracy": val.get("accuracy"),
            "epoch": sums["epoch"],
            "optimizer_steps": int(sums["optimizer_step"]),
            "samples": int(sums["samples"]),
            "flops": _flops(plan, sums["spent"]),
            "budget_used": sums["spent"] / plan.run_steps,
        },
        "times": {
            "total_train_time": training + validation + choosing,
            "controller_time": choosing,
            "validation_time": validation,
            "eval_runtime": eval_runtime,
            "eval_samples_per_second": val["n_samples"] / eval_runtime,
            "eval_steps_per_second": val["n_batches"] / eval_runtime,
            "avg_inference_tokens_per_second": inference_speed(loop),
        },
        "n_decisions": 0,
        "n_interventions": 0,
        "n_rollbacks": 0,
        "test_reads": loop.test_reads,
        "learning": {"transitions": 0, "runs": 0, "optimizer_steps": 0, "flops": 0},
        "notes": _notes(plan, records, test["loss"]),
        "brain": None,
        "search": {
            "method": plan.method,
            "budget": plan.setup.job["search"]["budget"],
            "trials": len(records),
            "pruned": sum(record["status"] == "pruned" for record in records),
            "idle": count_idle(records),
            "winner": winner["number"],
            "values": winner["values"],
            "one_run": _one_run(plan, records) if plan.method in ("random", "tpe") else None,
        },
    }


def _one_run(plan: _Plan, records: Sequence[Record]) -> dict[str, Any]:
    """What one run gives without a search: the first trial, whose values are drawn at random and which nobody stops.

    Where its part of the budget did not pay for a step, the next one stands for it.
    """
    record = next((record for record in records if record["status"] != "idle"), records[0])
    return {
        "values": record["values"],
        "final_val_loss": record["val_loss"],
        "best_val_loss": _best(record["rows"]),
        "accuracy": record["accuracy"],
        "flops": _flops(plan, record["spent"]),
        "budget_used": record["spent"] / plan.run_steps,
    }


def _flops(plan: _Plan, spent: float) -> int:
    return round(plan.loop.flops_budget * spent / plan.run_steps)


def _best(rows: Sequence[Mapping[str, Any]]) -> float | None:
    losses = [row["val_loss"] for row in rows if row["val_loss"] is not None and math.isfinite(row["val_loss"])]
    return min(losses, default=None)


def _notes(plan: _Plan, records: Sequence[Record], test_loss: float) -> list[str]:
    notes = [f"not searched here: {name}: {why}" for name, why in plan.setup.space.masked.items()]
    idle = count_idle(records)
    if idle:
        notes.append(f"{idle} of {len(records)} trials: their budget did not pay for a single optimizer step")
    lost = sum(record["status"] == "diverged" for record in records)
    if lost:
        notes.append(f"{lost} of {len(records)} trials ended without a finite validation loss")
    if not math.isfinite(test_loss):
        notes.append("diverged: the test loss is not finite")
    return notes


def _series(plan: _Plan, records: Sequence[Record]) -> list[dict[str, Any]]:
    """Lines of series.jsonl: after each part of each trial, in the order of training, what all had come to by then."""
    is_population = plan.method == "pbt"
    found = [(record["number"], row) for record in records for row in record["rows"]]
    if is_population:
        found.sort(key=lambda entry: (entry[1]["part"], entry[0]))
    counts = ("optimizer_step", "epoch", "spent", "samples")
    sums: dict[int, Mapping[str, Any]] = {}
    best: float | None = None
    lines = []
    for number, row in found:
        sums[number] = row
        best = _best([row, {"val_loss": best}])
        total = {key: math.fsum(entry[key] for entry in sums.values()) for key in counts}
        lines.append({
            "optimizer_step": int(total["optimizer_step"]),
            "epoch": total["epoch"],
            "spent": total["spent"],
            "samples": int(total["samples"]),
            "progress": total["spent"] / plan.run_steps,
            "train_loss": None,
            "val_loss": best,
            "accuracy": None,
            "reward": None,
            "signals": {},
            "knobs": {},
            "best_val_loss": best,
            "trial": {"number": number, **{key: row[key] for key in ("part", "train_loss", "val_loss", "accuracy")}},
        })  # fmt: skip
    return lines
