"""The study lr-scheduler at its smallest, from its file to its report: 67 runs of a second."""

from __future__ import annotations

import json

import pytest

from trimtab.errors import InputError
from trimtab.experiments import run
from trimtab.experiments.design import load_study
from trimtab.experiments.plan import plan_jobs, study_json, tuned_jobs, tuning_jobs
from trimtab.experiments.reading import read_study
from trimtab.experiments.results import collect_study
from trimtab.experiments.single import check_job
from trimtab.storage import write_json


def test_the_report_waits_for_the_runs_that_the_plan_makes(tmp_path):
    study = load_study("lr-scheduler")
    write_json(tmp_path / "study.json", study_json(study, {}))
    jobs = [*tuning_jobs(study), *plan_jobs(study), *(job for t in study.tasks for job in tuned_jobs(study, t, 1e-3))]
    found = read_study(tmp_path)
    assert found.n_planned == len({job.directory for job in jobs}) == len(jobs) == 2665
    assert found.seeds_on("cifar10-vgg16") == 3
    assert [arm.id for arm in found.arms_on("cifar10-vgg16")] == [a.id for a in study.arms_on("cifar10-vgg16")]
    rows = [(row["id"], row["task"], row["status"]["planned"]) for row in collect_study(found)["arms"]]
    assert [row for row in rows if row[1] == "cifar10-vgg16"] == [
        (arm, "cifar10-vgg16", 3) for arm in ("constant", "cosine", "uwhg", "default-brain", "placebo:default-brain")
    ]


@pytest.mark.parametrize("scale", ["smoke", "small", "full"])
def test_every_arm_fits_its_task(scale):
    jobs = {job.arm: job for job in plan_jobs(load_study("lr-scheduler", scale=scale, tasks=["digits-mlp"]))}
    assert len(jobs) == {"smoke": 11, "small": 27, "full": 27}[scale]
    for job in jobs.values():
        check_job(job.to_json())  # the study is refused as a whole where one does not


def test_the_brain_is_refused_on_diabetes_before_anything_is_written(tmp_path):
    asked = {"scale": "smoke", "out": tmp_path / "out", "workers": 0}
    with pytest.raises(InputError, match=r"arm 'default-brain' on 'diabetes-mlp': .* it was taught on 'diabetes'"):
        run.run("lr-scheduler", tasks=["digits-mlp", "diabetes-mlp"], **asked)
    with pytest.raises(InputError, match="arm 'default-brain' on 'diabetes-mlp'"):  # what its twin would replay
        run.run("lr-scheduler", tasks=["diabetes-mlp"], arms=["yoked:default-brain"], **asked)
    assert list(tmp_path.iterdir()) == []


def test_the_report_says_where_arms_are_not_treated_alike(tmp_path):
    arms = ["constant", "uwhg", "dqn-paper", "default-brain", "fine-tuned-brain"]
    out = tmp_path / "out"
    run.run("lr-scheduler", scale="smoke", arms=arms, n_seeds=1, out=out, workers=0)
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "Guard: learned arms and rules go back, and cut their rate" in text
    assert "Rules here: uwhg." in text
    assert "Validation: before training, and before each decision." in text
    assert "![" in text.split("plots/learning_digits-mlp.png")[0].splitlines()[-1]
    cost = "brain taught on 64,000 earlier networks, 24,510,816 steps"
    table = text.split("**Speed")[1].split("**Control")[0]
    rows = {line.split(" | ")[0][2:]: line.split(" | ")[1:3] for line in table.splitlines() if line.startswith("| ")}
    assert rows["constant"] == ["none", "24"]
    assert rows["dqn-paper"] == ["learned in 1 run, 120 steps", "4"]
    assert rows["default-brain"][0] == cost
    assert rows["fine-tuned-brain"][0] == f"{cost}; learned in 2 runs, 240 steps"
    assert "| brain=default, learn_runs=2 |" in text


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_smoke_study_comes_to_its_end(tmp_path):
    outcome = run.run("lr-scheduler", scale="smoke", out=tmp_path / "out", workers=2)
    assert outcome.failed == {}
    results = json.loads((outcome.out / "results.json").read_text(encoding="utf-8"))
    assert results["unfinished"]["missing"] == results["unfinished"]["problems"] == []
    grid = {entry["id"]: entry for entry in results["grid"]}
    assert grid["constant"]["initial_lrs"] == [1e-4, 1e-3, 1e-2]
    assert grid["default-brain"]["one_run"]["over_yoked"]["mean"] > 0
    # A placebo is its base schedule, whatever the rate: the brain's is a cosine without a warm-up.
    assert grid["placebo:default-brain"]["test_loss"] != grid["default-brain"]["test_loss"]
    assert grid["fine-tuned-brain"]["test_loss"] != grid["default-brain"]["test_loss"]
    costs = {row["id"]: row["cost"] for row in results["arms"]}
    assert costs["fine-tuned-brain"]["learning_runs"] == 2
    assert costs["tuned-cosine"]["tuning_runs"] == 3
    text = (outcome.out / "report.md").read_text(encoding="utf-8")
    for heading in ("What one run gives", "Best-tuned", "The measures of the study", "Sensitivity to the initial rate"):
        assert heading in text
    assert (outcome.out / "plots" / "sensitivity_digits-mlp.png").exists()
