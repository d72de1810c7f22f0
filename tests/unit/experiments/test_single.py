"""One job from its start to its result: what is written, and that a stopped run goes on as if it had not been."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trimtab import registry
from trimtab.brain import Brain
from trimtab.errors import BrainError, InputError, MissingExtraError
from trimtab.experiments import single
from trimtab.spec import ControlSpec, make_agent
from trimtab.training.loop import TrainingLoop
from trimtab.training.own_optimizers import put_in

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


OWN = {"agent": "constant", "kind": "baseline", "base": None, "options": {}}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"agent": "uwhg", "kind": "rule", "options": {}, "base": None, "every": None},
        {**OWN, "own_optimizer": "schedule-free"},
        {**OWN, "agent": "cosine", "own_optimizer": "prodigy", "initial_lr": None},
        {"agent": "deep_q", "options": {"actions": "continuous", "epsilon": 0.5}},
        {"agent": "ppo", "brain": "default", "options": {}, "base": "cosine", "every": None, "learn_runs": 2},
    ],
)
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
    names = ["series.jsonl"] if changes.get("kind") == "baseline" else ["series.jsonl", "decisions.jsonl"]
    for name in names:  # a baseline decides nothing
        assert rows(tmp_path / "cut", name) == rows(tmp_path / "whole", name)


def test_arms_with_an_optimizer_of_their_own(tmp_path):
    plain = run(tmp_path, **OWN, directory="runs/p")
    free = run(tmp_path, **OWN, own_optimizer="schedule-free", directory="runs/f")
    found = run(tmp_path, **OWN, own_optimizer="prodigy", initial_lr=None, directory="runs/d")
    losses = [result["metrics"]["test_loss"] for result in (plain, free, found)]
    assert len(set(losses)) == 3
    start = rows(tmp_path, "series.jsonl", "runs/f")[0]["val_loss"]
    assert start == rows(tmp_path, "series.jsonl", "runs/p")[0]["val_loss"]  # the same first weights
    assert max(losses) < start
    assert {row["knobs"]["lr"] for row in rows(tmp_path, "series.jsonl", "runs/d")} == {1.0}
    # What is reported is measured at the average, not at the weights that gradients are taken at.
    task = registry.load("task", "digits-mlp")("smoke").replace(lr=0.01, total_steps=60)
    loop = TrainingLoop(task, task.load(None), seed=0)
    put_in(loop, "schedule-free")
    for _ in range(60):
        loop.step()
    group = loop.optimizer.param_groups[0]
    measured = loop.evaluate("val")["loss"]
    assert group["train_mode"] is True
    loop.optimizer.eval()
    assert loop.evaluate("val")["loss"] == pytest.approx(measured, rel=1e-6)
    assert group["train_mode"] is False


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_looking_at_a_run_with_schedule_free_does_not_change_it(optimizer):
    task = registry.load("task", "digits-mlp")("smoke").replace(optimizer=optimizer, momentum=0.9, lr=0.01)
    loop = TrainingLoop(task, task.load(None), seed=0)
    put_in(loop, "schedule-free")
    for _ in range(5):
        loop.step()
    before = [weight.detach().clone() for weight in loop.model.parameters()]
    loop.evaluate("val")
    assert all(torch.equal(a, b) for a, b in zip(before, loop.model.parameters(), strict=True))
    loop.step()


@pytest.mark.parametrize(
    ("changes", "text"), [({"optimizer": "sgd"}, "momentum"), ({"betas": (0.0, 0.9)}, r"betas\[0\]")]
)
def test_schedule_free_without_momentum_is_refused_before_training(monkeypatch, changes, text):
    task = registry.load("task", "digits-mlp")("smoke").replace(**changes)
    monkeypatch.setattr(single, "make_task", lambda job: task)
    with pytest.raises(InputError, match=rf"schedule-free on digits-mlp: {text} of the task is 0"):
        single.check_own_optimizers([{**JOB, **OWN, "own_optimizer": "schedule-free"}], None)


def test_a_brain_that_we_ship_is_used_as_it_is_and_taught_on_from_earlier_runs(tmp_path):
    brain = {"agent": "ppo", "brain": "default", "options": {}, "base": None, "every": None}
    single.check_job({**JOB, **brain})
    plain = run(tmp_path, **brain, directory="runs/p")
    taught = run(tmp_path, **brain, learn_runs=3, directory="runs/t")
    assert not (tmp_path / "runs/p/brain").exists()
    shipped = Brain.load("default")
    after = Brain.load(tmp_path / "runs/t/brain")
    assert after.spec.fingerprint == shipped.spec.fingerprint
    assert taught["learning"]["runs"] == 3
    assert 3 * 10 < taught["learning"]["transitions"] <= 3 * 30  # at most one decision in two of 60 steps
    weights = [{key: value for key, value in b.agent.state_dict().items() if key != "rng"} for b in (shipped, after)]
    assert any((weights[0][key] != weights[1][key]).any() for key in weights[0])
    assert max((weights[0][key] - weights[1][key]).abs().max() for key in weights[0]) < 0.07
    assert taught["metrics"]["test_loss"] != plain["metrics"]["test_loss"]


@pytest.mark.parametrize(
    "arm",
    [
        {"agent": "uwhg", "kind": "rule", "options": {}, "base": None},
        {"agent": "ppo", "brain": "default", "options": {}, "base": "cosine"},
    ],
)
def test_the_rule_and_the_brain_keep_times_of_their_own(tmp_path, arm):
    decided = {}
    for every in (None, 10):
        run(tmp_path, **arm, every=every, directory=f"runs/{every}")
        decided[every] = [row["optimizer_step"] for row in rows(tmp_path, "decisions.jsonl", f"runs/{every}")]
    assert decided[10] == decided[None]
    assert decided[10][:3] != [10, 20, 30]


def test_a_brain_is_refused_on_data_that_it_was_taught_on(tmp_path):
    brain = {"agent": "ppo", "brain": "default", "options": {}, "base": None, "every": None}
    text = "arm 'q_learning' on 'diabetes-mlp': task 'diabetes-mlp' is no test of this brain: it was taught on"
    with pytest.raises(InputError, match=text + " 'diabetes'.*or name under restricted: the arms that the task is run"):
        single.check_job({**JOB, **brain, "task": "diabetes-mlp"})
    # One that goes on from it has seen the same; where it goes on from a run on this very task, that was the wish.
    run(tmp_path, **brain, learn_runs=2)
    mine = {**brain, "brain": str(tmp_path / "runs/a/brain")}
    single.check_job({**JOB, **mine})
    with pytest.raises(InputError, match=text):
        single.check_job({**JOB, **mine, "task": "diabetes-mlp"})


def test_a_run_says_what_its_brain_took_before(tmp_path):
    brain = {"agent": "ppo", "brain": "default", "options": {}, "base": None, "every": None}
    run(tmp_path, **brain)
    cost = Brain.load("default").provenance["cost"]
    header = json.loads((tmp_path / "runs/a/run.json").read_text())
    assert header["taught"] == {"networks": cost["networks"], "optimizer_steps": cost["optimizer_steps"]}
    run(tmp_path, directory="runs/q", learn_runs=1)
    assert "taught" not in json.loads((tmp_path / "runs/q/run.json").read_text())
    run(tmp_path, directory="runs/r", brain=str(tmp_path / "runs/q/brain"), options={})
    header = json.loads((tmp_path / "runs/r/run.json").read_text())
    assert header["taught"] == {"networks": 2, "optimizer_steps": 120}


def test_a_brain_that_cannot_be_taught_on_is_refused_before_training(tmp_path):
    agent = make_agent("dqn")
    Brain(agent, ControlSpec.for_agent(agent)).save(tmp_path / "b")
    job = {**JOB, "agent": "dqn", "brain": str(tmp_path / "b"), "options": {}, "base": None, "every": None}
    single.check_job(job)
    with pytest.raises(InputError, match=r"agent 'dqn' cannot be taught on from earlier runs; leave learn_runs out"):
        single.check_job({**job, "learn_runs": 1})


@pytest.mark.parametrize(("name", "package"), [("schedule-free", "schedulefree"), ("prodigy", "prodigyopt")])
def test_a_missing_extra_is_refused_before_training(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        MissingExtraError, match=rf"arm .q_learning.* needs the package {package}.*trimtab\[baselines\]"
    ):
        single.check_job({**JOB, **OWN, "own_optimizer": name})


def test_batch_norm_is_refused_before_training(monkeypatch):
    task = registry.load("task", "digits-mlp")("smoke")
    task = task.replace(make_model=lambda data: nn.Sequential(nn.Linear(64, 10), nn.BatchNorm1d(10)))
    monkeypatch.setattr(single, "make_task", lambda job: task)
    with pytest.raises(InputError, match="arm 'q_learning' on 'digits-mlp': schedule-free on digits-mlp: batch norm"):
        single.check_own_optimizers([{**JOB, **OWN, "own_optimizer": "schedule-free"}], None)


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
