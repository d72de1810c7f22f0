"""Budgets of a study: an arm with the largest batch throughout gets the same FLOPs, and so fewer optimizer steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trimtab.errors import InputError
from trimtab.experiments.design import load_study
from trimtab.experiments.metrics import uses_to_pay_back
from trimtab.experiments.run import run

STUDY = """
study: budgets
idea: What does a large batch buy?
tasks: [digits-mlp]
arms:
  - constant
  - {id: largest, agent: constant, start: {batch_size: 128}}
  - {id: largest-accumulated, agent: constant, start: {batch_size: 128, accumulation: 3}}
  - {id: moved, agent: q_learning, knobs: [lr, batch_size], start: {batch_size: 16}}
n_seeds: 1
total_steps: 66
every: 11
learn_runs: 1
"""
# Of one sample through 64-64-10 and back: two FLOPs a multiply-add, forward, and twice that backward but for the
# gradient of the inputs, which nobody needs.
WEIGHTS = (64 * 64, 64 * 10)
PER_SAMPLE = 2 * (3 * sum(WEIGHTS) - WEIGHTS[0])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("study")
    (folder / "budgets.yaml").write_text(STUDY)
    assert run(folder / "budgets.yaml", out=folder / "out", scale="smoke", workers=0).exit_code == 0
    results = json.loads((folder / "out" / "results.json").read_text())
    return folder / "out", {row["id"]: row for row in results["arms"]} | {"budget": results["budget"]}


def mean(row: dict[str, Any], name: str) -> float:
    return row["metrics"][name]["mean"]


def test_the_largest_batch_throughout_gains_nothing_from_the_accounting(found: tuple[Path, dict[str, Any]]) -> None:
    out, rows = found
    assert rows["budget"] == "training FLOPs"
    budget = 66 * 32 * PER_SAMPLE
    assert mean(rows["constant"], "flops") == budget
    assert (mean(rows["constant"], "optimizer_steps"), mean(rows["constant"], "samples")) == (66, 66 * 32)
    # A step costs four times as much: 16 steps are 64 of 66, and a seventeenth would be 68.
    largest = rows["largest"]
    assert (mean(largest, "optimizer_steps"), mean(largest, "samples")) == (16, 16 * 128)
    assert mean(largest, "flops") == 16 * 128 * PER_SAMPLE == pytest.approx(budget * 64 / 66)
    assert mean(largest, "budget_used") == 64 / 66
    header = json.loads(next((out / "runs/digits-mlp/largest").rglob("run.json")).read_text())
    assert (header["total_steps"], header["flops_budget"]) == (66, budget)


def test_nor_does_the_largest_batch_with_accumulation(found: tuple[Path, dict[str, Any]]) -> None:
    _, rows = found
    most = rows["largest-accumulated"]  # a step costs twelve times as much: 5 are 60 of 66
    assert (mean(most, "optimizer_steps"), mean(most, "samples")) == (5, 5 * 3 * 128)
    assert mean(most, "flops") == 5 * 3 * 128 * PER_SAMPLE
    assert mean(most, "budget_used") == 60 / 66


def test_an_arm_that_moves_its_batch_size_stays_within_the_budget(found: tuple[Path, dict[str, Any]]) -> None:
    out, rows = found
    folder = next((out / "runs/digits-mlp/moved").rglob("series.jsonl"))
    series = [json.loads(line) for line in folder.read_text().splitlines()]
    sizes = {row["knobs"]["batch_size"] for row in series}
    assert series[0]["knobs"]["batch_size"] == 16
    assert len(sizes) > 1
    for row in series:
        assert row["spent"] == pytest.approx(row["samples"] / 32, abs=1e-9)
        assert row["progress"] == row["spent"] / 66
    # A decision every 11 steps as the task has them, whatever the batch: the first at or after it.
    for number, row in enumerate(series[:-1]):
        assert 11 * number <= row["spent"] < 11 * number + max(sizes) / 32
    assert 66 - max(sizes) / 32 < series[-1]["spent"] <= 66
    assert mean(rows["moved"], "flops") == series[-1]["samples"] * PER_SAMPLE <= 66 * 32 * PER_SAMPLE
    result = json.loads((folder.parent / "result.json").read_text())
    assert result["learning"]["runs"] == 1
    assert 0.9 < result["learning"]["flops"] / (66 * 32 * PER_SAMPLE) <= 1


def test_the_report_says_what_the_budgets_are(found: tuple[Path, dict[str, Any]]) -> None:
    text = (found[0] / "report.md").read_text()
    assert "training GFLOPs for every arm, those of 66 optimizer steps as the task has them" in text
    line = next(line for line in text.splitlines() if line.startswith("| largest |") and "96.97%" in line)
    assert line.split("|")[5:7] == [" 16 ", " 2,048 "]


def test_without_such_an_arm_budgets_are_in_steps(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("study: s\nidea: i\ntasks: [digits-mlp]\narms: [constant, q_learning]\n")
    assert load_study(path).budget == "optimizer steps"
    path.write_text(
        "study: s\nidea: i\ntasks: [digits-mlp]\narms: [{id: a, agent: cosine, start: {accumulation: 2}}]\n"
    )
    assert load_study(path).budget == "training FLOPs"


@pytest.mark.parametrize(
    ("start", "text"),
    [
        ("{lr: 3}", "start: got 'lr', expected settings of the loop: accumulation, batch_size"),
        ("{batch_size: 0}", "start: got batch_size: 0, expected a whole number of at least 1"),
        ("7", r"start: got 7, expected a mapping such as \{batch_size: 64\}"),
    ],
)
def test_what_cannot_be_started_with_is_refused(tmp_path: Path, start: str, text: str) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(f"study: s\nidea: i\ntasks: [digits-mlp]\narms: [{{id: a, agent: cosine, start: {start}}}]\n")
    with pytest.raises(InputError, match=text):
        load_study(path)


def test_learning_is_paid_back_in_the_budgets_unit() -> None:
    better = {"interval": [-0.2, -0.1], "reference_mean": 1.0, "verdict": "better"}
    assert uses_to_pay_back(250, 100, better, "FLOPs") == (3.0, "learning FLOPs / FLOPs of the tuning runs saved")
