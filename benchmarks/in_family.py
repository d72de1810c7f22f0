"""Learned controllers on fresh tasks of the families they were taught on, against a cosine tuned to each task.

    python benchmarks/in_family.py [--family NAME ...] [--tasks N] [--train-rows LOW HIGH] [--brain NAME=FOLDER ...]
                                   [--out DIR]
    python benchmarks/in_family.py --table     the table again, of what is kept

A brain may do well here because it was taught on such tasks: this table is no evidence for others, and stands apart
from that of benchmarks/zero_shot.py for this reason. What it shows is where taught controllers fall short of a tuned
schedule at home. Tasks are drawn from a seed of their own; no learner was taught, watched or chosen on them.

Beside the brains stand arms that no user has: `told after 1 %` (and 6 %) begins at the drawn rate as they do, is then
told the rate of the tuned cosine, and follows that cosine to the end. What it loses is lost by the beginning alone,
and a brain below it has more than found the rate.

Of each task: a cosine at each of 16 rates with the choosing seeds, and at the rate of the least mean validation loss
with the report seeds; the arms, once for each report seed, from rates spread evenly over the logarithm of 1e-5..1e-1,
told the validation loss at every decision. Losses are those at the end on the split that is never observed. One below
1e-3 counts as 1e-3; one that is not finite, or above twice the least at which a run of the task started, as that: for
every arm. Intervals: 95 %, bootstrap over tasks (expanded percentiles, none of few tasks). Kept in OUT/rows.jsonl as
they end, one line a task and arm; a line that is there is not computed again. About 10 s a task on one core.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from zero_shot_suite.arms import identity
from zero_shot_suite.figures import bootstrap_groups, geometric_mean
from zero_shot_suite.parts import rate_grid

from trimtab.agents.base import Agent, Base, Timing
from trimtab.brain import Brain
from trimtab.envs.batched import TrainingVectorEnv
from trimtab.envs.episodes import MAX_RUNS, Batch, EpisodeOptions, draw_episode
from trimtab.errors import InputError
from trimtab.learning.validation import play_to_end
from trimtab.seeding import derive_seed, numpy_generator
from trimtab.spec import ControlSpec, make_agent
from trimtab.storage import append_lines, atomic_write, read_lines
from trimtab.training.batched import BatchedTraining

ROOT_SEED = 20_261_121
FAMILIES = ("mlp", "image_mlp", "wide_mlp", "quadratic", "cnn")  # those that the default brain was taught on
RATES = 16
LOWEST = 1e-3  # as where learners are validated: a ratio of two losses of nothing says nothing
SEEDS = 8  # to choose, and as many others to report
TUNED = {"sgd": (-4.0, 0.0), "adam": (-4.5, -0.5), "adamw": (-4.5, -0.5)}  # log10, as in benchmarks/zero_shot.py
DRAWN = (1e-5, 1e-1)
# Where the first and the sixth decision of the default brain fall.
TOLD = {"told after 1 %": Timing(None, 20, 6), "told after 6 %": Timing(None, 20, 1, 0.06)}
DEFAULT_RATES = {"sgd": 0.1, "adam": 1e-3, "adamw": 1e-3}
HORIZONS = {"50 to 170 steps": (0, 170), "171 to 590": (171, 590), "591 to 2000": (591, 10**9)}
Rows = tuple[int, int] | None  # least and most rows that a task trains on; None: as its family draws them
# Budgets in which the agents that we have decide equally often whatever run they are in.
TIMINGS = (Timing(None, 20, 6), Timing(None, 20, 7))

HEAD = """# Fresh tasks of trained families

Final loss over that of a cosine tuned to the task: geometric mean over tasks, 95 % by bootstrap over tasks in
brackets. No evidence for other tasks: agents were taught on these families. `told` arms know the tuned rate from
then on.

"""


def draw_run(family: str, index: int, train_rows: Rows = None) -> Batch:
    """Task `index` of a family with a budget, as a batch of one run."""
    seed = derive_seed(ROOT_SEED, family, index, "task in family")
    options = EpisodeOptions(families=(family,), runs_per_task=1, max_cnn_horizon=400, train_rows=train_rows)
    (batch,) = draw_episode(options, 1, TIMINGS[0], seed, TIMINGS[1:])
    return batch


def many(batch: Batch, rates: Sequence[float], seeds: Sequence[int]) -> Batch:
    """The same task and budget for runs at these rates, with these seeds."""
    n = len(rates)
    return replace(
        batch, tasks=batch.tasks * n, groups=(0,) * n, seeds=tuple(seeds), lr=tuple(rates), val_chance=(1.0,) * n
    )


def seeds_of(family: str, index: int, role: str) -> list[int]:
    """Root seeds of a task's runs."""
    return [derive_seed(ROOT_SEED, family, index, role, number, "run") >> 1 for number in range(SEEDS)]


def drawn_rates(family: str, index: int) -> list[float]:
    """Initial rates of the arms, one from each of so many equal stretches of the logarithm."""
    generator = numpy_generator(ROOT_SEED, "rates in family", family, index)
    places = (generator.permutation(SEEDS) + generator.random(SEEDS)) / SEEDS
    low, high = np.log(DRAWN)
    return [float(rate) for rate in np.exp(low + places * (high - low))]


def train_cosine(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Validation and score loss at the end, and the score loss at the start, of plain cosine runs; (R,) each."""
    found: list[list[np.ndarray]] = []
    size = MAX_RUNS[batch.family]
    schedule = ControlSpec.for_agent(make_agent("cosine")).make_schedule()
    factors = [schedule(step, batch.total_steps) for step in range(batch.total_steps)]
    for start in range(0, len(batch.tasks), size):
        part = slice(start, start + size)
        training = BatchedTraining(batch.tasks[part], batch.seeds[part], batch.lr[part])
        first = training.evaluate("score")
        training.run(batch.total_steps, factors)
        found.append([loss.double().numpy() for loss in (training.evaluate("val"), training.evaluate("score"), first)])
    val, score, first_ = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return val, score, first_


def limited(losses: np.ndarray, limit: float) -> np.ndarray:
    """Losses as they are counted."""
    return np.clip(np.where(np.isfinite(losses), losses, limit), LOWEST, limit)


def reference(family: str, index: int, train_rows: Rows = None) -> dict[str, Any]:
    """What tuned cosine reaches on a task, and what cosine does at the drawn rates and at the optimizer's default."""
    batch = draw_run(family, index, train_rows)
    task = batch.tasks[0]
    grid = rate_grid(TUNED[task.optimizer], RATES)
    choosing, reporting = seeds_of(family, index, "choose"), seeds_of(family, index, "report")
    val, _, first = train_cosine(many(batch, np.repeat(grid, SEEDS).tolist(), choosing * RATES))
    limit = 2 * float(first.min())
    best = grid[int(limited(val, limit).reshape(RATES, SEEDS).mean(axis=1).argmin())]
    n = SEEDS
    rates = [best] * n + drawn_rates(family, index) + [DEFAULT_RATES[task.optimizer]] * n
    _, score, _ = train_cosine(many(batch, rates, reporting * 3))
    tuned, drawn, default = limited(score, limit).reshape(3, n).mean(axis=1)
    facts = {"steps": batch.total_steps, "optimizer": task.optimizer, "source": task.source, "rate": best}
    losses = {"cosine": float(tuned), "cosine at a drawn rate": float(drawn), "default-cosine": float(default)}
    return {"family": family, "index": index, "arm": "reference", "what": "", "limit": limit, **facts, "losses": losses}


def told(rate: float, timing: Timing) -> tuple[Agent, ControlSpec]:
    """A cosine that is set to a rate at the first decision, and at the next one again where the guard had moved it."""
    agent = make_agent("replay", {"settings": [[rate]], "timing": timing, "base": Base("cosine")})
    # It looks at nothing, but an observation without columns would not say how many runs there are.
    return agent, ControlSpec.for_agent(agent, signals=("progress",))


def play_arm(family: str, index: int, agent: Agent, spec: ControlSpec, train_rows: Rows = None) -> np.ndarray:
    """Final losses of an arm, one for each report seed."""
    batch = many(draw_run(family, index, train_rows), drawn_rates(family, index), seeds_of(family, index, "report"))
    envs = TrainingVectorEnv(SEEDS, (family,), spec=spec)
    return np.asarray(play_to_end(agent, envs, *envs.begin([batch]))["loss"])


def load_arms(brains: Sequence[str]) -> dict[str, tuple[str, Agent, ControlSpec]]:
    """Name -> what it is (for the rows), the agent and its spec."""
    rule = make_agent("uwhg")
    arms: dict[str, tuple[str, Agent, ControlSpec]] = {"uwhg": ("uwhg", rule, ControlSpec.for_agent(rule))}
    for text in ("default", *brains):
        name, _, where = text.partition("=")
        brain = Brain.load(where or name)
        arms[name] = (identity(f"brain:{name}", {name: where or name}), brain.agent, brain.spec)
    return arms


def run(
    families: Sequence[str], n_tasks: int, brains: Sequence[str], train_rows: Rows, out: Path, console: Console
) -> None:
    """Compute what is missing."""
    EpisodeOptions(families=tuple(families), train_rows=train_rows)  # refuses what nothing can be drawn from
    path = out / "rows.jsonl"
    arms = load_arms(brains)
    rows = [row for row in read_lines(path) if row["arm"] not in arms or row["what"] == arms[row["arm"]][0]]
    asked = list(train_rows) if train_rows else None
    if any(row["train_rows"] != asked for row in rows):
        raise InputError(f"{path} is of tasks with train_rows {rows[0]['train_rows']}, not {asked}; take another --out")
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows))  # less what was another brain
    best = {(row["family"], row["index"]): row["rate"] for row in rows if row["arm"] == "reference"}
    done = {(row["family"], row["index"], row["arm"]) for row in rows}
    with Progress(console=console) as progress:
        bar = progress.add_task("tasks", total=len(families) * n_tasks)
        for family in families:
            for index in range(n_tasks):
                progress.update(bar, description=f"{family} {index}")
                if (family, index) not in best:
                    row = reference(family, index, train_rows)
                    append_lines(path, [row | {"train_rows": asked}])
                    best[family, index] = row["rate"]
                oracles = {name: ("", *told(best[family, index], timing)) for name, timing in TOLD.items()}
                for name, (what, agent, spec) in (arms | oracles).items():
                    if (family, index, name) in done:
                        continue
                    losses = play_arm(family, index, agent, spec, train_rows).tolist()
                    row = {"family": family, "index": index, "arm": name, "what": what}
                    append_lines(path, [row | {"train_rows": asked, "losses": losses}])
                progress.advance(bar)


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, dict[tuple[str, int], float]]:
    """Arm -> task -> loss over that of tuned cosine."""
    references = {(row["family"], row["index"]): row for row in rows if row["arm"] == "reference"}
    found: dict[str, dict[tuple[str, int], float]] = {}
    for key, row in references.items():
        for name, loss in row["losses"].items():
            if name != "cosine":
                found.setdefault(name, {})[key] = loss / row["losses"]["cosine"]
    for row in rows:
        key = (row["family"], row["index"])
        if row["arm"] != "reference" and key in references:
            kept = references[key]
            mean = limited(np.asarray(row["losses"]), kept["limit"]).mean()
            found.setdefault(row["arm"], {})[key] = float(mean) / kept["losses"]["cosine"]
    return found


def render(rows: Sequence[dict[str, Any]]) -> str:
    """The tables, as Markdown."""
    facts = {(row["family"], row["index"]): row for row in rows if row["arm"] == "reference"}
    groups: dict[str, list[tuple[str, int]]] = {}
    for key in facts:
        groups.setdefault(key[0], []).append(key)
    for name, (low, high) in HORIZONS.items():
        groups[name] = [key for key, row in facts.items() if low <= row["steps"] <= high]
    for name in DEFAULT_RATES:
        groups[name] = [key for key, row in facts.items() if row["optimizer"] == name]
    groups["all"] = list(facts)
    groups = {name: keys for name, keys in groups.items() if keys}
    table = ratios(rows)
    lines = ["| tasks | n | " + " | ".join(table) + " |", "|---|---:|" + "---:|" * len(table)]
    for name, keys in groups.items():
        cells = []
        for arm in table.values():
            there = [arm[key] for key in keys if key in arm]
            if not there:
                cells.append("-")
                continue
            cells.append(f"{geometric_mean(there):.3f}{_interval(there)}")
        lines.append(f"| {name} | {len(keys)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _interval(values: Sequence[float]) -> str:
    """95 % for a geometric mean, by resampling tasks; nothing of too few."""
    logs = np.log(values)
    found = bootstrap_groups(
        [str(index) for index in range(len(logs))], lambda drawn, _: float(np.exp(logs[drawn].mean())), n=2000
    )
    return "" if found is None else f" [{found[0]:.2f}, {found[1]:.2f}]"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", help="several may be given; default: the default brain's")
    parser.add_argument("--tasks", type=int, default=24, help="tasks of each family")
    parser.add_argument("--train-rows", type=int, nargs=2, metavar=("LOW", "HIGH"), help="default: each family's own")
    parser.add_argument("--brain", action="append", default=[], help="NAME=FOLDER, another arm")
    parser.add_argument("--table", action="store_true", help="compute nothing")
    parser.add_argument("--out", type=Path, default=Path("in-family"))
    asked = parser.parse_args(arguments)
    console = Console(stderr=True)
    if not asked.table:
        rows = tuple(asked.train_rows) if asked.train_rows else None
        try:
            run(asked.family or FAMILIES, asked.tasks, asked.brain, rows, asked.out, console)
        except InputError as error:
            parser.error(str(error))
    text = render(read_lines(asked.out / "rows.jsonl"))
    atomic_write(asked.out / "table.md", HEAD + text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
