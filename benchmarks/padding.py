"""What room for wider networks costs a batch of runs: networks of 32 units, padded to 64, 128 and 256.

    python benchmarks/padding.py [--rounds 15] [--out FILE.json]

The knob `units` goes up to 256. In a batch every row of parameters would have to be as long as that of the widest
network that a run may become, and every product would go over it. Here 64 runs of an MLP 64-32-32-10 train in batches
of 32 beside one run of the given width, which makes all rows as long as its own. Optimizer steps of one network per CPU
second, one thread, all widths in turn in an order that changes from round to round; beside them the same network in
`TrainingLoop`, which trains one at a time and whose networks do change their widths.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trimtab import seeding
from trimtab.storage import write_json
from trimtab.tasks.base import Split
from trimtab.tasks.small import Network, SmallTask
from trimtab.training.batched import BatchedTraining
from trimtab.training.loop import TrainingLoop

R, UNITS, STEPS = 64, 32, 40
WIDTHS = (32, 64, 128, 256)


def make_task(units: int) -> SmallTask:
    """A task of random rows: what they say costs nothing."""
    rng = np.random.default_rng(seeding.derive_seed(0, "padding"))
    parts = {}
    for name, n in {"train": 512, "val": 96, "score": 96, "test": 96}.items():
        inputs = torch.from_numpy(rng.normal(size=(n, 64)).astype(np.float32))
        parts[name] = Split(inputs, torch.from_numpy(rng.integers(0, 10, n)))
    return SmallTask(
        "padding",
        "benchmark",
        "classification",
        **parts,
        n_outputs=10,
        network=Network("mlp", (units, units), "relu"),
        optimizer="adam",
        momentum=0.0,
        betas=(0.9, 0.999),
        weight_decay=0.0,
        batch_size=32,
    )


def run_batched(width: int) -> float:
    """Optimizer steps of one network per CPU second, in a batch padded to a width."""
    tasks = [make_task(UNITS)] * R + [make_task(width)]
    training = BatchedTraining(tasks, list(range(R + 1)), [1e-3] * (R + 1))
    training.run(4)
    started = time.process_time()
    training.run(STEPS)
    return STEPS * (R + 1) / (time.process_time() - started)


def run_alone(task: Any, data: Any) -> float:
    """The same of one network at a time."""
    loop = TrainingLoop(task, data, seed=0)
    for _ in range(20):
        loop.step()
    started = time.process_time()
    for _ in range(400):
        loop.step()
    return 400 / (time.process_time() - started)


def main() -> int:
    """Measure, print, and write where --out says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task, data = make_task(UNITS).to_task(total_steps=500)
    kinds: list[int] = [0, *WIDTHS]  # 0: one at a time
    rates: dict[int, list[float]] = {kind: [] for kind in kinds}
    order = random.Random(0)
    for turn in range(arguments.rounds):
        order.shuffle(kinds)
        for kind in kinds:
            rates[kind].append(run_batched(kind) if kind else run_alone(task, data))
        print(f"\rround {turn + 1} of {arguments.rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    rows = []
    for kind in (0, *WIDTHS):
        over = [a / b for a, b in zip(rates[kind], rates[0], strict=True)]
        rows.append(
            {
                "padded_to": kind or None,
                "steps_per_cpu_s": statistics.median(rates[kind]),
                "over_one_at_a_time": statistics.median(over),
                "quartiles": statistics.quantiles(over, n=4)[::2],
            }
        )
        name = f"{R} runs padded to {kind}" if kind else "one at a time"
        print(f"{name:24s} {rows[-1]['steps_per_cpu_s']:9.0f} steps/CPU s, {rows[-1]['over_one_at_a_time']:6.2f} x")
    if arguments.out:
        machine = {"machine": platform.machine(), "torch": torch.__version__, "threads": 1}
        write_json(arguments.out, {"network": "MLP 64-32-32-10, batches of 32, Adam", "rows": rows, **machine})
    return 0


if __name__ == "__main__":
    sys.exit(main())
