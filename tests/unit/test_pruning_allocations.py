"""Budgets and rules without learning: they come as near to the budget as the widths allow, and never above it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from trimtab.errors import InputError
from trimtab.pruning.allocations import by_threshold, draw, every, greedy, on_grid, uniform
from trimtab.pruning.budget import Budget, Target
from trimtab.pruning.network import PrunableNetwork


def net() -> PrunableNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 64),
            nn.ReLU(), nn.Linear(64, 5),
        )  # fmt: skip
    return PrunableNetwork(model, torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize("target", [{"flops": 0.25}, {"flops": 0.5}, {"params": 0.5}, {"flops": 0.9}])
def test_rules_use_the_budget_up(target: dict[str, float]) -> None:
    network = net()
    budget = Budget(network, Target.parse(target))
    for configuration in (uniform(budget), by_threshold(budget, "global"), by_threshold(budget, "lamp")):
        assert budget.fits(configuration)
        wider = tuple(min(width + 2, size) for width, size in zip(configuration, network.dense, strict=True))
        assert not budget.fits(wider), configuration
        grid = on_grid(budget, configuration)
        assert budget.fits(grid)
        assert all(width in part.widths for width, part in zip(grid, network.parts, strict=True))


@pytest.mark.parametrize("target", [{"flops": 0.25}, {"params": 0.5}])
def test_every_configuration_within_the_budget_is_found_once(
    target: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = net()
    budget = Budget(network, Target.parse(target))
    found = every(budget)
    assert len(found) == len(set(found)) > 10
    assert set(found) == {c for c in itertools.product(*(part.widths for part in network.parts)) if budget.fits(c)}
    monkeypatch.setattr("trimtab.pruning.allocations._MOST", 127)  # 4 widths of both convolutions, 8 of the dense layer
    with pytest.raises(InputError, match="the network has 128 configurations and all of them were to be scored"):
        every(budget)


def test_uniform_is_the_same_share_everywhere() -> None:
    network = net()
    configuration = uniform(Budget(network, Target.parse({"flops": 0.5})))
    shares = [width / size for width, size in zip(configuration, network.dense, strict=True)]
    assert max(shares) - min(shares) < 1 / 16  # a unit of the narrowest
    assert configuration == (11, 22, 45)  # 45 of 64, and as much of the others rounded down


def test_thresholds_by_hand() -> None:
    network = net()
    network.scores = tuple(torch.ones(part.size, dtype=torch.float64) for part in network.parts)
    network.scores[0][:8] = 2.0  # eight units of the first part stand out
    network.orders = tuple(torch.sort(scores, descending=True, stable=True).indices for scores in network.scores)
    budget = Budget(network, Target.parse({"flops": 0.7}))
    # Squares over their mean: 4 / 2.5 and 1 / 2.5 in the first part, 1 in the others, which a threshold of 1 keeps.
    assert by_threshold(budget, "global") == (8, 32, 64)
    network.scores[0][:8] = 1.0
    # Over the sum of those not smaller: 1, 1/2, 1/3, ... in every part, so every part keeps as many units.
    budget = Budget(network, Target.parse({"params": 0.25}))
    n = by_threshold(budget, "lamp")
    assert n[0] == 16
    assert n[1] == n[2]
    assert network.parameters((16, n[1], n[2])) <= 0.25 * network.parameters(network.dense)
    assert network.parameters((16, n[1] + 1, n[2] + 1)) > 0.25 * network.parameters(network.dense)


def test_greedy_takes_what_loses_least() -> None:
    network = net()
    budget = Budget(network, Target.parse({"flops": 0.7}))
    asked = []

    def score(configuration: tuple[int, ...]) -> float:  # only the second part is worth anything
        asked.append(configuration)
        return float(configuration[1])

    assert greedy(budget, score) == (8, 32, 64)  # the first part saves half for nothing
    assert asked[0] == network.dense
    assert len(asked) == 1 + 3 + 3  # one narrower width of each part, twice


def test_draws_are_all_configurations_that_use_the_budget_up() -> None:
    network = net()
    budget = Budget(network, Target.parse({"flops": 0.3}))
    generator = np.random.default_rng(0)
    found = {draw(budget, generator) for _ in range(3000)}
    feasible = {
        (a, b, c)
        for a in network.parts[0].widths for b in network.parts[1].widths for c in network.parts[2].widths
        if budget.fits((a, b, c))
    }  # fmt: skip
    full = {
        widths for widths in feasible
        if not any(other != widths and all(a >= b for a, b in zip(other, widths, strict=True)) for other in feasible)
    }  # fmt: skip
    assert found == full
    assert len(full) < len(feasible)


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (0.5, "target is 0.5; expected {'flops': SHARE}"),
        ({}, "names 0 costs"),
        ({"flops": 0.5, "params": 0.5}, "names 2 costs"),
        ({"flop": 0.5}, "target 'flop'.*did you mean 'flops'"),
        ({"flops": 0}, "target flops is 0; expected"),
        ({"flops": 1.5}, "target flops is 1.5; expected"),
        ({"flops": True}, "target flops is True; expected"),
        ({"flops": float("nan")}, "target flops is nan; expected"),
        ({"flops": "half"}, "target flops is 'half'; expected"),
        ({"flops": 0.5, "batch_size": 8}, "has batch_size 8"),
        ({"latency": 0.5, "batch_size": 0}, "has batch_size 0"),
    ],
)
def test_a_bad_target_is_one_error(target: object, text: str) -> None:
    with pytest.raises(InputError, match=text):
        Target.parse(target)


def test_targets() -> None:
    assert Target.parse({"latency": 0.5}) == Target("latency", 0.5, 1)
    assert Target.parse({"latency": 0.5, "batch_size": 64}).to_dict() == {"latency": 0.5, "batch_size": 64}
    assert Target.parse({"flops": 0.25}).to_dict() == {"flops": 0.25}


def test_a_target_out_of_reach_is_one_error() -> None:
    with pytest.raises(
        InputError, match=r"flops 0\.01 cannot be reached: with every part at its smallest width 0\.\d+"
    ):
        Budget(net(), Target.parse({"flops": 0.01}))
    with pytest.raises(InputError, match="a target of latency needs latencies"):
        Budget(net(), Target.parse({"latency": 0.5}))
