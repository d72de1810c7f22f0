"""What is kept of a run: frozen records that go to JSON and come back the same.

Called by the controller (decisions) and by the experiments (run directories).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from trimtab.errors import unknown_name

__all__ = ["Decision"]


@dataclass(frozen=True)
class Decision:
    """One act on one knob of one run: what was asked, what was written, what was read back where it acts.

    Attributes:
        index: Number of the decision in its run, from 0.
        optimizer_step: Optimizer steps taken before it; the step numbered `optimizer_step` is the first it acts on.
        knob: Name of the knob.
        source: "agent", "guard" (rolled back, rate cut), "gave_up" (the guard's last act), "follow" (moved along with
            another knob, or with a roll-back, which the note names), "memory" (out of memory: the batch size was
            halved), or "conflict" (a second writer was found and the knob handed back).
        action: The action as the agent gave it; None where no agent acted.
        before: Value read where it acts, before writing.
        asked: Setting the action asks for, in the knob's unit, before the base schedule.
        setting: Setting that was granted, after gate and bounds, before the base schedule.
        written: Value written: the setting times the base schedule's factor now.
        read_back: Value read from where it acts, after writing.
        note: Why, in words, where there is more to say.
        cost: Of a move that changed the network: FLOPs of a training step and parameters, before and after (keys of
            `Knob.cost`); None of any other.
    """

    index: int
    optimizer_step: int
    knob: str
    source: str
    action: float | None
    before: float
    asked: float
    setting: float
    written: float
    read_back: float
    note: str = ""
    cost: dict[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain dict of JSON types; without `cost` where there is none."""
        data = asdict(self)
        return data if self.cost is not None else {key: value for key, value in data.items() if key != "cost"}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Decision:
        """Inverse of `to_json`.

        Raises:
            UnknownNameError: A key that no decision has.
        """
        known = {field.name for field in fields(cls)}
        for key in data:
            if key not in known:
                raise unknown_name("key of a decision", key, known)
        return cls(**data)
