"""Where a brain comes from, as it stands in its file, and whether a report may show it as one that had not seen a task.

Called by `learn`, which writes it, by what writes reports, and by tests.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.brain import Brain
from trimtab.errors import InputError
from trimtab.learning.choice import Choice
from trimtab.learning.recipe import Recipe
from trimtab.storage import read_json, read_lines
from trimtab.tasks.families import HELD_OUT, SOURCES, is_held_out

__all__ = ["check_provenance", "make_provenance"]


def _describe_tasks(recipe: Recipe) -> dict[str, Any]:
    """What a recipe's brain sees while it is taught and chosen: families, data sources, and what it never sees."""
    families = tuple(dict.fromkeys(recipe.tasks.families))
    # Families of validation count as seen: the choice among agents is made on them.
    seen = dict.fromkeys((*families, *recipe.choosing_families))
    sources = sorted({source for family in seen for source in SOURCES[family]})
    return {
        "families": list(families),
        "families_chosen_by": list(recipe.choosing_families),
        "families_held_out": list(recipe.validate_on.held_out),
        "sources": sources,
        "not_seen": [name for name in HELD_OUT if not any(_same(name, source) for source in sources)],
    }


def make_provenance(recipe: Recipe, out: Path, plan: Mapping[str, Any], chosen: Choice) -> dict[str, Any]:
    """Everything about a brain that a reader may want to know, JSON-able.

    Args:
        recipe: What it was made by.
        out: Folder of `learn`, in which everything but the brain is done.
        plan: What learn.json holds.
        chosen: The choice.
    """
    return {
        "command": plan["command"],
        "recipe": recipe.to_json(),
        "root_seed": plan["root_seed"],
        "learner_seeds": list(plan["learner_seeds"]),
        "versions": dict(plan["environment"]),
        "knobs": list(recipe.spec.knobs),
        **_describe_tasks(recipe),
        "chosen": chosen.name,
        "why": chosen.why,
        "members": list(chosen.brains),
        "validation": {row["name"]: _rounded(row["families"]) for row in chosen.candidates},
        "criteria": {row["name"]: round(row["criterion"], 4) for row in chosen.candidates},
        "curves": _curves(recipe, out),
        "cost": _cost(recipe, out, chosen),
    }


def _rounded(families: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    return {family: {key: round(value, 4) for key, value in numbers.items()} for family, numbers in families.items()}


def _curves(recipe: Recipe, out: Path) -> dict[str, list[list[float]]]:
    """Of each learner, at each validation: iteration, and the geometric mean over families of its loss / uwhg's."""
    curves = {}
    for index in range(recipe.seeds):
        rows = read_lines(out / f"seed-{index}" / "curve.jsonl")
        curves[f"seed-{index}"] = [
            [row["iteration"], round(row["criterion"], 4)] for row in rows if row.get("validation")
        ]
    return curves


def _cost(recipe: Recipe, out: Path, chosen: Choice) -> dict[str, float]:
    """What it took: CPU seconds of everything, and of learners the networks trained, their steps, the time."""
    costs = [read_json(out / f"seed-{index}" / "result.json")["cost"] for index in range(recipe.seeds)]
    rivals = [read_json(path)["cpu_s"] for path in sorted((out / "rivals").glob("*.json"))]
    beside = sum(rivals) + sum(row["cpu_s"] for row in chosen.candidates)
    return {
        "cpu_s": round(sum(cost["cpu_s"] for cost in costs) + beside, 1),
        "networks": int(sum(cost["networks"] for cost in costs)),
        "optimizer_steps": int(sum(cost["optimizer_steps"] for cost in costs)),
        "decisions": int(sum(cost["decisions"] for cost in costs)),
        "wall_s_of_a_learner": round(max(cost["wall_s"] for cost in costs), 1),
    }


def check_provenance(brain: Brain, tasks: Iterable[str]) -> None:
    """Refuse to report a brain, as one that has not seen them, on tasks that it was taught on.

    A brain that learned nothing (a rule) has seen nothing and passes.

    Args:
        brain: The brain; its provenance lists its `sources`.
        tasks: Names of the tasks or data sets of a report, however they are spelled.

    Raises:
        InputError: A task's data was among the sources, a source is one that no brain may be taught on, or the
            provenance does not say what the sources were.
    """
    if not brain.agent.state_dict():
        return
    sources = _sources(brain.provenance)
    forbidden = [source for source in sources if is_held_out(source)]
    if forbidden:
        raise InputError(
            f"this brain was taught on {', '.join(forbidden)}, on which brains are judged "
            f"({', '.join(HELD_OUT)}); learn it anew without"
        )
    for task in tasks:
        seen = next((source for source in sources if _same(task, source)), None)
        if seen is not None:
            raise InputError(
                f"task {task!r} is no test of this brain: it was taught on {seen!r}; report it in a table of its own"
            )


def _sources(provenance: Mapping[str, Any]) -> Sequence[str]:
    sources = provenance.get("sources")
    if not isinstance(sources, (list, tuple)) or not all(isinstance(source, str) for source in sources) or not sources:
        raise InputError(
            "the brain's provenance does not list its sources, so nobody can say what it has seen; "
            "make it by `trimtab learn`"
        )
    return sources


def _same(task: str, source: str) -> bool:
    """Whether two names speak of one data set: one holds the other, or both hold the name of a held-out one."""
    one, other = (re.sub(r"[^a-z0-9]", "", name.lower()) for name in (task, source))
    return one in other or other in one or any(held in one and held in other for held in HELD_OUT)
