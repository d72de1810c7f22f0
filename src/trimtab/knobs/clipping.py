"""Knob of the largest norm of the gradient, in a loop that clips by itself or in a hook of the optimizer.

Called through the registry.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from typing_extensions import override

from trimtab.errors import InputError
from trimtab.knobs.base import Knob
from trimtab.run_state import Array, RunState

__all__ = ["GradClip"]


class _Clipper:
    """A hook before `optimizer.step()`: scales all gradients so that their common norm is at most `grad_clip`.

    It stays when control ends, as the rate does.
    """

    def __init__(self) -> None:
        self.grad_clip: float | None = None

    def __call__(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        if self.grad_clip is None:
            return
        limit: float | Tensor = self.grad_clip
        scale = getattr(optimizer, "grad_scale", None)
        if isinstance(scale, Tensor):  # a fused optimizer takes a gradient scaler's scale out by itself, after this
            limit = limit * scale
        clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], limit)  # type: ignore[arg-type]


class GradClip(Knob):
    """Largest Euclidean norm of the gradient of all parameters together.

    It acts on `loader.grad_clip` where the loader is a loop that has one (`TrainingLoop`); else in a hook before each
    `optimizer.step()`, after a gradient scaler has unscaled. Where nothing was clipped before it begins at its upper
    bound, and nothing is clipped as long as it stands there.

    Args:
        low: Smallest norm that a controller may choose; default 0.01.
        high: Largest; default 100.
    """

    name = "grad_clip"

    def __init__(self, low: float = 0.01, high: float = 100.0) -> None:
        super().__init__(low, high)
        self._written: float | None = None
        self._is_open = False  # whether the upper bound stands for no clipping at all

    @override
    def bind(self, state: RunState) -> Array:
        place = _find(state)
        if place is None:
            place = _Clipper()
            state.optimizer.register_step_pre_hook(place)
        found = place.grad_clip
        if found is not None and (
            isinstance(found, bool) or not isinstance(found, (int, float)) or not 0 < found < math.inf
        ):
            raise InputError(
                f"grad_clip is {found!r}; expected a positive finite norm, or None where nothing is clipped"
            )
        self._is_open, self._written = found is None, found
        return np.array([self.get(state)])

    @override
    def get(self, state: RunState) -> float:
        present = _find(state).grad_clip
        return self.high if present is None else float(present)

    @override
    def put(self, state: RunState, value: float) -> None:
        self._written = None if self._is_open and value >= self.high else value
        _find(state).grad_clip = self._written

    @override
    def find_conflict(self, state: RunState) -> str | None:
        place = _find(state)
        if place is None:
            return "the hook that clips the gradient was removed from the optimizer"
        if place.grad_clip == self._written:
            return None
        return f"grad_clip is {place.grad_clip!r} where {self._written!r} was written"

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"written": self._written, "is_open": self._is_open}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._written, self._is_open = state["written"], state["is_open"]


def _find(state: RunState) -> Any:
    """The loop, or the hook, that clips."""
    if hasattr(state.loader, "grad_clip"):
        return state.loader
    return next(
        (hook for hook in state.optimizer._optimizer_step_pre_hooks.values() if isinstance(hook, _Clipper)), None
    )
