"""The tables as Markdown, from what `summarize` gave. Called by zero_shot.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from zero_shot_suite.arms import TUNED
from zero_shot_suite.figures import CAP, MIN_GROUPS
from zero_shot_suite.parts import PARTS
from zero_shot_suite.plan import DIVERGED
from zero_shot_suite.summary import GOALS

__all__ = ["render"]

_FIRST = ("default", "default-loss", "default-open", "uwhg", "placebo:default", "yoked:default", "q_learning")
_LAST = ("default-cosine", "prodigy", "prodigy-cosine", *TUNED)
_GOALS = {
    "ratio": f"geometric mean over tuned cosine at most {GOALS['ratio']:.2f}",
    "worst": f"no part above {GOALS['worst']:.2f}",
    "search_equivalent": f"search-equivalent runs at least {GOALS['search_equivalent']:.0f}",
    "better_than_uwhg": "better than `uwhg`, with an interval over tasks that excludes 1",
    "time_to_target": f"median time to target at most {GOALS['time_to_target']:.1f} of the budget",
}
_SAID = {True: "reached", False: "**not reached**", None: "cannot be said from this"}


def render(summary: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
        summary: What `summary.summarize` returned.
    """
    lines = ["# One run from any learning rate, against tuned schedules", "", *_head(summary)]
    final, best, averaged = summary["final"], summary["best"], summary["averaged"]
    if final is None:
        return "\n".join([*lines, "No part is complete yet: nothing to show.", ""])
    arms = _ordered(final["arms"])
    lines += ["", "## Over all parts", "", *_main(final, best, averaged, arms)]
    lines += ["", "## Goals", "", *_goals(final)]
    lines += ["", "## By initial rate", "", *_decades(final, arms)]
    lines += ["", "## Each part, final weights", "", *_parts(final, arms)]
    lines += ["", "## Each part, final weights, over the best-tuned arm", "", *_over_best(final, arms)]
    lines += ["", "## Each part, weights of the best validation loss", "", *_parts(best, arms)]
    lines += ["", "## Each part, the same or averaged weights", "", *_parts(averaged, arms)]
    if budgets := _budgets(final):
        lines += ["", "## What brains used of the budget", "", *budgets]
    lines += ["", "## Tuning", "", *_tuning(final)]
    lines += ["", "## One arm over another", "", *_differences(final)]
    lines += ["", "## How to read this", "", *_notes(), ""]
    return "\n".join(lines)


def _ordered(arms: Iterable[str]) -> list[str]:
    names = list(arms)
    brains = [name for name in names if name.startswith("brain:")]
    order = [*_FIRST[:2], *brains, *_FIRST[2:], *_LAST]
    return [name for name in order if name in names]


def _head(summary: Mapping[str, Any]) -> list[str]:
    head = summary["head"]
    lines = []
    if head["is_trial"]:
        lines += ["**A TRIAL: fewer rates or seeds than the benchmark asks for (16 rates, 8 + 8 seeds); its numbers "
                  "say that it works, and nothing else.**", ""]  # fmt: skip
    options = head["options"]
    shown: dict[str, list[str]] = {}
    for part, given in options.items():
        text = (
            f"{given['rates']} rates, {given['seeds']} seeds to choose and {given['seeds']} others to report (tuned "
            f"arms beside cosine: {given['other_seeds']} to choose, and every second rate first)"
        )
        shown.setdefault(text, []).append(part)
    for text, parts in shown.items():
        names = ", ".join(parts) if len(shown) > 1 or len(parts) < 3 else f"all {len(parts)} parts that were run"
        lines.append(f"- {text}: {names}.")
    missing = [part for part in PARTS if part not in options]
    if missing:
        lines.append(f"- Not run: {', '.join(missing)}.")
    if summary["incomplete"]:
        lines.append(f"- Left out, since runs are missing: {', '.join(summary['incomplete'])}.")
    machine = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in head["machine"].items())
    more = "" if head["machines"] == 1 else f" (the first of {head['machines']} kinds)"
    lines.append(f"- {machine}{more}; {head['runs']} runs, {head['cpu_s'] / 3600:.2f} CPU hours; "
                 f"the longest run took {head['largest_run_s']:.1f} CPU s.")  # fmt: skip
    ours = {arm: names for arm, names in head["arms"].items() if arm == "default" or arm.startswith("brain:")}
    lines += [f"- `{arm}` is {' and '.join(names)} (agent, hash of the brain)." for arm, names in ours.items()]
    return lines


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(n: int) -> str:
    return "|---" + "|---:" * (n - 1) + "|"


def _between(item: Mapping[str, Any] | None, digits: int = 3) -> str:
    if item is None:
        return "-"
    ends = item["interval"]
    mean = f"{item['mean']:.{digits}f}"
    return mean if ends is None else f"{mean} [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"


def _main(
    final: Mapping[str, Any], best: Mapping[str, Any], averaged: Mapping[str, Any], arms: Sequence[str]
) -> list[str]:
    head = ("arm", "test loss over tuned cosine", "over the best-tuned arm", "worst part: over tuned cosine",
            "worst part: over the best-tuned arm", "search-equivalent runs", "time to target",
            "best-validation weights: over tuned cosine", "the same or averaged: over tuned cosine",
            "over tuned cosine without averaging")  # fmt: skip
    lines = [_row(head), _rule(len(head))]
    for arm in arms:
        row = final["arms"][arm]
        n = "" if row["n_parts"] == len(final["parts"]) else f" ({row['n_parts']} parts)"
        other, mean = best["arms"].get(arm), averaged["arms"].get(arm)
        lines.append(_row((
            f"`{arm}`{n}",
            "1" if arm == "cosine" else _between(row["ratio"]),
            _between(row["over_best"]),
            "-" if arm == "cosine" else f"{row['worst']['ratio']:.2f} ({row['worst']['part']})",
            f"{row['worst_over_best']:.2f}",
            _runs(row["search_equivalent"]),
            "never" if row["time_to_target"] is None else f"{row['time_to_target']:.2f}",
            "-" if other is None else ("1" if arm == "cosine" else _between(other["ratio"])),
            "-" if mean is None else ("1" if arm == "cosine" else _between(mean["ratio"])),
            "-" if mean is None else _between(mean["over_best_weights"]),
        )))  # fmt: skip
    search = final["cosine_at_random"]
    shown = ", ".join(f"{n}: {value:.3f}" for n, value in search.items())
    lines += ["", f"Random search over cosine's rate, best on validation of n runs, over tuned cosine: {shown}."]
    brains = final["brains"]
    if brains is not None:
        over = f"; over `uwhg` {_between(brains['over_uwhg'])}" if "over_uwhg" in brains else ""
        lines += ["", f"The {len(brains['names'])} brains together, interval over tasks and brains: over tuned cosine "
                      f"{_between(brains['ratio'])}{over}."]  # fmt: skip
    return lines


def _runs(item: Mapping[str, Any] | None) -> str:
    if item is None:
        return "-"
    ends = item["interval"]
    return _count(item["runs"]) + ("" if ends is None else f" [{_count(ends[0])}, {_count(ends[1])}]")


def _count(runs: float) -> str:
    if runs >= CAP:
        return f"{CAP} or more"
    return "1 or fewer" if runs <= 1 else f"{runs:.1f}"


def _goals(final: Mapping[str, Any]) -> list[str]:
    goals = final["goals"]
    arms = _ordered_any(goals)
    if not arms:
        return ["No arm of ours has run on every part."]
    lines = [_row(("goal", *(f"`{arm}`" for arm in arms))), _rule(1 + len(arms))]
    return lines + [_row((text, *(_SAID[goals[arm][key]] for arm in arms))) for key, text in _GOALS.items()]


def _ordered_any(arms: Iterable[str]) -> list[str]:
    return _ordered(dict.fromkeys(arms))


def _decades(final: Mapping[str, Any], arms: Sequence[str]) -> list[str]:
    rows = {arm: final["arms"][arm]["by_decade"] for arm in arms if final["arms"][arm]["by_decade"]}
    decades = list(dict.fromkeys(decade for row in rows.values() for decade in row))
    lines = ["Test loss over tuned cosine, geometric mean over parts, by the decade that the initial rate was drawn "
             "from.", "", _row(("arm", *decades)), _rule(1 + len(decades))]  # fmt: skip
    for arm, row in rows.items():
        lines.append(_row((f"`{arm}`", *(f"{row[d]:.3f}" if d in row else "-" for d in decades))))
    return lines


def _parts(data: Mapping[str, Any], arms: Sequence[str]) -> list[str]:
    shown = [arm for arm in arms if arm != "cosine" and arm in data["arms"]]
    head = ("part", "tuned cosine: test loss", "cosine, a random rate", *shown)
    lines = ["Test loss over tuned cosine; in brackets search-equivalent runs.", "", _row(head), _rule(len(head))]
    for part in data["parts"]:
        cosine = part["arms"]["cosine"]
        cells = [part["part"], f"{cosine['test_loss']:.4f} ± {cosine['stderr']:.4f}", f"{part['cosine_at_random']:.2f}"]
        for arm in shown:
            row = part["arms"].get(arm)
            cells.append("-" if row is None else f"{row['ratio']:.3f}" + _short(row["search_equivalent"]))
        lines.append(_row(cells))
    return lines


def _budgets(data: Mapping[str, Any]) -> list[str]:
    rows = []
    for part in data["parts"]:
        for arm, row in part["arms"].items():
            if budget := row.get("budget"):
                rows.append(_row((
                    part["part"], f"`{arm}`", str(part["total_steps"]), f"{budget['steps']:.0f}",
                    f"{budget['samples']:.0f}", f"{budget['flops'] / 1e9:.4g}", f"{budget['share']:.1%}",
                    ", ".join(budget["masked"]) or "none",
                )))  # fmt: skip
    head = ("part", "arm", "budget, steps as the task has them", "steps", "samples", "training GFLOPs", "share of the "
            "budget", "knobs left out")  # fmt: skip
    lines = [
        "Every arm has the training FLOPs of the part's optimizer steps as its task has them; means over runs.",
        "",
    ]
    return [*lines, _row(head), _rule(len(head)), *rows] if rows else []


def _over_best(data: Mapping[str, Any], arms: Sequence[str]) -> list[str]:
    head = ("part", "best-tuned arm", "its rate", *arms)
    lines = ["Test loss over that of the best-tuned arm of the part.", "", _row(head), _rule(len(head))]
    for part in data["parts"]:
        rows = [part["arms"].get(arm) for arm in arms]
        shown = ["-" if row is None else f"{row['over_best']:.3f}" for row in rows]
        lines.append(_row((part["part"], part["best_arm"], f"{part['tuned_rates'][part['best_arm']]:.2g}", *shown)))
    return lines


def _short(runs: float | None) -> str:
    return "" if runs is None else f" ({CAP}+)" if runs >= CAP else f" ({runs:.1f})"


def _tuning(final: Mapping[str, Any]) -> list[str]:
    head = ("part", "optimizer", "steps", "CPU s a run", "runs", "best-tuned arm", *TUNED, "diverged")
    lines = ["The rate that each arm is tuned to (* at the edge of the grid), and the report runs that diverged.", "",
             _row(head), _rule(len(head))]  # fmt: skip
    for part in final["parts"]:
        rates = [f"{part['tuned_rates'][arm]:.2g}{'*' if arm in part['at_edge'] else ''}" for arm in TUNED]
        diverged = ", ".join(f"{arm} {count}" for arm, count in part["diverged"].items()) or "none"
        lines.append(_row((
            part["part"], part["optimizer"], str(part["total_steps"]), f"{part['seconds_a_run']:.2f}",
            str(part["runs"]), part["best_arm"], *rates, diverged,
        )))  # fmt: skip
    return lines


def _differences(final: Mapping[str, Any]) -> list[str]:
    lines = ["Mean test loss of the first over that of the second, geometric mean over parts.", "",
             _row(("arm", "over", "ratio")), _rule(3)]  # fmt: skip
    return lines + [_row((row["arm"], row["other"], _between(row))) for row in final["differences"]]


def _notes() -> list[str]:
    return [
        "- **Tuned** arms: the rate with the least mean validation loss over the choosing seeds; test loss over other "
        "seeds. The best-tuned arm of a part is the one of cosine, WSD, plateau, Schedule-Free and constant with the "
        "least validation loss on the choosing seeds that all of them have.",
        "- All other arms: one run for each report seed, from a rate drawn log-uniformly from 1e-5..1e-1, the same for "
        "all.",
        "- `default`: `RLScheduler` without a further argument but the model, told the validation loss by `report`. "
        "`default-loss`: only ever `step(loss)`. `default-open`: as `default`, not told when the run ends. "
        "`brain:NAME`: as `default`, with that brain. `uwhg`: as `default`, with the rule that learns nothing. "
        "`placebo:default` decides, and only its cosine from the drawn rate is written; `yoked:default` replays what "
        "`default` decided under another seed, from that run's rate. `q_learning`: from an empty table, over a cosine.",
        "- `default-cosine` (1e-3; for SGD 0.1), `prodigy` and `prodigy-cosine` (1; in place of SGD too) have a rate "
        "of their own, and do not use the drawn one.",
        "- **Search-equivalent runs**: so many cosine runs at rates drawn like that, best on validation kept, are "
        "expected to end at the test loss of one run of the arm. Exact expectation over the runs of the grid, "
        "interpolated in log n, at most 256; over parts, where the geometric means are equal. Interval: bootstrap over "
        "tasks and seeds.",
        "- **Averaged**: a running average of the weights over about the last fifth of the run, the same for every "
        "arm, instead of the best-validation weights where its validation loss is lower (`best_state()` returns it "
        "then). The first of the two columns is over tuned cosine with the same choice, the second over tuned cosine "
        "with best-validation weights alone: what averaging is worth shows in the row of `cosine`.",
        "- **Time to target**: share of the budget at which a run first reached the validation loss that tuned cosine "
        "ended with from the same weights and data order; median over runs.",
        "- Other intervals: 95 %, bootstrap over tasks, the parts of one task together; none with fewer than "
        f"{MIN_GROUPS} tasks. All are expanded percentiles (Hesterberg 2015): the middle 95 % of the draws would be "
        "too narrow for so few tasks.",
        "- A random search may end below tuned cosine: it keeps the best of its seeds too.",
        f"- A loss that is not finite, or above {DIVERGED:g} times the validation loss at the run's start, counts as "
        "that, for every arm.",
        "- Validation is measured at the task's `eval_every` and before the first step; best-validation weights are "
        "the best of those, for every arm alike. The test split is read at a run's end only.",
    ]
