"""What RLScheduler costs: whole training loops with it, with torch's CosineAnnealingLR, and with no scheduler.

Twice: `trimtab` is the rule `uwhg` with a decision every 10 optimizer steps; `default` is the default brain at its own
times (26 in a run), told the model, so that it keeps the averaged weights too.

    python benchmarks/overhead.py [--task digits-mlp] [--pairs 30] [--data-dir DIR] [--out FILE.json]

Everything counts: hooks, loss accumulation, gradient statistics, snapshots, signals, a decision every 10 optimizer
steps, writing and reading back; the decisions are counted. The four loops start from the same state and are run in
turn, in an order that changes from round to round, so that the machine's drift meets them alike. CPU seconds of the
process on one thread; the figure is the median over rounds of (with - without) / without, with its quartiles, and
beside it the ratio of the fastest loops, which a busy machine disturbs least. A cost of half a per cent drowns in what
a machine drifts between two loops, so one more loop times our own calls alone, `step()` and the optimizer hooks: that
leaves out what they slow down around them (caches), and hardly varies.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

import trimtab
from trimtab import registry
from trimtab.agents.base import Timing
from trimtab.spec import ControlSpec, make_agent
from trimtab.training.loop import TrainingLoop

# Steps of one timed loop: about half a second of digits-mlp, three of the GPT.
STEPS = {"digits-mlp": 1000, "shakespeare-gpt": 60}
GOALS = {"digits-mlp": 0.03, "shakespeare-gpt": 0.01}
EVERY = 10


KINDS = ("plain", "cosine", "trimtab", "default")


def make_scheduler(kind: str, loop: TrainingLoop, steps: int):
    """The scheduler under test, or None."""
    optimizer = loop.optimizer
    if kind == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    if kind == "default":
        return trimtab.RLScheduler(optimizer, total_steps=steps, model=loop.model)
    if kind == "trimtab":
        agent = make_agent("uwhg")
        brain = trimtab.Brain(agent, ControlSpec.for_agent(agent, timing=Timing(every=EVERY)))
        return trimtab.RLScheduler(optimizer, total_steps=steps, brain=brain)
    return None


def run(task, data, kind: str, steps: int) -> tuple[float, int]:
    """CPU seconds of one loop of `steps` optimizer steps, and the decisions taken in it."""
    loop = TrainingLoop(task, data, seed=0)
    for _ in range(3):
        loop.step()  # optimizer state and allocator are warm before the clock starts
    scheduler = make_scheduler(kind, loop, steps)
    is_ours = kind in ("trimtab", "default")
    started = time.process_time()
    if is_ours:
        for _ in range(steps):
            scheduler.step(loop.step())
    elif kind == "cosine":
        for _ in range(steps):
            loop.step()
            scheduler.step()
    else:
        for _ in range(steps):
            loop.step()
    seconds = time.process_time() - started
    return seconds, len(scheduler.decisions) if is_ours else 0


def share_in_calls(task, data, kind: str, steps: int) -> float:
    """The share of one loop's time spent in `step()` and in the optimizer hooks, of the time of the rest."""
    loop = TrainingLoop(task, data, seed=0)
    for _ in range(3):
        loop.step()
    inside = 0.0

    def timed(function):
        def call(*given, **named):
            nonlocal inside
            began = time.perf_counter()
            try:
                return function(*given, **named)
            finally:
                inside += time.perf_counter() - began

        return call

    scheduler = make_scheduler(kind, loop, steps)
    # torch keeps an optimizer's hooks in these two; nothing public lists them.
    for hooks in (loop.optimizer._optimizer_step_pre_hooks, loop.optimizer._optimizer_step_post_hooks):
        for key, hook in hooks.items():
            hooks[key] = timed(hook)
    step = timed(scheduler.step)
    started = time.perf_counter()
    for _ in range(steps):
        loss = loop.step()
        step(loss) if kind in ("trimtab", "default") else step()
    return inside / (time.perf_counter() - started - inside)


def stand_in_text(folder: Path) -> Path:
    """A text for the GPT where no data directory is given: its cost does not depend on what the letters say."""
    text = "".join(chr(97 + (i * i + i // 7) % 26) for i in range(200_000))
    (folder / "shakespeare_char").mkdir()
    (folder / "shakespeare_char" / "input.txt").write_text(text)
    return folder


def measure(name: str, pairs: int, data_dir: Path | None) -> dict:
    """Run the four loops `pairs` times in turn."""
    task = registry.load("task", name)("small")
    data = task.load(data_dir)
    steps = STEPS[name]
    seconds = {kind: [] for kind in KINDS}
    decisions = dict.fromkeys(KINDS, 0)
    for kind in KINDS:
        run(task, data, kind, min(steps, 50))
    for turn in range(pairs):
        for kind in KINDS[turn % 4 :] + KINDS[: turn % 4]:
            spent, count = run(task, data, kind, steps)
            seconds[kind].append(spent)
            decisions[kind] += count
        print(f"{name}: round {turn + 1} of {pairs}", end="\r", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    plain = seconds["plain"]
    result = {
        "task": name,
        "steps_a_loop": steps,
        "rounds": pairs,
        "plain_us_a_step": statistics.median(plain) / steps * 1e6,
        "goal_share": GOALS[name],
    }
    for kind in KINDS[1:]:
        shares = [(with_it - without) / without for with_it, without in zip(seconds[kind], plain, strict=True)]
        low, middle, high = statistics.quantiles(shares, n=4)
        result[kind] = {
            "share_median": middle,
            "share_quartiles": [low, high],
            "share_of_totals": sum(seconds[kind]) / sum(plain) - 1,
            "us_a_step": middle * result["plain_us_a_step"],
            "share_of_minima": min(seconds[kind]) / min(plain) - 1,
            "decisions": decisions[kind],
            "decisions_a_loop": decisions[kind] / pairs,
        }
    for kind in KINDS[1:]:
        result[kind]["share_in_calls"] = statistics.median(share_in_calls(task, data, kind, steps) for _ in range(5))
    result["seconds"] = seconds
    return result


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=sorted(STEPS), action="append", help="default: both")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "overhead.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results, pairs = [], arguments.pairs
    for name in arguments.task or sorted(STEPS):
        with tempfile.TemporaryDirectory() as folder:
            data_dir = arguments.data_dir
            if name == "shakespeare-gpt" and data_dir is None:
                data_dir = stand_in_text(Path(folder))
            results.append(measure(name, pairs, data_dir))
        row = results[-1]
        for kind in KINDS[1:]:
            low, high = row[kind]["share_quartiles"]
            print(
                f"{name:16s} {kind:8s} {row[kind]['share_median']:+7.2%} of a step of {row['plain_us_a_step']:.0f} us "
                f"(quartiles {low:+.2%} to {high:+.2%}), {row[kind]['us_a_step']:.1f} us a step; "
                f"fastest loops {row[kind]['share_of_minima']:+.2%}; in our calls {row[kind]['share_in_calls']:.2%}"
            )
            if row[kind]["decisions"]:
                print(f"{'':25s} {row[kind]['decisions']} decisions in {pairs} loops of {row['steps_a_loop']} steps")
    machine = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": 1,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
