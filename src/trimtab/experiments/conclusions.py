"""From numbers to words: what a study shows, and what of the user's configuration it would change.

Called by results.py, on the dict that becomes results.json; nothing is said here that is not in it, and nothing
that depends on the clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.experiments import words
from trimtab.experiments.stats import BETTER, MIN_SEEDS, NO_DIFFERENCE, TOO_FEW, WORSE

__all__ = ["recommendations", "sentences"]

# A placebo or a twin is a control, not something to use; and a search is no configuration.
_CANDIDATES = ("baseline", "learned", "rule")
_NAMES = {
    "tuned": "the tuned schedule",
    "placebo": "its placebo",
    "yoked": "its yoked twin",
    "search": "the search",
    "user": "your configuration",
}


def sentences(results: Mapping[str, Any]) -> list[str]:
    """The conclusion, one sentence or two an entry.

    Args:
        results: As results.collect makes it, up to the conclusion.
    """
    unfinished = results["unfinished"]
    found: list[str] = []
    if unfinished["n_over"] < unfinished["n_planned"]:
        found.append(
            f"Unfinished: {unfinished['n_over']} of {unfinished['n_planned']} runs have a result. "
            "What follows holds for those alone and may change."
        )
    for task in results["tasks"]:
        rows = [row for row in results["arms"] if row["task"] == task]
        found += _of_task(task, rows, results)
    for row in results["benchmark"]["arms"]:
        if row["kind"] in ("learned", "rule"):
            found.append(f"Benchmark: {_of_arm(row)}")
    found += _losses(results)
    found += _overall(results)
    return found


def _of_task(task: str, rows: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> list[str]:
    found = []
    if all(row["n_seeds"] == 0 for row in rows):
        return [f"{task}: no run has a test loss yet, so there is nothing to say."]
    most = max(row["n_seeds"] for row in rows)
    if most < MIN_SEEDS:
        found.append(
            f"{task}: {words.count(most, 'seed')} at most, {TOO_FEW}; the tables give values and ranges, "
            f"and intervals from {MIN_SEEDS} seeds on."
        )
    best = [row for row in rows if row["kind"] in (*_CANDIDATES, "search") and row["n_seeds"] >= MIN_SEEDS]
    if best:
        first = min(best, key=lambda row: row["metrics"]["test_loss"]["mean"])
        loss = words.number(first["metrics"]["test_loss"]["mean"])
        found.append(
            f"{task}: the lowest mean test loss is that of {first['id']} ({loss}, {first['kind']}). "
            "Being first in a table is not yet a difference: see the intervals."
        )
    found += [_of_arm(row) for row in rows if row["kind"] in ("learned", "rule")]
    decides = {row["id"] for row in rows if row["kind"] in ("learned", "rule")}
    entries = [entry for entry in results["grid"] if entry["task"] == task and entry["id"] in decides]
    return found + _one_run(task, entries, results["tuned_arm"]) + _sensitivity(task, rows)


def _one_run(task: str, entries: Sequence[Mapping[str, Any]], tuned: str | None) -> list[str]:
    """What one run from a rate that nobody tuned gives, where there are seeds and rates enough to say."""
    found = []
    for entry in entries:
        parts = []
        for key, what in (("over_tuned", str(tuned)), ("over_yoked", f"its yoked twin yoked:{entry['id']}")):
            ratio = entry["one_run"][key]
            if ratio is not None and ratio["interval"] is not None:
                size = f"{words.number(ratio['mean'])} {words.interval(ratio['interval'])}"
                parts.append(f"{size} of that of {what}, that is {_against_one(ratio['interval'])}")
        if parts:
            rates = words.count(len(entry["initial_lrs"]), "initial rate")
            found.append(f"{entry['id']} on {task}, one run from any of {rates}: test loss {words.listing(parts)}.")
    return found


def _against_one(interval: Sequence[float]) -> str:
    low, high = interval
    return BETTER if high < 1 else WORSE if low > 1 else NO_DIFFERENCE


def _of_arm(row: Mapping[str, Any]) -> str:
    parts = []
    has_tuned = any("tuned" in entry["roles"] for entry in row["differences"].values())
    for role, name in _NAMES.items():
        if role == "user" and has_tuned:
            continue  # the harder of the two bars is enough for a sentence
        for reference, entry in row["differences"].items():
            if role in entry["roles"]:
                second = entry["second"]["verdict"]
                aside = f" (by best validation loss: {second})" if second != entry["verdict"] else ""
                parts.append(f"against {name} {reference}: {words.difference(entry)}{aside}")
    if not parts:
        return f"{row['id']} on {row['task']}: the study has nothing to compare it with."
    return f"{row['id']} on {row['task']}, test loss " + "; ".join(parts) + ". " + _meaning(row)


def _meaning(row: Mapping[str, Any]) -> str:
    """What the two controls say together. Only the twin speaks for control rather than for a better schedule."""
    placebo, yoked = _verdict(row, "placebo"), _verdict(row, "yoked")
    if yoked is None:
        said = "Without a yoked twin nothing is said about control as against a better schedule."
    elif yoked == TOO_FEW:
        said = f"Whether looking at the run helped: {TOO_FEW}."
    elif yoked == BETTER and placebo in (BETTER, None):
        said = "Looking at the run paid: the same kind of decisions taken without looking do worse."
    elif yoked == BETTER:
        said = "Its decisions suit the run that they were taken in: replayed in another one they do worse."
    elif yoked == WORSE:
        said = "Looking at the run did not pay: its decisions, replayed without looking, do better."
    elif placebo == BETTER:
        said = (
            "It is a better schedule than its base; that looking at the run helped is not shown, since its decisions "
            "replayed without looking are not shown to be worse."
        )
    else:
        said = "That looking at the run when it took its decisions helped is not shown."
    if placebo == WORSE:
        said += " But they did harm: leaving the base schedule alone does better."
    elif placebo == NO_DIFFERENCE:
        said += " That they changed anything for the better, against leaving the base schedule alone, is not shown."
    return said


def _verdict(row: Mapping[str, Any], role: str) -> str | None:
    """The verdict against the references of a role; with several, the least favourable one."""
    order = [WORSE, NO_DIFFERENCE, TOO_FEW, BETTER]
    verdicts = [entry["verdict"] for entry in row["differences"].values() if role in entry["roles"]]
    return min(verdicts, key=order.index, default=None)


def _sensitivity(task: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    known = [row for row in rows if row["sensitivity"] and row["kind"] in _CANDIDATES]
    ratios = {row["id"]: row["sensitivity"]["worst_over_best"] for row in known}
    finite = {arm: ratio for arm, ratio in ratios.items() if ratio is not None}
    lost = [arm for arm, ratio in ratios.items() if ratio is None]
    found = []
    if finite:
        arms = sorted(finite, key=lambda arm: (finite[arm], arm))
        without = {row["id"]: sum(row["sensitivity"]["runs_without_a_finite_loss"]) for row in known}
        shown = [
            f"{words.number(finite[arm], digits=3)} for {arm}"
            + (f" (without {words.count(without[arm], 'run')} that did not end finite)" if without[arm] else "")
            for arm in arms
        ]
        found.append(
            f"{task}: over the initial rates tried, the worst mean final validation loss over the best is "
            f"{words.listing(shown)}."
        )
    if lost:
        found.append(f"{task}: at one of the initial rates or more, no run of {words.listing(lost)} ended finite.")
    return found


def _losses(results: Mapping[str, Any]) -> list[str]:
    """Runs that gave up, failed or have no value: said, arm by arm."""
    found = []
    for row in [*results["arms"], *results["benchmark"]["arms"]]:
        status = row["status"]
        parts = [
            f"{status[key]} of {status['planned']} {word}"
            for key, word in (
                ("gave_up", "gave up (ended by the guard, best weights kept and counted)"),
                ("failed", "failed"),
                ("without_a_test_loss", "ended without a finite test loss"),
            )
            if status[key]
        ]
        if parts:
            left = status["failed"] + status["without_a_test_loss"]
            aside = " Its means are over the others, which flatters it." if left else ""
            found.append(f"{row['id']} on {row['task']}: {words.listing(parts)}.{aside}")
    return found


def _overall(results: Mapping[str, Any]) -> list[str]:
    """The negative results in plain words."""
    rows = [row for row in results["arms"] if row["kind"] == "learned" and row["n_seeds"]]
    found = []
    for role, what, meaning in (
        ("tuned", "the tuned schedule", ""),
        ("yoked", "its yoked twin", " Control, as against a better schedule, is not shown."),
    ):
        verdicts = [verdict for row in rows if (verdict := _verdict(row, role)) is not None]
        if verdicts and BETTER not in verdicts and set(verdicts) != {TOO_FEW}:
            found.append(f"No learned arm was shown to be better than {what} on any task of this study.{meaning}")
    if rows and results["tuned_arm"] is None:
        found.append("The study has no tuned schedule, so nothing is said about a gain over the best one.")
    return found


def recommendations(
    results: Mapping[str, Any], user_config: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Changes of the user's configuration that an interval supports, and a reason for each task.

    A change is recommended where the interval of the test loss of an arm against the user's own arm lies below 0.
    Of several such arms the one with the lowest mean final validation loss is taken, so that the test set does not
    choose; arms with a failed or missing run are never recommended, nor is an arm that decides where it is not shown
    to be better than what it would be without its decisions: then the plain schedule is what helped.

    Args:
        results: As results.collect makes it, up to the recommendations.
        user_config: Settings by name; `schedule` and `lr` are compared with the arms.
    """
    changes: list[dict[str, Any]] = []
    reasons: dict[str, str] = {}
    for task in results["tasks"]:
        user = results["user_arm"][task]
        rows = {row["id"]: row for row in results["arms"] if row["task"] == task}
        if user is None:
            reasons[task] = "Nothing is recommended: no arm of the study does what your configuration does."
            continue
        arms = [row for row in rows.values() if row["kind"] in _CANDIDATES and row["id"] != user]
        better = [row for row in arms if _is_supported(row, user)]
        supported = [row for row in better if _decisions_helped(row)]
        idle = [str(row["id"]) for row in better if row not in supported]
        if not supported:
            reasons[task] = _why_nothing(arms, user, idle)
            continue
        chosen = min(supported, key=lambda row: (row["metrics"]["final_val_loss"]["mean"], row["id"]))
        made = _changes(chosen, rows[user], user_config)
        changes += made
        reasons[task] = (
            _reason(chosen, supported, rows[user], user_config, idle)
            if made
            else (f"Nothing is recommended: {chosen['id']} has the settings that your configuration has.")
        )
    return changes, reasons


def _is_supported(row: Mapping[str, Any], user: str) -> bool:
    status, entry = row["status"], row["differences"].get(user)
    whole = status["done"] + status["gave_up"] == status["planned"] and not status["without_a_test_loss"]
    return bool(entry) and entry["verdict"] == BETTER and whole and row["metrics"]["final_val_loss"]["n"] > 0


def _decisions_helped(row: Mapping[str, Any]) -> bool:
    """Whether it beats its placebo and its base schedule at the same rate, as far as the study has them."""
    return all(_verdict(row, role) in (None, BETTER) for role in ("placebo", "same schedule and rate"))


def _why_nothing(arms: Sequence[Mapping[str, Any]], user: str, idle: Sequence[str]) -> str:
    if idle:
        return f"Nothing is recommended: {_of_no_use(idle)}"
    verdicts = [row["differences"][user]["verdict"] for row in arms if user in row["differences"]]
    if verdicts and set(verdicts) == {TOO_FEW}:
        return f"Nothing is recommended: {TOO_FEW} against your configuration ({user})."
    if BETTER in verdicts:
        return f"Nothing is recommended: what is better than your configuration ({user}) has failed or missing runs."
    return f"Nothing is recommended: no arm is shown to be better than your configuration ({user})."


def _of_no_use(idle: Sequence[str]) -> str:
    return (
        f"{', '.join(idle)}: better than your configuration too, but not shown to be better than the same schedule "
        "without decisions at the same rate. "
    )


def _changes(row: Mapping[str, Any], user: Mapping[str, Any], config: Mapping[str, Any]) -> list[dict[str, Any]]:
    wanted: dict[str, Any] = {"schedule": row["agent"], "lr": row["initial_lr"]}
    wanted.update({str(name): value for name, value in row["options"].items() if not isinstance(value, (dict, list))})
    old_rate = config.get("lr", user["initial_lr"])
    old = {**config, "lr": old_rate.get(row["task"]) if isinstance(old_rate, Mapping) else old_rate}
    entry = row["differences"][user["id"]]
    support = f"{row['id']} against {user['id']} on {row['task']}, test loss: {words.difference(entry)}"
    return [
        {
            "task": row["task"],
            "arm": row["id"],
            "setting": setting,
            "old": old.get(setting),
            "new": new,
            "supported_by": support,
        }
        for setting, new in wanted.items()
        if new is not None and new != old.get(setting)
    ]


def _reason(
    chosen: Mapping[str, Any],
    supported: Sequence[Mapping[str, Any]],
    user: Mapping[str, Any],
    config: Mapping[str, Any],
    idle: Sequence[str],
) -> str:
    said = (
        f"{chosen['id']} against your configuration ({user['id']}), test loss "
        f"{words.difference(chosen['differences'][user['id']])}. "
    )
    if len(supported) > 1:
        said += (
            f"Of {len(supported)} arms that are shown to be better it has the lowest mean final validation loss; "
            "that it is better than the others is not claimed. "
        )
    said += f"Left out: {_of_no_use(idle)}" if idle else ""
    rate = config.get("lr")
    rate = rate.get(chosen["task"]) if isinstance(rate, Mapping) else rate
    if rate is not None and user["initial_lr"] is not None and rate != user["initial_lr"]:
        said += f"Note that {user['id']} ran here at {user['initial_lr']:g}, not at your {rate:g}. "
    return said + f"What it cost to learn or tune: {words.cost(chosen['cost'])}."
