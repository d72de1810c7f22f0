"""From a recipe to a brain: what is written, that going on changes nothing, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from tiny_recipe import write

from trimtab import cli
from trimtab.brain import Brain
from trimtab.errors import InputError, OutputError, RunFailedError
from trimtab.executors import Event
from trimtab.learning import learn as learning
from trimtab.learning import teach
from trimtab.learning.curves import mean_and_interval
from trimtab.learning.learn import learn
from trimtab.learning.provenance import check_provenance
from trimtab.learning.recipe import load_recipe
from trimtab.learning.watching import WatchedEnv, joined_ranges
from trimtab.progress import Silent
from trimtab.storage import read_json, read_lines

TIMES = {"cpu_s", "wall_s", "wall_s_of_a_learner"}


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def content(out: Path) -> dict[str, object]:
    """Everything in a folder of `learn` but times, pictures, and what holds a checksum of times."""
    found: dict[str, object] = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.suffix == ".json":
            data = without_times(read_json(path))
            data.pop("checksum", None)
            found[name] = data
        elif path.suffix == ".jsonl":
            found[name] = without_times(read_lines(path))
        elif path.suffix == ".safetensors":
            found[name] = path.read_bytes()
        elif path.is_file() and path.name != "report.md":
            found[name] = None
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A brain made at one go."""
    folder = tmp_path_factory.mktemp("made")
    return learn(write(folder), folder / "out", workers=0, seed=5).out


def test_what_lies_in_the_folder(made):
    files = {path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file()}
    assert {"learn.json", "report.md", "plots/curves.png", "brain/brain.json", "candidates/ensemble.json"} <= files
    assert {f"seed-{i}/{name}" for i in (0, 1) for name in ("curve.jsonl", "result.json", "last/brain.json")} <= files
    assert not [name for name in files if "checkpoint" in name or "error" in name]
    rows = read_lines(made / "seed-0" / "curve.jsonl")
    # Three iterations, and a look before the first, after every second and after the last.
    assert [(row["iteration"], "validation" in row) for row in rows] == [
        (0, True), (1, False), (2, False), (2, True), (3, False), (3, True)
    ]  # fmt: skip
    first = rows[1]
    assert first["n_decisions"] == 4 * 2  # four runs; of three decisions the first is reset's
    assert 4 * 50 <= first["optimizer_steps"] <= 4 * 60
    assert first["entropy"] > 0
    assert set(rows[0]["families"]) == {"quadratic"}


def test_a_curriculum_is_taught_first(tmp_path):
    path = write(tmp_path, tasks={"curriculum": {"share": 0.7, "horizon": [90, 90]}}, seeds=1)
    rows = read_lines(learn(path, tmp_path / "out", workers=0).out / "seed-0" / "curve.jsonl")
    steps = [row["optimizer_steps"] for row in rows if "validation" not in row]
    assert steps[:2] == [4 * 90, 4 * 90]
    assert 4 * 50 <= steps[2] <= 4 * 60


def test_the_brain_says_where_it_comes_from_and_acts(made):
    brain = Brain.load(made / "brain")
    story = brain.provenance
    assert story["command"].startswith("trimtab learn ")
    assert story["command"].endswith("tiny.yaml --seed 5")
    assert story["recipe"]["learner"] == "ppo"
    assert story["recipe"]["validate"]["runs_per_task"] == 2
    assert (story["root_seed"], len(story["learner_seeds"])) == (5, 2)
    assert {"python", "torch", "numpy", "stable-baselines3", "trimtab"} <= set(story["versions"])
    assert (story["families"], story["sources"]) == (["quadratic"], ["linear-regression"])
    assert story["not_seen"] == ["cifar10", "digits", "imdb", "mnist", "shakespeare", "sst2", "titanic"]
    cost = story["cost"]
    assert (cost["networks"], cost["decisions"]) == (2 * 3 * 4, 2 * 3 * 4 * 2)
    rows = [row for i in (0, 1) for row in read_lines(made / f"seed-{i}" / "curve.jsonl")]
    assert cost["optimizer_steps"] == sum(row.get("optimizer_steps", 0) for row in rows)
    assert cost["cpu_s"] >= round(sum(row["cpu_s"] for row in rows), 1)
    assert [iteration for iteration, _ in story["curves"]["seed-0"]] == [0, 2, 3]
    check_provenance(brain, ["digits-mlp", "uoft-cs/cifar10"])
    with pytest.raises(InputError, match="it was taught on 'linear-regression'"):
        check_provenance(brain, ["linear-regression"])
    observation = np.zeros((3, len(brain.spec.signals)))
    actions, _ = brain.agent.predict(observation, deterministic=True)
    assert actions.shape == (3, 1)
    assert len(set(actions[:, 0].tolist())) == 1


def test_the_choice_is_the_lowest_on_tasks_that_no_learner_was_watched_on(made):
    rows = {path.stem: read_json(path) for path in (made / "candidates").iterdir()}
    assert {"seed-0-last", "seed-1-last", "ensemble"} <= set(rows)
    best = min(rows.values(), key=lambda row: (row["criterion"], row["name"]))
    story = Brain.load(made / "brain").provenance
    assert (story["chosen"], story["members"]) == (best["name"], best["brains"])
    assert story["validation"][best["name"]]["quadratic"]["ratio_uwhg"] == pytest.approx(best["criterion"], abs=1e-4)
    assert f"Chosen: **{best['name']}**" in (made / "report.md").read_text()
    # The two sets of tasks are different ones: each rival played two.
    assert len(list((made / "rivals").iterdir())) == 4
    played = [read_json(path)["played"] for path in sorted((made / "rivals").glob("uwhg-*"))]
    assert played[0] != played[1]
    watched = read_json(made / "seed-0" / "result.json")["last"]["criterion"]
    assert watched != rows["seed-0-last"]["criterion"]


def test_more_tasks_for_the_choice_than_for_a_look(tmp_path):
    path = write(tmp_path, validate={"choose_episodes": 3}, iterations=1, seeds=1, choose="best")
    out = learn(path, tmp_path / "out", workers=0).out
    looked = read_json(out / "seed-0" / "result.json")["last"]["families"]["quadratic"]
    judged = read_json(out / "candidates" / "seed-0-last.json")["families"]["quadratic"]
    assert (looked["n_tasks"], judged["n_tasks"]) == (1, 3)


def test_the_ensemble_acts_with_the_mean_of_its_members(made):
    rows = read_json(made / "candidates" / "ensemble.json")
    agent = teach.load_candidate(load_recipe(made.parent / "tiny.yaml"), made, rows["brains"])
    members = [Brain.load(made / folder).agent for folder in rows["brains"]]
    observation = np.linspace(-1, 1, 5 * len(agent.features.signals)).reshape(5, -1)
    mean = np.mean([member.predict(observation, deterministic=True)[0] for member in members], axis=0)
    np.testing.assert_allclose(agent.predict(observation, deterministic=True)[0], mean, atol=1e-12)


def test_the_ranges_of_what_was_observed_are_kept_and_outside_them_the_rule_decides(tmp_path):
    learned = learn(write(tmp_path, keep_ranges=True, choose="ensemble"), tmp_path / "out", workers=0)
    agent = Brain.load(learned.brain).agent
    parts = [Brain.load(tmp_path / "out" / folder).provenance["ranges"] for folder in ("seed-0/last", "seed-1/last")]
    ranges = agent.options["ranges"]
    for name in ("budget_log_steps", "update_to_weight"):
        low, high = min(part[name][0] for part in parts), max(part[name][1] for part in parts)
        margin = (high - low) / 20
        assert ranges[name] == pytest.approx([low - margin, high + margin], rel=1e-12)
    assert ranges["update_to_weight"][0] < ranges["update_to_weight"][1]
    # All budgets had 50 to 60 steps or so; of them the agent knows, of a thousand times as many it does not.
    names = agent.features.signals
    known = np.array([[np.mean(ranges[name]) for name in names]])
    agent.predict(known, deterministic=True)
    assert agent.note == ""
    unknown = known.copy()
    unknown[0, names.index("budget_log_steps")] += 3
    agent.predict(unknown, deterministic=True)
    assert agent.note == "outside what was learned on (budget_log_steps): the rule uwhg decides"


def test_ranges_go_on_from_what_was_kept():
    envs = WatchedEnv(2, ("quadratic",), horizon=(50, 60), runs_per_task=2)
    assert envs.ranges() == {}
    envs.reset(seed=3)
    envs.step(np.ones((2, 1)))
    kept = envs.ranges()
    assert kept["last_move"] == [0.0, pytest.approx(1.0)]
    other = WatchedEnv(2, ("quadratic",), horizon=(50, 60), runs_per_task=2)
    other.load_ranges(kept)
    assert other.ranges() == kept
    other.reset(seed=4)
    assert other.ranges()["last_move"] == kept["last_move"]
    with pytest.raises(InputError, match="ranges of progress; expected those of progress, budget_log_steps"):
        other.load_ranges({"progress": [0, 1]})


def test_ranges_of_several_are_joined_with_a_margin():
    joined = joined_ranges(
        [{"progress": [0.0, 1.0], "last_move": [-1.0, 0.0]}, {"progress": [0.1, 0.5], "last_move": [0.0, 3.0]}]
    )
    assert joined == {"progress": [-0.05, 1.05], "last_move": [pytest.approx(-1.2), pytest.approx(3.2)]}


class Interrupts(Silent):
    """Ctrl-C after so many words from the workers."""

    def __init__(self, after: int) -> None:
        self.left = after

    def news(self, key, news) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("every_s", [0.0, 1e9], ids=["checkpoints", "no checkpoint"])
@pytest.mark.parametrize("after", [1, 3, 5])
def test_interrupted_and_resumed_it_ends_as_if_nothing_had_been(tmp_path, made, monkeypatch, every_s, after):
    monkeypatch.setattr(teach, "CHECKPOINT_EVERY_S", every_s)
    path, out = made.parent / "tiny.yaml", tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        learn(path, out, workers=0, seed=5, display=Interrupts(after))
    has_checkpoint = [file.parent.parent.name for file in out.rglob("state.safetensors")]
    assert has_checkpoint == ([f"seed-{(after - 1) // 3}"] if every_s == 0 and after % 3 != 1 else [])
    lost = out / f"seed-{(after - 1) // 3}" / "curve.jsonl"
    with lost.open("a") as file:
        file.write('{"iteration": 99, "torn')  # the last line of a killed writer
    learn(path, out, workers=0, seed=5, resume=True)
    assert content(out) == content(made)


def test_a_finished_folder_is_gone_on_with_at_once_and_not_overwritten(made):
    before = content(made)
    path = made.parent / "tiny.yaml"
    (made / "report.md").unlink()
    learned = learn(path, made, workers=0, seed=5, resume=True)
    assert learned.report.is_file()
    assert content(made) == before
    with pytest.raises(OutputError, match="is not empty; go on from what is there with --resume"):
        learn(path, made, workers=0, seed=5)
    with pytest.raises(OutputError, match=r"holds another plan: root_seed is 5 there, 6 is asked for now"):
        learn(path, made, workers=0, seed=6, resume=True)
    with pytest.raises(OutputError, match=r"holds another plan: recipe.iterations is 3 there, 4 is asked for now"):
        learn(path, made, workers=0, seed=5, resume=True, iterations=4)
    assert content(made) == before


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match=r"holds files but no learn.json, so it is no brain's making's folder"):
        learn(write(tmp_path), tmp_path / "full", workers=0, resume=True)
    assert os.listdir(tmp_path / "full") == ["thesis.txt"]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"seed": -1}, "seed: got -1, expected a whole number of at least 0"),
        ({"workers": -1}, "workers: got -1, expected a whole number of 0"),
    ],
)
def test_numbers_out_of_range(tmp_path, given, text):
    with pytest.raises(InputError, match=text):
        learn(write(tmp_path), tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_the_folder_is_named_after_the_recipe(tmp_path, monkeypatch, capsys):
    """The command line from end to end: what it prints, and what `show` says of folder and brain."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path, recipe="mine", seeds=1, iterations=1)
    with pytest.raises(SystemExit) as ended:
        cli.main(["learn", "tiny.yaml", "--workers", "0", "--num-envs", "2"])
    out, err = capsys.readouterr()
    assert ended.value.code == 0, err
    assert f"brain: {tmp_path / 'runs' / 'learn-mine' / 'brain'}\n" in out
    assert "chosen: seed-0-last has the lowest final loss relative to uwhg's" in out
    for folder in ("runs/learn-mine", "runs/learn-mine/brain"):
        with pytest.raises(SystemExit):
            cli.main(["show", folder])
        shown = capsys.readouterr().out
        assert "command                 trimtab learn tiny.yaml --seed 0 --num-envs 2" in shown
        assert "recipe num_envs         2" in shown
        assert "sources                 linear-regression" in shown
        assert "curve of seed-0         first " in shown
        assert "seed-0-last" in shown.split("on the tasks of the choice")[1]


def test_a_making_under_way_is_shown(tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        learn(write(tmp_path), out, workers=0, display=Interrupts(2))
    with pytest.raises(SystemExit):
        cli.main(["show", str(out)])
    shown = capsys.readouterr().out
    assert "brain    not made yet" in shown
    assert "seed-0   2 of 3 iterations" in shown
    assert "seed-1   0 of 3 iterations" in shown


def break_learner_1(job, out, progress):
    if job.get("index") == 1:
        raise RuntimeError("broken by the test")
    return teach.work(job, out, progress)


def test_a_failed_learner_is_named_the_others_are_kept_and_it_can_be_gone_on(tmp_path, monkeypatch, capsys, made):
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    command = ["learn", "tiny.yaml", "--seed", "5", "--workers", "0", "--out", "out"]
    with monkeypatch.context() as patch:
        patch.setattr(learning, "WORK", f"{__name__}:break_learner_1")
        with pytest.raises(SystemExit) as ended:
            cli.main(command)
    err = capsys.readouterr().err
    assert ended.value.code == 1
    assert "trimtab: seed-1 failed: RuntimeError: broken by the test\n" in err
    assert err.endswith("go on with: trimtab learn tiny.yaml --seed 5 --out out --workers 0 --resume\n")
    assert "broken by the test" in (tmp_path / "out" / "error-seed-1.txt").read_text()
    assert (tmp_path / "out" / "seed-0" / "result.json").is_file()
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--resume"])
    assert ended.value.code == 0
    assert (tmp_path / "out" / "brain" / "weights.safetensors").read_bytes() == (
        made / "brain" / "weights.safetensors"
    ).read_bytes()
    assert not (tmp_path / "out" / "error-seed-1.txt").exists()


def test_nothing_to_choose_from_is_a_failure_not_bad_input(tmp_path, monkeypatch):
    monkeypatch.setattr(learning._Maker, "run", lambda self: None)
    with pytest.raises(RunFailedError, match=r"holds no candidate for choose: 'best-or-ensemble'; judge them first"):
        learn(write(tmp_path), tmp_path / "out", workers=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"learner": "dqn", "options": {"gradient_steps": 2, "batch_size": 4}},
        {"options": {"residual": "uwhg"}, "spec": {"early_decisions": 7, "n_decisions": 3}},
        {"learner": "evolution", "options": {"population": 2, "hidden": 0}, "choose": "best"},
        {"spec": {"base": "constant", "reward": "log_improvement", "penalty": -1}},
    ],
    ids=["dqn", "residual", "evolution", "open"],
)
def test_every_learner_makes_a_brain(tmp_path, changes):
    path = write(tmp_path, **changes, iterations=1, seeds=1)
    if changes.get("learner") == "evolution":
        path.write_text(path.read_text().replace("  hidden: 0\n", ""))
    learned = learn(path, tmp_path / "out", workers=0)
    brain = Brain.load(learned.brain)
    assert brain.agent.name == changes.get("learner", "ppo")
    assert brain.provenance["chosen"] == "seed-0-last"
    assert (tmp_path / "out" / "plots" / "curves.png").stat().st_size > 10_000


def test_the_interval_over_learners():
    values = np.array([[1.0], [2.0], [3.0], [4.0], [5.0]])
    mean, half = mean_and_interval(values)
    assert mean.tolist() == [3.0]
    assert half == pytest.approx(2.776445 * np.sqrt(2.5 / 5))  # t of 4 degrees of freedom, 97.5 %
    assert mean_and_interval(values[:4])[1] is None


def test_what_a_person_sees_of_a_learner(tmp_path):
    said = []

    class Listens(Silent):
        def news(self, key, news):
            said.append(f"{key}: {news}")

    maker = learning._Maker(None, tmp_path, 0, Listens())
    maker._on_event(Event("progress", "seed-0", {"iteration": 2, "iterations": 9, "criterion": 1.25, "left_s": 3.2}))
    assert said == ["seed-0: iteration 2/9, validation 1.250 of uwhg, about 3 s to go"]
