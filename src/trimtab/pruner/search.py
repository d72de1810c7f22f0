"""Search: which widths are tried on a network, within a number of evaluations.

Called by `prune`. Every agent begins with the same configurations (uniform, and one threshold for all parts, on the
grid), and the best seen counts, not the last policy: so the answer is never worse on validation than those two.
FINDINGS section 4: on three layers random search finds as much as PPO for as many evaluations, which is why that
is an agent like the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from trimtab.agents.widths import PRESETS, WidthPolicy
from trimtab.envs.pruning import ALONE, Problem, PruningEnv, nearest
from trimtab.pruning.allocations import by_threshold, draw, on_grid, uniform
from trimtab.pruning.budget import Budget, Prunable
from trimtab.pruning.parts import Configuration
from trimtab.pruning.scorer import Scorer
from trimtab.seeding import derive_seed, numpy_generator

__all__ = ["AGENTS", "Search", "measure_alone", "relative", "seeds_of"]

Scores = npt.NDArray[np.float64]

AGENTS = ("ppo", "ppo-untaught", "paper", "random-search")

_EPISODES = 300  # in which PPO converges (FINDINGS section 4); repeated configurations cost nothing
_EPISODES_PER_EVALUATION = 5
_LEAST_SPREAD = 0.01  # of scores from 0 to 1; those of networks that were cut differ by more
_SHARE_ALONE = 3  # one evaluation in three, at most, goes into what each part alone loses


@dataclass(frozen=True)
class Search:
    """One search.

    Attributes:
        budget: To keep to.
        scorer: Scores, and remembers.
        agent: One of `AGENTS`.
        max_evaluations: Configurations scored at most, the dense one not counted.
        seed: Of the agent.
        weights: What the agent "ppo" starts from; others start from nothing.
        on_news: Told after every evaluation how many there were.
    """

    budget: Budget
    scorer: Scorer
    agent: str
    max_evaluations: int
    seed: int
    weights: Mapping[str, Tensor] | None = None
    on_news: Callable[[int], None] | None = None

    def run(self) -> list[Configuration]:
        """Search; every configuration that keeps to the budget, the best first."""
        for configuration in self.seeds():
            if not self._is_enough():
                self._score(configuration)
        if self.agent == "random-search":
            self._at_random()
        else:
            self._learned()
        ranked = self.scorer.best(len(self.scorer.scores))
        return [c for c in ranked if self.budget.fits(c) and self.scorer.scores[c] > -np.inf]

    def seeds(self) -> list[Configuration]:
        """What every search begins with."""
        return seeds_of(self.budget)

    def _score(self, configuration: Configuration) -> float:
        before = self.scorer.n_evaluations
        found = self.scorer.score(configuration)
        if self.on_news is not None and self.scorer.n_evaluations > before:
            self.on_news(self.scorer.n_evaluations)
        return found

    def _is_enough(self) -> bool:
        return self.scorer.n_evaluations >= self.max_evaluations

    @property
    def _max_episodes(self) -> int:
        return max(_EPISODES, _EPISODES_PER_EVALUATION * self.max_evaluations)

    def _at_random(self) -> None:
        generator = numpy_generator(self.seed, "random widths")
        for _ in range(self._max_episodes):
            if self._is_enough():
                return
            self._score(draw(self.budget, generator))

    def _learned(self) -> None:
        network = self.budget.network
        alone = self._alone()
        if self._is_enough():
            return
        low, unit = _scale([self.scorer.dense, *self.scorer.scores.values()])
        alone = None if alone is None else (alone - low) / unit
        dense = (self.scorer.dense - low) / unit

        def scaled(widths: Configuration) -> float:
            return (self._score(widths) - low) / unit

        # Of scores of another scale the worst was made 0: a share of what the dense network has over it says nothing.
        whole = dense if (low, unit) == (0.0, 1.0) else 1.0
        score = relative(scaled, self.seeds(), whole) if self.agent == "ppo" else scaled
        problem = Problem(network, self.budget, score, dense, alone)
        env = PruningEnv(problem=problem, reward="each" if self.agent == "paper" else "last")
        policy = WidthPolicy(env, PRESETS[self.agent], seed=derive_seed(self.seed, "agent"))
        if self.agent == "ppo":
            policy.load_weights(self.weights or {})
            _act_out(policy, env)
        policy.learn(self._max_episodes * len(network.parts), self._is_enough)
        if self.agent != "paper":
            self._at_random()  # a policy that is sure of itself leaves evaluations over

    def _alone(self) -> Scores | None:
        """What the network scores with one part alone cut; None where that would cost too much of the search.

        A policy that was taught knows enough without: what this costs, it makes better use of (docs/decisions.md).
        """
        network = self.budget.network
        n_new = len({c for of_part in _cuts_alone(network) for c in of_part} - {network.dense})
        if self.agent in ("ppo", "paper") or n_new * _SHARE_ALONE > self.max_evaluations:
            return None
        return measure_alone(network, self._score)


def relative(
    score: Callable[[Configuration], float], rules: Iterable[Configuration], whole: float
) -> Callable[[Configuration], float]:
    """By how much of a whole, the dense network's score, a configuration is better than the best of the rules.

    The reward of teaching: an easy network does not count for more than a hard one. A configuration without a score is
    worth as much as one that scores 0.

    Args:
        score: Of a configuration; -inf where it has none.
        rules: Configurations.
        whole: What differences are divided by; 0 counts as 1.
    """
    zero = max((found for found in map(score, rules) if np.isfinite(found)), default=0.0)
    unit = abs(whole) or 1.0

    def compared(widths: Configuration) -> float:
        found = score(widths)
        return ((found if np.isfinite(found) else min(0.0, zero)) - zero) / unit

    return compared


def _act_out(policy: WidthPolicy, env: PruningEnv) -> None:
    """One episode of what the policy holds for best, before anything is drawn."""
    observation, _ = env.reset()
    is_over = False
    while not is_over:
        observation, _, is_over, _, _ = env.step(policy.act(observation))


def _scale(scores: Iterable[float]) -> tuple[float, float]:
    """(zero, unit) by which scores are brought to the scale of accuracy, on which PPO was tuned.

    Its value starts near 0 and is learned in steps of a fixed size, so that of a score in the thousands (percent, a
    squared error), or of one that hardly differs, it learns nothing. Shares that differ are left as they are; of others
    the worst that was seen is 0 and the best is 1.
    """
    seen = [score for score in scores if np.isfinite(score)]
    low, high = min(seen), max(seen)
    is_share = low >= 0 and high <= 1 and (high == low or high - low >= _LEAST_SPREAD)
    return (0.0, 1.0) if is_share else (low, high - low or abs(low) or 1.0)


def seeds_of(budget: Budget) -> list[Configuration]:
    """Uniform widths and those of one threshold, on the grid."""
    rules = (uniform(budget), by_threshold(budget, "global"))
    return list(dict.fromkeys(on_grid(budget, configuration) for configuration in rules))


def measure_alone(network: Prunable, score: Callable[[Configuration], float]) -> Scores:
    """Score of the network with one part alone cut, to each share in `envs.pruning.ALONE`; (parts, shares)."""
    return np.array([[score(c) for c in of_part] for of_part in _cuts_alone(network)])


def _cuts_alone(network: Prunable) -> list[list[Configuration]]:
    dense = network.dense
    return [
        [(*dense[:place], nearest(part, share), *dense[place + 1 :]) for share in ALONE]
        for place, part in enumerate(network.parts)
    ]
