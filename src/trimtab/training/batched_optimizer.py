"""BatchedOptimizer: SGD with momentum, Adam and AdamW for R runs at once, each with its own settings.

Called by `trimtab.training.batched`. The formulas are those of `torch.optim` with its default options; a run's rate and
decay may change between plans, and its rate, by a factor that all share, at every step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
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
        def column(values: Sequence[float], dtype: torch.dtype = parameters.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=parameters.device).unsqueeze(1)

        self._parameters = parameters
        self._segments = segments(names)
        self._is_sgd = torch.tensor([name == "sgd" for name in names], device=parameters.device).unsqueeze(1)
        self._momentum = column(momentum)
        self._beta1, self._beta2 = (column([pair[i] for pair in betas], torch.float64) for i in (0, 1))
        self._rest1, self._rest2 = (column([1 - pair[i] for pair in betas]) for i in (0, 1))
        self._keep2 = self._beta2.to(parameters)
        self._decays = decays.to(parameters)
        self._has_decay = False
        self.lr = torch.zeros_like(self._momentum)
        self.weight_decay = torch.zeros_like(self._momentum)
        self.moments = parameters.new_zeros((2, *parameters.shape))
        self.steps = torch.zeros_like(self._momentum)
        self._planned: list[tuple[Tensor, Tensor, Tensor]] = []

    def look_at_decay(self) -> None:
        """Say after a change of `weight_decay`: runs that decay nothing are spared the arithmetic."""
        self._has_decay = bool((self.weight_decay != 0).any())

    @property
    def momentum(self) -> Tensor:
        """Momentum of the runs of SGD, beta1 of the others; (R, 1), double precision."""
        return torch.where(self._is_sgd, self._momentum.double(), self._beta1)

    @torch.no_grad()
    def set_momentum(self, values: Tensor) -> None:
        """Write it, and do to the moments what the knob of a single run does to them.

        Adam's first moment is scaled so that its bias-corrected value stays; SGD's buffer begins anew where the
        momentum rises from 0.

        Args:
            values: (R, 1), double precision.
        """
        old = self.momentum
        corrected = (1 - values**self.steps) / (1 - old**self.steps)
        scale = torch.where(self._is_sgd, (old != 0).double(), torch.where(self.steps > 0, corrected, 1.0))
        scale = torch.where(values == old, 1.0, scale)
        if bool((scale != 1).any()):
            self.moments[0].mul_(scale.to(self.moments))
        self._momentum = torch.where(self._is_sgd, values.to(self._momentum), self._momentum)
        self._beta1 = torch.where(self._is_sgd, self._beta1, values)
        self._rest1 = (1 - self._beta1).to(self._rest1)

    @torch.no_grad()
    def plan(self, factors: Sequence[float] | npt.NDArray[np.float64], delays: Tensor | None = None) -> None:
        """Work out what depends on rates and counts alone, for so many steps at once: small operations are dear.

        Args:
            factors: What every run's rate is multiplied with in each step, the schedule under a controller; (n,), or
                (n, R).
            delays: Steps before each run's first; (R,). None: all begin with the first.
        """
        places = torch.arange(1, len(factors) + 1, dtype=torch.float64, device=self.lr.device)
        counts = self.steps + places.view(-1, 1, 1)  # (n, R, 1)
        if delays is not None:
            counts = (counts - delays.view(-1, 1)).clamp(min=1.0)
        rates = self.lr * torch.from_numpy(np.asarray(factors, np.float64)).to(places).view(len(factors), -1, 1)
        root = (1 - self._beta2**counts).sqrt()
        # m / (1 - beta1^t) / (sqrt(v) / root + eps): root is taken out of the division of large tensors.
        scales = rates * root / (1 - self._beta1**counts)
        like = self._parameters.dtype
        self._planned = list(zip(rates.to(like), scales.to(like), (_EPS * root).to(like), strict=True))[::-1]

    @torch.no_grad()
    def step(self, gradient: Tensor) -> None:
        """One update of every run, the next of those planned.

        Args:
            gradient: (R, P).
        """
        self.steps += 1
        rates, scales, eps = self._planned.pop()
        for name, where in self._segments:
            if name == "sgd":
                self._sgd(gradient[where], where, rates[where])
                continue
            part = gradient[where]
            if self._has_decay:
                part = self._decay(part, where, rates[where], is_decoupled=name == "adamw")
            self._adam(part, where, scales[where], eps[where])

    def _sgd(self, gradient: Tensor, where: slice, rates: Tensor) -> None:
        parameters, buffer = self._parameters[where], self.moments[0, where]
        if self._has_decay:
            gradient = gradient + self.weight_decay[where] * parameters
        buffer.mul_(self._momentum[where]).add_(gradient)
        parameters.addcmul_(rates, buffer, value=-1)

    def _decay(self, gradient: Tensor, where: slice, rates: Tensor, *, is_decoupled: bool) -> Tensor:
        """Decay the weights themselves, or add to the gradient; the gradient to go on with."""
        parameters, decay = self._parameters[where], self.weight_decay[where]
        if not is_decoupled:
            return gradient + decay * parameters
        parameters.mul_(1 - rates * decay * self._decays)
        return gradient

    def _adam(self, gradient: Tensor, where: slice, scales: Tensor, eps: Tensor) -> None:
        mean, square = self.moments[0, where], self.moments[1, where]
        mean.lerp_(gradient, self._rest1[where])
        square.mul_(self._keep2[where]).addcmul_(gradient * self._rest2[where], gradient)
        self._parameters[where].addcdiv_(mean * scales, square.sqrt().add_(eps), value=-1)
