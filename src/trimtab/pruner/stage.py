"""Stage: what one method makes of one network: proposals, a short fine-tuning of each, and the choice among them.

Called by `prune`, for the agent in each of its stages and for every baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from trimtab.errors import InputError, TrimtabError
from trimtab.progress import News
from trimtab.pruner.choice import Candidate, FineTune, pick, retrained, tuned
from trimtab.pruner.methods import BY_SCORE, Proposal, propose
from trimtab.pruning.budget import Budget, Prunable
from trimtab.pruning.calibration import has_statistics, recalibrate
from trimtab.pruning.evaluation import CachedEvaluator
from trimtab.pruning.network import PrunableNetwork
from trimtab.pruning.parts import Configuration
from trimtab.pruning.scorer import Scorer
from trimtab.pruning.validation import Validation

__all__ = ["BLIND", "Given", "Outcome", "run_method"]

BLIND = (  # what is said of an outcome that is
    "the best configuration scored no more than a guess before fine-tuning: nothing told configurations apart; {how}"
)


@dataclass(frozen=True)
class Given:
    """What the user gave, as far as every method needs it; see `prune`.

    Attributes:
        evaluate: Score of a network, or None.
        validation: (inputs, targets), or None.
        fine_tune: Trains a network in place, or None.
        max_evaluations: Of a search.
        n_best: Candidates that are fine-tuned.
        seed: Of what is drawn.
        weights: What "ppo" starts from.
        score_after: Trains a cut network in place before it is scored in a search, or None.
        on_news: Told how far it is, or None.
    """

    evaluate: Callable[[nn.Module], float] | None
    validation: object
    fine_tune: FineTune | None
    max_evaluations: int
    n_best: int
    seed: int
    weights: Mapping[str, Tensor]
    score_after: FineTune | None = None
    on_news: Callable[[News], None] | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of a method.

    Attributes:
        method: Its name.
        model: The chosen network after fine-tuning, in evaluation.
        dense: Score of the network that it began with.
        candidates: What it proposed, after fine-tuning, the chosen one first.
        proposal: What it had to do for it.
        is_blind: Whether it goes by scores, and the best that it proposed scored no more than a guess.
    """

    method: str
    model: nn.Module
    dense: float
    candidates: tuple[Candidate, ...]
    proposal: Proposal
    is_blind: bool = False


def run_method(method: str, given: Given, network: Prunable, budget: Budget, *, log: Path | None = None) -> Outcome:
    """Let a method propose, fine-tune what it proposes, and pick the best.

    Args:
        method: One of `METHODS`.
        given: By the user.
        network: To be pruned.
        budget: To keep to.
        log: File that scores are kept in.

    Raises:
        InputError: The network cannot be scored.
        RunFailedError: No configuration has a score, or none after fine-tuning.
    """
    rate, score_of, validation = given.evaluate, None, None
    if given.validation is not None:
        validation = Validation(given.validation, network.model, len(network.inputs))
        if has_statistics(network.model):
            network.calibration = validation.calibration
        rate = validation.rate
        score_of = _scores_on(validation, network)
    first = given.score_after or (given.fine_tune if method == "paper" else None)
    rate_in_search = rate
    if first is not None and rate is not None:
        rate_in_search = partial(_rate_retrained, first, rate, given.seed, network.calibration)
        score_of = partial(_score_retrained, network, rate, rate_in_search)
        scorer = Scorer(network, score_of=score_of, log=log, seed=given.seed)
    else:
        scorer = Scorer(network, evaluate=given.evaluate, score_of=score_of, log=log, seed=given.seed)
    if rate is None or rate_in_search is None:
        raise AssertionError("the scorer has refused neither")
    proposal = propose(
        method, budget, scorer, rate_in_search, max_evaluations=given.max_evaluations, n_best=given.n_best,
        seed=given.seed, weights=given.weights, on_news=_teller(given, method),
    )  # fmt: skip
    tell = _teller(given, f"{method}: fine-tuning", len(proposal.widths))
    found: list[tuple[Candidate, nn.Module]] = []
    for widths, score in zip(proposal.widths, proposal.scores, strict=True):
        candidate = Candidate(method, widths, score, None, budget.share(widths), proposal.evaluations)
        found.append(
            tuned(
                network,
                candidate,
                given.fine_tune,
                rate,
                seed=given.seed,
                orders=proposal.orders,
                is_scored_as_cut=first is None,
            )
        )
        tell(len(found))
    chosen = pick(found)
    ordered = [found[chosen][0], *(candidate for place, (candidate, _) in enumerate(found) if place != chosen)]
    best = max(proposal.scores)
    is_blind = validation is not None and validation.is_guess(best) and not validation.is_guess(scorer.dense)
    return Outcome(method, found[chosen][1], scorer.dense, tuple(ordered), proposal, is_blind and method in BY_SCORE)


def _scores_on(validation: Validation, network: Prunable) -> Callable[[Configuration], float]:
    """Scores of configurations, with memory where we can look into the network."""
    if isinstance(network, PrunableNetwork):
        return CachedEvaluator(network, validation).score
    return lambda widths: validation.rate(network.cut(widths))


def _score_retrained(
    network: Prunable,
    rate: Callable[[nn.Module], float],
    rate_in_search: Callable[[nn.Module], float],
    configuration: Configuration,
) -> float:
    """Score of a configuration after one retraining; of the dense network as it is."""
    model = network.cut(configuration)
    return float(rate(model) if configuration == network.dense else rate_in_search(model))


def _rate_retrained(
    train: FineTune,
    rate: Callable[[nn.Module], float],
    seed: int,
    calibration: Sequence[tuple[Tensor, ...]],
    model: nn.Module,
) -> float:
    """Score after one retraining; of so few steps running statistics lag behind, and are taken anew where they can."""
    try:
        retrained(model, train, seed)
    except (TrimtabError, MemoryError):
        raise
    except Exception as error:  # whatever a user's function raises
        raise InputError(
            f"the training before a score raised {type(error).__name__}: {error}; score_after (of 'paper' fine_tune) "
            "is called with a torch.nn.Module in training and trains it in place"
        ) from error
    if calibration:
        recalibrate(model, calibration)
    return float(rate(model))


def _teller(given: Given, what: str, total: int | None = None) -> Callable[[int], None]:
    """Tells the user how many of something are done."""

    def tell(done: int) -> None:
        if given.on_news is not None:
            unit = "evaluation" if total is None else "candidate"
            given.on_news(News(unit, done, total or given.max_evaluations, what))

    return tell
