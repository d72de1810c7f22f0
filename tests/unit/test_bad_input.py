"""Bad input, from the command line and from Python: one message, exit code 2, and nothing left behind."""

import errno
import os
import random
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from trimtab import cli
from trimtab.errors import InputError
from trimtab.experiments.run import run

GOOD = """
study: mine
idea: a test
tasks: [digits-mlp]
arms: [constant]
n_seeds: 2
lr: 0.001
total_steps: 4
"""


@dataclass(frozen=True)
class Case:
    """Bad input: a study file or a name, options, and a piece of what must be said of it.

    The options are those of `trimtab.experiments.run.run`; the command line's follow from them.
    """

    text: str
    file: str | bytes = GOOD
    study: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    prepare: str | None = None


CASES = {
    "unknown study": Case("unknown study 'demmo'; did you mean 'demo'?", study="demmo"),
    "no such file": Case("there is no study file nowhere.yaml", study="nowhere.yaml"),
    "unknown task": Case(
        "unknown task 'digits-mpl'; did you mean 'digits-mlp'?", GOOD.replace("digits-mlp", "digits-mpl")
    ),
    "unknown task asked for": Case("unknown task 'digit'; did you mean", options={"tasks": ["digit"]}),
    "unknown arm": Case("unknown arm 'q_lerning'; did you mean 'q_learning'?", options={"arms": ["q_lerning"]}),
    "unknown knob as a key": Case(
        "unknown key in mine.yaml 'learning_rate'; did you mean 'lr'?", GOOD + "learning_rate: 1"
    ),
    "unknown option of an agent": Case(
        "unknown option of agent 'q_learning' 'gama'; did you mean 'gamma'?",
        GOOD.replace("[constant]", "[{id: q_learning, options: {gama: 1}}]"),
    ),
    "option out of range": Case(
        "q_learning: gamma is 2; expected a number in [0, 1]",
        GOOD.replace("[constant]", "[{id: q_learning, options: {gamma: 2}}]"),
    ),
    "rate 0": Case("mine.yaml: lr: got 0, expected a number above 0", GOOD.replace("0.001", "0")),
    "rate NaN": Case("mine.yaml: lr: got nan, expected a finite number", GOOD.replace("0.001", ".nan")),
    "empty file": Case("mine.yaml is empty; expected at least study", ""),
    "torn file": Case("mine.yaml is not valid YAML", GOOD[: GOOD.index("]")]),
    "random bytes": Case("the study file mine.yaml is not ", random.Random(0).randbytes(400)),
    "not UTF-8": Case("is not UTF-8 text (byte 8)", b"study: \xe9t\xe9"[:7] + b" \xff"),
    "a list": Case("mine.yaml holds a list, expected a mapping", "[study, idea]"),
    "unknown key": Case("unknown key in mine.yaml 'n_seed'; did you mean 'n_seeds'?", GOOD + "n_seed: 3"),
    "a key twice": Case("the key 'lr' is there twice", GOOD + "lr: 0.1"),
    "wrong type": Case(
        "mine.yaml: arms: got 'constant', expected a valid tuple", GOOD.replace("[constant]", "constant")
    ),
    "no seeds": Case("n_seeds: got 0, expected a whole number of at least 1", options={"n_seeds": 0}),
    "negative root seed": Case("seed: got -1, expected a whole number of at least 0", options={"seed": -1}),
    "unknown scale": Case("unknown scale 'smal'; did you mean 'small'?", options={"scale": "smal"}),
    "negative workers": Case("workers: got -2, expected a whole number of 0", options={"workers": -2}),
    "executor not there": Case("executor 'ray' is not available in this version", options={"executor": "ray"}),
    "no data directory": Case("the data directory nowhere is not there", options={"data_dir": "nowhere"}),
    "data not in it": Case(
        "looked for text8/", GOOD.replace("digits-mlp", "text8-gpt"), options={"data_dir": "data"}
    ),
    "output is a file": Case("taken is a file; give a folder (--out)", options={"out": "taken"}),
    "output below a file": Case("taken/deeper: Not a directory", options={"out": "taken/deeper"}),
    "output cannot be written": Case("cannot write /proc/trimtab: ", options={"out": "/proc/trimtab"}),
    "output is not empty": Case("full is not empty; go on from what is there with --resume", options={"out": "full"}),
    "output is no study": Case("full holds files but no study.json", options={"out": "full", "resume": True}),
    "no space": Case("study.json: No space left on device", prepare="no space"),
    "no CUDA device": Case("device: got 'cuda:9', but torch finds", GOOD + "device: cuda:9"),
}  # fmt: skip


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request, tmp_path, monkeypatch):
    case: Case = request.param
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRIMTAB_DATA", raising=False)
    Path("mine.yaml").write_bytes(case.file if isinstance(case.file, bytes) else case.file.encode())
    Path("taken").write_text("a file")
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("years of work")
    Path("data").mkdir()
    if case.prepare == "no space":

        def no_space(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", no_space)
    return case


def listing():
    return sorted(str(path) for path in Path().rglob("*"))


def words(options):
    for key, value in options.items():
        yield f"--{key.replace('_', '-')}"
        if value is not True:
            yield ",".join(value) if isinstance(value, list) else str(value)


def test_from_the_command_line(case, capsys):
    before = listing()
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", case.study or "mine.yaml", *words(case.options)])
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert out == ""
    assert case.text in err
    assert err.startswith("trimtab: ")
    assert err.count("\n") == 1  # one message
    assert "Traceback" not in err
    assert listing() == before


def test_from_python(case):
    before = listing()
    with pytest.raises(InputError) as caught:
        run(case.study or "mine.yaml", **case.options)
    assert case.text in str(caught.value)
    assert listing() == before


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["run", "demo", "--tensorboard"], "--tensorboard is not available in this version; leave it out"),
        (["report", ".", "--compare", "other"], "--compare is not available in this version"),
        (["report", "."], "there is no study in .: expected study.json in it"),
    ],
)
def test_what_this_version_cannot_do_is_refused_by_name(args, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(args)
    assert ended.value.code == 2
    assert text in capsys.readouterr().err
    assert listing() == []


@pytest.mark.parametrize("args", [["run", "demo", "--arms", "q_lerning"], ["run", "mine.yaml"], ["run"]])
def test_in_a_process_of_its_own_there_is_one_line_and_no_traceback(args, tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"\x00\x01\x02")
    done = subprocess.run(
        [sys.executable, "-m", "trimtab", *args], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("trimtab: ")
    assert os.listdir(tmp_path) == ["mine.yaml"]


def make_brain(folder):
    from trimtab.brain import Brain
    from trimtab.spec import ControlSpec, make_agent

    agent = make_agent("q_learning", {})
    return Brain(agent, ControlSpec.for_agent(agent), {"made_by": "a test"}).save(folder)


@pytest.mark.parametrize("name", ["brain.json", "weights.safetensors"])
def test_a_truncated_brain_is_refused(name, tmp_path, capsys):
    from trimtab.brain import Brain

    make_brain(tmp_path / "brain")
    with pytest.raises(SystemExit) as ended:
        cli.main(["show", str(tmp_path / "brain")])
    assert ended.value.code == 0
    assert "made_by" in capsys.readouterr().out
    path = tmp_path / "brain" / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError) as caught:
        Brain.load(tmp_path / "brain")
    with pytest.raises(SystemExit) as ended:
        cli.main(["show", str(tmp_path / "brain")])
    err = capsys.readouterr().err
    assert ended.value.code == 2
    assert err == f"trimtab: {caught.value}\n"
    assert err.count("\n") == 1


def test_a_brain_of_another_spec_is_refused(tmp_path):
    from trimtab.brain import Brain
    from trimtab.errors import BrainError
    from trimtab.spec import ControlSpec, make_agent

    brain = Brain.load(make_brain(tmp_path / "brain"))
    other = ControlSpec.for_agent(make_agent("q_learning", {"actions": "coarse"}))
    brain.check_spec(brain.spec)
    with pytest.raises(BrainError, match="actions"):
        brain.check_spec(other)


def test_an_unknown_knob_is_named():
    import torch

    import trimtab

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    with pytest.raises(InputError, match=r"unknown knob 'learning_rate'; did you mean 'lr'\?"):
        trimtab.Controller("uwhg", optimizer=optimizer, knobs=("learning_rate",), total_steps=10)
