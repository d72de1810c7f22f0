"""Recipes: what a file may say, what is said of a bad one, and what its names become."""

from __future__ import annotations

import os
import re
from dataclasses import replace

import pytest
from tiny_recipe import TINY, write

from trimtab import cli
from trimtab.agents.features import SIGNALS
from trimtab.errors import InputError
from trimtab.learning.learn import learn
from trimtab.learning.parts import check_recipe, episodes_of, learner_seed, make_spec, new_learner, validation_options
from trimtab.learning.recipe import Recipe, load_recipe, recipe_names

BAD = {
    "unknown key": ({"itrations": 3}, "unknown key in bad.yaml 'itrations'; did you mean 'iterations'?"),
    "unknown key below": ({"tasks": {"horizn": [50, 60]}}, "unknown key in tasks of bad.yaml 'horizn'; did you mean"),
    "unknown key of validate": ({"validate": {"evry": 1}}, "unknown key in validate of bad.yaml 'evry'; did you mean"),
    "unknown learner": ({"learner": "pppo"}, "bad.yaml: learner: got 'pppo', expected 'ppo', 'dqn' or 'evolution'"),
    "unknown family": ({"tasks": {"families": ["mpl"]}}, "unknown family in tasks.families 'mpl'; did you mean 'mlp'?"),
    "unknown family held out": (
        {"validate": {"held_out": ["transformer"]}},
        "unknown family in validate.held_out 'transformer'; known: attention, cnn, image_mlp, mlp, quadratic, recurr",
    ),
    "unknown option": ({"options": {"hiden": [4]}}, "unknown option of learner 'ppo' 'hiden'; did you mean 'hidden'?"),
    "option of the spec": (
        {"options": {"n_decisions": 3}},
        "option 'n_decisions' of learner 'ppo' is set by the spec or the call, leave it out",
    ),
    "unknown signal": ({"spec": {"signals": ["progres"]}}, "unknown signal 'progres'; did you mean 'progress'?"),
    "unknown reward": ({"spec": {"reward": "rank"}}, "unknown reward 'rank'; did you mean 'score_rank'?"),
    "unknown base": ({"spec": {"base": "cosin"}}, "unknown base schedule 'cosin'; did you mean 'cosine'?"),
    "wrong type": ({"iterations": "many"}, "bad.yaml: iterations: got 'many', expected a whole number of at least 1"),
    "no iterations": ({"iterations": 0}, "bad.yaml: iterations: got 0, expected a whole number of at least 1"),
    "share above 1": (
        {"tasks": {"no_validation": 1.5}},
        "bad.yaml: tasks.no_validation: got 1.5, expected a share in [0, 1]",
    ),
    "shares above 1": ({"tasks": {"no_validation": 0.8, "some_validation": 0.8}}, "expected shares of 1"),
    "missing key": (
        {"tasks": None},
        "bad.yaml: tasks: is missing; every recipe needs recipe, idea, learner, iterations and tasks",
    ),
    "short horizon": ({"tasks": {"horizon": [10, 20]}}, "horizon is (10, 20); expected two numbers in order, 50 or"),
    "held out and trained on": (
        {"validate": {"held_out": ["quadratic"]}},
        "validate.held_out: 'quadratic' is trained on or chosen by, so it is not held out",
    ),
    "ranges that the rule cannot do with": (
        {"keep_ranges": True, "spec": {"signals": ["progress"]}},
        "ppo: the rule 'uwhg' needs the signals update_to_weight, grad_update_cosine, which are not among progress",
    ),
    "knobs without the rate first": (
        {"spec": {"knobs": ["weight_decay", "lr"]}},
        "spec.knobs are ['weight_decay', 'lr']; expected 'lr' first, which is always moved",
    ),
    "unknown knob": ({"spec": {"knobs": ["lr", "droput"]}}, "unknown knob 'droput'; did you mean 'dropout'?"),
    "knob that batches have not": (
        {"spec": {"knobs": ["lr", "beta2"]}},
        "the knob 'beta2' is not known to batches of runs, which have lr, weight_decay, momentum, optimizer, dropout,",
    ),
    "knob of the network's shape": ({"spec": {"knobs": ["lr", "units"]}}, "knob 'units'"),
    "option of a knob that is not there": (
        {"spec": {"knob_options": {"batch_size": {"low": 8}}}},
        "unknown knob with options 'batch_size'; known: lr",
    ),
    "unknown option of a knob": (
        {"spec": {"knobs": ["lr", "batch_size"], "knob_options": {"batch_size": {"lo": 8}}}},
        "unknown option of the knob 'batch_size' 'lo'; did you mean 'low'?",
    ),
    "learner of one knob": (
        {"learner": "dqn", "spec": {"knobs": ["lr", "batch_size"]}, "choose": "best"},
        "dqn moves one knob, the spec has 2; take 'ppo', which chooses for each",
    ),
    "ensemble of one": ({"choose": "ensemble", "seeds": 1}, "choose: 'ensemble' of 1 seed; take 2 seeds or more"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "text"), BAD.values(), ids=BAD.keys())
def test_a_bad_recipe_is_one_error_and_nothing_is_left_behind(tmp_path, monkeypatch, capsys, changes, text):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "bad.yaml", **changes)
    with pytest.raises(InputError) as caught:
        learn("bad.yaml", workers=0)
    assert text in str(caught.value)
    with pytest.raises(SystemExit) as ended:
        cli.main(["learn", "bad.yaml"])
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err) == (2, "", f"trimtab: {caught.value}\n")
    assert os.listdir(tmp_path) == ["bad.yaml"]


def test_agents_of_evolution_cannot_be_joined_and_its_runs_come_in_populations(tmp_path):
    changes = {"learner": "evolution", "options": None}
    with pytest.raises(InputError, match=r"choose: 'best-or-ensemble', but agents of 'evolution' cannot be joined"):
        check_recipe(load_recipe(write(tmp_path, **changes, num_envs=16)))
    with pytest.raises(InputError, match="num_envs is 12; expected a multiple of evolution's population 16"):
        check_recipe(load_recipe(write(tmp_path, **changes, choose="best", num_envs=12)))
    check_recipe(load_recipe(write(tmp_path, **changes, choose="best", num_envs=16)))
    with pytest.raises(InputError, match="keep_ranges: agents of 'evolution' cannot hand over to a rule; leave it out"):
        check_recipe(load_recipe(write(tmp_path, **changes, choose="best", num_envs=16, keep_ranges=True)))
    changes["options"] = {"group_size": 4}
    recipe = Recipe.model_validate({**TINY, **changes, "choose": "best", "num_envs": 16})
    with pytest.raises(InputError, match=r"options.group_size is 4, tasks.runs_per_task 2; they are the same runs"):
        check_recipe(recipe)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "defualt",
            "unknown recipe 'defualt'; did you mean 'default'? known: default, default-open, few-rows, quick, "
            "residual, several-knobs, smoke",
        ),
        (
            "nowhere.yaml",
            "there is no recipe file nowhere.yaml; give a file that is there, or one of: default, default-open, "
            "few-rows, quick, residual, several-knobs, smoke",
        ),
    ],
)
def test_a_recipe_that_is_not_there(tmp_path, monkeypatch, name, text):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        load_recipe(name)
    assert str(caught.value) == text


def test_an_empty_file_is_called_a_recipe(tmp_path):
    (tmp_path / "mine.yaml").write_text("")
    with pytest.raises(InputError, match=r"the recipe file .* is empty; expected at least recipe, idea, learner"):
        load_recipe(tmp_path / "mine.yaml")


def test_our_recipes_are_good():
    names = ["default", "default-open", "few-rows", "quick", "residual", "several-knobs", "smoke"]
    assert list(recipe_names()) == names
    for name in recipe_names():
        recipe = load_recipe(name)
        assert recipe.recipe == name
        check_recipe(recipe)
    closed, free = load_recipe("default"), load_recipe("default-open")
    assert closed.tasks == free.tasks == load_recipe("several-knobs").tasks
    assert closed.tasks.families == ("mlp", "image_mlp", "wide_mlp", "cnn", "quadratic")
    assert closed.choosing_families == free.choosing_families == ("mlp", "image_mlp", "wide_mlp", "cnn")
    assert free.spec.base == "constant"
    assert [name for name in SIGNALS if name not in free.spec.signals] == ["progress", "budget_log_steps"]


def test_what_the_caller_asks_for_replaces_what_the_recipe_says(tmp_path):
    path = write(tmp_path)
    recipe = load_recipe(path, iterations=7, seeds=3, num_envs=8)
    assert (recipe.iterations, recipe.seeds, recipe.num_envs) == (7, 3, 8)
    assert load_recipe(path).model_dump(exclude={"iterations", "seeds", "num_envs"}) == recipe.model_dump(
        exclude={"iterations", "seeds", "num_envs"}
    )
    with pytest.raises(InputError, match="options: iterations: got 0, expected a whole number of at least 1"):
        load_recipe(path, iterations=0)


def test_a_recipe_comes_back_from_json_as_it_was(tmp_path):
    recipe = load_recipe(write(tmp_path))
    data = recipe.to_json()
    assert data["validate"]["every"] == 2
    assert Recipe.model_validate(data) == recipe


def test_names_become_a_spec_a_learner_and_episodes(tmp_path):
    recipe = load_recipe(write(tmp_path, options={"moves": [-1, 0, 1]}, validate={"held_out": ["mlp"]}))
    spec = make_spec(recipe)
    assert spec.signals == SIGNALS
    assert (spec.reward, spec.penalty, spec.base.name) == ("score_rank", 0.0, "cosine")
    assert (spec.timing.n_decisions, spec.timing.early_decisions) == (2, 1)
    assert (spec.actions.low, spec.actions.high) == (-1, 1)
    state = new_learner(recipe, 5).state_dict()
    # Exploration falls over the recipe's iterations, not over the learner's own default.
    assert state["options"] == {"hidden": [4], "moves": [-1, 0, 1], "iterations": 3}
    options = validation_options(recipe)
    assert (options.families, options.runs_per_task, options.horizon) == (("quadratic", "mlp"), 2, (50, 52))
    assert len({learner_seed(root, index) for root in range(3) for index in range(5)}) == 15


def test_several_knobs_bring_masks_and_what_says_where_they_stand(tmp_path):
    knobs = ["lr", "weight_decay", "dropout", "batch_size"]
    options = {"batch_size": {"low": 8, "high": 64}}
    recipe = load_recipe(write(tmp_path, spec={"knobs": knobs, "knob_options": options}))
    spec = make_spec(recipe)
    assert (spec.knobs, spec.masks, spec.knob_options) == (tuple(knobs), True, options)
    assert spec.signals == (*SIGNALS, "weight_decay_unit", "dropout_unit", "batch_size_unit")
    assert spec.action_space.shape == (4,)
    assert Recipe.model_validate(recipe.to_json()) == recipe
    chosen = load_recipe(write(tmp_path, spec={"knobs": knobs, "signals": ["progress"]}))
    assert make_spec(chosen).signals == ("progress",)
    plain = load_recipe(write(tmp_path))
    assert not make_spec(plain).masks
    assert "knobs" not in plain.to_json()["spec"]  # as it was written before there were several
    assert "train_rows" not in plain.to_json()["tasks"]


def test_a_curriculum_changes_the_horizon_of_the_first_iterations_alone(tmp_path):
    tasks = {"curriculum": {"share": 0.7, "horizon": [60, 70]}}  # of 3 iterations
    recipe = load_recipe(write(tmp_path, tasks=tasks))
    assert [episodes_of(recipe, iteration).horizon for iteration in range(4)] == [(60, 70)] * 2 + [(50, 52)] * 2
    assert replace(episodes_of(recipe, 0), horizon=(50, 52)) == episodes_of(recipe, 2)
    assert validation_options(recipe).horizon == (50, 52)
    assert Recipe.model_validate(recipe.to_json()) == recipe
    plain = load_recipe(write(tmp_path))
    assert episodes_of(plain, 0) == episodes_of(plain, 2)
    assert "curriculum" not in plain.to_json()["tasks"]


@pytest.mark.parametrize(
    ("curriculum", "text"),
    [
        ({"share": 1.5, "horizon": [50, 60]}, "tasks.curriculum.share: got 1.5, expected a share in [0, 1]"),
        ({"share": 0.5, "horizon": [60, 50]}, "horizon is (60, 50); expected two numbers in order"),
        ({"share": 0.5}, "tasks.curriculum"),
        ({"iterations": 2, "horizon": [50, 60]}, "unknown key in tasks.curriculum"),
    ],
)
def test_a_curriculum_that_cannot_be(tmp_path, curriculum, text):
    with pytest.raises(InputError, match=re.escape(text)):
        check_recipe(load_recipe(write(tmp_path, tasks={"curriculum": curriculum})))


def test_the_residual_brings_its_own_early_decisions():
    data = {**TINY, "options": {"residual": "uwhg"}, "spec": {"n_decisions": 20}}
    spec = make_spec(Recipe.model_validate(data))
    assert (spec.timing.early_decisions, spec.timing.n_decisions) == (7, 20)
