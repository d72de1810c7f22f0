"""Is the policy that "ppo" starts from worth it? Best widths within n evaluations, on networks it was not taught on.

    python benchmarks/pruning_policy.py [--lessons 24] [--brain DIR] [--out FILE.json]

Networks and data are drawn as for teaching (`trimtab.pruner.lessons`), under another root seed. Each is pruned to a
half, a quarter and a tenth of its FLOPs (where that is out of reach, to the least within reach) by "ppo", by
"ppo-untaught", which begins from nothing, and by random search, all of which begin with the same two rules. Counted is
the score of the best within the budget before fine-tuning, less that of the better rule, over the dense network's.
Means over the three targets of a network; differences are paired by network, with 95 % intervals over networks.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from trimtab.experiments.stats import mean_interval
from trimtab.progress import News, make_display
from trimtab.pruner.lessons import Lesson, draw_lesson
from trimtab.pruner.policies import SHIPPED, TaughtPolicy
from trimtab.pruner.search import Search
from trimtab.pruner.teach import Classroom
from trimtab.pruning.evaluation import CachedEvaluator
from trimtab.pruning.scorer import Scorer
from trimtab.pruning.validation import Validation
from trimtab.storage import write_json

ROOT_SEED = 1  # the shipped policy was taught on 0, and how it is used was settled on networks of that seed as well
SHARES = (0.5, 0.25, 0.1)
EVALUATIONS = (8, 16, 32, 64)
AGENTS = ("ppo", "ppo-untaught", "random-search")
MULTIPLE = 8


def gains(lesson: Lesson, number: int, weights: dict[str, Tensor]) -> dict[str, list[float]]:
    """Agent -> for each number of evaluations, mean over targets of how much better than the better rule it ends."""
    room = Classroom([lesson])
    problems = [room.problem(0, MULTIPLE, share) for share in SHARES]
    network = problems[0].network
    evaluator = CachedEvaluator(network, Validation((lesson.inputs, lesson.targets), network.model, 1, batch_size=1024))
    found: dict[str, list[float]] = {agent: [] for agent in AGENTS}
    for n_evaluations in EVALUATIONS:
        for agent in AGENTS:
            best = []
            for problem in problems:
                scorer = Scorer(network, score_of=evaluator.score, seed=number)
                search = Search(problem.budget, scorer, agent, n_evaluations, number, weights)
                best.append(problem.score(search.run()[0]))
            found[agent].append(statistics.fmean(best))
    return found


def main() -> int:
    """Search on every network, print, and write where --out says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lessons", type=int, default=24)
    parser.add_argument("--brain", default=SHIPPED)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    policy = TaughtPolicy.load(arguments.brain)
    every: list[dict[str, list[float]]] = []
    with make_display(Console(stderr=True)) as display:
        display.begin(1, 0, "pieces of work")
        display.started("all", "networks")
        for number in range(arguments.lessons):
            every.append(gains(draw_lesson(ROOT_SEED, number), number, dict(policy.weights)))
            display.news("all", News("network", number + 1, arguments.lessons))
    rows: list[dict[str, Any]] = []
    for place, n_evaluations in enumerate(EVALUATIONS):
        row: dict[str, Any] = {"evaluations": n_evaluations}
        row |= {agent: statistics.fmean(one[agent][place] for one in every) for agent in AGENTS}
        said = [f"{agent} {row[agent]:.3f}" for agent in AGENTS]
        for other in AGENTS[1:]:
            differences = [one["ppo"][place] - one[other][place] for one in every]
            interval = mean_interval(differences)
            ends = None if interval is None else [interval.low, interval.high]
            row[f"ppo over {other}"] = {"mean": statistics.fmean(differences), "interval": ends}
            shown = "" if ends is None else f" [{ends[0]:+.3f}, {ends[1]:+.3f}]"
            said.append(f"over {other} {statistics.fmean(differences):+.3f}{shown}")
        rows.append(row)
        print(f"{n_evaluations:3d} evaluations: {', '.join(said)}")
    if arguments.out:
        made_by = policy.provenance.get("command")
        write_json(arguments.out, {"brain": made_by, "root_seed": ROOT_SEED, "n_networks": len(every),
                                   "targets": list(SHARES), "rows": rows})  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
