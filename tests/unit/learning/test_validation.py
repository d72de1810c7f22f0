"""Validation: equal episodes for all who are compared, and the numbers that say who is better."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from trimtab.envs.batched import TrainingVectorEnv
from trimtab.envs.episodes import EpisodeOptions, count_decisions, fitting_horizon
from trimtab.envs.specs import default_spec
from trimtab.errors import InputError
from trimtab.learning import validation
from trimtab.learning.validation import compare, overall, plan_episodes, play, play_rival, rivals_of, validate
from trimtab.spec import ControlSpec, make_agent

OPTIONS = EpisodeOptions(families=("quadratic",), runs_per_task=2, horizon=(50, 60))
SPEC = default_spec(n_decisions=4, early_decisions=2)


@pytest.mark.parametrize("wished", [50, 51, 60, 97, 200, 333, 1000, 1999])
def test_a_budget_that_fits_two_timings(wished):
    timings = (default_spec().timing, rivals_of(SPEC)["uwhg"][1].timing)
    assert [timing.early_decisions for timing in timings] == [6, 7]
    fitted = fitting_horizon(wished, *timings)
    assert [count_decisions(fitted, timing) for timing in timings] == [26, 27]
    assert fitted == fitting_horizon(wished, *reversed(timings))
    assert abs(fitted - wished) < max(30, 0.1 * wished)
    nearer = range(wished - abs(fitted - wished) + 1, wished + abs(fitted - wished))
    assert not [n for n in nearer if [count_decisions(n, timing) for timing in timings] == [26, 27]]


def test_all_who_are_compared_play_the_very_same_episodes():
    plan = plan_episodes(SPEC, OPTIONS, num_envs=4, episodes=1, seed=3)
    specs = [SPEC, *(spec for _, spec in rivals_of(SPEC).values())]
    assert len({spec.timing for spec in specs}) == 2
    seen = []
    for spec in specs:
        envs = TrainingVectorEnv(
            4, ("quadratic",), spec, also_fit=plan.timings, runs_per_task=2, horizon=(50, 60), max_cnn_horizon=60
        )
        _, infos = envs.reset(seed=11)
        seeds = [batch.seeds for batch in envs._runs._batches]
        tasks = [task.train.inputs.sum().item() for batch in envs._runs._batches for task in batch.tasks]
        seen.append((envs.total_steps.tolist(), infos["lr"].tolist(), infos["group"].tolist(), seeds, tasks))
    assert seen[0] == seen[1] == seen[2]
    alone = TrainingVectorEnv(4, ("quadratic",), SPEC, runs_per_task=2, horizon=(50, 60), max_cnn_horizon=60)
    alone.reset(seed=11)
    assert count_decisions(int(alone.total_steps[0]), specs[1].timing) != 27  # so it was the fitting that did it


def test_total_steps_before_reset():
    with pytest.raises(InputError, match=r"total_steps before reset\(\)"):
        TrainingVectorEnv(2).total_steps  # noqa: B018


def test_the_rule_is_as_good_as_itself():
    rule = make_agent("uwhg")
    table = validate(rule, ControlSpec.for_agent(rule), OPTIONS, num_envs=4, episodes=2, seed=1)
    numbers = table["quadratic"]
    assert (numbers["ratio_uwhg"], numbers["log_se_uwhg"]) == (1.0, 0.0)
    assert (numbers["n_tasks"], numbers["n_runs"]) == (4, 8)
    assert numbers["ratio_cosine"] < 1.0  # from rates of 1e-5 to 1e-1 the cosine does badly
    assert 1.0 <= numbers["mean_rank"] <= 2.5  # it shares its rank with itself


def test_the_numbers_of_a_comparison():
    mine = {"mlp": {"task": [0, 0, 1, 1], "loss": [1.0, 3.0, 2.0, 2.0], "rolled_back": [0, 1, 0, 0]}}
    uwhg = {"mlp": {"task": [0, 0, 1, 1], "loss": [2.0, 2.0, 1.0, 1.0], "rolled_back": [0, 0, 0, 0]}}
    cosine = {"mlp": {"task": [0, 0, 1, 1], "loss": [4.0, 4.0, 2.0, 8.0], "rolled_back": [0, 0, 0, 0]}}
    numbers = compare(mine, {"uwhg": uwhg, "cosine": cosine})["mlp"]
    assert numbers["ratio_uwhg"] == pytest.approx(math.sqrt(2.0))  # tasks: 4 / 4 and 4 / 2
    assert numbers["log_se_uwhg"] == pytest.approx(math.log(2.0) / 2)  # sd is log 2 / sqrt 2
    assert numbers["ratio_cosine"] == pytest.approx(math.sqrt(4 / 8 * 4 / 10))
    assert numbers["mean_rank"] == pytest.approx((1 + 2 + 2.5 + 2) / 4)
    assert numbers["rolled_back"] == 0.25
    table = {"mlp": {"ratio_uwhg": 2.0}, "cnn": {"ratio_uwhg": 0.5}, "quadratic": {"ratio_uwhg": 9.0}}
    assert overall(table, ["mlp", "cnn"]) == pytest.approx(1.0)
    uwhg["mlp"]["task"] = [0, 0, 1, 2]
    with pytest.raises(InputError, match="rival 'uwhg' did not play the same tasks of family 'mlp'"):
        compare(mine, {"uwhg": uwhg})


def test_losses_are_clipped_away_from_nothing_and_from_the_infinite():
    assert validation._clip([0.0, 1e-9, 0.5, 1e9, np.inf, np.nan]).tolist() == [1e-3, 1e-3, 0.5, 100, 100, 100]


def test_playing_is_repeatable_and_depends_on_the_seed():
    plan = plan_episodes(SPEC, OPTIONS, num_envs=4, episodes=2, seed=3)
    agent = make_agent("ppo", {"n_decisions": 4, "early_decisions": 2})
    first = play(agent, SPEC, plan)
    assert play(agent, SPEC, plan) == first
    assert play(agent, SPEC, replace(plan, seed=4)) != first
    assert first["quadratic"]["task"] == [0, 0, 1, 1, 4, 4, 5, 5]
    with pytest.raises(InputError, match="episodes is 0; expected a whole number of 1 or more"):
        play(agent, SPEC, replace(plan, episodes=0))


def test_a_rival_plays_once_and_is_then_read(tmp_path, monkeypatch):
    plan = plan_episodes(SPEC, OPTIONS, num_envs=2, episodes=1, seed=3)
    played = play_rival("uwhg", SPEC, plan, tmp_path)
    (path,) = tmp_path.iterdir()
    assert path.name == "uwhg-0000000000000003.json"
    kept = json.loads(path.read_text())
    assert kept["played"] == played
    assert kept["cpu_s"] > 0
    asked = []
    monkeypatch.setattr(validation, "play", lambda *given: asked.append(given) or played)
    assert play_rival("uwhg", SPEC, plan, tmp_path) == played
    assert asked == []
    # Of other episodes, or a torn file, nothing is believed.
    play_rival("uwhg", SPEC, replace(plan, num_envs=4), tmp_path)
    assert len(asked) == 1


def test_without_a_known_budget_the_rule_has_no_cosine_either():
    spec = default_spec(base="constant")
    assert rivals_of(spec)["uwhg"][1].base.name == "constant"
    assert rivals_of(spec)["cosine"][1].base.name == "cosine"
