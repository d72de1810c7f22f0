"""Networks that only guess when they are cut: it is said, and `score_after` trains each before it is scored."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import trimtab
from pruning_task import NAME, STUDY
from trimtab import registry
from trimtab.errors import InputError
from trimtab.experiments import run
from trimtab.experiments.jobs import load_data
from trimtab.experiments.pruning.ground import FineTuner, accuracy
from trimtab.experiments.pruning.job import run_one
from trimtab.experiments.pruning.schema import jobs_of, load_pruning_study
from trimtab.pruner.loading import load_pruned
from trimtab.pruning.network import PrunableNetwork
from trimtab.pruning.validation import Validation
from trimtab.seeding import derive_seed
from trimtab.storage import read_json

INPUTS = torch.linspace(-1.0, 1.0, 40)[:, None]
TARGETS = (INPUTS[:, 0] > 0).long()


def cancelling() -> nn.Module:
    """Its 32 hidden units cancel to a logit that is the input's sign; without one of them it always says 0."""
    net = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, 2))
    with torch.no_grad():
        net[0].weight.fill_(0.01)
        net[0].bias.fill_(1.0)
        net[2].weight.copy_(torch.tensor([[-100.0], [0.0]]).expand(2, 32))
        net[2].bias.copy_(torch.tensor([3200.0, 0.0]))
    return net


def test_a_guess_is_what_a_constant_answer_scores() -> None:
    def validation(targets: torch.Tensor, outputs: int) -> Validation:
        return Validation((torch.zeros(len(targets), 3), targets), nn.Linear(3, outputs), 1, batch_size=32)

    three_quarters = validation(torch.tensor([0, 0, 0, 1] * 25), 2)
    limit = 0.75 + 2 * math.sqrt(0.75 * 0.25 / 100)
    assert (three_quarters.is_guess(limit - 1e-9), three_quarters.is_guess(limit + 1e-9)) == (True, False)
    half_ignored = validation(torch.tensor([0, 1, -100, -100] * 25), 2)  # a score counts what is left out as wrong
    assert (half_ignored.is_guess(0.33), half_ignored.is_guess(0.34)) == (True, False)
    numbers = validation(torch.tensor([[1.0], [3.0]]), 1)
    assert (numbers.is_guess(-1.0), numbers.is_guess(-0.99)) == (True, False)


def test_a_blind_search_says_so() -> None:
    given = {"validation": (INPUTS, TARGETS), "target": {"flops": 0.5}, "max_evaluations": 8, "agent": "random-search"}
    report = trimtab.prune(cancelling(), INPUTS[:1], **given).report
    assert (report.dense.score, report.pruned.score) == (1.0, 0.5)
    blind = "the best configuration scored no more than a guess before fine-tuning"
    assert report.notes[-1].startswith(blind)
    assert report.notes[-1].endswith("give score_after=, a function that trains a cut network for a moment")

    rule = trimtab.prune(cancelling(), INPUTS[:1], **{**given, "agent": "uniform"}).report  # which goes by no score
    assert (rule.pruned.score, rule.notes) == (0.5, ())

    def balance(net: nn.Module) -> None:
        with torch.no_grad():
            net[2].bias[0] = 100.0 * net[0].out_features

    seen = trimtab.prune(cancelling(), INPUTS[:1], score_after=balance, **given).report
    assert (seen.score_before, seen.pruned.score) == (1.0, 0.5)  # the result itself was not trained: no fine_tune
    assert not any(note.startswith(blind) for note in seen.notes)


@pytest.mark.parametrize("agent", ["ppo", "exhaustive"])  # random search uses the budget up
def test_every_score_of_a_search_is_taken_after_it(agent: str) -> None:
    """Only a network whose bias was set shows how far it is from 16 units; uniform and global have 24."""
    net = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2))

    def mark(cut: nn.Module) -> None:
        cut[0].bias.data.fill_(7.0)

    def evaluate(cut: nn.Module) -> float:
        is_marked = bool((cut[0].bias == 7.0).all())
        return -abs(cut[0].out_features - 16) / 64 if is_marked else 0.0

    result = trimtab.prune(
        net, torch.zeros(1, 4), evaluate=evaluate, score_after=mark, agent=agent, target={"flops": 0.5},
        max_evaluations=16,
    )  # fmt: skip
    assert result.model[0].out_features == 16
    assert not (result.model[0].bias == 7.0).any()
    assert result.report.dense.score == 0.0  # which is scored as it is


def test_running_statistics_are_taken_anew_after_it() -> None:
    """A few steps leave them behind the weights; here they are left far off, where the network would guess."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(1, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))
    optimizer = torch.optim.Adam(net.parameters(), 0.05)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(INPUTS), TARGETS).backward()
        optimizer.step()

    def spoil(cut: nn.Module) -> None:
        cut[1].running_mean.fill_(1e6)

    given = {"validation": (INPUTS, TARGETS), "target": {"flops": 0.5}, "agent": "uniform", "max_evaluations": 8}
    as_it_was_cut = trimtab.prune(net.eval(), INPUTS[:1], **given).report.score_before
    assert trimtab.prune(net, INPUTS[:1], score_after=spoil, **given).report.score_before == as_it_was_cut > 0.9


def test_a_checkpoint_knows_whether_networks_were_trained_first(tmp_path: Path) -> None:
    given = {"validation": (INPUTS, TARGETS), "max_evaluations": 8, "checkpoint": tmp_path / "search"}
    trimtab.prune(cancelling(), INPUTS[:1], score_after=lambda net: None, **given)
    with pytest.raises(InputError, match="holds another search: score_after differ"):
        trimtab.prune(cancelling(), INPUTS[:1], **given)


def test_a_study_trains_before_each_score_and_says_so(tmp_path: Path) -> None:
    registry.add("task", NAME, "pruning_task:tiny", "for tests")
    try:
        path = tmp_path / "tiny.yaml"
        path.write_text(STUDY.replace("[ppo, uniform, scratch]", "[uniform, paper]") + "score_steps: 2\n")
        out = tmp_path / "out"
        assert run.run(path, scale="smoke", out=out, workers=0).exit_code == 0
        assert "in a search every network is trained for 2 steps before it is scored" in (out / "report.md").read_text()
        (job,) = jobs_of(load_pruning_study(path, scale="smoke"))
        assert run_one(job, str(out), None, lambda news: None)["status"] == "done"  # nothing is left to do
        task, data = registry.load("task", NAME)("smoke"), load_data(NAME, "smoke", None)
    finally:
        del registry._TABLES["task"][NAME]
    folder = out / f"runs/{NAME}/seed-0"
    found = read_json(folder / "cells/flops-0.5/uniform.json")
    network = PrunableNetwork(load_pruned(folder / "dense"), data.val.inputs[:8], multiple=4)
    model = network.cut(tuple(new for _, new in found["widths"].values())).train()
    seed = derive_seed(0, "fine-tuning", NAME, 0)
    FineTuner(task, data.train, 2, task.lr * 0.5, seed)(model)
    assert found["candidates"][0]["before"] == accuracy(model.eval(), data.val)
    assert found["accuracy"]["val"]["before"] != found["candidates"][0]["before"]
