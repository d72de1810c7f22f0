"""What the variants' agents reach, on episodes that are the same for all of them.

Called by ablations.py and by its workers. The tasks by which `learn` chooses will not do: budgets are fitted to the
times of decision of who plays, which differ between variants, and so does the rule's base schedule, which is the
agents'. Here episodes fit all variants that the recipe has, whichever of them are asked for, and `uwhg` stands over
the base of `full`. They are drawn from a seed of their own, so that no agent was watched or chosen on them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from trimtab.agents.base import Timing
from trimtab.learning.choice import choose_of_learner
from trimtab.learning.parts import make_spec, validation_options
from trimtab.learning.recipe import Recipe
from trimtab.learning.teach import load_candidate, read_plan
from trimtab.learning.validation import Episodes, plan_episodes, play, play_rival
from trimtab.seeding import derive_seed
from trimtab.spec import ControlSpec
from trimtab.storage import read_json

__all__ = ["PLAYED", "RULE", "asked", "joint_episodes", "joint_timings", "kept_play", "work"]

PLAYED = "played"  # folder of what was played
RULE = "uwhg"


def joint_timings(recipes: Iterable[Recipe], full: Recipe) -> tuple[Timing, ...]:
    """Times of decision of all who play: agents of these recipes, and the rivals of each.

    Args:
        recipes: Of all variants that `full` has.
        full: The recipe that they are made of.
    """
    timings = [time for recipe in recipes for time in _episodes(make_spec(recipe), full, 0).timings]
    return tuple(dict.fromkeys(timings))


def joint_episodes(full: Recipe, timings: Sequence[Timing], root_seed: int) -> Episodes:
    """The episodes that all variants of a recipe play.

    Args:
        full: The recipe that variants are made of.
        timings: What `joint_timings` returned; all budgets fit them.
        root_seed: Root seed of the learners.
    """
    seed = derive_seed(root_seed, "validation", "ablations")
    return replace(_episodes(make_spec(full), full, seed), timings=tuple(timings))


def _episodes(spec: ControlSpec, full: Recipe, seed: int) -> Episodes:
    part = full.validate_on
    return plan_episodes(spec, validation_options(full), num_envs=part.num_envs, episodes=part.episodes, seed=seed)


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
        job: `full`, the recipe as JSON; `timings`, those of `joint_timings` as JSON; `seed`, the root seed; `variant`,
            a name, or "uwhg" for the rule; `index`, number of the learner.
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
    episodes = joint_episodes(full, [Timing(**timing) for timing in job["timings"]], job["seed"])
    if job["variant"] == RULE:
        agent, played = RULE, play_rival(RULE, make_spec(full), episodes)
    else:
        folder = Path(out) / job["variant"]
        recipe, _ = read_plan(folder)
        agent = choose_of_learner(folder, f"seed-{job['index']}")
        played = play(load_candidate(recipe, folder, [agent]), make_spec(recipe), episodes)
    return {"played": played, "agent": agent, "cpu_s": time.process_time() - begun_s}
