"""Goals of the study of pruning, and what was found of each: reached, not reached, or not known.

Called by `results`. The goals were set before anything was measured, and each is answered for every target by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.experiments import words
from trimtab.experiments.pruning.wording import against, points

__all__ = ["AGENT", "GOALS", "NOT_KNOWN", "NOT_REACHED", "REACHED", "baselines", "conclude", "goals_of"]

REACHED, NOT_REACHED, NOT_KNOWN = "reached", "not reached", "not known"

AGENT = "ppo"
_MARGIN = 0.01  # of accuracy: one point
_SPEED = 0.6  # of the reduction in MACs
_BATCH = 64
_TENTH = 0.1
_DEEP, _DEEP_SHARE = "cifar10-resnet18", 0.25  # where it has to be better than random search

Row = Mapping[str, Any]


def goals_of(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every goal at every target: what it is, the answer, and why."""
    found: list[dict[str, Any]] = []
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in results["arms"]:
        groups.setdefault((row["task"], row["target_name"]), []).append(row)
    for (task, target), rows in groups.items():
        ours = next((row for row in rows if row["id"] == AGENT), None)
        if ours is None:
            continue
        answers = [
            ("near the optimum", *_near_the_optimum(ours, rows)),
            ("as good as the best baseline", *_as_good(ours, rows)),
            ("faster", *_faster(ours)),
        ]
        if task == _DEEP and ours["target"].get("flops") == _DEEP_SHARE:
            answers.append(("better than random search", *_better(ours)))
        found += [
            {"goal": goal, "task": task, "target": target, "answer": answer, "why": why}
            for goal, answer, why in answers
            if why
        ]
    return found


GOALS = {
    "near the optimum": f"{AGENT} ends within one standard error of the best of all configurations, with at most a "
    "tenth of its evaluations",
    "as good as the best baseline": f"the paired 95 % interval of the difference of {AGENT} to the best baseline lies "
    "above -1 point of test accuracy, after the same fine-tuning",
    "faster": f"the speed-up at batch {_BATCH} is at least {_SPEED:g} of the reduction in MACs",
    "better than random search": f"on ResNet-18 at a quarter of the FLOPs {AGENT} is better than random search",
}


def conclude(results: Mapping[str, Any]) -> list[str]:
    """One sentence a goal over all targets, and one for each learned method against chance and the plain rules."""
    lines = []
    for goal, meaning in GOALS.items():
        answers = [entry["answer"] for entry in results["goals"] if entry["goal"] == goal]
        if not answers:
            continue
        counts = [f"{answers.count(answer)} {answer}" for answer in (REACHED, NOT_REACHED, NOT_KNOWN)
                  if answer in answers]  # fmt: skip
        lines.append(f"Goal: {meaning}. Of {words.count(len(answers), 'target')}: {', '.join(counts)}.")
    for row in results["arms"]:
        if row["id"] != AGENT or not any(entry["interval"] for entry in row["differences"].values()):
            continue
        said = [text for other, entry in row["differences"].items() if (text := against(other, entry))]
        where = f"{AGENT} on {row['task']} at {row['target_name']}"
        lines.append(f"{where}: {'; '.join(said) or 'no difference shown to any other method'}.")
    if results["unfinished"]["missing"] or results["unfinished"]["failed"]:
        lines.append("The study is not complete: what is said here is of the cells that are there.")
    return lines


def baselines(rows: Sequence[Row]) -> list[Row]:
    """Methods without learning at the same cost and fine-tuning that have been run; the best first."""
    known = [row for row in rows if row["kind"] == "baseline" and row["id"] != "scratch" and row["seeds"]]
    return sorted(known, key=lambda row: -row["metrics"]["test_accuracy"]["mean"])


def _near_the_optimum(ours: Row, rows: Sequence[Row]) -> tuple[str, str]:
    optimum = next((row for row in rows if row["kind"] == "optimum"), None)
    if optimum is None:
        return NOT_KNOWN, ""
    difference = ours["differences"].get(optimum["id"])
    if difference is None or difference["n"] == 0 or not optimum["seeds"]:
        return NOT_KNOWN, "no seed has both"
    stderr = optimum["metrics"]["test_accuracy"]["stderr"]
    share = ours["metrics"]["evaluations"]["mean"] / optimum["metrics"]["evaluations"]["mean"]
    if stderr is None:
        return NOT_KNOWN, f"one seed has no standard error ({points(difference)}, {share:.2g} of the evaluations)"
    is_near = difference["mean"] >= -stderr
    why = (
        f"{points(difference)} against the optimum, whose standard error is {100 * stderr:.1f} points, with "
        f"{share:.2g} of its evaluations"
    )
    return (REACHED if is_near and share <= _TENTH else NOT_REACHED), why


def _as_good(ours: Row, rows: Sequence[Row]) -> tuple[str, str]:
    ranked = baselines(rows)
    if not ranked or not ours["seeds"]:
        return NOT_KNOWN, "no baseline has been run" if ours["seeds"] else "no seed has come to its end"
    best = ranked[0]
    difference = ours["differences"][best["id"]]
    said = f"the best baseline is {best['id']}: {points(difference)} against it"
    scratch = ours["differences"].get("scratch")
    if scratch is not None and scratch["n"]:
        said += f"; against the small network trained anew, which is trained for longer, {points(scratch)}"
    if difference["interval"] is None:
        return NOT_KNOWN, said
    return (REACHED if difference["interval"][0] > -_MARGIN else NOT_REACHED), said


def _faster(ours: Row) -> tuple[str, str]:
    speed = ours["metrics"].get(f"speed_up_{_BATCH}")
    if speed is None:
        return NOT_KNOWN, f"nothing was timed at batch {_BATCH}"
    if speed["mean"] is None:
        return NOT_KNOWN, "no seed has come to its end"
    reduction = ours["metrics"]["mac_reduction"]["mean"]
    ratio = speed["mean"] / reduction
    why = f"{speed['mean']:.2f} times as fast for {reduction:.2f} times fewer MACs, that is {ratio:.2f} of it"
    return (REACHED if ratio >= _SPEED else NOT_REACHED), why


def _better(ours: Row) -> tuple[str, str]:
    difference = ours["differences"].get("random-search")
    if difference is None or difference["n"] == 0:
        return NOT_KNOWN, "random search has not been run"
    said = points(difference)
    if difference["interval"] is None:
        return NOT_KNOWN, said
    return (REACHED if difference["verdict"] == "better" else NOT_REACHED), said
