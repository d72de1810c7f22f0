"""trimtab/Pruning-v0: a pass over the parts, a budget that holds whatever is done, and the score as the reward."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from torch import nn

import trimtab.envs
from trimtab.envs.pruning import FEATURES, Problem, PruningEnv, asked_width, clipped
from trimtab.errors import InputError
from trimtab.pruning.budget import Budget, Target
from trimtab.pruning.network import PrunableNetwork
from trimtab.pruning.parts import Part


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(),
                             nn.Linear(16, 3))  # fmt: skip


def problem(target: float = 0.5, score: object = None) -> Problem:
    network = PrunableNetwork(model(), torch.zeros(1, 6))
    budget = Budget(network, Target.parse({"flops": target}))
    return Problem(network, budget, score or (lambda widths: sum(widths) / 100), 0.8)


def test_made_by_gymnasium() -> None:
    inputs, targets = torch.randn(20, 6), torch.arange(20) % 3
    env = gymnasium.make(
        trimtab.envs.PRUNING, model=model(), example_inputs=inputs[:1], validation=(inputs, targets),
        target={"flops": 0.5},
    )  # fmt: skip
    check_env(env.unwrapped, skip_render_check=True)
    env.reset(seed=0)
    for _ in range(2):
        _, reward, terminated, truncated, info = env.step(16)
        assert (reward, terminated, truncated, info) == (0.0, False, False, {})
    _, reward, terminated, truncated, info = env.step(16)
    assert terminated
    assert not truncated
    assert reward == info["score"]
    pruned = env.unwrapped.problem.network.cut(info["widths"])
    assert reward == pytest.approx(float((pruned(inputs).argmax(1) == targets).double().mean()))
    assert info["share"] <= 0.5


@pytest.mark.parametrize("target", [0.1, 0.3, 0.5, 0.9])
def test_the_budget_holds_whatever_is_done(target: float) -> None:
    env = PruningEnv(problem=problem(target))
    rng = np.random.default_rng(0)
    for actions in [(16, 16, 16), (0, 0, 0), (1, 16, 1), *(tuple(rng.integers(0, 17, 3)) for _ in range(200))]:
        observation, _ = env.reset()
        for action in actions:
            assert env.observation_space.contains(observation)
            observation, _, terminated, _, info = env.step(int(action))
        assert terminated
        assert env.problem.budget.fits(info["widths"])


def test_actions_are_sixteenths_on_the_grid() -> None:
    part = Part("fc", "Linear", 64, (0, 8, 16, 24, 32, 40, 48, 56, 64), ("fc",))
    assert [asked_width(part, action) for action in (0, 1, 2, 3, 8, 16)] == [0, 8, 8, 8, 32, 64]
    assert [asked_width(Part("fc", "Linear", 12, (3, 6, 9, 12), ("fc",)), a) for a in (0, 7, 16)] == [3, 6, 12]
    assert clipped(64, (8, 16, 24)) == 24
    assert clipped(0, (8, 16)) == 8  # taking the layer out would cost more here
    assert clipped(20, (0, 8, 32)) == 8


def test_what_is_observed() -> None:
    given = problem(0.5)
    env = PruningEnv(problem=given)
    observation, _ = env.reset()
    seen = dict(zip(FEATURES, observation.tolist(), strict=True))
    macs = 6 * 32 + 32 * 32 + 32 * 16 + 16 * 3
    assert seen["place"] == 0
    assert seen["is linear"] == 1
    assert seen["log size"] == pytest.approx(5 / 12)
    assert seen["share of cost"] == pytest.approx((6 + 32) * 24 / macs, rel=1e-5)  # 8 of its 32 units are the fewest
    assert seen["can be taken out"] == 0
    assert seen["knows alone"] == 0
    assert (seen["target"], seen["cost so far"], seen["last width"], seen["parts left"]) == (0.5, 1, 1, 1)
    smallest = 6 * 8 + 8 * 8 + 8 * 4 + 4 * 3
    assert seen["least cost"] == pytest.approx(smallest / macs, rel=1e-5)
    assert seen["slack"] == pytest.approx((0.5 - smallest / macs) / (1 - smallest / macs), rel=1e-5)
    square = given.network.scores[0].square().sort(descending=True).values
    assert seen["importance in first 0.5"] == pytest.approx(float(square[:16].sum() / square.sum()), rel=1e-5)
    env.step(8)
    second = dict(zip(FEATURES, env.step(4)[0].tolist(), strict=True))
    assert second["place"] == 1
    assert second["can be taken out"] == 0
    assert second["last width"] == 0.25
    alone = PruningEnv(problem=Problem(given.network, given.budget, given.score, 0.8, np.full((3, 2), 0.6)))
    first = dict(zip(FEATURES, alone.reset()[0].tolist(), strict=True))
    assert first["knows alone"] == 1
    assert first["kept at 0.5 alone"] == pytest.approx(0.75)


def test_rewards() -> None:
    each = PruningEnv(problem=problem(0.9), reward="each")
    each.reset()
    _, reward, terminated, _, info = each.step(8)
    assert info["widths"] == (16, 32, 16)
    assert reward == pytest.approx(0.64 + 1 - info["share"])
    assert not terminated
    failing = PruningEnv(problem=problem(0.9, lambda widths: -np.inf))
    failing.reset()
    assert [failing.step(8)[1] for _ in range(3)] == [0, 0, 0]


def test_a_new_problem_in_each_episode() -> None:
    env = PruningEnv(problem=lambda rng: problem(float(rng.uniform(0.2, 0.9))))
    targets = []
    for seed in (0, 0, 1):
        observation, _ = env.reset(seed=seed)
        targets.append(float(observation[FEATURES.index("target")]))
    assert targets[0] == targets[1] != targets[2]


def test_bad_input_is_one_error() -> None:
    env = PruningEnv(problem=problem())
    inputs = torch.randn(4, 6)
    for call, text in [
        (lambda: PruningEnv(), "give either model="),
        (lambda: PruningEnv(problem=problem(), reward="every"), "reward 'every'"),
        (lambda: PruningEnv(model(), inputs, target={"flops": 0.5}), "neither of evaluate= and validation= given"),
        (lambda: PruningEnv(model(), inputs, target={"latency": 0.5}), "target latency has to be measured first"),
        (lambda: PruningEnv(model(), inputs, target={"flops": 2}), "target flops is 2"),
        (
            lambda: PruningEnv(model(), inputs, target={"flops": 0.5}, validation=3),
            "validation is int; expected a pair",
        ),
        (lambda: env.reset(options={"x": 1}), r"options \['x'\]; trimtab/Pruning-v0 takes none"),
        (lambda: PruningEnv(problem=lambda rng: problem()).step(0), r"call reset\(\) first"),
    ]:
        with pytest.raises(InputError, match=text):
            call()
    env.reset()
    with pytest.raises(InputError, match="action 17; expected 0 to 16"):
        env.step(17)
    for _ in range(3):
        env.step(0)
    with pytest.raises(InputError, match="the episode is over"):
        env.step(0)
