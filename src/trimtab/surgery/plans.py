"""Plans: the changes of one network, made to another.

Called by users who load a checkpoint into a fresh network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from trimtab.surgery.surgeon import Surgeon

__all__ = ["replay"]


def replay(
    model: nn.Module, example_inputs: object, plan: Sequence[Mapping[str, Any]], optimizer: Optimizer | None = None
) -> Surgeon:
    """Change a fresh network as another was changed, so that the other's `state_dict` fits.

    Args:
        model: As the other was before its first change; its weights are not looked at. After an error it is left half
            changed: take another fresh one.
        example_inputs: As for `Surgeon`.
        plan: `Surgeon.plan` of the other, perhaps from JSON.
        optimizer: Of the fresh network; its groups get the order of the other's, so that its `state_dict` fits too.

    Returns:
        A surgeon for the network, which knows of all copies that the other's surgeon knew of.

    Raises:
        InputError: An entry of the plan is none, or does not fit the network.
    """
    surgeon = Surgeon(model, example_inputs, optimizer)
    surgeon.follow(plan)
    surgeon.remember()
    return surgeon
