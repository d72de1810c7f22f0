"""The layers hold, importing us imports nothing heavy, and the rules that no linter knows are kept."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "trimtab"
FILES = sorted(SOURCE.rglob("*.py"))


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_imports_go_downwards_only(tmp_path: Path) -> None:
    script = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


HEAVY = ("torch", "numpy", "scipy", "matplotlib", "sklearn", "gymnasium", "stable_baselines3", "safetensors")


@pytest.mark.parametrize(
    "code",
    [
        "import trimtab; dir(trimtab); trimtab.__version__",
        "import trimtab.registry as r; [r.names(kind) for kind in ('task', 'agent', 'knob', 'signal', 'reward')]",
        "import trimtab; trimtab.InputError, trimtab.Decision, trimtab.TrimtabError",
        "import trimtab.cli",
        "import trimtab.experiments.design",
    ],
)
def test_light_imports_stay_light(code: str) -> None:
    run(f"import sys\n{code}\nfound = set({HEAVY!r}) & set(sys.modules)\nassert not found, found")


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("trimtab.controller", ("matplotlib", "scipy", "sklearn", "ray", "optuna", "transformers", "lightning")),
        ("trimtab.adapters.pytorch", ("matplotlib", "scipy", "sklearn", "ray", "stable_baselines3")),
        ("trimtab.agents.policy", ("gymnasium", "stable_baselines3", "scipy", "sklearn", "matplotlib")),
        ("trimtab.controller", ("stable_baselines3",)),
        ("trimtab.learning.learners", ("stable_baselines3", "matplotlib", "scipy", "sklearn")),
        ("trimtab.training.loop", ("gymnasium", "stable_baselines3", "trimtab.agents", "trimtab.controller")),
        ("trimtab.tasks.vision", ("gymnasium", "stable_baselines3", "trimtab.agents", "trimtab.controller")),
    ],
)
def test_what_is_loaded_at_run_time_too(module: str, forbidden: tuple[str, ...]) -> None:
    run(f"import sys, {module}\nfound = set({forbidden!r}) & set(sys.modules)\nassert not found, found")


def calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func)


BANNED = {
    "print": "log, or let the command line's console speak",
    "eval": "loading runs no code",
    "exec": "loading runs no code",
    "torch.load": "states are safetensors with JSON",
    "torch.save": "states are safetensors with JSON",
    "torch.manual_seed": "no global seeding",
    "torch.seed": "no global seeding",
    "random.seed": "no global seeding",
    "np.random.seed": "no global seeding",
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_rules_of_the_house(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    found = [f"line {line}: {name}: {BANNED[name]}" for line, name in calls(tree) if name in BANNED]
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            found.append(f"line {node.lineno}: assert; input is checked with raise")
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [
            f"line {node.lineno}: {name}" for name in names if name.split(".")[0] in ("pickle", "cloudpickle", "dill")
        ]
        if isinstance(node, ast.ImportFrom) and node.level:
            found.append(f"line {node.lineno}: a relative import")
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            body = ast.get_docstring(node)
            if length - (len(body.splitlines()) if body else 0) > 80:
                found.append(f"line {node.lineno}: {node.name} has {length} lines; at most 80")
    if len(text.splitlines()) > 600:
        found.append(f"{len(text.splitlines())} lines; at most 600")
    if ast.get_docstring(tree) is None:
        found.append("no docstring at the head")
    assert not found, found


def test_environment_variables_are_read_in_the_command_line_and_the_tasks_alone() -> None:
    readers = set()
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        if "os.environ" in text or "os.getenv" in text:
            readers.add(path.relative_to(SOURCE).parts[0])
    assert readers <= {"cli.py", "tasks", "executors.py"}, readers


def test_stable_baselines3_is_imported_in_four_files_alone() -> None:
    found = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "stable_baselines3" for name in names):
                found.add(path.relative_to(SOURCE).as_posix())
    assert found == {"agents/proposals.py", "agents/sb3.py", "agents/widths.py", "envs/sb3.py"}


def test_no_file_of_the_package_names_a_path_outside_it() -> None:
    for path in [*FILES, *SOURCE.rglob("*.yaml")]:
        text = path.read_text(encoding="utf-8")
        assert "/work/" not in text, path
        assert "/tmp/" not in text, path
