"""Brains against each other on the same fresh tasks of the families: 64 tasks of each, four initial rates a task.

    python benchmarks/fresh_tasks.py --brain DIR --brain DIR ... [--train-rows LOW HIGH] [--seed N] [--out FILE.json]

For the question whether one brain is better than another, which the tasks that either was chosen by cannot answer. The
rule `uwhg` plays beside them. What is compared is the loss on the split that is never observed; the ratio of two agents
is the geometric mean over tasks, then over families, of the mean losses over a task's runs, with its standard error
over tasks. Seeds are unlike those of any recipe's tasks. A minute of CPU for each brain.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trimtab.agents.base import Timing
from trimtab.brain import Brain
from trimtab.envs.episodes import EpisodeOptions
from trimtab.errors import InputError
from trimtab.learning import validation
from trimtab.learning.validation import Episodes, Played, play
from trimtab.spec import ControlSpec, make_agent
from trimtab.storage import atomic_write

FAMILIES = ("mlp", "image_mlp", "wide_mlp", "cnn")
EPISODES, NUM_ENVS, RUNS_PER_TASK = 4, 64, 4
RULE = "uwhg"


def make_plan(train_rows: tuple[int, int] | None, seed: int, families: Sequence[str], episodes: int) -> Episodes:
    """The episodes: their budgets fit brains with six early decisions and with seven, and the rule."""
    options = EpisodeOptions(
        families=tuple(families), runs_per_task=RUNS_PER_TASK, max_cnn_horizon=400, train_rows=train_rows
    )
    timings = (Timing(None, 20, 6), Timing(None, 20, 7), ControlSpec.for_agent(make_agent(RULE)).timing)
    return Episodes(options, NUM_ENVS, episodes, seed, timings)


def compare(mine: Played, theirs: Played, name: str) -> dict[str, Any]:
    """Ratio of the losses of one agent to those of another: of each family, and over all."""
    table = validation.compare(mine, {name: theirs})
    errors = [row[f"log_se_{name}"] for row in table.values()]
    return {
        "ratio": validation.overall(table, list(table), f"ratio_{name}"),
        "log_se": math.hypot(*errors) / len(errors),
        "families": {family: row[f"ratio_{name}"] for family, row in table.items()},
        "n_tasks": sum(row["n_tasks"] for row in table.values()),
    }


def run(brains: Mapping[str, Brain], plan: Episodes) -> dict[str, Any]:
    """Let all play, and put each beside the first."""
    rule = make_agent(RULE)
    players = {name: (brain.agent, brain.spec) for name, brain in brains.items()}
    players[RULE] = (rule, ControlSpec.for_agent(rule))
    played: dict[str, Played] = {}
    rows = {}
    for name, (agent, spec) in players.items():
        began = time.process_time()
        played[name] = play(agent, spec, plan)
        first = next(iter(played))
        rows[name] = compare(played[name], played[first], first) | {"cpu_s": round(time.process_time() - began, 1)}
        row = rows[name]
        each = ", ".join(f"{family} {ratio:.3f}" for family, ratio in row["families"].items())
        print(f"{name} over {first}: {row['ratio']:.3f} ± {row['log_se']:.3f} ({each})", flush=True)
    return rows


def main(given: Sequence[str] | None = None) -> None:
    """Play, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--brain", action="append", default=[], metavar="DIR", help="or the name of one we ship")
    parser.add_argument("--train-rows", type=int, nargs=2, metavar=("LOW", "HIGH"), help="default: each family's own")
    parser.add_argument("--family", action="append", choices=FAMILIES, help=f"default: {', '.join(FAMILIES)}")
    parser.add_argument("--episodes", type=int, default=EPISODES, help="of 16 tasks in each family")
    parser.add_argument("--seed", type=int, default=77_001)
    parser.add_argument("--out", type=Path, help="a JSON file that the result is added to")
    arguments = parser.parse_args(given)
    if not arguments.brain:
        parser.error("give at least one --brain")
    torch.set_num_threads(1)
    train_rows = tuple(arguments.train_rows) if arguments.train_rows else None
    try:
        plan = make_plan(train_rows, arguments.seed, arguments.family or FAMILIES, arguments.episodes)
        rows = run({source: Brain.load(source) for source in arguments.brain}, plan)
    except InputError as error:
        parser.error(str(error))
    if arguments.out is not None:
        kept = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
        found = {"train_rows": train_rows, "seed": arguments.seed, "over": arguments.brain[0], "agents": rows}
        atomic_write(arguments.out, json.dumps([*kept, found], indent=1) + "\n")


if __name__ == "__main__":
    main()
