"""Runs, plan, files and tables of the zero-shot benchmark, on its smallest part."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zero_shot
from zero_shot_suite import arms, figures, plan, single, store
from zero_shot_suite.arms import DRAWN, TUNED, identity, make_driver
from zero_shot_suite.parts import PARTS, Options, drawn_rates, find_part, rate_grid, run_seed, tuned_grid
from zero_shot_suite.plan import Job, choose_rate, next_jobs, partner, planned_jobs, score
from zero_shot_suite.summary import summarize
from zero_shot_suite.table import render

from trimtab.brain import Brain
from trimtab.errors import InputError, MissingExtraError, UnknownNameError
from trimtab.training.loop import TrainingLoop
from trimtab.training.own_optimizers import import_extra

PART = find_part("digits-mlp-60")
SMALL = Options(rates=4, seeds=2, other_seeds=1)

pytestmark = pytest.mark.usefixtures("unwatched")


def run(arm, rate=0.01, role="report", index=0, **more):
    job = {"part": PART.name, "arm": arm, "rate": rate, "role": role, "index": index, "brain": None, "replay": None}
    return single.run_job({**job, **more}, None, lambda news: None)


def made_up(job, best_rate):
    """A run as `run_job` would return it, of an arm whose loss is least at one rate."""
    loss = 0.1 + 0.3 * abs(np.log10(job.rate / best_rate)) + 0.001 * job.index
    curve = [[0, 2.0], [30, loss + 0.2], [60, loss]]
    return {
        **vars(job), "val0": 2.0, "val": loss, "test": loss, "best_val": loss, "best_test": loss, "best_step": 60,
        "average_val": loss, "average_test": loss, "curve": curve if job.role == "report" else None,
        "status": "over", "rollbacks": 0, "replay": {"start": job.rate}, "seconds": 0.1,
    }  # fmt: skip


def finish(options=SMALL, brains=(), best_rate=0.01, **by_arm):
    """All runs of the part, made up, in the order in which the plan asks for them; and how many rounds it took."""
    runs, rounds = {}, 0
    while jobs := next_jobs(PART, options, brains, runs):
        runs |= {job.key: made_up(job, by_arm.get(job.arm.replace("-", "_"), best_rate)) for job in jobs}
        rounds += 1
    return runs, rounds


# ---- parts ------------------------------------------------------------------------------------------------------


def test_rates_stand_in_the_middle_of_equal_stretches():
    assert rate_grid((-5.0, -1.0), 4) == [3.162e-05, 3.162e-04, 3.162e-03, 3.162e-02]
    fine = np.log10(rate_grid((-5.0, -1.0), 16))
    np.testing.assert_allclose(np.diff(fine), 0.25, atol=1e-3)  # quarter decades
    for part in PARTS.values():  # the search's rates are among the tuned ones, where they overlap: no run is made twice
        tuned, searched = tuned_grid(part, Options()), plan.search_grid(part, Options())
        assert len({*tuned, *searched}) == (20 if "sgd" in part.name else 18)


def test_each_stretch_of_rates_is_drawn_from_once_and_every_part_draws_its_own():
    rates = drawn_rates(PART, 8)
    assert sorted(int((np.log10(rate) + 5) * 2) for rate in rates) == list(range(8))
    assert rates == drawn_rates(PART, 8) != drawn_rates(find_part("titanic-fcnn"), 8)


def test_seeds_of_the_two_roles_differ():
    seeds = {
        run_seed(part, role, index) for part in PARTS.values() for role in ("choose", "report") for index in range(8)
    }
    assert len(seeds) == len(PARTS) * 16


def test_parts_are_what_the_benchmark_asks_for():
    assert {part.task_name for part in PARTS.values()} == {
        "digits-mlp", "titanic-fcnn", "mnist-mlp", "mnist-cnn", "cifar10-cnn", "sst2-mlp", "sst2-bilstm",
        "shakespeare-gpt"}  # fmt: skip
    assert [find_part(f"digits-mlp-{steps}").task().total_steps for steps in (60, 660, 2000)] == [60, 660, 2000]
    for part in PARTS.values():
        task = part.task(0.5)
        assert (task.lr, task.total_steps % task.eval_every) == (0.5, 0)
        assert task.warmup_steps == pytest.approx(task.total_steps / 20, abs=0.5)
        assert task.momentum == (0.9 if part.name.endswith("-sgd") else 0.0)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"rates": 6}, "rates is 6; expected 4, 8, 12, 16"),
        ({"seeds": 1}, "seeds is 1; expected 2 or more"),
        ({"other_seeds": 9}, "other_seeds is 9; expected 1 to 8"),
    ],
)
def test_options_that_cannot_be_are_refused(given, text):
    with pytest.raises(InputError, match=text):
        Options(**given)


def test_an_unknown_part_is_helped():
    with pytest.raises(UnknownNameError, match="unknown part 'mnist-cn'; did you mean 'mnist-cnn'"):
        find_part("mnist-cn")


# ---- arms -------------------------------------------------------------------------------------------------------


def test_a_twin_of_the_same_seed_is_the_run_itself():
    default = run("default")
    twin = run("yoked:default", replay=default["replay"])
    for key in ("val", "test", "best_val", "curve"):
        assert twin[key] == default[key], key
    other = run("yoked:default", index=1, replay=default["replay"])
    assert other["test"] != default["test"]


def test_a_twin_starts_from_its_partners_rate_whatever_its_own():
    default = run("default", rate=1e-4)
    assert default["replay"]["start"] == 1e-4
    assert run("yoked:default", rate=0.1, replay=default["replay"])["curve"] == default["curve"]


def test_the_default_brain_is_not_the_placebo_and_the_placebo_is_its_base():
    placebo = run("placebo:default")
    task = PART.task(0.01)
    loop = TrainingLoop(task, task.load(None), seed=run_seed(PART, "report", 0))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(loop.optimizer, T_max=60)
    while not loop.is_over():
        loop.step()
        schedule.step()
    assert placebo["test"] == pytest.approx(loop.evaluate("test")["loss"], rel=1e-5)
    assert run("default")["test"] != placebo["test"]


def test_the_train_loss_alone_gives_no_weights_of_a_best_validation_loss():
    alone = run("default-loss")
    assert (alone["best_val"], alone["best_test"], alone["best_step"]) == (None, None, None)
    assert alone["test"] is not None


def test_an_arm_without_a_horizon_is_not_told_the_end(tmp_path):
    open_ended = run("default-open", rate=0.1)
    assert open_ended["status"] == "running"  # no decision fell on the end
    assert open_ended["steps"] == 60
    assert open_ended["test"] != run("default", rate=0.1)["test"]
    Brain.load("default-open").save(tmp_path / "mine")
    mine = run("brain:mine", rate=0.1, brain=str(tmp_path / "mine"))
    assert mine["curve"] == open_ended["curve"]


@pytest.mark.parametrize("arm", ["uwhg", "constant"])
def test_best_weights_are_those_of_the_least_validation_loss(arm):
    got = run(arm, rate=0.1)
    curve = got["curve"]
    assert len(curve) == 13
    assert got["best_val"] == min(loss for _, loss in curve)
    assert [got["best_step"], got["best_val"]] in curve
    task = PART.task(0.1)
    if arm == "constant":  # the weights at that step, by a plain loop
        loop = TrainingLoop(task, task.load(None), seed=run_seed(PART, "report", 0))
        for _ in range(got["best_step"]):
            loop.step()
        assert got["best_test"] == pytest.approx(loop.evaluate("test")["loss"], rel=1e-5)


def test_the_average_is_that_of_a_plain_loop():
    got = run("constant", rate=0.1)
    task = PART.task(0.1)
    loop = TrainingLoop(task, task.load(None), seed=run_seed(PART, "report", 0))
    average = None
    for t in range(1, 61):
        loop.step()
        if t < 30:
            continue
        weights = [parameter.detach().double() for parameter in loop.model.parameters()]
        share = 1.0 if average is None else 1.0 - ((t - 1) / t) ** 10
        average = [w.clone() for w in weights] if average is None else average
        average = [a + share * (w - a) for a, w in zip(average, weights, strict=True)]
    with torch.no_grad():
        for parameter, value in zip(loop.model.parameters(), average, strict=True):
            parameter.copy_(value)
    assert got["average_test"] == pytest.approx(loop.evaluate("test")["loss"], rel=1e-4)
    assert got["average_val"] == pytest.approx(loop.evaluate("val")["loss"], rel=1e-4)
    assert got["average_val"] != got["val"]


@pytest.mark.parametrize("arm", ["uwhg", "schedule-free"])
def test_averaging_leaves_the_run_as_it_is(monkeypatch, arm):
    mine = run(arm)
    monkeypatch.setattr(single._Watch, "take_in", lambda self: None)
    other = run(arm)
    assert other["average_val"] is None
    assert [mine[key] for key in ("val", "test", "best_test")] == [other[key] for key in ("val", "test", "best_test")]


def test_what_ours_returns_as_best_is_what_was_watched(monkeypatch):
    ours = run("default", rate=0.1)
    monkeypatch.setattr(arms.Driver, "best_state", lambda self: None)
    assert run("default", rate=0.1)["best_test"] == ours["best_test"]


def test_test_is_read_at_the_end_alone(monkeypatch):
    reads = []
    evaluate = TrainingLoop.evaluate

    def watched(loop, split):
        reads.append((split, loop.steps_done))
        return evaluate(loop, split)

    monkeypatch.setattr(TrainingLoop, "evaluate", watched)
    for arm in ("cosine", "default", "plateau"):
        run(arm)
    assert {step for split, step in reads if split == "test"} == {60}
    assert {split for split, step in reads if step < 60} == {"val"}


def test_weights_that_the_guard_puts_back_are_measured_again(monkeypatch):
    reads = []
    evaluate = TrainingLoop.evaluate

    def watched(loop, split):
        measured = evaluate(loop, split)
        reads.append((split, loop.steps_done, measured["loss"]))
        return measured

    monkeypatch.setattr(TrainingLoop, "evaluate", watched)
    settings = [[0.01]] * 4 + [[1e4]]  # the last ten steps blow up, and are rolled back at the end
    replay = {"start": 0.01, "settings": settings, "timing": {"every": 10}, "base": {"name": "constant"}}
    got = run("yoked:default", replay=replay)
    assert got["rollbacks"] == 1
    assert [(split, step) for split, step, _ in reads[-4:]] == [("val", 60), ("val", 60), ("test", 60), ("test", 60)]
    broken, mended = (loss for _, _, loss in reads[-4:-2])
    assert mended < 1.0 < broken
    assert got["val"] == pytest.approx(mended, rel=1e-5)
    assert got["curve"][-1] == [60, got["val"]]
    at_50 = next(loss for step, loss in got["curve"] if step == 50)
    assert got["val"] == at_50  # where the last good interval ended


def test_schedule_free_is_evaluated_at_its_average():
    pytest.importorskip("schedulefree", reason="the extra [baselines] is not installed")
    task = PART.task(0.05)
    loop = TrainingLoop(task, task.load(None), seed=0)
    driver = make_driver({"arm": "schedule-free", "part": PART.name, "index": 0}, loop)
    for _ in range(20):
        loop.step()
    weights = loop.model[0].weight
    trained = weights.detach().clone()
    with driver.evaluating():
        assert loop.optimizer.param_groups[0]["train_mode"] is False
        evaluated = weights.detach().clone()
    assert loop.optimizer.param_groups[0]["train_mode"] is True
    assert (evaluated - trained).abs().max() > 1e-3
    torch.testing.assert_close(weights.detach(), trained, rtol=1e-4, atol=1e-5)
    # y = beta x + (1 - beta) z: the average lies on the line from z through y.
    z = loop.optimizer.state[weights]["z"]
    torch.testing.assert_close(0.9 * evaluated + 0.1 * z, trained, rtol=1e-4, atol=1e-5)


def test_schedule_free_refuses_batch_norm():
    pytest.importorskip("schedulefree", reason="the extra [baselines] is not installed")
    loop = SimpleNamespace(task=PART.task(0.1), model=torch.nn.Sequential(torch.nn.BatchNorm1d(3)))
    with pytest.raises(InputError, match="schedule-free on digits-mlp: batch norm keeps statistics"):
        make_driver({"arm": "schedule-free", "part": PART.name, "index": 0}, loop)


@pytest.mark.parametrize("part", ["digits-mlp-60", "digits-mlp-660-sgd"])
def test_prodigy_looks_at_no_rate(part):
    pytest.importorskip("prodigyopt", reason="the extra [baselines] is not installed")
    for rate in (1e-5, 0.1):
        task = find_part(part).task(rate)
        loop = TrainingLoop(task, task.load(None), seed=0)
        make_driver({"arm": "prodigy-cosine", "part": part, "index": 0}, loop)
        group = loop.optimizer.param_groups[0]
        assert type(loop.optimizer).__name__ == "Prodigy"
        assert group["lr"] == pytest.approx(1 / (task.warmup_steps + 1))  # the first step of the warm-up to 1


def test_a_missing_extra_is_one_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(
        MissingExtraError, match=r'needs the package schedulefree, .* pip install "trimtab\[baselines\]"'
    ):
        import_extra("schedulefree")


def test_arms_that_share_a_brain_share_an_identity():
    same = {identity(arm, {}) for arm in ("default", "default-loss", "placebo:default", "yoked:default")}
    assert len(same) == 1
    assert identity("cosine", {}) == identity("default-cosine", {}) == "v1"


# ---- plan -------------------------------------------------------------------------------------------------------


def test_a_diverged_run_counts_as_twice_the_start():
    job = {"val0": 2.0, "val": None, "test": 9.0, "best_val": 1.5, "best_test": 4.0}
    assert [score(job, name) for name in ("val", "test", "best_val", "best_test")] == [4.0, 4.0, 1.5, 4.0]


def test_the_average_is_kept_where_its_validation_loss_is_lower():
    job = {"val0": 2.0, "best_val": 1.5, "best_test": 1.6, "average_val": 1.4, "average_test": 1.7}
    assert [score(job, name) for name in ("kept_val", "kept_test")] == [1.4, 1.7]
    for worse in (1.5, None):
        assert [score(job | {"average_val": worse}, name) for name in ("kept_val", "kept_test")] == [1.5, 1.6]


def test_a_rate_is_chosen_by_validation_over_the_choosing_seeds():
    jobs = [Job("cosine", rate, "choose", index) for rate in (0.1, 0.2) for index in (0, 1)]
    vals = [1.0, 3.0, 1.9, 1.9]
    runs = {job.key: {"val0": 2.0, "val": val, "test": -val} for job, val in zip(jobs, vals, strict=True)}
    assert choose_rate(runs, "cosine", [0.1, 0.2], 2, "val") == 0.2
    assert choose_rate(runs, "cosine", [0.1, 0.2], 1, "val") == 0.1
    assert choose_rate(runs, "cosine", [0.1, 0.2, 0.3], 1, "val") is None
    assert choose_rate(runs, "cosine", [0.1, 0.2], 3, "val") is None


def test_the_plan_ends_and_asks_for_each_run_once():
    options = Options(rates=16, seeds=8, other_seeds=4)
    runs, rounds = finish(options, wsd=0.03)
    assert rounds == 3
    assert {run["arm"] for run in runs.values()} == {*TUNED, *DRAWN}
    # 18 rates x 8 seeds and 8 that report; the others 8 x 2 + 3 x 4 - 2, or with the first rate best 8 x 2 + 2 x 4 - 2.
    cosine = [run for run in runs.values() if run["arm"] == "cosine"]
    wsd = [run for run in runs.values() if run["arm"] == "wsd"]
    assert (len(cosine), len(wsd)) == (18 * 8 + 8, 8 * 2 + 3 * 4 - 2 + 8)
    assert abs(len(runs) - plan.count_jobs(PART, options, 0)) <= 5 * 4  # which takes half as many reports again
    chosen = plan.tuned_rates(PART, options, "wsd", runs)
    nearest = min(tuned_grid(PART, options), key=lambda rate: abs(np.log(rate / 0.03)))
    assert chosen == {"final": nearest, "best": nearest, "averaged": nearest}


def test_an_interrupted_plan_asks_for_what_is_missing():
    runs, _ = finish()
    lost = [key for key in runs if key.startswith(("yoked", "uwhg"))]
    kept = {key: run for key, run in runs.items() if key not in lost}
    assert sorted(job.key for job in next_jobs(PART, SMALL, (), kept)) == sorted(lost)
    for key in [key for key in kept if key.startswith("default ")]:
        del kept[key]
    assert {job.arm for job in next_jobs(PART, SMALL, (), kept)} == {"default", "uwhg"}  # a twin waits for its partner


def test_twins_replay_the_next_seed():
    jobs = [job for job in planned_jobs(PART, Options(), (), {}) if job.arm == "yoked:default"]
    rates = drawn_rates(PART, 8)
    assert [partner(job, Options()) for job in jobs] == [
        Job("default", rates[(index + 1) % 8], "report", (index + 1) % 8) for index in range(8)
    ]
    assert partner(Job("default", 0.1, "report", 0), Options()) is None


# ---- files ------------------------------------------------------------------------------------------------------


def keep(folder, runs, options=SMALL, brains=(), part=PART):
    names = {arm: "v1" for arm in (*TUNED, *DRAWN)} | {f"brain:{name}": "ppo 1" for name in brains}
    kept = store.open_part(part, folder, options, names)
    kept.runs |= runs
    kept.save()
    return kept


def test_a_part_is_kept_and_read_again(tmp_path):
    runs, _ = finish()
    keep(tmp_path, runs)
    again = store.load_all(tmp_path)[0]
    assert again.runs == json.loads(json.dumps(runs))
    assert (again.options, again.part.name) == (SMALL, PART.name)


def test_only_the_arms_that_changed_are_run_anew(tmp_path):
    runs, _ = finish()
    kept = keep(tmp_path, runs)
    again = store.open_part(PART, tmp_path, SMALL, {**kept.arms, "default": "ppo 2", "yoked:default": "ppo 2"})
    assert {job.arm for job in next_jobs(PART, SMALL, (), again.runs)} == {"default"}
    assert len(runs) - len(again.runs) == 2 * SMALL.seeds


def test_more_seeds_use_what_there_is(tmp_path):
    runs, _ = finish()
    keep(tmp_path, runs)
    more = Options(rates=4, seeds=3, other_seeds=1)
    again = store.open_part(PART, tmp_path, more, {})
    new = [job for job in next_jobs(PART, more, (), again.runs) if job.arm == "cosine" and job.role == "choose"]
    assert {job.index for job in new} == {2}


def test_a_file_of_other_settings_is_refused(tmp_path):
    path = keep(tmp_path, finish()[0]).path
    data = json.loads(path.read_text())
    data["description"]["total_steps"] = 80
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"made with other settings \(total_steps: 80 then, 60 now\); move it away"):
        store.load_all(tmp_path)
    path.write_text("{}")
    with pytest.raises(InputError, match="is not a file of this benchmark"):
        store.load_all(tmp_path)


# ---- figures and tables -----------------------------------------------------------------------------------------


def test_figures_of_a_part_that_is_known(tmp_path):
    options = Options(rates=16, seeds=2, other_seeds=1)
    best = tuned_grid(PART, options)[9]
    runs, _ = finish(options, best_rate=best)
    for run_ in runs.values():
        if run_["arm"] in DRAWN:  # 1.5 times what tuned cosine ends at with the same seed
            loss = 1.5 * (0.1 + 0.001 * run_["index"])
            run_ |= {"val": loss, "test": loss, "best_val": loss, "best_test": loss, "curve": [[0, 2.0], [60, loss]]}
            run_ |= {"average_val": loss / 2, "average_test": loss / 3}
        if run_["arm"] == "uwhg":
            run_ |= {"test": None, "curve": [[0, 2.0], [15, 0.1]]}
    summary = summarize([keep(tmp_path, runs, options)])
    final = summary["final"]
    part = final["parts"][0]
    assert part["tuned_cosine_loss"] == pytest.approx(0.1005)
    assert part["tuned_rates"] == dict.fromkeys(TUNED, best)
    assert part["best_arm"] == "constant"  # equal losses: the first by name
    default, rule = final["arms"]["default"], final["arms"]["uwhg"]
    assert default["ratio"] == {"mean": pytest.approx(1.5), "interval": None}
    assert default["worst"] == {"ratio": pytest.approx(1.5), "part": PART.name}
    assert default["time_to_target"] is None
    assert rule["ratio"]["mean"] == pytest.approx(4.0 / 0.1005)  # both runs diverged, from 2.0
    assert rule["time_to_target"] == 0.25
    assert part["diverged"] == {"uwhg": 2}
    averaged = summary["averaged"]["arms"]
    assert averaged["default"]["ratio"]["mean"] == pytest.approx(0.5)  # a third of 1.5 times
    assert averaged["default"]["over_best_weights"]["mean"] == pytest.approx(0.5)
    assert averaged["cosine"]["over_best_weights"]["mean"] == pytest.approx(1.0)
    assert summary["best"]["arms"]["default"]["ratio"]["mean"] == pytest.approx(1.5)
    assert final["arms"]["cosine"]["time_to_target"] == 1.0
    differences = {(row["arm"], row["other"]): row["mean"] for row in final["differences"]}
    assert differences["default", "placebo:default"] == pytest.approx(1.0)
    assert set(final["goals"]["default"].values()) == {False, None}
    pool = [run_ for run_ in runs.values() if run_["arm"] == "cosine" and run_["role"] == "choose"]
    searched = plan.search_grid(PART, options)
    losses = np.array([run_["test"] for run_ in pool if run_["rate"] in searched])
    assert default["search_equivalent"]["runs"] == pytest.approx(
        figures.search_equivalent(0.1005 * 1.5, losses, losses)
    )
    assert 1 < default["search_equivalent"]["runs"] < 256


def test_a_page_says_what_is_missing_and_that_it_is_a_trial(tmp_path):
    runs, _ = finish(brains=("a", "b"))
    runs = {key: run_ for key, run_ in runs.items() if run_["arm"] != "prodigy"}
    page = render(summarize([keep(tmp_path, runs, brains=("a", "b"))]))
    assert "A TRIAL" in page
    assert "Not run: digits-mlp-660," in page
    assert "| `prodigy` |" not in page
    assert "| `prodigy-cosine` |" in page
    assert "| `brain:a` |" in page
    assert "The 2 brains together" in page
    assert "| geometric mean over tuned cosine at most 1.02 |" in page
    del runs[next(key for key in runs if key.startswith("wsd") and "report" in key)]
    page = render(summarize([keep(tmp_path / "torn", runs)]))
    assert f"Left out, since runs are missing: {PART.name}" in page
    assert "nothing to show" in page


@pytest.mark.slow
def test_the_whole_command_on_its_smallest_part(tmp_path, capsys):
    pytest.importorskip("schedulefree", reason="the extra [baselines] is not installed")
    given = ["--part", PART.name, "--seeds", "2", "--rates", "4", "--other-seeds", "1", "--workers", "0"]
    assert zero_shot.main([*given, "--out", str(tmp_path)]) == 0
    assert zero_shot.main([*given, "--out", str(tmp_path)]) == 0
    assert "nothing is missing" in capsys.readouterr().out
    assert zero_shot.main(["--table", "--out", str(tmp_path)]) == 0
    assert "## Over all parts" in (tmp_path / "table.md").read_text()
    assert json.loads((tmp_path / "table.json").read_text())["head"]["is_trial"] is True


def test_data_that_is_missing_is_said_before_anything_is_run(tmp_path, capsys):
    pytest.importorskip("schedulefree", reason="the extra [baselines] is not installed")
    given = ["--part", PART.name, "--part", "titanic-fcnn", "--data-dir", str(tmp_path), "--out", str(tmp_path / "out")]
    assert zero_shot.main(given) == 2
    assert "no titanic data: looked for titanic/train.parquet" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys):
    assert zero_shot.main(["--table", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"\nerror: {tmp_path} holds no results of a part; run some first, or give their folder as --out\n"
    )
    assert zero_shot.main(["--plan", "--part", "x"]) == 2
    assert "unknown part 'x'" in capsys.readouterr().err
    assert zero_shot.main(["--table", "--members", "--data-dir", "d", "--rates", "8", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        "\nerror: --table tells of all that --out holds and runs nothing; leave out --rates, --members, --data-dir\n"
    )


def test_members_are_not_left_behind_where_nothing_is_run(tmp_path, capsys):
    assert zero_shot.main(["--members", "--part", "x", "--out", str(tmp_path / "out")]) == 2
    assert "unknown part 'x'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_members_of_the_default_brain_have_it_as_their_mean():
    whole = Brain.load("default")
    members = zero_shot.default_members()
    assert len(members) == whole.agent.members == 5
    assert {member.spec.fingerprint for member in members} == {whole.spec.fingerprint}
    joined = type(whole.agent).join([member.agent for member in members])
    seen = np.random.default_rng(0).normal(size=(50, len(whole.spec.signals)))
    np.testing.assert_array_equal(joined.outputs(seen), whole.agent.outputs(seen))
    assert not np.allclose(members[0].agent.outputs(seen), members[1].agent.outputs(seen))


def test_the_plan_counts_members_as_brains(capsys):
    totals = []
    for given in ([], ["--members"]):
        assert zero_shot.main(["--plan", "--part", "digits-mlp-60", *given]) == 0
        totals.append(int(capsys.readouterr().out.split()[1]))
    assert totals[1] - totals[0] == 5 * 8
