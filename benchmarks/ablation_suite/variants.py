"""The variants of a recipe, each without one thing or with another in its place.

Called by ablations.py and by its workers. Every variant differs from `full` in one thing. `full` itself differs from
the recipe in up to three, so that all variants can be made alike: it is no residual, and the brain is trusted
everywhere (`keep_ranges: false`), since the rule under a residual, or the one that would take over, needs signals that
some variants do not observe; and of each recipe single agents are looked at (`choose: best`), since seeds are what is
compared. Where the recipe is a residual, the variant `residual` is nearest to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.envs.episodes import fitting_horizon
from trimtab.errors import InputError, unknown_name
from trimtab.learning.parts import check_recipe, make_spec, validation_options
from trimtab.learning.recipe import Recipe
from trimtab.learning.validation import plan_episodes

__all__ = ["FEATURES", "FULL", "Variant", "make_full", "make_variants", "variant_names"]

FULL = "full"
# A gamma of a half looks two decisions ahead: as greedy as in the trial of FINDINGS section 5.
_GREEDY_GAMMA = 0.5
# Every signal that policies look at, in one group each.
FEATURES = {
    "progress": ("progress", "budget_log_steps", "interval_log_ratio"),
    "loss": ("loss_slope", "interval_loss_log_ratio", "train_loss_log_ratio", "loss_noise"),
    "validation": (
        "has_val_loss",
        "val_loss_log_ratio",
        "val_loss_log_ratio_best",
        "val_loss_log_ratio_start",
        "generalization_gap",
    ),
    "cosine": ("grad_update_cosine",),
    "gradient-norm": ("grad_norm_log_ratio",),
    "update-to-weight": ("update_to_weight",),
    "layers": ("update_to_weight_min", "update_to_weight_median", "update_to_weight_max"),
    "rate-memory": ("lr_log_ratio_start", "last_move", "rollback_memory", "lr_log_ratio_bad"),
}

_Change = Callable[[dict[str, Any], Recipe], None]


@dataclass(frozen=True)
class Variant:
    """A recipe to be learned.

    Attributes:
        name: Of its row and its folder.
        group: "reward", "features" or "structure": the panel of the picture that it is drawn in; "" for `full`.
        what: How it differs from `full`.
        recipe: The recipe.
    """

    name: str
    group: str
    what: str
    recipe: Recipe


def make_full(recipe: Recipe, held_out: Sequence[str] = ()) -> Recipe:
    """The recipe that all variants are compared with.

    Args:
        recipe: What was asked for.
        held_out: Families of its tasks that are not to be trained on nor chosen by, but shown beside.

    Raises:
        InputError: A family is not trained on, or none is left; or the recipe has something wrong.
    """
    data = recipe.to_json()
    families, validate = data["tasks"]["families"], data["validate"]
    for family in held_out:
        if family not in families:
            raise unknown_name("family to hold out", family, families)
    data["tasks"]["families"] = [family for family in families if family not in held_out]
    if not data["tasks"]["families"]:
        raise InputError(f"--hold-out: nothing is left to train on of {', '.join(families)}; hold out fewer")
    chosen_by = [family for family in validate["families"] or () if family not in held_out]
    validate["families"] = chosen_by or None
    validate["held_out"] = list(dict.fromkeys([*validate["held_out"], *held_out]))
    if data["options"].pop("residual", None) is not None:
        data["spec"]["early_decisions"] = None  # the agent's own number, which is one less without the rule
    full = Recipe.model_validate({**data, "keep_ranges": False, "choose": "best"})
    check_recipe(full)
    return full


def make_variants(full: Recipe) -> tuple[dict[str, Variant], dict[str, str]]:
    """All variants of a recipe, `full` first, and why some cannot be had.

    Args:
        full: What `make_full` returned.

    Returns:
        Name -> variant, and name -> why there is none.
    """
    made, missing = {FULL: Variant(FULL, "", "the recipe itself", full)}, {}
    for name, (group, what, change) in _catalogue().items():
        data = full.to_json()
        change(data, full)
        if data == full.to_json():
            missing[name] = "it would be the recipe itself"
            continue
        data["recipe"], data["idea"] = f"{full.recipe}.{name}", f"Ablation of {full.recipe}: {what}."
        try:
            variant = Recipe.model_validate(data)
            check_recipe(variant)
            _check_budgets(variant)
        except InputError as error:
            missing[name] = str(error)
            continue
        made[name] = Variant(name, group, what, variant)
    return made, missing


def variant_names() -> tuple[str, ...]:
    """Names of all variants that a recipe may have, `full` first."""
    return (FULL, *_catalogue())


def _catalogue() -> dict[str, tuple[str, str, _Change]]:
    """Name -> group, what is different, and how the recipe's data are changed."""
    entries: dict[str, tuple[str, str, _Change]] = {
        "reward-unranked": (
            "reward",
            "rewarded by the whole run's log improvement of the validation loss, not by its rank",
            lambda data, _: _reward(data, 1.0),
        ),
        "reward-greedy": (
            "reward",
            f"rewarded by each interval's log improvement of the validation loss, gamma {_GREEDY_GAMMA}",
            lambda data, _: _reward(data, _GREEDY_GAMMA),
        ),
    }
    for name, signals in FEATURES.items():
        entries[f"no-{name}"] = ("features", f"does not observe {', '.join(signals)}", _without(signals))
    return {
        **entries,
        "constant-base": ("structure", "no schedule under the agent", _constant_base),
        "residual": ("structure", "half the move, added to the rule uwhg's; its early decisions are seven", _residual),
        "no-early": ("structure", "no short decisions at the start", _no_early),
    }


def _check_budgets(recipe: Recipe) -> None:
    """Refuse times of decision that fit no budget together with the rivals': better now than after hours."""
    part = recipe.validate_on
    options = validation_options(recipe)
    plan = plan_episodes(make_spec(recipe), options, num_envs=part.num_envs, episodes=part.episodes, seed=0)
    for total_steps in options.horizon:
        fitting_horizon(total_steps, *plan.timings)


def _reward(data: dict[str, Any], gamma: float) -> None:
    data["spec"]["reward"] = "log_improvement"
    # Of PPO and DQN 1 is the default, which is not written out, so that a recipe which has this reward is itself.
    if gamma != data["options"].get("gamma", 1.0):
        data["options"]["gamma"] = gamma


def _without(signals: Sequence[str]) -> _Change:
    def change(data: dict[str, Any], full: Recipe) -> None:
        observed = make_spec(full).signals
        if set(observed) & set(signals):
            data["spec"]["signals"] = [name for name in observed if name not in signals]

    return change


def _constant_base(data: dict[str, Any], _: Recipe) -> None:
    data["spec"]["base"] = "constant"


def _residual(data: dict[str, Any], full: Recipe) -> None:
    if full.options.get("residual") is None:
        data["options"]["residual"] = "uwhg"
        data["spec"]["early_decisions"] = None  # the agent's own number with a residual: its rule measures first


def _no_early(data: dict[str, Any], _: Recipe) -> None:
    data["spec"]["early_decisions"] = 0
