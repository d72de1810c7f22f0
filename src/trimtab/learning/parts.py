"""From a recipe to what it names: the spec, the episodes, the learner, the environment.

Called by `learn` and by its workers. Here names that are not known are refused, before anything is written or trained.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from trimtab import registry
from trimtab.agents.base import Agent
from trimtab.agents.features import SIGNALS
from trimtab.agents.policy import PolicyAgent
from trimtab.envs.episodes import EpisodeOptions
from trimtab.errors import InputError, unknown_name
from trimtab.learning.learners import Learner, make_learner
from trimtab.learning.recipe import Recipe
from trimtab.learning.watching import WatchedEnv
from trimtab.seeding import derive_seed
from trimtab.spec import ControlSpec, make_agent
from trimtab.tasks.families import FAMILIES

__all__ = [
    "bounded_agent",
    "check_recipe",
    "episodes_of",
    "learner_seed",
    "make_envs",
    "make_spec",
    "new_learner",
    "validation_options",
]


def make_spec(recipe: Recipe) -> ControlSpec:
    """What the recipe's agent is trained on and used with.

    Raises:
        UnknownNameError: A signal, reward or base schedule that there is not, or an option of the agent.
        InputError: An option is out of range.
    """
    part = recipe.spec
    known = inspect.signature(registry.load("agent", recipe.learner)).parameters
    given: dict[str, Any] = {key: value for key, value in recipe.options.items() if key in known}
    given |= {"n_decisions": part.n_decisions, "base": part.base, "signals": _signals(recipe)}
    if part.early_decisions is not None:
        given["early_decisions"] = part.early_decisions
    if part.knobs[0] != "lr":
        raise InputError(f"spec.knobs are {list(part.knobs)}; expected 'lr' first, which is always moved")
    agent = make_agent(recipe.learner, given, n_knobs=len(part.knobs))
    changes = {"knobs": part.knobs, "knob_options": part.knob_options, "masks": len(part.knobs) > 1}
    return ControlSpec.for_agent(agent, reward=part.reward, penalty=part.penalty, **changes)


def _signals(recipe: Recipe) -> tuple[str, ...] | None:
    """The recipe's signals; where it names none, the agent's own and what says where the other knobs stand."""
    part, known = recipe.spec, registry.entries("signal")
    levels = [f"{knob}_unit" for knob in part.knobs[1:] if f"{knob}_unit" in known]
    return (*SIGNALS, *levels) if part.signals is None and levels else part.signals


def new_learner(recipe: Recipe, seed: int) -> Learner:
    """The recipe's learner, before its first iteration.

    Args:
        recipe: The recipe.
        seed: Root of all that it draws.

    Raises:
        InputError: An option is unknown or out of range.
    """
    options = dict(recipe.options)
    if recipe.learner == "evolution":
        options.setdefault("group_size", recipe.tasks.runs_per_task)
    else:
        options.setdefault("iterations", recipe.iterations)
    return make_learner(recipe.learner, make_spec(recipe), seed=seed, options=options)


def learner_seed(root_seed: int, index: int) -> int:
    """Seed of the learner number `index`."""
    return derive_seed(root_seed, "learner", index, "of recipe")


def make_envs(recipe: Recipe, spec: ControlSpec) -> WatchedEnv:
    """The environment that a learner of the recipe acts in; `episodes_of` says from what it draws in an iteration."""
    return WatchedEnv(recipe.num_envs, spec=spec, **recipe.tasks.model_dump(exclude={"curriculum"}))


def episodes_of(recipe: Recipe, iteration: int) -> EpisodeOptions:
    """What the episodes of an iteration, counted from 0, are drawn from."""
    options = EpisodeOptions(**recipe.tasks.model_dump(exclude={"curriculum"}))
    first = recipe.tasks.curriculum
    if first is None or iteration >= round(first.share * recipe.iterations):
        return options
    return replace(options, horizon=first.horizon)


def validation_options(recipe: Recipe) -> EpisodeOptions:
    """What validation episodes are drawn from: as in training, with the families that are validated on."""
    part = recipe.validate_on
    families = tuple(dict.fromkeys((*recipe.choosing_families, *part.held_out)))
    return replace(episodes_of(recipe, recipe.iterations), families=families, runs_per_task=part.runs_per_task)


def check_recipe(recipe: Recipe) -> None:
    """Refuse what a recipe's model cannot know to be wrong; trains nothing.

    Raises:
        UnknownNameError: A name that is not known: family, signal, reward, option.
        InputError: Parts that do not go together.
    """
    for where, names in (
        ("tasks.families", recipe.tasks.families),
        ("validate.families", recipe.validate_on.families or ()),
        ("validate.held_out", recipe.validate_on.held_out),
    ):
        for name in names:
            if name not in FAMILIES:
                raise unknown_name(f"family in {where}", name, FAMILIES)
    for name in recipe.validate_on.held_out:
        if name in (*recipe.tasks.families, *recipe.choosing_families):
            raise InputError(
                f"validate.held_out: {name!r} is trained on or chosen by, so it is not held out; take it out of one"
            )
    spec = make_spec(recipe)
    make_envs(recipe, spec)
    episodes_of(recipe, 0)
    validation_options(recipe)
    learner = new_learner(recipe, 0)
    if recipe.learner == "evolution":
        agent: Any = learner.agent()
        for what, count in (("population", agent.population), ("group_size", agent.group_size)):
            if recipe.num_envs % count:
                raise InputError(f"num_envs is {recipe.num_envs}; expected a multiple of evolution's {what} {count}")
        if agent.group_size != recipe.tasks.runs_per_task:
            raise InputError(
                f"options.group_size is {agent.group_size}, tasks.runs_per_task {recipe.tasks.runs_per_task}; they are "
                "the same runs, leave group_size out"
            )
    taught = learner.agent()
    if recipe.keep_ranges:
        if not isinstance(taught, PolicyAgent):
            raise InputError(f"keep_ranges: agents of {recipe.learner!r} cannot hand over to a rule; leave it out")
        bounded_agent(taught, dict.fromkeys(spec.signals, (0.0, 0.0)))
    _check_choice(recipe, can_join=isinstance(taught, PolicyAgent))


def bounded_agent(agent: PolicyAgent, ranges: Mapping[str, Sequence[float]]) -> Agent:
    """The same policy, which lets the rule `uwhg` decide where a signal lies outside its range.

    Args:
        agent: A policy; in use the rule moves its first knob, the rate, and no other.
        ranges: Signal -> [lowest, highest].

    Raises:
        InputError: It does not observe what the rule needs.
    """
    bounded = make_agent(agent.name, {**agent.options, "ranges": dict(ranges)}, n_knobs=agent.n_knobs)
    bounded.load_state_dict(agent.state_dict())
    return bounded


def _check_choice(recipe: Recipe, *, can_join: bool) -> None:
    if recipe.choose == "best":
        return
    if not can_join:
        raise InputError(f"choose: {recipe.choose!r}, but agents of {recipe.learner!r} cannot be joined; take 'best'")
    if recipe.choose == "ensemble" and recipe.seeds < 2:
        raise InputError(f"choose: 'ensemble' of {recipe.seeds} seed; take 2 seeds or more, or 'best'")
