"""results.json of invented studies with known answers."""

import json
import math
import shutil

import pytest
from synthetic import Synthetic, change, write_json

from trimtab.errors import InputError
from trimtab.experiments.design import load_study
from trimtab.experiments.metrics import TIME_METRICS
from trimtab.experiments.plan import plan_jobs, study_json, tuned_jobs, tuning_jobs
from trimtab.experiments.reading import read_study
from trimtab.experiments.results import collect


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return Synthetic().write(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def results(folder):
    return collect(folder)


@pytest.fixture
def copy(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def row(results, arm, task="digits-mlp"):
    return next(entry for entry in results["arms"] if (entry["id"], entry["task"]) == (arm, task))


def run_of(out, arm, seed=0, role="report", task="digits-mlp"):
    rate = "0.01" if arm == "tuned-cosine" else "0.001"
    return out / "runs" / task / arm / f"{role}-{rate}-{seed}"


def without_times(value, names):
    if isinstance(value, dict):
        return {key: without_times(item, names) for key, item in value.items() if key not in names}
    return [without_times(item, names) for item in value] if isinstance(value, list) else value


def test_values_are_those_of_the_runs(folder, results):
    entry = row(results, "q_learning")
    values = [json.loads((run_of(folder, "q_learning", s) / "result.json").read_text()) for s in range(5)]
    losses = [value["metrics"]["test_loss"] for value in values]
    assert entry["metrics"]["test_loss"]["values"] == losses
    assert entry["metrics"]["test_loss"]["mean"] == pytest.approx(sum(losses) / 5)
    assert entry["metrics"]["test_loss"]["method"] == "t"
    assert (entry["seeds"], entry["n_seeds"], entry["initial_lr"]) == ([0, 1, 2, 3, 4], 5, 0.001)
    assert entry["metrics"]["test_mse"]["n"] == 0


def test_who_is_compared_with_whom(results):
    assert {arm["id"]: list(arm["differences"]) for arm in results["arms"]} == {
        "constant": ["tuned-cosine"],
        "step": ["tuned-cosine", "constant"],
        "exponential": ["tuned-cosine", "constant"],
        "cosine": ["tuned-cosine", "constant"],
        "default-cosine": ["tuned-cosine", "constant"],
        "uwhg": ["tuned-cosine", "constant", "default-cosine"],
        "q_learning": [
            "tuned-cosine", "constant", "default-cosine", "uwhg", "placebo:q_learning", "yoked:q_learning",
        ],
        "placebo:q_learning": ["tuned-cosine"],
        "yoked:q_learning": ["tuned-cosine"],
        "tuned-cosine": ["constant"],
    }  # fmt: skip
    assert row(results, "q_learning")["differences"]["constant"]["roles"] == ["constant", "user"]


def test_differences_are_paired_and_signed(results):
    ours, theirs = (row(results, arm)["metrics"]["test_loss"]["values"] for arm in ("q_learning", "tuned-cosine"))
    entry = row(results, "q_learning")["differences"]["tuned-cosine"]
    assert entry["values"] == [a - b for a, b in zip(ours, theirs, strict=True)]
    assert (entry["metric"], entry["n"], entry["verdict"], entry["method"]) == ("test_loss", 5, "worse", "t")
    assert entry["second"]["metric"] == "best_val_loss"
    assert row(results, "tuned-cosine")["differences"]["constant"]["verdict"] == "better"


def test_placebo_of_a_constant_base_equals_it_to_the_bit(results):
    base, placebo = (row(results, arm)["metrics"]["test_loss"]["values"] for arm in ("constant", "placebo:q_learning"))
    assert base == placebo


def test_cost_threshold_stability_sensitivity(results):
    assert row(results, "q_learning")["cost"]["learning_optimizer_steps"] == 13_200
    assert row(results, "q_learning")["cost"]["learning_runs"] == 20
    tuned = row(results, "tuned-cosine")["cost"]
    assert (tuned["tuning_runs"], tuned["tuning_optimizer_steps"]) == (9, 9 * 660)
    assert row(results, "constant")["cost"]["tuning_runs"] == 0
    threshold = results["thresholds"]["digits-mlp"]
    assert (threshold["arm"], threshold["is_tuned"]) == ("tuned-cosine", True)
    assert threshold["value"] == row(results, "tuned-cosine")["metrics"]["final_val_loss"]["mean"]
    assert row(results, "constant")["stability"] == {"lr": 0.0}
    assert row(results, "q_learning")["stability"]["lr"] > 0.01
    assert row(results, "constant")["sensitivity"]["initial_lrs"] == [1e-4, 1e-3, 1e-2]
    assert row(results, "constant")["sensitivity"]["worst_over_best"] > 1.3
    assert row(results, "uwhg")["sensitivity"]["worst_over_best"] < 1.1
    assert row(results, "placebo:q_learning")["sensitivity"] is None


def test_a_mean_time_to_threshold_is_given_only_where_every_seed_gets_there(results):
    entry = row(results, "tuned-cosine")["metrics"]["steps_to_threshold"]
    assert 0 < entry["n"] < 5  # the threshold is its own mean: some seeds end above it
    assert entry["mean"] is None
    assert row(results, "constant")["metrics"]["steps_to_threshold"]["n"] == 0


def test_equal_but_for_the_clock(results, tmp_path):
    again = collect(Synthetic(clock=7.0).write(tmp_path / "again"))
    assert again != results
    assert without_times(again, again["time_fields"]) == without_times(results, results["time_fields"])
    assert results["time_fields"] == sorted(TIME_METRICS)
    json.dumps(results, allow_nan=False)


def test_recommendation_is_a_change_that_an_interval_supports(results):
    assert [(c["setting"], c["old"], c["new"]) for c in results["recommendations"]] == [
        ("schedule", "constant", "cosine"),
        ("lr", 0.001, 0.01),
    ]
    assert results["recommendations"][0]["supported_by"].startswith("tuned-cosine against constant on digits-mlp")
    assert "Of 7 arms" in results["recommendation_reasons"]["digits-mlp"]


def test_nothing_is_recommended_without_an_interval_below_zero(tmp_path):
    same = dict.fromkeys(Synthetic().level, 0.3)
    results = collect(Synthetic(level=same, noise=0.05).write(tmp_path))
    assert results["recommendations"] == []
    assert (
        "no arm is shown to be better than your configuration (constant)"
        in (results["recommendation_reasons"]["digits-mlp"])
    )


def test_an_arm_with_a_failed_run_is_not_recommended(copy):
    for arm in ("step", "exponential", "cosine", "default-cosine", "uwhg", "q_learning", "tuned-cosine"):
        change(run_of(copy, arm) / "result.json", status="failed", error="diverged at step 3")
    results = collect(copy)
    assert results["recommendations"] == []


def test_no_arm_of_the_users_configuration(copy):
    change(copy / "study.json", user_config={"schedule": "wsd"})
    results = collect(copy)
    assert results["user_arm"] == {"digits-mlp": None}
    assert "no arm of the study does what your configuration does" in results["recommendation_reasons"]["digits-mlp"]


def test_four_seeds_give_values_and_no_conclusion(tmp_path):
    results = collect(Synthetic(n_seeds=4).write(tmp_path))
    entry = row(results, "q_learning")
    assert entry["metrics"]["test_loss"]["interval"] is None
    assert len(entry["metrics"]["test_loss"]["values"]) == 4
    assert {d["verdict"] for d in entry["differences"].values()} == {"too few seeds to say"}
    text = " ".join(results["conclusion"])
    assert "too few seeds to say" in text
    assert "better by" not in text
    assert "lowest mean" not in text
    assert results["recommendations"] == []
    assert "too few seeds to say" in results["recommendation_reasons"]["digits-mlp"]


def test_twelve_seeds_use_the_bootstrap(tmp_path):
    arms = ["constant", "tuned-cosine"]
    results = collect(Synthetic(arms=arms, n_seeds=12, sensitivity_lrs=()).write(tmp_path))
    assert row(results, "constant")["differences"]["tuned-cosine"]["method"] == "bca"


def test_failed_gave_up_and_missing_runs_are_counted(copy):
    change(run_of(copy, "q_learning", 0) / "result.json", status="failed", error="no space left")
    change(run_of(copy, "q_learning", 1) / "result.json", status="gave_up")
    (run_of(copy, "q_learning", 2) / "result.json").unlink()
    shutil.rmtree(run_of(copy, "q_learning", 3))
    results = collect(copy)
    entry = row(results, "q_learning")
    status = entry["status"]
    counts = ("planned", "done", "gave_up", "failed", "unfinished", "not_started")
    assert [status[key] for key in counts] == [5, 1, 1, 1, 1, 1]
    assert status["errors"] == ["seed 0: no space left"]
    assert [value is None for value in entry["metrics"]["test_loss"]["values"]] == [True, False, True, True, False]
    difference = entry["differences"]["tuned-cosine"]
    assert (difference["n"], difference["left_out_seeds"]) == (2, [0, 2, 3])
    text = " ".join(results["conclusion"])
    assert "q_learning on digits-mlp: 1 of 5 gave up" in text
    assert "1 of 5 failed" in text
    assert results["unfinished"]["n_planned"] - results["unfinished"]["n_over"] == 2
    assert results["unfinished"]["missing"] == ["q_learning on digits-mlp, report runs: 3 of 5"]


def test_a_run_whose_process_died_has_failed(copy):
    run = run_of(copy, "uwhg", 4)
    (run / "result.json").unlink()
    (run / "error.txt").write_text("Traceback (most recent call last):\n  ...\nValueError: a rate of 0\n")
    status = row(collect(copy), "uwhg")["status"]
    assert (status["failed"], status["errors"]) == (1, ["seed 4: ValueError: a rate of 0"])


def test_a_run_that_ended_without_a_finite_test_loss_is_counted(copy):
    result = json.loads((run_of(copy, "step", 0) / "result.json").read_text())
    change(run_of(copy, "step", 0) / "result.json", metrics={**result["metrics"], "test_loss": None})
    entry = row(collect(copy), "step")
    assert entry["status"]["without_a_test_loss"] == 1
    assert entry["n_seeds"] == 4
    assert entry["differences"]["tuned-cosine"]["verdict"] == "too few seeds to say"


def test_torn_and_foreign_folders_are_named_and_not_used(copy, results):
    torn = run_of(copy, "step", 0)
    (torn / "run.json").write_text('{"arm": "st')
    write_json(copy / "runs/x/run.json", {"arm": "nobody", "task": "digits-mlp", "seed": 0})
    shutil.copytree(run_of(copy, "step", 1), copy / "runs/zz")
    found = collect(copy)["unfinished"]["problems"]
    assert len(found) == 3
    assert "runs/digits-mlp/step/report-0.001-0 cannot be read" in found[0]
    assert found[1] == "runs/x belongs to no arm and task of the plan (nobody on digits-mlp)"
    assert found[2] == "runs/zz repeats runs/digits-mlp/step/report-0.001-1; the first is used"


def test_a_study_that_has_not_begun(tmp_path, folder):
    shutil.copy(folder / "study.json", tmp_path)
    results = collect(tmp_path)
    assert results["unfinished"]["n_over"] == 0
    assert results["unfinished"]["n_planned"] == 10 * 5 + 6 * 2 * 3 + 9
    assert "no run has a test loss yet" in " ".join(results["conclusion"])


@pytest.mark.parametrize(("name", "scale"), [("demo", "small"), ("demo", "smoke"), ("transformer-lr", "small")])
@pytest.mark.parametrize("n_seeds", [None, 1])
def test_planned_runs_are_those_that_the_study_would_run(tmp_path, name, scale, n_seeds):
    study = load_study(name, scale=scale, n_seeds=n_seeds)
    write_json(tmp_path / "study.json", study_json(study, {}))
    jobs = [*plan_jobs(study), *tuning_jobs(study)]
    jobs += [job for task in (*study.tasks, *study.optional_tasks) for job in tuned_jobs(study, task, 0.5)]
    assert read_study(tmp_path).n_planned == len({job.directory for job in jobs})


def test_a_twin_whose_partner_is_not_in_the_study_needs_support_runs(tmp_path):
    study = load_study("demo", arms=["constant", "yoked:q_learning"])
    write_json(tmp_path / "study.json", study_json(study, {}))
    assert read_study(tmp_path).n_planned == len(plan_jobs(study))


def test_a_rate_that_the_plan_leaves_open_is_read_from_the_run(copy):
    plan = json.loads((copy / "study.json").read_text())
    for arm in plan["arms"]:
        if arm["id"] == "default-cosine":
            arm["lr"] = {"digits-mlp": None}
    write_json(copy / "study.json", plan)
    for seed in range(5):
        header = run_of(copy, "default-cosine", seed) / "run.json"
        change(header, start={"lr": 0.02}, job={"initial_lr": None})
    assert row(collect(copy), "default-cosine")["initial_lr"] == 0.02


def test_the_user_arm_is_the_one_with_the_users_rate(copy):
    change(copy / "study.json", user_config={"schedule": "cosine", "lr": 0.01})
    assert collect(copy)["user_arm"] == {"digits-mlp": "tuned-cosine"}


def test_two_tasks_and_a_benchmark(tmp_path):
    tasks = {"digits-mlp": "digits", "titanic-fcnn": "titanic"}
    out = Synthetic(tasks=tasks, benchmark={"mnist-cnn": "mnist"}, sensitivity_lrs=()).write(tmp_path)
    results = collect(out)
    assert len(results["arms"]) == 20
    assert [entry["id"] for entry in results["benchmark"]["arms"]] == [entry["id"] for entry in results["arms"][:10]]
    assert results["benchmark"]["arms"][6]["differences"]["tuned-cosine"]["n"] == 5
    assert set(results["recommendation_reasons"]) == set(tasks)
    assert any(text.startswith("Benchmark: q_learning on mnist-cnn") for text in results["conclusion"])


@pytest.mark.parametrize(
    ("placebo", "yoked", "words"),
    [
        (0.4, 0.4, "Looking at the run paid"),
        (0.4, 0.2, "It is a better schedule than its base; that looking at the run helped is not shown"),
        (0.2, 0.2, "looking at the run when it took its decisions helped is not shown"),
        (0.1, 0.4, "But they did harm"),
        (0.4, 0.1, "Looking at the run did not pay"),
    ],
)
def test_words_follow_from_both_controls(tmp_path, placebo, yoked, words):
    level = {"constant": placebo, "q_learning": 0.2, "placebo:q_learning": placebo, "yoked:q_learning": yoked}
    out = Synthetic(arms=list(level), level=level, tuned=False, sensitivity_lrs=(), noise=0.02).write(tmp_path)
    results = collect(out)
    text = next(text for text in results["conclusion"] if text.startswith("q_learning on"))
    assert words in text
    assert "no tuned schedule" in results["conclusion"][-1]


def test_a_negative_result_is_said_plainly(results):
    assert (
        "No learned arm was shown to be better than the tuned schedule on any task of this study."
        in (results["conclusion"])
    )
    assert "Control, as against a better schedule, is not shown." in results["conclusion"][-1]


def test_a_better_learned_arm_pays_back(tmp_path):
    level = {**Synthetic().level, "q_learning": 0.05}
    entry = row(collect(Synthetic(level=level, sensitivity_lrs=()).write(tmp_path)), "q_learning")
    assert entry["cost"]["uses_to_pay_back"] == math.ceil(13_200 / 5_940)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "expected the file study.json"),
        ("[]", "is no plan of a study"),
        ("{}", "is no plan of a study"),
        ('{"tasks": ["a"], "arms": [{"id": "x"}]}', "is no plan of a study"),
        ("{", "cannot read"),
    ],
)
def test_a_folder_without_a_study_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "study.json").write_text(text)
    with pytest.raises(InputError, match=message):
        collect(tmp_path)


def test_decisions_that_did_not_help_are_not_recommended(tmp_path):
    """As in the experiment that this project grew from: another schedule helps, the agent on top adds nothing."""
    level = {**dict.fromkeys(Synthetic().level, 0.3), "exponential": 0.9, "uwhg": 0.9, "constant": 0.31}
    level["q_learning"], level["placebo:q_learning"] = 0.3, 0.3
    plan = {"user_config": {"schedule": "exponential", "lr": 0.001}}
    results = collect(Synthetic(level=level, noise=0.05, tuned=False, plan=plan).write(tmp_path))
    assert results["user_arm"] == {"digits-mlp": "exponential"}
    assert row(results, "q_learning")["differences"]["exponential"]["verdict"] == "better"
    assert row(results, "q_learning")["differences"]["placebo:q_learning"]["verdict"] != "better"
    assert {change["arm"] for change in results["recommendations"]} <= {"step", "cosine", "default-cosine", "constant"}
    assert (
        "Left out: q_learning: better than your configuration too, but not shown to be better than the same schedule"
        in results["recommendation_reasons"]["digits-mlp"]
    )
