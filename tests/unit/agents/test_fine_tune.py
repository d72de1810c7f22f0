"""Teaching a policy on: advantages in closed form, where the update goes, how far, and what it leaves alone."""

from __future__ import annotations

import numpy as np
import pytest

from trimtab.agents.fine_tune import MAX_KL, advantages_of
from trimtab.agents.policy import PPOAgent
from trimtab.errors import InputError
from trimtab.experiments.fine_tuning import Explorer, check_fine_tuning

SIGNALS = ["progress", "loss_slope"]
MOVES = [-1.0, 0.0, 1.0]


def agent(**options) -> PPOAgent:
    return PPOAgent(**{"signals": SIGNALS, "moves": MOVES, "hidden": [8], "members": 2, **options})


def runs(n: int = 60):
    """Runs of one decision: a rise gains 1, everything else nothing."""
    rng = np.random.default_rng(0)
    seen = rng.uniform(0.0, 1.0, (n, 2))
    moves = rng.choice(MOVES, (n, 1))
    return seen, moves, (moves[:, 0] == 1.0).astype(float), seen, np.ones(n, dtype=np.bool_)


def test_advantages_are_what_followed_less_the_mean_of_the_other_runs():
    rewards = np.array([1.0, 2.0, 3.0, 6.0])  # two runs: what follows is [3, 2] and [9, 6]
    found = advantages_of(rewards, np.array([False, True, False, True]))
    away = np.array([-3.0, -2.0, 3.0, 2.0])
    assert found == pytest.approx(away / np.sqrt(6.5))


def test_runs_may_have_different_lengths():
    found = advantages_of(np.array([1.0, 1.0, 4.0]), np.array([False, True, True]))  # what follows: [2, 1] and [4]
    away = np.array([-1.0, 0.0, 1.0])
    assert found == pytest.approx(away / np.sqrt(2 / 3))


def test_a_single_run_teaches_nothing():
    taught = agent()
    before = taught.state_dict()
    seen, moves, gains, then, _ = runs(5)
    taught.learn_from_earlier(seen, moves, gains, then, np.array([False] * 4 + [True]))
    after = taught.state_dict()
    assert all(np.array_equal(before[key], after[key]) for key in before if key != "rng")


def test_what_paid_becomes_likelier_and_not_by_much():
    taught = agent()
    seen, *_ = data = runs()
    before = taught.probabilities(seen)[:, 0]
    taught.learn_from_earlier(*data)
    after = taught.probabilities(seen)[:, 0]
    assert after[:, 2].mean() > before[:, 2].mean() + 0.01
    divergence = (before * np.log(before / after)).sum(axis=1).mean()
    assert 0 < divergence <= MAX_KL
    assert after.sum(axis=1) == pytest.approx(np.ones(len(seen)))


def test_what_it_did_not_choose_is_not_learned_from():
    taught = agent()
    before = taught.state_dict()
    seen, moves, gains, then, ends = runs()
    taught.learn_from_earlier(seen, moves + 0.3, gains, then, ends)
    after = taught.state_dict()
    assert all(np.array_equal(before[key], after[key]) for key in before if key != "rng")


def test_a_policy_that_corrects_a_rule_is_refused():
    with pytest.raises(InputError, match="ppo: what it chose cannot be told from its actions"):
        PPOAgent(residual="uwhg").learn_from_earlier(*runs(5))


def test_a_keep_that_was_forced_is_not_learned_from():
    signals = ["progress", "update_to_weight"]
    seen, moves, gains, then, ends = runs()
    seen[:, 1] = 0.0  # exactly 0: no update was measured, and whatever it chose, nothing moved
    forced = agent(signals=signals)
    before = forced.state_dict()
    assert (forced.predict(seen)[0] == 0).all()
    forced.learn_from_earlier(seen, 0 * moves, gains, then, ends)
    after = forced.state_dict()
    assert all(np.array_equal(before[key], after[key]) for key in before if key != "rng")


def test_what_would_be_refused_after_the_earlier_runs_is_refused_before_them():
    check_fine_tuning(agent())
    with pytest.raises(InputError, match="ppo: what it chose cannot be told from its actions"):
        check_fine_tuning(PPOAgent(residual="uwhg"))
    with pytest.raises(InputError, match=r"residual None, 2 knobs"):
        check_fine_tuning(agent(n_knobs=2))


def test_decisions_stand_beside_each_other_where_the_guard_took_the_place_of_one(monkeypatch):
    taught, given = agent(), []
    monkeypatch.setattr(taught, "learn_from_earlier", lambda *columns: given.extend(columns))
    explorer = Explorer(taught)
    for rolled_back in (None, 1):
        explorer.begin_run()
        explorer.predict(np.zeros((1, 2)), deterministic=True)  # a controller tries it once before the first step
        for decision in range(3):
            now = np.array([[decision / 3, 0.0]])
            action, _ = explorer.predict(now)
            if decision != rolled_back:  # the controller says nothing of a decision that the guard made
                explorer.update(now, action, np.array([1.0 + decision]), now + 1 / 3, np.array([False]))
    assert explorer.teach() == 5
    seen, did, got, _, ends = given
    assert seen[:, 0].tolist() == pytest.approx([0, 1 / 3, 2 / 3] * 2)
    assert np.isnan(did[:, 0]).tolist() == [False, False, False, False, True, False]
    assert got.tolist() == [1.0, 2.0, 3.0, 1.0, 0.0, 3.0]
    assert ends.tolist() == [False, False, True] * 2
    assert advantages_of(got, ends)[[2, 5]].tolist() == [0.0, 0.0]  # the same decision with the same reward


def test_where_the_guard_acted_nothing_is_learned_from():
    seen, moves, gains, then, ends = runs()
    taught = agent()
    before = taught.state_dict()
    taught.learn_from_earlier(seen, np.full_like(moves, np.nan), gains, then, ends)
    after = taught.state_dict()
    assert all(np.array_equal(before[key], after[key]) for key in before if key != "rng")
