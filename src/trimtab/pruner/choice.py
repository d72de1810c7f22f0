"""Choice: the best configurations of a search are fine-tuned for a short while, and one of them is picked.

Called by `prune`. The order before fine-tuning tells little about the order after it (FINDINGS section 4), so the few
best are compared again. Every candidate starts from the dense weights and draws the same random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from trimtab.errors import InputError, RunFailedError
from trimtab.pruning.budget import Prunable
from trimtab.pruning.parts import Configuration
from trimtab.seeding import scoped_global_rng, torch_generator

__all__ = ["Candidate", "FineTune", "pick", "retrained", "tuned"]

FineTune = Callable[[nn.Module], object]
Rate = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Candidate:
    """One way to prune the network.

    Attributes:
        name: Of the method that proposed it.
        widths: The configuration.
        before: Score on validation in the search: as it was cut, or after the short training that was asked for there.
        after: The same after fine-tuning, or of the network as it was cut where nothing is fine-tuned; None where
            that failed.
        share: Cost in units of the dense network's.
        evaluations: Configurations that were scored to find it.
        failure: Why there is no score after fine-tuning; empty where there is one.
    """

    name: str
    widths: Configuration
    before: float
    after: float | None
    share: float
    evaluations: int
    failure: str = ""


def tuned(
    network: Prunable,
    candidate: Candidate,
    fine_tune: FineTune | None,
    rate: Rate,
    *,
    seed: int,
    orders: Sequence[Tensor] | None = None,
    is_scored_as_cut: bool = True,
) -> tuple[Candidate, nn.Module]:
    """A candidate with its score after fine-tuning, and its network, in evaluation.

    A failure of the user's functions is written into the candidate and not raised. What the scoring does to the network
    is undone.

    Args:
        network: What is pruned.
        candidate: With its score before.
        fine_tune: Trains a network in place; None leaves it as it is.
        rate: Score of a network.
        seed: Of what `fine_tune` draws from torch's generators.
        orders: Units by importance, where not the network's own.
        is_scored_as_cut: Whether its score before is that of the network as it was cut.
    """
    model = network.cut(candidate.widths, orders)
    if fine_tune is None and is_scored_as_cut:
        return replace(candidate, after=candidate.before), model
    try:
        if fine_tune is not None:
            retrained(model, fine_tune, seed)
        score = _score(model, rate, _device_of(network.model))
    except Exception as error:  # noqa: BLE001 (whatever a user's functions raise, it is said in the report)
        return replace(candidate, after=None, failure=f"{type(error).__name__}: {error}"), model.eval()
    if not math.isfinite(score):
        return replace(candidate, after=None, failure=f"its score after fine-tuning is {score}"), model
    return replace(candidate, after=score), model


def retrained(model: nn.Module, fine_tune: FineTune, seed: int) -> nn.Module:
    """The network after fine-tuning, in place, and in evaluation; torch's generators are lent, set by the seed.

    Raises:
        InputError: The function returned another network.
    """
    device = _device_of(model)
    state = torch_generator(seed, "fine-tuning").get_state()
    states = [state, *([torch.Generator(device).manual_seed(seed).get_state()] if device.type == "cuda" else [])]
    with scoped_global_rng(states, device), torch.enable_grad():
        returned = fine_tune(model.train())
    if isinstance(returned, nn.Module) and returned is not model:
        raise InputError(
            f"fine_tune returned another {type(returned).__name__} than the one it was given, which would be lost; it "
            "has to train that one in place: load_state_dict of the other's state_dict() at its end"
        )
    return model.eval()


def _score(model: nn.Module, rate: Rate, device: torch.device) -> float:
    """Score of a network; its weights, mode and device are what they were, whatever the user's function does."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    score = float(rate(model))
    model.load_state_dict(state, strict=False)
    model.eval().to(device)  # where fine-tuning moved it, the example inputs did not follow
    return score


def _device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def pick(found: Sequence[tuple[Candidate, nn.Module]]) -> int:
    """Place of the best after fine-tuning; of equal ones the better before, then the first.

    Raises:
        RunFailedError: None of them has a score.
    """
    best: tuple[float, float] | None = None
    chosen = -1
    for place, (candidate, _) in enumerate(found):
        if candidate.after is not None and (best is None or (candidate.after, candidate.before) > best):
            best, chosen = (candidate.after, candidate.before), place
    if chosen < 0:
        raise RunFailedError(
            f"fine-tuning failed for all {len(found)} candidates; the first: {found[0][0].failure}; fine_tune is "
            "called with a torch.nn.Module in training and trains it in place"
        )
    return chosen
