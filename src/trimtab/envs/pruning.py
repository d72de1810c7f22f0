"""PruningEnv: the widths of a network's parts, chosen one after the other, as a Gymnasium environment.

Made by `gymnasium.make("trimtab/Pruning-v0", model=..., example_inputs=..., validation=(inputs, targets),
target={"flops": 0.5})`, and by `trimtab.pruner`. The form is AMC's (He et al. 2018, arXiv:1802.03494): an episode is
one pass over the parts, the state describes the part and what is spent, an action that would break the budget is
clipped, and the only reward is the score of the pruned network at the end. Deviations: widths are discrete, the target
and the spread of importance within the part are observed, and so is, where it is affordable, how much is lost when the
part alone is cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
from torch import nn

from trimtab.errors import InputError, unknown_name
from trimtab.pruning.budget import Budget, Prunable, Target
from trimtab.pruning.calibration import has_statistics
from trimtab.pruning.evaluation import CachedEvaluator
from trimtab.pruning.network import PrunableNetwork
from trimtab.pruning.parts import Configuration, Part
from trimtab.pruning.scorer import Scorer
from trimtab.pruning.validation import Validation

__all__ = ["ALONE", "FEATURES", "N_LEVELS", "Problem", "PruningEnv", "nearest"]

REWARDS = ("last", "each")
N_LEVELS = 17  # actions: sixteenths of a part's units, and 0
KINDS = ("convolution", "linear", "recurrent", "embedding", "heads", "feed-forward")
QUANTILES = (0.125, 0.25, 0.5, 0.75)
ALONE = (0.5, 0.25)  # shares of its units that a part alone is cut to, to see what that loses
FEATURES = (
    "place", *(f"is {kind}" for kind in KINDS), "log size", "share of cost", "share of parameters", "can be taken out",
    *(f"importance in first {q:g}" for q in QUANTILES), *(f"kept at {share:g} alone" for share in ALONE), "knows alone",
    "target", "cost so far", "least cost", "slack", "widest open", "last width", "parts left",
)  # fmt: skip

Features = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Problem:
    """One network, one budget, and a score.

    Attributes:
        network: What is pruned.
        budget: What it may cost.
        score: Of a configuration; higher is better, -inf where it failed.
        dense: Score of the dense network.
        alone: (parts, len(ALONE)) score of the network with one part alone cut; None where nobody looked.
    """

    network: Prunable
    budget: Budget
    score: Callable[[Configuration], float]
    dense: float
    alone: npt.NDArray[np.float64] | None = None


class PruningEnv(gymnasium.Env[Features, Any]):
    """One network to be pruned; a step chooses the width of one part.

    Observation: (len(FEATURES),) float32, each in [0, 1]; `FEATURES` names them. Action: Discrete(17); action a asks
    for a/16 of the part's units, brought to the nearest of its widths; 0 asks for its layer to be taken out, or where
    that cannot be for its smallest width. What would break the budget is clipped to the widest that does not; where
    only wider ones are open (the next smaller would take the layer out, which can cost more), to the narrowest.

    With reward "last" it is 0 until the last part, then the score of the pruned network on validation: accuracy, or
    what `evaluate` returns. A network that could not be scored is worth 0, or twice the dense network's score where
    that is negative. With "each", the write-up's, every action is rewarded by the score of the network as it is by
    then, the parts to come being whole, plus the share of its cost that was saved.

    Episodes are `terminated` after the last part and never truncated. `infos` of a step with a score has "widths",
    "score" and "share" (of the dense network's cost).

    Args:
        model: Trained network; copied, never touched.
        example_inputs: A tensor, or a tuple of the forward's positional arguments.
        target: {"flops": share}, {"params": share}: what may be left. Latency needs measurements: use `trimtab.prune`.
        validation: (inputs, targets): scored with memory, see `trimtab.pruning.evaluation`.
        evaluate: Instead of it, a function of a network that returns a float, higher is better.
        multiple: Widths are multiples of it.
        reward: "last" or "each"; see above.
        problem: Instead of a model, a problem; or a function that draws a new one in each episode from a generator.

    Raises:
        InputError: An argument is wrong; the message names it.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (Gymnasium declares it so)

    def __init__(
        self,
        model: nn.Module | None = None,
        example_inputs: object = None,
        *,
        target: object = None,
        validation: object = None,
        evaluate: Callable[[nn.Module], float] | None = None,
        multiple: int = 8,
        reward: str = "last",
        problem: Problem | Callable[[np.random.Generator], Problem] | None = None,
    ) -> None:
        if reward not in REWARDS:
            raise unknown_name("reward", reward, REWARDS)
        if (model is None) == (problem is None):
            raise InputError("give either model=, example_inputs=, target= and validation= or evaluate=, or problem=")
        if problem is None:
            problem = _problem(model, example_inputs, target, validation, evaluate, multiple)
        self._source, self._reward = problem, reward
        self.problem: Problem | None = problem if isinstance(problem, Problem) else None
        self._fixed: Features = np.zeros((0, 0), dtype=np.float32)
        self._known: Problem | None = None
        self._chosen: list[int] = []
        self.observation_space = gymnasium.spaces.Box(0.0, 1.0, (len(FEATURES),), np.float32)
        self.action_space = gymnasium.spaces.Discrete(N_LEVELS)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Features, dict[str, Any]]:
        """Begin a pass over the parts; without options."""
        super().reset(seed=seed)
        if options:
            raise InputError(f"options {sorted(options)}; trimtab/Pruning-v0 takes none")
        if not isinstance(self._source, Problem):
            self.problem = self._source(self.np_random)
        if self._known is not self.problem:
            self._fixed, self._known = _describe(self._now), self.problem
        self._chosen = []
        return self._observed(), {}

    def step(self, action: Any) -> tuple[Features, float, bool, bool, dict[str, Any]]:
        """Choose the width of the next part."""
        problem, parts = self._now, self._now.network.parts
        if len(self._chosen) == len(parts):
            raise InputError("the episode is over; call reset()")
        if not self.action_space.contains(action):
            raise InputError(f"action {action!r}; expected 0 to {N_LEVELS - 1}, sixteenths of the part's units")
        wanted = asked_width(parts[len(self._chosen)], int(action))
        self._chosen.append(clipped(wanted, problem.budget.open_widths(self._chosen)))
        is_last = len(self._chosen) == len(parts)
        if not is_last and self._reward == "last":
            return self._observed(), 0.0, False, False, {}
        widths: Configuration = (*self._chosen, *problem.network.dense[len(self._chosen) :])
        score, share = problem.score(widths), problem.budget.share(widths)
        reward = score if math.isfinite(score) else min(0.0, 2 * problem.dense)
        reward += 1 - share if self._reward == "each" else 0.0
        observation = np.zeros(len(FEATURES), dtype=np.float32) if is_last else self._observed()
        return observation, reward, is_last, False, {"widths": widths, "score": score, "share": share}

    @property
    def _now(self) -> Problem:
        if self.problem is None:
            raise InputError("call reset() first")
        return self.problem

    def _observed(self) -> Features:
        budget, parts = self._now.budget, self._now.network.parts
        place = len(self._chosen)
        dense, part = self._now.network.dense, parts[place]
        most = budget.share((*self._chosen, *dense[place:]))
        least = budget.share((*self._chosen, *budget.floor[place:]))
        target = budget.target.share
        slack = 1.0 if most <= target else (target - least) / (most - least)
        widest = budget.open_widths(self._chosen)[-1] / part.size
        last = self._chosen[-1] / parts[place - 1].size if place else 1.0
        moving = [target, most, least, slack, widest, last, (len(parts) - place) / len(parts)]
        return _bounded(np.concatenate([self._fixed[place], moving]))


def asked_width(part: Part, action: int) -> int:
    """The part's width that is nearest to as many sixteenths of its units; 0 sixteenths are its smallest."""
    if action == 0:
        return part.widths[0]
    units = part.size * action / (N_LEVELS - 1)
    return min((width for width in part.widths if width > 0), key=lambda width: abs(width - units))


def clipped(wanted: int, open_widths: tuple[int, ...]) -> int:
    """The widest open width up to the one that is wanted; the narrowest open one where there is none."""
    return max((width for width in open_widths if width <= wanted), default=open_widths[0])


def nearest(part: Part, share: float) -> int:
    """The part's width, its layer being there, that is nearest to a share of its units."""
    return min((width for width in part.widths if width > 0), key=lambda width: abs(width - share * part.size))


def _kind(part: Part) -> str:
    if part.kind in KINDS:
        return part.kind
    if part.kind in ("LSTM", "GRU", "RNN"):
        return "recurrent"
    return "convolution" if part.kind.startswith("Conv") else "embedding" if part.kind == "Embedding" else "linear"


def _describe(problem: Problem) -> Features:
    """What does not change within an episode; (parts, numbers)."""
    network, budget = problem.network, problem.budget
    dense, parts = network.dense, network.parts
    all_parameters = network.parameters(dense)
    rows = []
    for place, part in enumerate(parts):
        small = (*dense[:place], budget.floor[place], *dense[place + 1 :])
        square = network.scores[place].square()[network.orders[place]]
        mass = (square.cumsum(0) / square.sum()).tolist()
        alone, scale = problem.alone, abs(problem.dense) or 1.0
        kept = [0.0] * len(ALONE) if alone is None else [1 + (a - problem.dense) / scale for a in alone[place]]
        rows.append([
            place / max(1, len(parts) - 1), *(float(_kind(part) == kind) for kind in KINDS), math.log2(part.size) / 12,
            1 - budget.share(small), 1 - network.parameters(small) / all_parameters, float(part.widths[0] == 0),
            *(mass[max(0, math.ceil(q * part.size) - 1)] for q in QUANTILES), *kept, float(alone is not None),
        ])  # fmt: skip
    return _bounded(np.nan_to_num(np.array(rows), nan=0.0, posinf=0.0, neginf=0.0))


def _bounded(numbers: npt.NDArray[Any]) -> Features:
    return np.asarray(np.clip(numbers, 0.0, 1.0), dtype=np.float32)


def _problem(
    model: object,
    example_inputs: object,
    target: object,
    validation: object,
    evaluate: Callable[[nn.Module], float] | None,
    multiple: int,
) -> Problem:
    parsed = Target.parse(target)
    if parsed.kind == "latency":
        raise InputError("target latency has to be measured first; use trimtab.prune(..., target={'latency': ...})")
    network = PrunableNetwork(model, example_inputs, multiple=multiple)  # type: ignore[arg-type]  # it says what it is
    budget = Budget(network, parsed)
    score_of = None
    if validation is not None:
        made = Validation(validation, network.model, len(network.inputs))
        network.calibration = made.calibration if has_statistics(network.model) else ()
        score_of = CachedEvaluator(network, made).score
    scorer = Scorer(network, evaluate=evaluate, score_of=score_of)
    return Problem(network, budget, scorer.score, scorer.dense)
