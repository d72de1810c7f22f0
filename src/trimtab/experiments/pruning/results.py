"""results.json of a study of pruning: what its folder holds, summed up over seeds, methods paired by seed.

Called by `report`. One entry of "arms" is one method at one target on one task; differences are method - other in test
accuracy, so that a positive one is a gain. Two calls over folders that are equal but for the clock give dicts that are
equal but for what `TIMED` names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import InputError
from trimtab.experiments.pruning.goals import conclude, goals_of
from trimtab.experiments.stats import compare, summarize
from trimtab.storage import read_json

__all__ = ["TIMED", "PruningFolder", "collect", "read_folder"]

# Numbers of a row that a clock gives; "speed_up_N" for each batch size too.
TIMED = ("search_s", "fine_tuning_s", "training_s")

Cell = Mapping[str, Any]


@dataclass(frozen=True)
class PruningFolder:
    """A study's folder as found.

    Attributes:
        plan: study.json.
        dense: (task, seed) -> record of the dense network, where there is one.
        cells: (task, target's place, method) -> seed -> cell; failed ones too.
    """

    plan: Mapping[str, Any]
    dense: Mapping[tuple[str, int], Cell]
    cells: Mapping[tuple[str, int, str], Mapping[int, Cell]]

    def done(self, task: str, target: int, method: str) -> dict[int, Cell]:
        """Seed -> cell, of those that came to their end."""
        found = self.cells.get((task, target, method), {})
        return {seed: cell for seed, cell in found.items() if cell["status"] == "done"}


def read_folder(out: Path) -> PruningFolder:
    """Read what `trimtab run` or `trimtab prune` left in a folder; what is missing is left out.

    Raises:
        InputError: There is no study of pruning in it, or a file is none of ours.
    """
    from trimtab.experiments.pruning.cell import cell_path  # what prunes is not needed to import this file

    plan = read_json(out / "study.json")
    if not isinstance(plan, dict) or plan.get("kind") != "pruning":
        raise InputError(f"{out / 'study.json'} holds no study of pruning; was it written by trimtab?")
    dense: dict[tuple[str, int], Cell] = {}
    cells: dict[tuple[str, int, str], dict[int, Cell]] = {}
    for entry in plan["plans"]:
        for seed in range(entry["n_seeds"]):
            folder = out / "runs" / entry["task"] / f"seed-{seed}"
            if (folder / "dense.json").is_file():
                dense[entry["task"], seed] = read_json(folder / "dense.json")
            for place, target in enumerate(entry["targets"]):
                for method in entry["methods"]:
                    path = cell_path(folder, target, method)
                    if path.is_file():
                        cells.setdefault((entry["task"], place, method), {})[seed] = read_json(path)
    return PruningFolder(plan, dense, cells)


def collect(study: PruningFolder) -> dict[str, Any]:
    """Everything that the report says in numbers."""
    plan = study.plan
    rows, missing, failed = [], list[str](), list[str]()
    for entry in plan["plans"]:
        for place, target in enumerate(entry["targets"]):
            group = [_row(study, entry, place, target, method) for method in entry["methods"]]
            for row in group:
                row["differences"] = _differences(row, group, "test_accuracy")
                row["differences_before"] = _differences(row, group, "test_before")
            rows += group
            missing += [f"{row['id']} at {row['target_name']} on {row['task']}, seed {seed}"
                        for row in group for seed in row["missing"]]  # fmt: skip
            failed += [f"{row['id']} at {row['target_name']} on {row['task']}, seed {seed}: {why}"
                       for row in group for seed, why in row["failed"].items()]  # fmt: skip
    results: dict[str, Any] = {
        "schema": 1,
        "kind": "pruning",
        **{key: plan.get(key) for key in ("study", "idea", "scale", "root_seed", "n_seeds", "tasks", "left_out")},
        "arms": rows,
        "dense": [_dense(study, entry) for entry in plan["plans"]],
        "unfinished": {
            "n_planned": sum(len(e["targets"]) * len(e["methods"]) * e["n_seeds"] for e in plan["plans"]),
            "missing": missing,
            "failed": failed,
        },
        "environment": plan.get("environment") or {},
        "time_fields": [*TIMED, "speed_up_*", "latency_*"],
    }
    results["goals"] = goals_of(results)
    results["conclusion"] = conclude(results)
    return results


def _row(
    study: PruningFolder, entry: Mapping[str, Any], place: int, target: Mapping[str, Any], method: str
) -> dict[str, Any]:
    from trimtab.experiments.pruning.schema import kind_of, target_name

    task = entry["task"]
    cells = study.done(task, place, method)
    known = study.cells.get((task, place, method), {})
    seeds = sorted(cells)
    ordered = [cells[seed] for seed in seeds]
    values = {name: [_number(cell, path) for cell in ordered] for name, path in _NUMBERS.items()}
    for size in study.plan["settings"]["latency_batch_sizes"]:
        timings = [_timings(cell, size) for cell in ordered]
        values[f"latency_share_{size}"] = [pruned["ratio"] for _, pruned in timings]
        values[f"speed_up_{size}"] = [1.0 / pruned["ratio"] for _, pruned in timings]
        values[f"latency_dense_s_{size}"] = [dense["median_s"] for dense, _ in timings]
        values[f"latency_s_{size}"] = [pruned["median_s"] for _, pruned in timings]
    values["mac_reduction"] = [1.0 / cell["left"]["macs"] for cell in ordered]
    parts = ordered[0]["widths"] if ordered else {}
    return {
        "id": method,
        "kind": kind_of(method),
        "task": task,
        "target": dict(target),
        "target_name": target_name(target),
        "seeds": seeds,
        "missing": [seed for seed in range(entry["n_seeds"]) if seed not in known],
        "failed": {str(seed): cell["error"] for seed, cell in known.items() if cell["status"] != "done"},
        "metrics": {name: summarize(of_seeds).to_json() for name, of_seeds in values.items()},
        "widths": {
            name: {
                "kind": ordered[0]["kinds"][name],
                "dense": parts[name][0],
                "left": [cell["widths"][name][1] for cell in ordered],
            }
            for name in parts
        },
        "notes": _counted([note for cell in ordered for note in cell["notes"]]),
        "refused": dict(ordered[0]["refused"]) if ordered else {},
        "latency": {key: ordered[0]["latency"][key] for key in ("device", "threads", "clock", "repeats")}
        if ordered
        else {},
        "test_reads": [cell["test_reads"] for cell in ordered],
    }


_NUMBERS: dict[str, tuple[str, ...]] = {
    "test_accuracy": ("accuracy", "test", "after"),
    "test_before": ("accuracy", "test", "before"),
    "test_dense": ("accuracy", "test", "dense"),
    "val_accuracy": ("accuracy", "val", "after"),
    "val_before": ("accuracy", "val", "before"),
    "flops": ("flops",),
    "macs": ("macs",),
    "parameters": ("parameters",),
    "bytes": ("bytes",),
    "flops_left": ("left", "flops"),
    "macs_left": ("left", "macs"),
    "parameters_left": ("left", "parameters"),
    "bytes_left": ("left", "bytes"),
    "pruning_ratio": ("pruning_ratio",),
    "trade_off": ("trade_off",),
    "evaluations": ("evaluations",),
    **{name: ("times", name) for name in TIMED},
}


def _number(cell: Cell, path: Sequence[str]) -> float | None:
    value: Any = cell
    for key in path:
        value = value[key]
    return None if value is None else float(value)


def _timings(cell: Cell, size: int) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Of the dense network and the pruned one."""
    found = {entry["model"]: entry for entry in cell["latency"]["timings"] if entry["batch_size"] == size}
    return found["dense"], found["pruned"]


def _counted(notes: Sequence[str]) -> dict[str, int]:
    return {note: notes.count(note) for note in dict.fromkeys(notes)}


def _differences(row: Mapping[str, Any], group: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    """Of a learned method to every other one, paired by seed; empty for the others."""
    if row["kind"] != "learned":
        return {}
    ours = _by_seed(row, metric)
    return {
        other["id"]: compare(ours, _by_seed(other, metric), lower_is_better=False).to_json(metric)
        for other in group
        if other["id"] != row["id"] and any(value is not None for value in other["metrics"][metric]["values"])
    }


def _by_seed(row: Mapping[str, Any], metric: str) -> dict[int, float | None]:
    return dict(zip(row["seeds"], row["metrics"][metric]["values"], strict=True))


def _dense(study: PruningFolder, entry: Mapping[str, Any]) -> dict[str, Any]:
    found = [
        study.dense[entry["task"], seed] for seed in range(entry["n_seeds"]) if (entry["task"], seed) in study.dense
    ]
    paths = {
        "test_accuracy": ("accuracy", "test"),
        "val_accuracy": ("accuracy", "val"),
        **{name: (name,) for name in ("flops", "macs", "parameters", "bytes", "trade_off", "optimizer_steps")},
        "training_s": ("times", "training_s"),
    }
    return {
        "task": entry["task"],
        "loaded_from": found[0]["loaded_from"] if found else None,
        "lr": found[0]["lr"] if found else None,
        "metrics": {
            name: summarize([_number(record, path) for record in found]).to_json() for name, path in paths.items()
        },
    }
