"""What the learned controllers of the rate observe and do: the spec they are trained on and shipped with.

Called by the environments and the recipes. The features are those that worked in the first trials (FINDINGS section
5), without the absolute rate, with the ratios of single layers added, which are what convolutional networks lacked.
"""

from __future__ import annotations

from trimtab.agents.base import Actions, Base, Timing
from trimtab.spec import ControlSpec

__all__ = ["LEARNED_SIGNALS", "default_spec"]

LEARNED_SIGNALS = (
    "progress",
    "budget_log_steps",
    "interval_log_ratio",
    "loss_slope",
    "interval_loss_log_ratio",
    "train_loss_log_ratio",
    "loss_noise",
    "has_val_loss",
    "val_loss_log_ratio",
    "val_loss_log_ratio_best",
    "val_loss_log_ratio_start",
    "generalization_gap",
    "grad_update_cosine",
    "grad_norm_log_ratio",
    "update_to_weight",
    "update_to_weight_min",
    "update_to_weight_median",
    "update_to_weight_max",
    "lr_log_ratio_start",
    "last_move",
    "rollback_memory",
    "lr_log_ratio_bad",
)


def default_spec() -> ControlSpec:
    """Six short decisions, then 20; moves of up to two decades on a cosine; judged by rank at the end.

    The penalty is 0: a run that was rolled back has lost the interval, and its rank says so.
    """
    return ControlSpec(
        knobs=("lr",),
        signals=LEARNED_SIGNALS,
        reward="score_rank",
        penalty=0.0,
        actions=Actions("decades", low=-2.0, high=2.0),
        timing=Timing(every=None, n_decisions=20, early_decisions=6),
        base=Base("cosine"),
    )
