"""trimtab.prune: known optima found, never worse than its seeds, resumed as uninterrupted, one error for bad input."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import trimtab
from trimtab.errors import InputError, RunFailedError
from trimtab.pruner.methods import METHODS
from trimtab.pruner.search import Search
from trimtab.pruning.budget import Budget, Target
from trimtab.pruning.network import PrunableNetwork
from trimtab.pruning.scorer import Scorer

INPUTS = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
TARGETS = (INPUTS[:, 0] > 0).long() + (INPUTS[:, 1] > 0).long()


def model(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 3))


def train(net: nn.Module, steps: int = 60) -> None:
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(INPUTS), TARGETS).backward()
        optimizer.step()


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    net = model()
    train(net, 150)
    return net


def widths_of(net: nn.Module) -> tuple[int, int]:
    return net[0].out_features, net[2].out_features


@pytest.mark.parametrize("agent", METHODS)
def test_every_method_keeps_to_the_budget(trained: nn.Module, agent: str) -> None:
    before = copy.deepcopy(trained.state_dict())
    result = trimtab.prune(
        trained, INPUTS[:1], validation=(INPUTS, TARGETS), fine_tune=lambda net: train(net, 5), agent=agent,
        target={"flops": 0.4}, max_evaluations=16, n_best=2,
    )  # fmt: skip
    report = result.report
    assert report.pruned.flops <= 0.4 * report.dense.flops
    assert report.pruned.flops == 2 * (
        6 * report.widths["0"][1] + np.prod(widths_of(result.model)) + 3 * report.widths["2"][1]
    )
    assert report.pruned.parameters == sum(p.numel() for p in result.model.parameters())
    assert report.pruned.bytes == 4 * report.pruned.parameters
    assert report.agent == agent
    assert report.evaluations <= (16 if agent != "exhaustive" else 32)
    assert report.pruned.score == report.candidates[0].after
    assert all(c.after is None or c.after <= report.pruned.score for c in report.candidates)
    with torch.no_grad():
        right = (result.model(INPUTS).argmax(1) == TARGETS).double().mean()
    assert report.pruned.score == pytest.approx(float(right))
    assert not result.model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items())


def test_the_known_optimum_is_found() -> None:
    """A score with one peak, far from what uniform and global widths give."""
    network = PrunableNetwork(model(), INPUTS[:1])
    budget = Budget(network, Target.parse({"flops": 0.6}))
    feasible = [c for c in itertools.product(*(part.widths for part in network.parts)) if budget.fits(c)]

    def score(widths: tuple[int, ...]) -> float:
        return -abs(widths[0] - 8) / 32 - abs(widths[1] - 56) / 64

    best = max(feasible, key=score)
    assert best == (8, 56)
    for seed in range(3):
        scorer = Scorer(network, score_of=score)
        found = Search(budget, scorer, "ppo-untaught", 24, seed).run()
        assert found[0] == best
        assert scorer.n_evaluations <= 24
        assert set(Search(budget, Scorer(network, score_of=score), "ppo-untaught", 24, seed).seeds()) <= set(
            scorer.scores
        )


def test_exhaustive_looks_at_everything_within_the_budget(trained: nn.Module) -> None:
    options = {"validation": (INPUTS, TARGETS), "target": {"flops": 0.4}}
    best = trimtab.prune(trained, INPUTS[:1], agent="exhaustive", **options)
    network = PrunableNetwork(trained, INPUTS[:1])
    limit = 0.4 * network.flops(network.dense)
    feasible = [c for c in itertools.product(*(part.widths for part in network.parts)) if network.flops(c) <= limit]
    scores = [float((network.cut(c)(INPUTS).argmax(1) == TARGETS).double().mean()) for c in feasible]
    assert best.report.evaluations == len(feasible)
    assert best.report.score_before == pytest.approx(max(scores))
    deep = nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(6, 6), nn.ReLU())), nn.Linear(6, 3))
    with pytest.raises(InputError, match=r"the network has [\d,]+ configurations and all of them were to be scored"):
        trimtab.prune(deep, INPUTS[:1], agent="exhaustive", **options)


def test_the_policy_learns() -> None:
    """Of its last episodes the rewards are higher than those of the first, where the optimum is at one corner."""
    network = PrunableNetwork(model(), INPUTS[:1])
    budget = Budget(network, Target.parse({"flops": 0.6}))
    asked: list[float] = []

    def score(widths: tuple[int, ...]) -> float:
        return 1 - abs(widths[0] - 8) / 32 - abs(widths[1] - 64) / 64

    class Recording(Scorer):
        def score(self, configuration: object) -> float:
            asked.append(super().score(configuration))
            return asked[-1]

    Search(budget, Recording(network, score_of=score), "ppo-untaught", 100, 0).run()
    assert len(asked) >= 1000  # 500 episodes; and as there are not a hundred configurations, 500 random ones
    assert np.mean(asked[-550:-500]) > 0.9 > np.mean(asked[10:60])
    assert np.mean(asked[-50:]) < 0.9


def test_seeds_are_drawn_alike_and_differ(trained: nn.Module) -> None:
    def prune(seed: int) -> list[tuple[int, ...]]:
        asked: list[tuple[int, ...]] = []

        def evaluate(net: nn.Module) -> float:
            asked.append(widths_of(net))
            return float((net(INPUTS).argmax(1) == TARGETS).double().mean())

        options = {"target": {"flops": 0.5}, "max_evaluations": 12, "agent": "ppo-untaught"}
        trimtab.prune(trained, INPUTS[:1], evaluate=evaluate, seed=seed, **options)
        return asked

    state = torch.get_rng_state()
    assert prune(0) == prune(0) != prune(1)
    assert len(prune(0)) == 1 + 12  # the dense network, and the configurations; nothing is fine-tuned or asked twice
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("agent", "stop"), [("ppo-untaught", 9), ("ppo", 5)])
def test_resumed_is_uninterrupted(trained: nn.Module, tmp_path: Path, agent: str, stop: int) -> None:
    n_calls = 0

    def evaluate(net: nn.Module) -> float:
        nonlocal n_calls
        n_calls += 1
        if n_calls == stop_at:
            raise KeyboardInterrupt
        return float((net(INPUTS).argmax(1) == TARGETS).double().mean())

    options = {"evaluate": evaluate, "target": {"flops": 0.4}, "max_evaluations": 20, "seed": 3, "agent": agent}
    stop_at = 0
    whole = trimtab.prune(trained, INPUTS[:1], **options)
    n_whole, n_calls, stop_at = n_calls, 0, stop
    with pytest.raises(KeyboardInterrupt):
        trimtab.prune(trained, INPUTS[:1], **options, checkpoint=tmp_path / "search")
    n_calls, stop_at = 0, 0
    resumed = trimtab.prune(trained, INPUTS[:1], **options, checkpoint=tmp_path / "search")
    assert n_calls == n_whole - stop + 1
    assert resumed.report == whole.report
    assert all(torch.equal(a, b) for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True))
    with pytest.raises(InputError, match="holds another search: target differ; give the arguments of then"):
        trimtab.prune(trained, INPUTS[:1], **{**options, "target": {"flops": 0.3}}, checkpoint=tmp_path / "search")


def test_stages_end_at_the_same_share(trained: nn.Module) -> None:
    sizes: list[int] = []

    def fine_tune(net: nn.Module) -> None:
        sizes.append(sum(p.numel() for p in net.parameters()))
        train(net, 5)

    result = trimtab.prune(
        trained, INPUTS[:1], validation=(INPUTS, TARGETS), fine_tune=fine_tune, target={"params": 0.25}, stages=2,
        max_evaluations=20, n_best=1,
    )  # fmt: skip
    dense = result.report.dense.parameters
    assert 0.25 * dense < sizes[0] <= 0.5 * dense  # half is left after the first of two stages
    assert sizes[1] == result.report.pruned.parameters <= 0.25 * dense
    assert result.report.widths["0"] == (32, result.model[0].out_features)


def test_baselines_are_fine_tuned_alike(trained: nn.Module) -> None:
    drawn: list[float] = []

    def fine_tune(net: nn.Module) -> None:
        assert net.training
        drawn.append(float(torch.rand(())))

    result = trimtab.prune(
        trained, INPUTS[:1], validation=(INPUTS, TARGETS), fine_tune=fine_tune, target={"flops": 0.4},
        max_evaluations=10, n_best=3, baselines=["uniform", "random-search", "greedy"],
    )  # fmt: skip
    assert [c.name for c in result.report.baselines] == ["uniform", "random-search", "greedy"]
    assert all(c.share <= 0.4 for c in result.report.baselines)
    assert len(drawn) == 3 + 1 + 3 + 1
    assert len(set(drawn)) == 1  # the same random numbers for every candidate


def test_a_failing_candidate_does_not_lose_the_search(trained: nn.Module) -> None:
    n_calls = 0

    def fine_tune(net: nn.Module) -> None:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 1:
            raise RuntimeError("out of luck")
        if n_calls == 2:
            for parameter in net.parameters():
                parameter.data.fill_(float("nan"))

    result = trimtab.prune(
        trained, INPUTS[:1], validation=(INPUTS, TARGETS), fine_tune=fine_tune, target={"flops": 0.4},
        max_evaluations=10, n_best=3,
    )  # fmt: skip
    assert n_calls == 3
    assert result.report.candidates[0].after is not None
    failures = [c.failure for c in result.report.candidates if c.after is None]
    assert failures[0] == "RuntimeError: out of luck"

    def always(net: nn.Module) -> None:
        raise ValueError("never")

    with pytest.raises(RunFailedError, match="fine-tuning failed for all 3 candidates; the first: ValueError: never"):
        trimtab.prune(
            trained, INPUTS[:1], validation=(INPUTS, TARGETS), fine_tune=always, target={"flops": 0.4},
            max_evaluations=10, n_best=3,
        )  # fmt: skip


def test_configurations_that_cannot_be_scored_are_passed_over_and_counted(trained: nn.Module) -> None:
    n_calls = 0

    def evaluate(net: nn.Module) -> float:
        nonlocal n_calls
        n_calls += 1
        return float("nan") if n_calls in (4, 6) else sum(widths_of(net)) / 100

    result = trimtab.prune(trained, INPUTS[:1], evaluate=evaluate, target={"flops": 0.4}, max_evaluations=12)
    assert result.report.failed == 2
    assert "2 configurations had no score; the first: evaluate returned nan" in result.report.notes[0]


def test_what_is_saved_is_what_is_loaded(trained: nn.Module, tmp_path: Path) -> None:
    result = trimtab.prune(trained, INPUTS[:1], validation=(INPUTS, TARGETS), target={"flops": 0.4}, max_evaluations=8)
    result.save(tmp_path / "pruned")
    for loaded in (trimtab.load_pruned(tmp_path / "pruned"), trimtab.load_pruned(tmp_path / "pruned", model(7))):
        assert torch.equal(loaded(INPUTS), result.model(INPUTS))
    document = json.loads((tmp_path / "pruned" / "pruned.json").read_text())
    assert document["extra"]["pruned"]["flops"] == result.report.pruned.flops


def test_the_report_is_readable(trained: nn.Module) -> None:
    text = str(
        trimtab.prune(
            trained, INPUTS[:1], validation=(INPUTS, TARGETS), target={"flops": 0.4}, max_evaluations=8
        ).report
    )
    assert "4: stays, they are an output of the network" in text
    assert "flops" in text
    assert "before fine-tuning" in text


def test_a_target_of_latency_is_kept_by_the_table_and_measured(tmp_path: Path) -> None:
    wide = nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 3))
    inputs = torch.randn(8, 64)
    options = {"target": {"latency": 0.8, "batch_size": 16}, "max_evaluations": 8, "checkpoint": tmp_path / "search"}
    result = trimtab.prune(wide, inputs[:1], validation=(inputs, torch.arange(8) % 3), **options)
    assert result.report.candidates[0].share <= 0.8
    timings = result.report.latency["timings"]
    assert [(t["model"], t["batch_size"]) for t in timings] == [("dense", 16), ("pruned", 16)]
    table = json.loads((tmp_path / "search" / "latencies-1.json").read_text())
    again = trimtab.prune(wide, inputs[:1], validation=(inputs, torch.arange(8) % 3), **options)
    assert json.loads((tmp_path / "search" / "latencies-1.json").read_text()) == table  # not measured again
    assert again.report.widths == result.report.widths


def test_another_library_cuts_to_the_same_network(trained: nn.Module) -> None:
    pytest.importorskip("torch_pruning", reason='needs pip install "trimtab[prune]"')
    options = {"validation": (INPUTS, TARGETS), "target": {"flops": 0.4}, "max_evaluations": 8}
    ours, theirs = (
        trimtab.prune(trained, INPUTS[:1], backend=backend, **options) for backend in ("surgery", "torch-pruning")
    )
    assert ours.report.widths == theirs.report.widths
    assert (ours.model(INPUTS) - theirs.model(INPUTS)).abs().max() < 1e-5
    with pytest.raises(InputError, match="target latency is measured layer by layer, which needs backend='surgery'"):
        trimtab.prune(trained, INPUTS[:1], backend="torch-pruning", **{**options, "target": {"latency": 0.5}})


def test_bad_input_is_one_error(trained: nn.Module) -> None:
    good = {"validation": (INPUTS, TARGETS), "max_evaluations": 8}

    def raising(net: nn.Module) -> float:
        raise KeyError("labels")

    cases = [
        ({"target": {"flops": 0}}, "target flops is 0"),
        ({"target": {"flops": 1.5}}, "target flops is 1.5"),
        ({"target": {"flop": 0.5}}, "target 'flop'"),
        ({"target": {"flops": 0.001}}, "cannot be reached"),
        ({"agent": "pp"}, "agent 'pp'.*did you mean 'ppo'"),
        ({"baselines": ["unifrom"]}, "baseline 'unifrom'.*did you mean 'uniform'"),
        ({"max_evaluations": 2}, "max_evaluations is 2; expected a whole number of 8 or more"),
        (
            {"max_evaluations": 8, "stages": 2, "fine_tune": train},
            "max_evaluations is 8; expected a whole number of 16",
        ),
        ({"seed": -1}, "seed is -1"),
        ({"n_best": 0}, "n_best is 0"),
        ({"backend": "torch"}, "backend 'torch'"),
        ({"fine_tune": 3}, "fine_tune is int"),
        ({"score_after": 3}, "score_after is int; expected a function that trains a network in place"),
        ({"score_after": raising}, "the training before a score raised KeyError: 'labels'; score_after"),
        ({"agent": "paper"}, "agent 'paper' retrains after each action: give fine_tune="),
        ({"baselines": ["paper"]}, "agent 'paper' retrains after each action: give fine_tune="),
        ({"stages": 2, "max_evaluations": 16}, "stages are fine-tuned in between: give fine_tune="),
        ({"validation": None}, "neither of evaluate= and validation= given"),
        ({"evaluate": raising}, "both of evaluate= and validation= given"),
        ({"validation": None, "evaluate": raising}, "evaluate raised KeyError for the dense network: 'labels'"),
        ({"validation": None, "evaluate": lambda net: float("nan")}, "evaluate returned nan for the dense network"),
        ({"validation": None, "evaluate": lambda net: "good"}, "evaluate raised ValueError for the dense network"),
        ({"ignore": ["0", "2"]}, "nothing of Sequential can be pruned"),
    ]
    for changes, text in cases:
        with pytest.raises(InputError, match=text):
            trimtab.prune(trained, INPUTS[:1], **{**good, **changes})
    with pytest.raises(InputError, match="fails on the example inputs"):
        trimtab.prune(trained, INPUTS[:1, :3], **good)
    with pytest.raises(InputError, match=r"model is str; expected a trained torch\.nn\.Module"):
        trimtab.prune("model", INPUTS[:1], **good)
