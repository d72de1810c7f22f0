"""BestWeights: a copy of a model's weights and buffers at its best validation loss.

Called by the controller, for `best_state` and for the guard's last act.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import InputError

__all__ = ["BestWeights"]


class BestWeights:
    """What the best validation loss so far was, and what had it.

    Args:
        model: What is copied; None keeps nothing.

    Attributes:
        is_averaged: Whether what is kept is the average of the weights.
        plan: The changes (`trimtab.surgery`) that lead to the shape of what is kept; empty for the original one.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._model = model
        self._kept: dict[str, Tensor] | None = None
        self._val_loss = math.inf
        self.is_averaged = False
        self.plan: list[dict[str, Any]] = []

    @torch.no_grad()
    def offer(self, val_loss: float, *, is_averaged: bool, plan: Sequence[dict[str, Any]] = ()) -> None:
        """Copy what is in the model now, if this loss of it is finite and the lowest; `plan` is that of its shape."""
        if self._model is None or not (math.isfinite(val_loss) and val_loss < self._val_loss):
            return
        self._val_loss, self.is_averaged = val_loss, is_averaged
        now = self._model.state_dict()
        if self._kept is None or list(plan) != self.plan or self._kept.keys() != now.keys():
            self._kept = {key: value.detach().clone() for key, value in now.items()}
        else:
            torch._foreach_copy_([self._kept[key] for key in now], [*now.values()])
        self.plan = list(plan)

    def put_back(self, reshape: Callable[[list[dict[str, Any]]], None]) -> bool:
        """Load them into the model, which `reshape` gives their shape; False where there are none, or it cannot."""
        if self._model is None or self._kept is None:
            return False
        try:
            reshape(self.plan)
        except InputError:  # a network that was given in a changed shape has no way back
            return False
        self._model.load_state_dict(self._kept)
        return True

    def copy(self) -> dict[str, Tensor]:
        """A `state_dict` of its own.

        Raises:
            InputError: No model was given, or no validation loss was ever reported.
        """
        if self._model is None:
            raise InputError("best_state() needs the model: give it as model=... when the controller is made")
        if self._kept is None:
            raise InputError("best_state() needs a finite validation loss: call report(val_loss=...) while training")
        return {key: value.clone() for key, value in self._kept.items()}

    def state_dict(self) -> dict[str, Any]:
        """All of it, copied."""
        kept = None if self._kept is None else {key: value.clone() for key, value in self._kept.items()}
        return {"kept": kept, "val_loss": self._val_loss, "is_averaged": self.is_averaged, "plan": self.plan}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Inverse of `state_dict`; tensors go to the device."""
        kept = state["kept"]
        self._kept = None if kept is None else {key: value.to(device, copy=True) for key, value in kept.items()}
        self._val_loss, self.is_averaged = state["val_loss"], state["is_averaged"]
        self.plan = list(state.get("plan", []))
