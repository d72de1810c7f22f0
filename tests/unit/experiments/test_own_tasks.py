"""Tasks from a user's own file: what is registered, what workers are told, what is refused."""

from __future__ import annotations

import hashlib
import json
import sys

import pytest

from trimtab import registry
from trimtab.errors import InputError, OutputError
from trimtab.experiments.own_tasks import register_own
from trimtab.experiments.run import run

GOOD = """
from torch import nn
from trimtab.tasks.base import Task

def mine(scale="small"):
    return Task("mine", "none", "classification", lambda path: None, lambda data: nn.Linear(1, 2),
                total_steps={"smoke": 7, "small": 70}[scale])

def digits(scale): return 3
class Not: pass
number = 4
"""


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    """What a test registers and imports is gone after it."""
    monkeypatch.setitem(registry._TABLES, "task", dict(registry._TABLES["task"]))
    monkeypatch.setattr(registry, "_added", {})
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("trimtab_own_"):
            del sys.modules[name]


def write(folder, text: str = GOOD, name: str = "own.py"):
    path = folder / name
    path.write_text(text)
    return path


def test_a_file_gives_a_name_that_everybody_finds(tmp_path):
    path = write(tmp_path)
    names, files = register_own(["digits-mlp", f" {path}:mine"], "smoke")
    assert names == ["digits-mlp", "mine"]
    assert files == {"mine": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert registry.load("task", "mine")("smoke").total_steps == 7
    assert register_own([f"{path}:mine"], "small") == (["mine"], files)  # again is no error
    assert registry.added() == [["task", "mine", f"{path}:mine", "from own.py"]]


def test_a_worker_finds_what_its_parent_registered(tmp_path, monkeypatch):
    register_own([f"{write(tmp_path)}:mine"], "smoke")
    rows = registry.added()
    monkeypatch.setitem(registry._TABLES, "task", {})
    monkeypatch.setattr(registry, "_added", {})
    registry.adopt(rows)
    assert registry.load("task", "mine")("small").total_steps == 70
    assert registry.added() == rows


def test_a_relative_path_is_found_from_another_folder(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    register_own(["own.py:mine"], "smoke")
    monkeypatch.chdir("/")
    assert registry.load("task", "mine")("smoke").name == "mine"


@pytest.mark.parametrize(
    ("text", "asked", "error"),
    [
        (GOOD, "own.py", r"own.py names no task in it; give .*own.py:NAME, a function that takes a scale"),
        (GOOD, "other.py:mine", r"there is no Python file .*other.py; give FILE.py:NAME"),
        (GOOD, "own.py:min", r"own.py has no function 'min'; it has: Not, digits, mine"),
        (GOOD, "own.py:number", r"own.py has no function 'number'"),
        (GOOD, "own.py:", r"own.py has no function ''"),
        (GOOD, "own.py:digits", r"own.py: digits\('full'\) gave int; expected a trimtab.tasks.base.Task for the scale"),
        (GOOD, "own.py:mine", r"own.py: mine\('full'\) raised KeyError: 'full'"),
        ("x = 1\nfoo(\n", "own.py:mine", r"own.py cannot be imported: SyntaxError: .*line 2"),
        ("x = 1\ny = 1 / 0\n", "own.py:mine", r"own.py cannot be imported \(line 2\): ZeroDivisionError: division"),
        ("import nowhere_at_all", "own.py:mine", r"own.py cannot be imported \(line 1\): ModuleNotFoundError: No mod"),
        ("raise SystemExit(3)", "own.py:mine", r"own.py cannot be imported \(line 1\): SystemExit: 3"),
    ],
)
def test_a_broken_file_is_one_clear_error_and_leaves_nothing(tmp_path, text, asked, error):
    write(tmp_path, text)
    before = dict(registry.entries("task"))
    with pytest.raises(InputError, match=error):
        register_own([str(tmp_path / asked)], "full")
    assert registry.entries("task") == before
    assert registry.added() == []
    if "cannot be imported" in error:  # mended, it is imported after all
        assert [name for name in sys.modules if name.startswith("trimtab_own_")] == []


TRAINED = """
import torch
from torch import nn
from trimtab.tasks.base import Data, Split, Task

def load(data_dir):
    part = Split(torch.linspace(-1, 1, 40)[:, None], torch.arange(40) // 20)
    return Data(part, part, part, {"n_classes": 2})

def steps(scale="small"):
    return Task("steps", "none", "classification", load, lambda data: nn.Sequential(nn.Linear(1, 8), nn.Linear(8, 2)),
                batch_size=8, total_steps=10, eval_every=5)
"""


@pytest.mark.parametrize("study", ["demo", "pruning"])
def test_a_study_goes_on_with_the_same_file_alone(study, tmp_path):
    path = write(tmp_path, TRAINED)
    asked = {"scale": "smoke", "tasks": [f"{path}:steps"], "n_seeds": 1, "out": tmp_path / "out", "workers": 0}
    asked["arms"] = ["constant"] if study == "demo" else ["uniform"]
    run(study, **asked)
    content = hashlib.sha256(path.read_bytes()).hexdigest()
    assert json.loads((tmp_path / "out" / "study.json").read_text())["own_tasks"] == {"steps": content}
    assert run(study, **asked, resume=True).exit_code == 0
    path.write_text(TRAINED + "# changed")
    with pytest.raises(OutputError, match=r"out holds another plan: own_tasks"):
        run(study, **asked, resume=True)


def test_a_name_that_is_taken_is_refused(tmp_path):
    register_own([f"{write(tmp_path)}:mine"], "smoke")
    other = write(tmp_path, name="other.py")
    with pytest.raises(InputError, match=r"other.py: a task 'mine' is there already; give the function another name"):
        register_own([f"{other}:mine"], "smoke")
