"""The overhead of all knobs and signals: what the controller under test has, and that its loops train alike."""

from __future__ import annotations

import json
from pathlib import Path

import overhead
import pytest

from trimtab import registry
from trimtab.training.loop import TrainingLoop

pytestmark = pytest.mark.usefixtures("unwatched")


@pytest.mark.parametrize("name", overhead.ALL_TASKS)
def test_every_knob_and_signal_is_there_and_the_loops_train_alike(name: str) -> None:
    task = registry.load("task", name)("smoke").replace(total_steps=24)
    data = overhead.stand_in_data(name)
    plain, loop = TrainingLoop(task, data, seed=0), TrainingLoop(task, data, seed=0)
    control = overhead.make_scheduler("every-10", loop, 24)
    losses = []
    for _ in range(24):
        losses.append(float(loop.step()))
        control.step(losses[-1])
    assert losses == [float(plain.step()) for _ in range(24)]
    spec = control._controller.spec
    assert spec.knobs[0] == "lr"
    assert set(spec.knobs) == set(registry.names("knob")) - set(overhead.STRUCTURAL)
    left_out = {"turn", *(f"{name}_unit" for name in overhead.STRUCTURAL)}
    assert set(spec.signals) == set(registry.names("signal")) - left_out
    acting = set(spec.knobs) - set(control._controller.masked)
    assert {"lr", "batch_size", "accumulation", "optimizer", "momentum", "beta2", "grad_clip"} <= acting
    assert {(decision.optimizer_step, decision.knob) for decision in control.decisions} == {
        (step, knob) for step in (10, 20) for knob in acting
    }
    assert all(decision.setting == decision.before for decision in control.decisions if decision.knob != "lr")


def test_the_command_writes_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(overhead.STEPS, "sst2-bilstm", 12)
    given = ["--all-knobs", "--task", "sst2-bilstm", "--pairs", "1", "--without", "optimizer"]
    overhead.main([*given, "--out", str(tmp_path / "o.json")])
    (row,) = json.loads((tmp_path / "o.json").read_text())["results"]
    assert (row["task"], row["data"], row["goal_share"]) == ("sst2-bilstm", "made up", 0.02)
    assert "optimizer" not in row["knobs"]
    assert row["every-10"]["decisions"] == len(row["knobs"]) - 2  # one decision; no dropout, and no weight decay
    assert 0 < row["default-times"]["share_in_calls"] < 50


def test_a_loop_has_as_many_steps_as_asked_for(tmp_path: Path) -> None:
    overhead.main(["--task", "digits-mlp", "--pairs", "1", "--steps", "40", "--out", str(tmp_path / "o.json")])
    (row,) = json.loads((tmp_path / "o.json").read_text())["results"]
    assert (row["steps_a_loop"], row["trimtab"]["decisions"]) == (40, 3)  # every 10, none at the end


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (["--steps", "9"], "--steps 9: a loop has at least 10 optimizer steps"),
        (["--pairs", "0"], "--pairs 0: at least one round"),
        (["--without", "lr"], "--without and --structural say which knobs --all-knobs has; give that too"),
        (["--all-knobs", "--without", "nope"], "--without nope: known knobs: accumulation, "),
    ],
)
def test_what_cannot_be_measured_is_refused(
    given: list[str], error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        overhead.main([*given, "--out", str(tmp_path / "o.json")])
    assert error in capsys.readouterr().err
    assert not (tmp_path / "o.json").exists()
