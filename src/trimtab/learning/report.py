"""report.md of a brain's making: what was chosen, the validation tables, the curves, the cost. Short.

Called by `learn`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.learning import curves
from trimtab.learning.recipe import Recipe
from trimtab.storage import atomic_write, read_lines

__all__ = ["write"]


def write(recipe: Recipe, out: Path, provenance: Mapping[str, Any]) -> Path:
    """Write report.md and its picture.

    Args:
        recipe: The recipe.
        out: Folder of `learn`.
        provenance: Of the brain.

    Returns:
        report.md.
    """
    learners = [read_lines(out / f"seed-{index}" / "curve.jsonl") for index in range(recipe.seeds)]
    curves.draw(learners, recipe.validate_on.held_out, out / "plots" / "curves.png")
    path = out / "report.md"
    atomic_write(path, _text(recipe, provenance))
    return path


def _text(recipe: Recipe, provenance: Mapping[str, Any]) -> str:
    cost = provenance["cost"]
    parts = [
        f"# Brain by the recipe {recipe.recipe}",
        recipe.idea,
        f"Chosen: **{provenance['chosen']}**. {_sentence(provenance['why'])}",
        f"Made by `{provenance['command']}`.",
        f"Taught on: {', '.join(provenance['families'])}. Held out: "
        f"{', '.join(provenance['families_held_out']) or 'no family'}. "
        f"Data sets that it has not seen: {', '.join(provenance['not_seen'])}.",
        "## Validation",
        "Ratios of final losses on tasks that no learner met, and that were looked at for the choice alone: below 1 "
        "the agent is better. The chosen one's numbers are flattered by having been chosen; what it is worth stands in "
        "reports on other tasks. In brackets: 1.96 standard errors over tasks to each side. `rank` is that among "
        "the agent, uwhg and a cosine at the same initial rate, in the same run: 1 is best, 3 worst.",
        _table(recipe, provenance),
        "## While they learned",
        "![Return and loss relative to uwhg's against decisions taken](plots/curves.png)",
        "Thin lines are learners, thick ones their mean"
        + (
            ", bands its 95 % interval (Student's t over learners)."
            if recipe.seeds >= curves.LEAST_SEEDS
            else "; five learners or more have a band."
        )
        + " Ratios are averaged as logarithms; families that were held out are dashed. These are other validation "
        "tasks than those above, the same at every look. The return shown is that of validation, "
        "1 - rank / 2; in training, with ranks among its own runs as the reward, its mean is always 0.",
        "## Cost",
        f"{cost['cpu_s']:.0f} CPU seconds in all; {cost['networks']} small networks trained for "
        f"{cost['optimizer_steps']} optimizer steps in all; the slowest learner took "
        f"{cost['wall_s_of_a_learner']:.0f} s.",
    ]
    return "\n\n".join(parts) + "\n"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _table(recipe: Recipe, provenance: Mapping[str, Any]) -> str:
    rows = [
        "| agent | family | loss / uwhg's | loss / cosine's | rank | runs rolled back | tasks |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, families in provenance["validation"].items():
        for family, numbers in families.items():
            mark = " (held out)" if family in recipe.validate_on.held_out else ""
            rows.append(
                f"| {name} | {family}{mark} | {_ratio(numbers, 'uwhg')} | {_ratio(numbers, 'cosine')} | "
                f"{numbers['mean_rank']:.2f} | {100 * numbers['rolled_back']:.0f} % | {numbers['n_tasks']:.0f} |"
            )
    return "\n".join(rows)


def _ratio(numbers: Mapping[str, float], rival: str) -> str:
    ratio, error = numbers[f"ratio_{rival}"], numbers[f"log_se_{rival}"]
    low, high = ratio * math.exp(-1.96 * error), ratio * math.exp(1.96 * error)
    return f"{ratio:.3f} [{low:.2f}, {high:.2f}]"
