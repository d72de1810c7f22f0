"""What an environment step costs: 10 optimizer steps of a small network, its validation, and all signals.

    python benchmarks/env_speed.py [--quick] [--kind mlp] [--rounds 15] [--out FILE.json]

The vector environment at R = 1, 16, 64 and 256 runs is taken in turn, in an order that changes from round to round,
with a plain torch loop that does the same work one network at a time. Environment steps (R of them in a call of `step`)
per CPU second of the process, on one thread; stacking the runs and their first interval (`begin`) is reported beside
them. A speed-up is the median over rounds of the environment's rate over the plain loop's in the same round, with its
quartiles. Then two processes at once against one, and R = 4096 on a CUDA device where there is one, both by wall time.
All train by Adam, on as many rows as `trimtab.tasks.families` draws in the median.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import multiprocessing
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from trimtab.agents.base import Timing
from trimtab.envs.batched import TrainingVectorEnv
from trimtab.envs.episodes import MAX_RUNS, Batch
from trimtab.envs.specs import default_spec
from trimtab.tasks.base import Split
from trimtab.tasks.small import Network, SmallTask

STEPS = 10  # optimizer steps in an environment step
N_RUNS = (1, 16, 64, 256)
RUNS_PER_TASK = 16
ROWS = {"train": 192, "val": 96, "score": 96, "test": 96}
# Shape of a row, outputs, network, batch size.
KINDS: dict[str, tuple[tuple[int, ...], int, Network, int]] = {
    "mlp": ((32,), 10, Network("mlp", (16,), "relu"), 32),
    "cnn": ((1, 8, 8), 10, Network("cnn", (4, 8), "relu"), 16),
    "quadratic": ((16,), 1, Network("mlp", (), "relu"), 32),
}
NAMES = {
    "mlp": "MLP 32-16-10, batches of 32",
    "cnn": "CNN of 4 and 8 channels on 8 x 8, batches of 16",
    "quadratic": "linear regression on 16 features, batches of 32",
}
GOALS = {
    "speed-up at R = 256, MLP": 20.0,
    "speed-up at R = 256, CNN": 5.0,
    "environment steps per CPU second at R = 256, MLP": 6000.0,
    "two processes over one": 1.8,
    "speed-up on CUDA at R = 4096": 100.0,
}
# Its environment is not installed here; the figures are those of the project's FINDINGS, section 3.
DACBENCH = {
    "what": "DACBench 0.5.6, SGD environment, conv net of 62,006 parameters (as published in FINDINGS section 3)",
    "cost_over_plain_loop": {"epoch mode": [2.0, 2.7], "step mode, batch 1024": [4.6, 4.6], "batch 32": [54.0, 54.0]},
}


@functools.cache
def make_task(kind: str, seed: int) -> SmallTask:
    """A task of random rows: what they say costs nothing."""
    shape, n_outputs, network, batch_size = KINDS[kind]
    rng = np.random.default_rng(seed)
    parts = {}
    for name, n in ROWS.items():
        inputs = torch.from_numpy(rng.normal(size=(n, *shape)).astype(np.float32))
        flat = inputs.flatten(1)
        teacher = torch.from_numpy(np.random.default_rng(seed).normal(size=(flat.shape[1], n_outputs)))
        scores = flat @ teacher.float() / math.sqrt(flat.shape[1])
        parts[name] = Split(inputs, scores[:, 0] if n_outputs == 1 else scores.argmax(1))
    return SmallTask(
        kind,
        "benchmark",
        "regression" if n_outputs == 1 else "classification",
        **parts,
        n_outputs=n_outputs,
        network=network,
        optimizer="adam",
        momentum=0.0,
        betas=(0.9, 0.999),
        weight_decay=0.0,
        batch_size=batch_size,
    )


def initial_rates(n: int) -> list[float]:
    """Evenly spread over 1e-4..1e-2, in logarithms: few runs are rolled back."""
    return [10 ** (-4 + 2 * (i + 0.5) / n) for i in range(n)]


# ---- the environment --------------------------------------------------------------------------------------------


def make_env(kind: str, n_runs: int, n_calls: int, device: str = "cpu") -> TrainingVectorEnv:
    """The environment, begun, with so many calls of `step` before it."""
    spec = dataclasses.replace(default_spec(), timing=Timing(every=STEPS))
    env = TrainingVectorEnv(n_runs, (kind,), spec=spec, device=device)
    n_tasks = -(-n_runs // RUNS_PER_TASK)
    tasks = [make_task(kind, i) for i in range(n_tasks)]
    per_batch = MAX_RUNS[kind] if device == "cpu" else n_runs
    batches = []
    rates = initial_rates(n_runs)
    for start in range(0, n_runs, per_batch):
        runs = range(start, min(start + per_batch, n_runs))
        groups = tuple(i // RUNS_PER_TASK for i in runs)
        batches.append(
            Batch(
                kind,
                tuple(tasks[group] for group in groups),
                groups,
                groups,  # seeds: as in drawn episodes, those of a task have one
                tuple(rates[i] for i in runs),
                (1.0,) * len(runs),
                STEPS * (n_calls + 2),  # the first interval is taken by `begin`, and the last never comes
            )
        )
    env.begin(batches)
    return env


def run_env(kind: str, n_runs: int, n_calls: int, device: str = "cpu", clock: Callable[[], float] = time.process_time):
    """(environment steps per second, seconds of `begin` a run)."""
    started = clock()
    env = make_env(kind, n_runs, n_calls + 1, device)
    begun = (clock() - started) / n_runs
    actions = np.random.default_rng(0).uniform(-0.02, 0.02, (n_calls + 1, n_runs, 1))
    env.step(actions[-1])  # caches and allocator are warm before the clock starts
    started = clock()
    for call in range(n_calls):
        env.step(actions[call])
    if device != "cpu":
        torch.cuda.synchronize()
    return n_calls * n_runs / (clock() - started), begun


# ---- the same, one network at a time ----------------------------------------------------------------------------


class PlainRun:
    """One network in a plain torch loop, with the measurements that the environment makes."""

    def __init__(self, task: SmallTask, lr: float, device: str) -> None:
        self.train = Split(task.train.inputs.to(device), task.train.targets.to(device))
        self.val = Split(task.val.inputs.to(device), task.val.targets.to(device))
        self.is_regression = task.kind == "regression"
        self.batch_size = task.batch_size
        self.model = task.network.make(task.input_shape, task.n_outputs).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr)
        self.order = torch.empty(0, dtype=torch.int64)
        self.position = 0
        self.history: list[float] = []

    def loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean loss of the model on these rows."""
        outputs = self.model(inputs)
        return F.mse_loss(outputs[:, 0], targets) if self.is_regression else F.cross_entropy(outputs, targets)

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next rows of a shuffled epoch."""
        if self.position + self.batch_size > len(self.order):
            self.order = torch.randperm(len(self.train.inputs)).to(self.train.inputs.device)
            self.position = 0
        rows = self.order[self.position : self.position + self.batch_size]
        self.position += self.batch_size
        return self.train.inputs[rows], self.train.targets[rows]

    def flat(self) -> torch.Tensor:
        """All weights end to end."""
        return torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()])

    def step(self, move: float) -> list[float]:
        """One environment step: a new rate, 10 optimizer steps, validation, and what is observed of them."""
        for group in self.optimizer.param_groups:
            group["lr"] *= 10**move
        losses = []
        for i in range(STEPS):
            loss = self.loss(*self.next_batch())
            self.optimizer.zero_grad()
            loss.backward()
            losses.append(loss.detach())
            if i == STEPS - 2:
                before = self.flat()
            if i == STEPS - 1:
                weights = self.flat()
                update = before - weights
                gradient = torch.cat([parameter.grad.flatten() for parameter in self.model.parameters()])
                norms = torch.stack([weights.norm(), update.norm(), gradient.norm(), gradient @ update])
            self.optimizer.step()
        with torch.no_grad():
            val_loss = float(self.loss(self.val.inputs, self.val.targets))
        train = torch.stack(losses).tolist()
        weight, step, slope, product = norms.tolist()
        mean, half = statistics.fmean(train), STEPS // 2
        known = self.history[-1] if self.history else val_loss
        self.history.append(val_loss)
        return [
            math.log(val_loss / known),
            math.log(val_loss / min(self.history)),
            math.log(val_loss / mean),
            math.log(sum(train[half:]) / sum(train[:half])),
            math.log(statistics.pstdev(train) / mean + 0.001),
            math.log10(slope),
            math.log10(step / weight),
            product / step / slope,
        ]


def run_plain(kind: str, n_calls: int, device: str = "cpu", clock: Callable[[], float] = time.process_time) -> float:
    """Environment steps per second."""
    runs = [PlainRun(make_task(kind, i), lr, device) for i, lr in enumerate(initial_rates(4))]
    for run in runs:
        run.step(0.0)
    started = clock()
    for _ in range(-(-n_calls // len(runs))):
        for run in runs:
            run.step(0.01)
    if device != "cpu":
        torch.cuda.synchronize()
    return -(-n_calls // len(runs)) * len(runs) / (clock() - started)


# ---- measuring --------------------------------------------------------------------------------------------------


def spread(values: list[float]) -> dict[str, Any]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": middle, "quartiles": [low, high], "values": values}


def measure(kind: str, rounds: int, seconds: float) -> dict[str, Any]:
    """All sizes and the plain loop, in turn."""
    parts: list[int] = [0, *N_RUNS]  # 0: the plain loop
    rates: dict[int, list[float]] = {n: [] for n in parts}
    begun: dict[int, list[float]] = {n: [] for n in N_RUNS}
    calls = {0: max(4, round(seconds * run_plain(kind, 8)))}
    for n in N_RUNS:
        calls[n] = max(3, round(seconds * run_env(kind, n, 3)[0] / n))
    order = random.Random(0)
    for turn in range(rounds):
        order.shuffle(parts)
        for n in parts:
            if n == 0:
                rates[n].append(run_plain(kind, calls[n]))
            else:
                rate, start = run_env(kind, n, calls[n])
                rates[n].append(rate)
                begun[n].append(start)
        print(f"\r{kind}: round {turn + 1} of {rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return {
        "kind": kind,
        "network": NAMES[kind],
        "calls": {str(n): count for n, count in calls.items()},
        "plain_steps_per_cpu_s": spread(rates[0]),
        "env": [
            {
                "R": n,
                "steps_per_cpu_s": spread(rates[n]),
                "speed_up": spread([a / b for a, b in zip(rates[n], rates[0], strict=True)]),
                "begin_ms_a_run": 1e3 * statistics.median(begun[n]),
            }
            for n in N_RUNS
        ],
    }


def _work(kind: str, seconds: float, barrier: Any, queue: Any) -> None:
    torch.set_num_threads(1)
    n_runs = N_RUNS[-1]
    rate = run_env(kind, n_runs, 2, clock=time.perf_counter)[0]
    n_calls = max(3, round(seconds * rate / n_runs))
    env = make_env(kind, n_runs, n_calls)
    actions = np.zeros((n_runs, 1))
    barrier.wait()
    started = time.perf_counter()
    for _ in range(n_calls):
        env.step(actions)
    queue.put(n_calls * n_runs / (time.perf_counter() - started))


def run_processes(kind: str, count: int, seconds: float) -> float:
    """Environment steps per second of wall time, of so many processes together."""
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(count), context.Queue()
    workers = [context.Process(target=_work, args=(kind, seconds, barrier, queue)) for _ in range(count)]
    for worker in workers:
        worker.start()
    total = sum(queue.get(timeout=600) for _ in workers)
    for worker in workers:
        worker.join()
    return total


def measure_processes(kind: str, rounds: int, seconds: float) -> dict[str, Any]:
    """Two processes at once against one, in turn."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(rounds):
        for count in (1, 2) if turn % 2 == 0 else (2, 1):
            rates[count].append(run_processes(kind, count, seconds))
    return {
        "kind": kind,
        "one_steps_per_s": spread(rates[1]),
        "two_steps_per_s": spread(rates[2]),
        "two_over_one": spread([two / one for one, two in zip(rates[1], rates[2], strict=True)]),
    }


def measure_cuda(kind: str, rounds: int, seconds: float) -> dict[str, Any]:
    """R = 4096 on a CUDA device against the plain loop on the CPU beside it, and on the device itself."""
    n_runs, clock = 4096, time.perf_counter
    calls = max(3, round(seconds * run_env(kind, n_runs, 3, "cuda", clock)[0] / n_runs))
    rates: dict[str, list[float]] = {"env": [], "plain_cpu": [], "plain_cuda": []}
    for _ in range(rounds):
        rates["env"].append(run_env(kind, n_runs, calls, "cuda", clock)[0])
        for device in ("cpu", "cuda"):
            count = max(4, round(seconds * run_plain(kind, 8, device, clock)))
            rates[f"plain_{device}"].append(run_plain(kind, count, device, clock))
    return {
        "kind": kind,
        "R": n_runs,
        "device": torch.cuda.get_device_name(),
        "env_steps_per_s": spread(rates["env"]),
        **{
            f"speed_up_over_{name}": spread([a / b for a, b in zip(rates["env"], rates[name], strict=True)])
            for name in ("plain_cpu", "plain_cuda")
        },
    }


# ---- saying -----------------------------------------------------------------------------------------------------


def _range(values: dict[str, Any], digits: str = ".1f") -> str:
    low, high = values["quartiles"]
    return f"{values['median']:{digits}} ({low:{digits}} to {high:{digits}})"


def show(result: dict[str, Any]) -> None:
    """The rows of one kind of network."""
    print(f"{result['network']}; environment steps per CPU second, median (quartiles)")
    print(f"  {'plain loop':12s} {_range(result['plain_steps_per_cpu_s'], ',.0f'):>32s}")
    for row in result["env"]:
        print(
            f"  R = {row['R']:<8d} {_range(row['steps_per_cpu_s'], ',.0f'):>32s}   speed-up {_range(row['speed_up'])}"
            f"   begin {row['begin_ms_a_run']:.2f} ms a run"
        )


def judge(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Each goal beside what was measured; None where it was not."""
    best: dict[str, dict[str, float]] = {}
    for result in data["kinds"]:
        last = result["env"][-1]
        best[result["kind"]] = {
            "speed_up": last["speed_up"]["median"],
            "rate": last["steps_per_cpu_s"]["median"],
        }
    processes = {row["kind"]: row["two_over_one"]["median"] for row in data["processes"]}
    cuda = {row["kind"]: row["speed_up_over_plain_cpu"]["median"] for row in data["cuda"]}
    found = {
        "speed-up at R = 256, MLP": best.get("mlp", {}).get("speed_up"),
        "speed-up at R = 256, CNN": best.get("cnn", {}).get("speed_up"),
        "environment steps per CPU second at R = 256, MLP": best.get("mlp", {}).get("rate"),
        "two processes over one": processes.get("mlp"),
        "speed-up on CUDA at R = 4096": cuda.get("mlp"),
    }
    return [
        {"goal": name, "at_least": goal, "measured": value, "reached": None if value is None else value >= goal}
        for name, goal in GOALS.items()
        for value in [found[name]]
    ]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=sorted(KINDS), action="append", help="default: all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.5, help="CPU seconds of each part of a round")
    parser.add_argument("--quick", action="store_true", help="a trial: three short rounds")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "env_speed.json")
    arguments = parser.parse_args()
    rounds, seconds = (3, 0.1) if arguments.quick else (arguments.rounds, arguments.seconds)
    torch.set_num_threads(1)
    kinds = arguments.kind or list(KINDS)
    data: dict[str, Any] = {
        "machine": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "threads": 1,
        },
        "steps_an_interval": STEPS,
        "rows": ROWS,
        "kinds": [],
        "processes": [],
        "cuda": [],
        "dacbench": DACBENCH,
    }
    for kind in kinds:
        data["kinds"].append(measure(kind, rounds, seconds))
        show(data["kinds"][-1])
    costs = "; ".join(
        f"{mode} {low:g}" + (f" to {high:g}" if high != low else "")
        for mode, (low, high) in DACBENCH["cost_over_plain_loop"].items()
    )
    print(f"{DACBENCH['what']}:\n  a step costs so many times the plain loop's: {costs} (a speed-up of 0.5 to 0.02)")
    for kind in [kind for kind in kinds if kind == "mlp"]:
        data["processes"].append(measure_processes(kind, 1 if arguments.quick else 5, 5 * seconds))
        print(
            f"two processes over one, {kind}, R = {N_RUNS[-1]}: {_range(data['processes'][-1]['two_over_one'], '.2f')}"
        )
    if torch.cuda.is_available():
        for kind in kinds:
            data["cuda"].append(measure_cuda(kind, rounds, seconds))
            row = data["cuda"][-1]
            print(
                f"{row['device']}, {kind}, R = {row['R']}: {_range(row['env_steps_per_s'], ',.0f')} environment steps "
                f"a second; {_range(row['speed_up_over_plain_cpu'])} times the plain loop on the CPU, "
                f"{_range(row['speed_up_over_plain_cuda'])} on the device"
            )
    else:
        print("no CUDA device")
    data["goals"] = judge(data)
    for goal in data["goals"]:
        measured = "not measured" if goal["measured"] is None else f"{goal['measured']:,.2f}"
        verdict = {None: "", True: ": reached", False: ": not reached"}[goal["reached"]]
        print(f"goal: {goal['goal']} at least {goal['at_least']:,g}; {measured}{verdict}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(data, indent=1) + "\n")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
