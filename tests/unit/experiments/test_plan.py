"""Jobs of a study: seeds, partners, folders, the choice of the tuned rate, and what makes two plans differ."""

import json
import math
from dataclasses import replace

import pytest

from trimtab.experiments.design import load_study
from trimtab.experiments.plan import (
    choose_rate,
    first_difference,
    plan_jobs,
    study_json,
    tuned_jobs,
    tuning_jobs,
)
from trimtab.experiments.reading import read_study
from trimtab.storage import write_json

TEXT = """
study: mine
idea: a test
tasks: [digits-mlp]
arms: [constant, default-cosine, q_learning, placebo:q_learning, yoked:q_learning]
n_seeds: 3
lr: 0.001
"""


def study_of(tmp_path, more="", **asked):
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT + more)
    return load_study(path, **asked)


def test_every_arm_runs_once_for_each_seed_in_a_folder_of_its_own(tmp_path):
    jobs = plan_jobs(study_of(tmp_path))
    assert len(jobs) == 5 * 3
    assert {(job.arm, job.seed) for job in jobs} == {
        (arm, seed)
        for arm in ("constant", "default-cosine", "q_learning", "placebo:q_learning", "yoked:q_learning")
        for seed in range(3)
    }
    assert len({job.directory for job in jobs}) == len(jobs)
    assert jobs[0].directory == "runs/digits-mlp/constant/report/lr-0.001/seed-0"
    assert {job.directory for job in jobs if job.arm == "yoked:q_learning" and job.seed == 2} == {
        "runs/digits-mlp/yoked:q_learning/report/lr-0.001/seed-2"
    }


def test_a_job_is_json_and_says_everything(tmp_path):
    job = next(job for job in plan_jobs(study_of(tmp_path)) if job.arm == "placebo:q_learning")
    data = job.to_json()
    assert json.loads(json.dumps(data)) == data
    assert data["placebo"] is True
    assert (data["agent"], data["kind"], data["of"]) == ("q_learning", "placebo", "q_learning")
    assert set(data) == {
        *("study", "arm", "agent", "kind", "of", "base", "options", "reward", "task", "scale", "role", "seed"),
        *("root_seed", "initial_lr", "total_steps", "every", "weight_decay", "optimizer", "learn_runs", "placebo"),
        *("replay_from", "device", "precision", "threads", "directory", "knobs", "brain", "start"),
        *("knob_options", "search", "learn_tasks", "experience", "own_optimizer"),
    }


def test_a_yoked_run_replays_its_arm_under_the_next_seed_and_comes_after_it(tmp_path):
    jobs = plan_jobs(study_of(tmp_path))
    order = [job.directory for job in jobs]
    for job in jobs:
        if job.kind == "yoked":
            assert job.replay_from == f"runs/digits-mlp/q_learning/report/lr-0.001/seed-{(job.seed + 1) % 3}"
            assert order.index(job.replay_from) < order.index(job.directory)
        else:
            assert job.replay_from is None


@pytest.mark.parametrize(("asked", "seeds"), [({"arms": ["yoked:q_learning"]}, [1, 2, 0]), ({"n_seeds": 1}, [1])])
def test_a_yoked_arm_without_a_partner_to_replay_gets_support_runs(tmp_path, asked, seeds):
    jobs = plan_jobs(study_of(tmp_path, **asked))
    support = [job for job in jobs if job.role == "support"]
    assert [job.seed for job in support] == seeds
    assert all((job.arm, job.agent, job.initial_lr) == ("q_learning", "q_learning", 0.001) for job in support)
    twins = [job for job in jobs if job.kind == "yoked"]
    assert [job.replay_from for job in twins] == [job.directory for job in support]
    assert all(partner.seed != twin.seed for partner, twin in zip(support, twins, strict=True))


@pytest.mark.parametrize("lr", ["0.001", "task"])  # which is 0.001 too
def test_sensitivity_runs_leave_out_the_controls_the_main_rate_and_default_cosine(tmp_path, lr):
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT.replace("lr: 0.001", f"lr: {lr}") + "sensitivity_lrs: [0.001, 0.1]\nsensitivity_seeds: 2\n")
    study = load_study(path)
    jobs = [job for job in plan_jobs(study) if job.role == "sensitivity"]
    assert {(job.arm, job.initial_lr, job.seed) for job in jobs} == {
        (arm, 0.1, seed) for arm in ("constant", "q_learning") for seed in (0, 1)
    }
    assert len(jobs) == 4


def test_tuning_seeds_are_never_report_seeds(tmp_path):
    study = study_of(tmp_path, "tuning: {arm: cosine, lrs: [0.1, 0.01], n_seeds: 2}\n")
    jobs = tuning_jobs(study)
    assert [(job.initial_lr, job.seed) for job in jobs] == [(0.01, 1000), (0.01, 1001), (0.1, 1000), (0.1, 1001)]
    assert {(job.arm, job.agent, job.role, job.kind) for job in jobs} == {
        ("tuned-cosine", "cosine", "tuning", "baseline")
    }
    tuned = tuned_jobs(study, "digits-mlp", 0.01)
    assert [(job.seed, job.initial_lr, job.role) for job in tuned] == [(seed, 0.01, "report") for seed in range(3)]
    assert not {job.seed for job in jobs} & {job.seed for job in tuned}


def test_benchmark_runs_are_the_same_arms_untouched_on_the_second_set(tmp_path):
    study = study_of(tmp_path, "benchmark_tasks: [digits-cnn]\ntuning: {arm: cosine, lrs: [0.1, 0.01], n_seeds: 1}\n")
    jobs = [job for job in plan_jobs(study) if job.role == "benchmark"]
    assert {job.task for job in jobs} == {"digits-cnn"}
    assert {(job.arm, job.initial_lr) for job in jobs} == {(arm.id, arm.lr["digits-mlp"]) for arm in study.arms}
    assert {job.replay_from.split("/")[1] for job in jobs if job.kind == "yoked"} == {"digits-cnn"}
    tuned = tuned_jobs(study, "digits-mlp", 0.1)
    assert {(job.task, job.role, job.initial_lr) for job in tuned} == {
        ("digits-mlp", "report", 0.1),
        ("digits-cnn", "benchmark", 0.1),
    }


@pytest.mark.parametrize(
    ("losses", "rate"),
    [
        ({0.1: [1.0, 2.0], 0.01: [1.4, 1.5]}, 0.01),
        ({0.1: [1.0, 1.0], 0.01: [1.0, 1.0]}, 0.01),
        ({0.01: [None, 0.1], 0.1: [9.0, 9.0]}, 0.1),
        ({0.01: [math.nan], 0.1: [math.inf]}, None),
        ({0.01: [], 0.1: [2.0]}, 0.1),
        ({}, None),
    ],
)
def test_the_lowest_mean_wins_ties_go_to_the_lower_rate_and_a_diverged_rate_is_worst(losses, rate):
    assert choose_rate(losses) == rate


def test_study_json_says_what_was_chosen(tmp_path):
    study = study_of(tmp_path, "benchmark_tasks: [digits-cnn]\ntuning: {arm: cosine, lrs: [0.1, 0.01], n_seeds: 1}\n")
    before = study_json(study, {"torch": "2"})
    assert before["tuning"]["chosen"] == {}
    assert before["arms"][-1]["lr"] == {"digits-mlp": None, "digits-cnn": None}
    after = study_json(study, {}, {"digits-mlp": 0.1})
    assert after["tuning"] == {"arm": "tuned-cosine", "lrs": [0.01, 0.1], "n_seeds": 1, "chosen": {"digits-mlp": 0.1}}
    assert after["arms"][-1]["lr"] == {"digits-mlp": 0.1, "digits-cnn": 0.1}
    assert json.loads(json.dumps(after)) == after


def test_what_is_filled_in_on_the_way_makes_no_other_plan(tmp_path):
    study = study_of(tmp_path, "tuning: {arm: cosine, lrs: [0.1, 0.01], n_seeds: 1}\n")
    there = study_json(replace(study, idea="other words"), {"torch": "2"}, {"digits-mlp": 0.1})
    assert first_difference(there, study_json(study, {"torch": "3"})) is None


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"scale": "smoke"}, "scale is 'small' there, 'smoke' is asked for now"),
        ({"n_seeds": 4}, "n_seeds is 3 there, 4 is asked for now"),
        ({"seed": 1}, "root_seed is 0 there, 1 is asked for now"),
        ({"tasks": ["digits-cnn"]}, "tasks.0 is 'digits-mlp' there, 'digits-cnn' is asked for now"),
        ({"arms": ["uwhg"]}, "arms is ['constant', 'default-cosine', 'q_learning', 'placebo:q_learning', "),
    ],
)
def test_the_first_difference_is_named(tmp_path, asked, text):
    there = json.loads(json.dumps(study_json(study_of(tmp_path), {})))
    assert first_difference(there, study_json(study_of(tmp_path, **asked), {})).startswith(text)


def test_a_changed_arm_is_named(tmp_path):
    there = study_json(study_of(tmp_path), {})
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT.replace("0.001", "0.002"))
    difference = first_difference(there, study_json(load_study(path), {}))
    assert difference == "arms.constant.lr.digits-mlp is 0.001 there, 0.002 is asked for now"


def test_a_twin_from_another_rate_replays_its_arm_from_that_rate_under_another_seed(tmp_path):
    more = "sensitivity_lrs: [0.01]\nsensitivity_seeds: 2\n"
    plain = plan_jobs(study_of(tmp_path, more))
    jobs = plan_jobs(study_of(tmp_path, more + "sensitivity_controls: true\n"))
    ids = ("constant", "q_learning", "placebo:q_learning", "yoked:q_learning")  # default-cosine takes no rate
    found = [(job.arm, job.seed, job.initial_lr) for job in jobs if job.role == "sensitivity"]
    assert sorted(found) == sorted((arm, seed, 0.01) for arm in ids for seed in range(2))
    assert len(jobs) == len(plain) + 4
    twins = {job.seed: job.replay_from for job in jobs if job.arm == "yoked:q_learning" and job.role == "sensitivity"}
    folder = "runs/digits-mlp/q_learning/sensitivity/lr-0.01/seed-"
    assert twins == {0: f"{folder}1", 1: f"{folder}0"}
    assert set(twins.values()) <= {job.directory for job in jobs}


def test_a_twin_of_an_arm_without_a_rate_is_not_run_from_other_rates(tmp_path):
    # It would wait for ever for a run of its arm from that rate, which there is none of.
    path = tmp_path / "mine.yaml"
    more = "sensitivity_lrs: [0.01]\nsensitivity_controls: true\n"
    path.write_text(TEXT.replace("yoked:q_learning", "yoked:default-cosine") + more)
    study = load_study(path)
    jobs = plan_jobs(study)
    known = {job.directory for job in jobs}
    assert all(job.replay_from in known for job in jobs if job.replay_from is not None)
    assert "yoked:default-cosine" not in {job.arm for job in jobs if job.role == "sensitivity"}
    write_json(tmp_path / "study.json", study_json(study, {}))
    assert read_study(tmp_path).n_planned == len(jobs)


def test_a_twin_without_another_seed_is_not_run_from_other_rates(tmp_path):
    more = "sensitivity_lrs: [0.01]\nsensitivity_seeds: 1\nsensitivity_controls: true\n"
    jobs = [job for job in plan_jobs(study_of(tmp_path, more)) if job.role == "sensitivity"]
    assert [job.arm for job in jobs] == ["constant", "q_learning", "placebo:q_learning"]


RESTRICTED = """
sensitivity_lrs: [0.01]
tuning: {arm: constant, lrs: [0.01, 0.1], n_seeds: 1}
restricted: {digits-cnn: {arms: [constant, "yoked:q_learning"], n_seeds: 2}}
total_steps: {digits-mlp: 50}
"""


def test_a_restricted_task_has_its_own_arms_and_seeds_and_one_rate(tmp_path):
    text = TEXT.replace("[digits-mlp]", "[digits-mlp, digits-cnn]")
    path = tmp_path / "mine.yaml"
    path.write_text(text + RESTRICTED)
    study = load_study(path)
    jobs = [job for job in [*plan_jobs(study), *tuning_jobs(study)] if job.task == "digits-cnn"]
    assert {(job.arm, job.role, job.seed, job.initial_lr) for job in jobs} == {
        *(("constant", "report", seed, 0.001) for seed in range(2)),
        *(("yoked:q_learning", "report", seed, 0.001) for seed in range(2)),
        *(("q_learning", "support", seed, 0.001) for seed in range(2)),  # what the twins replay
    }
    assert tuned_jobs(study, "digits-cnn", 0.01) == []
    assert len(tuned_jobs(study, "digits-mlp", 0.01)) == 3
    assert {job.total_steps for job in jobs} == {None}
    assert {job.total_steps for job in plan_jobs(study) if job.task == "digits-mlp"} == {50}
    plan = study_json(study, {})
    path.write_text(text + RESTRICTED.replace("n_seeds: 2", "n_seeds: 1"))
    assert first_difference(plan, study_json(load_study(path), {})).startswith("restricted")
    path.write_text(text + "".join([*RESTRICTED.splitlines(keepends=True)[:3], "total_steps: {digits-mlp: 50}\n"]))
    assert first_difference(plan, study_json(load_study(path), {})).startswith("restricted")
    assert "restricted" not in study_json(study_of(tmp_path), {})  # studies begun before go on
