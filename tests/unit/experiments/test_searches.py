"""Searches as arms: what is tried, what it may cost, who wins, and that a stopped one goes on as if it had not been."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from trimtab.errors import InputError, MissingExtraError, UnknownNameError
from trimtab.experiments import single
from trimtab.experiments.design import load_study
from trimtab.experiments.jobs import load_data, make_task
from trimtab.experiments.pbt import HISTORY
from trimtab.experiments.plan import plan_jobs
from trimtab.experiments.run import run
from trimtab.experiments.search_methods import PARTS, Listed, Tpe
from trimtab.experiments.search_space import Space
from trimtab.experiments.searches import check_search
from trimtab.experiments.trials import Setup, TrialRun
from trimtab.seeding import derive_seed
from trimtab.storage import load_state
from trimtab.training.loop import TrainingLoop

Json = dict[str, Any]
RATES = {"lr": {"low": 1e-4, "high": 0.1}}
# The smoke scale has 60 optimizer steps of 32 samples.
BUDGET = 60


def job_of(folder: Path, search: Json, *, agent: str = "constant", study: str = "", arm: str = "") -> Json:
    """The first job of a study with one search."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "s.yaml"
    entry = f"{{id: searched, agent: {agent}, search: {json.dumps(search)}{arm}}}"
    path.write_text(f"study: s\nidea: i\ntasks: [digits-mlp]\nn_seeds: 2\narms: [{entry}]\n{study}")
    return plan_jobs(load_study(path, scale="smoke"))[0].to_json()


def do(out: Path, job: Json, progress: Any = lambda news: None) -> Json:
    return single.run_one(job, str(out), None, progress)


def folder_of(out: Path, job: Json) -> Path:
    return out / job["directory"]


def trials_of(out: Path, job: Json) -> list[Json]:
    return [json.loads(path.read_text()) for path in sorted(folder_of(out, job).glob("trial-*/trial.json"))]


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key != "times"}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def everything(out: Path, job: Json) -> Json:
    """All that a search leaves, but times and the database."""
    folder = folder_of(out, job)
    found: Json = {"result": without_times(json.loads((folder / "result.json").read_text()))}
    found["trials"] = without_times(trials_of(out, job))
    found["files"] = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    for name in ("series.jsonl", HISTORY):
        if (folder / name).exists():
            found[name] = (folder / name).read_text()
    return found


SEARCHES: dict[str, Json] = {
    "grid": {"method": "grid", "points": 2, "space": {**RATES, "weight_decay": {}}},
    "random": {"method": "random", "trials": 4, "space": {**RATES, "batch_size": {"low": 16, "high": 64}}},
    "tpe": {"method": "tpe", "trials": 4, "space": RATES},
    "pbt": {"method": "pbt", "trials": 4, "space": {**RATES, "batch_size": {"low": 16, "high": 64}}},
}


# ---- what is tried ----------------------------------------------------------------------------------------------


def test_a_grid_visits_exactly_the_product(tmp_path):
    space = {
        "lr": {"low": 1e-3, "high": 1e-1},
        "batch_size": {"low": 16, "high": 64},
        "optimizer": {"choices": ["sgd", "adam"]},
    }
    job = job_of(tmp_path, {"method": "grid", "space": space})
    do(tmp_path, job)
    found = [tuple(trial["values"].values()) for trial in trials_of(tmp_path, job)]
    rates = [pytest.approx(rate) for rate in (1e-3, 1e-2, 1e-1)]
    assert found == list(itertools.product(rates, [16, 32, 64], ["sgd", "adam"]))
    # 60 steps over 18 trials: the first six have one more than the others.
    assert [trial["total_steps"] for trial in trials_of(tmp_path, job)] == [4] * 6 + [3] * 12


def test_whole_numbers_that_fall_together_count_once():
    space = Space(["layers", "dropout"], {"layers": {"low": 1, "high": 2}})
    assert [tuple(values.values()) for values in space.grid(3)] == [
        *((1, p) for p in (pytest.approx(0.1), pytest.approx(0.4), pytest.approx(0.7))),
        *((2, p) for p in (pytest.approx(0.1), pytest.approx(0.4), pytest.approx(0.7))),
    ]


def test_draws_are_even_on_each_scale():
    space = Space(["lr", "layers", "batch_size", "momentum", "optimizer"], {"lr": {"low": 1e-4, "high": 1e-2}})
    draws = [space.draw(dict.fromkeys(space.knobs, (n + 0.5) / 1000)) for n in range(1000)]
    assert np.median([d["lr"] for d in draws]) == pytest.approx(1e-3, rel=0.01)
    assert [sum(d["layers"] == n for d in draws) for n in (1, 2, 3, 4)] == [250] * 4  # the ends no less often
    assert {d["batch_size"] for d in draws} >= {16, 128}
    assert min(d["batch_size"] for d in draws) == 16
    assert np.median([d["momentum"] for d in draws]) == pytest.approx(1 - 1e-3**0.5, rel=0.01)
    assert {d["optimizer"] for d in draws} == {"sgd", "adam", "adamw"}


def test_random_values_depend_on_the_seed_alone(tmp_path):
    search = SEARCHES["random"]
    first = job_of(tmp_path, search)
    second = plan_jobs(load_study(tmp_path / "s.yaml", scale="smoke"))[1].to_json()
    for job in (first, second):
        do(tmp_path / "a", job)
    for job in (second, first):  # as another number of workers would have it
        do(tmp_path / "b", job)
    for job in (first, second):
        assert everything(tmp_path / "a", job) == everything(tmp_path / "b", job)
    assert trials_of(tmp_path / "a", first)[0]["values"] != trials_of(tmp_path / "a", second)[0]["values"]
    # More trials, and another parameter beside, leave the values of the others as they were.
    more = job_of(tmp_path, {**search, "trials": 6, "space": {"weight_decay": {}, **search["space"]}})
    do(tmp_path / "c", more)
    known = [trial["values"] for trial in trials_of(tmp_path / "a", first)]
    found = [trial["values"] for trial in trials_of(tmp_path / "c", more)]
    assert [{name: values[name] for name in known[0]} for values in found[:4]] == known


@pytest.mark.slow
def test_a_study_of_searches_does_not_depend_on_the_number_of_workers(tmp_path):
    job_of(tmp_path, SEARCHES["tpe"])
    found = []
    for workers in (0, 2):
        assert run(tmp_path / "s.yaml", out=tmp_path / str(workers), scale="smoke", workers=workers).exit_code == 0
        results = json.loads((tmp_path / str(workers) / "results.json").read_text())
        found.append([row["metrics"]["test_loss"]["values"] for row in results["arms"]])
    assert found[0] == found[1]


# ---- how values act ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("agent", ["constant", "cosine"])
def test_a_trial_is_the_plain_run_with_its_values(tmp_path, agent):
    search = {"method": "random", "trials": 3, "space": {**RATES, "weight_decay": {"low": 1e-4, "high": 1e-1}}}
    job = job_of(tmp_path, search, agent=agent)
    result = do(tmp_path, job)
    winner = trials_of(tmp_path, job)[result["search"]["winner"]]
    values = winner["values"]
    plain = {**job, "search": None, "kind": "baseline", "knobs": ["lr"], "knob_options": {}, "directory": "runs/p"}
    plain |= {"initial_lr": values["lr"], "weight_decay": values["weight_decay"], "total_steps": winner["total_steps"]}
    metrics = do(tmp_path, plain)["metrics"]
    for name in ("test_loss", "test_accuracy", "final_val_loss"):
        assert result["metrics"][name] == metrics[name]


def setup_of(folder: Path, space: Json, **job: Any) -> Setup:
    given = job_of(folder, {"method": "random", "trials": 1, "space": space}) | job
    made = Setup(given, load_data("digits-mlp", "smoke", None), Space(list(space), space), PARTS)
    made.space.fit(made.make_loop, made.seed)
    return made


def test_a_network_of_another_shape_is_drawn_like_any_other(tmp_path, device):
    setup = setup_of(tmp_path, {"units": {}, "layers": {}}, device=device.type)
    loop = TrialRun(setup, {"units": 96.0, "layers": 2.0}, 20).loop
    linear = [module for module in loop.model.modules() if isinstance(module, nn.Linear)]
    assert [tuple(module.weight.shape) for module in linear] == [(96, 64), (96, 96), (10, 96)]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(derive_seed(setup.seed, "weights"))
        fresh = [nn.Linear(64, 96), nn.Linear(96, 96), nn.Linear(96, 10)]
    for module, other in zip(linear, fresh, strict=True):
        assert torch.equal(module.weight.cpu(), other.weight)
        assert torch.equal(module.bias.cpu(), other.bias)
    ours = {id(parameter) for group in loop.optimizer.param_groups for parameter in group["params"]}
    assert ours == {id(parameter) for parameter in loop.model.parameters()}
    # Six multiply-adds a weight and sample, but four where no gradient of the inputs is needed.
    cost = 4 * 64 * 96 + 6 * 96 * 96 + 6 * 96 * 10
    assert loop.step_cost == pytest.approx(cost / (4 * 64 * 64 + 6 * 64 * 10))


def test_the_networks_own_shape_is_left_as_it_is(tmp_path):
    setup = setup_of(tmp_path, {"units": {}})
    loop = TrialRun(setup, {"units": 64.0}, 20).loop
    plain = setup.make_loop({}, 20)
    for one, other in zip(loop.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_network_that_draws_in_its_own_way_is_refused(tmp_path):
    setup = setup_of(tmp_path, RATES)
    task = make_task(setup.job)

    def halved(data):
        model = task.make_model(data)
        with torch.no_grad():
            model[0].weight.mul_(0.5)
        return model

    def make_loop(values):
        return TrainingLoop(task.replace(make_model=halved), setup.data, seed=setup.seed)

    with pytest.raises(InputError, match="the network of 'digits-mlp' draws its weights in a way of its own"):
        Space(["units"], {}).fit(make_loop, setup.seed)


def test_what_a_network_has_not_is_left_out_where_that_is_asked_for(tmp_path):
    search = {"method": "grid", "points": 2, "space": {"dropout": {}, **RATES}, "masks": True}
    job = job_of(tmp_path, search)
    check_search(job, None)
    result = do(tmp_path, job)
    assert [list(trial["values"]) for trial in trials_of(tmp_path, job)] == [["lr"], ["lr"]]
    header = json.loads((folder_of(tmp_path, job) / "run.json").read_text())
    assert list(header["search"]["space"]) == ["lr"]
    assert header["search"]["masked"]["dropout"].startswith("Sequential has no dropout: ")
    assert [note.split(":")[:2] for note in result["notes"]] == [["not searched here", " dropout"]]
    with pytest.raises(InputError, match="search: no parameter of the space can act: Sequential has no dropout"):
        check_search(job_of(tmp_path, {**search, "space": {"dropout": {}}}), None)


def test_bounds_are_narrowed_to_what_the_run_can_take(tmp_path):
    setup = setup_of(tmp_path, {"batch_size": {"low": 16, "high": 5000}})
    assert setup.space.bounds() == {"batch_size": {"low": 16, "high": 1077, "scale": "log"}}


def test_what_is_read_back_must_be_what_was_written(tmp_path, monkeypatch):
    setup = setup_of(tmp_path, {"batch_size": {}})
    monkeypatch.setattr(TrainingLoop, "resize", lambda self, size: None)
    with pytest.raises(InputError, match=r"batch_size: 32\.0 was read back where 50\.0 was written"):
        TrialRun(setup, {"batch_size": 50.0}, 20)


# ---- what it may cost -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SEARCHES)
def test_trials_share_one_runs_budget(tmp_path, method):
    job = job_of(tmp_path, SEARCHES[method])
    result = do(tmp_path, job)
    trials = trials_of(tmp_path, job)
    header = json.loads((folder_of(tmp_path, job) / "run.json").read_text())
    spent = sum(trial["spent"] for trial in trials)
    assert spent <= BUDGET
    assert all(trial["spent"] <= trial["total_steps"] + 1e-6 for trial in trials)
    # What is left pays for no further step of any trial; of tpe, for no further trial.
    assert spent > BUDGET - 4 * (128 / 32)
    metrics = result["metrics"]
    assert metrics["flops"] == pytest.approx(header["flops_budget"] * spent / BUDGET)
    assert metrics["samples"] == sum(trial["samples"] for trial in trials) == pytest.approx(32 * spent)
    assert metrics["optimizer_steps"] == sum(trial["optimizer_step"] for trial in trials)
    assert metrics["budget_used"] == pytest.approx(spent / BUDGET)


@pytest.mark.parametrize("method", ["random", "tpe", "pbt"])
def test_or_each_gets_a_runs_budget(tmp_path, method):
    job = job_of(tmp_path, {**SEARCHES[method], "trials": 2, "space": RATES, "budget": "each"})
    result = do(tmp_path, job)
    assert {trial["total_steps"] for trial in trials_of(tmp_path, job)} == {BUDGET}
    used = result["metrics"]["budget_used"]
    assert used == 2 if method != "tpe" else 1 < used <= 2


def test_tpe_spends_what_stopped_trials_leave(tmp_path):
    job = job_of(tmp_path, {**SEARCHES["tpe"], "trials": 6, "budget": "each"})
    result = do(tmp_path, job)
    trials = trials_of(tmp_path, job)
    pruned = [trial for trial in trials if trial["status"] == "pruned"]
    assert len(pruned) == result["search"]["pruned"] > 0
    assert len(trials) == result["search"]["trials"] > 6
    for trial in pruned:  # after 1/9 or 1/3 of the trial, at the first step that is beyond
        assert trial["rows"][-1]["part"] in (1, 3)
        assert trial["spent"] in (7, 20)
    spent = sum(trial["spent"] for trial in trials)
    assert 5 * BUDGET < spent <= 6 * BUDGET
    assert trials[result["search"]["winner"]]["status"] == "done"


@pytest.mark.parametrize("method", ["random", "tpe"])
def test_there_is_an_end_where_no_trial_can_pay_for_a_step(tmp_path, method):
    job = job_of(tmp_path, {"method": method, "trials": 8, "space": {"batch_size": {"low": 300, "high": 512}}})
    result = do(tmp_path, job)
    assert (result["search"]["trials"], result["search"]["idle"]) == (16, 16)
    assert result["metrics"]["flops"] == 0
    assert result["notes"] == ["16 of 16 trials: their budget did not pay for a single optimizer step"]


def test_what_its_part_does_not_pay_for_is_drawn_again(tmp_path):
    # Ten optimizer steps for each trial: a batch of more than 320 samples costs more.
    job = job_of(tmp_path, {"method": "random", "trials": 6, "space": {"batch_size": {"low": 200, "high": 512}}})
    result = do(tmp_path, job)
    sizes = [trial["values"]["batch_size"] for trial in trials_of(tmp_path, job)]
    is_idle = [trial["optimizer_step"] == 0 for trial in trials_of(tmp_path, job)]
    assert is_idle == [size > 320 for size in sizes] == [t["status"] == "idle" for t in trials_of(tmp_path, job)]
    assert not is_idle[result["search"]["winner"]]
    assert 0 < sum(is_idle) <= 6
    assert len(sizes) - sum(is_idle) == 6
    first = next(trial for trial in trials_of(tmp_path, job) if trial["optimizer_step"] > 0)
    assert result["search"]["one_run"]["values"] == first["values"]


def test_a_search_over_what_changes_the_cost_puts_budgets_in_flops(tmp_path):
    job_of(tmp_path, {**SEARCHES["random"], "space": RATES})
    assert load_study(tmp_path / "s.yaml").budget == "optimizer steps"
    job_of(tmp_path, {**SEARCHES["random"], "space": {"units": {}}})
    assert load_study(tmp_path / "s.yaml").budget == "training FLOPs"


# ---- who wins ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SEARCHES)
def test_the_lowest_validation_loss_wins_and_test_is_read_once(tmp_path, monkeypatch, method):
    reads = []
    evaluate = TrainingLoop.evaluate

    def counted(loop, split):
        reads.append(split)
        return evaluate(loop, split)

    monkeypatch.setattr(TrainingLoop, "evaluate", counted)
    job = job_of(tmp_path, SEARCHES[method])
    result = do(tmp_path, job)
    ends = {trial["number"]: trial["val_loss"] for trial in trials_of(tmp_path, job) if trial["status"] == "done"}
    assert result["search"]["winner"] == min(ends, key=lambda number: ends[number])
    # With the weights that it ended with: validation, measured again, gives the same.
    assert result["metrics"]["final_val_loss"] == min(ends.values())
    assert reads.count("test") == result["test_reads"] == 1
    assert not list(folder_of(tmp_path, job).rglob("*.safetensors"))


def test_one_run_is_the_first_trial(tmp_path):
    job = job_of(tmp_path, {**SEARCHES["random"], "space": RATES, "budget": "each"})
    one, first = do(tmp_path, job)["search"]["one_run"], trials_of(tmp_path, job)[0]
    assert (one["values"], one["final_val_loss"], one["budget_used"]) == (first["values"], first["val_loss"], 1.0)
    assert one["best_val_loss"] == min(row["val_loss"] for row in first["rows"])
    assert [row["part"] for row in first["rows"]] == list(range(1, PARTS + 1))


def test_a_trial_that_diverges_comes_last(tmp_path):
    space = {"lr": {"low": 1e-3, "high": 1e30}}
    job = job_of(tmp_path, {"method": "grid", "points": 2, "space": space}, study="optimizer: sgd\n")
    result = do(tmp_path, job)
    assert [trial["status"] for trial in trials_of(tmp_path, job)] == ["done", "diverged"]
    assert result["search"]["winner"] == 0
    assert result["notes"] == ["1 of 2 trials ended without a finite validation loss"]


def test_the_series_shows_the_best_loss_by_what_all_trials_have_spent(tmp_path):
    job = job_of(tmp_path, SEARCHES["pbt"])
    do(tmp_path, job)
    rows = [json.loads(line) for line in (folder_of(tmp_path, job) / "series.jsonl").read_text().splitlines()]
    trials = trials_of(tmp_path, job)
    assert len(rows) == sum(len(trial["rows"]) for trial in trials)
    assert rows[-1]["spent"] == pytest.approx(sum(trial["spent"] for trial in trials))
    assert all(a["spent"] <= b["spent"] and a["val_loss"] >= b["val_loss"] for a, b in itertools.pairwise(rows))
    assert rows[-1]["val_loss"] == min(row["val_loss"] for trial in trials for row in trial["rows"])
    assert [row["trial"]["number"] for row in rows[:4]] == [0, 1, 2, 3]  # in turn


# ---- going on ---------------------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


def stop_after(count: int) -> Any:
    calls = itertools.count(1)

    def progress(news: Json) -> None:
        if next(calls) == count:
            raise Stopped

    return progress


@pytest.mark.parametrize("method", SEARCHES)
def test_a_stopped_search_goes_on_to_the_same_end(tmp_path, method):
    job = job_of(tmp_path, SEARCHES[method])
    do(tmp_path / "whole", job)
    for count in (3, 11, 7):  # in the first trial, in the second, and in a later one; of pbt in the first three rounds
        with pytest.raises(Stopped):
            do(tmp_path / "cut", job, stop_after(count))
    do(tmp_path / "cut", job)
    assert everything(tmp_path / "cut", job) == everything(tmp_path / "whole", job)


@pytest.mark.parametrize("method", SEARCHES)
def test_a_finished_search_trains_nothing(tmp_path, monkeypatch, method):
    job = job_of(tmp_path, SEARCHES[method])
    result = do(tmp_path, job)
    monkeypatch.setattr(TrainingLoop, "step", lambda self: pytest.fail("a step was taken"))
    assert do(tmp_path, job) == result
    # Nor does one whose result alone is missing, so far as its winner's weights are there to be measured.
    (folder_of(tmp_path, job) / "result.json").unlink()
    with pytest.raises(InputError, match="cannot read the state"):
        do(tmp_path, job)


def test_tpe_goes_on_where_it_was_stopped_between_a_trials_file_and_its_database(tmp_path, monkeypatch):
    job = job_of(tmp_path, SEARCHES["tpe"])
    do(tmp_path / "whole", job)
    tell = Tpe.tell

    def torn(method, record):
        if record["number"] == 2:
            raise Stopped
        tell(method, record)

    with monkeypatch.context() as patched:
        patched.setattr(Tpe, "tell", torn)
        with pytest.raises(Stopped):
            do(tmp_path / "cut", job)
    assert len(trials_of(tmp_path / "cut", job)) == 3
    do(tmp_path / "cut", job)
    assert everything(tmp_path / "cut", job) == everything(tmp_path / "whole", job)


def test_a_trial_of_other_values_is_not_taken_for_ours(tmp_path, monkeypatch):
    job = job_of(tmp_path, SEARCHES["tpe"])
    monkeypatch.setattr(Tpe, "tell", lambda self, record: (_ for _ in ()).throw(Stopped))
    with pytest.raises(Stopped):
        do(tmp_path, job)
    path = folder_of(tmp_path, job) / "trial-000" / "trial.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "values": {"lr": 0.5}}))
    with pytest.raises(
        InputError, match=r"holds a trial of \{'lr': 0.5\} where the search asks for .* remove the folder"
    ):
        do(tmp_path, job)


# ---- pbt --------------------------------------------------------------------------------------------------------


def population(folder: Path, out: Path, keep: Path, size: int = 4, **search: Any) -> tuple[list[Json], Json]:
    """Train a population, with the states of all its rounds copied to a folder; its history."""
    job = job_of(folder, {**SEARCHES["pbt"], "trials": size, **search})
    save = TrialRun.save

    def kept(run: TrialRun, path: Path) -> None:
        save(run, path)
        keep.mkdir(exist_ok=True)
        shutil.copy(path, keep / f"{path.parent.name}-{path.name}")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TrialRun, "save", kept)
        do(out, job)
    return [json.loads(line) for line in (folder_of(out, job) / HISTORY).read_text().splitlines()], job


def test_a_copy_has_the_weights_to_the_bit(tmp_path, monkeypatch):
    begun: list[tuple[Path, Path, Json, Json]] = []
    load = TrialRun.load

    def looked_at(run, path, source=None):
        load(run, path, source)
        if source is not None:
            state = run.loop.state_dict()
            own, other = load_state(path)["loop"], load_state(source)["loop"]
            for name, tensor in other["model"].items():
                assert torch.equal(state["model"][name], tensor)
            for index, entry in other["optimizer"]["state"].items():
                for key, tensor in entry.items():
                    assert torch.equal(state["optimizer"]["state"][index][key], tensor)
            assert any(not torch.equal(own["model"][name], tensor) for name, tensor in other["model"].items())
            # What has been spent, and where the data stands, is the member's own.
            assert [state[key] for key in ("spent", "steps_done", "samples_seen")] == [
                own[key] for key in ("spent", "steps_done", "samples_seen")
            ]
            assert state["optimizer"]["param_groups"][0]["lr"] == run.values["lr"]
            assert run.loop.batch_size == run.values["batch_size"]
            begun.append((path, source, own, other))

    monkeypatch.setattr(TrialRun, "load", looked_at)
    history, _ = population(tmp_path, tmp_path / "out", tmp_path / "keep")
    assert len(begun) == sum(row["source"] != row["member"] for row in history) > 0


def test_every_copy_and_move_is_in_the_history(tmp_path):
    history, job = population(tmp_path, tmp_path / "out", tmp_path / "keep", size=8)
    low, high = RATES["lr"]["low"], RATES["lr"]["high"]
    values: dict[int, Json] = {}
    for number in range(1, 11):
        rows = [row for row in history if row["round"] == number]
        assert [row["member"] for row in rows] == list(range(8))
        ranked = sorted(rows, key=lambda row: row["val_loss"])
        best, worst = {row["member"] for row in ranked[:2]}, {row["member"] for row in ranked[-2:]}
        for row in rows:
            assert row["before"] == values.get(row["member"], row["before"])
            values[row["member"]] = row["after"]
            if row["member"] not in worst or number == 10:
                assert (row["source"], row["copied"], row["after"]) == (row["member"], None, row["before"])
                continue
            assert row["source"] in best
            source = next(other for other in rows if other["member"] == row["source"])
            assert row["copied"] == source["before"]
            asked = [min(max(row["copied"]["lr"] * factor, low), high) for factor in (0.8, 1.2)]
            assert any(row["after"]["lr"] == pytest.approx(rate) for rate in asked)
            sizes = [min(max(round(row["copied"]["batch_size"] * factor), 16), 64) for factor in (0.8, 1.2)]
            assert row["after"]["batch_size"] in sizes
    assert values == {trial["number"]: trial["values"] for trial in trials_of(tmp_path / "out", job)}


def test_moves_stay_inside_the_bounds(tmp_path):
    space = {"lr": {"low": 0.01, "high": 0.0105}, "batch_size": {"low": 31, "high": 33}}
    history, _ = population(tmp_path, tmp_path / "out", tmp_path / "keep", space=space)
    moved = [row["after"] for row in history if row["source"] != row["member"]]
    assert {values["lr"] for values in moved} == {0.01, 0.0105}
    assert {values["batch_size"] for values in moved} <= {31, 33}


def test_a_torn_line_of_the_history_is_left_out(tmp_path):
    job = job_of(tmp_path, SEARCHES["pbt"])
    do(tmp_path / "whole", job)
    with pytest.raises(Stopped):
        do(tmp_path / "cut", job, stop_after(10))
    path = folder_of(tmp_path / "cut", job) / HISTORY
    assert len(path.read_text().splitlines()) == 8
    path.write_text(path.read_text() + '{"round": 3, "mem')
    do(tmp_path / "cut", job)
    assert everything(tmp_path / "cut", job) == everything(tmp_path / "whole", job)


# ---- what is refused --------------------------------------------------------------------------------------------

RANDOM = SEARCHES["random"]


@pytest.mark.parametrize(
    ("search", "more", "error", "text"),
    [
        ({**RANDOM, "method": "bayes"}, {}, UnknownNameError,
         "unknown search method of arm 'searched' 'bayes'; known: grid, pbt, random, tpe"),
        ({**RANDOM, "space": {"lrr": {}}}, {}, UnknownNameError,
         r"unknown knob in search.space of arm 'searched' 'lrr'; did you mean 'lr'\?"),
        ({**RANDOM, "trials": 0}, {}, InputError,
         r"s.yaml: arms.0.search.trials: got 0, expected a whole number of at least 1"),
        ({"method": "random", "space": RATES}, {}, InputError,
         "arm 'searched': search: trials is missing; random needs their number"),
        ({**RANDOM, "space": {}}, {}, InputError, "s.yaml: arms.0.search.space: "),
        ({**RANDOM, "space": {"lr": 3}}, {}, InputError,
         r"s.yaml: arms.0.search.space: got lr: 3, expected options of the knob, \{\} for its own"),
        ({**RANDOM, "space": {"lr": {"low": "x"}}}, {}, InputError, "arms.0.search.space: got 'x', expected a number"),
        ({**RANDOM, "points": 3}, {}, InputError,
         "arm 'searched': search: points is for grid, the method is random; leave it out"),
        ({**RANDOM, "interval": 0.1}, {}, InputError, "interval is for pbt, the method is random; leave it out"),
        ({**SEARCHES["pbt"], "interval": 0.7}, {}, InputError,
         "got 0.7, expected a share of a member's budget above 0 and up to 0.5"),
        ({**RANDOM, "budget": "some"}, {}, InputError, "s.yaml: arms.0.search.budget: got 'some', expected 'shared'"),
        ({**RANDOM, "bugdet": "each"}, {}, UnknownNameError, "key in arms.0.search of s.yaml 'bugdet'; did you"),
        (RANDOM, {"agent": "uwhg"}, InputError,
         "arm 'searched': search: the agent is 'uwhg'; its trials train under a schedule: constant, step, exponential"),
        (RANDOM, {"agent": "default-cosine"}, InputError, "search: the agent is 'default-cosine'; its trials"),
        (RANDOM, {"arm": ", lr: 0.1"}, InputError,
         "search: lr is in space, and the arm has a rate of its own; leave one out"),
        (RANDOM, {"arm": ", start: {batch_size: 8}"}, InputError,
         "search: batch_size is in space and in start; leave one out"),
        (RANDOM, {"arm": ", learn_runs: 3"}, InputError,
         "search: learn_runs is for arms that decide while a run goes on; leave it out"),
        (RANDOM, {"arm": ", kind: learned"}, InputError, "search: kind is for arms that decide"),
    ],
)  # fmt: skip
def test_what_a_study_file_cannot_ask_for(tmp_path, search, more, error, text):
    with pytest.raises(error, match=text):
        job_of(tmp_path, search, **more)


@pytest.mark.parametrize("prefix", ["placebo", "yoked"])
def test_a_search_has_no_controls(tmp_path, prefix):
    job_of(tmp_path, RANDOM)
    path = tmp_path / "s.yaml"
    path.write_text(path.read_text().replace("arms: [", f"arms: ['{prefix}:searched', "))
    text = f"arm '{prefix}:searched': 'searched' is a search, which decides nothing in a run and has no {prefix}"
    with pytest.raises(InputError, match=text):
        load_study(path)


WHERE = "arm 'searched' on 'digits-mlp': "


@pytest.mark.parametrize(
    ("search", "text"),
    [
        ({**RANDOM, "space": {"lr": {"low": 0.1, "high": 0.01}}},
         WHERE + r"lr: bounds \[0.1, 0.01\]; expected 0 < low < high"),
        ({**RANDOM, "space": {"lr": {"lo": 0.1}}}, WHERE + r"unknown option of the knob 'lr' 'lo'; did you mean 'low'"),
        ({**RANDOM, "space": {"dropout": {}}}, WHERE + "Sequential has no dropout: "),
        ({**RANDOM, "space": {"batch_size": {"rate_scaling": "linear"}}},
         WHERE + "batch_size: what its moves do to the rate is for runs that are under way; leave it out"),
        ({**RANDOM, "trials": 61},
         WHERE + "search: 61 trials share a budget of 60 optimizer steps; give at most as many trials as steps, or"),
        ({"method": "grid", "trials": 5, "space": {**RATES, "weight_decay": {}}},
         WHERE + r"search: trials is 5, but the grid has 9 points \(3 values of each of lr, weight_decay\); leave"),
        ({**SEARCHES["pbt"], "space": {"units": {}}},
         WHERE + "search: 'units' changes the shape of the network, and pbt copies weights between members of"),
        ({**SEARCHES["pbt"], "space": {"optimizer": {}}},
         WHERE + "search: 'optimizer' has choices without an order, which pbt cannot move by a factor"),
        ({**SEARCHES["pbt"], "trials": 1}, WHERE + "search: pbt has 1 trial; expected a population of 2 or more"),
    ],
)  # fmt: skip
def test_what_a_task_cannot_give_is_refused_before_anything_is_written(tmp_path, search, text):
    job = job_of(tmp_path, search)
    with pytest.raises(InputError, match=text):
        check_search(job, None)
    with pytest.raises(InputError, match=text):
        run(tmp_path / "s.yaml", out=tmp_path / "out", scale="smoke", workers=0)
    assert not (tmp_path / "out").exists()


def test_a_grid_may_say_how_many_trials_it_has(tmp_path):
    check_search(job_of(tmp_path, {"method": "grid", "trials": 9, "space": {**RATES, "weight_decay": {}}}), None)


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    text = WHERE + r'the search method tpe needs the package optuna, .*; pip install "trimtab\[search\]"'
    with pytest.raises(MissingExtraError, match=text):
        check_search(job_of(tmp_path, SEARCHES["tpe"]), None)
    for method in ("grid", "random", "pbt"):  # the others do without
        check_search(job_of(tmp_path, SEARCHES[method]), None)


# ---- tpe's parameters -------------------------------------------------------------------------------------------


def test_tpe_draws_every_kind_of_parameter_inside_its_bounds(tmp_path):
    space = Space(["lr", "layers", "batch_size", "momentum", "optimizer", "dropout"], {"momentum": {"low": 0.5}})
    tpe = Tpe(tmp_path / "optuna.db", job_of(tmp_path, SEARCHES["tpe"]), space, 10, 90)
    try:
        for number in range(10):
            values = tpe.ask(number)
            for name, knob in space.knobs.items():
                setting = space.setting(name, values[name])
                assert knob.low - 1e-12 <= setting <= knob.high + 1e-12
                assert not knob.is_whole or setting == int(setting)
            tpe.tell({"status": "done", "val_loss": abs(float(values["momentum"]) - 0.9)})
    finally:
        tpe.close()


def test_a_list_shares_what_does_not_divide():
    values = [{"lr": float(n)} for n in range(4)]
    listed = Listed(values, 10)
    assert [listed.steps([{}] * number) for number in range(5)] == [3, 3, 2, 2, 0]


# ---- in a study -------------------------------------------------------------------------------------------------

STUDY = """
study: searched
idea: Is a learned arm's one run as good as a search?
tasks: [digits-mlp]
arms:
  - constant
  - {id: learned, agent: q_learning}
  - {id: random-4, agent: constant, search: {method: random, trials: 4, space: {lr: {low: 1.0e-4, high: 1.0e-1}}}}
  - {id: decay, agent: constant, search: {method: grid, budget: each, space: {weight_decay: {}}}}
n_seeds: 2
sensitivity_lrs: [0.01]
sensitivity_seeds: 1
"""


def test_the_study_in_the_documentation_can_be_planned(tmp_path):
    text = (Path(__file__).parents[3] / "docs" / "searches.md").read_text()
    path = tmp_path / "my-search.yaml"
    path.write_text(text.split("```yaml\n")[1].split("```")[0])
    jobs = [job for job in plan_jobs(load_study(path, scale="smoke")) if job.search is not None]
    assert [(job.arm, job.seed) for job in jobs] == [(a, n) for a in ("random-10", "tpe-10") for n in range(5)]
    for job in (jobs[0], jobs[5]):
        check_search(job.to_json(), None)


def test_a_search_is_an_arm_of_the_report(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(STUDY)
    assert run(path, out=tmp_path / "out", scale="smoke", workers=0).exit_code == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = {row["id"]: row for row in results["arms"]}
    row = rows["random-4"]
    assert (row["kind"], row["initial_lr"], row["n_seeds"]) == ("search", None, 2)
    assert row["search"]["trials"] == [4, 4]
    assert row["metrics"]["flops"]["mean"] == rows["constant"]["metrics"]["flops"]["mean"]
    assert rows["decay"]["metrics"]["budget_used"]["mean"] == 3
    assert rows["constant"]["search"] is None
    # A learned arm is compared with searches, seed by seed.
    difference = rows["learned"]["differences"]["random-4"]
    assert difference["roles"] == ["search"]
    assert difference["values"] == [
        a - b
        for a, b in zip(*(rows[arm]["metrics"]["test_loss"]["values"] for arm in ("learned", "random-4")), strict=True)
    ]
    # From another rate every arm was run but the one that searches the rate.
    assert results["unfinished"] == {"n_planned": 8 + 3, "n_over": 8 + 3, "missing": [], "problems": []}
    assert [arm for arm in rows if rows[arm]["sensitivity"]] == ["constant", "learned", "decay"]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| random-4 | search (random, 4 trials, budget shared) | constant |" in text
    assert "learned on digits-mlp, test loss against the search random-4: too few seeds to say" in text
    flops = row["cost"]["search_flops"]
    assert flops == 60 * 32 * 2 * (3 * (64 * 64 + 64 * 10) - 64 * 64)
    assert f"| random-4 | searched in 4 trials, {flops / 1e9:.4g}" in text
    again = run(path, out=tmp_path / "out", scale="smoke", workers=0, resume=True)
    assert (again.exit_code, again.n_runs) == (0, 11)
