"""check_knob: what every knob owes.

Called from tests.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from trimtab.knobs.base import CategoricalKnob, Knob
from trimtab.run_state import RunState
from trimtab.testing.contract import json_round_trip, require, requires_input_error

__all__ = ["check_knob"]

_REFUSED: dict[str, Any] = {
    "NaN": np.array([math.nan]),
    "infinity": np.array([math.inf]),
    "a negative number": np.array([-0.1]),
    "a bool": np.array([True]),
    "a string": np.array(["0.1"]),
    "None": None,
    "two numbers": np.array([0.1, 0.2]),
    "no number": np.array([]),
    "a matrix": np.array([[0.1]]),
    "a bare number": 0.1,
}


def check_knob(
    knob: Knob,
    make_run: Callable[[], Optimizer | RunState],
    *,
    key: str | None = None,
    disturb: Callable[[RunState], object] | None = None,
) -> None:
    """Check that a knob keeps its contract.

    Args:
        knob: Fresh, not yet bound to a run; it is copied.
        make_run: Makes an optimizer, or a whole run, on which the knob can act, the same each time.
        key: For a knob that acts on param groups: under which key. Then `make_run` gives two groups with
            different positive values, and ratios, zeros and tensors are checked too.
        disturb: Writes the knob's value as somebody else would; the knob has to notice, and to name itself or what it
            found. Not needed where `key` is given.

    Raises:
        ContractError: Names what was broken.
    """
    who = f"knob {getattr(knob, 'name', type(knob).__name__)!r}"

    def make() -> RunState:
        made = make_run()
        return made if isinstance(made, RunState) else RunState(made)

    _check_units(knob, who)
    _check_moves(knob, who)
    own, state = copy.deepcopy(knob), make()
    found = own.bind(state)
    right = isinstance(found, np.ndarray) and found.shape == (1,) and found.dtype == np.float64
    require(right, f"{who}: bind gave {found!r}; expected a float64 array of shape (1,)")
    require(np.array_equal(own.read(state), found), f"{who}: read gives {own.read(state)} after bind gave {found}")
    _check_write(own, state, who)
    _check_refusals(own, state, who)
    _check_conflict(copy.deepcopy(knob), make(), key, disturb, who)
    _check_state(knob, make, who)
    if key is not None:
        _check_groups(knob, make, key, who)


def _check_units(knob: Knob, who: str) -> None:
    require(0 <= knob.low < knob.high < math.inf, f"{who}: bounds [{knob.low}, {knob.high}] are not finite and ordered")
    units = np.linspace(0, 1, 11)
    settings = knob.from_unit(units)
    if knob.is_whole:
        require(np.array_equal(settings, np.rint(settings)), f"{who}: from_unit gives {settings}, not whole numbers")
        again = knob.from_unit(knob.to_unit(settings))
        require(np.array_equal(again, settings), f"{who}: from_unit does not undo to_unit: {settings} became {again}")
        require(bool(np.all(np.diff(settings) >= 0)), f"{who}: from_unit falls")
    else:
        require(bool(np.allclose(knob.to_unit(settings), units, atol=1e-12)), f"{who}: to_unit does not undo from_unit")
        require(bool(np.all(np.diff(settings) > 0)), f"{who}: from_unit does not rise")
    ends = np.array([knob.low, knob.high])
    require(
        bool(np.allclose(settings[[0, -1]], ends, rtol=1e-12)), f"{who}: the unit interval's ends are not its bounds"
    )
    outside = np.array([knob.low / 2 if knob.low > 0 else -1.0, knob.high * 2])
    require(np.array_equal(knob.clip(outside), ends), f"{who}: clip leaves {knob.clip(outside)} outside its bounds")
    require(np.array_equal(knob.to_unit(outside), [0.0, 1.0]), f"{who}: to_unit leaves the unit interval")
    if isinstance(knob, CategoricalKnob):
        one, other = knob.choices[:2]
        for choices in ((), (one,), (one, one), (one, "no such choice"), one, None, 3):
            with requires_input_error(f"{who}: choices {choices!r}", knob.name):
                type(knob)(choices=choices)  # type: ignore[arg-type]
        require(
            type(knob)(choices=(other, one)).choices == (other, one),
            f"{who}: does not keep the choices that it is given",
        )
        return
    for low, high in ((2.0, 1.0), (1.0, 1.0), (math.nan, 1.0), (0.1, math.inf), (True, 2.0), ("0", 1.0), (-1.0, 1.0)):
        with requires_input_error(f"{who}: bounds [{low!r}, {high!r}]", knob.name):
            type(knob)(low=low, high=high)  # type: ignore[arg-type]
    if knob.is_whole:
        with requires_input_error(f"{who}: bounds that are not whole", knob.name):
            type(knob)(low=knob.low + 0.5, high=knob.high + 0.5)


def _check_moves(knob: Knob, who: str) -> None:
    settings = knob.from_unit(np.linspace(0, 1, 5))
    kept = knob.move(settings, np.ones(5))
    require(np.array_equal(kept, settings), f"{who}: a move by the factor 1 turned {settings} into {kept}")
    for factor, is_right in ((1.001, np.greater), (30.0, np.greater), (0.999, np.less), (0.03, np.less)):
        moved = knob.move(settings, np.full(5, factor))
        # Where a scale ends at 0 by itself, nothing lies below.
        good = is_right(moved, settings) | ((moved == 0) & (settings == 0))
        require(bool(good.all()), f"{who}: a move by the factor {factor} turned {settings} into {moved}")
        require(
            not knob.is_whole or np.array_equal(moved, np.rint(moved)), f"{who}: moves to {moved}, not whole numbers"
        )
        one = [knob.move_one(float(setting), factor) for setting in settings]
        require(one == moved.tolist(), f"{who}: move_one gives {one}, move {moved}")


def _check_write(knob: Knob, state: RunState, who: str) -> None:
    for value in knob.from_unit(np.array([0.0, 0.3, 0.8, 1.0])).tolist():
        knob.write(state, np.array([value]))
        back = float(knob.read(state)[0])
        is_back = back == value if knob.is_whole else math.isclose(back, value, rel_tol=1e-6)
        require(is_back, f"{who}: wrote {value}, read back {back}")
        require(knob.get(state) == back, f"{who}: get gives {knob.get(state)}, read {back}")
        found = knob.find_conflict(state)
        require(found is None, f"{who}: took what it wrote itself for somebody else's: {found}")


def _check_refusals(knob: Knob, state: RunState, who: str) -> None:
    knob.write(state, knob.from_unit(np.array([0.5])))
    before = _values(knob, state)
    refused = dict(_REFUSED)
    if knob.is_whole:
        refused["half a number"] = np.array([knob.low + 0.5])
    if knob.below < math.inf:
        refused["a number beyond what makes sense"] = np.array([knob.below])
    for name, value in refused.items():
        with requires_input_error(f"{who}: {name}", knob.name):
            knob.write(state, value)
        require(_values(knob, state) == before, f"{who}: {name} was refused, but something was written")


def _check_conflict(
    knob: Knob, state: RunState, key: str | None, disturb: Callable[[RunState], object] | None, who: str
) -> None:
    knob.bind(state)
    knob.write(state, knob.from_unit(np.array([0.5])))
    if disturb is not None:
        disturb(state)
        require(knob.find_conflict(state) is not None, f"{who}: did not notice what somebody else wrote")
    if key is None:
        return
    for index, group in enumerate(state.optimizer.param_groups):
        kept = group[key]
        group[key] = kept * 1.5
        found = knob.find_conflict(state)
        require(found is not None, f"{who}: did not notice that somebody else wrote param group {index}")
        require(str(key) in str(found), f"{who}: the conflict does not name {key!r}: {found}")
        group[key] = kept


def _check_state(knob: Knob, make: Callable[[], RunState], who: str) -> None:
    first, state = copy.deepcopy(knob), make()
    first.bind(state)
    first.write(state, first.from_unit(np.array([0.4])))
    kept = json_round_trip(first.state_dict(), f"{who}: its state")
    second, other = copy.deepcopy(knob), make()
    second.bind(other)
    second.load_state_dict(kept)
    require(second.state_dict() == first.state_dict(), f"{who}: a loaded state is not the one that was saved")
    for unit in (0.4, 0.7):
        for one, run in ((first, state), (second, other)):
            one.write(run, one.from_unit(np.array([unit])))
        require(
            _values(first, state) == _values(second, other),
            f"{who}: after load_state_dict it writes {_values(second, other)}",
        )
        require(
            second.find_conflict(other) is None, f"{who}: after load_state_dict it takes its own writing for another's"
        )


def _check_groups(knob: Knob, make: Callable[[], RunState], key: str, who: str) -> None:
    own, state = copy.deepcopy(knob), make()
    groups = state.optimizer.param_groups
    require(len(groups) >= 2, f"{who}: make_run() gives {len(groups)} param groups; the battery needs two")
    start = [float(group[key]) for group in groups]
    zero = torch.nn.Parameter(torch.zeros(1))
    state.optimizer.add_param_group({"params": [zero], key: 0.0})
    groups[1][key] = held = torch.tensor(start[1], dtype=torch.float64)
    found = float(own.bind(state)[0])
    for factor in (0.5, 3.0, 1.0):
        own.write(state, np.array([found * factor]))
        now = [float(group[key]) for group in groups[:2]]
        good = all(math.isclose(a, b * factor, rel_tol=1e-12) for a, b in zip(now, start[:2], strict=True))
        require(good, f"{who}: x{factor} turned {start} into {now}; expected every ratio kept")
        require(groups[1][key] is held, f"{who}: replaced a tensor value instead of filling it in place")
        require(float(groups[-1][key]) == 0, f"{who}: a group with 0 became {groups[-1][key]}")


def _values(knob: Knob, state: RunState) -> list[Any]:
    """The knob's value, the optimizer's class, and every setting of every param group, as plain values."""
    groups = [
        {
            name: float(value) if isinstance(value, torch.Tensor) else value
            for name, value in group.items()
            if name != "params"
        }
        for group in state.optimizer.param_groups
    ]
    return [knob.get(state), type(state.optimizer).__name__, groups]
