"""UW+HG: a rule for the learning rate that needs no learning, and the bar that every learned agent has to pass.

Called through the registry, and behind `brain="default"` until a learned brain is shipped. Source: FINDINGS section
5 and section 4 of its record. First the rate is brought to where an update is 0.9 % of the weights (UW), in six
short decisions; then it follows the hypergradient's sign (HG: Baydin et al. 2018, arXiv:1703.04782, there by
gradient descent on the rate), under a cosine.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from trimtab.agents.base import Actions, Agent, Array, Base, Needs, State, Timing
from trimtab.errors import InputError

__all__ = ["UWHG"]

N_FIRST = 6  # decisions of the UW phase, after one that only measures


class UWHG(Agent):
    """Update-to-weight ratio first, then the cosine between gradient and last update.

    decision 0:      nothing, it only measures
    decisions 1..6:  log10 s += clip(target - x, -2, 2),        x = log10(mean |u| / |theta|) + 2.5
    afterwards:      log10 s += gain * clip(4 c - bias, -1, 1),  c = mean cos(g_t, u_(t-1))
    rate written:    s * base(progress);  where x or c was not measured, s stays

    Args:
        target: Set point of x; 0.45 means updates of 0.9 % of the weights.
        gain: Largest move of log10 s in the second phase.
        bias: Pull downwards: without agreement between gradient and update the rate falls.
        n_decisions: Decisions of the second phase, in equal parts of the budget.
        base: Name of the schedule under it; "cosine" needs a known budget, "constant" does not.

    Raises:
        InputError: A number is out of range.
    """

    name = "uwhg"

    def __init__(
        self,
        target: float = 0.45,
        gain: float = 0.15,
        bias: float = 0.3,
        n_decisions: int = 20,
        base: str = "cosine",
    ) -> None:
        if not (-2 < target < 2 and 0 < gain <= 1 and 0 <= bias <= 1 and n_decisions >= 1):
            raise InputError(
                f"uwhg: target {target}, gain {gain}, bias {bias}, n_decisions {n_decisions}; expected target in "
                "(-2, 2), gain in (0, 1], bias in [0, 1], n_decisions >= 1"
            )
        self._target = target
        self._gain = gain
        self._bias = bias
        self._n_decisions = n_decisions
        self._base = base

    @property
    @override
    def needs(self) -> Needs:
        return Needs(
            signals=("update_to_weight", "grad_update_cosine"),
            actions=Actions("decades", low=-2.0, high=2.0),
            timing=Timing(every=None, n_decisions=self._n_decisions, early_decisions=N_FIRST + 1),
            base=Base(self._base),
        )

    @property
    @override
    def options(self) -> dict[str, Any]:
        return {
            "target": self._target,
            "gain": self._gain,
            "bias": self._bias,
            "n_decisions": self._n_decisions,
            "base": self._base,
        }

    def predict(
        self,
        observation: Array,
        state: State | None = None,
        episode_start: npt.NDArray[np.bool_] | None = None,
        deterministic: bool = False,
    ) -> tuple[npt.NDArray[Any], State | None]:
        """See `Agent.predict`; the state is the number of decisions taken, (R,)."""
        del deterministic
        taken = [0] * len(observation) if state is None else list(state[0])
        if episode_start is not None:
            taken = [0 if starts else count for starts, count in zip(episode_start.tolist(), taken, strict=True)]
        moves = [[self._move(run[0], run[1], count)] for run, count in zip(observation.tolist(), taken, strict=True)]
        return np.array(moves), ([count + 1 for count in taken],)

    def _move(self, ratio: float, cosine: float, taken: int) -> float:
        # A signal is exactly 0 where nothing was measured (every step skipped by a gradient scaler, gradients sparse).
        if taken == 0 or (ratio if taken <= N_FIRST else cosine) == 0.0:
            return 0.0
        if taken <= N_FIRST:
            return min(max(self._target - ratio, -2.0), 2.0)
        return self._gain * min(max(4.0 * cosine - self._bias, -1.0), 1.0)
