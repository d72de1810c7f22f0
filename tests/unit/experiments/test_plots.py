"""Pictures: which are there, what they show, and that odd numbers break none of them."""

import json
import sys

import numpy as np
import pytest
from matplotlib.image import imread
from synthetic import Synthetic, change, write_lines

from trimtab.experiments import plots
from trimtab.experiments.plot_arms import draw_differences, draw_learning, draw_sensitivity
from trimtab.experiments.plot_style import INK, PALE, slug, styles
from trimtab.experiments.reading import Arm, read_study
from trimtab.experiments.results import collect_study


def read(out):
    study = read_study(out)
    return study, collect_study(study)


def draw(out):
    study, results = read(out)
    return study, results, plots.write_all(study, results, out / "plots")


def test_every_picture_of_a_whole_study(tmp_path):
    _, _, found = draw(Synthetic().write(tmp_path))
    names = ["loss", "differences", "sensitivity", "knob", "reward"]
    assert [plot.path.name for plot in found] == [f"{name}_digits-mlp.png" for name in names]
    assert [plot.kind for plot in found] == names
    for plot in found:
        pixels = imread(plot.path)
        assert pixels.shape[0] > 300
        assert pixels.shape[1] > 500
        assert pixels[..., :3].min() < 0.3  # something is drawn on the white
        assert "digits-mlp" in plot.alt
    assert not [path for path in (tmp_path / "plots").iterdir() if path.name.startswith(".")]


def test_language_models_get_one_picture_for_each_loss(tmp_path):
    tasks = {"shakespeare-gpt": "shakespeare_char"}
    out = Synthetic(arms=["constant", "uwhg"], tasks=tasks, tuned=False, n_seeds=2, sensitivity_lrs=()).write(tmp_path)
    _, _, found = draw(out)
    names = [plot.path.name for plot in found if plot.kind == "loss"]
    assert names == ["train_loss_shakespeare_char.png", "val_loss_shakespeare_char.png"]


def test_curves_are_the_mean_and_range_over_seeds(tmp_path):
    study = read_study(Synthetic(arms=["constant"], tuned=False, sensitivity_lrs=(), n_seeds=3).write(tmp_path))
    steps, mean, low, high = plots._curves(study, "digits-mlp", "val_loss")["constant"]
    series = [[row["val_loss"] for row in run.series] for run in study.runs]
    assert steps.tolist() == list(range(0, 661, 20))
    np.testing.assert_allclose(mean, np.mean(series, axis=0), rtol=1e-15)
    assert low.tolist() == np.min(series, axis=0).tolist()
    assert high.tolist() == np.max(series, axis=0).tolist()


def test_a_run_that_stopped_early_does_not_bend_the_mean(tmp_path):
    out = Synthetic(arms=["constant"], tuned=False, sensitivity_lrs=(), n_seeds=3).write(tmp_path)
    path = out / "runs/digits-mlp/constant/report-0.001-1/series.jsonl"
    write_lines(path, [json.loads(line) for line in path.read_text().splitlines()[:4]])
    steps, *_ = plots._curves(read_study(out), "digits-mlp", "val_loss")["constant"]
    assert steps.tolist() == [0, 20, 40, 60]


def test_every_decision_is_marked_by_who_took_it(tmp_path):
    study = read_study(Synthetic(n_seeds=2, sensitivity_lrs=()).write(tmp_path))
    figure = plots._knobs(study, "digits-mlp", styles(study.arms, study.tuned_arm))
    panel = next(axis for axis in figure.axes if axis.get_title(loc="left").startswith("q_learning: lr"))
    marked = sum(len(collection.get_offsets()) for collection in panel.collections)
    runs = study.of(arm="q_learning", role="report")
    assert marked == sum(len(run.decisions) for run in runs) == 64
    guards = [c for c in panel.collections if len(c.get_offsets()) == 2]
    assert guards[0].get_offsets()[:, 0].tolist() == [240.0, 240.0]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["agent: kept as it was", "agent: changed", "guard: rolled back, cut"]


def test_kept_means_that_the_setting_is_kept_whatever_the_base_schedule_does(tmp_path):
    out = Synthetic(arms=["q_learning"], tuned=False, n_seeds=1, sensitivity_lrs=()).write(tmp_path)
    path = next((out / "runs").rglob("decisions.jsonl"))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(path, [{**row, "source": "agent", "setting": 1e-3, "before": 2.0, "read_back": 1.0} for row in rows])
    figure = plots._knobs(read_study(out), "digits-mlp", styles(read_study(out).arms, None))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["agent: kept as it was"]


def test_forest_has_a_line_for_each_difference(tmp_path):
    study, results = read(Synthetic(sensitivity_lrs=()).write(tmp_path))
    figure = draw_differences(results["arms"], styles(study.arms, study.tuned_arm), "digits-mlp")
    (axis,) = figure.axes
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert labels[:2] == ["uwhg", "default-cosine"]  # by difference to the tuned schedule, smallest first
    assert labels[-2:] == ["q_learning", "q_learning"]
    assert len(labels) == 9 + 1 + 1
    headings = [text.get_text() for text in axis.texts if text.get_fontweight() == "bold"]
    assert headings == ["against the tuned schedule (tuned-cosine)", "each against its placebo",
                        "each against its yoked twin"]  # fmt: skip


def test_far_differences_do_not_hide_small_ones(tmp_path):
    level = {**Synthetic().level, "step": 40.0}
    study, results = read(Synthetic(level=level, sensitivity_lrs=()).write(tmp_path))
    figure = draw_differences(results["arms"], styles(study.arms, study.tuned_arm), "digits-mlp")
    assert figure.axes[0].get_xscale() == "symlog"


def test_sensitivity_marks_rates_without_a_finite_loss():
    entry = {"initial_lrs": [0.001, 0.1], "final_val_loss": [0.5, None], "worst_over_best": None}
    rows = [{"id": "a", "sensitivity": entry}, {"id": "b", "sensitivity": None}]
    look = styles([], "a")
    figure = draw_sensitivity(rows, look, "t")
    (axis,) = figure.axes
    assert axis.collections[0].get_offsets().tolist() == [[0.1, 0.5 * 1.25]]
    assert draw_sensitivity(rows[1:], look, "t") is None


@pytest.mark.parametrize(("count", "panels"), [(8, 1), (9, 9)])
def test_each_of_many_arms_gets_its_own_panel_of_sensitivity(count, panels):
    names = [*(f"arm-{index}" for index in range(count)), "tuned"]
    *arms, tuned = [Arm(name, "cosine", "baseline", None, "cosine", {}, {"t": 0.001}) for name in names]
    look = styles([*arms, tuned], "tuned")
    rows = [
        {"id": arm.id, "sensitivity": {"initial_lrs": [0.001, 0.1], "final_val_loss": [0.5 + index, 2.0]}}
        for index, arm in enumerate(arms)
    ]
    rows.append({"id": "tuned", "sensitivity": None, "metrics": {"final_val_loss": {"mean": 0.25}}})
    figure = draw_sensitivity(rows, look, "t", "tuned")
    assert len([axis for axis in figure.axes if axis.get_visible()]) == panels
    for index, axis in enumerate(figure.axes[:panels]):
        level, *lines = axis.get_lines()
        assert set(level.get_ydata()) == {0.25}
        own = [line for line in lines if line.get_color() != PALE]
        mine = rows[:count] if panels == 1 else [rows[index]]
        assert [line.get_ydata()[0] for line in own] == [row["sensitivity"]["final_val_loss"][0] for row in mine]
        assert len(lines) - len(own) == (0 if panels == 1 else count - 1)
    assert figure.legends[0].get_texts()[-1].get_text() == "tuned"


@pytest.mark.parametrize("value", [None, 0.0, -1.0, 1e38, 1e300])
def test_odd_losses_break_no_picture(tmp_path, value):
    out = Synthetic(n_seeds=2).write(tmp_path)
    for path in (out / "runs").rglob("series.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        write_lines(path, [{**row, "val_loss": value, "reward": value, "knobs": {"lr": value}} for row in rows])
    for path in (out / "runs").rglob("result.json"):
        metrics = json.loads(path.read_text())["metrics"]
        change(path, metrics={**metrics, "test_loss": value, "final_val_loss": value})
    _, _, found = draw(out)
    assert "loss" in {plot.kind for plot in found}


def test_a_diverged_run_does_not_press_the_others_into_a_line(tmp_path):
    out = Synthetic(arms=["constant"], tuned=False, n_seeds=2, sensitivity_lrs=()).write(tmp_path)
    path = next((out / "runs").rglob("series.jsonl"))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(path, [*rows[:-1], {**rows[-1], "val_loss": 1e9}])
    curves = plots._curves(read_study(out), "digits-mlp", "val_loss")
    assert curves["constant"][3][-1] == 1e9
    cut = plots._cut(curves)["constant"]
    assert cut[3][-1] == 10 * cut[3][0] == 10 * curves["constant"][3][0]


def test_a_study_without_runs_has_no_pictures(tmp_path):
    out = Synthetic(arms=[], tuned=False).write(tmp_path)
    assert draw(out)[2] == []


def test_arms_can_be_told_apart(tmp_path):
    study = read_study(Synthetic().write(tmp_path))
    look = styles(study.arms, study.tuned_arm)
    assert len({(style.color, str(style.dash)) for style in look.values()}) == len(study.arms) == 10
    assert look["tuned-cosine"].color == INK
    assert look["placebo:q_learning"].color == look["yoked:q_learning"].color == look["q_learning"].color


def test_no_state_of_pyplot_is_touched():
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize(
    ("name", "safe"), [("a/../b", "a-..-b"), ("..", "unnamed"), ("yoked:x", "yoked-x"), ("", "unnamed")]
)
def test_slug(name, safe):
    assert slug(name) == safe


def learned(out, runs, options=None):
    """A study whose arms of these names are Q-learning that learned from so many runs before."""
    names = list(runs)
    synthetic = Synthetic(
        arms=names,
        level={name: 0.3 - 0.02 * place for place, name in enumerate(names)},
        kind=dict.fromkeys(names, "learned"),
        tuned=False,
        sensitivity_lrs=(),
    )
    synthetic.write(out)
    plan = json.loads((out / "study.json").read_text())
    for row in plan["arms"]:
        row |= {"agent": "q_learning", "learn_runs": runs[row["id"]], "options": (options or {}).get(row["id"], {})}
    (out / "study.json").write_text(json.dumps(plan))
    for path in out.rglob("result.json"):
        change(path, learning={"runs": runs[path.parts[-3]], "optimizer_steps": 0, "flops": 0})
    return out


def test_arms_that_differ_in_what_they_learned_from_are_a_curve(tmp_path):
    study, results = read(learned(tmp_path, {"q-0": 0, "q-5": 5, "q-50": 50}))
    figure = draw_learning(results["arms"], styles(study.arms, None), "digits-mlp")
    assert figure is not None
    (axis,) = figure.axes
    line = axis.containers[0].lines[0]
    assert list(line.get_xdata()) == [0, 1, 2]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "5", "50"]
    means = {row["id"]: row["metrics"]["test_loss"]["mean"] for row in results["arms"]}
    assert list(line.get_ydata()) == [means["q-0"], means["q-5"], means["q-50"]]
    row = next(row for row in results["arms"] if row["id"] == "q-50")
    assert {name: entry["roles"] for name, entry in row["differences"].items()} == {
        "q-0": ["fewer runs"],
        "q-5": ["fewer runs"],
    }
    assert not next(row for row in results["arms"] if row["id"] == "q-0")["differences"]
    assert row["differences"]["q-5"]["mean"] == pytest.approx(means["q-50"] - means["q-5"])


def test_arms_with_other_settings_are_compared_and_are_no_curve(tmp_path):
    study, results = read(learned(tmp_path, {"q-0": 0, "q-5": 5}, {"q-5": {"epsilon": 0.5}}))
    assert draw_learning(results["arms"], styles(study.arms, None), "digits-mlp") is None
    row = next(row for row in results["arms"] if row["id"] == "q-5")
    assert row["differences"]["q-0"]["roles"] == ["same agent"]
