"""Learners: one face for PPO, DQN and evolution strategies.

Called by the recipes. A learner is made for a spec, is given a vector environment for each iteration, and hands out
the agent as it is now. What it draws in iteration i, episodes included, follows from (seed, i) alone: so a learner
that was saved and loaded goes on as if nothing had been, and no environment has to be saved with it.
"""

from __future__ import annotations

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from trimtab import registry
from trimtab.agents.base import Agent
from trimtab.agents.evolution import Evolution
from trimtab.agents.policy import PolicyAgent
from trimtab.errors import InputError, unknown_name
from trimtab.seeding import derive_seed
from trimtab.spec import ControlSpec, make_agent

__all__ = ["EvolutionLearner", "Learner", "PolicyLearner", "make_learner"]

# What the spec decides about an agent; a learner's options may not speak of it.
_FROM_SPEC = ("signals", "n_decisions", "early_decisions", "base", "base_options", "members", "n_knobs", "seed")


class Learner(ABC):
    """What turns episodes into an agent.

    Args:
        spec: What the agent will be used with.
        seed: Root of all that is drawn, the episodes included.
        options: The agent's and the algorithm's options, by name.

    Attributes:
        name: Name of the agent in the registry.
        spec: See above.
        iteration: Iterations done.

    Raises:
        InputError: The spec is not the agent's kind, or an option is unknown or out of range.
    """

    name: str

    def __init__(self, name: str, spec: ControlSpec, seed: int, options: Mapping[str, Any]) -> None:
        self.name = name
        self.spec = spec
        self.iteration = 0
        self._seed = seed
        self._options = dict(options)

    @abstractmethod
    def iterate(self, envs: Any) -> dict[str, float]:
        """One iteration: every run of the environment plays one whole episode, then something is learned.

        Args:
            envs: A `gymnasium.vector.VectorEnv` of the learner's spec, which it resets with a seed of its own.

        Returns:
            mean_return (rewards of an episode, mean over runs), n_decisions (taken in this iteration, over all runs),
            and what the algorithm reports: loss, entropy, kl for PPO; loss, epsilon for DQN.

        Raises:
            InputError: The environment's spaces are not the spec's.
        """

    @abstractmethod
    def agent(self) -> Agent:
        """The agent as it is now; what is learned later does not change it."""

    @abstractmethod
    def _learned(self) -> dict[str, Any]:
        """What was learned."""

    @abstractmethod
    def _load_learned(self, state: Any) -> None:
        """Inverse of `_learned`."""

    def _identity(self) -> dict[str, Any]:
        """What must be the same where a state is loaded."""
        options = {key: list(value) if isinstance(value, tuple) else value for key, value in self._options.items()}
        return {"learner": self.name, "spec": self.spec.fingerprint, "options": options, "seed": self._seed}

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to go on, as tensors and JSON scalars, for `trimtab.storage.save_state`."""
        return {**self._identity(), "iteration": self.iteration, "learned": self._learned()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`, on a learner made with the same arguments.

        Raises:
            InputError: It was made with others, or the state is broken; nothing is changed.
        """
        mine = self._identity()
        expected = {*mine, "iteration", "learned"}
        if set(state) != expected:
            raise InputError(f"the learner's state has the keys {sorted(state)}; expected {sorted(expected)}")
        for key, value in mine.items():
            if state[key] != value:
                raise InputError(f"the state was saved by a learner with {key} {state[key]!r}; this one has {value!r}")
        iteration = state["iteration"]
        if isinstance(iteration, bool) or not isinstance(iteration, int) or iteration < 0:
            raise InputError(f"the learner's iteration is {iteration!r}; expected a whole number of 0 or more")
        self._load_learned(state["learned"])
        self.iteration = iteration

    def _check(self, envs: Any) -> None:
        for kind in ("observation", "action"):
            mine, theirs = getattr(self.spec, f"{kind}_space"), getattr(envs, f"single_{kind}_space")
            if mine != theirs:
                raise InputError(
                    f"the environment's {kind} space of one run is {theirs}, the spec's is {mine}; "
                    "make both from one spec"
                )


class PolicyLearner(Learner):
    """PPO or DQN of Stable-Baselines3; see `trimtab.agents.sb3` for their options.

    The environment may have an attribute `n_decisions`, the decisions of the episodes that its last `reset` began;
    without it they are those of the spec's timing.
    """

    def __init__(self, name: str, spec: ControlSpec, seed: int, options: Mapping[str, Any]) -> None:
        super().__init__(name, spec, seed, options)
        # Stable-Baselines3 takes seconds to import, and evolution strategies need none of it.
        algorithms = importlib.import_module("trimtab.agents.sb3")
        trainer = {"ppo": algorithms.PPOTrainer, "dqn": algorithms.DQNTrainer}[name]
        agent = registry.load("agent", name)
        own, rest = _divide(name, options, inspect.signature(trainer.options_class).parameters, agent)
        self._agent: PolicyAgent = _agent_for(spec, name, own, seed)
        if own.get("residual") and spec.knobs[0] != "lr":
            raise InputError(f"residual={own['residual']!r} moves the first knob, which is {spec.knobs[0]!r}, not 'lr'")
        if own.get("residual") and spec.turns:
            raise InputError(f"residual={own['residual']!r} knows the rate alone, and knobs move in turn; leave it out")
        self._trainer = trainer(self._agent, seed, rest)

    def iterate(self, envs: Any) -> dict[str, float]:
        """See `Learner.iterate`.

        Raises:
            InputError: The spaces are not the spec's, the environment does not reset in the same step, or its runs do
                not end together.
        """
        from trimtab.envs.sb3 import SB3View

        self._check(envs)
        moves = self._agent.move_table
        view = SB3View(
            envs,
            observe=self._agent.features,
            act=lambda chosen, *rest: self._agent.to_actions(moves[chosen], *rest),
            action_space=self._trainer.action_space,
        )
        view.begin(derive_seed(self._seed, "episodes", self.iteration))
        timing = self.spec.timing
        n_decisions = int(getattr(envs, "n_decisions", timing.early_decisions + timing.n_decisions))
        numbers = self._trainer.iterate(view, n_decisions, self.iteration)
        self.iteration += 1
        return {
            "mean_return": sum(view.finished) / len(view.finished),
            "n_decisions": float(n_decisions * view.num_envs),
            **numbers,
        }

    def agent(self) -> PolicyAgent:
        """See `Learner.agent`."""
        agent: PolicyAgent = self._trainer.export()
        return agent

    def _learned(self) -> dict[str, Any]:
        learned: dict[str, Any] = self._trainer.state_dict()
        return learned

    def _load_learned(self, state: Any) -> None:
        self._trainer.load_state_dict(state)


class EvolutionLearner(Learner):
    """Evolution strategies; see `trimtab.agents.evolution.Evolution` for the options."""

    def __init__(self, name: str, spec: ControlSpec, seed: int, options: Mapping[str, Any]) -> None:
        super().__init__(name, spec, seed, options)
        _divide(name, options, {}, Evolution)
        self._agent: Evolution = _agent_for(spec, name, options, seed)

    def iterate(self, envs: Any) -> dict[str, float]:
        """See `Learner.iterate`.

        Raises:
            InputError: The spaces are not the spec's, or the number of runs is no multiple of the population.
        """
        self._check(envs)
        numbers = self._agent.iterate(envs)
        self.iteration += 1
        return numbers

    def agent(self) -> Evolution:
        """See `Learner.agent`."""
        agent: Evolution = _agent_for(self.spec, self.name, self._options, self._seed)
        agent.load_state_dict(self._agent.state_dict())
        return agent

    def _learned(self) -> dict[str, Any]:
        return self._agent.state_dict()

    def _load_learned(self, state: Any) -> None:
        self._agent.load_state_dict(state)


_LEARNERS: dict[str, type[Learner]] = {"ppo": PolicyLearner, "dqn": PolicyLearner, "evolution": EvolutionLearner}


def make_learner(name: str, spec: ControlSpec, *, seed: int = 0, options: Mapping[str, Any] | None = None) -> Learner:
    """A learner of a registered agent.

    Args:
        name: "ppo", "dqn" or "evolution".
        spec: What the agent will be used with: `ControlSpec.for_agent(make_agent(name, ...))`, with changes.
        seed: Root of all that is drawn, the episodes included.
        options: The agent's options that the spec leaves open (scales, hidden, moves, residual) and the algorithm's.

    Raises:
        UnknownNameError: No such learner, or no such option.
        InputError: The spec is not the agent's kind, or an option is out of range.
    """
    if name not in _LEARNERS:
        raise unknown_name("learner", name, _LEARNERS)
    return _LEARNERS[name](name, spec, seed, dict(options or {}))


def _divide(
    name: str, options: Mapping[str, Any], algorithm: Mapping[str, Any], agent: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the agent, and of the algorithm."""
    known = [key for key in inspect.signature(agent).parameters if key not in _FROM_SPEC]
    for key in options:
        if key in _FROM_SPEC:
            raise InputError(f"option {key!r} of learner {name!r} is set by the spec or the call, leave it out")
        if key not in known and key not in algorithm:
            raise unknown_name(f"option of learner {name!r}", key, [*known, *algorithm])
    return (
        {key: value for key, value in options.items() if key in known},
        {key: value for key, value in options.items() if key not in known},
    )


def _agent_for(spec: ControlSpec, name: str, options: Mapping[str, Any], seed: int) -> Any:
    """An agent that asks for just this spec."""
    given = {
        **options,
        "signals": list(spec.signals),
        "n_decisions": spec.timing.n_decisions,
        "early_decisions": spec.timing.early_decisions,
        "base": spec.base.name,
        "base_options": dict(spec.base.options),
    }
    agent = make_agent(name, given, seed=seed, n_knobs=spec.n_moved)
    for key in ("signals", "actions", "timing", "base"):
        asked, there = getattr(agent.needs, key), getattr(spec, key)
        if asked != there:
            raise InputError(
                f"agent {name!r} needs {key} {asked}, the spec has {there}; make the spec by ControlSpec.for_agent"
            )
    return agent
