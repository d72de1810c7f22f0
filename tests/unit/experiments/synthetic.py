"""A study's folder with invented numbers, in the schema that the runner writes: the report's test bed."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

LEVEL = {  # final test loss that an arm's runs scatter around
    "constant": 0.30,
    "step": 0.22,
    "exponential": 0.23,
    "cosine": 0.20,
    "default-cosine": 0.19,
    "uwhg": 0.12,
    "q_learning": 0.21,
    "placebo:q_learning": 0.30,
    "yoked:q_learning": 0.22,
    "tuned-cosine": 0.10,
}
KIND = {"uwhg": "rule", "q_learning": "learned", "placebo:q_learning": "placebo", "yoked:q_learning": "yoked"}
TIMES = ("total_train_time", "controller_time", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second",
         "avg_inference_tokens_per_second")  # fmt: skip


@dataclass
class Synthetic:
    """What to write; every field may be changed before `write`."""

    arms: list[str] = field(default_factory=lambda: list(LEVEL))
    tasks: dict[str, str] = field(default_factory=lambda: {"digits-mlp": "digits"})
    n_seeds: int = 5
    level: dict[str, float] = field(default_factory=lambda: dict(LEVEL))
    kind: dict[str, str] = field(default_factory=lambda: dict(KIND))
    noise: float = 0.01
    sensitivity_lrs: tuple[float, ...] = (1e-4, 1e-3, 1e-2)
    benchmark: dict[str, str] = field(default_factory=dict)
    tuned: bool = True
    clock: float = 1.0  # factor on every time, to tell two otherwise equal folders apart
    total_steps: int = 660
    eval_every: int = 20
    plan: dict[str, Any] = field(default_factory=dict)

    def write(self, out: Path) -> Path:
        arms = [arm for arm in self.arms if self.tuned or arm != "tuned-cosine"]
        plan = {
            "schema": 1,
            "study": "synthetic",
            "idea": "Does a controller of the learning rate help on <digits> & co?",
            "scale": "small",
            "root_seed": 0,
            "n_seeds": self.n_seeds,
            "tasks": list(self.tasks),
            "left_out": [{"task": "enwik8-gpt", "why": "its file was not found"}],
            "arms": [self._arm(arm) for arm in arms],
            "sensitivity_lrs": list(self.sensitivity_lrs),
            "sensitivity_seeds": min(self.n_seeds, 3),
            "support": [],
            "tuning": {"arm": "tuned-cosine", "lrs": [1e-3, 1e-2, 1e-1], "n_seeds": 3,
                       "chosen": dict.fromkeys(self.tasks, 1e-2)} if self.tuned else None,
            "benchmark_tasks": list(self.benchmark),
            "environment": {"python": "3.11.2", "torch": "2.13.0", "trimtab": "0.1.0", "device": "cpu", "threads": 1},
            "user_config": {"optimizer": "adam", "lr": 0.001, "schedule": "constant"},
            **self.plan,
        }  # fmt: skip
        write_json(out / "study.json", plan)
        for task, dataset in self.tasks.items():
            for arm in arms:
                for seed in range(self.n_seeds):
                    self._run(out, arm, task, dataset, "report", seed, self._rate(arm))
                for rate in self.sensitivity_lrs:
                    if rate != self._rate(arm) and not arm.startswith(("placebo", "yoked", "tuned", "default")):
                        for seed in range(min(self.n_seeds, 3)):
                            self._run(out, arm, task, dataset, "sensitivity", seed, rate)
            for rate, seed in itertools.product((1e-3, 1e-2, 1e-1), (100, 101, 102)) if self.tuned else ():
                self._run(out, "tuned-cosine", task, dataset, "tuning", seed, rate)
        for (task, dataset), arm, seed in itertools.product(self.benchmark.items(), arms, range(self.n_seeds)):
            self._run(out, arm, task, dataset, "benchmark", seed, self._rate(arm))
        return out

    def _rate(self, arm: str) -> float:
        return 1e-2 if arm == "tuned-cosine" else 1e-3

    def _arm(self, arm: str) -> dict[str, Any]:
        return {
            "id": arm,
            "agent": {"tuned-cosine": "cosine"}.get(arm, arm.split(":")[-1]),
            "kind": self.kind.get(arm, "baseline"),
            "of": arm.split(":")[1] if ":" in arm else None,
            "base": "constant",
            "options": {"epsilon": 0.1} if arm == "q_learning" else {},
            "lr": dict.fromkeys([*self.tasks, *self.benchmark], self._rate(arm)),
        }

    def _run(self, out: Path, arm: str, task: str, dataset: str, role: str, seed: int, rate: float) -> None:
        folder = out / "runs" / task / arm / f"{role}-{rate:g}-{seed}"
        # a placebo equals its base to the bit: it is given the constant arm's numbers, series and all
        twin = "constant" if arm.startswith("placebo:") else arm
        rng = np.random.default_rng([seed, sum(twin.encode()), len(task), int(-10 * math.log10(rate))])
        level = self.level[twin] * (1 + self.noise * 10 * float(rng.normal()) * 0.5)
        spread = 0.02 if self.kind.get(arm) in ("rule",) else 0.5
        level *= 1 + spread * abs(math.log10(rate / self._rate(arm)))
        write_json(
            folder / "run.json",
            {"schema": 1, "study": "synthetic", "arm": arm, "task": task, "dataset": dataset, "role": role,
             "seed": seed, "initial_lr": rate, "total_steps": self.total_steps, "agent": arm, "options": {}},
        )  # fmt: skip
        series, decisions = self._series(twin, rate, level, rng, twin in self.kind)
        write_lines(folder / "series.jsonl", series)
        write_lines(folder / "decisions.jsonl", decisions)
        write_json(folder / "result.json", self._result(arm, level, series, decisions))

    def _series(
        self, arm: str, rate: float, level: float, rng: np.random.Generator, decides: bool
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        series, decisions, lr = [], [], rate
        for index, step in enumerate(range(0, self.total_steps + 1, self.eval_every)):
            share = step / self.total_steps
            loss = level + (2.3 - level) * math.exp(-6 * share) + 0.01 * float(rng.normal()) * (1 - share)
            if decides and 0 < step < self.total_steps:
                before = lr
                guard = arm == "q_learning" and index == 12
                factor = 0.2 if guard else float(rng.choice([1.1, 0.9, 1.0]))
                lr = before * factor
                decisions.append(
                    {"index": len(decisions), "optimizer_step": step, "knob": "lr",
                     "source": "guard" if guard else "agent", "action": None if guard else 1.0, "before": before,
                     "asked": lr, "setting": lr, "written": lr, "read_back": lr, "note": "rolled back" if guard else ""}
                )  # fmt: skip
            elif not decides:
                lr = rate if arm == "constant" else rate * (0.5 * (1 + math.cos(math.pi * share)) + 1e-3)
            series.append(
                {"optimizer_step": step, "epoch": step / 45, "progress": share, "train_loss": 0.7 * loss,
                 "val_loss": loss, "accuracy": 1 - loss / 3, "reward": 0.1 * math.exp(-6 * share) if decides else None,
                 "signals": {"progress": share}, "knobs": {"lr": lr}}
            )  # fmt: skip
        return series, decisions

    def _result(
        self, arm: str, level: float, series: list[dict[str, Any]], decisions: list[dict[str, Any]]
    ) -> dict[str, Any]:
        return {
            "status": "done",
            "error": None,
            "metrics": {
                "final_train_loss": series[-1]["train_loss"],
                "final_val_loss": series[-1]["val_loss"],
                "best_val_loss": min(row["val_loss"] for row in series),
                "test_loss": level,
                "test_accuracy": 1 - level / 3,
                "test_f1": 0.99 * (1 - level / 3),
                "test_mse": None,
                "eval_loss": series[-1]["val_loss"],
                "eval_accuracy": series[-1]["accuracy"],
                "epoch": series[-1]["epoch"],
                "optimizer_steps": self.total_steps,
            },
            "times": {name: self.clock * (0.5 + 0.1 * index) for index, name in enumerate(TIMES)},
            "n_decisions": len(decisions),
            "n_interventions": sum(row["before"] != row["read_back"] for row in decisions),
            "n_rollbacks": sum(row["source"] == "guard" for row in decisions),
            "learning": {"runs": 20, "optimizer_steps": 13_200} if arm == "q_learning" else {},
            "notes": [],
        }


def write_json(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def change(path: Path, **changes: Any) -> None:
    """Overwrite top-level keys of a JSON file."""
    write_json(path, {**json.loads(path.read_text()), **changes})
