"""check_signal: what every signal owes.

Called from tests.
"""

from __future__ import annotations

import math

import numpy as np

from trimtab.run_state import Array, RunState
from trimtab.signals import Signal, observe
from trimtab.testing.contract import make_state, require

__all__ = ["check_signal"]


def check_signal(signal: Signal, *, is_raw: bool = False) -> None:
    """Check that a signal keeps its contract.

    Args:
        signal: The signal.
        is_raw: It speaks in the unit of a loss, on purpose: it may depend on scale, and need not be 0 where
            nothing was measured.

    Raises:
        ContractError: Names what was broken.
    """
    who = f"signal in [{signal.low:g}, {signal.high:g}]"
    require(signal.low < signal.high, f"{who}: low is not below high")
    for n_intervals in range(4):
        _look(signal, make_state(n_intervals), who, 1)
        _look(signal, make_state(n_intervals, n_runs=3), who, 3)
        one = observe([signal], make_state(n_intervals))[0, 0]
        first_of_many = observe([signal], make_state(n_intervals, n_runs=3))[0, 0]
        near = math.isclose(one, first_of_many, rel_tol=1e-12, abs_tol=1e-12)
        require(near, f"{who}: {one} for a single run, {first_of_many} for the first of three equal ones")
    for bad in (math.nan, math.inf, 0.0, -1.0):
        for n_runs in (None, 2):
            _look(signal, make_state(2, bad=bad, n_runs=n_runs), f"{who}, a loss of {bad}", n_runs or 1)
    if is_raw:
        return
    nothing, known = float(signal(make_state(0))[0]), float(signal(make_state(2))[0])
    # A knob's setting is known before anything is measured: such a signal does not depend on what is.
    require(nothing in (0.0, known), f"{who}: {nothing} where nothing was measured; expected 0")
    for factor in (10.0, 0.1):
        scaled = float(signal(make_state(3, scale=factor))[0])
        plain = float(signal(make_state(3))[0])
        require(
            math.isclose(scaled, plain, rel_tol=1e-9, abs_tol=1e-12),
            f"{who}: {plain}, but {scaled} when every loss is {factor:g} times as large; expected the same",
        )


def _look(signal: Signal, state: RunState, who: str, n_runs: int) -> Array:
    value = signal(state)
    # What all runs share, such as the progress, may be one number.
    right = isinstance(value, np.ndarray) and value.shape in ((n_runs,), (1,)) and value.dtype == np.float64
    require(right, f"{who}: gave {value!r} for {n_runs} runs; expected a float64 array of shape ({n_runs},)")
    inside = bool(np.all((value >= signal.low) & (value <= signal.high)))
    require(inside, f"{who}: gave {value}, outside its bounds")
    return value
