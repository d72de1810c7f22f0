"""The table as Markdown, from what `page` of ablations.py gathered. Called by ablations.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ablation_suite.figures import LEAST_SEEDS, LEAST_TASKS
from ablation_suite.variants import FULL

__all__ = ["render"]


def render(page: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
        page: recipe (of `full`), root_seed, families (chosen by), held_out, rows (variant -> what, cpu_s, and what
            `summary.summarize` returned), unfinished (variants), failed and impossible (variant -> why).
    """
    recipe, rows = page["recipe"], page["rows"]
    lines = [f"# Ablations of the recipe {recipe['recipe']}", "", recipe["idea"], "", *_head(page), ""]
    if not rows:
        return "\n".join([*lines, "No variant is complete yet: nothing to show.", ""])
    columns = [*page["families"], *page["held_out"]]
    beside = ("held out, together",) if page["held_out"] else ()
    lines += ["## Final loss over that of `uwhg`", ""]
    head = (
        "variant",
        "together",
        *beside,
        *(_label(name, page) for name in columns),
        "CPU min",
        "what is different",
    )
    lines += [_row(head), _rule(len(head) - 1) + "---|"]
    for name, row in rows.items():
        cells = _cells(row["over_uwhg"], columns, bool(beside))
        lines.append(_row((f"`{name}`", *cells, f"{row['cpu_s'] / 60:.1f}", row["what"])))
    compared = {name: row for name, row in rows.items() if row["over_full"] is not None}
    lines += ["", "## Final loss over that of `full`, paired by learner and task", ""]
    if compared:
        head = ("variant", "together", *beside, *(_label(name, page) for name in columns))
        lines += [_row(head), _rule(len(head))]
        lines += [_row((f"`{n}`", *_cells(row["over_full"], columns, bool(beside)))) for n, row in compared.items()]
    else:
        lines.append(f"`{FULL}` and another variant are needed for it.")
    lines += ["", "![Loss relative to uwhg's against decisions taken in training](curves.png)", ""]
    return "\n".join([*lines, "## How to read this", "", *_notes(page, len(compared)), ""])


def _head(page: Mapping[str, Any]) -> list[str]:
    recipe = page["recipe"]
    lines = []
    if recipe["seeds"] < LEAST_SEEDS:
        lines += [f"**{recipe['seeds']} learners a variant: values and their range, no intervals, and nothing to "
                  "conclude.**", ""]  # fmt: skip
    held_out = ", ".join(page["held_out"]) or "none"
    lines += [
        f"- {recipe['seeds']} learners a variant, root seed {page['root_seed']}; {recipe['iterations']} iterations of "
        f"{recipe['num_envs']} runs each. Trained on {', '.join(recipe['tasks']['families'])}; chosen by "
        f"{', '.join(page['families'])}; held out: {held_out}.",
    ]
    lines += [f"- `{name}` failed: {why}" for name, why in page["failed"].items()]
    if page["unfinished"]:
        lines.append(f"- Not learned yet: {', '.join(f'`{name}`' for name in page['unfinished'])}.")
    lines += [f"- There is no `{name}` of this recipe: {why}." for name, why in page["impossible"].items()]
    return lines


def _label(family: str, page: Mapping[str, Any]) -> str:
    return f"{family} (held out)" if family in page["held_out"] else family


def _cells(figures: Mapping[str, Any], columns: Sequence[str], has_held_out: bool) -> list[str]:
    beside = [_cell(figures["held_out"])] if has_held_out else []
    return [_cell(figures["overall"]), *beside, *(_cell(figures["families"][name]) for name in columns)]


def _cell(figure: Mapping[str, Any]) -> str:
    value, ends = f"{figure['value']:.3f}", figure["interval"]
    if ends is not None:
        return f"{value} [{ends[0]:.3f}, {ends[1]:.3f}]"
    learners = figure["learners"]
    return value if len(learners) == 1 else f"{value} ({min(learners):.3f} to {max(learners):.3f})"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(n: int) -> str:
    return "|---" + "|---:" * (n - 1) + "|"


def _notes(page: Mapping[str, Any], n_compared: int) -> list[str]:
    return [
        "- Below 1 the variant ends lower than `uwhg` in the first table, and lower than `full` in the second: there a "
        "variant above 1 lacks something that helps. Geometric means over tasks, over families with equal weight "
        "(*together*: those that agents are chosen by), and over learners; the loss of a task is the mean over its "
        "runs, on the split that is never observed.",
        "- Every variant differs from `full` in one thing. `full` is the recipe with `keep_ranges: false` and `choose: "
        "best`, as all variants are: the rule that decides outside what was learned on needs signals that some of them "
        "do not observe, and an ensemble would leave one value instead of one for each learner.",
        "- All variants, and `uwhg` (over the base schedule of `full`), played the same episodes: tasks, data order, "
        "initial weights and rates, and budgets. No agent was watched or chosen on these. (The tasks of the choice "
        "are not the same for variants that decide at other times: their budgets differ.) Of each learner it is the "
        "agent that `trimtab learn` would choose by those: the last, or the best one on the way.",
        f"- In brackets: 95 % intervals over learners and tasks (Student's t; {LEAST_SEEDS} learners and {LEAST_TASKS} "
        "tasks of each family at least), or in parentheses the range over learners. They speak of other seeds and "
        f"other tasks of these families, not of other families. Each is for itself: of {max(1, n_compared)} variants "
        f"that change nothing, {0.05 * max(1, n_compared):.2g} are expected to have an interval without 1.",
        "- Learners are paired: number i of a variant draws from the same seed as number i of `full`.",
        "- The picture shows the tasks on which learners were watched; there budgets of variants that decide at other "
        "times differ, of short runs without early decisions by many steps.",
    ]
