"""Experience of a study: what a run leaves is what its agent saw, and later runs learn from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_single import JOB, run

from trimtab.agents.q_learning import QLearning
from trimtab.brain import Brain
from trimtab.errors import InputError
from trimtab.experience import ExperienceStore
from trimtab.experiments import jobs, single
from trimtab.experiments.design import load_study

COLUMNS = ("observations", "actions", "rewards", "next_observations", "terminated")


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """What a Q-learning agent is taught, transition by transition."""
    seen: list[list[Any]] = []
    original = QLearning.update

    def update(self: QLearning, *columns: Any) -> None:
        seen.append([np.array(column)[0] for column in columns])
        original(self, *columns)

    monkeypatch.setattr(QLearning, "update", update)
    return seen


@pytest.mark.parametrize("lr", [0.01, 30.0])  # the second is rolled back, again and again
def test_what_is_stored_is_what_the_agent_was_taught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lr: float
) -> None:
    seen = recorded(monkeypatch)
    result = run(tmp_path, initial_lr=lr)
    (header,) = ExperienceStore(tmp_path / "experience").headers()
    found = ExperienceStore(tmp_path / "experience").read(header.fingerprint)
    assert header.run == {key: JOB[key] for key in ("study", "task", "arm", "agent", "role", "seed")}
    assert len(found) == len(seen) > 0
    for n, name in enumerate(COLUMNS):
        assert np.array_equal(getattr(found, name), np.array([row[n] for row in seen])), name
    assert result["learning"] == {"transitions": 0, "runs": 0, "optimizer_steps": 0, "flops": 0}
    assert (result["n_rollbacks"] > 0) == (lr > 1)


def test_several_knobs_have_a_column_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = recorded(monkeypatch)
    run(tmp_path, knobs=["lr", "weight_decay"], weight_decay=1e-4)
    store = ExperienceStore(tmp_path / "experience")
    found = store.read(store.fingerprints()[0])
    assert found.actions.shape == (len(seen), 2)
    assert np.array_equal(found.actions, np.array([row[1] for row in seen]))


def test_a_run_that_is_done_again_is_stored_once(tmp_path: Path) -> None:
    for _ in range(2):
        run(tmp_path)
        (tmp_path / "runs" / "a" / "result.json").unlink()
    run(tmp_path, seed=1, directory="runs/b")
    headers = ExperienceStore(tmp_path / "experience").headers()
    assert [header.run["seed"] for header in headers] == [0, 1]


def test_controls_leave_nothing(tmp_path: Path) -> None:
    run(tmp_path)
    before = ExperienceStore(tmp_path / "experience").files()
    run(tmp_path, kind="placebo", of="q_learning", arm="placebo:q_learning", placebo=True, directory="runs/p")
    twin = {"arm": "yoked:q_learning", "agent": "replay", "kind": "yoked", "of": "q_learning", "options": {}}
    run(tmp_path, **twin, replay_from="runs/a", directory="runs/y")
    run(tmp_path, arm="constant", agent="constant", kind="baseline", base=None, options={}, directory="runs/c")
    assert ExperienceStore(tmp_path / "experience").files() == before


def test_a_later_run_learns_from_it_first(tmp_path: Path) -> None:
    for seed in range(3):
        run(tmp_path / "old", seed=seed, directory=f"runs/{seed}")
    folder = tmp_path / "old" / "experience"
    store = ExperienceStore(folder)
    count = len(store.read(store.fingerprints()[0]))
    result = run(tmp_path / "new", seed=7, experience=str(folder))
    assert result["learning"]["transitions"] == count > 0
    brain = Brain.load(tmp_path / "new" / "runs" / "a" / "brain")
    own = ExperienceStore(tmp_path / "new" / "experience")
    assert isinstance(brain.agent, QLearning)
    assert brain.agent.visits.sum() == count + len(own.read(own.fingerprints()[0]))


def test_learning_from_earlier_is_the_same_as_having_been_there() -> None:
    rng = np.random.default_rng(0)
    agents = [QLearning(), QLearning()]
    width = len(agents[0].needs.signals)
    seen, then = rng.normal(size=(2, 20, width))
    action, reward = rng.integers(0, 3, (20, 1)), rng.normal(size=20)
    ends = np.arange(20) % 5 == 4
    agents[0].learn_from_earlier(seen, action, reward, then, ends)
    for n in range(20):
        row = slice(n, n + 1)
        agents[1].update(seen[row], action[row], reward[row], then[row], ends[row])
    assert np.array_equal(agents[0].table, agents[1].table)


def test_experience_that_does_not_fit_is_refused_before_any_training(tmp_path: Path) -> None:
    run(tmp_path)
    folder = str(tmp_path / "experience")
    with pytest.raises(
        InputError, match=r"experience .* has no runs of the spec [0-9a-f]{16} \(knobs lr, weight_decay\)"
    ):
        single.check_job({**JOB, "knobs": ["lr", "weight_decay"], "weight_decay": 1e-4, "experience": folder})
    with pytest.raises(InputError, match="has no runs of the spec"):
        single.check_job({**JOB, "experience": str(tmp_path / "nowhere")})
    with pytest.raises(InputError, match="'uwhg' does not learn from earlier runs' transitions; leave experience out"):
        single.check_job({**JOB, "agent": "uwhg", "options": {}, "experience": folder})
    with pytest.raises(InputError, match="is the study's own, and what lies there depends on which run ends first"):
        run(tmp_path, seed=3, directory="runs/z", experience=folder)
    single.check_job({**JOB, "experience": folder})


def test_runs_before_the_one_that_counts_may_train_other_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []
    original = jobs.load_data

    def load_data(task: str, scale: str, data_dir: str | None) -> Any:
        trained.append(task)
        return original(task, scale, data_dir)

    monkeypatch.setattr(single, "load_data", load_data)
    result = run(tmp_path, learn_runs=3, learn_tasks=["digits-cnn", "digits-mlp"], total_steps=20)
    assert trained == ["digits-mlp", "digits-cnn", "digits-mlp", "digits-cnn"]
    assert result["learning"]["runs"] == 3
    assert result["learning"]["optimizer_steps"] == 60


@pytest.mark.parametrize("inner", ["ppo", "dqn"])
def test_a_tuner_too_goes_on_from_what_was_kept_as_from_what_it_learned(tmp_path: Path, inner: str) -> None:
    arm = {"agent": "tuner", "arm": "tuner", "options": {"agent": inner, "n_decisions": 8}, "knobs": ["lr"]}
    learning = {**arm, "base": "constant", "learn_runs": 3, "learn_tasks": ["digits-cnn"], "total_steps": 60}
    run(tmp_path / "a", **learning)
    second = run(tmp_path / "a", task="digits-tuning", directory="runs/second", **learning)
    alone = run(tmp_path / "b", task="digits-tuning", directory="runs/second", **learning)
    assert second["learning"] == alone["learning"]
    assert second["metrics"] == alone["metrics"]
    series = [(tmp_path / name / "runs/second/decisions.jsonl").read_text() for name in "ab"]
    assert series[0] == series[1] != ""


def test_what_is_learned_on_other_tasks_is_learned_once_and_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    original = jobs.load_data

    def load_data(task: str, scale: str, data_dir: str | None) -> Any:
        trained.append(task)
        return original(task, scale, data_dir)

    monkeypatch.setattr(single, "load_data", load_data)
    learning = {"learn_runs": 2, "learn_tasks": ["digits-cnn"], "total_steps": 20}
    first = run(tmp_path / "a", **learning)
    second = run(tmp_path / "a", task="digits-tuning", directory="runs/second", **learning)
    assert trained == ["digits-mlp", "digits-cnn", "digits-cnn", "digits-tuning"]
    assert second["learning"] == first["learning"]
    (kept,) = (tmp_path / "a" / single.LEARNED).iterdir()
    (tmp_path / "b" / single.LEARNED).mkdir(parents=True)
    (tmp_path / "b" / single.LEARNED / kept.name).write_bytes(kept.read_bytes()[:-100])  # torn: learned anew
    alone = run(tmp_path / "b", task="digits-tuning", directory="runs/second", **learning)
    assert alone["metrics"] == second["metrics"]
    series = [(tmp_path / name / "runs/second/decisions.jsonl").read_text() for name in "ab"]
    assert series[0] == series[1]
    assert len(list((tmp_path / "a" / single.LEARNED).iterdir())) == 1
    run(tmp_path / "a", seed=1, directory="runs/third", **learning)
    run(tmp_path / "a", directory="runs/fourth", **{**learning, "learn_runs": 1})
    assert len(list((tmp_path / "a" / single.LEARNED).iterdir())) == 3
    run(tmp_path / "a", directory="runs/fifth", learn_runs=1, total_steps=20)  # on its own task: every run by itself
    assert len(list((tmp_path / "a" / single.LEARNED).iterdir())) == 3


def test_arms_name_their_experience_and_tasks(tmp_path: Path) -> None:
    def load(arm: str) -> Any:
        path = tmp_path / "study.yaml"
        path.write_text(f"study: s\nidea: i\ntasks: [digits-mlp]\narms:\n  - {arm}\n")
        return load_study(path).arms[0]

    arm = load("{id: q_learning, learn_runs: 2, learn_tasks: [digits-cnn], experience: here}")
    assert arm.learn_tasks == ("digits-cnn",)
    assert arm.experience == str(Path("here").resolve())
    for text, error in (
        ("{id: q_learning, learn_tasks: [digits-cnn]}", "learn_tasks without learn_runs, their number"),
        ("{id: q_learning, learn_runs: 1, learn_tasks: [digit-cnn]}", "unknown task in learn_tasks"),
        ("{id: cosine, experience: x}", "learn_tasks and experience are for learned arms; this is a baseline"),
    ):
        with pytest.raises(InputError, match=error):
            load(text)
