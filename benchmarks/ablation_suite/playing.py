"""What the variants' agents reach, on episodes that are the same for all of them.

Called by ablations.py and by its workers. The tasks by which `learn` chooses will not do: there budgets are fitted to
the times of decision of who plays, which differ between variants (by more than 80 steps for short runs without early
decisions), and the rule stands over the base schedule of the agents. Here budgets are those of `full`, and `uwhg`
stands over its base. Episodes are drawn from a seed of their own, so that no agent was watched or chosen on them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from trimtab.agents.base import Agent
from trimtab.envs.batched import TrainingVectorEnv
from trimtab.envs.episodes import Batch, draw_episode
from trimtab.learning.choice import choose_of_learner
from trimtab.learning.parts import make_spec, validation_options
from trimtab.learning.recipe import Recipe
from trimtab.learning.teach import load_candidate, read_plan
from trimtab.learning.validation import Episodes, Played, plan_episodes, play_to_end, rivals_of
from trimtab.seeding import derive_seed
from trimtab.spec import ControlSpec
from trimtab.storage import read_json

__all__ = ["PLAYED", "RULE", "asked", "draw", "kept_play", "make_episodes", "play_same", "work"]

PLAYED = "played"  # folder of what was played
RULE = "uwhg"


def make_episodes(full: Recipe, root_seed: int) -> Episodes:
    """The episodes that all variants of a recipe play.

    Args:
        full: The recipe that variants are made of; its tasks, and budgets that fit its times of decision and `uwhg`'s.
        root_seed: Root seed of the learners.
    """
    part = full.validate_on
    return plan_episodes(
        make_spec(full),
        validation_options(full),
        num_envs=part.num_envs,
        episodes=part.episodes,
        seed=derive_seed(root_seed, "validation", "ablations"),
    )


def draw(episodes: Episodes, family: str, index: int) -> list[list[Batch]]:
    """The runs of one episode of a family; those of one budget together, since they decide and end together."""
    seed = derive_seed(episodes.seed, family, index, "of tasks")
    options = replace(episodes.options, families=(family,))
    first, *others = episodes.timings
    batches = draw_episode(options, episodes.num_envs, first, seed, others)
    budgets = sorted({batch.total_steps for batch in batches})
    return [[batch for batch in batches if batch.total_steps == budget] for budget in budgets]


def play_same(agent: Agent, spec: ControlSpec, episodes: Episodes) -> Played:
    """Play the episodes, whatever the agent's times of decision: as in use, rounding may give it one more or less.

    Args:
        agent: Acts with `deterministic=True`.
        spec: Its spec.
        episodes: Which episodes.

    Returns:
        As `trimtab.learning.validation.play`.
    """
    played: Played = {}
    for family in episodes.options.families:
        rows: dict[str, list[float]] = {"task": [], "loss": [], "rolled_back": []}
        for index in range(episodes.episodes):
            for batches in draw(episodes, family, index):
                envs = TrainingVectorEnv(sum(len(batch.tasks) for batch in batches), (family,), spec=spec)
                found = play_to_end(agent, envs, *envs.begin(batches))
                rows["task"] += [index * episodes.num_envs + task for task in found["task"]]
                rows["loss"] += found["loss"]
                rows["rolled_back"] += found["rolled_back"]
        played[family] = rows
    return played


def asked(episodes: Episodes, recipe: Recipe) -> dict[str, Any]:
    """What a variant's play depends on, as it is read from JSON."""
    found: dict[str, Any] = json.loads(json.dumps({"episodes": asdict(episodes), "recipe": recipe.to_json()}))
    return found


def kept_play(out: Path, name: str, expected: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was played for a variant, where it was the same that is asked for now; else None.

    Args:
        out: Folder of the ablations.
        name: Of the variant.
        expected: What `asked` returned.
    """
    path = out / PLAYED / f"{name}.json"
    if not path.is_file():
        return None
    kept = read_json(path)
    return kept if isinstance(kept, dict) and kept.get("asked") == expected else None


def work(job: Mapping[str, Any], out: str, progress: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Let one learner's agent play, or the rule `uwhg`.

    Args:
        job: `full`, the recipe as JSON; `seed`, the root seed; `variant`, a name, or "uwhg" for the rule; `index`,
            number of the learner.
        out: Folder of the ablations.
        progress: Is not told anything.

    Returns:
        played, agent (its folder in that of the variant), cpu_s.

    Raises:
        InputError: The learner was not learned.
    """
    del progress
    begun_s = time.process_time()
    full = Recipe.model_validate(job["full"])
    if job["variant"] == RULE:
        name = RULE
        agent, spec = rivals_of(make_spec(full))[RULE]
    else:
        folder = Path(out) / job["variant"]
        recipe, _ = read_plan(folder)
        name = choose_of_learner(folder, f"seed-{job['index']}")
        agent, spec = load_candidate(recipe, folder, [name]), make_spec(recipe)
    played = play_same(agent, spec, make_episodes(full, job["seed"]))
    return {"played": played, "agent": name, "cpu_s": time.process_time() - begun_s}
