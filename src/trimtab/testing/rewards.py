"""check_reward: what every reward owes.

Called from tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from trimtab.run_state import Array, Interval, RunState
from trimtab.testing.contract import make_state, require

__all__ = ["check_reward"]


def check_reward(reward: Callable[[RunState], Array], *, is_ranked: bool = False) -> None:
    """Check that a reward keeps its contract.

    Args:
        reward: RunState -> (R,), higher is better.
        is_ranked: It compares runs of one task at the end of an episode, and is 0 before.

    Raises:
        ContractError: Names what was broken.
    """
    who = f"reward {getattr(reward, '__name__', reward)!r}"
    nothing = _look(reward, make_state(0), who, 1)
    require(float(nothing[0]) == 0.0, f"{who}: {nothing} where nothing was measured; expected 0")
    for n_intervals in (1, 2, 3):
        one = _look(reward, make_state(n_intervals), who, 1)
        many = _look(reward, make_state(n_intervals, n_runs=3), who, 3)
        near = math.isclose(float(one[0]), float(many[0]), rel_tol=1e-12, abs_tol=1e-12)
        require(near, f"{who}: {one} for a single run, {many} for three of which the first is equal")
    for bad in (math.nan, math.inf, 0.0):
        _look(reward, make_state(2, bad=bad), f"{who}, a loss of {bad}", 1)
    if is_ranked:
        state = make_state(3, n_runs=4)
        state.groups = np.array([0, 0, 0, 1])
        before = _look(reward, state, who, 4)
        require(not before.any(), f"{who}: {before} before the end; expected zeros")
        state.score_loss = np.array([0.3, 0.2, np.inf, 0.1])
        at_end = _look(reward, state, who, 4)
        in_order = at_end[1] > at_end[0] > at_end[2]
        require(
            bool(in_order) and at_end[3] == 0, f"{who}: {at_end} for losses {state.score_loss} of a task and one alone"
        )
        return
    better, worse = (
        float(_look(reward, _after(loss, accuracy), who, 1)[0]) for loss, accuracy in ((1.5, 0.7), (1.8, 0.5))
    )
    require(better > worse, f"{who}: {better} for the better interval, {worse} for the worse; expected more for it")


def _after(loss: float, accuracy: float) -> RunState:
    state = make_state(1)
    state.record(Interval(loss, loss, loss, loss, accuracy, 1.0, 0.1, 0.01))
    return state


def _look(reward: Callable[[RunState], Array], state: RunState, who: str, n_runs: int) -> Array:
    value = reward(state)
    right = isinstance(value, np.ndarray) and value.shape == (n_runs,) and value.dtype == np.float64
    require(right, f"{who}: gave {value!r} for {n_runs} runs; expected a float64 array of shape ({n_runs},)")
    require(bool(np.all(np.isfinite(value))), f"{who}: gave {value}; expected finite numbers")
    return value
