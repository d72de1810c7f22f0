"""Named sets of options of the agents, so that a study says by one word whose settings it uses.

Called by trimtab.experiments.design. "paper" is what the write-up on an RL scheduler of the learning rate names:
discount 0.99, agent rate 1e-4, epsilon 0.1 with decay, one decision an epoch, the rate x1.1, x0.9 or kept. It names
neither where the decay ends nor how fast it is; here it goes to 0.01, by a factor of 1/e in 50 decisions, one for each
of its epochs.
Its continuous form is `{preset: paper, options: {actions: continuous}}` of `deep_q`: up to x1.1 or its inverse.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from trimtab.errors import unknown_name

__all__ = ["PRESETS", "preset_options"]

_PAPER: dict[str, Any] = {
    "actions": "standard",
    "gamma": 0.99,
    "learning_rate": 1e-4,
    "epsilon": 0.1,
    "epsilon_end": 0.01,
    "epsilon_schedule": "exponential",
    "epsilon_decisions": 50,
    "every": "epoch",
}
# Preset -> agent -> its options.
PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {"paper": {"q_learning": _PAPER, "deep_q": _PAPER}}


def preset_options(preset: str, agent: str) -> dict[str, Any]:
    """The options of an agent under a preset.

    Raises:
        UnknownNameError: There is no such preset, or it says nothing of this agent.

    >>> preset_options("paper", "deep_q")["gamma"]
    0.99
    """
    if preset not in PRESETS:
        raise unknown_name("preset", preset, PRESETS)
    if agent not in PRESETS[preset]:
        raise unknown_name(f"agent with a preset {preset!r}", agent, PRESETS[preset])
    return copy.deepcopy(dict(PRESETS[preset][agent]))
