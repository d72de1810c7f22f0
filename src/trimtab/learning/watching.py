"""What was observed while an agent was taught: the lowest and highest value of every signal.

Called by the teaching. An agent that knows these ranges can tell when it is asked about something else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from trimtab.agents.base import Array
from trimtab.envs.batched import TrainingVectorEnv
from trimtab.errors import InputError

__all__ = ["MARGIN", "Ranges", "WatchedEnv", "joined_ranges"]

Ranges = dict[str, list[float]]


class WatchedEnv(TrainingVectorEnv):
    """The environment, which also keeps the lowest and highest value of every signal that it has shown."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        count = len(self.control_spec.signals)
        self._low, self._high = np.full(count, np.inf), np.full(count, -np.inf)

    def _watch(self, observation: Array) -> None:
        self._low = np.minimum(self._low, observation.min(axis=0))
        self._high = np.maximum(self._high, observation.max(axis=0))

    @override
    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        observation, infos = super().reset(seed=seed, options=options)
        self._watch(observation)
        return observation, infos

    @override
    def step(
        self, actions: npt.NDArray[Any]
    ) -> tuple[Array, Array, npt.NDArray[np.bool_], npt.NDArray[np.bool_], dict[str, Any]]:
        found = super().step(actions)
        self._watch(found[0])
        return found

    def ranges(self) -> Ranges:
        """Signal -> [lowest, highest]; empty before the first `reset`."""
        if not np.isfinite(self._low).all():
            return {}
        pairs = zip(self._low.tolist(), self._high.tolist(), strict=True)
        return dict(zip(self.control_spec.signals, map(list, pairs), strict=True))

    def load_ranges(self, ranges: Mapping[str, Sequence[float]]) -> None:
        """Go on from what `ranges` gave.

        Raises:
            InputError: They are those of other signals.
        """
        if not ranges:
            return
        if tuple(ranges) != self.control_spec.signals:
            raise InputError(f"ranges of {', '.join(ranges)}; expected those of {', '.join(self.control_spec.signals)}")
        low, high = zip(*ranges.values(), strict=True)
        self._low, self._high = np.array(low), np.array(high)


# Of a range's width, to each side: the longest of some thousand horizons drawn from 50..2000 was 1990, and a run of
# 2000 steps is not another kind of run.
MARGIN = 0.05


def joined_ranges(parts: Sequence[Mapping[str, Sequence[float]]]) -> Ranges:
    """What some of several agents have seen: of each signal the lowest and the highest value of all, and a margin."""
    joined = {}
    for name in parts[0]:
        low, high = min(part[name][0] for part in parts), max(part[name][1] for part in parts)
        margin = MARGIN * (high - low)
        joined[name] = [low - margin, high + margin]
    return joined
