"""ControlSpec: all that an agent is trained on and used with, in one object: knobs, signals, reward, timing, actions.

Called by the controller (use) and by environments (learning), so that what was learned is what is run. Its
fingerprint says whether two runs, an experience file or a brain speak of the same thing.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt

from trimtab import registry
from trimtab.agents.base import Actions, Agent, Base, Needs, Timing
from trimtab.agents.scripted import SCHEDULES, Schedule, make_schedule
from trimtab.errors import InputError, unknown_name
from trimtab.knobs.base import Knob
from trimtab.run_state import Array, RunState
from trimtab.signals import Signal, observe

__all__ = ["ControlSpec", "make_agent"]


def make_agent(name: str, options: Mapping[str, Any] | None = None, *, seed: int = 0, n_knobs: int = 1) -> Agent:
    """Make a registered agent.

    Args:
        name: Its name in the registry.
        options: Its options, as in a study file.
        seed: Seed of its exploration, for agents that explore.
        n_knobs: Knobs it moves, for agents that need to know.

    Raises:
        UnknownNameError: No such agent, or no such option.
        InputError: An option is wrong.
    """
    maker = registry.load("agent", name)
    known = dict(inspect.signature(maker).parameters)
    given = dict(options or {})
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values())
    if takes_any and name.removeprefix("default-") in SCHEDULES:
        # A schedule's options are its agent's.
        known, takes_any = dict(inspect.signature(SCHEDULES[name.removeprefix("default-")]).parameters), False
    else:
        own = {"seed": seed, "n_knobs": n_knobs}
        for key in own:
            if key in given:
                raise InputError(f"option {key!r} of agent {name!r} is set by the run, leave it out")
        given |= {key: value for key, value in own.items() if key in known}
    for key in given:
        if key not in known and not takes_any:
            raise unknown_name(f"option of agent {name!r}", key, set(known) - {"seed", "n_knobs"})
    try:
        agent: Agent = maker(**given)
    except TypeError as error:
        raise InputError(f"agent {name!r}: {error}; options given: {options}") from error
    return agent


@dataclass(frozen=True)
class ControlSpec:
    """What connects an agent to a run.

    Attributes:
        knobs: Names of the knobs that are moved, in order; K of them.
        knob_options: Options of each knob (bounds, hold_decay), by its name.
        signals: Names of the signals observed, in order; S of them.
        reward: Name of the reward.
        penalty: What is added, for an interval that was rolled back or ended the run, to the lowest reward of the
            run so far (at most 0): below it in any reward's unit, so that a bad interval never pays.
        actions: How an action becomes a setting.
        timing: When decisions are taken.
        base: The schedule under the first knob, "lr".
        turns: Move one knob a decision, in the order of `knobs`, instead of all at once: an action is one number then,
            and the signal "turn" says whose it is.
        masks: Leave a knob out on a run where it cannot act (dropout, on a model without), instead of refusing the
            run; the rate is never left out.

    Raises:
        UnknownNameError: A name that no registry knows.
        InputError: Knobs are missing or given twice, or a base schedule is given without "lr".
    """

    knobs: tuple[str, ...] = ("lr",)
    knob_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    signals: tuple[str, ...] = ()
    reward: str = "log_improvement"
    penalty: float = -1.0
    actions: Actions = field(default_factory=lambda: Actions("multiply", (1.0,)))
    timing: Timing = field(default_factory=Timing)
    base: Base = field(default_factory=Base)
    turns: bool = False
    masks: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.knobs, str) or not self.knobs or len(set(self.knobs)) != len(self.knobs):
            raise InputError(
                f"knobs {self.knobs!r}; expected a sequence of one or more different names, such as ('lr',)"
            )
        for kind, given in (("knob", self.knobs), ("signal", self.signals), ("reward", (self.reward,))):
            table = registry.entries(kind)
            for name in given:
                if name not in table:
                    raise unknown_name(kind, name, table)
        for name in self.knob_options:
            if name not in self.knobs:
                raise unknown_name("knob with options", name, self.knobs)
        self._check_together()
        self._check_signals()
        make_schedule(self.base)

    def _check_together(self) -> None:
        """Knobs, and a base, of which two would write the same value."""
        if self.base.name != "constant" and "lr" not in self.knobs:
            raise InputError(
                f"base schedule {self.base.name!r} acts on 'lr', which is not among the knobs {self.knobs}"
            )
        if "lr" in self.knobs and "weight_decay" in self.knobs and self.knob_options.get("lr", {}).get("hold_decay"):
            raise InputError("hold_decay=True and the knob 'weight_decay' would both write the decay; choose one")
        if "optimizer" in self.knobs and self.knob_options.get("lr", {}).get("hold_decay"):
            raise InputError("hold_decay=True and the knob 'optimizer' would both write the decay; choose one")

    def _check_signals(self) -> None:
        """Turns, and signals that speak of what is not there."""
        for name, value in (("turns", self.turns), ("masks", self.masks)):
            if not isinstance(value, bool):
                raise InputError(f"{name} is {value!r}; expected True or False")
        if "turn" in self.signals and not self.turns:
            raise InputError("the signal 'turn' says which knob's turn it is; give turns=True, or leave it out")
        if self.turns and len(self.knobs) > 1 and self.signals and "turn" not in self.signals:
            raise InputError(
                "turns=True, but the signal 'turn' is not observed, so that the agent cannot know which knob it moves; "
                "add it to the signals"
            )
        for needed, signals in _SIGNAL_OF_KNOB.items():
            if needed not in self.knobs and signals & set(self.signals):
                raise InputError(
                    f"signals {sorted(signals & set(self.signals))} speak of the knob {needed!r}, which is "
                    f"not among the knobs {self.knobs}"
                )

    @classmethod
    def for_agent(cls, agent: Agent, **changes: Any) -> ControlSpec:
        """The spec that an agent asks for, with changes by field name.

        Raises:
            UnknownNameError: A change of a field that there is not.
        """
        needs: Needs = agent.needs
        known = {item.name for item in fields(cls)}
        for key in changes:
            if key not in known:
                raise unknown_name("field of a ControlSpec", key, known)
        given = {
            "signals": needs.signals,
            "actions": needs.actions,
            "timing": needs.timing,
            "base": needs.base,
        }
        return cls(**{**given, **changes})

    @property
    def observation_space(self) -> gymnasium.spaces.Box:
        """Bounds of one run's signals; shape (S,)."""
        signals = self._signals()
        low = np.array([signal.low for signal in signals], dtype=np.float64)
        high = np.array([signal.high for signal in signals], dtype=np.float64)
        return gymnasium.spaces.Box(low, high, shape=(len(signals),), dtype=np.float64)

    @property
    def n_moved(self) -> int:
        """Knobs that one decision moves: the columns of an action."""
        return 1 if self.turns else len(self.knobs)

    @property
    def action_space(self) -> gymnasium.Space[Any]:
        """Space of one run's action: Discrete or MultiDiscrete for factors, Box for moves and settings.

        One number for each of the K knobs, factored: each is moved by its own; one number in all where they move in
        turn.
        """
        count = self.n_moved
        if self.actions.kind == "multiply":
            n_factors = len(self.actions.factors)
            return (
                gymnasium.spaces.Discrete(n_factors)
                if count == 1
                else gymnasium.spaces.MultiDiscrete([n_factors] * count)
            )
        if self.actions.kind == "decades":
            return gymnasium.spaces.Box(self.actions.low, self.actions.high, (count,), np.float64)
        return gymnasium.spaces.Box(0.0, np.inf, (count,), np.float64)

    def make_knobs(self) -> list[Knob]:
        """New knobs, in order, not yet bound to a run.

        Raises:
            InputError: A knob's option is unknown or wrong.
        """
        made = []
        for name in self.knobs:
            maker, options = registry.load("knob", name), dict(self.knob_options.get(name, {}))
            known = inspect.signature(maker).parameters
            for key in options:
                if key not in known:
                    raise unknown_name(f"option of the knob {name!r}", key, known)
            made.append(maker(**options))
        return made

    def make_schedule(self) -> Schedule:
        """The base schedule."""
        return make_schedule(self.base)

    def _signals(self) -> list[Signal]:
        return [registry.load("signal", name) for name in self.signals]

    def make_observer(self) -> Callable[[RunState], Array]:
        """The function from RunState to observation (R, S), with the signals looked up once."""
        return functools.partial(observe, self._signals())

    def observe(self, state: RunState) -> Array:
        """All signals of a run, clipped to their bounds; (R, S)."""
        return self.make_observer()(state)

    def make_reward(self) -> Callable[[RunState], Array]:
        """The function from RunState to the reward of the interval that just ended, (R,), looked up once."""
        reward: Callable[[RunState], Array] = registry.load("reward", self.reward)
        return reward

    def decode(self, action: npt.NDArray[Any], settings: Array, turn: int | None = None) -> Array:
        """The settings that an action asks for, one column a knob; (R, n_moved), (R, K) -> (R, K).

        Args:
            action: See above.
            settings: The settings now.
            turn: Column of the knob that is moved, where they move in turn.

        Raises:
            InputError: The action has another shape, or is not finite.
        """
        moves = np.asarray(action)
        shape = (len(settings), self.n_moved)
        if moves.shape != shape or moves.dtype.kind not in "fiu" or not np.isfinite(moves).all():
            raise InputError(f"action {action!r}; expected finite numbers of shape {shape}, one column a knob")
        if not self.turns and not any(self._movers):
            return self.actions.decode_all(moves, settings)
        asked = np.array(settings, dtype=np.float64)
        for place, column in enumerate(range(len(self.knobs)) if turn is None else [turn]):
            mover, present = self._movers[column], settings[:, column]
            if mover is None or self.actions.kind == "set":
                asked[:, column] = self.actions.decode_all(moves[:, place], present)
            else:
                asked[:, column] = mover.move(present, self.actions.decode_all(moves[:, place], np.ones(len(present))))
        return asked

    def decode_one(self, action: npt.NDArray[Any], settings: list[float], turn: int | None = None) -> list[float]:
        """The same for a single run; (1, n_moved).

        Raises:
            InputError: The action has another shape, or is not finite.
        """
        rows = action.tolist() if isinstance(action, np.ndarray) else action
        moves = rows[0] if isinstance(rows, list) and len(rows) == 1 and isinstance(rows[0], list) else []
        if len(moves) != self.n_moved or not all(map(math.isfinite, moves)):
            raise InputError(
                f"action {action!r}; expected finite numbers of shape (1, {self.n_moved}), one column a knob"
            )
        if turn is not None:
            asked = list(settings)
            asked[turn] = self.decode_number(turn, moves[0], settings[turn])
            return asked
        return [self.decode_number(column, move, settings[column]) for column, move in enumerate(moves)]

    def decode_number(self, column: int, move: float, setting: float) -> float:
        """The setting that one number of an action asks for, of the knob in this column.

        Raises:
            InputError: An index outside of the factors.
        """
        mover = self._movers[column]
        if mover is None or self.actions.kind == "set":
            return self.actions.decode(move, setting)
        return mover.move_one(setting, self.actions.decode(move, 1.0))

    @functools.cached_property
    def _movers(self) -> list[Knob | None]:
        """What a factor means for each knob; None where it is a factor and nothing else."""
        return [None if knob.is_plain else knob for knob in self.make_knobs()]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; the inverse of `from_json`.

        What was added later is left out at its default, so that specs made before keep their fingerprints.
        """
        data: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return {key: value for key, value in data.items() if key not in _ADDED or value}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ControlSpec:
        """Make a spec from what `to_json` gave.

        Raises:
            InputError: A key is unknown or missing, or a value has the wrong type.
        """
        known = {item.name for item in fields(cls)}
        for key in data:
            if key not in known:
                raise unknown_name("key of a spec", key, known)
        try:
            return cls(
                knobs=tuple(data["knobs"]),
                knob_options=dict(data["knob_options"]),
                signals=tuple(data["signals"]),
                reward=data["reward"],
                penalty=float(data["penalty"]),
                actions=Actions(**{**data["actions"], "factors": tuple(data["actions"]["factors"])}),
                timing=Timing(**data["timing"]),
                base=Base(**data["base"]),
                **{key: data[key] for key in _ADDED if key in data},
            )
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"a spec could not be read: {type(error).__name__}: {error}") from error

    @property
    def fingerprint(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the spec as canonical JSON."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]


_ADDED = ("turns", "masks")
_SIGNAL_OF_KNOB = {
    "lr": {"lr_log_ratio_start", "lr_unit"},
    **{
        name: {f"{name}_unit"}
        for name in (
            "accumulation", "batch_size", "beta2", "dropout", "grad_clip", "layers", "momentum", "optimizer", "units",
            "weight_decay",
        )
    },
}  # fmt: skip
