"""The study lr-scheduler at its smallest, from its file to its report: 67 runs of a second."""

from __future__ import annotations

import json

import pytest

from trimtab.experiments import run


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
