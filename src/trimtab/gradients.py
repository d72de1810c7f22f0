"""Gradient statistics, taken in the optimizer's own step hook.

Called by the controller. A step is measured by two looks: the weights are copied before step t - 1, and before
step t the update u_(t-1) = theta_(t-1) - theta_t stands beside the gradient g_t. Nothing leaves the device before
`collect`. Only every tenth step, and the last of an interval, is measured: FINDINGS section 7 of the first trials
puts the cost of measuring every step at 6 to 9 % of a small network's.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["GradientProbe"]

MEASURE_EVERY = 10


class GradientProbe:
    """Measure |g|, |u|, |theta| and cos(g_t, u_(t-1)) of an optimizer's steps.

    Args:
        optimizer: Whose steps are measured; its parameters may lie on several devices and grow in number.

    Attributes:
        next_decision: Number of the step before which the next decision is taken; set by the controller.
        step: Number of the step about to be taken; set by the controller.
        n_steps: Optimizer steps seen by the hook (a gradient scaler that skips a step never calls it).
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._before: list[Tensor] = []
        self._before_step = -1
        self._measured: list[Tensor] = []
        self.next_decision = 0
        self.step = 0
        self.n_steps = 0
        # The optimizer must not keep a controller alive that its owner has let go.
        me = weakref.ref(self)

        def hook(_optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
            probe = me()
            if probe is not None:
                probe.n_steps += 1
                left = probe.next_decision - 1 - probe.step
                if left % MEASURE_EVERY < 2:
                    probe._look(left)

        self._handle = optimizer.register_step_pre_hook(hook)

    def close(self) -> None:
        """Stop measuring."""
        self._handle.remove()

    @torch.no_grad()
    def _look(self, left: int) -> None:
        parameters = [
            parameter
            for group in self._optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None and not parameter.grad.is_sparse
        ]
        if not parameters:
            return
        if left % MEASURE_EVERY == 0:
            if self._before_step == self.step - 1 and self._fits(parameters):
                self._measured.append(self._measure(parameters))
        elif self._fits(parameters):
            torch._foreach_copy_(self._before, parameters)
            self._before_step = self.step
        else:
            self._before = [parameter.detach().clone() for parameter in parameters]
            self._before_step = self.step

    def _fits(self, parameters: Sequence[Tensor]) -> bool:
        return len(parameters) == len(self._before) and all(
            old.shape == new.shape for old, new in zip(self._before, parameters, strict=True)
        )

    def _measure(self, parameters: list[Tensor]) -> Tensor:
        """[|u|, |theta|, |g|, <g, u>] as one tensor of four on the first parameter's device."""
        gradients = [parameter.grad for parameter in parameters]
        updates = torch._foreach_sub(self._before, parameters)
        device = parameters[0].device
        norms = [torch._foreach_norm(tensors) for tensors in (updates, parameters, gradients)]
        products = [torch.dot(g.reshape(-1), u.reshape(-1)) for g, u in zip(gradients, updates, strict=True)]
        rows = [torch.stack([value.to(device) for value in row]) for row in norms]
        totals = torch.stack([*(torch.linalg.vector_norm(row) for row in rows),
                              torch.stack([value.to(device) for value in products]).sum()])
        scale = getattr(self._optimizer, "grad_scale", None)  # fused optimizers unscale the gradient themselves
        if isinstance(scale, Tensor):
            totals[2:] /= scale.to(device)
        return totals

    def pending(self) -> list[Tensor]:
        """What was measured since the last `collect`: tensors of four, still on the device."""
        return self._measured

    def forget(self) -> None:
        """Drop the weights seen last: they belong to a past that was rolled back."""
        self._before_step = -1

    def collect(self, rows: Sequence[Sequence[float]]) -> tuple[float, float, float]:
        """Summarise what was measured and begin anew.

        Args:
            rows: The values of `pending`, brought over by the caller in the same transfer as the losses.

        Returns:
            Means over the measured steps of |g|, cos(g, u) and |u| / |theta|; NaN where nothing usable was measured.
        """
        self._measured = []
        norms, cosines, ratios = [], [], []
        for update, weight, gradient, product in rows:
            if math.isfinite(gradient):
                norms.append(gradient)
            if update > 0 and gradient > 0 and math.isfinite(product):
                cosines.append(max(-1.0, min(1.0, product / update / gradient)))
            if update > 0 and weight > 0 and math.isfinite(update):
                ratios.append(update / weight)
        return _mean(norms), _mean(cosines), _mean(ratios)

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to go on in the middle of an interval."""
        has_copy = self._before_step >= 0 and self._before_step >= self.step - 1
        return {
            "before": [tensor.clone() for tensor in self._before] if has_copy else [],
            "before_step": self._before_step if has_copy else -1,
            "measured": [tensor.clone() for tensor in self._measured],
            "next_decision": self.next_decision,
            "step": self.step,
            "n_steps": self.n_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        devices = [p.device for group in self._optimizer.param_groups for p in group["params"]]
        on = zip(state["before"], devices, strict=False)
        self._before = [tensor.to(device, copy=True) for tensor, device in on]
        self._before_step = state["before_step"]
        self._measured = [tensor.to(devices[0], copy=True) for tensor in state["measured"]]
        self.next_decision = state["next_decision"]
        self.step = state["step"]
        self.n_steps = state["n_steps"]


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
