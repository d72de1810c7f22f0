"""One piece of work of a study of pruning: one task under one seed, from its dense network to its last cell.

Called by the executors in a worker process. A cell's file is whole when it is there, so that a killed piece of work
goes on with the cells that are missing; only times then differ from one that was not killed.

    runs/TASK/seed-N/run.json         what was asked                                (first)
    runs/TASK/seed-N/dense/           the dense network, as trimtab.load_pruned reads it; dense.json: its numbers
    runs/TASK/seed-N/cells/TARGET/METHOD.json                  one cell
    runs/TASK/seed-N/cells/TARGET/METHOD.evaluations-1.jsonl   every score of its search
    runs/TASK/seed-N/result.json      that it is over, and what failed              (last)
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trimtab import registry
from trimtab.errors import InputError, TrimtabError
from trimtab.experiments.jobs import Progress
from trimtab.experiments.pruning.cell import cell_path, run_cell
from trimtab.experiments.pruning.dense import dense_network, load_dense
from trimtab.experiments.pruning.ground import Ground
from trimtab.experiments.pruning.schema import SCRATCH, target_name
from trimtab.progress import News
from trimtab.pruner.policies import TaughtPolicy
from trimtab.pruning.allocations import every
from trimtab.pruning.budget import Budget, Target
from trimtab.storage import read_json, write_json

__all__ = ["cells_of", "check_job", "run_one"]

_ERRORS = (TrimtabError, MemoryError, RuntimeError, ValueError, ArithmeticError)  # of one cell, which is named


def cells_of(job: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], str]]:
    """(target, method) of every cell, in the order in which they are done: scratch needs what another one chose."""
    for target in job["targets"]:
        for method in sorted(job["methods"], key=lambda name: name == SCRATCH):
            yield target, method


def check_job(job: Mapping[str, Any], data_dir: str | None) -> None:
    """Check a piece of work on an untrained network: data, what can be pruned, and that every target is in reach.

    Raises:
        InputError: Something is not as it should be; the message names the task.
    """
    try:
        ground = Ground.of(job, registry.load("task", job["task"])(job["scale"]), Path(), data_dir)
        model = ground.new_network() if job["model"] is None else load_dense(ground, job["model"])
        network = ground.describe(model.to(ground.device))
        if "ppo" in job["methods"]:
            TaughtPolicy.load(job["brain"])
        for target in job["targets"]:
            if Target.parse(target).kind == "latency":
                continue  # what is in reach is measured on the trained network
            budget = Budget(network, Target.parse(target))
            if "exhaustive" in job["methods"]:
                every(budget)
    except InputError as error:
        raise type(error)(f"task {job['task']!r}: {error}") from error


def run_one(job: Mapping[str, Any], out: str, data_dir: str | None, progress: Progress) -> dict[str, Any]:
    """Do one piece of work, or what is left of it.

    Args:
        job: As `schema.jobs_of` has it.
        out: The study's folder.
        data_dir: Folder with the data sets, or None.
        progress: Called with {"unit", "done", "total", "words"}.

    Returns:
        What result.json holds: status "done" or "failed", and the error.
    """
    logging.getLogger("trimtab").setLevel(logging.ERROR)
    folder = Path(out) / job["directory"]
    ground = Ground.of(job, registry.load("task", job["task"])(job["scale"]), folder, data_dir)
    write_json(folder / "run.json", {"schema": 1, **job})
    wanted = list(cells_of(job))

    def step(done: int, total: int) -> None:
        progress({"unit": "cell", "done": 0, "total": len(wanted), "words": f"dense network: step {done}/{total}"})

    model, dense = dense_network(ground, step)
    network = ground.describe(model)
    failed: dict[str, str] = {}
    for number, (target, method) in enumerate(wanted):
        path = cell_path(folder, target, method)
        if path.is_file() and read_json(path).get("status") == "done":
            continue

        def tell(news: News, number: int = number, target: Mapping[str, Any] = target) -> None:
            words = f"{target_name(target)}, {news.words}: {news.unit} {news.done}/{news.total}"
            progress({"unit": "cell", "done": number, "total": len(wanted), "words": words})

        try:
            run_cell(ground, dense, network, target, method, Path(out), tell)
        except _ERRORS as error:
            why = str(error) if isinstance(error, TrimtabError) else f"{type(error).__name__}: {error}"
            failed[f"{method} at {target_name(target)}"] = why
            write_json(path, {"schema": 1, "status": "failed", "error": why, "task": job["task"], "seed": job["seed"],
                              "target": dict(target), "method": method})  # fmt: skip
    result = {
        "schema": 1,
        "status": "failed" if failed else "done",
        "error": "; ".join(f"{cell}: {why}" for cell, why in failed.items()) or None,
        "n_cells": len(wanted),
        "failed": failed,
    }
    write_json(folder / "result.json", result)
    return result
