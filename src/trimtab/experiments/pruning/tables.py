"""The tables of a report of pruning, made from results.json alone.

Called by `report`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.experiments import words
from trimtab.experiments.document import Table
from trimtab.experiments.pruning.goals import AGENT
from trimtab.experiments.pruning.wording import per_cent, short

__all__ = ["accuracy_table", "cost_table", "dense_table", "goal_table", "method_table", "widths_table"]

Row = Mapping[str, Any]

MEANINGS = {
    "ppo": "PPO chooses a width for each layer in turn, taught before on many small networks of generated data; seeded "
    "with uniform and global, the best seen counts",
    "ppo-untaught": "the same, which has seen no network before this one",
    "paper": "PPO with the settings of the write-up: a short retraining and a reward after each action",
    "random-search": "widths at random that use the budget up, as many evaluations, the same seeding",
    "uniform": "the same share of every layer's units",
    "global": "one threshold of importance for all layers",
    "lamp": "one threshold, units scored by LAMP",
    "greedy": "step by step the cut that loses least for what it saves",
    "random-units": "the widths of uniform, units at random",
    "exhaustive": "all configurations are scored: the optimum on validation before fine-tuning",
    "scratch": "the network that ppo chose (without ppo: uniform), new weights, trained as long as the dense one",
}


def method_table(rows: Sequence[Row], plans: Sequence[Row]) -> Table:
    """What the methods are, and on which tasks each was run."""
    tasks = {method: [plan["task"] for plan in plans if method in plan["methods"]] for plan in plans
             for method in plan["methods"]}  # fmt: skip
    kinds = {row["id"]: row["kind"] for row in rows}
    lines = [[name, kinds[name], MEANINGS[name], ", ".join(where)] for name, where in tasks.items()]
    return Table("Methods.", ["method", "kind", "what it does", "tasks"], lines)


def dense_table(dense: Sequence[Row]) -> Table:
    """The networks that were pruned."""
    rows = []
    for entry in dense:
        numbers = entry["metrics"]
        rows.append([
            entry["task"],
            per_cent(numbers["test_accuracy"]),
            per_cent(numbers["val_accuracy"]),
            _mean(numbers["macs"], 7),
            _mean(numbers["parameters"], 8),
            _mean(numbers["bytes"], 9),
            _mean(numbers["trade_off"]),
        ])  # fmt: skip
    caption = (
        "Dense networks. Accuracies in per cent, mean with 95 % interval over seeds (range below five seeds); MACs of "
        "one sample's forward pass; trade-off: test accuracy x (1 / FLOPs), per GFLOP."
    )
    return Table(caption, ["task", "test accuracy", "validation", "MACs", "parameters", "bytes", "trade-off"], rows)


def accuracy_table(rows: Sequence[Row]) -> Table:
    """One task, one target: accuracies, and how the agent compares; the best after fine-tuning first."""
    ours = next((row for row in rows if row["id"] == AGENT), None)
    after, before = ({}, {}) if ours is None else (ours["differences"], ours["differences_before"])
    lines = []
    for row in sorted(rows, key=_rank):
        numbers = row["metrics"]
        lines.append([
            row["id"],
            per_cent(numbers["test_accuracy"]),
            per_cent(numbers["test_before"]),
            per_cent(numbers["val_accuracy"]),
            *([] if ours is None else [short(after.get(row["id"])), short(before.get(row["id"]))]),
            _mean(numbers["evaluations"], digits=3),
            words.number(numbers["search_s"]["mean"], digits=3),
        ])  # fmt: skip
    columns = ["method", "test accuracy", "before fine-tuning", "validation"]
    columns += [] if ours is None else [f"{AGENT} minus it", "before fine-tuning"]
    caption = (
        "Accuracy in per cent after fine-tuning, mean with 95 % interval over seeds (range below five seeds); "
        "differences in points, paired by seed, positive where the agent is better."
    )
    return Table(caption, [*columns, "evaluations", "search, s"], lines)


def cost_table(rows: Sequence[Row], batch_sizes: Sequence[int]) -> Table:
    """One task, one target: what is left, and how much faster it is beside how much was taken away."""
    lines = []
    for row in sorted(rows, key=_rank):
        numbers = row["metrics"]
        lines.append([
            row["id"],
            _share(numbers["macs_left"]),
            _share(numbers["parameters_left"]),
            _share(numbers["bytes_left"]),
            _mean(numbers["pruning_ratio"], digits=3),
            _times(numbers["mac_reduction"]),
            *(_times(numbers[f"speed_up_{size}"]) for size in batch_sizes),
            _mean(numbers["trade_off"]),
        ])  # fmt: skip
    columns = ["method", "MACs left", "parameters left", "bytes left", "pruning ratio", "MACs, fewer by"]
    columns += [f"faster, batch {size}" for size in batch_sizes]
    caption = (
        "Cost, means over seeds. Left: in per cent of the dense network. Pruning ratio: share of the parameters that "
        "is gone. Faster: time of the dense network over that of the pruned one, measured in turns."
    )
    return Table(caption, [*columns, "trade-off per GFLOP"], lines)


def widths_table(rows: Sequence[Row]) -> Table:
    """One task, one target: units left in each layer, mean over seeds."""
    parts: Row = next((row["widths"] for row in rows if row["widths"]), {})
    columns = [f"{entry['kind']} {name} ({entry['dense']})" for name, entry in parts.items()]
    lines = [[row["id"], *(_units(row["widths"][name]["left"]) for name in parts)] for row in rows if row["widths"]]
    return Table("Units left in each layer, mean over seeds; in brackets those of the dense network.",
                 ["method", *columns], lines)  # fmt: skip


def goal_table(goals: Sequence[Row], goal: str) -> Table:
    """The answers to one goal."""
    lines = [[f"{entry['task']}, {entry['target']}", entry["answer"], entry["why"]] for entry in goals
             if entry["goal"] == goal]  # fmt: skip
    return Table(f"Goal: {goal}.", ["where", "answer", "why"], lines)


def _rank(row: Row) -> float:
    mean = row["metrics"]["test_accuracy"]["mean"]
    return 1.0 if mean is None else -mean


def _mean(entry: Row, digits: int = 4) -> str:
    return words.number(entry["mean"], digits=digits)


def _share(entry: Row) -> str:
    return "–" if entry["mean"] is None else f"{100 * entry['mean']:.1f}"


def _times(entry: Row) -> str:
    return "–" if entry["mean"] is None else f"{entry['mean']:.2f}x"


def _units(left: Sequence[int]) -> str:
    if not any(left):
        return "taken out"
    text = f"{sum(left) / len(left):.1f}".removesuffix(".0")
    return text + (f" (taken out {left.count(0)} of {len(left)} times)" if 0 in left else "")
