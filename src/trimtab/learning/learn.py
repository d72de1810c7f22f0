"""Learn a brain by a recipe: teach several learners, choose among them, write the brain with where it comes from.

Called by the command line, and from Python as `trimtab.learning.learn.learn("smoke", out=...)`. What lies in the
folder is the only memory, so that going on after a kill needs nothing else:

    OUT/learn.json     what was asked: recipe, seeds, and on what it runs   (first)
    OUT/rivals/        what `uwhg` and a cosine reach on the validation tasks
    OUT/seed-N/        a learner; see trimtab.learning.teach
    OUT/candidates/    how each agent that may be chosen does on the tasks of the choice
    OUT/plots/         curves.png
    OUT/report.md      what came out, in short
    OUT/brain/         the brain   (last)
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab import machine
from trimtab.errors import InputError, OutputError, RunFailedError
from trimtab.executors import Event, Executor, make_executor
from trimtab.folders import WorkFolder, nothing_is_bad_input, where_they_differ
from trimtab.learning.recipe import Recipe, load_recipe
from trimtab.progress import Display, News, Silent
from trimtab.storage import atomic_write, read_json, write_json

__all__ = ["Learned", "command_line", "learn"]

WORK = "trimtab.learning.teach:work"
_PACKAGES = ("torch", "numpy", "stable-baselines3", "gymnasium")
_SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "threads": 1,
}  # one thread each: results to the bit, and the workers share the cores


@dataclass(frozen=True)
class Learned:
    """What became of it.

    Attributes:
        out: The folder.
        brain: The brain's folder.
        report: report.md.
        chosen: Name of the agent that was chosen.
        why: Why, in a sentence.
    """

    out: Path
    brain: Path
    report: Path
    chosen: str
    why: str


def learn(
    name_or_path: str | Path,
    out: str | Path | None = None,
    *,
    seed: int = 0,
    workers: int | None = None,
    resume: bool = False,
    display: Display | None = None,
    **changes: int | None,
) -> Learned:
    """Learn a brain by a recipe.

    Args:
        name_or_path: One of ours ("smoke"), or a YAML file.
        out: Folder to write; runs/learn-RECIPE where it is None.
        seed: Root seed, of which all that is drawn follows.
        workers: Processes at once; None is one for each core; 0 works in this process.
        resume: Go on from what is in `out`, which otherwise must be missing or empty.
        display: Where to show how it goes; nowhere where it is None.
        **changes: iterations, seeds, num_envs, instead of the recipe's.

    Raises:
        InputError: Something that was given is wrong; nothing was started and nothing is left behind.
        RunFailedError: A learner did not come to its end; what is done is kept.
    """
    recipe = load_recipe(name_or_path, **changes)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed: got {seed!r}, expected a whole number of at least 0")
    workers = _check_workers(workers)
    display = display or Silent()
    path = (Path("runs") / f"learn-{recipe.recipe}" if out is None else Path(out)).absolute()
    folder = WorkFolder(path, "learn.json", "brain's making", "learning a brain")
    there = read_json(path / "learn.json") if folder.is_begun(resume) else None
    from trimtab.learning.parts import check_recipe, learner_seed  # imports torch and Stable-Baselines3

    check_recipe(recipe)
    plan: dict[str, Any] = {
        "schema": 1,
        "recipe": recipe.to_json(),
        "root_seed": seed,
        "learner_seeds": [learner_seed(seed, index) for index in range(recipe.seeds)],
        "changes": {key: value for key, value in changes.items() if value is not None},
        "command": command_line(name_or_path, {"seed": seed, **changes}),
        "environment": machine.describe(_SETTINGS, _PACKAGES),
    }
    if there is not None:
        _check_same(there, plan, path)
    with folder.hold(resume), display:
        if there is None:
            write_json(path / "learn.json", plan)
        with nothing_is_bad_input():
            before = {} if there is None else there["environment"]
            for text in machine.differences(before, plan["environment"], "brain"):
                display.say(f"note: {text}; what comes out may differ")
            _Maker(recipe, path, workers, display).run()
            return _conclude(recipe, path, there or plan, display)


def command_line(name_or_path: str | Path, given: Mapping[str, Any]) -> str:
    """The command that does the same."""
    words = ["trimtab", "learn", str(name_or_path)]
    for name, value in given.items():
        words += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def _check_workers(workers: int | None) -> int:
    if workers is None:
        return machine.default_workers("cpu", _SETTINGS["threads"])
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
        raise InputError(f"workers: got {workers!r}, expected a whole number of 0 (in this process) or more")
    return workers


def _check_same(there: Any, plan: Mapping[str, Any], out: Path) -> None:
    for key in ("recipe", "root_seed", "learner_seeds"):
        old = there.get(key) if isinstance(there, dict) else None
        if old != plan[key]:
            difference = where_they_differ(key, old, plan[key])
            raise OutputError(
                f"{out} holds another plan: {difference}; give the options it was begun with, or another --out"
            )


class _Maker:
    """Has the work done, in its order: the rivals' play, the learners, the candidates."""

    def __init__(self, recipe: Recipe, out: Path, workers: int, display: Display) -> None:
        self._recipe, self._out, self._display = recipe, out, display
        self._workers = workers
        self._failed: dict[str, str] = {}
        self._results: dict[str, dict[str, Any]] = {}

    def run(self) -> None:
        """Do all that is left.

        Raises:
            RunFailedError: Something failed; the message names all that did.
        """
        from trimtab.learning.choice import choose_of_learner
        from trimtab.learning.teach import CHOOSING, WATCHING
        from trimtab.learning.validation import RIVALS

        recipe = self._recipe
        rivals = {
            f"{name}-{tasks}": {"kind": "rival", "name": name, "tasks": tasks}
            for tasks in (WATCHING, CHOOSING)
            for name in RIVALS
        }
        learners = {f"seed-{index}": {"kind": "teach", "index": index} for index in range(recipe.seeds)}
        n_joined = int(recipe.seeds > 1 and recipe.choose != "best")
        total = len(rivals) + 3 * len(learners) + n_joined  # of each learner two agents are judged
        self._display.begin(total, 0, "pieces of work", alike=False)
        with make_executor("local", WORK, workers=self._workers, threads=1) as executor:
            # The rivals first: each learner would otherwise wait for them, or play them itself.
            self._do(executor, rivals)
            self._do(executor, learners)
            self._do(executor, self._singles(learners))
            if n_joined:
                brains = [choose_of_learner(self._out, name) for name in learners]
                self._do(executor, {"ensemble": {"kind": "judge", "name": "ensemble", "brains": brains}})

    def _singles(self, learners: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The agents to be judged: of each learner the last, and the best on the tasks that it was watched on."""
        jobs = {}
        for name in learners:
            result = self._results[name]
            is_one = result["last"]["iteration"] == result["best"]["iteration"]
            for which in ("last",) if is_one else ("last", "best"):
                key = f"{name}-{which}"
                jobs[key] = {"kind": "judge", "name": key, "brains": [f"{name}/{which}"]}
            if is_one:
                self._display.over(name)
        return jobs

    def _do(self, executor: Executor, jobs: Mapping[str, Mapping[str, Any]]) -> None:
        for key, job in jobs.items():
            executor.submit(key, dict(job), str(self._out))
        executor.drain(self._on_event)
        if self._failed:
            raise RunFailedError("; ".join(f"{key} failed: {why}" for key, why in self._failed.items()))

    def _on_event(self, event: Event) -> None:
        if event.kind == "started":
            self._display.started(event.key, event.key)
        elif event.kind == "progress":
            criterion = event.data.get("criterion")
            words = "" if criterion is None else f"validation {criterion:.3f} of uwhg"
            at, total = event.data.get("iteration"), event.data.get("iterations")
            news = News("iteration", at, total, words, event.data.get("left_s"))
            self._display.news(event.key, news)
        else:
            trace = self._out / f"error-{event.key}.txt"
            trace.unlink(missing_ok=True)  # of an earlier try
            if event.kind == "failed":
                self._failed[event.key] = event.data["error"]
                if event.data["traceback"]:
                    atomic_write(trace, event.data["traceback"])
            else:
                self._results[event.key] = event.data
            self._display.over(event.key)


def _conclude(recipe: Recipe, out: Path, plan: Mapping[str, Any], display: Display) -> Learned:
    """Choose, and write the brain, the picture and the report."""
    from trimtab.brain import Brain
    from trimtab.learning import report
    from trimtab.learning.choice import choose
    from trimtab.learning.parts import make_spec
    from trimtab.learning.provenance import make_provenance
    from trimtab.learning.teach import load_candidate

    display.say("choosing, and writing the brain")
    chosen = choose(recipe, out)
    provenance = make_provenance(recipe, out, plan, chosen)
    path = report.write(recipe, out, provenance)
    agent = load_candidate(recipe, out, chosen.brains)
    brain = Brain(agent, make_spec(recipe), provenance).save(out / "brain")
    return Learned(out, brain, path, chosen.name, chosen.why)
