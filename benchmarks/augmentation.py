"""What the data path costs: batches of cifar10-cnn taken as they are, and augmented, beside a whole training step.

    python benchmarks/augmentation.py [--steps 100] [--batch-size 64] [--out benchmarks/results/augmentation.json]

Needs no data: the images are drawn. CPU seconds, one thread; the three are timed in turn, round after round, and the
medians over rounds are compared, since a shared machine drifts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trimtab import registry
from trimtab.tasks.base import Data, Split
from trimtab.training.loop import TrainingLoop

ROUNDS = 10
GOAL = 0.10  # of a training step


def measure(steps: int, batch_size: int) -> dict[str, Any]:
    """Milliseconds of CPU time of a step and of a batch, and the shares of the step that batches are.

    Args:
        steps: Of each kind, in all rounds together.
        batch_size: Images in a batch.
    """
    task = registry.load("task", "cifar10-cnn")("small").replace(batch_size=batch_size)
    images = torch.rand(10 * batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    part = Split(images, torch.arange(len(images)) % 10)
    data = Data(part, part, part, {"n_classes": 10})
    plain, augmented = (TrainingLoop(task.replace(is_augmented=on), data, seed=0) for on in (False, True))
    kinds: dict[str, Callable[[], object]] = {
        "step": plain.step, "batch": plain._batches.next, "augmented batch": augmented._batches.next
    }  # fmt: skip
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(ROUNDS):
        for kind, call in kinds.items():
            call()  # brings its code and data back into the caches
            started = time.process_time()
            for _ in range(max(1, steps // ROUNDS)):
                call()
            seconds[kind].append((time.process_time() - started) / max(1, steps // ROUNDS))
    found = {kind: 1e3 * statistics.median(values) for kind, values in seconds.items()}
    return {
        "task": task.name, "batch_size": batch_size, "rounds": ROUNDS, "steps": steps,
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "milliseconds": {kind: round(value, 3) for kind, value in found.items()},
        "share_of_a_step": {kind: round(found[kind] / found["step"], 4) for kind in ("batch", "augmented batch")},
        "goal": GOAL,
    }  # fmt: skip


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    torch.set_num_threads(1)
    text = json.dumps(measure(given.steps, given.batch_size), indent=2)
    print(text)
    if given.out is not None:
        given.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
