"""Methods: everything by which a network can be pruned to a budget, learned or not, under one name each.

Called by `stage`. A method proposes configurations, the best first, with what it cost to find them; what is done with
them afterwards is the same for all. Every method is a baseline of every other one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from trimtab.errors import InputError, RunFailedError, TrimtabError
from trimtab.pruner.search import AGENTS, Search
from trimtab.pruning.allocations import THRESHOLDS, by_threshold, every, greedy, random_orders, uniform
from trimtab.pruning.budget import Budget
from trimtab.pruning.parts import Configuration
from trimtab.pruning.scorer import Scorer
from trimtab.seeding import torch_generator

__all__ = ["BY_SCORE", "LEARNED", "METHODS", "Proposal", "propose"]

LEARNED = ("ppo", "ppo-untaught", "paper")
BY_SCORE = (*AGENTS, "greedy", "exhaustive")  # methods that choose by scores
METHODS = (*AGENTS, "uniform", *THRESHOLDS, "random-units", "greedy", "exhaustive")


@dataclass(frozen=True)
class Proposal:
    """What a method proposes.

    Attributes:
        widths: Configurations within the budget, the best before fine-tuning first.
        scores: Of each.
        orders: Units by importance, where not the network's own.
        evaluations: Configurations that were scored to find them.
        failed: Of those, how many had no score.
        failure: What the first of them said; empty without.
    """

    widths: tuple[Configuration, ...]
    scores: tuple[float, ...]
    orders: Sequence[Tensor] | None
    evaluations: int
    failed: int = 0
    failure: str = ""


def propose(
    name: str,
    budget: Budget,
    scorer: Scorer,
    rate: Callable[[nn.Module], float],
    *,
    max_evaluations: int,
    n_best: int,
    seed: int,
    weights: Mapping[str, Tensor] | None = None,
    on_news: Callable[[int], None] | None = None,
) -> Proposal:
    """What a method proposes for a network.

    Args:
        name: One of `METHODS`.
        budget: To keep to.
        scorer: Of the network's configurations, one for each method, so that none knows what others asked.
        rate: Score of any network.
        max_evaluations: Of a search; "exhaustive" scores all that keep to the budget.
        n_best: How many a search proposes at most.
        seed: Of what is drawn.
        weights: What "ppo" starts from.
        on_news: Told the number of evaluations.

    Raises:
        InputError: The first network cannot be scored, or there are too many configurations to score them all.
        RunFailedError: No configuration within the budget has a score.
    """
    if name == "random-units":
        orders = random_orders(budget, torch_generator(seed, "random units"))
        widths = uniform(budget)
        return Proposal((widths,), (_rated(rate, budget.network.cut(widths, orders)),), orders, 1)
    if name in AGENTS:
        search = Search(budget, scorer, name, max_evaluations, seed, weights, on_news)
        found = tuple(search.run()[:n_best])
    elif name == "exhaustive":
        for number, widths in enumerate(every(budget), start=1):
            scorer.score(widths)
            if on_news is not None:
                on_news(number)
        found = tuple(widths for widths in scorer.best(n_best) if scorer.scores[widths] > -math.inf)
    elif name == "greedy":
        found = (greedy(budget, scorer.score),)
    else:
        found = (uniform(budget) if name == "uniform" else by_threshold(budget, name),)
    found = tuple(widths for widths in found if scorer.score(widths) > -math.inf)
    scores = tuple(scorer.score(widths) for widths in found)
    if not found:
        raise RunFailedError(
            f"no configuration within the budget has a score; the first failure: {scorer.first_failure}"
        )
    return Proposal(found, scores, None, scorer.n_evaluations, scorer.n_failed, scorer.first_failure)


def _rated(rate: Callable[[nn.Module], float], model: nn.Module) -> float:
    """Score of a network that the scorer has no name for, since its units are others.

    Raises:
        InputError: There is none.
    """
    try:
        found = float(rate(model))
    except (TrimtabError, MemoryError):
        raise
    except Exception as error:  # whatever a user's function raises
        reason = f"{type(error).__name__} was raised for the network with random units: {error}"
        raise InputError(f"{reason}; evaluate is called with a torch.nn.Module and returns a float") from error
    if not math.isfinite(found):
        raise InputError(f"the score of the network with random units is {found}; expected a finite number")
    return found
