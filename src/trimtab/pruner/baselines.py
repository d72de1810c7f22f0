"""Baselines: the rules that need no learning, at the same budget, scored and fine-tuned like the search's own.

Called by `prune` and by the study of pruning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from trimtab.pruner.choice import Candidate
from trimtab.pruner.search import Search
from trimtab.pruning.allocations import by_threshold, greedy, random_orders, uniform
from trimtab.pruning.budget import Budget
from trimtab.pruning.parts import Configuration
from trimtab.pruning.scorer import Scorer
from trimtab.seeding import torch_generator

__all__ = ["BASELINES", "Rule", "rules"]

BASELINES = ("uniform", "global", "lamp", "random-units", "greedy", "random-search")


@dataclass(frozen=True)
class Rule:
    """Configurations that a rule proposes; the best of them after fine-tuning counts.

    Attributes:
        name: One of `BASELINES`.
        widths: One, or several for a search.
        scores: Of each, before fine-tuning.
        orders: Units by importance, where not the network's own.
        evaluations: Configurations that were scored to find them.
    """

    name: str
    widths: tuple[Configuration, ...]
    scores: tuple[float, ...]
    orders: Sequence[Tensor] | None
    evaluations: int

    def candidates(self, budget: Budget) -> list[Candidate]:
        """As candidates that are not fine-tuned yet."""
        return [
            Candidate(self.name, widths, score, None, budget.share(widths), self.evaluations)
            for widths, score in zip(self.widths, self.scores, strict=True)
        ]


def rules(
    names: Sequence[str],
    budget: Budget,
    make_scorer: Callable[[], Scorer],
    rate: Callable[[nn.Module], float],
    *,
    max_evaluations: int,
    n_best: int,
    seed: int,
) -> Iterator[Rule]:
    """What each rule proposes.

    Args:
        names: Some of `BASELINES`.
        budget: To keep to.
        make_scorer: A new scorer, which knows nothing that others have asked.
        rate: Score of a network, for units that are not ranked.
        max_evaluations: Of random search: those of the search that it is compared with.
        n_best: Of random search: how many are fine-tuned, as of that search.
        seed: Of what is drawn.
    """
    network = budget.network
    for name in names:
        if name == "random-units":
            orders = random_orders(budget, torch_generator(seed, "random units"))
            widths = uniform(budget)
            yield Rule(name, (widths,), (rate(network.cut(widths, orders)),), orders, 1)
            continue
        scorer = make_scorer()
        if name == "random-search":
            found = tuple(Search(budget, scorer, "random", max_evaluations, seed).run()[:n_best])
        elif name == "greedy":
            found = (greedy(budget, scorer.score),)
        else:
            found = (uniform(budget) if name == "uniform" else by_threshold(budget, name),)
        yield Rule(name, found, tuple(scorer.score(widths) for widths in found), None, scorer.n_evaluations)
