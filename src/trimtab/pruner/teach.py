"""Teach: one policy of widths for many networks, which the agent "ppo" starts from on a new one.

No policy is shipped yet, and no command calls this: whether a taught one finds more than PPO from nothing has still to
be measured. An episode draws a lesson and a target;
its reward is by how much of the dense network's score the pruned one is better than the best of the two rules that
every search begins with, so that an easy network does not count for more than a hard one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from trimtab.agents.widths import WidthOptions, WidthPolicy
from trimtab.envs.pruning import Problem, PruningEnv
from trimtab.pruner.lessons import Lesson
from trimtab.pruner.search import measure_alone, seeds_of
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
_BEFORE_EACH = 0.3  # of the problems nobody has looked at what each part alone loses, as where evaluations are few


class Classroom:
    """Draws problems from lessons.

    Args:
        lessons: Networks, trained.
    """

    def __init__(self, lessons: Sequence[Lesson]) -> None:
        self._lessons = lessons
        self._ready: dict[tuple[int, int], tuple[PrunableNetwork, CachedEvaluator, dict[Configuration, float]]] = {}

    def __call__(self, generator: np.random.Generator) -> Problem:
        """A problem: a lesson, a multiple of widths, and a target."""
        number = int(generator.integers(len(self._lessons)))
        multiple = int(generator.choice(MULTIPLES))
        low, high = np.log(SHARES)
        share = float(np.exp(generator.uniform(low, high)))
        return self.problem(number, multiple, share, looks=bool(generator.random() >= _BEFORE_EACH))

    def problem(self, number: int, multiple: int, share: float, *, looks: bool) -> Problem:
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
        rules = max(score(widths) for widths in seeds_of(budget))
        alone = measure_alone(network, score) if looks else None
        return Problem(network, budget, lambda widths: (score(widths) - rules) / dense, dense, alone)

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
) -> WidthPolicy:
    """Teach a policy.

    Args:
        lessons: What it learns on.
        n_steps: Environment steps; an episode has as many as its network has parts.
        seed: Of the policy, and of which problem comes when.
        options: PPO's.
        on_step: Called after each step.
    """
    env = PruningEnv(problem=Classroom(lessons))
    env.reset(seed=derive_seed(seed, "problems") % 2**31)
    policy = WidthPolicy(env, options, seed=derive_seed(seed, "policy"))

    def tell() -> bool:
        if on_step is not None:
            on_step()
        return False

    policy.learn(n_steps, tell)
    return policy
