"""Kill -9 at random moments while brains learn, then --resume: everything is as if nothing had been, but for times."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

RECIPE = """
recipe: tiny
idea: killed at random
learner: ppo
options: {hidden: [4]}
spec: {n_decisions: 2, early_decisions: 1}
tasks: {families: [quadratic], runs_per_task: 2, horizon: [50, 52]}
num_envs: 4
iterations: 60
seeds: 2
validate: {every: 20, num_envs: 2, episodes: 1, runs_per_task: 2}
choose: best-or-ensemble
"""
# A checkpoint after every iteration, so that kills hit them; the command itself makes one every 20 s.
SCRIPT = (
    "import sys\n"
    "from trimtab.learning import teach\n"
    "from trimtab.learning.learn import learn\n"
    "teach.CHECKPOINT_EVERY_S = 0.0\n"
    "learn('tiny.yaml', sys.argv[1], workers=0, resume=True)\n"
)
TIMES = {"cpu_s", "wall_s", "wall_s_of_a_learner", "checksum"}
N_KILLS = 8


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def content(out):
    found = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.suffix in (".json", ".jsonl"):
            lines = [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines()
            found[name] = [without_times(json.loads(line)) for line in lines]
        elif path.suffix == ".safetensors":
            found[name] = path.read_bytes()
        else:
            found[name] = None  # a picture, a text with times in it, a folder: that it is there
    return found


def lines_in(out: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return sum(len(path.read_bytes().splitlines()) for path in out.glob("seed-*/curve.jsonl"))
    return 0


@pytest.mark.timeout(600)
def test_killed_at_random_moments_a_brain_ends_with_the_same_bits(tmp_path):
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    run = [sys.executable, "-c", SCRIPT]
    subprocess.run([*run, "whole"], cwd=tmp_path, check=True)
    draw, out, kills = random.Random(20261121), tmp_path / "killed", 0
    for _ in range(N_KILLS):
        process = subprocess.Popen([*run, "killed"], cwd=tmp_path)
        target = lines_in(out) + draw.randint(1, 12)
        while process.poll() is None and lines_in(out) < target:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(draw.uniform(0.0005, 0.003))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 4
    assert lines_in(out) > 0
    subprocess.run([*run, "killed"], cwd=tmp_path, check=True)
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.timeout(300)
def test_ctrl_c_ends_the_workers_and_says_how_to_go_on(tmp_path):
    (tmp_path / "tiny.yaml").write_text(RECIPE.replace("iterations: 60", "iterations: 100000"))
    command = [sys.executable, "-m", "trimtab", "learn", "tiny.yaml", "--out", "a b", "--workers", "2"]
    with subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        try:
            while lines_in(tmp_path / "a b") < 10:
                assert process.poll() is None, process.stderr.read()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.05)
            os.kill(process.pid, signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert err.splitlines()[-1] == (
        "trimtab: interrupted; what is done is kept, go on with: "
        "trimtab learn tiny.yaml --out 'a b' --workers 2 --resume"
    )
    assert "Traceback" not in err
