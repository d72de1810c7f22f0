"""A brain that moves several knobs: learned in seconds, saved, and used where it can move all of them or only some."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_recipe import write
from torch import nn

import trimtab
from trimtab import registry
from trimtab.agents.policy import PolicyAgent
from trimtab.brain import Brain
from trimtab.errors import InputError
from trimtab.experiments.run import run
from trimtab.learning.learn import learn
from trimtab.learning.parts import bounded_agent
from trimtab.storage import read_json, read_lines
from trimtab.training.loop import TrainingLoop

KNOBS = ("lr", "weight_decay", "dropout", "batch_size")
SPEC = {"knobs": list(KNOBS), "knob_options": {"batch_size": {"low": 8, "high": 64}}}

pytestmark = pytest.mark.usefixtures("unwatched")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    path = write(
        folder, spec={**SPEC, "n_decisions": 8, "early_decisions": 7}, options={"residual": "uwhg"},
        tasks={"families": ["mlp"], "horizon": [80, 90]}, num_envs=8, iterations=2, seeds=1,
    )  # fmt: skip
    return learn(path, folder / "out", workers=0, seed=2).out


def make_loop(dropout: float = 0.2) -> TrainingLoop:
    layers = [nn.Linear(64, 12), nn.ReLU(), *([nn.Dropout(dropout)] if dropout else []), nn.Linear(12, 10)]
    task = registry.load("task", "digits-mlp")("smoke").replace(
        make_model=lambda data: nn.Sequential(nn.Flatten(), *layers), weight_decay=0.01, total_steps=100, lr=1e-3
    )
    return TrainingLoop(task, task.load(None), seed=0)


def play(loop: TrainingLoop, scheduler: trimtab.RLScheduler) -> None:
    while not loop.is_over():
        scheduler.step(loop.step())


def test_the_brain_says_what_it_moves(made: Path) -> None:
    brain = Brain.load(made / "brain")
    assert (brain.spec.knobs, brain.spec.masks) == (KNOBS, True)
    assert brain.provenance["knobs"] == list(KNOBS)
    assert brain.spec.signals[-3:] == ("weight_decay_unit", "dropout_unit", "batch_size_unit")
    for name, row in brain.provenance["validation"].items():  # beside rivals on the same runs, of the same FLOPs
        assert set(row) == {"mlp"}, name
        assert 0 < row["mlp"]["ratio_cosine"] < 10
    action, _ = brain.agent.predict(np.zeros((3, len(brain.spec.signals))), deterministic=True)
    assert action.shape == (3, 4)


def test_it_moves_all_of_them_within_the_budget(made: Path) -> None:
    loop = make_loop()
    scheduler = trimtab.RLScheduler(loop.optimizer, 100, brain=made / "brain", model=loop.model, loader=loop)
    play(loop, scheduler)
    assert scheduler.masked == {}
    moved = {decision.knob for decision in scheduler.decisions if decision.setting != decision.before}
    assert moved == set(KNOBS)
    assert loop.spent == pytest.approx(loop.samples_seen / 32)
    assert 0 <= 100 - loop.spent < loop.step_cost
    assert scheduler.status == "over"


def test_what_cannot_act_is_masked_by_name(made: Path) -> None:
    loop = make_loop(dropout=0.0)
    scheduler = trimtab.RLScheduler(loop.optimizer, 100, brain=made / "brain", model=loop.model)
    assert set(scheduler.masked) == {"dropout", "batch_size"}
    assert "give the TrainingLoop" in scheduler.masked["batch_size"]
    play(loop, scheduler)
    assert {decision.knob for decision in scheduler.decisions} == {"lr", "weight_decay"}
    assert loop.steps_done == 100


def test_two_halves_are_one_run(made: Path) -> None:
    def begin() -> tuple[TrainingLoop, trimtab.RLScheduler]:
        loop = make_loop()
        return loop, trimtab.RLScheduler(loop.optimizer, 100, brain=made / "brain", model=loop.model, loader=loop)

    loop, scheduler = begin()
    for _ in range(30):
        scheduler.step(loop.step())
    saved = loop.state_dict(), scheduler.state_dict()
    play(loop, scheduler)
    other, again = begin()
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    play(other, again)
    assert other.spent == loop.spent
    assert [d.to_json() for d in again.decisions] == [d.to_json() for d in scheduler.decisions]
    pairs = zip(loop.model.parameters(), other.model.parameters(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


def test_it_can_be_an_arm_of_a_study(made: Path, tmp_path: Path) -> None:
    text = f"""
study: s
idea: Several knobs against one.
tasks: [digits-mlp]
arms:
  - cosine
  - {{id: several, agent: ppo, base: cosine, brain: {made}/brain, knobs: [{", ".join(KNOBS)}], reward: score_rank}}
n_seeds: 1
total_steps: 100
weight_decay: 0.01
"""
    (tmp_path / "s.yaml").write_text(text)
    assert run(tmp_path / "s.yaml", out=tmp_path / "out", scale="smoke", workers=0).exit_code == 0
    results = read_json(tmp_path / "out" / "results.json")
    assert results["budget"] == "training FLOPs"
    flops = {row["id"]: row["metrics"]["flops"]["mean"] for row in results["arms"]}
    assert 0.95 * flops["cosine"] < flops["several"] <= flops["cosine"]
    folder = next((tmp_path / "out/runs/digits-mlp/several").rglob("decisions.jsonl"))
    assert {row["knob"] for row in read_lines(folder)} == {"lr", "weight_decay", "batch_size"}  # there is no dropout


def test_an_lr_only_brain_has_no_use_for_a_loader() -> None:
    loop = make_loop()
    scheduler = trimtab.RLScheduler(loop.optimizer, 100, loader=loop)
    play(loop, scheduler)
    assert (loop.steps_done, scheduler.masked) == (100, {})


def test_without_masks_it_is_refused(made: Path) -> None:
    brain = Brain.load(made / "brain")
    spec = trimtab.ControlSpec.from_json({**brain.spec.to_json(), "masks": False})
    loop = make_loop()
    with pytest.raises(InputError, match="the knob 'batch_size' cannot act on loader=NoneType"):
        trimtab.RLScheduler(loop.optimizer, 100, brain=Brain(brain.agent, spec), model=loop.model)


def test_outside_of_what_was_learned_on_the_rule_moves_the_rate_and_nothing_else(made: Path) -> None:
    agent = Brain.load(made / "brain").agent
    assert isinstance(agent, PolicyAgent)
    bounded = bounded_agent(agent, dict.fromkeys(agent.features.signals, (-0.5, 0.5)))
    row = {"update_to_weight": 0.3, "grad_update_cosine": 0.2}
    inside = np.array([[row.get(name, 0.0) for name in agent.features.signals]])
    beyond = np.where(np.array(agent.features.signals) == "loss_noise", 2.0, inside)
    state = bounded.predict(inside, deterministic=True)[1]  # the rule's first decision only measures
    mine, _ = bounded.predict(inside, state, deterministic=True)
    rules, _ = bounded.predict(beyond, state, deterministic=True)
    assert mine[0, 1:].all()
    assert rules.tolist() == [[pytest.approx(0.15), 0.0, 0.0, 0.0]]  # uwhg: its target of 0.45 less what is seen
    assert bounded.note == "outside what was learned on (loss_noise): the rule uwhg decides"
