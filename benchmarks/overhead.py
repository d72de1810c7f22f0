"""What RLScheduler costs: whole training loops with it, with torch's CosineAnnealingLR, and with no scheduler.

Twice: `trimtab` is the rule `uwhg` with a decision every 10 optimizer steps; `default` is the default brain at its own
times (25 in a run), told the model, so that it keeps the averaged weights too.

    python benchmarks/overhead.py [--task digits-mlp] [--pairs 30] [--steps N] [--data-dir DIR] [--out FILE.json]
    python benchmarks/overhead.py --all-knobs [--without optimizer ...]

The second line measures a `Controller` that has every knob and every signal, on a convolutional network and on a
bidirectional LSTM, with data made up where no folder is given: `every-10` decides every 10 steps, `default-times` at
those of the learned brains. A policy of the usual size is asked, every knob is written and read back, a validation loss
is reported at every decision, and the averaged and the best weights are kept; but "no change" is what is written, so
that the loops train alike. What a move itself costs, such as the conversion of a switched optimizer, is not in it.
`--without` leaves a knob out, which says where the cost is.

Everything counts: hooks, loss accumulation, gradient statistics, snapshots, signals, a decision every 10 optimizer
steps, writing and reading back; the decisions are counted. The four loops start from the same state and are run in
turn, in an order that changes from round to round, so that the machine's drift meets them alike. CPU seconds of the
process on one thread; the figure is the median over rounds of (with - without) / without, with its quartiles, and
beside it the ratio of the fastest loops, which a busy machine disturbs least. A cost of half a per cent drowns in what
a machine drifts between two loops, so one more loop times our own calls alone, `step()` and the optimizer hooks: that
leaves out what they slow down around them (caches), and hardly varies.

The C library's allocator is told to keep what is freed. Left alone, glibc may hand the pages of the activations back
after every step and fetch them again in the next: some loops of the GPT had 800 page faults and some 90,000, 4 % of
the time, depending on where the heap's last blocks lay. `page_faults` is the mean over loops.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import trimtab
from trimtab import registry
from trimtab.agents.base import Actions, Timing
from trimtab.agents.policy import PPOAgent
from trimtab.spec import ControlSpec, make_agent
from trimtab.tasks.base import Data, Split
from trimtab.training.loop import TrainingLoop

# Steps of one timed loop: about half a second of digits-mlp, two or three of the others.
STEPS = {"digits-mlp": 1000, "shakespeare-gpt": 60, "cifar10-cnn": 200, "sst2-bilstm": 400}
GOALS = {"digits-mlp": 0.03, "shakespeare-gpt": 0.01, "cifar10-cnn": 0.02, "sst2-bilstm": 0.02}
EVERY = 10


# Read by glibc when a process starts: nothing below 1 GiB is handed back, nor taken from the system block by block.
KEEPING_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**25)}

KINDS = ("plain", "cosine", "trimtab", "default")
TASKS = ("digits-mlp", "shakespeare-gpt")
ALL_KINDS = ("plain", "every-10", "default-times")  # of --all-knobs
ALL_TASKS = ("cifar10-cnn", "sst2-bilstm")
STRUCTURAL = ("layers", "units")  # knobs that change a network's shape: without a move they cost nothing
WITHOUT: set[str] = {*STRUCTURAL}


class Still(PPOAgent):
    """Works out what a policy would do, and asks for no change."""

    def predict(self, *given, **named):
        """See `Agent.predict`."""
        actions, state = super().predict(*given, **named)
        return np.zeros_like(actions), state


def every_knob() -> tuple[str, ...]:
    """All knobs that are registered, the rate first, but for those that are left out."""
    return ("lr", *(name for name in sorted(registry.names("knob")) if name not in {"lr", *WITHOUT}))


class AllKnobs:
    """A controller of every knob that is told a validation loss, better than all before, at every decision."""

    def __init__(self, loop: TrainingLoop, steps: int, timing: Timing) -> None:
        knobs = every_knob()
        others = {f"{name}_unit" for name in registry.names("knob")} - {f"{name}_unit" for name in knobs}
        signals = tuple(name for name in sorted(registry.names("signal")) if name not in {"turn", *others})
        agent = Still(signals=signals, n_knobs=len(knobs))
        actions = Actions("decades", low=-2.0, high=2.0)
        spec = ControlSpec(knobs, signals=signals, actions=actions, timing=timing, masks=True)
        self._controller = trimtab.Controller(
            agent, optimizer=loop.optimizer, model=loop.model, loader=loop, total_steps=steps, spec=spec, mode="use",
            average=True,
        )  # fmt: skip
        self._val_loss = 1.0

    @property
    def decisions(self):
        """Of the controller."""
        return self._controller.decisions

    def step(self, loss) -> None:
        """After an optimizer step."""
        if self._controller.is_due:
            self._val_loss *= 0.99
            self._controller.report(self._val_loss)
        self._controller.step(loss)


def make_scheduler(kind: str, loop: TrainingLoop, steps: int):
    """The scheduler under test, or None."""
    optimizer = loop.optimizer
    if kind == "every-10":
        return AllKnobs(loop, steps, Timing(every=EVERY))
    if kind == "default-times":
        return AllKnobs(loop, steps, Timing(every=None, n_decisions=20, early_decisions=7))
    if kind == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    if kind == "default":
        return trimtab.RLScheduler(optimizer, total_steps=steps, model=loop.model)
    if kind == "trimtab":
        agent = make_agent("uwhg")
        brain = trimtab.Brain(agent, ControlSpec.for_agent(agent, timing=Timing(every=EVERY)))
        return trimtab.RLScheduler(optimizer, total_steps=steps, brain=brain)
    return None


def page_faults() -> int:
    """Of this process, so far: pages that the system had to bring."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def run(task, data, kind: str, steps: int) -> tuple[float, int, int]:
    """CPU seconds of one loop of `steps` optimizer steps, the decisions taken in it, and its page faults."""
    loop = TrainingLoop(task, data, seed=0)
    for _ in range(3):
        loop.step()  # optimizer state and allocator are warm before the clock starts
    scheduler = make_scheduler(kind, loop, steps)
    is_ours = kind not in ("plain", "cosine")
    faults = page_faults()
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
    return seconds, len(scheduler.decisions) if is_ours else 0, page_faults() - faults


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
        step() if kind == "cosine" else step(loss)
    return inside / (time.perf_counter() - started - inside)


def stand_in_text(folder: Path) -> Path:
    """A text for the GPT where no data directory is given: its cost does not depend on what the letters say."""
    text = "".join(chr(97 + (i * i + i // 7) % 26) for i in range(200_000))
    (folder / "shakespeare_char").mkdir()
    (folder / "shakespeare_char" / "input.txt").write_text(text)
    return folder


def stand_in_data(name: str) -> Data:
    """Images or sentences where no data directory is given: what a step costs does not depend on what they show."""
    draw, n = np.random.default_rng(0), 2_000
    labels = torch.from_numpy(draw.integers(0, 10 if name == "cifar10-cnn" else 2, n))
    if name == "cifar10-cnn":
        inputs = torch.from_numpy(draw.standard_normal((n, 3, 32, 32), dtype=np.float32))
        info = {"n_classes": 10}
    else:
        length, vocabulary = 32, 4_000
        inputs = torch.from_numpy(draw.integers(2, vocabulary, (n, length)))
        # Sentences have nine words in the mean; what is behind them is padding.
        words = torch.from_numpy(np.clip(draw.poisson(9, n), 1, length))
        inputs[torch.arange(length) >= words.unsqueeze(1)] = 0
        info = {"n_classes": 2, "vocab_size": vocabulary, "length": length}
    split = Split(inputs, labels)
    return Data(split, split, split, info)


def load(task, name: str, data_dir: Path | None, folder: Path) -> Data:
    """The task's data, or what stands in for them."""
    if data_dir is None and name in ALL_TASKS:
        return stand_in_data(name)
    return task.load(stand_in_text(folder) if data_dir is None and name == "shakespeare-gpt" else data_dir)


def measure(name: str, kinds: tuple[str, ...], pairs: int, steps: int, data_dir: Path | None, folder: Path) -> dict:
    """Run the loops of `steps` optimizer steps `pairs` times in turn."""
    task = registry.load("task", name)("small")
    data = load(task, name, data_dir, folder)
    seconds = {kind: [] for kind in kinds}
    decisions, faults = dict.fromkeys(kinds, 0), dict.fromkeys(kinds, 0)
    for kind in kinds:
        run(task, data, kind, min(steps, 50))
    for turn in range(pairs):
        first = turn % len(kinds)
        for kind in kinds[first:] + kinds[:first]:
            spent, count, n_faults = run(task, data, kind, steps)
            seconds[kind].append(spent)
            decisions[kind] += count
            faults[kind] += n_faults
        print(f"{name}: round {turn + 1} of {pairs}", end="\r", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    plain = seconds["plain"]
    result = {
        "task": name,
        "steps_a_loop": steps,
        "rounds": pairs,
        "plain_us_a_step": statistics.median(plain) / steps * 1e6,
        "goal_share": GOALS[name],
        "data": "made up" if data_dir is None and name != "digits-mlp" else "real",
    }
    if kinds == ALL_KINDS:
        result["knobs"] = list(every_knob())
    for kind in kinds[1:]:
        shares = [(with_it - without) / without for with_it, without in zip(seconds[kind], plain, strict=True)]
        low, middle, high = statistics.quantiles(shares, n=4) if pairs > 1 else shares * 3
        result[kind] = {
            "share_median": middle,
            "share_quartiles": [low, high],
            "share_of_totals": sum(seconds[kind]) / sum(plain) - 1,
            "us_a_step": middle * result["plain_us_a_step"],
            "share_of_minima": min(seconds[kind]) / min(plain) - 1,
            "decisions": decisions[kind],
            "decisions_a_loop": decisions[kind] / pairs,
        }
    for kind in kinds[1:]:
        result[kind]["share_in_calls"] = statistics.median(share_in_calls(task, data, kind, steps) for _ in range(5))
    result["page_faults"] = {kind: faults[kind] / pairs for kind in kinds}
    result["seconds"] = seconds
    return result


def main(given: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=sorted(STEPS), action="append", help="default: both")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--steps", type=int, metavar="N", help="of each loop; default: a few seconds of the task")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--all-knobs", action="store_true", help="every knob and signal, on a CNN and a BiLSTM")
    parser.add_argument("--structural", action="store_true", help="with --all-knobs: layers and units too")
    parser.add_argument("--without", action="append", default=[], metavar="KNOB", help="with --all-knobs: not this one")
    parser.add_argument("--out", type=Path, help="default: results/overhead.json, or overhead_knobs.json")
    arguments = parser.parse_args(given)
    if arguments.pairs < 1:
        parser.error(f"--pairs {arguments.pairs}: at least one round")
    if (arguments.without or arguments.structural) and not arguments.all_knobs:
        parser.error("--without and --structural say which knobs --all-knobs has; give that too")
    if unknown := set(arguments.without) - set(registry.names("knob")):
        parser.error(
            f"--without {', '.join(sorted(unknown))}: known knobs: {', '.join(sorted(registry.names('knob')))}"
        )
    if arguments.steps is not None and arguments.steps < 10:
        parser.error(f"--steps {arguments.steps}: a loop has at least 10 optimizer steps")
    torch.set_num_threads(1)
    results, pairs = [], arguments.pairs
    kinds, tasks = (ALL_KINDS, ALL_TASKS) if arguments.all_knobs else (KINDS, TASKS)
    WITHOUT.clear()
    WITHOUT.update(arguments.without, () if arguments.structural else STRUCTURAL)
    for name in arguments.task or tasks:
        with tempfile.TemporaryDirectory() as folder:
            steps = arguments.steps or STEPS[name]
            results.append(measure(name, kinds, pairs, steps, arguments.data_dir, Path(folder)))
        row = results[-1]
        for kind in kinds[1:]:
            low, high = row[kind]["share_quartiles"]
            print(
                f"{name:16s} {kind:13s} {row[kind]['share_median']:+7.2%} of a step of {row['plain_us_a_step']:.0f} us "
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
    out = arguments.out
    if out is None:
        name = "overhead_knobs.json" if arguments.all_knobs else "overhead.json"
        out = Path(__file__).parent / "results" / name
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    if not KEEPING_MEMORY.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEPING_MEMORY})
    main()
