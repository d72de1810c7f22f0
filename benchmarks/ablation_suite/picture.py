"""The picture: how the variants' final loss over that of `uwhg` falls while they learn. Called by ablations.py."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ablation_suite.variants import FULL, Variant
from trimtab.agents.base import Array
from trimtab.learning.curves import mean_and_interval, validations
from trimtab.learning.validation import overall
from trimtab.storage import atomic_write

__all__ = ["draw", "make_figure"]

Curves = Sequence[Sequence[Mapping[str, Any]]]

_TITLES = {"reward": "reward", "features": "features left out", "structure": "base, residual, early decisions"}
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#B8A800", "#8A8A8A")  # Okabe and Ito
_BLACK = "#000000"


def draw(curves: Mapping[str, tuple[Variant, Curves]], path: Path) -> None:
    """Draw a PNG; see `make_figure`."""
    buffer = io.BytesIO()
    make_figure(curves).savefig(buffer, format="png", dpi=130, facecolor="white", metadata={"Software": None})
    atomic_write(path, buffer.getvalue())


def make_figure(curves: Mapping[str, tuple[Variant, Curves]]) -> Figure:
    """One panel for each group of variants, `full` in all of them, with its interval from five learners on.

    Lines are geometric means over families that are chosen by, and over learners.

    Args:
        curves: Name -> the variant, and the lines of curve.jsonl of each of its learners.
    """
    rule = _rule_over_cosine(curves)
    groups = list(dict.fromkeys(variant.group for variant, _ in curves.values() if variant.group)) or [""]
    figure = Figure(figsize=(4.3 * len(groups), 3.6), layout="constrained")
    for axis, group in zip(np.atleast_1d(figure.subplots(1, len(groups), sharey=True)), groups, strict=True):
        colors = iter(_COLORS)
        for name, (variant, learners) in curves.items():
            if variant.group not in ("", group):
                continue
            at, values = _over_rule(variant, learners, rule)
            color, width = (_BLACK, 2.2) if name == FULL else (next(colors), 1.4)
            mean, half = mean_and_interval(values)
            axis.plot(at, np.exp(mean), color=color, linewidth=width, label=name)
            if name == FULL and half is not None:
                axis.fill_between(at, np.exp(mean - half), np.exp(mean + half), color=color, alpha=0.12, linewidth=0)
        axis.axhline(1.0, color="#BBBBBB", linewidth=1)
        low, high = axis.get_ylim()
        if low > 0 and high > 3 * low:
            axis.set_yscale("log")
        axis.set_title(_TITLES.get(group, ""), fontsize=9)
        axis.set_xlabel("decisions taken in training", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8, which="both")
        axis.legend(frameon=False, fontsize=7)
    figure.axes[0].set_ylabel("final loss / uwhg's", fontsize=9)
    return figure


def _rule_over_cosine(curves: Mapping[str, tuple[Variant, Curves]]) -> float:
    """Log ratio of `uwhg` over the cosine, which is the same for all; from `full`, or the first where it is not there.

    A variant over another base is watched beside a rule over that base, so that its own ratio to the rule is another
    thing. Geometric means divide out: (agent / cosine) / (agent / rule) = rule / cosine.
    """
    variant, learners = curves.get(FULL) or next(iter(curves.values()))
    families, first = variant.recipe.choosing_families, validations(learners[0])[0]["families"]
    return float(np.log(overall(first, families, "ratio_cosine") / overall(first, families, "ratio_uwhg")))


def _over_rule(variant: Variant, learners: Curves, rule: float) -> tuple[Array, Array]:
    """Decisions taken (V,), and log of the loss over that of the rule, (L, V)."""
    looks = [validations(rows) for rows in learners]
    families = variant.recipe.choosing_families
    values = [[np.log(overall(row["families"], families, "ratio_cosine")) - rule for row in rows] for rows in looks]
    return np.array([row["taken"] for row in looks[0]]), np.array(values)
