"""A brain of several knobs as an arm of the zero-shot benchmark: equal training FLOPs, on its smallest part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import zero_shot
from zero_shot_suite import single

from trimtab.brain import Brain
from trimtab.spec import ControlSpec, make_agent

pytestmark = pytest.mark.usefixtures("unwatched")
KNOBS = ("lr", "weight_decay", "dropout", "batch_size")


def save_brain(folder: Path, knobs: tuple[str, ...], seed: int = 0) -> Path:
    """A policy that learned nothing, whose moves are not small."""
    levels = [f"{knob}_unit" for knob in knobs[1:]]
    agent: Any = make_agent(
        "ppo", {"signals": ["progress", "update_to_weight", *levels]}, n_knobs=len(knobs), seed=seed
    )
    agent.load_state_dict({key: value * 60 if key == "w2" else value for key, value in agent.state_dict().items()})
    options = {"batch_size": {"low": 8, "high": 128}} if "batch_size" in knobs else {}
    spec = ControlSpec.for_agent(agent, knobs=knobs, knob_options=options, masks=len(knobs) > 1)
    return Brain(agent, spec, {"sources": ["none"]}).save(folder)


def run(arm: str, **more: Any) -> dict[str, Any]:
    job = {"part": "digits-mlp-60", "arm": arm, "rate": 0.003, "role": "report", "index": 0, "brain": None}
    return single.run_job({**job, "replay": None, **more}, None, lambda news: None)


def test_a_brain_that_moves_the_batch_size_has_the_flops_of_all_others(tmp_path: Path) -> None:
    found = run("brain:several", brain=str(save_brain(tmp_path / "several", KNOBS)))
    other = run("brain:rate", brain=str(save_brain(tmp_path / "rate", ("lr",))))
    cosine = run("cosine")
    assert (cosine["steps"], cosine["spent"], cosine["flops"], cosine["masked"]) == (60, 60, None, [])
    assert (other["steps"], other["samples"], other["masked"]) == (60, 60 * 32, [])
    assert found["masked"] == ["dropout", "weight_decay"]  # the part's network and optimizer have neither
    assert found["steps"] != 60
    assert found["spent"] == pytest.approx(found["samples"] / 32)
    assert found["flops"] == pytest.approx(other["flops"] * found["spent"] / 60)
    assert 56 < found["spent"] <= 60
    # Looked at every 5 steps as the task has them, and at the end; no look costs the run anything.
    times = [time for time, _ in found["curve"]]
    assert times == sorted(set(times))
    assert times[-1] == pytest.approx(found["spent"], abs=1e-3)
    assert len(times) <= 14


def test_the_command_takes_such_a_brain_and_the_table_says_what_it_used(tmp_path: Path) -> None:
    brain = save_brain(tmp_path / "several", KNOBS)
    given = ["--part", "digits-mlp-60", "--rates", "4", "--seeds", "2", "--other-seeds", "1", "--workers", "0"]
    assert zero_shot.main([*given, "--brain", str(brain), "--out", str(tmp_path / "out")]) == 0
    assert zero_shot.main(["--table", "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "table.md").read_text()
    assert "## What brains used of the budget" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| digits-mlp-60 | `brain:several` |")]
    assert "dropout, weight_decay" in row
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    budget = table["final"]["parts"][0]["arms"]["brain:several"]["budget"]
    assert 0.9 < budget["share"] <= 1
    assert budget["samples"] == pytest.approx(budget["share"] * 60 * 32)
