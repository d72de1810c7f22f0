"""Variants, statistics, table and runs of the ablations."""

import json
import math
from dataclasses import replace

import ablations
import numpy as np
import pytest
from ablation_suite import picture, playing
from ablation_suite.figures import estimate
from ablation_suite.summary import summarize
from ablation_suite.table import render
from ablation_suite.variants import FEATURES, FULL, Variant, make_full, make_variants, variant_names
from scipy import stats

from trimtab.agents.base import Timing
from trimtab.agents.features import SIGNALS
from trimtab.envs.episodes import fitting_horizon
from trimtab.errors import InputError, RunFailedError, UnknownNameError
from trimtab.learning.parts import make_spec, validation_options
from trimtab.learning.recipe import Recipe, load_recipe
from trimtab.learning.validation import plan_episodes
from trimtab.spec import ControlSpec, make_agent

LABELS = {"recipe", "idea"}
TINY = """
recipe: tiny
idea: a test
learner: ppo
options: {hidden: [4]}
spec: {n_decisions: 2, early_decisions: 1}
tasks: {families: [quadratic, mlp], runs_per_task: 2, horizon: [50, 52]}
num_envs: 4
iterations: 1
seeds: 1
validate: {every: 1, num_envs: 2, episodes: 1, runs_per_task: 2}
"""


def changed(recipe, **changes):
    """A recipe with other values; a mapping is merged into what is there."""
    data = recipe.to_json()
    for key, value in changes.items():
        data[key] = {**data[key], **value} if isinstance(value, dict) else value
    return Recipe.model_validate(data)


def flat(data, path=""):
    if isinstance(data, dict) and data:
        return {name: value for key, item in data.items() for name, value in flat(item, f"{path}{key}.").items()}
    return {path.removesuffix("."): data}


def difference(recipe, other):
    """Key -> its value in the second recipe, where it is another or not there in one."""
    one, two = flat(recipe.to_json()), flat(other.to_json())
    return {key: two.get(key) for key in {*one, *two} - LABELS if one.get(key) != two.get(key)}


@pytest.fixture(scope="module")
def full():
    return make_full(load_recipe("residual"))


@pytest.fixture(scope="module")
def variants(full):
    return make_variants(full)[0]


# ---- variants ---------------------------------------------------------------------------------------------------


def test_every_signal_is_in_one_family_of_features():
    assert sorted(name for group in FEATURES.values() for name in group) == sorted(SIGNALS)


def test_full_is_the_recipe_but_for_what_all_variants_can_have(full):
    changes = {"keep_ranges": False, "choose": "best", "options.residual": None, "spec.early_decisions": None}
    assert difference(load_recipe("residual"), full) == changes
    smoke = load_recipe("smoke")
    assert set(difference(smoke, make_full(smoke))) <= {"keep_ranges", "choose"}


def test_each_variant_differs_from_full_in_one_thing(full, variants):
    expected = {
        FULL: {},
        "reward-unranked": {"spec.reward": "log_improvement"},
        "reward-greedy": {"spec.reward": "log_improvement", "options.gamma": 0.5},
        "constant-base": {"spec.base": "constant"},
        "residual": {"options.residual": "uwhg"},
        "no-early": {"spec.early_decisions": 0},
    }
    for name, left_out in FEATURES.items():
        expected[f"no-{name}"] = {"spec.signals": [signal for signal in SIGNALS if signal not in left_out]}
    assert tuple(variants) == variant_names() == tuple(dict.fromkeys((*variants, *expected)))
    assert {name: difference(full, variant.recipe) for name, variant in variants.items()} == expected
    assert variants["no-cosine"].recipe.recipe == "residual.no-cosine"
    # What the agent itself makes of it: a residual's rule measures first, and takes a seventh early decision.
    assert make_spec(variants["residual"].recipe).timing.early_decisions == 7
    assert make_spec(variants["no-early"].recipe).timing.early_decisions == 0


def test_a_recipe_that_has_it_already_has_no_such_variant(full):
    _, missing = make_variants(changed(full, spec={"base": "constant", "signals": ["progress", "last_move"]}))
    itself = {"constant-base", *(f"no-{name}" for name in FEATURES)} - {"no-progress", "no-rate-memory"}
    assert {name for name, why in missing.items() if why == "it would be the recipe itself"} == itself
    assert "needs the signals update_to_weight, grad_update_cosine" in missing["residual"]


def test_what_a_residuals_rule_observes_cannot_be_left_out(full):
    made, missing = make_variants(changed(full, options={"residual": "uwhg"}))
    assert set(missing) == {"no-cosine", "no-update-to-weight", "residual"}
    assert "the rule 'uwhg' needs the signals grad_update_cosine" in missing["no-cosine"]
    assert "no-layers" in made


def test_evolution_strategies_have_no_gamma_and_no_residual(full):
    recipe = changed(full, learner="evolution", options={})
    recipe = Recipe.model_validate({**recipe.to_json(), "options": {}})
    _, missing = make_variants(recipe)
    assert "unknown option of" in missing["reward-greedy"]
    assert "gamma" in missing["reward-greedy"]
    assert "residual" in missing["residual"]


def test_held_out_families_are_neither_trained_on_nor_chosen_by():
    recipe = load_recipe("residual")
    held = make_full(recipe, ["cnn"])
    assert held.tasks.families == ("mlp", "image_mlp", "mlp", "quadratic")
    assert held.choosing_families == ("mlp", "image_mlp", "wide_mlp")
    assert held.validate_on.held_out == ("recurrent", "cnn")
    chosen = make_full(changed(recipe, validate={"families": ["cnn", "mlp"]}), ["cnn"])
    assert chosen.choosing_families == ("mlp",)
    with pytest.raises(UnknownNameError, match="unknown family to hold out 'cmn'; did you mean 'cnn'"):
        make_full(recipe, ["cmn"])
    with pytest.raises(InputError, match="nothing is left to train on"):
        make_full(recipe, list(recipe.tasks.families))


# ---- the same tasks for all -------------------------------------------------------------------------------------


def test_agents_that_decide_at_other_times_play_the_same_runs(full):
    tasks, own = {"families": ["quadratic", "mlp"], "horizon": [50, 90]}, {"families": None, "held_out": []}
    short = changed(full, tasks=tasks, validate={"num_envs": 8, **own})
    plan = replace(playing.make_episodes(short, 0), episodes=2)
    assert [timing.early_decisions for timing in plan.timings] == [6, 7]
    played = []
    for early in (0, 6, 7):  # a cosine does the same whenever it is asked, where the guard has nothing to undo
        agent = make_agent("cosine")
        timing = Timing(every=None, n_decisions=20, early_decisions=early)
        spec = ControlSpec.for_agent(agent, timing=timing, signals=("progress",))
        played.append(playing.play_same(agent, spec, plan))
    assert set(played[0]) == {"quadratic", "mlp"}
    for family, rows in played[0].items():
        assert rows["task"] == played[1][family]["task"] == played[2][family]["task"] == sorted(rows["task"])
        assert len(set(rows["task"])) == 2 * 8 / 4
        calm = [not any(one[family]["rolled_back"][run] for one in played) for run in range(16)]
        assert sum(calm) > 8
        for other in played[1:]:
            losses = np.array([rows["loss"], other[family]["loss"]])[:, calm]
            np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)


def test_runs_of_one_budget_are_played_together(full):
    plan = playing.make_episodes(changed(full, validate={"num_envs": 160, "runs_per_task": 16}), 0)
    parts = playing.draw(plan, "mlp", 0)  # ten tasks of sixteen runs: eight in the first batch, two in the second
    assert [len({batch.total_steps for batch in part}) for part in parts] == [1, 1]
    assert sorted(sum(len(batch.tasks) for batch in part) for part in parts) == [32, 128]


def test_the_tasks_of_the_choice_would_not_be_the_same_for_variants_that_decide_at_other_times(full, variants):
    def budgets(name):
        spec = make_spec(variants[name].recipe)
        plan = plan_episodes(spec, validation_options(full), num_envs=32, episodes=1, seed=0)
        return [fitting_horizon(steps, *plan.timings) for steps in (50, 100, 300, 1000)]

    assert budgets(FULL) == budgets("constant-base") == budgets("no-loss") == [72, 92, 298, 1010]
    assert budgets("residual")[0] == 53
    assert budgets("no-early")[0] == 134  # so that learning it, too, was refused before budgets reached so far


# ---- statistics -------------------------------------------------------------------------------------------------


def test_the_interval_over_learners_is_students_t():
    table = np.repeat(np.log([1.0, 2.0, 4.0, 8.0, 16.0])[:, None], 6, axis=1)  # tasks are all alike
    found = estimate([table, table])
    half = 2.776445 * math.log(2) * math.sqrt(2.5 / 5)
    assert found["value"] == pytest.approx(4.0)
    assert found["learners"] == pytest.approx([1, 2, 4, 8, 16])
    assert found["interval"] == pytest.approx([4 * math.exp(-half), 4 * math.exp(half)], rel=1e-6)


def test_the_interval_over_tasks_is_students_t_too():
    table = np.repeat(np.array([[-0.2, -0.1, 0.0, 0.1, 0.2]]), 5, axis=0)  # learners are all alike
    half = 2.776445 * math.sqrt(0.025 / 5)
    assert estimate([table])["interval"] == pytest.approx([math.exp(-half), math.exp(half)], rel=1e-6)
    # Of two such families the mean has half the variance, and twice the degrees of freedom.
    half = stats.t.ppf(0.975, 8) * math.sqrt(0.025 / 10)
    assert estimate([table, table])["interval"] == pytest.approx([math.exp(-half), math.exp(half)])


def test_learners_and_tasks_add_up():
    learners, tasks = np.array([-0.2, -0.1, 0.0, 0.1, 0.2]), np.array([-0.5, -0.3, -0.1, 0.1, 0.3, 0.5])
    a, b = learners.var(ddof=1) / 5, tasks.var(ddof=1) / 6
    half = stats.t.ppf(0.975, (a + b) ** 2 / (a**2 / 4 + b**2 / 5)) * math.sqrt(a + b)
    found = estimate([learners[:, None] + tasks])
    assert found["interval"] == pytest.approx([math.exp(-half), math.exp(half)])


def test_an_interval_holds_the_true_ratio_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        learners, tasks = generator.normal(0, 0.05, (5, 1)), generator.normal(0, 0.2, (1, 16))
        low, high = estimate([learners + tasks + generator.normal(0, 0.1, (5, 16))])["interval"]
        held += low <= 1.0 <= high
    assert 0.93 <= held / 400 <= 0.995


def test_few_learners_or_tasks_have_no_interval():
    assert estimate([np.zeros((4, 9))])["interval"] is None
    assert estimate([np.zeros((5, 9)), np.zeros((5, 4))])["interval"] is None
    assert estimate([np.zeros((5, 5))])["interval"] == [1.0, 1.0]


# ---- the table --------------------------------------------------------------------------------------------------


def played(**losses):
    """Two runs of each task of a family, whose mean loss is what is given."""
    return {
        family: {
            "task": [task for task in range(len(means)) for _ in range(2)],
            "loss": [mean * share for mean in means for share in (0.5, 1.5)],
        }
        for family, means in losses.items()
    }


RULE = played(mlp=[1.0, 2.0], cnn=[4.0])
PLAYS = {
    FULL: [played(mlp=[0.5, 1.0], cnn=[4.0]), played(mlp=[2.0, 4.0], cnn=[8.0])],
    "no-loss": [played(mlp=[1.0, 2.0], cnn=[2.0]), played(mlp=[2.0, 4.0], cnn=[8.0])],
}


def test_ratios_are_geometric_means_and_paired_by_learner():
    rows = summarize(PLAYS, RULE, ["mlp"], ["cnn"])
    full, other = rows[FULL], rows["no-loss"]
    assert full["over_full"] is None
    assert full["over_uwhg"]["overall"]["learners"] == pytest.approx([0.5, 2.0])
    assert full["over_uwhg"]["overall"]["value"] == pytest.approx(1.0)
    assert full["over_uwhg"]["families"]["cnn"]["value"] == pytest.approx(math.sqrt(2))
    assert full["over_uwhg"]["held_out"]["learners"] == pytest.approx([1.0, 2.0])
    assert other["over_full"]["overall"]["learners"] == pytest.approx([2.0, 1.0])
    assert other["over_full"]["overall"]["value"] == pytest.approx(math.sqrt(2))
    assert other["over_full"]["held_out"]["learners"] == pytest.approx([0.5, 1.0])
    both = summarize(PLAYS, RULE, ["mlp", "cnn"], [])[FULL]["over_uwhg"]
    assert both["held_out"] is None
    assert both["overall"]["learners"] == pytest.approx([math.sqrt(0.5), 2.0])  # families weigh the same


def test_a_play_of_other_tasks_is_not_compared():
    with pytest.raises(InputError, match="did not play the same tasks of family 'cnn'"):
        summarize(PLAYS, played(mlp=[1.0, 2.0], cnn=[4.0, 4.0]), ["mlp"], ["cnn"])
    alone = summarize({"no-loss": PLAYS["no-loss"]}, RULE, ["mlp"], [])
    assert alone["no-loss"]["over_full"] is None


def page(full, plays, **more):
    rows = summarize(plays, RULE, ["mlp"], ["cnn"])
    return {
        "recipe": {**full.to_json(), "seeds": len(plays[FULL])},
        "root_seed": 0,
        "families": ["mlp"],
        "held_out": ["cnn"],
        "rows": {name: {"what": f"about {name}", "cpu_s": 90.0, **row} for name, row in rows.items()},
        "unfinished": [],
        "failed": {},
        "impossible": {},
        **more,
    }


def test_the_table_says_values_and_range_below_five_learners(full):
    text = render(page(full, PLAYS, unfinished=["no-early"], failed={"residual": "broke"}, impossible={"x": "why"}))
    assert "**2 learners a variant: values and their range, no intervals" in text
    assert "| variant | together | held out, together | mlp | cnn (held out) | CPU min | what is different |" in text
    assert (
        "| `no-loss` | 1.414 (1.000 to 2.000) | 1.000 (0.500 to 2.000) | 1.414 (1.000 to 2.000) | "
        "1.000 (0.500 to 2.000) | 1.5 | about no-loss |"
    ) in text
    second = text.partition("## Final loss over that of `full`")[2]
    assert "| `no-loss` | 1.414 (1.000 to 2.000) | 0.707 (0.500 to 1.000) |" in second
    assert "| `full` |" not in second
    for line in (
        "- Not learned yet: `no-early`.",
        "- `residual` failed: broke",
        "- There is no `x` of this recipe: why.",
    ):
        assert line in text


def test_the_table_has_intervals_from_five_learners_on(full):
    tasks = [1.0, 2.0, 3.0, 4.0, 5.0]
    rule = played(mlp=tasks, cnn=tasks)
    plays = {FULL: [played(mlp=[share * task for task in tasks], cnn=tasks) for share in (0.5, 1, 1, 1, 2)]}
    rows = summarize(plays, rule, ["mlp"], ["cnn"])
    half = 2.776445 * math.log(2) * math.sqrt(0.5 / 5)
    shown = {"what": "w", "cpu_s": 0.0, **rows[FULL]}
    text = render({**page(full, plays | {FULL: PLAYS[FULL]}), "recipe": full.to_json(), "rows": {FULL: shown}})
    assert f"| `full` | 1.000 [{math.exp(-half):.3f}, {math.exp(half):.3f}] | 1.000 [1.000, 1.000] |" in text
    assert "nothing to conclude" not in text
    assert "`full` and another variant are needed for it." in text


# ---- the picture ------------------------------------------------------------------------------------------------


def test_curves_are_relative_to_the_rule_of_full_whatever_the_base(full):
    def learner(over_uwhg, over_cosine):
        numbers = {family: {"ratio_uwhg": over_uwhg, "ratio_cosine": over_cosine} for family in full.choosing_families}
        return [{"validation": True, "iteration": 0, "families": numbers}]

    based = Variant("constant-base", "structure", "", full)
    curves = {
        FULL: (Variant(FULL, "", "", full), [learner(0.8, 0.4)] * 5),  # so the rule reaches half the cosine's loss
        "constant-base": (based, [learner(3.0, 0.6)]),  # beside a rule over another base
    }
    (axis,) = picture.make_figure(curves).axes
    lines = {line.get_label(): line.get_ydata() for line in axis.lines}
    assert lines[FULL] == pytest.approx([0.8])
    assert lines["constant-base"] == pytest.approx([1.2])
    assert len(axis.collections) == 1  # the band of full


# ---- the command ------------------------------------------------------------------------------------------------


def run(tmp_path, *more):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TINY)
    out = tmp_path / "out"
    words = ["--recipe", recipe, "--out", out, "--workers", 0, "--hold-out", "mlp", *more]
    return ablations.main([str(word) for word in words]), out


def test_variants_are_learned_compared_and_kept(tmp_path, capsys, monkeypatch):
    code, out = run(tmp_path, "--only", "no-early", "--only", "full")
    assert code == 0
    shown = capsys.readouterr()
    assert "variant 1 of 2, full: the recipe itself" in shown.err
    assert "variant 2 of 2, no-early: no short decisions at the start; of all about" in shown.err
    text = (out / "table.md").read_text()
    assert text in shown.out
    data = json.loads((out / "table.json").read_text())
    assert (list(data["rows"]), data["families"], data["held_out"]) == ([FULL, "no-early"], ["quadratic"], ["mlp"])
    ratios = [data["rows"][name]["over_uwhg"]["overall"]["value"] for name in (FULL, "no-early")]
    assert data["rows"]["no-early"]["over_full"]["overall"]["value"] == pytest.approx(ratios[1] / ratios[0])
    assert {"curves.png", "full/plots/curves.png", "recipes/no-early.yaml", "played/uwhg.json"} <= {
        path.relative_to(out).as_posix() for path in out.rglob("*")
    }
    before = {path: path.stat().st_mtime_ns for path in out.rglob("seed-0/*")}

    def must_not(*_, **__):
        raise AssertionError("what is complete was run again")

    with monkeypatch.context() as patch:
        patch.setattr(ablations, "learn", must_not)
        patch.setattr(playing, "play_same", must_not)
        assert run(tmp_path, "--only", "full", "--only", "no-early")[0] == 0
    assert "variant 2 of 2, no-early: complete before, and kept" in capsys.readouterr().err
    assert (out / "table.md").read_text() == text
    assert {path: path.stat().st_mtime_ns for path in out.rglob("seed-0/*")} == before

    # Another seed is another plan: refused, and nothing is lost.
    assert run(tmp_path, "--only", "full", "--seed", "1")[0] == 2
    assert "error: " in (error := capsys.readouterr().err)
    assert "holds another plan: root_seed is 0 there, 1 is asked for now" in error
    assert (out / "table.md").read_text() == text


def test_what_was_interrupted_is_gone_on_with(tmp_path, monkeypatch, capsys):
    given = []
    real = ablations.learn

    def learn(path, out, **options):
        given.append(options["resume"])
        if len(given) > 1:
            return real(path, out, **options)
        with monkeypatch.context() as patch:
            patch.setattr("trimtab.learning.validation.play", interrupt)  # of the rivals: the first piece of work
            return real(path, out, **options)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ablations, "learn", learn)
    code, out = run(tmp_path, "--only", "full")
    assert code == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    assert run(tmp_path, "--only", "full")[0] == 0
    assert given == [False, True]
    assert (out / "full" / "brain" / "brain.json").is_file()


def test_a_variant_that_fails_is_named_and_the_others_are_gone_on_with(tmp_path, monkeypatch, capsys):
    real = ablations.learn

    def learn(path, out, **options):
        if out.name == FULL:
            raise RunFailedError("seed-0 failed: out of memory")
        return real(path, out, **options)

    monkeypatch.setattr(ablations, "learn", learn)
    code, out = run(tmp_path, "--only", "full", "--only", "constant-base")
    assert code == 1
    assert "error: full: seed-0 failed: out of memory" in capsys.readouterr().err
    text = (out / "table.md").read_text()
    assert "- `full` failed: seed-0 failed: out of memory" in text
    assert "| `constant-base` |" in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--only", "no-cosin"], "unknown variant 'no-cosin'; did you mean 'no-cosine'?"),
        (["--quick"], "leave out --recipe"),
        (["--iterations", "0"], "iterations: got 0, expected a whole number of at least 1"),
        (["--hold-out", "quadratic"], "nothing is left to train on"),
    ],
)
def test_bad_input_is_one_error_and_leaves_nothing(tmp_path, capsys, words, expected):
    code, out = run(tmp_path, *words)
    assert code == 2
    shown = capsys.readouterr().err.strip()
    assert expected in shown
    assert shown.count("\n") == 0
    assert not out.exists()


def test_the_list_names_all_variants_and_learns_nothing(tmp_path, capsys):
    code, out = run(tmp_path, "--list")
    assert code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*variant_names(), "each:"]
    assert lines[-1] == "each: 1 learners, 1 iterations of 4 runs"
    assert not out.exists()


def test_a_play_of_another_plan_is_not_kept(tmp_path, full):
    plan = playing.make_episodes(full, 0)
    expected = playing.asked(plan, full)
    path = tmp_path / playing.PLAYED / "full.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"asked": expected, "learners": []}))
    assert playing.kept_play(tmp_path, FULL, expected) == {"asked": expected, "learners": []}
    assert playing.kept_play(tmp_path, FULL, playing.asked(replace(plan, episodes=9), full)) is None
    assert playing.kept_play(tmp_path, "no-loss", expected) is None
