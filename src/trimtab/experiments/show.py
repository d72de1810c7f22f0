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

from trimtab import brains
from trimtab.errors import InputError
from trimtab.storage import read_json, read_lines

__all__ = ["show", "summary_table"]

_SHARES = ("test_dense", "test_before", "test_accuracy", "macs_left")


def show(directory: Path, console: Console) -> None:
    """Print what a folder holds.

    Args:
        directory: A study's folder, a brain's, or one of `trimtab learn`; or the name of a brain that we ship, where
            there is no folder of that name.
        console: Where to print.

    Raises:
        InputError: It holds neither.
    """
    if not directory.exists():
        directory = brains.folder_of(str(directory)) or directory
    if (directory / "study.json").is_file():
        _show_study(directory, console)
    elif (directory / "brain.json").is_file():
        _show_brain(directory, console)
    elif (directory / "learn.json").is_file():
        _show_making(directory, console)
    elif (directory / "brain" / "brain.json").is_file():
        _show_brain(directory / "brain", console)
    else:
        shipped = brains.descriptions()
        if str(directory) in shipped and not directory.exists():
            console.print(f"{directory}: {shipped[str(directory)]}")
            return
        raise InputError(
            f"{directory} holds no study (study.json) and no brain (brain.json); give the folder of one, or one of "
            f"{', '.join(shipped)}"
        )


def summary_table(out: Path) -> Table | None:
    """What each arm of a reported study reached and what its intervals say; None where there is no report."""
    path = out / "results.json"
    if not path.is_file():
        return None
    results = read_json(path)
    if results.get("kind") == "pruning":
        return _pruning_table(results)
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


def _pruning_table(results: Mapping[str, Any]) -> Table:
    """What each method came to at each target, in per cent."""
    title = f"{results.get('study')} ({results.get('scale')}): test accuracy before and after fine-tuning, per cent"
    table = Table(title=title, title_justify="left")
    for name in ("task", "target", "method"):
        table.add_column(name, no_wrap=True)
    for name in ("dense", "before", "after", "MACs left"):
        table.add_column(name, justify="right")
    table.add_column("what the interval of the difference says")
    for row in results.get("arms") or []:
        metrics = row.get("metrics") or {}
        means = [(metrics.get(name) or {}).get("mean") for name in _SHARES]
        cells = ["-" if mean is None else f"{100 * mean:.1f}" for mean in means]
        names = [str(row.get(name)) for name in ("task", "target_name", "id")]
        differences = row.get("differences") or {}
        alike = {str(entry.get("verdict")) for entry in differences.values()}
        table.add_row(*names, *cells, alike.pop() if len(alike) == 1 else _verdicts(differences))
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


def _show_making(directory: Path, console: Console) -> None:
    """A folder of `trimtab learn`: its brain, or how far its learners are."""
    if (directory / "brain" / "brain.json").is_file():
        _show_brain(directory / "brain", console)
        return
    plan = read_json(directory / "learn.json")
    recipe = plan["recipe"]
    rows = {"recipe": f"{recipe['recipe']}: {recipe['idea']}", "command": plan["command"], "brain": "not made yet"}
    for index in range(recipe["seeds"]):
        lines = read_lines(directory / f"seed-{index}" / "curve.jsonl")
        done = max((line["iteration"] for line in lines), default=0)
        rows[f"seed-{index}"] = f"{done} of {recipe['iterations']} iterations"
    _print_rows(rows, console)


def _show_brain(directory: Path, console: Console) -> None:
    from trimtab.brain import Brain  # imports torch
    from trimtab.brain_files import kind_of
    from trimtab.pruner.policies import KIND, TaughtPolicy

    rows: dict[str, Any]
    if kind_of(directory) == KIND:
        provenance = dict(TaughtPolicy.load(directory).provenance)
        rows = {"agent": "ppo of trimtab.prune", "curve (episodes, reward)": _in_words(provenance.pop("curve", None))}
    else:
        brain = Brain.load(directory)
        rows = {"agent": brain.agent.name, "spec": brain.spec.fingerprint}
        rows |= {f"option {key}": _in_words(value) for key, value in brain.agent.options.items()}
        provenance = dict(brain.provenance)
    validation = provenance.pop("validation", None)
    for key, value in provenance.items():
        if key == "recipe" and isinstance(value, Mapping):
            rows |= {f"recipe {part}".replace("recipe recipe", "recipe"): _in_words(v) for part, v in value.items()}
        elif key == "curves" and isinstance(value, Mapping):
            rows |= {f"curve of {name}": _curve_in_words(points) for name, points in value.items()}
        else:
            rows[key] = _in_words(value)
    _print_rows(rows, console)
    if isinstance(validation, Mapping):
        console.print(_validation_table(validation))


def _in_words(value: Any) -> str:
    """A nest of JSON on one line: "cpu_s 8.1, networks 192"."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_in_words(item)}" for key, item in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        nested = any(isinstance(item, (list, tuple, Mapping)) for item in value)
        return ("; " if nested else ", ").join(map(_in_words, value)) or "none"
    return str(value)


def _curve_in_words(points: Any) -> str:
    """Of (iteration, loss relative to uwhg's) the first, the lowest and the last."""
    if not points:
        return "none"
    first, lowest, last = points[0], min(points, key=lambda point: point[1]), points[-1]
    return ", ".join(
        f"{name} {ratio:.3f} at iteration {iteration:g}"
        for name, (iteration, ratio) in (("first", first), ("lowest", lowest), ("last", last))
    )


def _validation_table(validation: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """Numbers of every agent that could be chosen, by family, on the tasks of the choice."""
    table = Table(title="on the tasks of the choice (final losses relative to)", title_justify="left")
    table.add_column("agent")
    table.add_column("family")
    columns = ("ratio_uwhg", "ratio_cosine", "mean_rank", "rolled_back", "n_tasks")
    for name in ("uwhg's", "cosine's", "rank", "rolled back", "tasks"):
        table.add_column(name, justify="right")
    for agent, families in validation.items():
        for family, numbers in families.items():
            table.add_row(agent, family, *(f"{numbers.get(column, float('nan')):.4g}" for column in columns))
    return table


def _state(run: Path) -> str:
    return str(read_json(run / "result.json").get("status")) if (run / "result.json").is_file() else "unfinished"


def _print_rows(rows: Mapping[str, Any], console: Console) -> None:
    width = max(len(key) for key in rows)
    for key, value in rows.items():
        console.print(f"{key:<{width}}  {value}", markup=False, soft_wrap=True)
