"""Validation: how an agent that is being taught does on tasks that no learner meets, beside two that need no teaching.

Called by `learn`, while agents are taught and when one of them is chosen. The tasks are drawn from the same families
as in training, but from seeds of their own, and are the same at every validation; the report of a brain uses neither.

The rivals play the very same episodes (tasks, data order, weights, initial rates, budgets): the rule `uwhg`, with its
own signals and times of decision, and a plain cosine at the run's initial rate. All are guarded as in use.

Losses are compared on the split that is never observed (`score`). A loss below 1e-3 counts as 1e-3, and one above 1e2,
or none at all, as 1e2: the small tasks start near 1 (cross-entropy of a few classes, squared error of standardised
targets), so that a ratio of two losses of nothing, or one run lost, does not decide a whole mean.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.agents.base import Agent, Array, Timing
from trimtab.envs.batched import TrainingVectorEnv
from trimtab.envs.episodes import EpisodeOptions
from trimtab.errors import InputError
from trimtab.seeding import derive_seed
from trimtab.spec import ControlSpec, make_agent
from trimtab.storage import read_json, write_json

__all__ = [
    "RIVALS",
    "Episodes",
    "Played",
    "compare",
    "log_ratios",
    "overall",
    "plan_episodes",
    "play",
    "play_rival",
    "play_to_end",
    "rivals_of",
    "validate",
]

RIVALS = ("uwhg", "cosine")
LOWEST, HIGHEST = 1e-3, 1e2  # see the head of this file

Played = dict[str, dict[str, list[float]]]
Table = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Episodes:
    """Which episodes are played.

    Attributes:
        options: What they are drawn from; each family has its own.
        num_envs: Runs in each family and episode.
        episodes: Episodes of each family.
        seed: All is drawn from it.
        timings: Times of decision that all budgets fit.
    """

    options: EpisodeOptions
    num_envs: int
    episodes: int
    seed: int
    timings: tuple[Timing, ...]


def rivals_of(spec: ControlSpec) -> dict[str, tuple[Agent, ControlSpec]]:
    """The rivals of agents of this spec, by name, each with its own spec.

    `uwhg` stands over the same base schedule, where that is one it knows: without a known budget neither has a cosine.
    """
    rule = make_agent("uwhg", {"base": spec.base.name if spec.base.name in ("cosine", "constant") else "cosine"})
    cosine = make_agent("cosine")
    return {
        "uwhg": (rule, ControlSpec.for_agent(rule)),
        # It looks at nothing, but an observation without columns would not say how many runs there are.
        "cosine": (cosine, ControlSpec.for_agent(cosine, timing=spec.timing, signals=("progress",))),
    }


def plan_episodes(spec: ControlSpec, options: EpisodeOptions, *, num_envs: int, episodes: int, seed: int) -> Episodes:
    """Episodes in which agents of this spec meet their rivals."""
    timings = [theirs.timing for _, theirs in rivals_of(spec).values()]
    return Episodes(options, num_envs, episodes, seed, tuple(dict.fromkeys((spec.timing, *timings))))


def validate(
    agent: Agent,
    spec: ControlSpec,
    options: EpisodeOptions,
    *,
    num_envs: int,
    episodes: int,
    seed: int,
    cache: Path | None = None,
) -> Table:
    """Let an agent play whole episodes and compare it with its rivals.

    Args:
        agent: Acts with `deterministic=True`.
        spec: Its spec.
        options: What episodes are drawn from.
        num_envs: Runs in each family and episode.
        episodes: Episodes of each family.
        seed: Episodes are drawn from it alone.
        cache: Folder in which the rivals' results are kept, for they do not depend on the agent; None keeps none.

    Returns:
        As `compare`.

    Raises:
        InputError: A number is out of range, or the spec is none that batches of runs know.
    """
    plan = plan_episodes(spec, options, num_envs=num_envs, episodes=episodes, seed=seed)
    rivals = {name: play_rival(name, spec, plan, cache) for name in RIVALS}
    return compare(play(agent, spec, plan), rivals)


def play_rival(name: str, spec: ControlSpec, plan: Episodes, cache: Path | None = None) -> Played:
    """What a rival of agents of this spec reaches; read from the cache where it is there."""
    agent, own_spec = rivals_of(spec)[name]
    asked = {
        "rival": name,
        "options": agent.options,
        "spec": own_spec.fingerprint,
        "episodes": {**asdict(plan), "seed": str(plan.seed)},  # 63 bits: more than some readers of JSON have
    }
    path = None if cache is None else cache / f"{name}-{plan.seed:016x}.json"
    if path is not None and path.is_file():
        kept = read_json(path)
        if isinstance(kept, dict) and kept.get("asked") == _as_json(asked):
            found: Played = kept["played"]
            return found
    begun_s = time.process_time()
    played = play(agent, own_spec, plan)
    if path is not None:
        write_json(path, {"asked": asked, "played": played, "cpu_s": time.process_time() - begun_s})
    return played


def play(agent: Agent, spec: ControlSpec, plan: Episodes) -> Played:
    """Play the episodes.

    Returns:
        Family -> one entry for each run: `task`, the number of its task; `loss`, its final loss, clipped as said at
        the head of this file; `rolled_back`, 1 where an interval was undone.
    """
    if isinstance(plan.episodes, bool) or not isinstance(plan.episodes, int) or plan.episodes < 1:
        raise InputError(f"episodes is {plan.episodes!r}; expected a whole number of 1 or more")
    played: Played = {}
    for family in dict.fromkeys(plan.options.families):
        options = asdict(replace(plan.options, families=(family,)))
        envs = TrainingVectorEnv(plan.num_envs, spec=spec, also_fit=plan.timings, **options)
        rows: dict[str, list[float]] = {"task": [], "loss": [], "rolled_back": []}
        for episode in range(plan.episodes):
            seed = derive_seed(plan.seed, family, episode, "of tasks")
            found = play_to_end(agent, envs, *envs.reset(seed=seed))
            # Tasks are numbered within an episode; in one number with it they are told apart everywhere.
            rows["task"] += [episode * plan.num_envs + task for task in found["task"]]
            rows["loss"] += found["loss"]
            rows["rolled_back"] += found["rolled_back"]
        played[family] = rows
    return played


def play_to_end(
    agent: Agent, envs: TrainingVectorEnv, observation: Array, infos: Mapping[str, Any]
) -> dict[str, list[float]]:
    """Play an episode that has just begun; rows as those of a family in `play`, tasks numbered within the episode.

    Args:
        agent: Acts with `deterministic=True`.
        envs: The environment.
        observation: What its `reset` or `begin` returned; (R, S).
        infos: And beside it.
    """
    undone = np.asarray(infos["rolled_back"])
    state, starts, terminated = None, np.ones(envs.num_envs, np.bool_), np.zeros(envs.num_envs, np.bool_)
    while not terminated.any():  # all end together
        actions, state = agent.predict(observation, state, starts, deterministic=True)
        observation, _, terminated, _, infos = envs.step(actions)
        undone = undone | np.asarray(infos["rolled_back"])
        starts = np.zeros(envs.num_envs, np.bool_)
    return {
        "task": np.asarray(infos["group"]).tolist(),
        "loss": _clip(infos["score_loss"]).tolist(),
        "rolled_back": undone.astype(float).tolist(),
    }


def _clip(losses: Any) -> Array:
    losses = np.asarray(losses, dtype=np.float64)
    return np.clip(np.where(np.isfinite(losses), losses, HIGHEST), LOWEST, HIGHEST)


def compare(mine: Played, rivals: Mapping[str, Played]) -> Table:
    """Numbers of an agent beside its rivals, on the same runs.

    Returns:
        Family -> number:
        `ratio_NAME`, for each rival: exp(mean over tasks of log(mean over runs of the agent's loss / mean over runs of
        the rival's)), below 1 where the agent is better;
        `log_se_NAME`: standard error of that mean over tasks (of the logarithm), 0 for one task;
        `mean_rank`: mean over runs of the agent's rank among itself and the rivals in the same run, 1 is best, equal
        losses share theirs;
        `rolled_back`: share of runs in which an interval was undone;
        `n_tasks`, `n_runs`.

    Raises:
        InputError: A rival played other tasks.
    """
    table: Table = {}
    for family, rows in mine.items():
        tasks, losses = np.array(rows["task"]), np.array(rows["loss"])
        numbers: dict[str, float] = {}
        others = []
        for name, played in rivals.items():
            logs = log_ratios(mine, played, family, name)
            numbers[f"ratio_{name}"] = float(np.exp(logs.mean()))
            numbers[f"log_se_{name}"] = float(logs.std(ddof=1) / np.sqrt(len(logs))) if len(logs) > 1 else 0.0
            others.append(np.array(played[family]["loss"]))
        ranks = 1.0 + sum((other < losses) + 0.5 * (other == losses) for other in others)
        numbers["mean_rank"] = float(np.mean(ranks))
        numbers["rolled_back"] = float(np.mean(rows["rolled_back"]))
        numbers["n_tasks"], numbers["n_runs"] = len(np.unique(tasks)), len(tasks)
        table[family] = numbers
    return table


def log_ratios(mine: Played, theirs: Played, family: str, name: str) -> Array:
    """Of each task of a family, in the order of their numbers: log(mean loss over runs / the other's mean loss); (T,).

    Args:
        mine: What one agent played.
        theirs: What the other played.
        family: The family.
        name: What the other is called, for errors.

    Raises:
        InputError: The other played other tasks.
    """
    rows, others = mine[family], theirs[family]
    if others["task"] != rows["task"]:
        raise InputError(f"rival {name!r} did not play the same tasks of family {family!r}; play it anew")
    tasks, losses, rival = np.array(rows["task"]), np.array(rows["loss"]), np.array(others["loss"])
    return np.log([losses[tasks == task].mean() / rival[tasks == task].mean() for task in np.unique(tasks)])


def overall(table: Mapping[str, Mapping[str, float]], families: Sequence[str], name: str = "ratio_uwhg") -> float:
    """The geometric mean of a ratio over families, each with the same weight: by this agents are chosen."""
    return float(np.exp(np.mean(np.log([table[family][name] for family in families]))))


def _as_json(value: Any) -> Any:
    """As it will be read from JSON: tuples are lists."""
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, (list, tuple)) else value
