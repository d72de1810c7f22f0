"""What a step of the pruning environment costs, beside a prune and an evaluation by Torch-Pruning; and 300 episodes.

    python benchmarks/pruning.py [--rounds 40] [--out FILE.json]          (needs pip install "trimtab[prune]")

The CNN of the study (conv 32, conv 64, max pooling, dense 512), 256 random images: what they show costs nothing. In
each round, in one process and one thread, one configuration drawn at random within half of the FLOPs is scored four
ways, in an order that changes: by an episode of the environment (three steps, the last of which scores, with what
earlier rounds left in memory), by Torch-Pruning as its users call it (a copy, its pruner with group importance, its
step) and an evaluation, by Torch-Pruning with the units already known and an evaluation, and by our own cut and an
evaluation. CPU seconds.

Then PPO from nothing plays 300 episodes on the same network, whose time is wall time.
"""

from __future__ import annotations

import argparse
import copy
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trimtab.agents.widths import PRESETS, WidthPolicy
from trimtab.envs.pruning import N_LEVELS, Problem, PruningEnv
from trimtab.pruning.allocations import every
from trimtab.pruning.budget import Budget, Target
from trimtab.pruning.evaluation import CachedEvaluator
from trimtab.pruning.network import PrunableNetwork
from trimtab.pruning.parts import Configuration
from trimtab.pruning.torch_pruning import TorchPruningNetwork
from trimtab.pruning.validation import Validation
from trimtab.storage import write_json
from trimtab.tasks.models import two_convolutions

N_IMAGES, TARGET, EPISODES = 256, 0.5, 300


def by_torch_pruning(model: nn.Module, images: torch.Tensor, widths: Configuration) -> nn.Module:
    """The network cut to widths as Torch-Pruning's documentation does it: a ratio for each layer."""
    import torch_pruning as tp

    pruned = copy.deepcopy(model)
    layers = [module for module in pruned.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    sizes = [layer.weight.shape[0] for layer in layers[:-1]]
    ratios = {layer: 1 - width / size for layer, width, size in zip(layers[:-1], widths, sizes, strict=True)}
    pruner = tp.pruner.BasePruner(
        pruned,
        images[:1],
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.0,
        pruning_ratio_dict=ratios,
        ignored_layers=[layers[-1]],
    )
    pruner.step()
    return pruned


def play(env: PruningEnv, widths: Configuration) -> None:
    """One episode that ends with these widths."""
    env.reset()
    for width, part in zip(widths, env.problem.network.parts, strict=True):
        env.step(min(N_LEVELS - 1, round(width / part.size * (N_LEVELS - 1))))


def main() -> int:
    """Measure, print, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = two_convolutions(3, 32, 10, (32, 64, 512)).eval()
    images = torch.randn(N_IMAGES, 3, 32, 32)
    network = PrunableNetwork(model, images[:1])
    other = TorchPruningNetwork(model, images[:1])
    validation = Validation((images, torch.arange(N_IMAGES) % 10), model, 1)
    budget = Budget(network, Target("flops", TARGET))

    def environment() -> PruningEnv:
        evaluator = CachedEvaluator(network, validation)
        return PruningEnv(problem=Problem(network, budget, evaluator.score, validation.rate(model)))

    env = environment()
    ways: dict[str, Callable[[Configuration], Any]] = {
        "episode of the environment": lambda widths: play(env, widths),
        "Torch-Pruning as documented, and evaluation": lambda widths: validation.rate(
            by_torch_pruning(model, images, widths)
        ),
        "Torch-Pruning with known units, and evaluation": lambda widths: validation.rate(other.cut(widths)),
        "own cut, and evaluation": lambda widths: validation.rate(network.cut(widths)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    shuffle, within = random.Random(0), every(budget)
    if not 1 <= arguments.rounds <= len(within):
        parser.error(f"--rounds is {arguments.rounds}; expected 1 to {len(within)}, all the configurations there are")
    for number, widths in enumerate(shuffle.sample(within, arguments.rounds), start=1):
        for name in shuffle.sample(list(ways), len(ways)):
            started = time.process_time()
            ways[name](widths)
            seconds[name].append(time.process_time() - started)
        print(f"round {number} of {arguments.rounds}", end="\r", file=sys.stderr)

    fresh = environment()
    policy = WidthPolicy(fresh, PRESETS["ppo-untaught"], seed=0)
    started, started_cpu = time.perf_counter(), time.process_time()
    policy.learn(EPISODES * len(network.parts), lambda: False)
    learning = {"wall_s": time.perf_counter() - started, "cpu_s": time.process_time() - started_cpu}

    mine = seconds["episode of the environment"]
    table = {
        name: {
            "median_s": statistics.median(values),
            "mean_s": statistics.fmean(values),
            "over_an_episode": statistics.median(v / m for v, m in zip(values, mine, strict=True)),
            "over_an_episode_by_means": statistics.fmean(values) / statistics.fmean(mine),
        }
        for name, values in seconds.items()
    }
    for name, row in table.items():
        print(
            f"{name:<48}{row['median_s'] * 1e3:>9.1f} ms (mean {row['mean_s'] * 1e3:.1f}), "
            f"{row['over_an_episode']:.1f} episodes (by means {row['over_an_episode_by_means']:.1f})"
        )
    print(f"{EPISODES} episodes of PPO: {learning['wall_s']:.1f} s, {learning['cpu_s']:.1f} CPU s")
    if arguments.out is not None:
        machine = {"python": platform.python_version(), "torch": torch.__version__, "processor": platform.processor()}
        write_json(
            arguments.out,
            {
                "command": "python benchmarks/pruning.py " + " ".join(sys.argv[1:]),
                "images": N_IMAGES, "target_flops": TARGET, "rounds": arguments.rounds, "parts_of_an_episode": 3,
                "cpu_seconds": table, "ppo_300_episodes": learning, "machine": machine,
            },
        )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
