"""Hand: what a controller moves its knobs with. It writes, reads back, records, and notices another writer.

Called by the controller. A knob's setting is what agent and guard decide on; what is written is the setting times
the factor of the base schedule at this step, for the learning rate, and the setting itself for every other knob.
A knob whose move asks for another's (the optimizer, for the rate) is moved first, and the other one follows.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from trimtab.clock import Clock
from trimtab.errors import ConflictError, InputError, warn
from trimtab.knobs.base import CategoricalKnob, Knob
from trimtab.knobs.optimizer import LearningRate
from trimtab.knobs.structure import StructuralKnob, cost_change
from trimtab.records import Decision
from trimtab.run_state import RunState
from trimtab.safety import Gate
from trimtab.spec import ControlSpec
from trimtab.writers import find_writers

__all__ = ["Hand"]

_log = logging.getLogger("trimtab")

# Factors of the base schedule that are worked out at once: one alone costs 3 us in the middle of a training step, one
# of many 0.2 (docs/decisions.md).
AHEAD = 50


class Hand:
    """The knobs of one run, and the settings they are at.

    Args:
        spec: Names the knobs and the base schedule.
        state: The run; its settings are kept up to date.
        clock: Says where in the base schedule a step stands.
        gate: When and how far an agent may move.
        start: Setting of the rate to begin with, by the optimizer's class name; None keeps the one found.

    Attributes:
        decisions: Everything that was done to a knob.
        settings: Setting of every knob, before the base schedule; NaN of one that is masked.
        masked: Knobs that cannot act on this run, and why.

    Raises:
        InputError: A knob cannot act on this run.
    """

    def __init__(self, spec: ControlSpec, state: RunState, clock: Clock, gate: Gate, start: float | None) -> None:
        self._spec = spec
        self._state = state
        self._clock = clock
        self._gate = gate
        self._schedule = spec.make_schedule()
        self._varies = spec.base.name != "constant"
        self._factors: list[float] = []  # of the steps from `_first` on
        self._first = 0
        self._line = clock.line  # for which the factors hold
        self._factor_at(0)  # a schedule that needs a horizon says so now
        self._knobs = spec.make_knobs()
        self._rate = next((column for column, knob in enumerate(self._knobs) if knob.name == "lr"), None)
        found = None if self._rate is None else self._knobs[self._rate]
        self._rate_knob = found if isinstance(found, LearningRate) else None
        self._check_followers()
        self.decisions: list[Decision] = []
        self.masked: dict[str, str] = {}
        self.settings = [math.nan] * len(self._knobs)
        # Those that move others come first: what they move is then where the agent's own move starts from.
        self._order = sorted(range(len(self._knobs)), key=lambda column: not self._knobs[column].moves_rate)
        self._order = [column for column in self._order if self._bind(column)]
        if not self._order:
            raise InputError(f"no knob can act on this run: {'; '.join(self.masked.values())}")
        if start is not None and self._rate is not None:
            self.settings[self._rate] = start
        self._last_change: int | None = None
        for column, knob in enumerate(self._knobs):
            self._note(column)
            state.to_unit[knob.name], state.to_unit_one[knob.name] = knob.to_unit, knob.to_unit_one
            state.initial_settings[knob.name] = state.settings[knob.name]
        self.note_turn(0)

    def _check_followers(self) -> None:
        for knob in self._knobs:
            if knob.moves_rate and self._rate is None:
                raise InputError(
                    f"a move of the knob {knob.name!r} moves the rate too, so 'lr' must be among the knobs, which are "
                    f"{', '.join(self._spec.knobs)}"
                )

    def _bind(self, column: int) -> bool:
        """Whether a knob can act here; if not it is masked, or the run is refused."""
        knob = self._knobs[column]
        try:
            self.settings[column] = float(knob.bind(self._state)[0])
        except InputError as error:
            if not self._spec.masks or column == self._rate:
                raise
            self.masked[knob.name] = str(error)
            _log.info("knob %r is masked: %s", knob.name, error)
            return False
        return True

    def note_turn(self, index: int) -> None:
        """Say in the state whose turn it is at a coming decision."""
        turn = self._turn(index)
        if turn is not None:
            self._state.turn = turn / max(1, len(self._knobs) - 1)

    def _turn(self, index: int) -> int | None:
        """Column of the knob that a decision moves; None where all are moved at once."""
        if not self._spec.turns:
            return None
        active = sorted(self._order)
        return active[index % len(active)]

    def take_touched(self) -> tuple[bool, bool]:
        """Whether a knob has changed the optimizer's state since this was asked last, and whether the model's shape."""
        touched = [knob for knob in self._knobs if knob.has_touched_state]
        for knob in touched:
            knob.has_touched_state = False
        return not all(knob.changes_shape for knob in touched), any(knob.changes_shape for knob in touched)

    @property
    def can_reshape(self) -> bool:
        """Whether a knob can put other parameters into the model."""
        return self._state.structure is not None

    @property
    def plan(self) -> list[dict[str, Any]]:
        """Every change of the model's shape so far, for `trimtab.surgery.replay`."""
        structure = self._state.structure
        return [] if structure is None else list(structure.surgeon.plan)

    def reshape(self, plan: list[dict[str, Any]], index: int = 0, step: int = 0, why: str = "") -> None:
        """Give the model the shape that a plan leads to; its weights are of no use then. `why` records what moves."""
        if plan == self.plan:
            return
        surgeon = self._state.structure.surgeon
        before = surgeon.cost if why else None
        surgeon.follow(plan)
        cost = None if before is None else cost_change(before, surgeon.cost)
        for column in self._order:
            knob, present = self._knobs[column], self.settings[column]
            if not isinstance(knob, StructuralKnob):
                continue
            value = knob.adopt(self._state)
            if value != present:
                self.settings[column] = value
                self._note(column)
                self._state.note_move(knob.name, present, value)
                if why:
                    row = (present, value, value, value, knob.get(self._state))
                    self.decisions.append(Decision(index, step, knob.name, "follow", None, *row, why, cost))
                    cost = None  # of all of it together: in the first row

    def take_in_forced(self, index: int, step: int) -> None:
        """Record where a knob's place fell back to another value by itself, and move what follows it."""
        for column in self._order:
            knob, before = self._knobs[column], self.settings[column]
            forced = knob.find_forced(self._state)
            if forced is not None:
                value, why = forced
                factors = knob.consequences(self._state, before, value)
                self._set(column, value, index, step, "memory", None, value, why)
                self._follow(knob, factors, index, step)

    @property
    def has_rate(self) -> bool:
        """Whether the learning rate is among the knobs."""
        return self._rate is not None

    def read(self) -> dict[str, float]:
        """Present value of each knob, read from where it acts; may wait for a device."""
        return {self._knobs[column].name: self._knobs[column].get(self._state) for column in sorted(self._order)}

    def act(self, action: npt.NDArray[Any], index: int, step: int, *, is_placebo: bool, remark: str = "") -> None:
        """Write what the gate and the bounds grant of an action; a placebo's action is recorded, not written.

        Args:
            action: One number per knob; (R, K).
            index: Number of the decision.
            step: Optimizer steps taken.
            is_placebo: See above.
            remark: What the agent says of it.
        """
        turn = self._turn(index)
        asked, found = self.check(action, index), list(self.settings)
        has_changed = False
        for column in self._order if turn is None else [turn]:
            knob, present = self._knobs[column], self.settings[column]
            number = float(action[0, 0 if turn is not None else column])
            if present != found[column]:  # another knob has moved it just now: the agent's move goes on from there
                asked[column] = self._spec.decode_number(column, number, present)
            granted, note = self._grant(knob, asked[column], present, index)
            if is_placebo:
                granted, note = present, "placebo: decided, not written"
            factors = knob.consequences(self._state, present, granted) if granted != present else {}
            parts = [note, _words(knob, present, granted), _words_of_rest(factors, self._spec.knobs), remark]
            has_changed |= granted != present
            self._set(
                column, granted, index, step, "agent", number, asked[column], "; ".join(part for part in parts if part)
            )
            self._follow(knob, factors, index, step)
        if turn is not None and turn != self._rate:
            self.follow_base(step)  # the rate moves on with its schedule, whosever turn it is
        if has_changed:
            self._last_change = index

    def check(self, action: npt.NDArray[Any], index: int) -> list[float]:
        """The settings that an action asks for; nothing is moved.

        Raises:
            InputError: It does not fit.
        """
        return self._spec.decode_one(action, self.settings, self._turn(index))

    def _grant(self, knob: Knob, asked: float, present: float, index: int) -> tuple[float, str]:
        """What gate and bounds leave of what was asked, and why it is less, if it is."""
        granted, note = self._gate.limit(
            asked, present, index, self._last_change, None if knob.is_plain else knob.move_one
        )
        if granted != present and not knob.low <= granted <= knob.high:
            granted, note = min(max(granted, knob.low), knob.high), f"bounds [{knob.low:g}, {knob.high:g}]"
        if knob.changes_shape and (granted - present) * (asked - present) < 0:
            granted = present  # found outside of the bounds: who asks for less of too little gets no more
        if granted != present and knob.changes_shape:
            granted, why = knob.reach(self._state, present, float(round(granted)))
            note = why or note
        return (float(round(granted)) if knob.is_whole else granted), note

    def _follow(self, knob: Knob, factors: Mapping[str, float], index: int, step: int) -> None:
        """Move what a knob's move has consequences for; each is a decision of its own where it is a knob."""
        for name, factor in factors.items():
            if name not in self._spec.knobs or name in self.masked:
                knob.take_along(self._state, name, factor)
                continue
            column = self._spec.knobs.index(name)
            setting = self.settings[column] * factor  # bounds are for what an agent chooses
            self._set(column, setting, index, step, "follow", None, setting, f"follows {knob.name!r}: x {factor:.4g}")

    def cut_rate(self, cut: float, reason: str, index: int, step: int) -> str:
        """Divide the rate after a roll-back; returns the note that was recorded."""
        column = self._rate
        if column is None:
            column = min(self._order)
            granted, done = self.settings[column], "there is no rate among the knobs to cut"
        else:
            granted, done = self.settings[column] / cut, f"rate / {cut:g}"
        note = f"{reason}: rolled back to the start of the interval, {done}"
        if self._state.model is None:
            note += "; buffers were not rolled back, give model=... for that"
        self._set(column, granted, index, step, "guard", None, granted, note)
        return note

    def give_up(self, note: str, index: int, step: int) -> None:
        """A rate of 0 keeps the weights whatever the loop goes on doing; without a rate it is only recorded."""
        column = min(self._order) if self._rate is None else self._rate
        granted = 0.0 if self.has_rate else self.settings[column]
        self._set(column, granted, index, step, "gave_up", None, granted, note)

    def _set(
        self,
        column: int,
        setting: float,
        index: int,
        step: int,
        source: str,
        action: float | None,
        asked: float,
        note: str,
    ) -> None:
        """Make a setting act, read it back from there, and record all of it."""
        knob, state = self._knobs[column], self._state
        before = knob.get(state)
        present = self.settings[column]
        if setting != present:
            self.settings[column] = setting
            self._note(column)
        state.note_move(knob.name, present, setting)
        written = setting * self._factor(column, step)
        knob.put(state, written)
        read_back = knob.get(state)
        cost = knob.cost if knob.changes_shape else None
        self.decisions.append(
            Decision(index, step, knob.name, source, action, before, asked, setting, written, read_back, note, cost)
        )

    def follow_base(self, step: int) -> bool:
        """Write the base schedule's rate for the coming step: the path taken at every optimizer step.

        Returns:
            False, and nothing is written, where the last rate does not stand any more.
        """
        rate = self._rate_knob
        if rate is None:
            return True
        setting = self.settings[self._rate or 0]
        if self._varies:
            setting *= self._factor_at(step)
        return rate.follow(self._state, setting)

    def _factor_at(self, step: int) -> float:
        """The base schedule's factor, worked out together with those of the steps after it."""
        place = step - self._first
        if not 0 <= place < len(self._factors) or self._line != self._clock.line:
            schedule, total_steps, at = self._schedule, self._state.total_steps, self._clock.at
            self._factors = [schedule(at(later), total_steps) for later in range(step, step + AHEAD)]
            self._first, self._line, place = step, self._clock.line, 0
        return self._factors[place]

    def write_all(self, step: int) -> None:
        """Write every knob anew: at the start, and after a state was loaded."""
        for column in self._order:
            self._knobs[column].put(self._state, self.settings[column] * self._factor(column, step))
        self.take_touched()  # whoever asks for this takes or loads a snapshot that fits

    def _factor(self, column: int, step: int) -> float:
        return self._factor_at(step) if column == self._rate else 1.0

    def _note(self, column: int) -> None:
        self._state.settings[self._knobs[column].name] = self.settings[column]

    def find_conflict(self, owner: object) -> tuple[str, str] | None:
        """The knob that somebody else wrote, and what was found; None where all still hold what was written."""
        for knob in map(self._knobs.__getitem__, self._order):
            found = knob.find_conflict(self._state)
            if found is not None:
                writers = find_writers(self._state.optimizer, but=owner) if knob.name == "lr" else []
                by = f", probably by {' and '.join(writers)}" if writers else ""
                return knob.name, f"{found}: somebody else writes it{by}"
        return None

    def yield_to(self, knob: str, found: str, index: int, step: int, on_conflict: str) -> None:
        """Refuse to go on beside another writer, or hand the value back and record that.

        Raises:
            ConflictError: `on_conflict` is "error".
        """
        if on_conflict == "error":
            raise ConflictError(
                f"{found}; a decision counts only if nobody overwrites it. Remove the other writer, or give "
                "on_conflict='warn' to hand the value back and end control"
            )
        warn(f"{found}; control of {knob!r} has ended")
        value = self.read()[knob]
        self.decisions.append(Decision(index, step, knob, "conflict", None, value, value, value, value, value, found))

    def state_dict(self) -> dict[str, Any]:
        """Settings, what each knob remembers, and the decisions, as plain numbers and lists."""
        return {
            "settings": list(self.settings),
            "last_change": self._last_change,
            "knobs": {knob.name: knob.state_dict() for knob in self._knobs},
            "decisions": [decision.to_json() for decision in self.decisions],
        }

    def load_shape(self, state: Mapping[str, Any], earlier: list[dict[str, Any]] | None) -> None:
        """Give the model the shape of a state of this hand, which all else is put back into; no knob takes it in.

        Args:
            state: See above.
            earlier: A plan that it may have to go back to; None for none.

        Raises:
            InputError: It cannot have the shape, or not go back.
        """
        for knob in self._knobs:
            plan = state["knobs"][knob.name].get("plan") if knob.changes_shape else None
            if plan is not None and self._state.structure is not None:
                self._state.structure.surgeon.follow(plan)
        if earlier is not None and self._state.structure is not None:
            self._state.structure.surgeon.check_way(earlier)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`; `write_all` makes it act."""
        self.settings = list(state["settings"])
        self._last_change = state["last_change"]
        for column, knob in enumerate(self._knobs):
            knob.load_state_dict(state["knobs"][knob.name])
            if column in self._order:
                knob.reshape(self._state)
        self.decisions = [Decision.from_json(row) for row in state["decisions"]]


def _words(knob: Knob, before: float, now: float) -> str:
    """A move of a categorical knob by the names of its choices."""
    if not isinstance(knob, CategoricalKnob) or before == now:
        return ""
    return f"{knob.choices[int(before)]} -> {knob.choices[int(now)]}"


def _words_of_rest(factors: Mapping[str, float], knobs: tuple[str, ...]) -> str:
    """What a knob's move takes along that is no knob, and so has no decision of its own."""
    return "; ".join(f"{name} x {factor:.4g}" for name, factor in factors.items() if name not in knobs)
