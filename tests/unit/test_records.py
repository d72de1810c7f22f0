"""A decision goes to JSON and comes back the same."""

from __future__ import annotations

import json

import pytest

from trimtab.errors import UnknownNameError
from trimtab.records import Decision

DECISION = Decision(3, 40, "lr", "agent", 1.0, 0.1, 0.11, 0.11, 0.055, 0.055, "gate: burn-in")


def test_a_decision_comes_back_from_json() -> None:
    data = json.loads(json.dumps(DECISION.to_json()))
    assert Decision.from_json(data) == DECISION
    assert list(data) == [
        *("index", "optimizer_step", "knob", "source", "action", "before"),
        *("asked", "setting", "written", "read_back", "note"),
    ]
    guard = Decision(0, 1, "lr", "guard", None, 0.1, 0.02, 0.02, 0.02, 0.02)
    assert Decision.from_json(json.loads(json.dumps(guard.to_json()))) == guard


def test_a_decision_is_frozen() -> None:
    with pytest.raises(AttributeError):
        DECISION.knob = "wd"  # type: ignore[misc]


def test_an_unknown_key_is_named() -> None:
    with pytest.raises(UnknownNameError, match="unknown key of a decision 'knobs'; did you mean 'knob'"):
        Decision.from_json({**DECISION.to_json(), "knobs": 1})
