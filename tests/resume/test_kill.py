"""Kill -9 at ten random moments, then --resume: results.json equals the uninterrupted one but for times."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.slow

STUDY = """
study: tiny
idea: killed at random
tasks: [digits-mlp]
arms: [constant, uwhg, q_learning, placebo:q_learning, yoked:q_learning]
n_seeds: 4
lr: 0.001
total_steps: 400
every: 10
tuning: {arm: cosine, lrs: [0.003, 0.03], n_seeds: 1}
"""
N_KILLS = 10


def command(out):
    return [sys.executable, "-m", "trimtab", "run", "tiny.yaml", "--out", str(out), "--workers", "2", "--resume"]


def begin(folder, out):
    return subprocess.Popen(
        command(out), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def without_times(value, times):
    if isinstance(value, dict):
        return {key: without_times(item, times) for key, item in value.items() if key not in times}
    if isinstance(value, list):
        return [without_times(item, times) for item in value]
    return value


def results(out):
    data = json.loads((out / "results.json").read_text())
    assert data["time_fields"]
    return without_times(data, set(data["time_fields"]))


def members(group):
    """Processes of a session that are alive."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                state, _, _, session = file.read().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(session) == group and state not in "ZX":
            found.append(int(name))
    return found


def count(out):
    return len(list(out.rglob("result.json")))


def wait_for_a_moment(draw, process, out):
    """Some time after the start (imports, checks, the first steps), or shortly after some more runs are over."""
    if draw.random() < 0.3:
        more, rest_s = 0, draw.uniform(0.1, 5.0)
    else:
        more, rest_s = draw.randint(1, 2), draw.uniform(0.0, 0.5)
    target = count(out) + more
    while process.poll() is None and count(out) < target:
        time.sleep(0.01)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(rest_s)


def files(out):
    """What lies in a study, hidden files too; of experience without the place and the token in a file's name."""
    names = [path.relative_to(out).as_posix() for path in out.rglob("*")]
    stored = re.compile(r"(experience/[0-9a-f]+/)[0-9]{8}-(.*)-[0-9a-f]{12}(\.safetensors)")
    return sorted(stored.sub(r"\1\2\3", name) for name in names)


@pytest.mark.timeout(900)
def test_killed_ten_times_a_study_ends_with_the_same_results(tmp_path):
    (tmp_path / "tiny.yaml").write_text(STUDY)
    whole = tmp_path / "whole"
    assert subprocess.run(command(whole), cwd=tmp_path, capture_output=True, check=False).returncode == 0
    draw = random.Random(20261121)
    out = tmp_path / "killed"
    states: list[int] = []
    hits = 0
    while len(states) < N_KILLS:
        process = begin(tmp_path, out)
        wait_for_a_moment(draw, process, out)
        with contextlib.suppress(ProcessLookupError):  # it was over a moment too soon
            if len(states) % 3 == 2:
                os.kill(process.pid, signal.SIGKILL)  # the parent alone: its workers must follow it
            else:
                os.killpg(process.pid, signal.SIGKILL)
        hits += process.wait() == -signal.SIGKILL
        assert process.returncode == -signal.SIGKILL or count(out) == count(whole)
        deadline = time.monotonic() + 10
        while members(process.pid):
            assert time.monotonic() < deadline, "a worker outlives its killed parent"
            time.sleep(0.02)
        states.append(count(out))
    assert states == sorted(states), states  # what was done stays done
    assert len(set(states)) > 4, states  # and the kills hit it at different moments
    assert hits >= 8, states  # on a machine so fast that it was over before the last of them, two may miss
    last = subprocess.run(command(out), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert last.returncode == 0, last.stderr
    assert results(out) == results(whole)
    assert files(out) == files(whole)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("checkpoint_s", [0.0])
def test_a_run_killed_between_checkpoints_goes_on_to_the_same_bits(tmp_path, checkpoint_s):
    """One job, a checkpoint at every interval, killed in the middle: series, decisions and metrics are equal."""
    (tmp_path / "tiny.yaml").write_text(STUDY.replace("total_steps: 400", "total_steps: 1000"))
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from trimtab.experiments import single\n"
        "from trimtab.experiments.design import load_study\n"
        "from trimtab.experiments.plan import plan_jobs\n"
        f"single.CHECKPOINT_EVERY_S = {checkpoint_s}\n"
        "job = next(j for j in plan_jobs(load_study('tiny.yaml', arms=['q_learning'])))\n"
        "single.run_one(job.to_json(), sys.argv[1], None, lambda news: None)\n"
    )
    job = "runs/digits-mlp/q_learning/report/lr-0.001/seed-0"
    run = [sys.executable, "-c", script]
    subprocess.run([*run, "whole"], cwd=tmp_path, check=True)
    draw = random.Random(7)
    kills = 0
    for _ in range(6):
        process = subprocess.Popen([*run, "killed"], cwd=tmp_path)
        series = tmp_path / "killed" / job / "series.jsonl"
        lines = len(series.read_text().splitlines()) if series.exists() else 0
        more = draw.randint(3, 25)
        while process.poll() is None and (
            not series.exists() or not lines < len(series.read_text().splitlines()) - more
        ):
            time.sleep(0.002)
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        kills += 1
    assert kills >= 3
    subprocess.run([*run, "killed"], cwd=tmp_path, check=True)
    for name in ("series.jsonl", "decisions.jsonl"):
        assert (tmp_path / "killed" / job / name).read_text() == (tmp_path / "whole" / job / name).read_text()
    metrics = [json.loads((tmp_path / out / job / "result.json").read_text())["metrics"] for out in ("whole", "killed")]
    assert metrics[0] == metrics[1]
