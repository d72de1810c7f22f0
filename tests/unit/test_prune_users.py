"""trimtab.prune and what users give it: functions with a will of their own, folders of another search, odd scores."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import trimtab
from trimtab.errors import InputError, RunFailedError
from trimtab.pruner.policies import TaughtPolicy
from trimtab.pruner.search import Search
from trimtab.pruning.budget import Budget, Target
from trimtab.pruning.network import PrunableNetwork
from trimtab.pruning.scorer import Scorer

INPUTS = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
TARGETS = (INPUTS[:, 0] > 0).long() + (INPUTS[:, 1] > 0).long()
SMALL = {"target": {"flops": 0.5}, "max_evaluations": 8}


def model(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 3))


def widths_of(net: nn.Module) -> tuple[int, int]:
    return net[0].out_features, net[2].out_features


def accuracy(net: nn.Module) -> float:
    return float((net(INPUTS).argmax(1) == TARGETS).double().mean())


@pytest.mark.parametrize("habit", ["seeds", "draws", "grad off"])
def test_an_evaluate_with_habits_does_not_move_the_search(habit: str) -> None:
    def asked(habit: str) -> list[tuple[int, ...]]:
        found: list[tuple[int, ...]] = []

        def evaluate(net: nn.Module) -> float:
            found.append(widths_of(net))
            if habit == "seeds":  # as many do, for a loader's order
                torch.manual_seed(0)
                np.random.seed(0)  # noqa: NPY002
            elif habit == "draws":
                torch.rand(3)
                np.random.rand(3)  # noqa: NPY002
            elif habit == "grad off":
                torch.set_grad_enabled(False)
            return sum(widths_of(net)) / 96

        trimtab.prune(model(), INPUTS[:1], evaluate=evaluate, target={"flops": 0.6}, max_evaluations=40)
        return found

    assert asked(habit) == asked("none")
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("agent", ["ppo", "ppo-untaught"])
@pytest.mark.parametrize(("unit", "zero"), [(1e4, 0.0), (1e-4, 0.0), (100.0, -1e4)])
def test_the_policy_learns_from_scores_of_any_scale(unit: float, zero: float, agent: str) -> None:
    network = PrunableNetwork(model(), INPUTS[:1])
    budget = Budget(network, Target.parse({"flops": 0.6}))
    feasible = [c for c in itertools.product(*(part.widths for part in network.parts)) if budget.fits(c)]
    asked: list[tuple[int, ...]] = []

    def worth(widths: tuple[int, ...]) -> float:
        return 1 - abs(widths[0] - 8) / 32 - abs(widths[1] - 64) / 64

    class Recording(Scorer):
        def score(self, configuration: object) -> float:
            asked.append(tuple(configuration))
            return super().score(configuration)

    scorer = Recording(network, score_of=lambda widths: zero + unit * worth(widths))
    best = Search(budget, scorer, agent, 100, 0, TaughtPolicy.load().weights).run()[0]
    # A taught policy is slow to learn what no network has taught it: that a narrow part is better than a wide one.
    assert best == max(feasible, key=worth) if agent == "ppo-untaught" else worth(best) >= 0.75
    found = [worth(widths) for widths in asked[:-500]]  # then 500 at random: there are not a hundred configurations
    assert np.mean(found[-50:]) > (0.9 if agent == "ppo-untaught" else np.mean(found[10:60]))


def test_what_evaluate_does_to_the_network_is_undone() -> None:
    tuned: list[nn.Module] = []

    def evaluate(net: nn.Module) -> float:
        found = accuracy(net)
        net.train()
        for parameter in net.parameters():
            parameter.data.zero_()
        return found

    result = trimtab.prune(
        model(),
        INPUTS[:1],
        evaluate=evaluate,
        fine_tune=lambda net: tuned.append(copy.deepcopy(net)),
        n_best=1,
        **SMALL,
    )
    assert not result.model.training
    assert all(torch.equal(a, b) for a, b in zip(result.model.parameters(), tuned[0].parameters(), strict=True))
    assert accuracy(result.model) == result.report.pruned.score


def test_a_fine_tune_that_gives_back_another_network_is_refused() -> None:
    text = "fine-tuning failed for all 1 candidates.*fine_tune returned another Sequential than the one it was given"
    with pytest.raises(RunFailedError, match=text):
        trimtab.prune(
            model(), INPUTS[:1], evaluate=accuracy, fine_tune=lambda net: copy.deepcopy(net), n_best=1, **SMALL
        )
    same = trimtab.prune(model(), INPUTS[:1], evaluate=accuracy, fine_tune=lambda net: net, n_best=1, **SMALL)
    assert same.report.candidates[0].after == same.report.score_before


def test_any_error_of_fine_tune_is_the_candidates() -> None:
    n_calls = 0

    def fine_tune(net: nn.Module) -> None:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 1:
            raise AttributeError("no such thing")

    result = trimtab.prune(model(), INPUTS[:1], evaluate=accuracy, fine_tune=fine_tune, n_best=2, **SMALL)
    assert [c.failure for c in result.report.candidates if c.failure] == ["AttributeError: no such thing"]


def test_scores_of_other_weights_are_not_believed(tmp_path: Path) -> None:
    options = {**SMALL, "evaluate": accuracy, "checkpoint": tmp_path / "search"}
    trimtab.prune(model(0), INPUTS[:1], **options)
    with pytest.raises(InputError, match="holds another search: model differ; give the arguments of then"):
        trimtab.prune(model(1), INPUTS[:1], **options)
    pair = {**SMALL, "validation": (INPUTS, TARGETS), "checkpoint": tmp_path / "pair"}
    trimtab.prune(model(0), INPUTS[:1], **pair)
    with pytest.raises(InputError, match="holds another search: validation differ"):
        trimtab.prune(model(0), INPUTS[:1], **{**pair, "validation": (INPUTS, TARGETS.flip(0))})


def test_a_later_stage_believes_no_score_of_another_fine_tuning(tmp_path: Path) -> None:
    def prune(amount: float) -> int:
        n_calls = 0

        def evaluate(net: nn.Module) -> float:
            nonlocal n_calls
            n_calls += 1
            return accuracy(net)

        def fine_tune(net: nn.Module) -> None:
            net[4].bias.data += amount

        trimtab.prune(
            model(), INPUTS[:1], evaluate=evaluate, fine_tune=fine_tune, agent="uniform", stages=2, max_evaluations=16,
            checkpoint=tmp_path / "search",
        )  # fmt: skip
        return n_calls

    # Of each stage the dense network and one configuration, and the candidate after fine-tuning.
    assert [prune(0.1), prune(0.1), prune(0.2)] == [6, 2, 4]


def test_a_torn_last_line_is_repaired(tmp_path: Path) -> None:
    n_calls = 0

    def evaluate(net: nn.Module) -> float:
        nonlocal n_calls
        n_calls += 1
        return accuracy(net)

    options = {**SMALL, "evaluate": evaluate, "checkpoint": tmp_path / "search"}
    whole = trimtab.prune(model(), INPUTS[:1], **options)
    log = tmp_path / "search" / "evaluations-1.jsonl"
    lines = log.read_text()
    log.write_text(lines[:-12])
    n_calls = 0
    assert trimtab.prune(model(), INPUTS[:1], **options).report == whole.report
    assert (n_calls, log.read_text()) == (1, lines)


def test_failures_are_known_after_a_resume(tmp_path: Path) -> None:
    def evaluate(net: nn.Module) -> float:
        if widths_of(net) == (24, 8):
            raise ValueError("narrow")
        return sum(widths_of(net)) / 100

    options = {"evaluate": evaluate, "target": {"flops": 0.5}, "agent": "exhaustive"}
    whole = trimtab.prune(model(), INPUTS[:1], **options, checkpoint=tmp_path / "search")
    assert whole.report.failed == 1
    again = trimtab.prune(model(), INPUTS[:1], **options, checkpoint=tmp_path / "search")
    assert again.report == whole.report
    assert "evaluate raised ValueError for the network with widths (24, 8): narrow" in again.report.notes[0]


@pytest.mark.parametrize("agent", ["ppo", "random-search", "uniform"])
def test_a_stage_that_has_nothing_left_to_do_is_left_out(agent: str) -> None:
    tiny = nn.Sequential(nn.Linear(6, 2), nn.ReLU(), nn.Linear(2, 3))  # one unit is all that half of it leaves
    calls: list[int] = []
    result = trimtab.prune(
        tiny, INPUTS[:1], validation=(INPUTS, TARGETS), fine_tune=lambda net: calls.append(net[0].out_features),
        target={"flops": 0.5}, stages=2, max_evaluations=16, agent=agent,
    )  # fmt: skip
    assert result.report.widths == {"0": (2, 1)}
    assert calls == [1]


def test_paper_takes_one_of_evaluate_and_validation() -> None:
    with pytest.raises(InputError, match="both of evaluate= and validation= given"):
        trimtab.prune(
            model(), INPUTS[:1], agent="paper", evaluate=accuracy, validation=(INPUTS, TARGETS),
            fine_tune=lambda net: None, **SMALL,
        )  # fmt: skip


def test_names_paths_and_functions_are_that() -> None:
    good = {**SMALL, "validation": (INPUTS, TARGETS)}
    for changes, text in [
        ({"ignore": "conv1"}, r"ignore is 'conv1'; expected a list of names, such as \['conv1'\]; \[\] for none"),
        ({"ignore": None}, "ignore is None; expected a list of names"),
        ({"ignore": [0, "2"]}, r"ignore is \[0, '2'\]; expected a list of names"),
        ({"baselines": "uniform"}, "baselines is 'uniform'; expected a list of names"),
        ({"checkpoint": 3}, "checkpoint is 3; expected a folder's path, or None"),
        ({"on_news": 3}, "on_news is int; expected a function of the news, or None"),
    ]:
        with pytest.raises(InputError, match=text):
            trimtab.prune(model(), INPUTS[:1], **{**good, **changes})


def test_a_default_type_of_double_is_none_of_the_policys_business() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        result = trimtab.prune(
            model(),
            INPUTS[:1].double(),
            validation=(INPUTS.double(), TARGETS),
            target={"flops": 0.6},
            max_evaluations=24,
        )
    finally:
        torch.set_default_dtype(before)
    assert result.report.pruned.flops <= 0.6 * result.report.dense.flops


def test_parametrized_weights_are_named_and_end_in_no_crash() -> None:
    net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), *model())
    net[2] = nn.Linear(32, 32)
    nn.utils.parametrizations.weight_norm(net[4])
    result = trimtab.prune(net, INPUTS[:1], validation=(INPUTS, TARGETS), agent="uniform", target={"flops": 0.8})
    assert result.report.refused["4"] == "no rule says what the units of ParametrizedLinear are coupled to"
    assert result.report.widths["0"][1] < 32
    assert result.report.pruned.flops <= 0.8 * result.report.dense.flops


def test_a_target_that_only_taking_layers_out_reaches() -> None:
    net = nn.Sequential(*(layer for n in (6, 32, 32) for layer in (nn.Linear(n, 32), nn.ReLU())), nn.Linear(32, 3))
    # Of 8 units each 6 * 8 + 2 * 64 + 24 of 6 * 32 + 2 * 1024 + 96 products are left, without the two in the middle 72.
    options = {"validation": (INPUTS, TARGETS), "max_evaluations": 8}
    for agent in ("ppo", "random-search", "uniform", "global", "greedy", "exhaustive"):
        result = trimtab.prune(net, INPUTS[:1], target={"flops": 0.05}, agent=agent, **options)
        assert result.report.pruned.flops <= 0.05 * result.report.dense.flops
        assert (result.model(INPUTS).argmax(1) == TARGETS).double().mean() == pytest.approx(result.report.pruned.score)
    with pytest.raises(
        InputError, match=r"target flops 0\.03 cannot be reached.* 0\.0308 of the dense network's flops"
    ):
        trimtab.prune(net, INPUTS[:1], target={"flops": 0.03}, **options)


@pytest.mark.parametrize(
    ("agent", "text"),
    [("greedy", "no configuration within the budget has a score"), ("random-units", "ValueError was")],
)
def test_rules_that_end_without_a_score_say_so(agent: str, text: str) -> None:
    def evaluate(net: nn.Module) -> float:
        if agent == "greedy" and sum(widths_of(net)) > 80:
            return 0.5
        if widths_of(net) != (32, 64):
            raise ValueError("boom")
        return 0.5

    with pytest.raises((InputError, RunFailedError), match=text):
        trimtab.prune(model(), INPUTS[:1], evaluate=evaluate, agent=agent, **SMALL)
