"""Study files of pruning, and what a report makes of cells that were written by hand."""

import json
import math

import pytest

from trimtab.errors import InputError
from trimtab.experiments import report, run
from trimtab.experiments.design import study_names
from trimtab.experiments.pruning import goals, schema, tables
from trimtab.experiments.pruning.results import collect, read_folder
from trimtab.experiments.pruning.schema import jobs_of, load_pruning_study, parse_pruning_study, study_json, target_name
from trimtab.experiments.pruning.wording import against, per_cent, points, short
from trimtab.experiments.show import summary_table
from trimtab.experiments.stats import compare
from trimtab.experiments.words import MINUS
from trimtab.pruner.methods import METHODS
from trimtab.storage import write_json
from trimtab.yaml_files import read_yaml

GOOD = """
study: mine
kind: pruning
idea: a test
tasks:
  - digits-pruning
  - {id: cifar10-pruning, targets: [{params: 0.5}], methods: [uniform], n_seeds: 3}
targets: [{flops: 0.5}, {latency: 0.5, batch_size: 64}]
methods: [ppo, uniform]
n_seeds: 2
"""


def write(tmp_path, text, name="mine.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return path


# Files


def test_a_task_has_what_is_its_own_and_else_the_studys(tmp_path):
    study = load_pruning_study(write(tmp_path, GOOD))
    digits, cifar = study.plans
    assert digits.targets == ({"flops": 0.5}, {"latency": 0.5, "batch_size": 64})
    assert (digits.methods, digits.n_seeds, digits.max_evaluations) == (("ppo", "uniform"), 2, 100)
    assert (cifar.targets, cifar.methods, cifar.n_seeds) == (({"params": 0.5},), ("uniform",), 3)
    assert [job["directory"] for job in jobs_of(study)] == [
        "runs/digits-pruning/seed-0",
        "runs/cifar10-pruning/seed-0",
        "runs/digits-pruning/seed-1",
        "runs/cifar10-pruning/seed-1",
        "runs/cifar10-pruning/seed-2",
    ]
    assert json.loads(json.dumps(jobs_of(study))) == jobs_of(study)
    plan = study_json(study, {"python": "3"})
    assert json.loads(json.dumps(plan)) == plan
    assert plan["arms"] == [{"id": "ppo", "kind": "learned"}, {"id": "uniform", "kind": "baseline"}]


def test_what_is_asked_replaces_what_the_file_says(tmp_path):
    asked = {"tasks": ["cifar10-pruning"], "arms": ["lamp"], "n_seeds": 4, "seed": 7}
    study = load_pruning_study(write(tmp_path, GOOD), **asked)
    (plan,) = study.plans
    assert (plan.task, plan.methods, plan.n_seeds, study.root_seed) == ("cifar10-pruning", ("lamp",), 4, 7)
    other = load_pruning_study(write(tmp_path, GOOD), tasks=["cifar10-resnet18"]).plans[0]
    assert (other.task, other.methods) == ("cifar10-resnet18", ("ppo", "uniform"))


def test_our_study_is_good_at_every_scale_and_runs_every_method():
    path = study_names()["pruning"]
    for scale in ("smoke", "small", "full"):
        assert parse_pruning_study(read_yaml(path), path.name, scale).study == "pruning"
        methods = set(load_pruning_study("pruning", scale=scale).plans[0].methods)
        assert methods | {"paper"} == {*METHODS, "scratch"}  # at "small" its retrainings would take hours
    small = {plan.task: plan for plan in load_pruning_study("pruning").plans}
    assert [target["flops"] for target in small["cifar10-pruning"].targets] == [0.75, 0.5, 0.25, 0.1]
    assert [target["flops"] for target in small["imdb-pruning"].targets] == [0.5, 0.25]
    assert small["cifar10-resnet18"].methods == ("ppo", "ppo-untaught", "random-search", "uniform", "global")
    assert {small[name].n_seeds for name in ("cifar10-pruning", "imdb-pruning", "cifar10-resnet18")} == {5}
    assert set(tables.MEANINGS) == set(schema.ALL_METHODS)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("arms: [ppo]", "unknown key in mine.yaml 'arms'; did you mean 'targets'?"),
        ("max_evaluation: 10", "unknown key in mine.yaml 'max_evaluation'; did you mean 'max_evaluations'?"),
        ("max_evaluations: 7", "mine.yaml: max_evaluations: got 7, expected a whole number of at least 8"),
        ("fine_tune_steps: -1", "mine.yaml: fine_tune_steps: got -1, expected a whole number of at least 0"),
        ("score_steps: -1", "mine.yaml: score_steps: got -1, expected a whole number of at least 0"),
        ("fine_tune_rate: 0", "mine.yaml: fine_tune_rate: got 0, expected a number above 0"),
        ("methods: [ppo, unifrom]", "unknown method 'unifrom'; did you mean 'uniform'?"),
        ("methods: [ppo, ppo]", "mine.yaml: methods: 'ppo' is there twice"),
        ("methods: []", "mine.yaml: methods: got [], expected at least 1 entries"),
        ("methods: [paper]\nfine_tune_steps: 0", "the method 'paper' retrains after each action; give fine_tune_steps"),
        ("targets: [{flop: 0.5}]", "unknown target 'flop'; did you mean 'flops'?"),
        ("targets: [{flops: 1.5}]", "target flops is 1.5; expected"),
        ("targets: [0.5]", "target is 0.5; expected"),
        ("targets: [{flops: 0.5}, {flops: 0.5}]", "{'flops': 0.5} is there twice"),
        ("stages: {pp: 2}", "unknown method 'pp'; did you mean 'ppo'?"),
        ("stages: {ppo: 0}", "got ppo: 0, expected a whole number of at least 1"),
        ("stages: {ppo: 20}", "20 stages of 'ppo' share 100 evaluations; expected max_evaluations of at least 160"),
        ("tasks: [digits-prunin]", "unknown task 'digits-prunin'; did you mean 'digits-pruning'?"),
        ("tasks: [digits-pruning, {id: digits-pruning}]", "mine.yaml: the task 'digits-pruning' is there twice"),
        (
            "tasks: [{id: digits-pruning, seeds: 2}]",
            "unknown key in tasks.0 of mine.yaml 'seeds'; did you mean 'n_seeds'",
        ),
        ("device: gpu", "mine.yaml: device: got 'gpu', expected a text like"),
        ("latency_batch_sizes: []", "mine.yaml: latency_batch_sizes: got [], expected at least 1 entries"),
        ("scales: {smoke: {kind: pruning}}", "unknown key in scales.smoke of mine.yaml 'kind'"),
        (
            "scales: {smoke: {n_best: 0}}",
            "mine.yaml: scales.smoke.n_best: got 0, expected a whole number of at least 1",
        ),
        ("scales: {tiny: {}}", "unknown scale in mine.yaml 'tiny'"),
    ],
)
def test_a_wrong_key_or_value_is_one_error_that_names_it(tmp_path, change, text):
    changed = [line.split(":")[0] for line in change.splitlines()]
    lines = read_yaml(write(tmp_path, GOOD))
    kept = {key: value for key, value in lines.items() if key not in changed}
    path = write(tmp_path, json.dumps(kept)[:-1] + "}")
    path.write_text("\n".join([*(f"{key}: {json.dumps(value)}" for key, value in kept.items()), change]))
    with pytest.raises(InputError) as caught:
        load_pruning_study(path)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("prunning", "unknown kind of study in mine.yaml 'prunning'; did you mean 'pruning'?"),
        ("null", "unknown kind of study in mine.yaml 'None'"),
    ],
)
def test_a_kind_of_study_that_is_none_is_refused(tmp_path, kind, text):
    path = write(tmp_path, GOOD.replace("kind: pruning", f"kind: {kind}"))
    with pytest.raises(InputError) as caught:
        run.run(path, out=tmp_path / "out")
    assert text in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"arms": ["pppo"]}, "unknown arm (method of pruning) 'pppo'; did you mean 'ppo'?"),
        ({"tasks": ["digits"]}, "unknown task 'digits'"),
        ({"n_seeds": 0}, "n_seeds: got 0, expected a whole number of at least 1"),
        ({"seed": -1}, "seed: got -1, expected a whole number of at least 0"),
        ({"scale": "tiny"}, "unknown scale 'tiny'"),
        ({"workers": -1}, "workers: got -1, expected a whole number of 0 (in this process) or more"),
        ({"executor": "ray"}, "executor 'ray' is not available in this version"),
        ({"data_dir": "nowhere"}, "the data directory nowhere is not there"),
    ],
)
def test_what_is_asked_is_checked_before_anything_is_written(tmp_path, asked, text):
    with pytest.raises(InputError) as caught:
        run.run("pruning", out=tmp_path / "out", **{"scale": "smoke", **asked})
    assert text in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("targets: [{flops: 0.01}]", "task 'digits-pruning': target flops 0.01 cannot be reached"),
        ("tasks: [digits-pruning, shakespeare-gpt]", "task 'shakespeare-gpt'"),
        ("tasks: [digits-pruning, titanic-fcnn]", "titanic"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_trains(tmp_path, change, text):
    lines = {**read_yaml(write(tmp_path, GOOD)), "tasks": ["digits-pruning"], "targets": [{"flops": 0.5}]}
    kept = {key: value for key, value in lines.items() if key not in [c.split(":")[0] for c in change.splitlines()]}
    path = write(tmp_path, "\n".join([*(f"{key}: {json.dumps(value)}" for key, value in kept.items()), change]))
    with pytest.raises(InputError) as caught:
        run.run(path, scale="smoke", out=tmp_path / "out", workers=0)
    assert text in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_too_many_configurations_to_score_them_all(tmp_path, monkeypatch):
    monkeypatch.setattr("trimtab.pruning.allocations._MOST", 50)
    path = write(tmp_path, GOOD.replace("methods: [ppo, uniform]", "methods: [exhaustive]"))
    with pytest.raises(InputError, match="the network has 128 configurations and all of them were to be scored"):
        run.run(path, scale="smoke", tasks=["digits-pruning"], out=tmp_path / "out", workers=0)
    assert not (tmp_path / "out").exists()


def test_names_of_targets():
    assert target_name({"flops": 0.5}) == "flops 0.5"
    assert target_name({"latency": 0.25, "batch_size": 64}, joined="-") == "latency-0.25-batch_size-64"


# Reports of cells written by hand

DENSE = {"flops": 1000, "macs": 500, "parameters": 100, "bytes": 400}


def cell(method, seed, after, *, before=0.5, left=0.5, ratio=0.8, evaluations=10, target=0.5):
    """A cell as `trimtab.experiments.pruning.cell` writes it."""
    timings = []
    for size in (1, 64):
        timings.append({"model": "dense", "batch_size": size, "median_s": 0.01, "ratio": 1.0})
        timings.append({"model": "pruned", "batch_size": size, "median_s": 0.01 * ratio, "ratio": ratio})
    return {
        "status": "done", "error": None, "task": "digits-pruning", "seed": seed, "target": {"flops": target},
        "method": method, "widths": {"0": [16, 8], "6": [64, 0]}, "kinds": {"0": "Conv2d", "6": "Linear"},
        "refused": {"8": "it is an output"},
        "accuracy": {"val": {"dense": 0.9, "before": before, "after": after},
                     "test": {"dense": 0.9, "before": before, "after": after}},
        **{name: round(value * left) for name, value in DENSE.items()}, "left": dict.fromkeys(DENSE, left),
        "pruning_ratio": 1 - left, "trade_off": after / (1000 * left / 1e9), "evaluations": evaluations,
        "history": [0.3, None, 0.5], "test_reads": 2, "notes": [],
        "latency": {"device": "cpu", "threads": 1, "clock": "thread_time", "repeats": 3, "timings": timings},
        "times": {"search_s": 1.0, "fine_tuning_s": 2.0, "training_s": 0.0},
    }  # fmt: skip


def make(tmp_path, cells, *, n_seeds=5, methods=("ppo", "uniform", "random-search", "exhaustive"), targets=(0.5,)):
    """A folder with these cells."""
    lines = read_yaml(write(tmp_path, GOOD))
    lines |= {"tasks": ["digits-pruning"], "n_seeds": n_seeds, "methods": list(methods)}
    lines["targets"] = [{"flops": target} for target in targets]
    text = "\n".join(f"{key}: {json.dumps(value)}" for key, value in lines.items())
    study = load_pruning_study(write(tmp_path, text))
    out = tmp_path / "out"
    write_json(out / "study.json", study_json(study, {"python": "3"}))
    for seed in range(n_seeds):
        record = {"accuracy": {"val": 0.9, "test": 0.9}, **DENSE, "trade_off": 0.9e6, "optimizer_steps": 30}
        record |= {"lr": 0.001, "loaded_from": None, "times": {"training_s": 1.0}}
        write_json(out / "runs" / "digits-pruning" / f"seed-{seed}" / "dense.json", record)
    for one in cells:
        folder = out / "runs" / "digits-pruning" / f"seed-{one['seed']}" / "cells" / f"flops-{one['target']['flops']:g}"
        write_json(folder / f"{one['method']}.json", one)
    return out


OURS = (0.80, 0.81, 0.79, 0.82, 0.78)


def full(**ppo):
    """Five seeds of four methods; ppo is 2 points above uniform in every one, 1 below the optimum."""
    cells = [cell("ppo", seed, after, **ppo) for seed, after in enumerate(OURS)]
    cells += [cell("uniform", seed, after - 0.02, evaluations=1) for seed, after in enumerate(OURS)]
    cells += [cell("random-search", seed, 0.75 + 0.01 * (seed % 2)) for seed in range(5)]
    return [*cells, *(cell("exhaustive", seed, after + 0.01, evaluations=100) for seed, after in enumerate(OURS))]


def rows_of(out):
    results = collect(read_folder(out))
    return results, {row["id"]: row for row in results["arms"]}


def test_numbers_are_those_of_the_cells(tmp_path):
    results, rows = rows_of(make(tmp_path, full()))
    accuracy = rows["ppo"]["metrics"]["test_accuracy"]
    assert accuracy["mean"] == pytest.approx(0.80)
    half = 2.776445 * math.sqrt(0.001 / 4 / 5)  # Student's t with four degrees of freedom
    assert accuracy["interval"] == pytest.approx([0.80 - half, 0.80 + half], abs=1e-6)
    metrics = rows["ppo"]["metrics"]
    assert metrics["mac_reduction"]["mean"] == 2.0
    assert metrics["speed_up_64"]["mean"] == pytest.approx(1.25)
    assert metrics["trade_off"]["mean"] == pytest.approx(0.80 / 500e-9)
    assert metrics["pruning_ratio"]["mean"] == 0.5
    assert metrics["test_dense"]["mean"] == pytest.approx(0.9)
    difference = rows["ppo"]["differences"]["uniform"]
    assert (difference["mean"], difference["verdict"]) == (pytest.approx(0.02), "better")
    assert rows["ppo"]["differences"]["exhaustive"]["verdict"] == "worse"
    assert rows["ppo"]["differences_before"]["uniform"]["identical"]
    assert rows["uniform"]["differences"] == {}
    assert rows["ppo"]["widths"]["6"] == {"kind": "Linear", "dense": 64, "left": [0] * 5}
    assert results["unfinished"] == {"n_planned": 20, "missing": [], "failed": []}
    assert [row["id"] for row in results["arms"]] == ["ppo", "uniform", "random-search", "exhaustive"]


def answers(results):
    return {entry["goal"]: entry["answer"] for entry in results["goals"]}


def test_goals_that_are_reached_and_goals_that_are_not(tmp_path):
    results, _ = rows_of(make(tmp_path, full()))
    assert answers(results) == {
        # One point below the optimum, whose standard error is 0.7 points.
        "near the optimum": goals.NOT_REACHED,
        "as good as the best baseline": goals.REACHED,
        "faster": goals.REACHED,  # 1.25 is 0.625 of 2
    }
    why = {entry["goal"]: entry["why"] for entry in results["goals"]}
    assert why["faster"] == "1.25 times as fast for 2.00 times fewer MACs, that is 0.62 of it"
    assert why["as good as the best baseline"].startswith(
        "the best baseline is uniform: +2.0 points [+2.0, +2.0] over 5"
    )
    assert f"{MINUS}1.0 points" in why["near the optimum"]
    assert "0.7 points, with 0.1 of its evaluations" in why["near the optimum"]
    assert any("better than uniform: +2.0 points" in line for line in results["conclusion"])


def test_a_slow_network_and_a_better_baseline_are_said(tmp_path):
    cells = [one for one in full(ratio=0.9) if one["method"] != "uniform"]
    cells += [cell("uniform", seed, after + 0.03 * (seed % 2)) for seed, after in enumerate(OURS)]
    results, _ = rows_of(make(tmp_path, cells))
    assert answers(results)["faster"] == goals.NOT_REACHED
    assert answers(results)["as good as the best baseline"] == goals.NOT_REACHED  # the interval goes below -1 point


def test_too_few_seeds_answer_nothing(tmp_path):
    cells = [one for one in full() if one["seed"] < 2]
    results, rows = rows_of(make(tmp_path, cells, n_seeds=2))
    assert rows["ppo"]["differences"]["uniform"]["verdict"] == "too few seeds to say"
    assert answers(results)["as good as the best baseline"] == goals.NOT_KNOWN


def test_resnet_has_a_goal_of_its_own():
    def row(name, values):
        metrics = {"test_accuracy": {"values": values, "mean": sum(values) / 5, "stderr": 0.01}}
        metrics |= {"speed_up_64": {"mean": 2.0}, "mac_reduction": {"mean": 4.0}}
        kind = "learned" if name == "ppo" else "baseline"
        return {"id": name, "kind": kind, "task": "cifar10-resnet18", "target": {"flops": 0.25},
                "target_name": "flops 0.25", "seeds": list(range(5)), "metrics": metrics}  # fmt: skip

    ours, other = row("ppo", [0.6, 0.61, 0.6, 0.61, 0.6]), row("random-search", [0.5, 0.52, 0.5, 0.51, 0.5])
    by_seed = [dict(enumerate(r["metrics"]["test_accuracy"]["values"])) for r in (ours, other)]
    ours["differences"] = {"random-search": compare(*by_seed, lower_is_better=False).to_json("test_accuracy")}
    found = {entry["goal"]: entry["answer"] for entry in goals.goals_of({"arms": [ours, other]})}
    assert found["better than random search"] == goals.REACHED
    assert found["faster"] == goals.NOT_REACHED


def test_the_report_says_the_numbers_and_what_is_missing(tmp_path):
    cells = full()
    cells[0] = {"status": "failed", "error": "fine-tuning failed", "task": "digits-pruning", "seed": 0,
                "target": {"flops": 0.5}, "method": "ppo"}  # fmt: skip
    out = make(tmp_path, cells[:-1], methods=("ppo", "uniform", "random-search", "exhaustive"))
    assert report.write(out) == out / "report.html"
    text = (out / "report.md").read_text().replace("\\", "")  # what is no markup is escaped
    assert "Unfinished: 19 of 20 cells have a result. Missing:" in text
    assert "exhaustive at flops 0.5 on digits-pruning, seed 4" in text
    assert "1 cell of 20 failed:" in text
    assert "ppo at flops 0.5 on digits-pruning, seed 0: fine-tuning failed" in text
    assert "| uniform | 78.0 [76.0, 80.0] | 50.0 [50.0, 50.0] |" in text
    assert "| ppo | 50.0 | 50.0 | 50.0 | 0.500 | 2.00x | 1.25x | 1.25x |" in text
    assert "| ppo | 8 | taken out |" in text
    assert "8: it is an output." in text
    for kind in ("flops", "latency", "widths", "history"):
        assert (out / "plots" / f"{kind}_digits-pruning.png").read_bytes()[:4] == b"\x89PNG"
    page = (out / "report.html").read_text()
    assert page.count("<img ") == 4
    assert "<script" not in page
    first = (out / "results.json").read_bytes()
    report.write(out)
    assert (out / "results.json").read_bytes() == first
    assert len(summary_table(out).rows) == 4


def test_a_report_of_nothing_yet(tmp_path):
    out = make(tmp_path, [])
    report.write(out)
    text = (out / "report.md").read_text()
    assert "Unfinished: 0 of 20 cells have a result." in text
    assert "No cell on this task has come to its end." in text


def test_a_folder_of_another_kind_is_refused(tmp_path):
    write_json(tmp_path / "study.json", {"study": "demo"})
    with pytest.raises(InputError, match="holds no study of pruning"):
        read_folder(tmp_path)


# Words


def test_accuracies_and_differences_in_words():
    ours, theirs = {0: 0.5, 1: 0.52, 2: 0.5, 3: 0.51, 4: 0.5}, dict.fromkeys(range(5), 0.4)
    better = compare(ours, theirs, lower_is_better=False).to_json("x")
    assert short(better) == "+10.6 [+9.5, +11.7]"
    assert against("uniform", better) == "better than uniform: +10.6 points [+9.5, +11.7] over 5 seeds"
    one = compare({0: 0.5}, {0: 0.51}).to_json("x")
    assert points(one) == f"{MINUS}1.0 points (too few seeds to say: 1 of the 5 needed) over 1 seed"
    assert short(compare({}, {}).to_json("x")) == short(None) == "–"
    assert points(compare({}, {}).to_json("x")) == "nothing to compare, since no seed has both"
    assert per_cent({"n": 1, "mean": 0.5, "interval": None}) == "50.0"
    assert per_cent({"n": 0, "mean": None, "interval": None}) == "–"
    assert short({"n": 5, "mean": 0.0001, "interval": None}) == "0.0"
