"""check_adapter: what everything owes that stands where a torch scheduler stood.

Called from tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR

from trimtab.errors import ConflictError
from trimtab.testing.contract import ContractError, Loop, is_plain, require, requires_input_error

__all__ = ["check_adapter"]

_STEPS = 24


def check_adapter(make: Callable[[Optimizer, int], Any]) -> None:
    """Check that an adapter keeps its contract: `step(loss)`, `decisions`, `get_last_lr`, `state_dict`, and its word.

    Args:
        make: From an optimizer and a number of steps to the adapter; it decides at least once in 24 steps.

    Raises:
        ContractError: Names what was broken.
    """
    _check_reaches(make)
    _check_order(make)
    _check_resume(make)
    _check_conflict(make)
    with requires_input_error("adapter: step() without a loss"):
        make(_loop().optimizer, _STEPS).step()


def _loop() -> Loop:
    return Loop(lambda groups: torch.optim.Adam(groups, lr=0.02))


def _advance(loop: Loop, adapter: Any, n_steps: int, *, zero_first: bool = False) -> list[list[float]]:
    """Rates after each step."""
    rates = []
    for _ in range(n_steps):
        loss = loop.backward()
        loop.optimizer.step()
        if zero_first:
            loop.optimizer.zero_grad()
        adapter.step(loss)
        if not zero_first:
            loop.optimizer.zero_grad()
        rates.append([float(group["lr"]) for group in loop.optimizer.param_groups])
    return rates


def _check_reaches(make: Callable[[Optimizer, int], Any]) -> None:
    loop = _loop()
    adapter = make(loop.optimizer, _STEPS)
    for step in range(_STEPS):
        n_before = len(adapter.decisions)
        rates = _advance(loop, adapter, 1)[0]
        require(
            [float(rate) for rate in adapter.get_last_lr()] == rates, "adapter: get_last_lr is not what the groups hold"
        )
        require(
            rates[1] == 0 or abs(rates[0] / rates[1] - 4) < 1e-9, f"adapter: the groups' ratio was lost at step {step}"
        )
        for decision in adapter.decisions[n_before:]:
            held = decision.read_back == rates[0] or decision.knob != "lr"
            require(held, f"adapter: a decision says {decision.read_back} was read back, the group holds {rates[0]}")
            require(
                decision.optimizer_step == step + 1,
                f"adapter: a decision taken after {step + 1} steps says {decision.optimizer_step}",
            )
    require(len(adapter.decisions) > 0, f"adapter: no decision in {_STEPS} steps")


def _check_order(make: Callable[[Optimizer, int], Any]) -> None:
    ends = []
    for zero_first in (False, True):
        loop = _loop()
        adapter = make(loop.optimizer, _STEPS)
        ends.append((_advance(loop, adapter, _STEPS, zero_first=zero_first), loop.weights()))
    equal = ends[0][0] == ends[1][0] and torch.equal(ends[0][1], ends[1][1])
    require(equal, "adapter: it matters whether zero_grad() is called before or after its step()")


def _check_resume(make: Callable[[Optimizer, int], Any]) -> None:
    loop = _loop()
    adapter = make(loop.optimizer, _STEPS)
    for cut in (1, 7, 16):
        _advance(loop, adapter, cut - loop.t)
        kept = adapter.state_dict()
        require(is_plain(kept), "adapter: its state_dict holds more than tensors and JSON scalars")
        again = _loop()
        twin = make(again.optimizer, _STEPS)
        again.load_state_dict(loop.state_dict())
        twin.load_state_dict(kept)
        reference = _loop()
        whole = make(reference.optimizer, _STEPS)
        expected = _advance(reference, whole, _STEPS)[cut:]
        found = _advance(again, twin, _STEPS - cut)
        equal = found == expected and torch.equal(again.weights(), reference.weights())
        require(equal, f"adapter: resumed after {cut} steps, the run is not the uninterrupted one")


def _check_conflict(make: Callable[[Optimizer, int], Any]) -> None:
    loop = _loop()
    other = ExponentialLR(loop.optimizer, 0.9)
    try:
        make(loop.optimizer, _STEPS)
    except ConflictError as error:
        require(type(other).__name__ in str(error), f"adapter: the conflict does not name the other writer: {error}")
    else:
        raise ContractError("adapter: a second scheduler on the same optimizer was not refused")
    loop = _loop()
    adapter = make(loop.optimizer, _STEPS)
    loop.optimizer.param_groups[0]["lr"] = 0.5
    try:
        _advance(loop, adapter, _STEPS)
    except ConflictError:
        return
    raise ContractError("adapter: somebody else wrote the rate, and it was not noticed")
