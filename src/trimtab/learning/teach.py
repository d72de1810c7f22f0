"""What the workers of `learn` do: teach one learner, let one rival play, judge one agent.

Called through `work`, in a process of its own. A learner's folder:

    OUT/seed-N/curve.jsonl     one line an iteration (return, loss, cost), one line a validation
    OUT/seed-N/checkpoint/     only while it is under way
    OUT/seed-N/last/           the agent after the last iteration, as a brain
    OUT/seed-N/best/           the agent that was best on validation tasks, as a brain
    OUT/seed-N/result.json     what came out; it is there only when the learner is done (last)
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.agents.base import Agent
from trimtab.agents.policy import PolicyAgent
from trimtab.brain import Brain
from trimtab.errors import InputError
from trimtab.learning.parts import (
    bounded_agent,
    episodes_of,
    learner_seed,
    make_envs,
    make_spec,
    new_learner,
    validation_options,
)
from trimtab.learning.recipe import Recipe
from trimtab.learning.validation import Episodes, overall, plan_episodes, play_rival, validate
from trimtab.learning.watching import joined_ranges
from trimtab.seeding import derive_seed
from trimtab.storage import append_lines, atomic_write, load_state, read_json, read_lines, save_state, write_json

__all__ = ["CHOOSING", "PLAN", "WATCHING", "judge", "read_plan", "rivals_folder", "teach", "work"]

PLAN = "learn.json"
# Two sets of validation tasks: one is looked at many times while learners learn, so that its best is flattered by
# luck; the other is looked at once, by the choice.
WATCHING, CHOOSING = "watching", "choosing"
CHECKPOINT_EVERY_S = 20.0

Progress = Callable[[dict[str, Any]], None]


def work(job: Mapping[str, Any], out: str, progress: Progress) -> dict[str, Any]:
    """Do one piece of work of a folder of `learn`.

    Args:
        job: `kind` "rival" (with `name` and `tasks`), "teach" (with `index`) or "judge" (with `name` and `brains`).
        out: The folder.
        progress: Is told how far it is.

    Returns:
        What came out; it is on disk as well.
    """
    folder = Path(out)
    recipe, root_seed = read_plan(folder)
    if job["kind"] == "teach":
        return teach(recipe, root_seed, job["index"], folder, progress)
    if job["kind"] == "judge":
        return judge(recipe, root_seed, job["name"], job["brains"], folder)
    spec = make_spec(recipe)
    play_rival(job["name"], spec, _episodes(recipe, root_seed, job["tasks"]), rivals_folder(folder))
    return {}


def read_plan(folder: Path) -> tuple[Recipe, int]:
    """The recipe and the root seed of a folder of `learn`."""
    plan = read_json(folder / PLAN)
    return Recipe.model_validate(plan["recipe"]), int(plan["root_seed"])


def rivals_folder(folder: Path) -> Path:
    """Where the rivals' results are kept."""
    return folder / "rivals"


def _validation_seed(root_seed: int, tasks: str) -> int:
    return derive_seed(root_seed, "validation", tasks)


def _n_episodes(recipe: Recipe, tasks: str) -> int:
    part = recipe.validate_on
    return part.choose_episodes or part.episodes if tasks == CHOOSING else part.episodes


def _episodes(recipe: Recipe, root_seed: int, tasks: str) -> Episodes:
    return plan_episodes(
        make_spec(recipe),
        validation_options(recipe),
        num_envs=recipe.validate_on.num_envs,
        episodes=_n_episodes(recipe, tasks),
        seed=_validation_seed(root_seed, tasks),
    )


def _validate(recipe: Recipe, agent: Agent, root_seed: int, tasks: str, folder: Path) -> dict[str, Any]:
    """An agent's numbers on one set of tasks; `criterion` is what agents are chosen by, lower is better."""
    table = validate(
        agent,
        make_spec(recipe),
        validation_options(recipe),
        num_envs=recipe.validate_on.num_envs,
        episodes=_n_episodes(recipe, tasks),
        seed=_validation_seed(root_seed, tasks),
        cache=rivals_folder(folder),
    )
    return {"criterion": overall(table, recipe.choosing_families), "families": table}


def judge(recipe: Recipe, root_seed: int, name: str, brains: Sequence[str], folder: Path) -> dict[str, Any]:
    """Validate an agent, or several joined, on the tasks by which the choice is made.

    Args:
        recipe: The recipe.
        root_seed: Root seed.
        name: What the candidate is called.
        brains: Folders of the brains, relative to `folder`; more than one are joined.
        folder: Folder of `learn`.
    """
    path = folder / "candidates" / f"{name}.json"
    if path.is_file():
        kept: dict[str, Any] = read_json(path)
        return kept
    begun_s = time.process_time()
    agent = load_candidate(recipe, folder, brains)
    found = {"name": name, "brains": brains, **_validate(recipe, agent, root_seed, CHOOSING, folder)}
    found["cpu_s"] = time.process_time() - begun_s
    write_json(path, found)
    return found


def load_candidate(recipe: Recipe, folder: Path, brains: Sequence[str]) -> Agent:
    """The agent of a learner's brain, or of several joined, with the ranges that the recipe may ask it to keep to."""
    loaded = [Brain.load(folder / brain) for brain in brains]
    policies = [brain.agent for brain in loaded if isinstance(brain.agent, PolicyAgent)]
    agent = loaded[0].agent if len(loaded) == 1 else PolicyAgent.join(policies)
    if not recipe.keep_ranges or not isinstance(agent, PolicyAgent):
        return agent
    return bounded_agent(agent, joined_ranges([brain.provenance["ranges"] for brain in loaded]))


def teach(recipe: Recipe, root_seed: int, index: int, folder: Path, progress: Progress) -> dict[str, Any]:
    """Teach one learner from where it is to the end.

    Args:
        recipe: The recipe.
        root_seed: Root seed.
        index: Number of the learner, from 0.
        folder: Folder of `learn`.
        progress: Is told iteration, iterations, the criterion of the last validation, and left_s, seconds to go.
    """
    seat = folder / f"seed-{index}"
    if not (seat / "result.json").is_file():
        lesson = _Lesson(recipe, root_seed, index, folder)
        lesson.resume()
        lesson.go_on(progress)
        lesson.finish()
    shutil.rmtree(seat / "checkpoint", ignore_errors=True)
    result: dict[str, Any] = read_json(seat / "result.json")
    return result


class _Lesson:
    """One learner, what is known of it, and its folder."""

    def __init__(self, recipe: Recipe, root_seed: int, index: int, folder: Path) -> None:
        self._recipe, self._root_seed, self._index, self._folder = recipe, root_seed, index, folder
        self._seat = folder / f"seed-{index}"
        self._curve = self._seat / "curve.jsonl"
        self._state = self._seat / "checkpoint" / "state.safetensors"
        self._learner = new_learner(recipe, learner_seed(root_seed, index))
        self._envs = make_envs(recipe, self._learner.spec)
        # The best validation so far, with the agent's state, and the last one; what iterations and validations cost.
        self._best: dict[str, Any] | None = None
        self._last: dict[str, Any] | None = None
        self._cost = {"cpu_s": 0.0, "wall_s": 0.0, "optimizer_steps": 0, "networks": 0, "decisions": 0}

    def resume(self) -> None:
        """Go to the last checkpoint; lines written after it are removed, so that they are not there twice."""
        saved = None
        with contextlib.suppress(InputError):  # none, or torn by the machine and not by us: begin again
            saved = load_state(self._state)
        rows = read_lines(self._curve)
        if saved is None or len(rows) < saved["lines"]:
            if self._seat.exists():
                shutil.rmtree(self._seat)
            self._seat.mkdir(parents=True)
            return
        self._learner.load_state_dict(saved["learner"])
        self._envs.load_ranges(saved["ranges"])
        self._best, self._last, self._cost = saved["best"], saved["last"], saved["cost"]
        atomic_write(self._curve, "".join(json.dumps(row) + "\n" for row in rows[: saved["lines"]]))

    def _checkpoint(self) -> None:
        known = {"best": self._best, "last": self._last, "cost": self._cost, "ranges": self._envs.ranges()}
        lines = len(read_lines(self._curve))
        save_state(self._state, {"lines": lines, "learner": self._learner.state_dict(), **known})

    def go_on(self, progress: Progress) -> None:
        """Iterate to the end, with validations and checkpoints on the way."""
        learner, recipe = self._learner, self._recipe
        saved_s = time.monotonic()
        if learner.iteration == 0:
            self._note([self._look()])  # what an agent does that has learned nothing yet
        while learner.iteration < recipe.iterations:
            rows = [self._iterate()]
            if learner.iteration % recipe.validate_on.every == 0 or learner.iteration == recipe.iterations:
                rows.append(self._look())
            self._note(rows)
            progress(self._news())
            if time.monotonic() - saved_s >= CHECKPOINT_EVERY_S:
                self._checkpoint()
                saved_s = time.monotonic()

    def _news(self) -> dict[str, Any]:
        done, total = self._learner.iteration, self._recipe.iterations
        criterion = None if self._last is None else self._last["criterion"]
        left_s = (total - done) * self._cost["wall_s"] / done
        return {"iteration": done, "iterations": total, "criterion": criterion, "left_s": left_s}

    def _note(self, rows: list[dict[str, Any]]) -> None:
        """Append lines to the curve."""
        for key in ("cpu_s", "wall_s"):
            self._cost[key] += sum(row[key] for row in rows)
        append_lines(self._curve, rows)

    def _iterate(self) -> dict[str, Any]:
        """One iteration, as a line of the curve."""
        begun = _clocks()
        self._envs.options = episodes_of(self._recipe, self._learner.iteration)
        numbers = self._learner.iterate(self._envs)
        steps = int(self._envs.total_steps.sum())
        self._cost["optimizer_steps"] += steps
        self._cost["networks"] += self._recipe.num_envs
        self._cost["decisions"] += int(numbers["n_decisions"])
        return {"iteration": self._learner.iteration, **numbers, "optimizer_steps": steps, **_since(begun)}

    def _look(self) -> dict[str, Any]:
        """One validation, as a line of the curve; the best agent so far is kept."""
        begun = _clocks()
        agent = self._learner.agent()
        found = _validate(self._recipe, agent, self._root_seed, WATCHING, self._folder)
        self._last = {"iteration": self._learner.iteration, **found}
        has_learned = self._learner.iteration > 0
        if has_learned and (self._best is None or found["criterion"] < self._best["criterion"]):
            self._best = {**self._last, "agent": agent.state_dict()}
        return {"validation": True, **self._last, **_since(begun)}

    def finish(self) -> None:
        """Write the two brains and, last of all, the result."""
        best, last = dict(self._best or {}), self._last or {}  # the last iteration is always followed by a validation
        spec, ranges = self._learner.spec, self._envs.ranges()
        whose = {"recipe": self._recipe.recipe, "learner": self._index, "ranges": ranges}
        agent = self._learner.agent()
        Brain(agent, spec, {**whose, "iteration": last["iteration"]}).save(self._seat / "last")
        agent.load_state_dict(best.pop("agent"))
        Brain(agent, spec, {**whose, "iteration": best["iteration"]}).save(self._seat / "best")
        result = {"index": self._index, "last": last, "best": best, "cost": self._cost}
        write_json(self._seat / "result.json", result)


def _clocks() -> tuple[float, float]:
    return time.process_time(), time.monotonic()


def _since(begun: tuple[float, float]) -> dict[str, float]:
    return {"cpu_s": time.process_time() - begun[0], "wall_s": time.monotonic() - begun[1]}
