"""The choice of one agent among those that several learners made, by validation tasks that no learner was watched on.

Called by `learn` when all candidates have been judged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import InputError
from trimtab.learning.recipe import Recipe
from trimtab.storage import read_json

__all__ = ["Choice", "choose", "choose_of_learner"]

ENSEMBLE = "ensemble"


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        name: Of the candidate.
        brains: Folders of its members, relative to the folder of `learn`.
        why: Why, in a sentence.
        candidates: Every candidate as it was judged: name, brains, criterion, families, cpu_s; best first.
    """

    name: str
    brains: Sequence[str]
    why: str
    candidates: Sequence[Mapping[str, Any]]


def choose(recipe: Recipe, out: Path) -> Choice:
    """Choose as the recipe says; equal candidates by name.

    Args:
        recipe: Its `choose`.
        out: Folder of `learn`, with every candidate's file in it.

    Raises:
        InputError: No candidate of the kind that is asked for is there.
    """
    rows = [read_json(path) for path in sorted((out / "candidates").glob("*.json"))]
    rows.sort(key=lambda row: (row["criterion"], row["name"]))
    singles = [row for row in rows if row["name"] != ENSEMBLE]
    joined = [row for row in rows if row["name"] == ENSEMBLE]
    allowed = {"best": singles, "ensemble": joined, "best-or-ensemble": rows}[recipe.choose]
    if not allowed:
        raise InputError(f"{out / 'candidates'} holds no candidate for choose: {recipe.choose!r}; judge them first")
    best = allowed[0]
    families = ", ".join(recipe.choosing_families)
    why = (
        f"{best['name']} has the lowest final loss relative to uwhg's ({best['criterion']:.3f}, geometric mean over "
        f"validation tasks of {families}) of {len(allowed)} that could be chosen ({recipe.choose!r})"
    )
    if recipe.choose == "ensemble":
        why = f"the recipe asks for the ensemble; its final loss is {best['criterion']:.3f} of uwhg's on {families}"
    return Choice(best["name"], tuple(best["brains"]), why, tuple(rows))


def choose_of_learner(out: Path, learner: str) -> str:
    """Folder, relative to `out`, of the better one of a learner's two agents; the last one, where both are equal.

    Args:
        out: Folder of `learn`, with the learner's candidates in it.
        learner: Name of its folder, "seed-N".

    Raises:
        InputError: Neither was judged.
    """
    paths = {which: out / "candidates" / f"{learner}-{which}.json" for which in ("last", "best")}
    criteria = {which: read_json(path)["criterion"] for which, path in paths.items() if path.is_file()}
    if not criteria:
        raise InputError(f"{out / 'candidates'} holds no candidate of {learner}; judge its agents first")
    return f"{learner}/{min(criteria, key=lambda which: criteria[which])}"
