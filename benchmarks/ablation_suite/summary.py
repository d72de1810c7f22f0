"""From what was played to the numbers of the table. Called by ablations.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ablation_suite.figures import differences, estimate
from ablation_suite.variants import FULL
from trimtab.agents.base import Array
from trimtab.learning.validation import Played, log_ratios

__all__ = ["summarize"]


def summarize(
    plays: Mapping[str, Sequence[Played]], rule: Played, chosen_by: Sequence[str], held_out: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """The rows of the table.

    Args:
        plays: Variant -> what the agent of each learner played; learners in the same order everywhere.
        rule: What `uwhg` played, in the same episodes.
        chosen_by: Families that agents are chosen by; `overall` is over these.
        held_out: Families that stand beside.

    Returns:
        Variant -> `over_uwhg` and `over_full`, each None or what is in `figures.estimate`, of `overall`, of
        `held_out` (None where there is no such family) and of each of the `families`. `over_full` is None for `full`
        and where it is not there.

    Raises:
        InputError: Somebody played other tasks.
    """
    families = [*chosen_by, *held_out]
    tables: dict[str, dict[str, Array]] = {
        name: {family: np.array([log_ratios(one, rule, family, "uwhg") for one in played]) for family in families}
        for name, played in plays.items()
    }

    def figures(table: Mapping[str, Array]) -> dict[str, Any]:
        return {
            "overall": estimate([table[family] for family in chosen_by]),
            "held_out": estimate([table[family] for family in held_out]) if held_out else None,
            "families": {family: estimate([table[family]]) for family in families},
        }

    full = tables.get(FULL)
    return {
        name: {
            "over_uwhg": figures(table),
            "over_full": None if full is None or name == FULL else figures(differences(table, full)),
        }
        for name, table in tables.items()
    }
