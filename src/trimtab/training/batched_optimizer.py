"""BatchedOptimizer: SGD with momentum, Adam and AdamW for R runs at once, each with its own settings.

Called by `trimtab.training.batched`. The formulas are those of `torch.optim` with its default options, in the same
order of operations; a run's rate and decay may change at every step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.training.stacked import segments

__all__ = ["BatchedOptimizer"]

_EPS = 1e-8  # of Adam and AdamW, torch's default


class BatchedOptimizer:
    """Updates of R rows of parameters.

    Args:
        names: "sgd", "adam" or "adamw" of each run; runs of one kind are faster side by side.
        momentum: Of SGD; (R,).
        betas: Of Adam and AdamW; one pair a run.
        decays: Which parameters AdamW decays (matrices and kernels, as `make_optimizer` has it); (P,), bool.
        parameters: (R, P); changed in place.

    Attributes:
        lr: Rate of each run; (R, 1), to be written in place.
        weight_decay: Decay of each run; (R, 1), to be written in place.
        moments: First moment (or momentum buffer) and second moment; (2, R, P).
        steps: Steps taken, which a roll-back takes back; (R, 1).
    """

    def __init__(
        self,
        names: Sequence[str],
        momentum: Sequence[float],
        betas: Sequence[tuple[float, float]],
        decays: Tensor,
        parameters: Tensor,
    ) -> None:
        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=parameters.dtype, device=parameters.device).unsqueeze(1)

        self._parameters = parameters
        self._segments = segments(names)
        self._momentum = column(momentum)
        self._beta1, self._beta2 = column([b for b, _ in betas]), column([b for _, b in betas])
        self._decays = decays.to(parameters)
        self._has_decay = False
        self.lr = torch.zeros_like(self._momentum)
        self._rates = self.lr
        self.weight_decay = torch.zeros_like(self._momentum)
        self.moments = parameters.new_zeros((2, *parameters.shape))
        self.steps = torch.zeros_like(self._momentum)

    def look_at_decay(self) -> None:
        """Say after a change of `weight_decay`: runs that decay nothing are spared the arithmetic."""
        self._has_decay = bool((self.weight_decay != 0).any())

    @torch.no_grad()
    def step(self, gradient: Tensor, factor: float = 1.0) -> None:
        """One update of every run.

        Args:
            gradient: (R, P).
            factor: What every run's rate is multiplied with in this step: the schedule under a controller.
        """
        self.steps += 1
        self._rates = self.lr * factor
        for name, where in self._segments:
            if name == "sgd":
                self._sgd(gradient[where], where)
            else:
                self._adam(gradient[where], where, is_decoupled=name == "adamw")

    def _sgd(self, gradient: Tensor, where: slice) -> None:
        parameters, buffer = self._parameters[where], self.moments[0, where]
        if self._has_decay:
            gradient = gradient + self.weight_decay[where] * parameters
        buffer.mul_(self._momentum[where]).add_(gradient)
        parameters.addcmul_(self._rates[where], buffer, value=-1)

    def _adam(self, gradient: Tensor, where: slice, *, is_decoupled: bool) -> None:
        parameters, lr, steps = self._parameters[where], self._rates[where], self.steps[where]
        if self._has_decay:
            decay = self.weight_decay[where]
            if is_decoupled:
                parameters.mul_(1 - lr * decay * self._decays)
            else:
                gradient = gradient + decay * parameters
        beta1, beta2 = self._beta1[where], self._beta2[where]
        mean, square = self.moments[0, where], self.moments[1, where]
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient * (1 - beta2), gradient)
        denominator = square.sqrt().div_((1 - beta2**steps).sqrt()).add_(_EPS)
        parameters.sub_(mean.mul(lr / (1 - beta1**steps)).div_(denominator))
