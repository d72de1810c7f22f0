"""Running a study with a stand-in for the training: order, failures, going on, and what is checked first."""

import errno
import fcntl
import json
import os
from pathlib import Path

import pytest
from rich.console import Console

from trimtab.errors import InputError, MissingDataError, OutputError, RunFailedError
from trimtab.experiments import report
from trimtab.experiments import run as runner
from trimtab.experiments.design import load_study
from trimtab.experiments.plan import plan_jobs
from trimtab.experiments.progress import describe, news_of
from trimtab.experiments.run import run
from trimtab.progress import Live, Plain, make_display
from trimtab.storage import RunDirectory

HERE = __name__
TEXT = """
study: mine
idea: a test
tasks: [digits-mlp]
arms: [constant, q_learning, yoked:q_learning]
n_seeds: 2
lr: 0.001
"""
TUNING = "tuning: {arm: cosine, lrs: [0.1, 0.01, 0.03], n_seeds: 2}\n"

BEGUN: list[str] = []  # folders of the runs, in the order in which the stand-in began them
BEHAVIOUR: dict[str, str] = {}  # part of a folder's name -> what the stand-in does there


def fake_run_one(job, out, data_dir, progress):
    folder = RunDirectory(Path(out) / job["directory"])
    BEGUN.append(job["directory"])
    how = next((how for part, how in BEHAVIOUR.items() if part in job["directory"]), "done")
    if how == "raise":
        raise InputError("no such thing")
    if how == "fault":
        raise ZeroDivisionError("a fault")
    folder.start({"arm": job["arm"], "task": job["task"], "role": job["role"], "seed": job["seed"]})
    if job["replay_from"]:
        assert (Path(out) / job["replay_from"] / "result.json").exists()
    progress({"optimizer_step": 3, "total_steps": 5, "train_loss": 1.25})
    loss = None if how == "diverge" else abs((job["initial_lr"] or 1) - 0.03)
    status = how if how in ("failed", "gave_up") else "done"
    error = "it said so" if how == "failed" else None
    result = {"status": status, "error": error, "metrics": {"final_val_loss": loss, "test_loss": loss}}
    folder.finish(result)
    return result


def fake_check_job(job):
    if job["options"].get("bad"):
        raise InputError("unknown option 'bad'")


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    BEGUN.clear()
    BEHAVIOUR.clear()
    monkeypatch.setattr(runner, "RUN_ONE", f"{HERE}:fake_run_one")
    monkeypatch.setattr(runner, "CHECK_JOB", f"{HERE}:fake_check_job")

    def write(out):
        (out / "report.html").write_text("a report")
        return out / "report.html"

    monkeypatch.setattr(report, "write", write)


@pytest.fixture
def study_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT)
    return path


def plan_in(out):
    return json.loads((out / "study.json").read_text())


def test_everything_is_run_once_and_the_report_written(tmp_path, study_file):
    outcome = run(study_file, out=tmp_path / "out", workers=0)
    assert outcome.exit_code == 0
    assert outcome.n_runs == len(BEGUN) == len(set(BEGUN)) == 6
    assert outcome.report.read_text() == "a report"
    plan = plan_in(tmp_path / "out")
    assert (plan["study"], plan["n_seeds"], plan["tasks"]) == ("mine", 2, ["digits-mlp"])
    assert {"python", "torch", "trimtab", "device", "threads"} <= set(plan["environment"])
    assert sorted(os.listdir(tmp_path / "out")) == ["report.html", "runs", "study.json"]


def test_the_default_folder_is_named_after_the_study(tmp_path, study_file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(study_file, workers=0).out == tmp_path / "runs" / "mine"


def test_the_tuned_rate_is_the_best_of_the_grid_and_its_runs_follow(tmp_path, study_file):
    study_file.write_text(TEXT + TUNING)
    outcome = run(study_file, out=tmp_path / "out", workers=0)
    assert outcome.exit_code == 0
    assert (outcome.n_runs, len(BEGUN)) == (6 + 6 + 2, 14)
    assert plan_in(tmp_path / "out")["tuning"]["chosen"] == {"digits-mlp": 0.03}
    assert plan_in(tmp_path / "out")["arms"][-1]["lr"] == {"digits-mlp": 0.03}
    tuned = [name for name in BEGUN if "tuned-cosine/report" in name]
    assert tuned == [f"runs/digits-mlp/tuned-cosine/report/lr-0.03/seed-{seed}" for seed in (0, 1)]
    assert all("tuning" in name for name in BEGUN[:6])


def test_a_diverged_rate_is_not_chosen_and_no_finite_rate_is_a_named_failure(tmp_path, study_file):
    study_file.write_text(TEXT + TUNING)
    BEHAVIOUR["tuning/lr-0.03/seed-1001"] = "diverge"
    run(study_file, out=tmp_path / "one", workers=0)
    assert plan_in(tmp_path / "one")["tuning"]["chosen"] == {"digits-mlp": 0.01}
    BEHAVIOUR["tuning"] = "diverge"
    outcome = run(study_file, out=tmp_path / "two", workers=0)
    assert outcome.exit_code == 1
    assert outcome.failed == {
        f"runs/digits-mlp/tuned-cosine/report/lr-unknown/seed-{seed}": "no rate of tuning.lrs ended with a finite loss"
        for seed in (0, 1)
    }
    assert run(study_file, out=tmp_path / "two", workers=0, resume=True).exit_code == 1


def test_a_failed_tuning_run_stops_the_choice_by_name(tmp_path, study_file):
    study_file.write_text(TEXT + TUNING)
    BEHAVIOUR["tuning/lr-0.1/seed-1000"] = "fault"
    outcome = run(study_file, out=tmp_path / "out", workers=0)
    bad = "runs/digits-mlp/tuned-cosine/tuning/lr-0.1/seed-1000"
    assert outcome.failed[bad] == "ZeroDivisionError: a fault"
    why = f"its rate could not be chosen, since the tuning run {bad} failed"
    assert outcome.failed["runs/digits-mlp/tuned-cosine/report/lr-unknown/seed-0"] == why
    BEHAVIOUR.clear()
    BEGUN.clear()
    again = run(study_file, out=tmp_path / "out", workers=0, resume=True)
    assert again.exit_code == 0
    assert list(BEGUN) == [bad, *(f"runs/digits-mlp/tuned-cosine/report/lr-0.03/seed-{seed}" for seed in (0, 1))]


@pytest.mark.parametrize(
    ("how", "why"), [("raise", "no such thing"), ("fault", "ZeroDivisionError: a fault"), ("failed", "it said so")]
)
def test_a_failed_run_stops_those_that_need_it_and_no_other(tmp_path, study_file, how, why):
    BEHAVIOUR["/q_learning/report/lr-0.001/seed-1"] = how
    outcome = run(study_file, out=tmp_path / "out", workers=0)
    bad = "runs/digits-mlp/q_learning/report/lr-0.001/seed-1"
    assert outcome.exit_code == 1
    assert outcome.failed == {
        bad: why,
        "runs/digits-mlp/yoked:q_learning/report/lr-0.001/seed-0": f"the run that it replays, {bad}, failed",
    }
    assert (tmp_path / "out" / bad / "error.txt").exists() is (how == "fault")
    BEHAVIOUR.clear()
    BEGUN.clear()
    assert run(study_file, out=tmp_path / "out", workers=0, resume=True).exit_code == 0
    assert list(BEGUN) == [bad, "runs/digits-mlp/yoked:q_learning/report/lr-0.001/seed-0"]


def test_going_on_runs_what_is_left_and_a_finished_study_runs_nothing(tmp_path, study_file):
    out = tmp_path / "out"
    study_file.write_text(TEXT + TUNING)
    run(study_file, out=out, workers=0)
    everything = list(BEGUN)
    for name in (everything[0], everything[-1]):
        (out / name / "result.json").unlink()
    BEGUN.clear()
    assert run(study_file, out=out, workers=0, resume=True).exit_code == 0
    assert sorted(BEGUN) == sorted([everything[0], everything[-1]])
    (out / "report.html").unlink()
    BEGUN.clear()
    assert run(study_file, out=out, resume=True).report.exists()
    assert BEGUN == []


@pytest.mark.parametrize("made", [False, True])
def test_resume_begins_a_study_that_is_not_there_yet(tmp_path, study_file, made):
    if made:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / ".study.json.x1y2").write_text("left by a kill")
    assert run(study_file, out=tmp_path / "out", workers=0, resume=True).exit_code == 0
    assert len(BEGUN) == 6


def test_another_plan_is_refused_with_the_first_difference(tmp_path, study_file):
    run(study_file, out=tmp_path / "out", workers=0)
    with pytest.raises(OutputError, match="holds another plan: n_seeds is 2 there, 3 is asked for now; give the opt"):
        run(study_file, out=tmp_path / "out", workers=0, resume=True, n_seeds=3)


def test_a_full_folder_is_refused_and_left_alone(tmp_path, study_file):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="out is not empty; go on from what is there with --resume, or give anot"):
        run(study_file, out=out, workers=0)
    with pytest.raises(OutputError, match=r"holds files but no study.json, so it is no study's folder"):
        run(study_file, out=out, workers=0, resume=True)
    assert os.listdir(out) == ["thesis.txt"]
    with pytest.raises(OutputError, match=r"thesis.txt is a file; give a folder"):
        run(study_file, out=out / "thesis.txt", workers=0)
    with pytest.raises(OutputError, match=r"cannot write .*: Not a directory"):
        run(study_file, out=out / "thesis.txt" / "deeper", workers=0)


def test_two_processes_do_not_share_a_folder(tmp_path, study_file):
    out = tmp_path / "out"
    out.mkdir()
    other = os.open(out, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    try:
        with pytest.raises(OutputError, match=r"another process is running a study in .*out; wait for it, or end it"):
            run(study_file, out=out, workers=0)
    finally:
        os.close(other)
    assert run(study_file, out=out, workers=0).exit_code == 0


@pytest.mark.parametrize("name", ["study.json", "run.json", "result.json"])
def test_what_a_killed_run_left_half_written_is_gone_after_the_next(tmp_path, study_file, monkeypatch, name):
    class KilledError(BaseException):
        """As after kill -9, nobody tidies up."""

    def killed(source, path):
        if path.name == name:
            raise KilledError
        rename(source, path)

    out, rename = tmp_path / "out", os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KilledError):
            run(study_file, out=out, workers=0)
    assert len([path for path in out.rglob(".*") if path.name.startswith(f".{name}.")]) == 1
    assert run(study_file, out=out, workers=0, resume=name != "study.json").exit_code == 0
    assert list(out.rglob(".*")) == []


def test_no_space_for_the_plan_leaves_nothing_behind(tmp_path, study_file, monkeypatch):
    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OutputError, match=r"cannot write .*study.json: No space left on device; give a folder"):
        run(study_file, out=tmp_path / "new" / "out", workers=0)
    assert not (tmp_path / "new").exists()
    assert BEGUN == []


def test_no_space_later_on_is_a_failure_and_not_bad_input(tmp_path, study_file, monkeypatch):
    def no_space(out):
        raise OutputError("cannot write results.json: No space left on device")

    monkeypatch.setattr(report, "write", no_space)
    with pytest.raises(RunFailedError, match=r"cannot write results.json: No space left on device"):
        run(study_file, out=tmp_path / "out", workers=0)
    assert len(BEGUN) == 6


def test_missing_data_is_found_before_anything_is_written(tmp_path, study_file):
    study_file.write_text(TEXT.replace("digits-mlp", "text8-gpt"))
    (tmp_path / "data").mkdir()
    with pytest.raises(MissingDataError, match=r"text8"):
        run(study_file, out=tmp_path / "out", workers=0, data_dir=tmp_path / "data")
    with pytest.raises(MissingDataError, match=r"the data directory .*nowhere is not there, or is no folder"):
        run(study_file, out=tmp_path / "out", workers=0, data_dir=tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def test_an_optional_task_without_data_is_left_out_and_said(tmp_path, study_file):
    study_file.write_text(TEXT + "optional_tasks: [text8-gpt]\n")
    (tmp_path / "data").mkdir()
    out = tmp_path / "out"
    outcome = run(study_file, out=out, workers=0, data_dir=tmp_path / "data")
    assert list(outcome.left_out) == ["text8-gpt"]
    assert plan_in(out)["left_out"] == [{"task": "text8-gpt", "why": outcome.left_out["text8-gpt"]}]
    assert "looked for text8/" in outcome.left_out["text8-gpt"]
    assert plan_in(out)["tasks"] == ["digits-mlp"]
    # It stays left out when the study goes on, even if the data is there by then.
    assert list(run(study_file, out=out, workers=0, resume=True).left_out) == ["text8-gpt"]


def test_wrong_options_are_found_before_anything_is_written(tmp_path, study_file):
    study_file.write_text(TEXT.replace("constant", "{id: x, agent: step, options: {bad: 1}}"))
    with pytest.raises(InputError, match="unknown option 'bad'"):
        run(study_file, out=tmp_path / "out", workers=0)
    with pytest.raises(InputError, match="workers: got -1, expected a whole number of 0"):
        run(study_file, out=tmp_path / "out", workers=-1)
    with pytest.raises(InputError, match="executor 'ray' is not available in this version"):
        run(study_file, out=tmp_path / "out", executor="ray")
    assert not (tmp_path / "out").exists()


def test_another_machine_is_said_when_a_study_goes_on(tmp_path, study_file):
    out = tmp_path / "out"
    run(study_file, out=out, workers=0)
    plan = plan_in(out)
    plan["environment"]["torch"] = "1.0"
    (out / "study.json").write_text(json.dumps(plan))
    (out / BEGUN[0] / "result.json").unlink()
    console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115 (closed below)
    run(study_file, out=out, workers=0, resume=True, display=Plain(console))
    console.file.close()
    text = console.export_text()
    assert "note: torch was 1.0 when this study was begun and is 2" in text
    assert plan_in(out)["environment"]["torch"] == "1.0"


def test_plain_progress_says_what_is_done_left_and_running(tmp_path, study_file):
    BEHAVIOUR["/q_learning/report/lr-0.001/seed-0"] = "gave_up"
    BEHAVIOUR["constant/report/lr-0.001/seed-1"] = "raise"
    with open(tmp_path / "log", "w") as log:
        run(study_file, out=tmp_path / "out", workers=0, display=Plain(Console(file=log, width=60), every_s=0))
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[0] == "6 runs"
    assert "gave up: q_learning on digits-mlp, seed 0, rate 0.001; its best weights are kept" in lines
    assert "failed: constant on digits-mlp, seed 1, rate 0.001: no such thing" in lines
    assert "0 of 6 runs done, 6 left; running: constant on digits-mlp, seed 0, rate 0.001" in lines
    assert any("(step 3/5, train loss 1.25)" in line for line in lines)
    assert any(line.startswith("6 of 6 runs done, 0 left, about 0 s to go; running: none") for line in lines)


def test_live_progress_draws_a_row_for_what_runs_and_takes_it_away(tmp_path, study_file):
    console = Console(file=open(tmp_path / "screen", "w"), force_terminal=True, width=120)  # noqa: SIM115
    display = make_display(console)
    assert isinstance(display, Live)
    job = plan_jobs(load_study(study_file))[0]
    with display:
        display.begin(4, 1)
        display.started(job.directory, describe(job))
        display.news(job.directory, news_of({"optimizer_step": 3, "total_steps": 5, "train_loss": 1.25}))
        rows = {task.description: task for task in display._progress.tasks}
        assert (rows["all runs"].completed, rows["all runs"].total) == (1, 4)
        row = rows["constant on digits-mlp, seed 0, rate 0.001"]
        assert (row.completed, row.total, row.fields["words"]) == (3, 5, "train loss 1.25")
        display.over(job.directory)
        assert [task.completed for task in display._progress.tasks] == [2]
        display.say("a word")
    console.file.close()
    assert "a word" in (tmp_path / "screen").read_text()
