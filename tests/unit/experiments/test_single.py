"""One job from its start to its result: what is written, and that a stopped run goes on as if it had not been."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from trimtab.brain import Brain
from trimtab.errors import BrainError, InputError
from trimtab.experiments import single

JOB: dict[str, Any] = {
    "study": "s",
    "arm": "q_learning",
    "agent": "q_learning",
    "kind": "learned",
    "of": None,
    "base": "constant",
    "options": {"actions": "coarse", "epsilon": 0.5},
    "reward": None,
    "task": "digits-mlp",
    "scale": "smoke",
    "role": "report",
    "seed": 0,
    "root_seed": 0,
    "initial_lr": 0.01,
    "total_steps": 60,
    "every": 10,
    "weight_decay": None,
    "optimizer": None,
    "learn_runs": 0,
    "knobs": ["lr"],
    "knob_options": {},
    "start": {},
    "brain": None,
    "placebo": False,
    "replay_from": None,
    "device": "cpu",
    "precision": "float32",
    "threads": 1,
    "directory": "runs/a",
}


def run(out: Path, **changes: Any) -> dict[str, Any]:
    return single.run_one({**JOB, **changes}, str(out), None, lambda news: None)


def rows(out: Path, name: str, folder: str = "runs/a") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / folder / name).read_text().splitlines()]


def test_files_of_a_run_agree_with_each_other(tmp_path):
    result = run(tmp_path)
    series, decisions = rows(tmp_path, "series.jsonl"), rows(tmp_path, "decisions.jsonl")
    assert [row["optimizer_step"] for row in series] == [0, 10, 20, 30, 40, 50, 60]
    assert [row["optimizer_step"] for row in decisions] == [10, 20, 30, 40, 50]
    # What a decision read back is what stands at the end of the interval that it acted on.
    assert [row["knobs"]["lr"] for row in series[1:-1]] == [row["read_back"] for row in decisions]
    assert [row["written"] for row in decisions] == [row["read_back"] for row in decisions]
    assert result["metrics"]["final_val_loss"] == series[-1]["val_loss"] == result["metrics"]["eval_loss"]
    assert result["metrics"]["best_val_loss"] == min(row["val_loss"] for row in series)
    assert result["test_reads"] == 1
    assert result["n_decisions"] == 5
    settings = [0.01, *(row["setting"] for row in decisions)]
    moved = sum(old != new for old, new in itertools.pairwise(settings))
    assert result["n_interventions"] == moved > 0


def test_a_placebo_ends_where_its_base_schedule_ends(tmp_path):
    placebo = run(tmp_path, kind="placebo", of="q_learning", placebo=True, base="cosine")
    base = run(tmp_path, agent="cosine", kind="baseline", base=None, options={}, directory="runs/b")
    assert placebo["metrics"] == base["metrics"]
    decisions = rows(tmp_path, "decisions.jsonl")
    assert any(row["asked"] != row["setting"] for row in decisions)  # it did decide
    assert {row["setting"] for row in decisions} == {0.01}


def test_a_yoked_twin_has_the_settings_of_its_partner(tmp_path):
    run(tmp_path, seed=1)
    run(tmp_path, kind="yoked", of="q_learning", agent="replay", options={}, replay_from="runs/a", directory="runs/y")
    asked = [row["setting"] for row in rows(tmp_path, "decisions.jsonl")]
    assert [row["setting"] for row in rows(tmp_path, "decisions.jsonl", "runs/y")] == asked
    assert len(set(asked)) > 1


def test_a_yoked_twin_of_two_knobs_replays_both(tmp_path):
    knobs = ["lr", "weight_decay"]
    run(tmp_path, seed=1, knobs=knobs, weight_decay=0.01)
    twin = {"kind": "yoked", "of": "q_learning", "agent": "replay", "options": {}, "replay_from": "runs/a"}
    run(tmp_path, **twin, knobs=knobs, weight_decay=0.01, directory="runs/y")
    partner, replayed = rows(tmp_path, "decisions.jsonl"), rows(tmp_path, "decisions.jsonl", "runs/y")
    assert [(row["knob"], row["setting"]) for row in replayed] == [(row["knob"], row["setting"]) for row in partner]
    assert len({row["setting"] for row in partner if row["knob"] == "weight_decay"}) > 1


def test_a_yoked_twin_has_the_bounds_of_its_partner(tmp_path):
    options = {"batch_size": {"low": 4, "high": 48}}
    given = {"knobs": ["lr", "batch_size"], "knob_options": options, "start": {"batch_size": 16}, "every": 2}
    run(tmp_path, seed=1, **given)
    twin = {"kind": "yoked", "of": "q_learning", "agent": "replay", "options": {}, "replay_from": "runs/a"}
    run(tmp_path, **twin, **given, directory="runs/y")
    partner, replayed = rows(tmp_path, "decisions.jsonl"), rows(tmp_path, "decisions.jsonl", "runs/y")
    sizes = [row["setting"] for row in partner if row["knob"] == "batch_size"]
    assert 4 <= min(sizes) < 16  # below what the knob allows by itself
    assert max(sizes) <= 48
    n = min(len(partner), len(replayed))
    assert [row["setting"] for row in replayed[:n]] == [row["setting"] for row in partner[:n]]


class Stopped(Exception):
    pass


def stop_at(step: int):
    def progress(news: dict[str, Any]) -> None:
        if news["optimizer_step"] == step:
            raise Stopped

    return progress


@pytest.mark.parametrize("changes", [{}, {"agent": "uwhg", "kind": "rule", "options": {}, "base": None, "every": None}])
def test_a_stopped_run_goes_on_to_the_same_files(tmp_path, monkeypatch, changes):
    whole = run(tmp_path / "whole", **changes)
    monkeypatch.setattr(single, "CHECKPOINT_EVERY_S", -1.0)
    steps = [row["optimizer_step"] for row in rows(tmp_path / "whole", "series.jsonl")][1:-1]
    for step in steps:
        with pytest.raises(Stopped):
            single.run_one({**JOB, **changes}, str(tmp_path / "cut"), None, stop_at(step))
    parts = run(tmp_path / "cut", **changes)
    assert {key: value for key, value in parts.items() if key != "times"} == {
        key: value for key, value in whole.items() if key != "times"
    }
    for name in ("series.jsonl", "decisions.jsonl"):
        assert rows(tmp_path / "cut", name) == rows(tmp_path / "whole", name)


def test_a_table_goes_on_learning_over_runs(tmp_path):
    run(tmp_path, learn_runs=2)
    before = Brain.load(tmp_path / "runs/a/brain")
    assert before.provenance["runs"] == 3
    assert before.provenance["optimizer_steps"] == 180
    run(tmp_path, brain=str(tmp_path / "runs/a/brain"), options={}, directory="runs/b")
    after = Brain.load(tmp_path / "runs/b/brain")
    n_before, n_after = (brain.agent.state_dict()["visits"].sum().item() for brain in (before, after))
    assert n_after - n_before == 5  # as many as a run of 60 steps, every 10, has decisions


def test_a_brain_of_another_spec_is_refused_before_training(tmp_path):
    run(tmp_path)
    job = {**JOB, "brain": str(tmp_path / "runs/a/brain"), "options": {}, "every": 7}
    with pytest.raises(BrainError, match="arm 'q_learning' on 'digits-mlp': this brain was made for another spec"):
        single.check_job(job)


def test_a_brain_of_another_agent_is_refused_by_name(tmp_path):
    run(tmp_path)
    with pytest.raises(InputError, match="is of the agent 'q_learning'; say agent: q_learning"):
        single.check_job({**JOB, "brain": str(tmp_path / "runs/a/brain"), "agent": "random"})


def test_the_rate_forced_to_a_million_does_not_lose_the_run(tmp_path):
    result = run(
        tmp_path, initial_lr=1e6, agent="uwhg", kind="rule", options={}, base=None, every=None, total_steps=200
    )
    assert result["status"] == "done"
    assert result["n_rollbacks"] > 5
    first = rows(tmp_path, "series.jsonl")[0]["val_loss"]
    assert result["metrics"]["test_loss"] < 0.95 * first  # it learned something after all that was lost
    assert all("rolled back to the start of the interval, rate / 5" in note for note in result["notes"])


def test_a_baseline_that_diverges_says_so(tmp_path):
    result = run(tmp_path, agent="constant", kind="baseline", options={}, base=None, initial_lr=1e30)
    assert result["metrics"]["test_loss"] != result["metrics"]["test_loss"] or result["metrics"]["test_loss"] > 1e6
    assert result["n_rollbacks"] == 0
