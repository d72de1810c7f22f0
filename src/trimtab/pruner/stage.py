"""Stage: one search on one network, the choice among the best of it, and the rules that it is compared with.

Called by `prune`, once for each of its stages.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from trimtab.errors import RunFailedError
from trimtab.progress import News
from trimtab.pruner.baselines import BASELINES, rules
from trimtab.pruner.choice import Candidate, FineTune, pick, retrained, tuned
from trimtab.pruner.search import Search
from trimtab.pruning.budget import Budget
from trimtab.pruning.evaluation import CachedEvaluator
from trimtab.pruning.network import PrunableNetwork
from trimtab.pruning.parts import Configuration
from trimtab.pruning.scorer import Scorer

__all__ = ["Given", "Outcome", "run_stage"]


@dataclass(frozen=True)
class Given:
    """What the user gave, as far as every stage needs it; see `prune`.

    Attributes:
        evaluate: Score of a network, or None.
        validation: (inputs, targets), or None.
        fine_tune: Trains a network in place, or None.
        agent: Name.
        max_evaluations: Of one stage.
        n_best: Candidates that are fine-tuned.
        seed: Of what is drawn.
        weights: What the agent starts from, or None.
        on_news: Told how far it is, or None.
    """

    evaluate: Callable[[nn.Module], float] | None
    validation: object
    fine_tune: FineTune | None
    agent: str
    max_evaluations: int
    n_best: int
    seed: int
    weights: dict[str, Tensor] | None = None
    on_news: Callable[[News], None] | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of a stage.

    Attributes:
        model: The chosen network after fine-tuning, in evaluation.
        dense: Score of the network that the stage began with.
        candidates: The best of the search, the chosen one first.
        baselines: The best of each rule after fine-tuning.
        evaluations: Configurations scored in the search.
        failed: Of them, how many had no score.
        failure: What the first of those said; empty without.
    """

    model: nn.Module
    dense: float
    candidates: tuple[Candidate, ...]
    baselines: tuple[Candidate, ...]
    evaluations: int
    failed: int
    failure: str


def run_stage(
    given: Given, network: PrunableNetwork, budget: Budget, *, baselines: Collection[str] = (), log: Path | None = None
) -> Outcome:
    """Search, fine-tune the best, pick one; then the same for the rules.

    Args:
        given: By the user.
        network: To be pruned.
        budget: To keep to.
        baselines: Names of rules.
        log: File that the search's scores are kept in.

    Raises:
        InputError: The network cannot be scored.
        RunFailedError: No configuration of the search has a score, or none after fine-tuning.
    """
    evaluator = None if given.validation is None else CachedEvaluator.of(network, given.validation)
    rate = given.evaluate if evaluator is None else evaluator.rate
    make_scorer = partial(
        Scorer, network, evaluate=given.evaluate, score_of=None if evaluator is None else evaluator.score
    )
    if given.agent == "paper" and given.fine_tune is not None and rate is not None:
        score_of = partial(_score_retrained, network, given.fine_tune, rate, given.seed)
        scorer = Scorer(network, score_of=score_of, log=log)
    else:
        scorer = make_scorer(log=log)
    if rate is None:  # the scorer has refused that
        raise RunFailedError("neither evaluate nor validation")
    best_of = partial(_best_of, given, network, rate)

    search = Search(
        budget, scorer, given.agent, given.max_evaluations, given.seed, given.weights, _teller(given, "search")
    )
    ranked = search.run()[: given.n_best]
    if not ranked:
        raise RunFailedError(
            f"no configuration within the budget has a score; the first failure: {scorer.first_failure}"
        )
    n = scorer.n_evaluations
    found = [Candidate("search", c, scorer.score(c), None, budget.share(c), n) for c in ranked]
    candidates, model = best_of(found)
    of_rules = []
    for rule in rules(
        [name for name in BASELINES if name in baselines], budget, make_scorer, rate,
        max_evaluations=n, n_best=given.n_best, seed=given.seed,
    ):  # fmt: skip
        tried, _ = best_of(rule.candidates(budget), rule.orders)
        of_rules.append(tried[0])
    return Outcome(model, scorer.dense, tuple(candidates), tuple(of_rules), n, scorer.n_failed, scorer.first_failure)


def _best_of(
    given: Given,
    network: PrunableNetwork,
    rate: Callable[[nn.Module], float],
    candidates: Sequence[Candidate],
    orders: Sequence[Tensor] | None = None,
) -> tuple[list[Candidate], nn.Module]:
    """All candidates after fine-tuning, the best first, and its network."""
    found: list[tuple[Candidate, nn.Module]] = []
    tell = _teller(given, f"fine-tuning of {candidates[0].name}", len(candidates))
    for candidate in candidates:
        found.append(tuned(network, candidate, given.fine_tune, rate, seed=given.seed, orders=orders))
        tell(len(found))
    chosen = pick(found)
    return [found[chosen][0], *(c for place, (c, _) in enumerate(found) if place != chosen)], found[chosen][1]


def _score_retrained(
    network: PrunableNetwork,
    fine_tune: FineTune,
    rate: Callable[[nn.Module], float],
    seed: int,
    configuration: Configuration,
) -> float:
    """Score of a configuration after one fine-tuning; of the dense network as it is."""
    model = network.cut(configuration)
    if configuration != network.dense:
        retrained(model, fine_tune, seed)
    return float(rate(model))


def _teller(given: Given, what: str, total: int | None = None) -> Callable[[int], None]:
    """Tells the user how many of something are done."""

    def tell(done: int) -> None:
        if given.on_news is not None:
            unit = "evaluation" if total is None else "candidate"
            given.on_news(News(unit, done, total or given.max_evaluations, what))

    return tell
