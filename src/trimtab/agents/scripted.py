"""Schedules and scripts: what everybody uses, as agents, so that they are compared by the same loop.

Called through the registry. A schedule is a closed form `factor(step, total_steps)` by which the initial rate is
multiplied before optimizer step number `step` (from 0). Each equals the torch scheduler named in its docstring,
whose chained form differs only in rounding (parity test: 1e-12 over 1,000 steps).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from trimtab.agents.base import Actions, Agent, Array, Base, Needs, State, Timing, keep_actions, load_generator
from trimtab.errors import InputError, unknown_name

__all__ = [
    "SCHEDULES",
    "Plateau",
    "RandomMoves",
    "Replay",
    "Schedule",
    "Scripted",
    "constant",
    "cosine",
    "default_cosine",
    "exponential",
    "make_schedule",
    "step",
    "wsd",
]

# torch's own default for Adam and AdamW; 0.1 is what image networks with SGD and momentum are published with.
DEFAULT_RATES = {"Adam": 1e-3, "AdamW": 1e-3, "SGD": 0.1}


class Schedule(Protocol):
    """A closed-form schedule."""

    def __call__(self, step: float, total_steps: int | None) -> float:
        """Factor on the initial rate before optimizer step number `step`, from 0.

        Where the cost of a step changes, `step` is what of the budget is spent, and may lie between two steps.
        """


def make_schedule(base: Base) -> Schedule:
    """Make the schedule that a spec names.

    Raises:
        UnknownNameError: No such schedule, or no such option.
        InputError: An option is out of range.
    """
    if base.name not in SCHEDULES:
        raise unknown_name("base schedule", base.name, SCHEDULES)
    maker = SCHEDULES[base.name]
    known = inspect.signature(maker).parameters
    for key in base.options:
        if key not in known:
            raise unknown_name(f"option of the schedule {base.name!r}", key, known)
    return maker(**base.options)


def _number(name: str, value: Any, low: float, high: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise InputError(f"{name} is {value!r}; expected a number in [{low:g}, {high:g}]")
    return value


def _horizon(name: str, total_steps: int | None) -> int:
    if total_steps is None:
        raise InputError(f"the schedule {name!r} needs the number of optimizer steps; give total_steps")
    return total_steps


def constant_factor() -> Schedule:
    """1 throughout."""
    return lambda step, total_steps: 1.0


def step_factor(step_size: int | None = None, gamma: float = 0.1) -> Schedule:
    """Gamma ** (step // step_size): torch's StepLR. step_size None: a third of the budget."""
    if step_size is not None:
        _number("step_size", step_size, 1)
    _number("gamma", gamma, 0.0)

    def factor(step: float, total_steps: int | None) -> float:
        size = step_size or max(1, math.ceil(_horizon("step", total_steps) / 3))
        return float(gamma ** (step // size))

    return factor


def exponential_factor(gamma: float | None = None) -> Schedule:
    """Gamma ** step: torch's ExponentialLR. gamma None: such that 1 % of the rate is left at the end."""
    if gamma is not None:
        _number("gamma", gamma, 0.0)

    def factor(step: float, total_steps: int | None) -> float:
        rate = gamma if gamma is not None else 0.01 ** (1 / _horizon("exponential", total_steps))
        return float(rate**step)

    return factor


def _warm_up(step: float, warmup_steps: int) -> float:
    """(step + 1) / (warmup_steps + 1): torch's LinearLR with start_factor 1 / (warmup_steps + 1), as in nanoGPT."""
    return (step + 1) / (warmup_steps + 1)


def cosine_factor(warmup_steps: int = 0, min_factor: float = 0.0) -> Schedule:
    """Linear warm-up, then min + (1 - min) (1 + cos(pi p)) / 2: torch's LinearLR, then CosineAnnealingLR.

    p is the share used of the steps that the warm-up leaves; at the end of the budget the rate is held.
    """
    _number("warmup_steps", warmup_steps, 0)
    _number("min_factor", min_factor, 0.0, 1.0)

    def factor(step: float, total_steps: int | None) -> float:
        if total_steps is None:
            total_steps = _horizon("cosine", total_steps)
        if step < warmup_steps:
            return _warm_up(step, warmup_steps)
        if step >= total_steps:
            return min_factor
        share = (step - warmup_steps) / (total_steps - warmup_steps)
        return min_factor + (1 - min_factor) * (1 + math.cos(math.pi * share)) / 2

    return factor


def wsd_factor(warmup_share: float = 0.05, decay_share: float = 0.2, min_factor: float = 0.0) -> Schedule:
    """Warm-up, stable, linear decay (WSD): shares of the budget; Hu et al. 2024, arXiv:2404.06395, section 4."""
    _number("warmup_share", warmup_share, 0.0, 1.0)
    _number("decay_share", decay_share, 0.0, 1.0 - warmup_share)
    _number("min_factor", min_factor, 0.0, 1.0)

    def factor(step: float, total_steps: int | None) -> float:
        total = _horizon("wsd", total_steps)
        warmup, decay = round(warmup_share * total), round(decay_share * total)
        if step < warmup:
            return _warm_up(step, warmup)
        left = total - min(step, total)
        return 1.0 if left >= decay else min_factor + (1 - min_factor) * left / decay

    return factor


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": constant_factor,
    "step": step_factor,
    "exponential": exponential_factor,
    "cosine": cosine_factor,
    "wsd": wsd_factor,
}


class Scripted(Agent):
    """A schedule as an agent: its base is the schedule, and it never asks for a change.

    Args:
        name: Name of the schedule, and of the agent.
        default_rates: Start from the rate that this names for the optimizer's class, not from the user's.
        options: Options of the schedule.
    """

    decides = False

    def __init__(self, name: str, *, default_rates: Mapping[str, float] | None = None, **options: Any) -> None:
        self.name = name if default_rates is None else "default-cosine"
        self._base = Base(name, options)
        self._default_rates = default_rates
        make_schedule(self._base)

    @property
    @override
    def needs(self) -> Needs:
        return Needs(base=self._base)

    @property
    @override
    def options(self) -> dict[str, Any]:
        return dict(self._base.options)

    @override
    def initial_setting(self, optimizer: str) -> float | None:
        if self._default_rates is None:
            return None
        if optimizer not in self._default_rates:
            raise unknown_name("optimizer without a default rate", optimizer, self._default_rates)
        return self._default_rates[optimizer]

    @override
    def predict(
        self,
        observation: Array,
        state: State | None = None,
        episode_start: npt.NDArray[np.bool_] | None = None,
        deterministic: bool = False,
    ) -> tuple[npt.NDArray[Any], State | None]:
        del episode_start, deterministic
        return keep_actions(self.needs.actions, observation, 1), state


def constant() -> Scripted:
    """The initial rate throughout."""
    return Scripted("constant")


def step(**options: Any) -> Scripted:
    """See `step_factor`."""
    return Scripted("step", **options)


def exponential(**options: Any) -> Scripted:
    """See `exponential_factor`."""
    return Scripted("exponential", **options)


def cosine(**options: Any) -> Scripted:
    """See `cosine_factor`."""
    return Scripted("cosine", **options)


def wsd(**options: Any) -> Scripted:
    """See `wsd_factor`."""
    return Scripted("wsd", **options)


def default_cosine(**options: Any) -> Scripted:
    """Cosine from `DEFAULT_RATES`, whatever the user's rate: what one gets who looks up a default and stops."""
    return Scripted("cosine", default_rates=DEFAULT_RATES, **options)


class Plateau(Agent):
    """torch's ReduceLROnPlateau, stepped at every decision with the watched loss ("min" mode, relative threshold).

    Args:
        factor: Factor on the rate; in (0, 1).
        patience: Decisions without improvement that are borne.
        threshold: Relative improvement that counts.
        cooldown: Decisions after a cut in which nothing is counted.
        min_setting: Lower bound of the setting.
        every: Steps between decisions, or "epoch".
    """

    name = "plateau"

    def __init__(
        self,
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        cooldown: int = 0,
        every: int | str = 10,
    ) -> None:
        if not 0 < factor < 1:
            raise InputError(f"factor is {factor!r}; expected a number between 0 and 1")
        self._factor = factor
        self._patience = int(_number("patience", patience, 0))
        self._threshold = _number("threshold", threshold, 0.0, 1.0)
        self._cooldown = int(_number("cooldown", cooldown, 0))
        self._every = every

    @property
    @override
    def needs(self) -> Needs:
        return Needs(
            signals=("watched_loss",),
            actions=Actions("multiply", (self._factor, 1.0)),
            timing=Timing(every=self._every),
        )

    @property
    @override
    def options(self) -> dict[str, Any]:
        return {
            "factor": self._factor,
            "patience": self._patience,
            "threshold": self._threshold,
            "cooldown": self._cooldown,
            "every": self._every,
        }

    @override
    def predict(
        self,
        observation: Array,
        state: State | None = None,
        episode_start: npt.NDArray[np.bool_] | None = None,
        deterministic: bool = False,
    ) -> tuple[npt.NDArray[Any], State | None]:
        del deterministic
        loss = observation[:, 0]
        if state is None:
            state = (
                np.full(loss.shape, np.inf),
                np.zeros(loss.shape, np.int64),
                np.zeros(loss.shape, np.int64),
            )
        best, n_bad, cooling = state
        if episode_start is not None:
            best = np.where(episode_start, np.inf, best)
            n_bad, cooling = np.where(episode_start, 0, n_bad), np.where(episode_start, 0, cooling)
        is_better = loss < best * (1.0 - self._threshold)
        best = np.where(is_better, loss, best)
        n_bad = np.where(is_better, 0, n_bad + 1)
        is_cooling = cooling > 0
        cooling = np.where(is_cooling, cooling - 1, cooling)
        n_bad = np.where(is_cooling, 0, n_bad)
        cut = n_bad > self._patience
        cooling = np.where(cut, self._cooldown, cooling)
        n_bad = np.where(cut, 0, n_bad)
        return np.where(cut, 0, 1)[:, None], (best, n_bad, cooling)


class Replay(Agent):
    """Write a recorded sequence of settings, one at each decision, without looking; the last one holds.

    Args:
        settings: For each decision its settings, one per knob; (T, K).
        timing: When the recorded agent decided, also as a dict of fields; `every=10` where it is not given.
        base: The schedule under the recorded agent, also as a dict of fields.

    Raises:
        InputError: The settings are empty, ragged, or not finite and positive.
    """

    name = "replay"

    def __init__(
        self,
        settings: Sequence[Sequence[float]],
        timing: Timing | Mapping[str, Any] | None = None,
        base: Base | Mapping[str, Any] | None = None,
    ) -> None:
        try:
            table = np.asarray(settings, dtype=np.float64)
        except (TypeError, ValueError):
            table = np.empty(0)
        if table.ndim != 2 or table.size == 0 or not np.all(np.isfinite(table)) or not np.all(table >= 0):
            raise InputError(
                f"replay: settings {str(settings)[:80]!r}; expected rows of finite numbers of 0 or more, one "
                "row a decision, one number a knob"
            )
        self._settings = table
        self._timing = Timing(**timing) if isinstance(timing, Mapping) else timing or Timing()
        self._base = Base(**base) if isinstance(base, Mapping) else base or Base()

    @property
    @override
    def needs(self) -> Needs:
        return Needs(actions=Actions("set"), timing=self._timing, base=self._base)

    @property
    @override
    def options(self) -> dict[str, Any]:
        return {"settings": self._settings.tolist(), "timing": asdict(self._timing), "base": asdict(self._base)}

    @override
    def predict(
        self,
        observation: Array,
        state: State | None = None,
        episode_start: npt.NDArray[np.bool_] | None = None,
        deterministic: bool = False,
    ) -> tuple[npt.NDArray[Any], State | None]:
        del deterministic
        index = np.zeros(observation.shape[0], np.int64) if state is None else state[0]
        if episode_start is not None:
            index = np.where(episode_start, 0, index)
        return self._settings[np.minimum(index, len(self._settings) - 1)], (index + 1,)


class RandomMoves(Agent):
    """A factor drawn at random at every decision: the arm that shows what moving for its own sake does.

    Args:
        factors: What is drawn from, evenly.
        every: Steps between decisions, or "epoch".
        seed: Seed of its own generator.
        n_knobs: Knobs it moves, each by a draw of its own.
    """

    name = "random"

    def __init__(
        self,
        factors: Sequence[float] = (0.9, 1.0, 1.1),
        every: int | str = 10,
        seed: int = 0,
        n_knobs: int = 1,
    ) -> None:
        self._actions = Actions("multiply", tuple(factors))
        self._every = every
        self._n_knobs = n_knobs
        self._rng = np.random.default_rng(seed)

    @property
    @override
    def needs(self) -> Needs:
        return Needs(actions=self._actions, timing=Timing(every=self._every))

    @property
    @override
    def options(self) -> dict[str, Any]:
        return {"factors": list(self._actions.factors), "every": self._every}

    @override
    def predict(
        self,
        observation: Array,
        state: State | None = None,
        episode_start: npt.NDArray[np.bool_] | None = None,
        deterministic: bool = False,
    ) -> tuple[npt.NDArray[Any], State | None]:
        del episode_start
        if deterministic:
            return keep_actions(self._actions, observation, self._n_knobs), state
        shape = (observation.shape[0], self._n_knobs)
        return self._rng.integers(0, len(self._actions.factors), shape), state

    @override
    def reseed(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"rng": self._rng.bit_generator.state}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if set(state) != {"rng"}:
            raise InputError(f"random: the state has the keys {sorted(state)}; expected rng")
        load_generator(self._rng, state["rng"], self.name)
