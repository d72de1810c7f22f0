"""What an intervention changes: spaces as columns and back, never "no change", and what is learned of a known best."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from trimtab.agents.intervention import Batch
from trimtab.agents.proposals import KINDS, ActionCode, Proposals
from trimtab.errors import InputError


def make(kind: str, space: Any, no_change: Any = None, **changes: Any) -> Proposals:
    options = {"learning_rate": 3e-3, "n_steps": 256, "batch_size": 64, "gamma": 0.9, "seed": 1, **changes}
    return KINDS[kind](2, ActionCode(space, no_change), **options)


SPACES = [
    (spaces.Discrete(5, start=3), 4),
    (spaces.MultiDiscrete([3, 2, 4]), np.array([2, 0, 3])),
    (spaces.MultiBinary(3), np.array([1, 0, 1], dtype=np.int8)),
    (spaces.Box(np.array([-1.0, 10.0], np.float32), np.array([3.0, 20.0], np.float32)), np.array([2.0, 11.0])),
    (spaces.Box(-np.inf, np.inf, (2,)), np.array([0.25, -4.0])),
    (spaces.Box(0.0, 1.0, (2, 2)), np.array([[0.0, 1.0], [0.5, 0.25]])),
]


@pytest.mark.parametrize(("space", "action"), SPACES, ids=[str(space) for space, _ in SPACES])
def test_actions_survive_the_way_to_columns_and_back(space: Any, action: Any) -> None:
    code = ActionCode(space)
    back = code.decode(code.encode(action))
    assert space.contains(back)
    assert np.asarray(back) == pytest.approx(np.asarray(action), abs=1e-6)


def test_a_box_is_stretched_to_its_bounds_and_never_left() -> None:
    code = ActionCode(SPACES[3][0])
    assert code.encode(np.array([-1.0, 20.0])) == pytest.approx([-1.0, 1.0])
    assert code.decode(np.array([7.0, -7.0])) == pytest.approx([3.0, 10.0])


@pytest.mark.parametrize(
    ("space", "text"),
    [
        (spaces.MultiDiscrete([[2, 2], [2, 2]]), "expected Discrete, MultiDiscrete or MultiBinary with one axis"),
        (spaces.Box(0, 9, (2,), np.int64), "or a Box of floats"),
        (spaces.Dict({"a": spaces.Discrete(2)}), "action space Dict"),
        (spaces.Box(0.0, 1.0, (0,)), "has nothing to choose"),
    ],
)
def test_other_spaces_are_refused_by_name(space: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        ActionCode(space)


def test_an_action_outside_of_the_space_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"action 7 is not in the action space Discrete\(5, start=3\)|not in the action"
    ):
        ActionCode(spaces.Discrete(3), 7)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize(
    ("space", "nothing"), [(spaces.Discrete(3), 1), (spaces.MultiDiscrete([3, 3]), np.array([1, 1]))]
)
def test_no_change_is_never_proposed(kind: str, space: Any, nothing: Any) -> None:
    proposals = make(kind, space, nothing)
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(300, 2))).float()
    for rng in (None, np.random.default_rng(1)):
        actions = proposals.propose(x, rng)
        assert actions.shape == (300, len(np.atleast_1d(nothing)))
        assert not (actions == np.atleast_1d(nothing)).all(1).any()
        assert ((actions >= 0) & (actions < 3)).all()


def bandit(n: int, space: Any, proposals: Proposals, seed: int) -> tuple[Batch, torch.Tensor]:
    """Interventions of which the one with the last choice in its first column gives 1, all others 0."""
    rng = np.random.default_rng(seed)
    seen = rng.normal(size=(n, 2))
    x = torch.from_numpy(seen).float()
    actions = proposals.propose(x, rng)
    best = ActionCode(space).sizes[0] - 1
    batch = Batch(
        seen,
        actions,
        (actions[:, 0] == best).astype(np.float64),
        seen,
        np.ones(n, dtype=np.bool_),
        np.ones(n, dtype=np.bool_),
        proposals.log_prob(x, actions),
        np.arange(n),
    )
    return batch, x


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_they_learn_a_known_best(kind: str) -> None:
    space = spaces.MultiDiscrete([3, 2])
    proposals = make(kind, space)
    for seed in range(8):
        batch, x = bandit(256, space, proposals, seed)
        gains = batch.rewards - batch.rewards.mean()
        proposals.learn(batch, x, x, gains, gains, 2000)
    chosen = proposals.propose(x, None)
    assert (chosen[:, 0] == 2).mean() > 0.95


def test_probabilities_are_those_of_the_policy() -> None:
    proposals = make("ppo", spaces.MultiDiscrete([3, 2]))
    x = torch.zeros(1, 2)
    parts, _ = proposals._distribution(x)  # type: ignore[attr-defined]
    for first in range(3):
        for second in range(2):
            expected = math.log(parts[0][0, first] * parts[1][0, second])
            found = proposals.log_prob(x, np.array([[first, second]], dtype=np.float64))[0]
            assert found == pytest.approx(expected, abs=1e-5)


def test_ppo_leaves_out_what_its_policy_has_moved_away_from() -> None:
    """A probability that has doubled is left out; with too few left nothing is learned."""
    proposals = make("ppo", spaces.Discrete(3))
    batch, x = bandit(128, spaces.Discrete(3), proposals, 0)
    stale = batch._replace(log_probs=batch.log_probs - math.log(2.01))
    before = proposals.state_dict()
    proposals.learn(stale, x, x, batch.rewards, batch.rewards, 1000)
    after = proposals.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items() if isinstance(v, torch.Tensor))
    near = batch._replace(log_probs=batch.log_probs - math.log(1.99))
    proposals.learn(near, x, x, batch.rewards, batch.rewards - 0.3, 1000)
    assert not torch.equal(proposals.state_dict()["policy.action_net.weight"], before["policy.action_net.weight"])


def test_dqn_leaves_things_alone_by_an_action_of_its_own() -> None:
    """Not intervening gave 1, whatever was proposed: the value of the last, own action rises to it."""
    proposals = make("dqn", spaces.Discrete(2))
    batch, x = bandit(256, spaces.Discrete(2), proposals, 0)
    left_alone = batch._replace(intervened=np.arange(256) % 2 == 0)
    rewards = np.where(left_alone.intervened, 0.0, 1.0)
    for _ in range(6):
        proposals.learn(left_alone, x, x, rewards, rewards, 3000)
    with torch.no_grad():
        values = proposals.model.q_net(x).mean(0)  # type: ignore[attr-defined]
    assert values.tolist() == pytest.approx([0.0, 0.0, 1.0], abs=0.1)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_saved_learner_goes_on_to_the_bit(kind: str) -> None:
    space = spaces.MultiDiscrete([3, 2])
    first, second = make(kind, space), make(kind, space, seed=9)
    batch, x = bandit(256, space, first, 0)
    first.learn(batch, x, x, batch.rewards, batch.rewards - 0.4, 600)
    second.load_state_dict(first.state_dict())
    second._seed = first._seed
    for proposals in (first, second):
        proposals.learn(batch, x, x, batch.rewards, batch.rewards - 0.4, 600)
    one, two = first.state_dict(), second.state_dict()
    assert all(torch.equal(one[k], v) if isinstance(v, torch.Tensor) else one[k] == v for k, v in two.items())


def test_what_does_not_suit_is_refused() -> None:
    with pytest.raises(InputError, match=r"dqn has a value for each joint action, and Box.* has a continuum"):
        make("dqn", spaces.Box(0.0, 1.0, (2,)))
    with pytest.raises(InputError, match="has 6561; expected at most 1000: take agent 'ppo'"):
        make("dqn", spaces.MultiDiscrete([9, 9, 9, 9]))
    with pytest.raises(InputError, match="proposals: the state has the keys"):
        make("ppo", spaces.Discrete(2)).load_state_dict({})
    with pytest.raises(InputError, match="does not have the shape"):
        make("ppo", spaces.Discrete(2)).load_state_dict(make("ppo", spaces.Discrete(3)).state_dict())
