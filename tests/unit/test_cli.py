"""The command line: names, exit codes, what it prints, and that help and lists stay light."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import trimtab
from trimtab import cli, registry
from trimtab.experience import ExperienceStore, Transitions
from trimtab.experiments import run as runner

TINY = """
study: tiny
idea: a test
tasks: [digits-mlp]
arms: [constant, q_learning, yoked:q_learning]
n_seeds: 2
lr: 0.001
total_steps: 6
every: 2
"""


def invoke(capsys, *args):
    """Run the command in this process: exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return ended.value.code, out, err


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRIMTAB_DATA", raising=False)
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


LIGHT = [
    ["--help"],
    ["--version"],
    ["run", "--help"],
    ["learn", "--help"],
    ["prune", "--help"],
    *(["list", what] for what in cli._LISTS),
]


def test_help_and_lists_import_nothing_heavy():
    code = (
        "import sys\nfrom trimtab import cli\n"
        f"for args in {LIGHT!r}:\n"
        "    try: cli.main(args)\n"
        "    except SystemExit as ended: assert ended.code == 0, (args, ended.code)\n"
        "    heavy = [name for name in ('torch', 'numpy', 'scipy', 'matplotlib') if name in sys.modules]\n"
        "    assert not heavy, (args, heavy)\n"
        "sys.stderr.write('all light')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "all light")


def test_python_m_trimtab_is_the_command():
    done = subprocess.run([sys.executable, "-m", "trimtab", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"trimtab {trimtab.__version__}\n"


@pytest.mark.parametrize("what", ["tasks", "agents", "knobs", "signals", "rewards"])
def test_a_list_has_a_line_for_every_registered_name(capsys, what):
    code, out, _ = invoke(capsys, "list", what)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == registry.names(what.removesuffix("s"))


def test_lists_of_arms_studies_recipes_and_brains(capsys):
    names = [line.split()[0] for line in invoke(capsys, "list", "arms")[1].splitlines()]
    assert {"cosine", "q_learning", "placebo:ARM", "yoked:ARM", "tuned-ARM"} <= set(names)
    assert "replay" not in names
    assert re.findall(r"^(\S+)  ", invoke(capsys, "list", "studies")[1], re.M) == [
        "adaptive-tuning",
        "cnn-intervention",
        "demo",
        "experience",
        "lr-scheduler",
        "pruning",
        "transformer-lr",
    ]
    recipes = ["default", "default-open", "few-rows", "quick", "residual", "several-knobs", "smoke", "pruning"]
    assert re.findall(r"^(\S+)  ", invoke(capsys, "list", "recipes")[1], re.M) == recipes
    brains = re.findall(r"^(\S+) +(.*)$", invoke(capsys, "list", "brains")[1], re.M)
    assert dict(brains)["default-open"] == (
        "the rule uwhg over a constant base, no learning; for runs whose end is not known"
    )


def store_runs(root):
    """Two runs of one spec and one of another."""
    store = ExperienceStore(root)
    for n, (mark, task) in enumerate([("b" * 16, "digits-mlp"), ("b" * 16, "[bold]x"), ("a" * 16, None)], start=1):
        given = Transitions(
            np.zeros((n, 2)), np.zeros((n, 1)), np.full(n, -1.5), np.zeros((n, 2)), np.zeros(n, np.bool_)
        )
        spec = {"knobs": ["lr", "dropout"][: 1 + (n > 2)], "signals": ["progress", "loss"]}
        last = store.append(given, spec=spec, fingerprint=mark, run={} if task is None else {"task": task})
    return last


NONE_YET = (
    "no experience in {}: runs of learned arms leave their transitions in OUT/experience of a study, and "
    "trimtab.experience.ExperienceStore appends others; name another folder with --dir\n"
)


def test_a_list_of_experience_where_there_is_none(capsys, tiny):
    default = "runs/experience and runs/*/experience"
    assert invoke(capsys, "list", "experience") == (0, NONE_YET.format(default), "")
    (tiny / "empty").mkdir()
    assert invoke(capsys, "list", "experience", "--dir", "empty") == (0, NONE_YET.format("empty"), "")
    code, out, err = invoke(capsys, "list", "experience", "--dir", "tiny.yaml")
    assert (code, out) == (2, "")
    assert err == (
        "trimtab: cannot read the experience in tiny.yaml: Not a directory; give a folder that can be read\n"
    )
    assert invoke(capsys, "list", "tasks", "--dir", "empty") == (
        2,
        "",
        "trimtab: --dir is for `trimtab list experience`; leave it out to list tasks\n",
    )


def test_a_list_of_experience_has_a_row_for_each_spec(capsys, tiny):
    last = store_runs(tiny / "runs" / "experience")
    code, out, err = invoke(capsys, "list", "experience")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].strip() == "runs/experience: 3 runs, 6 transitions"
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert rows == [
        ["a" * 16, "1", "3", "lr, dropout", "2", "-", "-4.5"],
        ["b" * 16, "2", "3", "lr", "2", "[bold]x, digits-mlp", "-2.25"],
    ]
    titles = [title.strip() for title in lines[2].split("┃")[1:-1]]
    assert titles == ["fingerprint", "runs", "transitions", "knobs", "signals", "tasks", "mean reward sum of a run"]
    store_runs(tiny / "runs" / "mine" / "experience")
    code, out, err = invoke(capsys, "list", "experience")
    assert [line.strip() for line in out.splitlines() if " runs, " in line] == [
        "runs/experience: 3 runs, 6 transitions",
        "runs/mine/experience: 3 runs, 6 transitions",
    ]
    last.write_bytes(last.read_bytes()[:-1])
    code, out, err = invoke(capsys, "list", "experience", "--dir", "runs/experience")
    assert out.splitlines()[0].strip() == "runs/experience: 2 runs, 3 transitions"
    assert (code, err) == (
        0,
        f"trimtab: left out: cannot read the experience in {last.relative_to(tiny)}: it has 146 bytes where its "
        "columns take 147; copy it anew, or remove it\n",
    )


def test_a_list_of_experience_imports_nothing_heavy(tmp_path):
    store_runs(tmp_path)
    code = (
        "import sys\nfrom trimtab import cli\n"
        f"try: cli.main(['list', 'experience', '--dir', {str(tmp_path)!r}])\n"
        "except SystemExit as ended: assert ended.code == 0\n"
        "sys.exit([name for name in ('torch', 'numpy', 'scipy', 'matplotlib') if name in sys.modules] or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "3 runs, 6 transitions" in done.stdout


def test_without_a_command_the_help_is_shown(capsys):
    code, out, _ = invoke(capsys)
    assert code == 2
    assert "report" in out


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["run"], "Missing argument 'STUDY|FILE.yaml'"),
        (["run", "demo", "--n-seeds", "five"], "Invalid value for '--n-seeds'"),
        (["run", "demo", "--sede", "1"], "No such option: --sede"),
        (["learn", "defualt"], "unknown recipe 'defualt'; did you mean 'default'?"),
        (["learn", "prunin"], "unknown recipe 'prunin'; did you mean 'pruning'?"),
        (["learn", "smoke", "--seeds", "0"], "options: seeds: got 0, expected a whole number of at least 1"),
        (["learn", "smoke", "--seed", "-1"], "seed: got -1, expected a whole number of at least 0"),
        (["rnu"], "No such command 'rnu'"),
        (["list", "task"], "unknown list 'task'; did you mean 'tasks'?"),
        (["show", "nowhere"], "nowhere holds no study (study.json) and no brain (brain.json)"),
        (["report", "nowhere"], "there is no study in nowhere: expected study.json in it"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(capsys, tiny, args, text):
    code, out, err = invoke(capsys, *args)
    assert (code, out) == (2, "")
    assert text in err
    assert err.startswith("trimtab: ")
    assert err.count("\n") == 1
    assert os.listdir(tiny) == ["tiny.yaml"]


def test_a_study_from_its_file_to_its_report(capsys, tiny):
    code, out, err = invoke(capsys, "run", "tiny.yaml", "--workers", 0)
    assert code == 0, err
    folder = tiny / "runs" / "tiny"
    assert f"report: {folder / 'report.html'}\n" in out
    assert "mean test loss" in out
    for arm in ("constant", "q_learning", "yoked:q_learning"):
        assert arm in out
    assert err.splitlines()[0] == "6 runs"
    results = json.loads((folder / "results.json").read_text())
    assert [row["id"] for row in results["arms"]] == ["constant", "q_learning", "yoked:q_learning"]

    html = (folder / "report.html").read_text()
    (folder / "report.html").unlink()
    assert invoke(capsys, "report", folder)[0] == 0
    assert (folder / "report.html").read_text() == html
    (folder / "report.html").unlink()
    code, out, _ = invoke(capsys, "run", "tiny.yaml", "--resume")
    assert code == 0
    assert (folder / "report.html").exists()

    code, out, _ = invoke(capsys, "show", folder)
    assert code == 0
    assert "arms      constant, q_learning, yoked:q_learning" in out
    assert "runs      6 done" in out


def test_a_failed_run_is_named_with_exit_code_1(capsys, tiny, monkeypatch):
    monkeypatch.setattr(runner, "RUN_ONE", f"{__name__}:break_one")
    code, out, err = invoke(capsys, "run", "tiny.yaml", "--workers", 0, "--n-seeds", 1, "--arms", "constant")
    assert code == 1
    assert "failed: runs/digits-mlp/constant/report/lr-0.001/seed-0: RuntimeError: broken by the test" in err
    assert "try them again with: trimtab run tiny.yaml --arms constant --n-seeds 1 --workers 0 --resume" in err
    assert "report: " in out


def break_one(job, out, data_dir, progress):
    raise RuntimeError("broken by the test")


def test_the_data_directory_comes_from_the_environment_unless_given(capsys, tiny, monkeypatch):
    seen = []

    def stop(name, **given):
        seen.append(given["data_dir"])
        raise trimtab.InputError("far enough")

    monkeypatch.setattr(runner, "run", stop)
    invoke(capsys, "run", "tiny.yaml")
    monkeypatch.setenv("TRIMTAB_DATA", "/from/the/environment")
    invoke(capsys, "run", "tiny.yaml")
    invoke(capsys, "run", "tiny.yaml", "--data-dir", "/given")
    assert [None if path is None else str(path) for path in seen] == [None, "/from/the/environment", "/given"]


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on_ends_its_children_and_going_on_works(tiny):
    (tiny / "tiny.yaml").write_text(
        TINY.replace("total_steps: 6", "total_steps: 20000").replace("every: 2", "every: 50")
    )
    command = [sys.executable, "-m", "trimtab", "run", "tiny.yaml", "--out", "a b", "--arms", "constant"]
    deadline = time.monotonic() + 60
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            while not list(tiny.glob("a b/runs/*/*/*/*/*/series.jsonl")):
                assert time.monotonic() < deadline
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.05)
            children = children_of(process.pid)
            os.kill(process.pid, signal.SIGINT)
            _, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130
    last = err.splitlines()[-1]
    assert last == (
        "trimtab: interrupted; what is done is kept, go on with: "
        "trimtab run tiny.yaml --arms constant --out 'a b' --resume"
    )
    assert "Traceback" not in err
    assert children
    for pid in children:
        while is_alive(pid):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    again = shlex.split(last.partition("go on with: ")[2])
    # The same options: with others the folder would be refused; a shorter budget is another plan.
    (tiny / "tiny.yaml").write_text(TINY)
    done = subprocess.run([sys.executable, "-m", *again], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "a b holds another plan: settings.total_steps is 20000 there, 6 is asked for now" in done.stderr


def children_of(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return file.read().split()


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
