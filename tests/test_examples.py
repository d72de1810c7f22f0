"""Every example runs, with a tiny budget, in a process of its own."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, EXAMPLES / name, *arguments], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_own_loop_says_what_was_decided():
    lines = run("own_loop.py", "--steps", "60").splitlines()
    assert len([line for line in lines if line.startswith("step ")]) == 8
    assert lines[-1].startswith("accuracy after 60 steps from a rate of 1e-5: fixed 0.")


def test_a_network_of_ones_own_is_pruned_saved_and_loaded():
    lines = run("prune_own_network.py", "--epochs", "2").splitlines()
    flops = next(line.split() for line in lines if line.startswith("flops"))
    assert int(flops[2].replace(",", "")) <= 0.5 * int(flops[1].replace(",", ""))
    assert any(line.startswith("random-search: ") for line in lines)
    assert lines[-1].startswith("test accuracy: dense 0.")


def test_a_task_of_ones_own_is_run_in_a_study(tmp_path):
    command = [sys.executable, "-m", "trimtab", "run", "demo", "--tasks", f"{EXAMPLES / 'own_task.py'}:two_moons",
               "--arms", "constant", "--scale", "smoke", "--n-seeds", "1", "--workers", "1"]  # fmt: skip
    done = subprocess.run([*command, "--out", tmp_path / "moons"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    study = json.loads((tmp_path / "moons" / "study.json").read_text())
    assert study["tasks"] == ["two_moons"]
    assert study["own_tasks"] == {"two_moons": hashlib.sha256((EXAMPLES / "own_task.py").read_bytes()).hexdigest()}
    folder = tmp_path / "moons" / "runs" / "two_moons" / "constant" / "report" / "lr-0.0003" / "seed-0"
    assert json.loads((folder / "result.json").read_text())["metrics"]["optimizer_steps"] == 60


def test_every_example_is_tested():
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == [
        "own_loop.py",
        "own_task.py",
        "prune_own_network.py",
    ]
