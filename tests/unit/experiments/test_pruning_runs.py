"""Studies of pruning that run: a tiny one in the fast suite, resumption, `trimtab prune`, and the whole smoke study."""

import json
import re
import shutil

import pytest
import torch

import trimtab
from pruning_task import NAME, STUDY
from trimtab import cli, registry
from trimtab.errors import InputError, OutputError, RunFailedError
from trimtab.experiments import run
from trimtab.experiments.pruning import cell as cells
from trimtab.experiments.pruning import dense
from trimtab.experiments.pruning.command import parse_target, prune_task
from trimtab.experiments.pruning.ground import HeldOut
from trimtab.experiments.pruning.job import cells_of, run_one
from trimtab.experiments.pruning.results import TIMED
from trimtab.experiments.pruning.schema import jobs_of, load_pruning_study
from trimtab.pruner.loading import builder_of, load_pruned
from trimtab.pruner.policies import TaughtPolicy
from trimtab.pruning.saving import save_pruned
from trimtab.storage import read_json, read_lines, write_json

PIECE = f"runs/{NAME}/seed-0"


@pytest.fixture(scope="module", autouse=True)
def tiny_task():
    registry.add("task", NAME, "pruning_task:tiny", "for tests")
    yield
    del registry._TABLES["task"][NAME]


@pytest.fixture(scope="module")
def study_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "tiny.yaml"
    path.write_text(STUDY)
    return path


@pytest.fixture(scope="module")
def done(study_file, tmp_path_factory):
    """A study that was not interrupted."""
    out = tmp_path_factory.mktemp("done") / "out"
    assert run.run(study_file, scale="smoke", out=out, workers=0).exit_code == 0
    return out


def cell(out, method, piece=PIECE, target="flops-0.5"):
    return read_json(out / piece / "cells" / target / f"{method}.json")


def untimed(value):
    """Without what a clock gives."""
    if isinstance(value, dict):
        dropped = ("latency", "times", "environment", *TIMED)
        timed = re.compile("speed_up_|latency_")
        return {k: untimed(v) for k, v in value.items() if k not in dropped and not timed.match(k)}
    return [untimed(item) for item in value] if isinstance(value, list) else value


def everything(out):
    """All JSON of a study's folder but times and goals, which speak of times."""
    found = {}
    for path in sorted([*out.rglob("*.json"), *out.rglob("*.jsonl")]):
        name = path.relative_to(out).as_posix()
        found[name] = read_lines(path) if path.suffix == ".jsonl" else untimed(read_json(path))
    for key in ("goals", "conclusion"):
        found["results.json"].pop(key)
    return found


# What a cell says


def test_every_cell_is_there_and_keeps_to_the_budget(done):
    record = read_json(done / PIECE / "dense.json")
    model = load_pruned(done / PIECE / "dense")
    n = sum(p.numel() for p in model.parameters())
    assert (record["parameters"], record["bytes"], record["macs"]) == (13_706, 4 * 13_706, 87_744)
    assert n == 13_706
    assert (record["optimizer_steps"], record["schedule"], record["test_reads"]) == (30, "cosine", 1)
    for method in ("ppo", "uniform", "scratch"):
        found = cell(done, method)
        assert found["status"] == "done"
        assert found["left"]["flops"] <= 0.5
        assert found["left"]["flops"] == found["flops"] / record["flops"]
        assert found["macs"] == found["flops"] // 2
        assert found["pruning_ratio"] == pytest.approx(1 - found["parameters"] / 13_706)
        assert found["trade_off"] == pytest.approx(found["accuracy"]["test"]["after"] / (found["flops"] / 1e9))
        assert found["accuracy"]["test"]["dense"] == record["accuracy"]["test"]
        assert [t["batch_size"] for t in found["latency"]["timings"]] == [1, 1, 64, 64]
        assert found["latency"]["threads"] == 1
        c1, c2, d = (new for _, new in found["widths"].values())
        assert found["macs"] == 36 * c1 * 9 + 16 * c1 * c2 * 9 + 4 * c2 * d + 10 * d
        assert found["parameters"] == 10 * c1 + 9 * c1 * c2 + c2 + (4 * c2 + 1) * d + 10 * d + 10


def test_searches_keep_their_scores_and_scratch_has_the_widths_that_ppo_chose(done):
    ppo, uniform, scratch = (cell(done, method) for method in ("ppo", "uniform", "scratch"))
    assert ppo["evaluations"] == len(ppo["history"]) == 8
    assert max(ppo["history"]) == max(candidate["before"] for candidate in ppo["candidates"])
    assert ppo["accuracy"]["val"]["after"] == max(candidate["after"] for candidate in ppo["candidates"])
    assert len(ppo["candidates"]) == 2
    assert (uniform["evaluations"], len(uniform["history"])) == (1, 1)
    assert scratch["widths"] == ppo["widths"]
    assert scratch["accuracy"]["test"]["before"] is None
    assert scratch["evaluations"] == 0


def test_test_is_read_by_the_chosen_network_alone(study_file, tmp_path, monkeypatch):
    read = []
    real = HeldOut.accuracy
    monkeypatch.setattr(HeldOut, "accuracy", lambda self, model: read.append(model) or real(self, model))
    run.run(study_file, scale="smoke", out=tmp_path / "out", workers=0)
    # The dense network once; ppo and uniform as cut and as fine-tuned; scratch once.
    assert len(read) == 1 + 2 + 2 + 1
    assert len({id(model) for model in read}) == len(read)
    assert [cell(tmp_path / "out", method)["test_reads"] for method in ("ppo", "uniform", "scratch")] == [2, 2, 1]


def test_fine_tuning_takes_the_same_samples_for_every_network(done):
    job = read_json(done / PIECE / "run.json")
    ground = cells.Ground.of(job, registry.load("task", NAME)("smoke"), done / PIECE, None)
    seen = []
    for _ in range(2):
        tuner = ground.fine_tuner()
        model = load_pruned(done / PIECE / "dense")
        rows = []
        model.register_forward_pre_hook(lambda _, inputs, rows=rows: rows.append(inputs[0].clone()))
        before = [p.detach().clone() for p in model.parameters()]
        tuner(model.train())
        assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        seen.append(rows)
    assert len(seen[0]) == 3
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    assert tuner.rate == pytest.approx(5e-4)


# Going on


@pytest.mark.parametrize("lost", ["a cell", "half a search", "all but the dense network", "a failed cell"])
def test_a_resumed_study_is_the_one_that_was_not_interrupted(done, study_file, tmp_path, lost):
    out = tmp_path / "out"
    shutil.copytree(done, out)
    folder = out / PIECE
    (folder / "result.json").unlink()
    at = folder / "cells" / "flops-0.5"
    if lost == "a cell":
        (at / "uniform.json").unlink()
    elif lost == "half a search":
        (at / "ppo.json").unlink()
        log = at / "ppo.evaluations-1.jsonl"
        log.write_text("\n".join(log.read_text().splitlines()[:5]) + '\n{"wid')
    elif lost == "all but the dense network":
        shutil.rmtree(folder / "cells")
    else:
        write_json(at / "scratch.json", {"status": "failed", "error": "no power"})
        write_json(folder / "result.json", {"status": "failed", "error": "scratch: no power"})
    trained = (folder / "dense.json").stat().st_mtime_ns
    assert run.run(study_file, scale="smoke", out=out, workers=0, resume=True).exit_code == 0
    assert everything(out) == everything(done)
    assert (folder / "dense.json").stat().st_mtime_ns == trained


def test_a_killed_training_goes_on_from_its_checkpoint(done, study_file, tmp_path, monkeypatch):
    monkeypatch.setattr(dense, "_CHECKPOINT_EVERY_S", 0.0)
    (job,) = jobs_of(load_pruning_study(study_file, scale="smoke"))

    class Killed(BaseException):
        pass

    def die_at_12(news):
        if news["words"].endswith("step 12/30"):
            raise Killed

    with pytest.raises(Killed):
        run_one(job, str(tmp_path), None, die_at_12)
    seen = []
    assert run_one(job, str(tmp_path), None, lambda news: seen.append(news["words"]))["status"] == "done"
    assert seen[0] == "dense network: step 12/30"
    assert not (tmp_path / PIECE / "dense-checkpoint.safetensors").exists()
    for path in sorted((done / PIECE).rglob("*.json")):
        there = tmp_path / PIECE / path.relative_to(done / PIECE)
        assert untimed(read_json(there)) == untimed(read_json(path)), path
    weights = [load_pruned(folder / PIECE / "dense").state_dict() for folder in (done, tmp_path)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_finished_study_is_reported_again_and_another_plan_refused(done, study_file, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(done, out)
    (out / "report.md").unlink()
    assert run.run(study_file, scale="smoke", out=out, workers=0, resume=True).exit_code == 0
    assert (out / "report.md").is_file()
    with pytest.raises(OutputError, match=r"holds another plan: root_seed is 0 there, 3 is asked for now"):
        run.run(study_file, scale="smoke", seed=3, out=out, workers=0, resume=True)
    with pytest.raises(OutputError, match="is not empty; go on from what is there with --resume"):
        run.run(study_file, scale="smoke", out=out, workers=0)


def test_a_cell_that_fails_is_named_and_stops_no_other(study_file, tmp_path, monkeypatch):
    real = cells.run_method

    def broken(method, *args, **options):
        if method == "ppo":
            raise RunFailedError("no luck")
        return real(method, *args, **options)

    monkeypatch.setattr(cells, "run_method", broken)
    outcome = run.run(study_file, scale="smoke", out=tmp_path / "out", workers=0)
    assert outcome.exit_code == 1
    (why,) = outcome.failed.values()
    assert why == (
        "ppo at flops 0.5: no luck; scratch at flops 0.5: scratch trains the network that ppo chose, which has not "
        "come to its end"
    )
    assert cell(tmp_path / "out", "uniform")["status"] == "done"
    assert "2 cells of 3 failed" in (tmp_path / "out" / "report.md").read_text()


def test_scratch_comes_last_and_alone_has_the_widths_of_uniform(study_file):
    (job,) = jobs_of(load_pruning_study(study_file, scale="smoke", arms=["scratch", "uniform"]))
    assert [method for _, method in cells_of(job)] == ["uniform", "scratch"]


# trimtab prune and load_pruned


def invoke(capsys, *args):
    with pytest.raises(SystemExit) as ended:
        cli.main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return ended.value.code, out, err


def test_the_command_prunes_saves_and_reports(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRIMTAB_DATA", raising=False)
    words = ["prune", NAME, "--target", "flops=0.4", "--max-evaluations", 16, "--fine-tune-steps", 2, "--stages", 2]
    code, out, err = invoke(capsys, *words)
    assert code == 0, err
    folder = tmp_path / "runs" / f"prune-{NAME}"
    assert f"network: {folder / 'pruned'}" in out
    assert f"report: {folder / 'report.html'}" in out
    found = cell(folder, "ppo", target="flops-0.4")
    assert found["stages"] == 2
    assert found["evaluations"] <= 16
    model = trimtab.load_pruned(folder / "pruned")
    assert sum(p.numel() for p in model.parameters()) == found["parameters"]
    data = registry.load("task", NAME)("small").load(None)
    with torch.no_grad():
        right = (model(data.test.inputs).argmax(1) == data.test.targets).float().mean()
    assert float(right) == pytest.approx(found["accuracy"]["test"]["after"])
    assert read_json(folder / "pruned" / "pruned.json")["extra"]["method"] == "ppo"
    assert invoke(capsys, "report", folder)[0] == 0
    code, out, _ = invoke(capsys, "show", folder)
    assert code == 0
    assert re.search(r"^runs +1 done$", out, re.MULTILINE)
    assert invoke(capsys, *words)[0] == 2  # not empty
    assert invoke(capsys, *words, "--resume")[0] == 0


def test_a_pruned_network_can_be_pruned_further(done, tmp_path):
    outcome = prune_task(
        NAME, target="params=0.5", agent="uniform", model=done / PIECE / "dense", fine_tune_steps=1, scale="smoke",
        out=tmp_path / "out",
    )  # fmt: skip
    assert outcome.exit_code == 0
    again = prune_task(
        NAME, target="params=0.5", agent="uniform", model=tmp_path / "out" / "pruned", fine_tune_steps=0, scale="smoke",
        out=tmp_path / "again",
    )  # fmt: skip
    assert again.exit_code == 0
    record = read_json(tmp_path / "again" / PIECE / "dense.json")
    first = cell(tmp_path / "out", "uniform", target="params-0.5")
    assert (record["parameters"], record["optimizer_steps"]) == (first["parameters"], 0)
    last = cell(tmp_path / "again", "uniform", target="params-0.5")
    assert last["parameters"] <= 0.5 * first["parameters"]
    assert last["accuracy"]["test"]["before"] == last["accuracy"]["test"]["after"]  # nothing was fine-tuned


def test_widths_are_multiples_of_what_is_asked(done, tmp_path):
    is_coarse = {}
    for multiple in (2, 8):
        outcome = prune_task(
            NAME, target="params=0.5", agent="random-search", model=done / PIECE / "dense", fine_tune_steps=0,
            max_evaluations=8, scale="smoke", multiple=multiple, out=tmp_path / str(multiple),
        )  # fmt: skip
        assert outcome.exit_code == 0
        found = cell(tmp_path / str(multiple), "random-search", target="params-0.5")
        widths = [new for _, new in found["widths"].values()]
        assert all(width % multiple == 0 for width in widths)
        is_coarse[multiple] = all(width % 8 == 0 for width in widths)
    assert is_coarse == {2: False, 8: True}


def test_the_search_starts_from_the_brain_that_is_given(done, tmp_path, monkeypatch):
    given = TaughtPolicy.load().save(tmp_path / "brain")
    real, asked = TaughtPolicy.load, []

    def load(source="pruning"):
        asked.append(str(source))
        return real(source)

    monkeypatch.setattr(TaughtPolicy, "load", load)
    options = {"target": "params=0.5", "model": done / PIECE / "dense", "fine_tune_steps": 0, "max_evaluations": 8}
    outcome = prune_task(NAME, **options, scale="smoke", brain=given, out=tmp_path / "out")
    assert outcome.exit_code == 0
    assert set(asked) == {str(given)}
    assert len(asked) == 3  # resolved, checked before anything begins, and used


def test_a_target_of_latency_is_measured_once(tmp_path):
    outcome = prune_task(
        NAME,
        target="latency=0.95,batch_size=64",
        agent="uniform",
        fine_tune_steps=1,
        scale="smoke",
        out=tmp_path / "out",
    )
    assert outcome.exit_code in (0, 1)  # what is in reach depends on the machine
    table = read_json(tmp_path / "out" / PIECE / "latency-table-64.json")
    assert table["batch_size"] == 64


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--target", "flops"], "target: got 'flops', expected a cost and the share of it that may be left"),
        (["--target", "flops=half"], "target: got 'flops=half', expected"),
        (["--target", "flop=0.5"], "unknown target 'flop'; did you mean 'flops'?"),
        (["--target", "flops=1.5"], "target flops is 1.5; expected"),
        (["--target", "flops=0.5", "--agent", "pppo"], "unknown agent 'pppo'; did you mean 'ppo'?"),
        (["--target", "flops=0.5", "--baselines", "unifor"], "unknown baseline 'unifor'; did you mean 'uniform'?"),
        (["--target", "flops=0.5", "--baselines", "ppo"], "baselines: 'ppo' is the agent itself; leave it out"),
        (["--target", "flops=0.5", "--brain", "nowhere"], "no brain in nowhere: brain.json is missing"),
        (
            ["--target", "flops=0.5", "--agent", "uniform", "--brain", "b"],
            "brain 'b' is what 'ppo' starts from, and uniform",
        ),
        (["--target", "flops=0.5", "--multiple", "0"], "trimtab prune: multiple: got 0, expected"),
        (["--target", "flops=0.5", "--max-evaluations", "3"], "trimtab prune: max_evaluations: got 3, expected"),
        (["--target", "flops=0.5", "--stages", "0"], "trimtab prune: stages: got ppo: 0, expected"),
        (["--target", "flops=0.5", "--scale", "big"], "unknown scale 'big'"),
        (["--target", "flops=0.001"], "target flops 0.001 cannot be reached"),
        (["--target", "flops=0.5", "--model", "nowhere"], "nowhere"),
        (["--target", "flops=0.5", "--data-dir", "nowhere"], "the data directory nowhere is not there"),
        ([], "--target"),
    ],
)
def test_bad_input_of_the_command_is_one_line(tmp_path, monkeypatch, capsys, words, text):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRIMTAB_DATA", raising=False)
    code, out, err = invoke(capsys, "prune", NAME, *words)
    assert (code, out) == (2, "")
    assert text in err.replace("\n", " ")
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_targets_as_people_type_them():
    assert parse_target("flops=0.5") == {"flops": 0.5}
    assert parse_target(" latency = 0.5 , batch_size = 8 ") == {"latency": 0.5, "batch_size": 8}


def test_a_builder_that_is_of_no_task_is_refused(done, tmp_path):
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2)})  # nothing that the file alone describes
    data = registry.load("task", NAME)("small").load(None)
    good = builder_of(NAME, "small", data)
    assert json.loads(json.dumps(good)) == good
    assert good["shape"] == [1, 8, 8]
    bad = [
        ({**good, "task": "os:system"}, "unknown task 'os:system'"),
        ({**good, "scale": "huge"}, "unknown scale 'huge'"),
        ({**good, "shape": [-1]}, "is of no task"),
        ({**good, "info": {}}, "make fails with the builder"),
        ({"task": 3}, "is of no task"),
    ]
    for number, (builder, text) in enumerate(bad):

        class Own(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.inside = model

        save_pruned(Own(), tmp_path / str(number), builder=builder)
        with pytest.raises(InputError) as caught:
            load_pruned(tmp_path / str(number))
        assert text in str(caught.value)


# The whole


@pytest.mark.slow
def test_the_smoke_study_from_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, _, err = invoke(capsys, "run", "pruning", "--scale", "smoke")
    assert code == 0, err
    folder = tmp_path / "runs" / "pruning"
    results = read_json(folder / "results.json")
    assert len(results["arms"]) == 22
    assert all(row["seeds"] == [0, 1] for row in results["arms"])
    assert all(row["metrics"]["flops_left"]["max"] <= row["target"]["flops"] for row in results["arms"])
    assert results["dense"][0]["metrics"]["test_accuracy"]["min"] > 0.9
    searches = [row for row in results["arms"] if row["id"] in ("ppo", "paper", "random-search")]
    assert all(row["metrics"]["evaluations"]["max"] <= 16 for row in searches)
    best = {
        row["target_name"]: row["metrics"]["val_before"]["mean"] for row in results["arms"] if row["id"] == "exhaustive"
    }
    for row in results["arms"]:  # nothing on the grid scores higher than what was found by scoring everything
        if row["id"] in ("ppo", "random-search"):
            assert max(row["metrics"]["evaluations"]["values"]) <= 16
            assert row["metrics"]["val_before"]["mean"] <= best[row["target_name"]] + 0.15
