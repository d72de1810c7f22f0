"""Teach: one policy of widths for many networks, which the agent "ppo" starts from on a new one.

Called by `learn`, and by the benchmark that measures what it is worth. An episode draws a lesson and a target; its
reward is by how much of the dense network's score the pruned one is better than the best of the two rules that every
search begins with. What a part alone loses is not looked at: on networks that it had not seen, a policy that had been
taught with it needed the evaluations that this costs, 2 for each part, more than what they told it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from trimtab.agents.widths import WidthOptions, WidthPolicy
from trimtab.envs.pruning import Problem, PruningEnv
from trimtab.pruner.lessons import Lesson
from trimtab.pruner.search import relative, seeds_of
from trimtab.pruning.budget import Budget, Target
from trimtab.pruning.evaluation import CachedEvaluator
from trimtab.pruning.network import PrunableNetwork
from trimtab.pruning.parts import Configuration
from trimtab.pruning.validation import Validation
from trimtab.seeding import derive_seed

__all__ = ["SHARES", "TEACHING", "Classroom", "teach"]

SHARES = (0.1, 0.9)  # of the FLOPs that may be left, log-uniform
MULTIPLES = (4, 8)
TEACHING = WidthOptions(learning_rate=1e-3, n_steps=2048, batch_size=256, ent_coef=0.01)
_MEMORY = 24 << 20  # bytes of kept activations for each lesson


class Classroom:
    """Draws problems from lessons.

    Args:
        lessons: Networks, trained.

    Attributes:
        rewards: Of every episode so far.
    """

    def __init__(self, lessons: Sequence[Lesson]) -> None:
        self._lessons = lessons
        self.rewards: list[float] = []
        self._ready: dict[tuple[int, int], tuple[PrunableNetwork, CachedEvaluator, dict[Configuration, float]]] = {}

    def __call__(self, generator: np.random.Generator) -> Problem:
        """A problem: a lesson, a multiple of widths, and a target; its rewards are written down."""
        number = int(generator.integers(len(self._lessons)))
        multiple = int(generator.choice(MULTIPLES))
        low, high = np.log(SHARES)
        share = float(np.exp(generator.uniform(low, high)))
        problem = self.problem(number, multiple, share)

        def noted(widths: Configuration) -> float:
            self.rewards.append(problem.score(widths))
            return self.rewards[-1]

        return replace(problem, score=noted)

    def problem(self, number: int, multiple: int, share: float) -> Problem:
        """The problem of a lesson; a target out of reach is raised to the least that can be reached."""
        network, evaluator, scores = self._prepared(number, multiple)

        def score(widths: Configuration) -> float:
            if widths not in scores:
                scores[widths] = evaluator.score(widths)
            return scores[widths]

        least = network.flops(tuple(next(w for w in part.widths if w > 0) for part in network.parts))
        reachable = max(share, 1.05 * least / network.flops(network.dense))
        budget = Budget(network, Target("flops", min(reachable, 0.99)))
        dense = score(network.dense)
        return Problem(network, budget, relative(score, seeds_of(budget), dense), dense)

    def _prepared(
        self, number: int, multiple: int
    ) -> tuple[PrunableNetwork, CachedEvaluator, dict[Configuration, float]]:
        key = (number, multiple)
        if key not in self._ready:
            lesson = self._lessons[number]
            network = PrunableNetwork(lesson.model, lesson.inputs[:1], multiple=multiple)
            pair = (lesson.inputs, lesson.targets)
            evaluator = CachedEvaluator(network, Validation(pair, network.model, 1, batch_size=1024), memory=_MEMORY)
            self._ready[key] = network, evaluator, {}
        return self._ready[key]


def teach(
    lessons: Sequence[Lesson],
    *,
    n_steps: int,
    seed: int,
    options: WidthOptions = TEACHING,
    on_step: Callable[[], None] | None = None,
) -> tuple[WidthPolicy, list[float]]:
    """Teach a policy; it, and the reward of every episode.

    Args:
        lessons: What it learns on.
        n_steps: Environment steps; an episode has as many as its network has parts.
        seed: Of the policy, and of which problem comes when.
        options: PPO's.
        on_step: Called after each step.
    """
    room = Classroom(lessons)
    env = PruningEnv(problem=room)
    env.reset(seed=derive_seed(seed, "problems") % 2**31)
    policy = WidthPolicy(env, options, seed=derive_seed(seed, "policy"))

    def tell() -> bool:
        if on_step is not None:
            on_step()
        return False

    policy.learn(n_steps, tell)
    return policy, room.rewards
