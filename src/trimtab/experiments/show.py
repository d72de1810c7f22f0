"""What a folder holds, on the screen: a study's plan and state, its results in a table, or a brain's origin.

Called by the command line.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trimtab.errors import InputError
from trimtab.storage import read_json

__all__ = ["show", "summary_table"]


def show(directory: Path, console: Console) -> None:
    """Print what a folder holds.

    Args:
        directory: A study's folder, or a brain's.
        console: Where to print.

    Raises:
        InputError: It holds neither.
    """
    if (directory / "study.json").is_file():
        _show_study(directory, console)
    elif (directory / "brain.json").is_file():
        _show_brain(directory, console)
    else:
        raise InputError(f"{directory} holds no study (study.json) and no brain (brain.json); give the folder of one")


def summary_table(out: Path) -> Table | None:
    """What each arm of a reported study reached and what its intervals say; None where there is no report."""
    path = out / "results.json"
    if not path.is_file():
        return None
    results = read_json(path)
    table = Table(title=f"{results.get('study')} ({results.get('scale')})", title_justify="left")
    table.add_column("task")
    table.add_column("arm", no_wrap=True)
    table.add_column("mean test loss", justify="right", no_wrap=True)
    table.add_column("what the interval of the difference says")
    for row in results.get("arms") or []:
        metric = (row.get("metrics") or {}).get("test_loss") or {}
        mean = metric.get("mean")
        loss = "-" if mean is None else f"{mean:.4g}"
        table.add_row(str(row.get("task")), str(row.get("id")), loss, _verdicts(row.get("differences") or {}))
    return table


def _verdicts(differences: Mapping[str, Any]) -> str:
    """Differences by verdict: "better: constant, placebo:q_learning; no difference shown: tuned-cosine"."""
    by_verdict: dict[str, list[str]] = defaultdict(list)
    for reference, entry in differences.items():
        by_verdict[str(entry.get("verdict"))].append(reference)
    return "; ".join(f"{verdict}: {', '.join(names)}" for verdict, names in by_verdict.items())


def _show_study(directory: Path, console: Console) -> None:
    plan = read_json(directory / "study.json")
    states = Counter(_state(path.parent) for path in (directory / "runs").rglob("run.json"))
    rows = {
        "study": f"{plan.get('study')}, scale {plan.get('scale')}",
        "idea": plan.get("idea"),
        "tasks": ", ".join(plan.get("tasks") or []),
        "arms": ", ".join(str(arm.get("id")) for arm in plan.get("arms") or []),
        "seeds": f"{plan.get('n_seeds')}, root seed {plan.get('root_seed')}",
        "left out": "; ".join(f"{entry['task']}: {entry['why']}" for entry in plan.get("left_out") or []) or "nothing",
        "runs": ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "none begun",
    }
    _print_rows(rows, console)
    table = summary_table(directory)
    if table is not None:
        console.print(table)


def _show_brain(directory: Path, console: Console) -> None:
    from trimtab.brain import Brain  # imports torch

    brain = Brain.load(directory)
    rows: dict[str, Any] = {"agent": brain.agent.name, "spec": brain.spec.fingerprint}
    rows |= {f"option {key}": value for key, value in brain.agent.options.items()}
    rows |= dict(brain.provenance)
    _print_rows(rows, console)


def _state(run: Path) -> str:
    return str(read_json(run / "result.json").get("status")) if (run / "result.json").is_file() else "unfinished"


def _print_rows(rows: Mapping[str, Any], console: Console) -> None:
    width = max(len(key) for key in rows)
    for key, value in rows.items():
        console.print(f"{key:<{width}}  {value}", markup=False, soft_wrap=True)
