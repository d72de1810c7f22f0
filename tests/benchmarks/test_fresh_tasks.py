"""Brains against each other on fresh tasks: the same tasks for all, and the ratio that is reported."""

import json

import fresh_tasks
import numpy as np
import pytest


def test_ratios_are_geometric_means_over_tasks_then_families():
    mine = {
        "mlp": {"task": [0, 0, 1, 1], "loss": [2.0, 4.0, 1.0, 1.0], "rolled_back": [0.0] * 4},
        "cnn": {"task": [0, 1], "loss": [1.0, 1.0], "rolled_back": [0.0] * 2},
    }
    theirs = {"mlp": {"task": [0, 0, 1, 1], "loss": [1.0, 2.0, 1.0, 1.0]}, "cnn": {"task": [0, 1], "loss": [1.0, 4.0]}}
    row = fresh_tasks.compare(mine, theirs, "other")
    assert row["families"] == pytest.approx({"mlp": np.sqrt(2), "cnn": 0.5})
    assert row["ratio"] == pytest.approx(np.sqrt(np.sqrt(2) / 2))
    errors = [np.log(2) / 2, np.log(4) / 2]  # of two tasks: half their difference
    assert row["log_se"] == pytest.approx(np.sqrt(errors[0] ** 2 + errors[1] ** 2) / 2)
    assert row["n_tasks"] == 4


def test_the_first_brain_is_what_the_others_stand_over(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fresh_tasks, "NUM_ENVS", 8)
    out = tmp_path / "out.json"
    for _ in range(2):  # the second is added to the first
        fresh_tasks.main(
            ["--brain", "default", "--family", "mlp", "--episodes", "1", "--train-rows", "64", "64", "--out", str(out)]
        )
    first, second = json.loads(out.read_text())
    assert first["train_rows"] == [64, 64]
    assert first["agents"]["default"]["ratio"] == 1.0
    assert first["agents"]["uwhg"]["ratio"] != 1.0
    assert first["agents"]["uwhg"]["ratio"] == second["agents"]["uwhg"]["ratio"]
    assert "default over default: 1.000" in capsys.readouterr().out


def test_bad_input_is_said_in_one_line(capsys):
    with pytest.raises(SystemExit):
        fresh_tasks.main([])
    assert "give at least one --brain" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        fresh_tasks.main(["--brain", "default", "--train-rows", "10", "5"])
    assert "train_rows is (10, 5)" in capsys.readouterr().err
