"""One cell: a dense network pruned to one target by one method, fine-tuned, chosen on validation, and measured.

Called by `job`. Test is read at the very end, by the network that was chosen alone: once as it was cut, once as it was
fine-tuned. What was scored on the way is kept in a file of its own, so that a killed search goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from trimtab.errors import RunFailedError
from trimtab.experiments.pruning.dense import step, trade_off
from trimtab.experiments.pruning.ground import Ground, HeldOut, accuracy, costs_of
from trimtab.experiments.pruning.schema import SCRATCH, target_name
from trimtab.progress import News
from trimtab.pruner.loading import builder_of
from trimtab.pruner.policies import TaughtPolicy
from trimtab.pruner.stage import BLIND, Given, Outcome, run_method
from trimtab.pruning.allocations import uniform
from trimtab.pruning.budget import Budget, Target
from trimtab.pruning.latency import measure
from trimtab.pruning.latency_table import LatencyTable
from trimtab.pruning.network import PrunableNetwork, units_of
from trimtab.pruning.parts import Configuration
from trimtab.pruning.saving import save_pruned
from trimtab.storage import read_json, read_lines, write_json
from trimtab.training.loop import TrainingLoop

__all__ = ["cell_path", "make_budget", "run_cell"]

Tell = Callable[[News], None]

_FEW = 2  # units, of which a reader is warned
_SOURCE = ("ppo", "uniform")  # whose widths "scratch" has: of the first that the study has


@dataclass(frozen=True)
class _Found:
    """What a method came to.

    Attributes:
        model: In evaluation, after fine-tuning.
        cut: The same before it; None where the network has new weights.
        candidates: What it proposed, the chosen one first.
        history: Scores on validation, in the order in which they were asked for.
        counts: Evaluations, and how many of them failed.
        times: Seconds.
        notes: What has to be said.
    """

    model: nn.Module
    cut: nn.Module | None
    candidates: list[dict[str, Any]]
    history: list[float | None]
    counts: Mapping[str, int]
    times: Mapping[str, float]
    notes: tuple[str, ...] = ()


def cell_path(folder: Path, target: Mapping[str, Any], method: str) -> Path:
    """File of a cell."""
    return folder / "cells" / target_name(target, joined="-") / f"{method}.json"


def run_cell(
    ground: Ground,
    dense: Mapping[str, Any],
    network: PrunableNetwork,
    target: Mapping[str, Any],
    method: str,
    out: Path,
    tell: Tell,
) -> dict[str, Any]:
    """Prune, measure and write down; see `_record` for what.

    Args:
        ground: Data and training.
        dense: Record of the dense network.
        network: The dense network.
        target: What may be left.
        method: Of `schema.ALL_METHODS`.
        out: The study's folder.
        tell: Told how far it is.

    Raises:
        TrimtabError: The method finds nothing, or fine-tuning fails for everything that it finds.
    """
    budget = make_budget(ground, network, target)
    if method == SCRATCH:
        found = _from_scratch(ground, network, budget, target, tell)
    else:
        found = _by_method(ground, network, budget, target, method, tell)
    record = _record(ground, dense, network, target, method, found)
    if method in ground.job["save"]:
        builder = builder_of(ground.task.name, ground.job["scale"], ground.data)
        save_pruned(found.model, out / ground.job["save"][method], extra=record, builder=builder)
    write_json(cell_path(ground.folder, target, method), record)
    return record


def make_budget(
    ground: Ground, network: PrunableNetwork, target: Mapping[str, Any], dense: float | None = None
) -> Budget:
    """The budget of a target; for latency after the network's table, which is measured once and kept."""
    parsed = Target.parse(target)
    if parsed.kind != "latency":
        return Budget(network, parsed, dense=dense)
    size = parsed.batch_size or 1
    path = ground.folder / f"latency-table-{size}.json"
    if path.is_file() and dense is None:
        table = LatencyTable.load(network, size, read_json(path))
    else:
        table = LatencyTable(network, size, threads=ground.job["threads"])
        if dense is None:
            write_json(path, table.to_dict())
    return Budget(network, parsed, table.seconds, dense=dense)


# The methods


def _by_method(
    ground: Ground, network: PrunableNetwork, budget: Budget, target: Mapping[str, Any], method: str, tell: Tell
) -> _Found:
    """All stages of a method; each prunes what the one before left, to the same share of it."""
    job, tuner = ground.job, ground.fine_tuner()
    stages = job["stages"].get(method, 1)
    given = Given(
        None, (ground.val.inputs, ground.val.targets), tuner, job["max_evaluations"] // stages, job["n_best"],
        ground.seed("pruning"), TaughtPolicy.load(job["brain"]).weights if method == "ppo" else {},
        None if method == "paper" else ground.score_tuner(), tell,
    )  # fmt: skip
    now, limit = network, budget
    outcomes: list[Outcome] = []
    history: list[float | None] = []
    started = time.perf_counter()
    tuned_s = 0.0
    for number in range(1, stages + 1):
        if stages > 1:
            share = replace(budget.target, share=budget.target.share ** (number / stages)).to_dict()
            limit = make_budget(ground, now, share, dense=budget.dense if number > 1 else None)
        log = cell_path(ground.folder, target, method).with_suffix(f".evaluations-{number}.jsonl")
        log.parent.mkdir(parents=True, exist_ok=True)
        outcomes.append(run_method(method, given, now, limit, log=log))
        # The first is the dense network's; where only one part was cut, to see what that loses, it is no candidate.
        rows = read_lines(log)[1:]
        history += [row["score"] if limit.fits(tuple(row["widths"])) else None for row in rows]
        # Retraining inside of a search belongs to it: only the last ones are of the candidates.
        tuned_s += 0.0 if tuner is None else sum(tuner.seconds[-len(outcomes[-1].candidates) :])
        if number < stages:
            now = ground.describe(outcomes[-1].model)
    last = outcomes[-1]
    failed = sum(outcome.proposal.failed for outcome in outcomes)
    return _Found(
        model=last.model,
        cut=now.cut(last.candidates[0].widths, last.proposal.orders),
        candidates=[{**asdict(c), "widths": list(c.widths)} for c in last.candidates],
        history=history,
        counts={"evaluations": sum(outcome.proposal.evaluations for outcome in outcomes), "failed": failed},
        times={"search_s": time.perf_counter() - started - tuned_s, "fine_tuning_s": tuned_s, "training_s": 0.0},
        notes=tuple(_notes_on(outcomes, failed)),
    )


def _notes_on(outcomes: Sequence[Outcome], failed: int) -> Iterator[str]:
    if failed:
        yield f"{failed} configurations had no score"
    if any(outcome.is_blind for outcome in outcomes):
        yield BLIND.format(how="score_steps trains each for a moment before it is scored")


def _from_scratch(
    ground: Ground, network: PrunableNetwork, budget: Budget, target: Mapping[str, Any], tell: Tell
) -> _Found:
    """The shape that another method chose, with new weights, trained as long as the dense network."""
    source = next((name for name in _SOURCE if name in ground.job["methods"]), None)
    if source is None:
        source, widths = "uniform", uniform(budget)
    else:
        path = cell_path(ground.folder, target, source)
        known = read_json(path) if path.is_file() else {}
        if known.get("status") != "done":
            raise RunFailedError(f"{SCRATCH} trains the network that {source} chose, which has not come to its end")
        left = {name: new for name, (_, new) in known["widths"].items()}
        widths = tuple(left[part.name] for part in network.parts)
    loop = _new_loop(ground, widths)
    started = time.perf_counter()
    while not loop.is_over():
        step(loop)
        tell(News("step", loop.steps_done, loop.total_steps, f"{SCRATCH}: training"))
    seconds = time.perf_counter() - started
    model = loop.model.eval()
    score = accuracy(model, ground.val)
    candidate = {"name": SCRATCH, "widths": list(widths), "before": None, "after": score, "share": budget.share(widths),
                 "evaluations": 0, "failure": ""}  # fmt: skip
    return _Found(model, None, [candidate], [], {"evaluations": 0, "failed": 0},
                  {"search_s": 0.0, "fine_tuning_s": 0.0, "training_s": seconds},
                  (f"its widths are those that {source} chose",))  # fmt: skip


def _new_loop(ground: Ground, widths: Configuration) -> TrainingLoop:
    def make_model(_: object) -> nn.Module:
        dense = ground.task.make_model(ground.data)
        examples = ground.data.val.inputs[: len(ground.examples)]
        model = PrunableNetwork(dense, examples, multiple=ground.job["multiple"], importance="random").cut(widths)
        for module in model.modules():  # what is drawn by the width, for the width that it has now
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        return model

    task = ground.task.replace(make_model=make_model)
    return TrainingLoop(task, ground.data, seed=ground.seed("scratch"), device=str(ground.device))


# What is said of it


def _record(
    ground: Ground,
    dense: Mapping[str, Any],
    network: PrunableNetwork,
    target: Mapping[str, Any],
    method: str,
    found: _Found,
) -> dict[str, Any]:
    """Everything about the chosen network; latency before test, so that test comes last of all."""
    job, chosen = ground.job, found.candidates[0]
    costs = costs_of(found.model, ground.examples)
    widths = {part.name: [part.size, units_of(found.model, part)] for part in network.parts}
    notes = [
        f"{name} has {new} of {old} units left: fine-tuning may not bring back what it did"
        for name, (old, new) in widths.items()
        if 0 < new <= _FEW < old
    ]
    latency = measure(
        {"dense": network.model, "pruned": found.model}, ground.examples, batch_sizes=job["latency_batch_sizes"],
        repeats=job["latency_repeats"], threads=job["threads"],
    ).to_dict()  # fmt: skip
    # Not the proposal's own score, which "paper" takes after a retraining.
    val_before = None if found.cut is None else accuracy(found.cut, ground.val)
    test = HeldOut(ground.test)
    before = None if found.cut is None else test.accuracy(found.cut)
    after = test.accuracy(found.model)
    return {
        "schema": 1, "status": "done", "error": None, "task": job["task"], "seed": job["seed"], "target": dict(target),
        "method": method, "widths": widths, "kinds": {part.name: part.kind for part in network.parts},
        "refused": dict(network.refused),
        "accuracy": {
            "val": {"dense": dense["accuracy"]["val"], "before": val_before, "after": chosen["after"]},
            "test": {"dense": dense["accuracy"]["test"], "before": before, "after": after},
        },
        **costs,
        "left": {key: costs[key] / dense[key] for key in ("flops", "macs", "parameters", "bytes")},
        "pruning_ratio": 1.0 - costs["parameters"] / dense["parameters"],
        "trade_off": trade_off(after, costs["flops"]),
        **found.counts, "max_evaluations": job["max_evaluations"], "stages": job["stages"].get(method, 1),
        "candidates": found.candidates, "history": found.history, "test_reads": test.reads,
        "notes": [*found.notes, *notes], "latency": latency, "times": dict(found.times),
    }  # fmt: skip
