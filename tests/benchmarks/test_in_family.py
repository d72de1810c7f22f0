"""The table of fresh tasks of trained families."""

import json

import in_family
import numpy as np
import pytest

from trimtab.agents.base import Timing
from trimtab.spec import ControlSpec, make_agent


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(in_family, "RATES", 3)
    monkeypatch.setattr(in_family, "SEEDS", 2)


@pytest.mark.parametrize("family", ["mlp", "quadratic"])
def test_a_cosine_played_as_an_arm_is_the_cosine_of_the_reference(small, family):
    agent = make_agent("cosine")
    spec = ControlSpec.for_agent(agent, timing=Timing(None, 20, 6), signals=("progress",))
    kept = in_family.reference(family, 1)
    played = in_family.limited(in_family.play_arm(family, 1, agent, spec), kept["limit"])
    assert played.mean() == pytest.approx(kept["losses"]["cosine at a drawn rate"], rel=1e-5)
    assert kept["losses"]["cosine"] < kept["losses"]["cosine at a drawn rate"]
    assert kept["rate"] in in_family.rate_grid(in_family.TUNED[kept["optimizer"]], 3)


def test_seeds_that_choose_report_nothing_and_rates_are_spread():
    assert not {*in_family.seeds_of("mlp", 0, "choose")} & {*in_family.seeds_of("mlp", 0, "report")}
    places = (np.log10(sorted(in_family.drawn_rates("mlp", 0))) + 5) / 4 * in_family.SEEDS
    assert np.floor(places).tolist() == list(range(in_family.SEEDS))


def test_what_is_lost_counts_as_the_limit_and_nothing_as_the_least():
    assert in_family.limited(np.array([np.nan, np.inf, 9.0, 0.5, 1e-9]), 2.0).tolist() == [2.0, 2.0, 2.0, 0.5, 1e-3]


def test_the_table_is_the_geometric_mean_over_tasks():
    rows = [
        {"family": "mlp", "index": i, "arm": "reference", "what": "", "limit": 9.0, "steps": steps,
         "optimizer": optimizer, "losses": {"cosine": 0.5, "default-cosine": 1.0}}
        for i, (steps, optimizer) in enumerate([(100, "sgd"), (1000, "adam")])
    ]  # fmt: skip
    rows += [
        {"family": "mlp", "index": i, "arm": "ours", "what": "x", "losses": [a, 0.5]} for i, a in enumerate((0.5, 3.5))
    ]
    lines = in_family.render(rows).splitlines()
    assert lines[0] == "| tasks | n | default-cosine | ours |"
    cells = {line.split("|")[1].strip(): line.split("|")[4].split()[0] for line in lines[2:]}
    assert cells == {"mlp": "2.000", "50 to 170 steps": "1.000", "591 to 2000": "4.000", "sgd": "1.000",
                     "adam": "4.000", "all": "2.000"}  # fmt: skip


def test_what_is_kept_is_not_computed_again_but_for_another_brain(small, tmp_path, capsys):
    asked = ["--family", "quadratic", "--tasks", "1", "--out", str(tmp_path)]
    assert in_family.main(asked) == 0
    first = (tmp_path / "rows.jsonl").read_text()
    arms = ["reference", "uwhg", "default", "told after 1 %", "told after 6 %"]
    assert [json.loads(line)["arm"] for line in first.splitlines()] == arms
    in_family.main(asked)
    assert (tmp_path / "rows.jsonl").read_text() == first
    rows = [json.loads(line) for line in first.splitlines()]
    rows[2].update(what="another brain", losses=[1.0, 1.0])
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    in_family.main(asked)
    again = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert sorted(again) == sorted(first.splitlines())
    assert capsys.readouterr().out.count("| quadratic | 1 |") == 3


def test_who_is_told_the_rate_is_at_it_from_the_next_step_on(small):
    kept = in_family.reference("quadratic", 1)
    agent, spec = in_family.told(kept["rate"], in_family.TOLD["told after 1 %"])
    batch = in_family.many(in_family.draw_run("quadratic", 1), [1e-5, 1e-3], [1, 2])
    envs = in_family.TrainingVectorEnv(2, ("quadratic",), spec=spec)
    observation, infos = envs.begin([batch])
    assert infos["lr"] == pytest.approx([1e-5, 1e-3])
    assert infos["spent"].tolist() == [max(2, round(0.01 * batch.total_steps))] * 2
    actions, _ = agent.predict(observation)
    infos = envs.step(actions)[4]
    assert infos["lr"] == pytest.approx([kept["rate"]] * 2)
    losses = in_family.play_arm("quadratic", 1, agent, spec)
    assert in_family.limited(losses, kept["limit"]).mean() < kept["losses"]["cosine at a drawn rate"]


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        (["--family", "mlp", "--family", "nope"], "unknown family of tasks 'nope'"),
        (["--train-rows", "9", "3"], "train_rows is (9, 3)"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_is_trained_or_written(asked, error, tmp_path, capsys):
    with pytest.raises(SystemExit):
        in_family.main([*asked, "--out", str(tmp_path / "out")])
    assert error in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tasks_with_other_rows_are_refused_and_not_mixed(small, tmp_path, capsys):
    asked = ["--family", "quadratic", "--tasks", "1", "--out", str(tmp_path), "--train-rows"]
    in_family.main([*asked, "64", "64"])
    first = (tmp_path / "rows.jsonl").read_text()
    assert in_family.draw_run("quadratic", 0, (64, 64)).tasks[0].train.inputs.shape[0] == 64
    with pytest.raises(SystemExit):
        in_family.main([*asked, "128", "128"])
    assert "is of tasks with train_rows [64, 64], not [128, 128]; take another --out" in capsys.readouterr().err
    assert (tmp_path / "rows.jsonl").read_text() == first
