"""BatchedOptimizer: SGD with momentum, Adam and AdamW for R runs at once, each with its own settings.

Called by `trimtab.training.batched`. The formulas are those of `torch.optim` with its default options; a run's rate and
decay may change between plans, and its rate, by a factor that all share, at every step. A run may go over to another
algorithm between plans: `switch` and `conversion` do to its row what `trimtab.knobs.switch`, whose head has the
formulas, does to the optimizer of a single run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trimtab.errors import InputError, unknown_name
from trimtab.training.stacked import segments

__all__ = ["ALGORITHMS", "BatchedOptimizer"]

ALGORITHMS = ("sgd", "adam", "adamw")
_EPS = 1e-8  # of Adam and AdamW, torch's default
_BETA2 = 0.999  # torch's default, with which an Adam begins that was SGD
# Those of `trimtab.knobs.switch`: see there.
WORTH = 100
LOOK_EVERY = 10
NEWEST = 0.1
_MAX_STRETCHES = 16  # beyond it, on one core, three operations on copies of rows cost less than one a stretch


class BatchedOptimizer:
    """Updates of R rows of parameters.

    Args:
        names: "sgd", "adam" or "adamw" of each run; runs of one kind are faster side by side.
        momentum: Of runs that begin with SGD; (R,).
        betas: Of runs that begin with Adam or AdamW; one pair a run.
        decays: Which parameters decay in runs that begin with AdamW (matrices and kernels, as `make_optimizer` has it),
            and go on to, whatever they switch to; in the others all do. (P,), bool.
        parameters: (R, P); changed in place.

    Attributes:
        names: Algorithm of each run now.
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
            return torch.tensor(values, dtype=torch.float64, device=parameters.device).unsqueeze(1)

        self._parameters = parameters
        is_sgd = [name == "sgd" for name in names]
        self._beta1 = column([m if sgd else b[0] for sgd, m, b in zip(is_sgd, momentum, betas, strict=True)])
        self._beta2 = column([_BETA2 if sgd else b[1] for sgd, b in zip(is_sgd, betas, strict=True)])
        self._rest2, self._keep2 = (1 - self._beta2).to(parameters), self._beta2.to(parameters)
        is_all = torch.tensor([name != "adamw" for name in names], device=parameters.device).unsqueeze(1)
        self._decays = (decays.to(parameters.device) | is_all).to(parameters)
        self._has_decay = False
        self.lr = torch.zeros_like(self._rest2)
        self.weight_decay = torch.zeros_like(self._rest2)
        self.moments = parameters.new_zeros((2, *parameters.shape))
        self.steps = torch.zeros_like(self._rest2)
        self._planned: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []
        self._squares: _Squares | None = None
        self._write_momentum(self._beta1)
        self._sort(names)

    def _sort(self, names: Sequence[str]) -> None:
        """Note each run's algorithm, and the rows of each: stretches, or numbers where stretches would be many."""
        self.names = tuple(names)
        device = self._parameters.device
        self._is_sgd = torch.tensor([name == "sgd" for name in names], device=device).unsqueeze(1)
        self._rows: list[tuple[str, slice | Tensor]] = list(segments(names))
        if len(self._rows) > _MAX_STRETCHES:
            self._rows = [
                (kind, torch.tensor([run for run, name in enumerate(names) if name == kind], device=device))
                for kind in dict.fromkeys(names)
            ]

    def look_at_decay(self) -> None:
        """Say after a change of `weight_decay`: runs that decay nothing are spared the arithmetic."""
        self._has_decay = bool((self.weight_decay != 0).any())

    @property
    def momentum(self) -> Tensor:
        """Momentum of the runs of SGD, beta1 of the others; (R, 1), double precision."""
        return self._beta1

    def _write_momentum(self, values: Tensor) -> None:
        self._beta1 = values
        self._keep1, self._rest1 = values.to(self._parameters), (1 - values).to(self._parameters)

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
        self._write_momentum(values)

    # ---- switching ----------------------------------------------------------------------------------------------

    def watch(self, inside: Tensor) -> None:
        """Look at the squared gradients of SGD from now on, which a switch needs; once, before the first step.

        Args:
            inside: Which numbers of a row are parameters of its run, and no padding; (R, P), bool.
        """
        self._squares = _Squares(inside)

    @torch.no_grad()
    def conversion(self, names: Sequence[str]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Factors by which rate and decay of each run are to be multiplied if it goes over to these; (R,), (R,).

        To be asked before `switch`. They are 1 where an algorithm stays, or nothing is known of squared gradients.

        Raises:
            InputError: Nobody has called `watch`.
            UnknownNameError: An algorithm that there is not.
        """
        squares, runs = self._differing(names)
        rate, decay = np.ones(len(names)), np.ones(len(names))
        if not runs:
            return rate, decay
        rows = torch.tensor(runs, device=self._parameters.device)
        corrected = self.moments[1, rows].double() / (1 - self._beta2[rows] ** self.steps[rows].double())
        second = torch.where(self._is_sgd[rows], squares.mean[rows] * squares.inside[rows], corrected)
        above = (second * second / (second.sqrt() + _EPS) ** 2).sum(1)
        below = (second * second).sum(1)
        kappas = (above / below).sqrt().tolist()  # 0 / 0 where no gradient was ever seen
        for run, kappa, momentum in zip(runs, kappas, self._beta1[rows, 0].tolist(), strict=True):
            old, new = self.names[run], names[run]
            if not (0 < kappa < math.inf):
                continue
            if old == "sgd":
                rate[run] = 1 / ((1 - momentum) * kappa)
            elif new == "sgd":
                rate[run] = (1 - momentum) * kappa
            if "adamw" in (old, new):
                decay[run] = kappa if new == "adamw" else 1 / kappa
        return rate, decay

    @torch.no_grad()
    def switch(self, names: Sequence[str]) -> None:
        """Go over to these algorithms from the next plan on, one of each run; what a run knows is carried over.

        Rates and decays stay as they are: see `conversion`.

        Raises:
            InputError: Nobody has called `watch`.
            UnknownNameError: An algorithm that there is not.
        """
        squares, runs = self._differing(names)
        to_sgd = [run for run in runs if names[run] == "sgd"]
        to_adam = [run for run in runs if self.names[run] == "sgd"]
        if to_sgd:
            rows = torch.tensor(to_sgd, device=self._parameters.device)
            self.moments[0, rows] /= 1 - self._beta1[rows].to(self.moments)
            self.moments[1, rows] = 0.0
            squares.restart(rows[self.steps[rows, 0] > 0].tolist())  # of an Adam that took no step nothing is newer
        if to_adam:
            rows = torch.tensor(to_adam, device=self._parameters.device)
            momentum, mean = self._beta1[rows], squares.mean[rows]
            is_known = mean.isfinite()
            # Without momentum SGD's row has the last gradient alone, which is no average.
            share = torch.where(is_known & (momentum > 0), (1 - momentum) * (1 - momentum**WORTH), 0.0)
            second = torch.where(is_known, mean * (1 - self._beta2[rows] ** WORTH), 0.0) * squares.inside[rows]
            self.moments[0, rows] *= share.to(self.moments)
            self.moments[1, rows] = second.to(self.moments)
            self.steps[rows] = torch.where(is_known, float(WORTH), 0.0).to(self.steps)
        if runs:
            self._sort(names)

    def _differing(self, names: Sequence[str]) -> tuple[_Squares, list[int]]:
        """What is known of squared gradients, and the runs that are to get another algorithm."""
        if self._squares is None:
            raise InputError("a switch needs the squared gradients of SGD; call watch() before the first step")
        for name in names:
            if name not in ALGORITHMS:
                raise unknown_name("algorithm", name, ALGORITHMS)
        return self._squares, [run for run, (old, new) in enumerate(zip(self.names, names, strict=True)) if old != new]

    # ---- steps --------------------------------------------------------------------------------------------------

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
        looks: list[Tensor | None] = [None] * len(factors)
        if self._squares is not None:
            waits = np.zeros(len(self.names)) if delays is None else delays.cpu().numpy()
            looks = self._squares.plan(len(factors), waits, [name == "sgd" for name in self.names])
        self._planned = list(zip(rates.to(like), scales.to(like), (_EPS * root).to(like), looks, strict=True))[::-1]

    @torch.no_grad()
    def step(self, gradient: Tensor) -> None:
        """One update of every run, the next of those planned.

        Args:
            gradient: (R, P).
        """
        self.steps += 1
        rates, scales, eps, looks = self._planned.pop()
        if looks is not None and self._squares is not None:
            self._squares.look(gradient, looks)
        for name, where in self._rows:
            # Stretches are views; rows by number are copies, to be put back.
            part, parameters, mean = gradient[where], self._parameters[where], self.moments[0, where]
            if self._has_decay:
                part = self._decay(part, parameters, where, rates[where], is_decoupled=name == "adamw")
            if name == "sgd":
                mean.mul_(self._keep1[where]).add_(part)
                parameters.addcmul_(rates[where], mean, value=-1)
            else:
                square = self.moments[1, where]
                mean.lerp_(part, self._rest1[where])
                square.mul_(self._keep2[where]).addcmul_(part * self._rest2[where], part)
                parameters.addcdiv_(mean * scales[where], square.sqrt().add_(eps[where]), value=-1)
                if isinstance(where, Tensor):
                    self.moments[1].index_copy_(0, where, square)
            if isinstance(where, Tensor):
                self.moments[0].index_copy_(0, where, mean)
                self._parameters.index_copy_(0, where, parameters)

    def _decay(
        self, gradient: Tensor, parameters: Tensor, where: slice | Tensor, rates: Tensor, *, is_decoupled: bool
    ) -> Tensor:
        """Decay the weights themselves, or add to the gradient; the gradient to go on with."""
        decay = self.weight_decay[where] * self._decays[where]
        if not is_decoupled:
            return gradient + decay * parameters
        parameters.mul_(1 - rates * decay)
        return gradient


class _Squares:
    """Mean square of each run's gradient under SGD, looked at now and then, as the knob of a single run has it.

    Args:
        inside: Which numbers of a row are its run's; (R, P), bool.

    Attributes:
        inside: As above.
        mean: It, in double precision; NaN before the first look; (R, 1).
    """

    def __init__(self, inside: Tensor) -> None:
        self.inside = inside
        self._counts = inside.sum(1)
        self.mean = torch.full_like(self._counts, math.nan, dtype=torch.float64).unsqueeze(1)
        self._n_steps = np.zeros(len(inside), np.int64)
        self._n_looks = np.zeros(len(inside), np.int64)

    def restart(self, runs: list[int]) -> None:
        """What is known of these is old: the next look takes its place."""
        self._n_steps[runs] = self._n_looks[runs] = 0

    def plan(self, n: int, waits: npt.NDArray[Any], is_sgd: Sequence[bool]) -> list[Tensor | None]:
        """Count the coming steps, and say how much the look of each counts: (R, 1), 0 where a run does not look.

        Of a step before which no run looks it is None.

        Args:
            n: Steps.
            waits: Steps before each run's first; (R,).
            is_sgd: Of each run; (R,).
        """
        out: list[Tensor | None] = []
        for step in range(n):
            is_live = np.asarray(is_sgd) & (waits <= step)
            self._n_steps += is_live
            looks = is_live & ((self._n_steps <= LOOK_EVERY) | (self._n_steps % LOOK_EVERY == 0))
            self._n_looks += looks
            weights = np.where(looks, np.maximum(NEWEST, 1 / np.maximum(self._n_looks, 1)), 0.0)
            out.append(torch.from_numpy(weights).unsqueeze(1).to(self.mean.device) if looks.any() else None)
        return out

    def look(self, gradient: Tensor, weights: Tensor) -> None:
        """Take in the gradients (R, P) by these weights (R, 1); where one is not finite, the other stands alone."""
        new = (torch.linalg.vecdot(gradient, gradient, dim=1).double() / self._counts).unsqueeze(1)
        mixed = torch.lerp(self.mean, new, weights)
        mixed = torch.where(mixed.isfinite(), mixed, torch.where(new.isfinite(), new, self.mean))
        self.mean = torch.where(weights > 0, mixed, self.mean)
