"""Budget: what a pruned network may cost, and which configurations keep to it.

Made from the user's target by `trimtab.pruner`; asked by the environment (which clips its actions by it) and by the
rules in `allocations`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from trimtab.errors import InputError, unknown_name
from trimtab.pruning.parts import Configuration, Part

__all__ = ["KINDS", "Budget", "Prunable", "Target", "floor"]

KINDS = ("flops", "params", "latency")


class Prunable(Protocol):
    """What a search needs of a network: `PrunableNetwork`, or one that another library cuts."""

    model: nn.Module
    inputs: tuple[Any, ...]
    parts: tuple[Part, ...]
    refused: dict[str, str]
    dense: Configuration
    scores: tuple[Tensor, ...]
    orders: tuple[Tensor, ...]
    calibration: Sequence[tuple[Tensor, ...]]

    def flops(self, configuration: Sequence[int]) -> int:
        """FLOPs of a forward pass of the example inputs."""

    def parameters(self, configuration: Sequence[int]) -> int:
        """Numbers in all parameters."""

    def cut(self, configuration: Sequence[int], orders: Sequence[Tensor] | None = None) -> nn.Module:
        """A copy of the network with these widths."""


@dataclass(frozen=True)
class Target:
    """How much of what the dense network costs may be left.

    Attributes:
        kind: "flops" (of a forward pass), "params", or "latency" (of a forward pass, measured).
        share: More than 0, less than 1.
        batch_size: Of the measurements; for "latency" alone.
    """

    kind: str
    share: float
    batch_size: int | None = None

    @classmethod
    def parse(cls, given: object) -> Target:
        """From {"flops": 0.5}, {"params": 0.25} or {"latency": 0.5, "batch_size": 64}.

        Raises:
            InputError: It is none of them.
        """
        expected = (
            "expected {'flops': SHARE}, {'params': SHARE} or {'latency': SHARE, 'batch_size': N}, SHARE being what may "
            "be left of the dense network's, more than 0 and less than 1"
        )
        if not isinstance(given, Mapping):
            raise InputError(f"target is {given!r}; {expected}")
        for key in given:
            if key not in (*KINDS, "batch_size"):
                raise unknown_name("target", key, (*KINDS, "batch_size"))
        kinds = [kind for kind in KINDS if kind in given]
        if len(kinds) != 1:
            raise InputError(f"target {dict(given)!r} names {len(kinds)} costs; {expected}")
        kind, batch_size = kinds[0], given.get("batch_size", 1 if kinds[0] == "latency" else None)
        share = given[kind]
        is_number = isinstance(share, (int, float)) and not isinstance(share, bool) and math.isfinite(share)
        if not is_number or not 0 < share < 1:
            raise InputError(f"target {kind} is {share!r}; {expected}")
        is_count = isinstance(batch_size, int) and not isinstance(batch_size, bool) and batch_size >= 1
        if (kind != "latency") != (batch_size is None) or (kind == "latency" and not is_count):
            raise InputError(f"target {dict(given)!r} has batch_size {batch_size!r}; {expected}")
        return cls(kind, float(share), batch_size)

    def to_dict(self) -> dict[str, float | int]:
        """As `parse` takes it."""
        extra = {} if self.batch_size is None else {"batch_size": self.batch_size}
        return {self.kind: self.share, **extra}


def floor(network: Prunable) -> Configuration:
    """Every part at its smallest width with which its layer is still there."""
    return tuple(next(width for width in part.widths if width > 0) for part in network.parts)


class Budget:
    """Which configurations cost little enough.

    Args:
        network: What is pruned.
        target: What may be left.
        latency: Seconds of a configuration; for a target of latency.
        dense: Cost that shares are of; None for the network's own. Another one where the network was pruned before.

    Attributes:
        limit: Of the cost: FLOPs, parameters or seconds.
        dense: See above.
        floor: Configuration of the smallest widths with all layers there; where that costs too much, without those
            that can be taken out and save something.

    Raises:
        InputError: Not even the smallest configuration keeps to it.
    """

    def __init__(
        self,
        network: Prunable,
        target: Target,
        latency: Callable[[Sequence[int]], float] | None = None,
        *,
        dense: float | None = None,
    ) -> None:
        self.network, self.target = network, target
        if target.kind == "latency":
            if latency is None:
                raise InputError("a target of latency needs latencies; give a table that was measured")
            cost = latency
        else:
            cost = network.flops if target.kind == "flops" else network.parameters
        self.cost: Callable[[Sequence[int]], float] = cost
        self.dense = cost(network.dense) if dense is None else dense
        self.limit = target.share * self.dense
        self.floor = floor(network)
        least = cost(self.floor)
        if least > self.limit:
            self.floor, least = self._without_layers(least)
        if least > self.limit:
            raise InputError(
                f"target {target.kind} {target.share:g} cannot be reached: with every part at its smallest width "
                f"{least / self.dense:.3g} of the dense network's {target.kind} are left; raise the target, or lower "
                "multiple or ignore less, so that parts can be smaller"
            )

    def _without_layers(self, least: float) -> tuple[Configuration, float]:
        found = self.floor
        for place, part in enumerate(self.network.parts):
            tried = (*found[:place], part.widths[0], *found[place + 1 :])
            if (cost := self.cost(tried)) < least:
                found, least = tried, cost
        return found, least

    def share(self, configuration: Sequence[int]) -> float:
        """Cost of a configuration in units of the dense network's."""
        return self.cost(configuration) / self.dense

    def fits(self, configuration: Sequence[int]) -> bool:
        """Whether a configuration keeps to the budget."""
        return self.cost(configuration) <= self.limit

    def open_widths(self, chosen: Sequence[int]) -> tuple[int, ...]:
        """Widths of the next part with which the budget can still be kept, the parts after it at their smallest.

        Args:
            chosen: Widths of the parts before, which the same was asked for.

        Returns:
            Some of the part's widths, ascending, one at least.
        """
        place = len(chosen)
        rest = self.floor[place + 1 :]
        widths = self.network.parts[place].widths
        return tuple(width for width in widths if self.fits((*chosen, width, *rest)))
