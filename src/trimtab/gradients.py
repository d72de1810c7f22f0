"""Gradient statistics, taken in the optimizer's own step hook.

Called by the controller. A step is measured by two looks: the weights are copied before step t - 1, and before
step t the update u_(t-1) = theta_(t-1) - theta_t stands beside the gradient g_t. Nothing leaves the device before
`collect`. Only every tenth step, and the last of an interval, is measured: FINDINGS section 7 of the first trials
puts the cost of measuring every step at 6 to 9 % of a small network's.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from trimtab.flat import FlatRow, FlatView, Floats, gather

__all__ = ["GradientProbe", "measure_each", "measure_rows"]

MEASURE_EVERY = 10

Row = Tensor | list[float]


class GradientProbe:
    """Measure |g|, |u|, |theta| and cos(g_t, u_(t-1)) of an optimizer's steps.

    Args:
        optimizer: Whose steps are measured; its parameters may lie on several devices and grow in number.

    Attributes:
        needs_layers: Whether |u| / |theta| is also measured of each matrix or kernel.
        layer_ratios: Of the interval collected last, the smallest, median (the lower of two) and largest of the layers'
            mean |u| / |theta|; NaN where nothing usable was measured, or asked for.
        is_frozen: Let no step change a weight any more: it finds no gradients. A rate of 0 would not be enough,
            for 0 times a gradient that is not finite is not finite either.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._before: list[Tensor] = []
        self._kept: list[Tensor] = []  # the parameters that were copied
        self._view: FlatView | None = None  # in a small network, instead of `_before`: weights seen as one row
        self._rows = (FlatRow(0),) * 3  # update (before: old weights), weights, gradient
        self._gradient_parts: list[Tensor] = []  # the last of them, in the shapes of the parameters
        self._matrix_places: list[slice] = []  # where matrices and kernels lie in a row
        self.needs_layers = False
        self.layer_ratios = (math.nan, math.nan, math.nan)
        self._is_open = False  # whether the rows hold what was looked at and not worked out yet
        self._scale = 1.0  # of the gradient in the rows
        self._before_count = -1
        self._measured: list[Row] = []
        self._left = 0  # steps of this interval that will still be taken, the coming one included
        self._is_single = False
        self._found_inf: Tensor | int = 0
        self.is_frozen = False
        # Steps seen, and how many there may be before the next look: all that is touched at every step.
        count = self._count = [0, 0]
        # The optimizer must not keep a controller alive that its owner has let go.
        me = weakref.ref(self)

        def hook(_optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
            count[0] += 1
            if count[0] > count[1]:
                probe = me()
                if probe is not None:
                    probe._look()
            if "found_inf" in vars(_optimizer):  # only a fused optimizer under a gradient scaler has it
                probe = me()
                if probe is not None:
                    probe._found_inf = probe._found_inf + (_optimizer.__dict__["found_inf"].detach().reshape(()) > 0)

        self._handle = optimizer.register_step_pre_hook(hook)

    @property
    def n_steps(self) -> int:
        """Optimizer steps seen; a gradient scaler that skips one never gets here, but see `count_found_inf`."""
        return self._count[0]

    def close(self) -> None:
        """Stop measuring."""
        self._handle.remove()

    def count_found_inf(self) -> int:
        """Steps that a fused optimizer skipped by itself, told by a gradient scaler; waits for the device."""
        return int(self._found_inf)

    def _drop_gradients(self) -> None:
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def freeze(self) -> None:
        """From now on no step finds a gradient."""
        self.is_frozen = True
        self._count[1] = -1

    def aim(self, n_steps: int) -> None:
        """Say after how many more steps the next decision is taken: the last is measured, and every tenth before it."""
        if self.is_frozen:
            return
        self._left = n_steps
        self._is_single = n_steps == 1  # a decision at every step: each is measured, and copied for the next
        self._wait((n_steps - 2) % MEASURE_EVERY if n_steps > 1 else 0)

    def rest(self) -> None:
        """Look no more: no decision will come. A frozen probe goes on keeping the weights."""
        if not self.is_frozen:
            self._count[1] = 1 << 62  # a number of steps that is never reached

    def _wait(self, n_steps: int) -> None:
        """Let so many steps pass before the next look."""
        self._left -= n_steps
        self._count[1] = self._count[0] + n_steps

    def _look(self) -> None:
        """Before a step: `_left` counts it and those after it in this interval; a look falls on 1 and 2 modulo ten."""
        if self.is_frozen:
            self._drop_gradients()
            return
        left = self._left
        self._left -= 1
        groups = self._optimizer.param_groups
        parameters = [
            parameter
            for group in groups
            for parameter in group["params"]
            if parameter.grad is not None and not parameter.grad.is_sparse
        ]
        if parameters and left > 0:
            if self._before_count == self._count[0] - 1:
                self._measure(parameters)
            if self._is_single or left % MEASURE_EVERY == 2:
                self._keep(parameters)
        self._wait(0 if left <= 2 or left % MEASURE_EVERY == 2 else (left - 3) % MEASURE_EVERY)

    def _keep(self, parameters: list[Tensor]) -> None:
        """Copy the weights as they are before this step."""
        self._work_out()
        view = self._view
        if view is None or not view.shows(parameters):
            view = self._view = FlatView(parameters) if FlatView.fits(parameters) else None
            self._make_rows(parameters)
        if view is not None:
            view.copy_to(self._rows[0])
        elif [*map(id, parameters)] == [*map(id, self._kept)] and _are_like(self._before, parameters):
            with torch.no_grad():
                torch._foreach_copy_(self._before, parameters)  # memory that is there already: fresh pages cost more
        else:
            self._before = [parameter.detach().clone() for parameter in parameters]
        self._kept = parameters
        self._before_count = self._count[0]

    def _measure(self, parameters: list[Tensor]) -> None:
        """Put the update since `_keep` beside the gradient now."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        view = self._view
        if view is not None:
            if view.shows(parameters) and all([gradient.is_cpu for gradient in gradients]):
                view.copy_to(self._rows[1])
                # Gradients lie on other memory at every step: one call of torch is cheaper than a view of each.
                torch._foreach_copy_(self._gradient_parts, [g.detach() if g.requires_grad else g for g in gradients])
                scale = getattr(self._optimizer, "grad_scale", None)
                self._scale = float(scale) if isinstance(scale, Tensor) else 1.0
                self._is_open = True
            return
        now = [parameter.detach() for parameter in parameters]
        if _are_like(self._before, now):
            torch._foreach_sub_(self._before, now)
            matrices = _matrices(now) if self.needs_layers else ()
            totals = measure_each(self._before, now, [gradient.detach() for gradient in gradients], matrices)
            # Fused optimizers unscale the gradient themselves: here it is still scaled.
            scale = getattr(self._optimizer, "grad_scale", None)
            if isinstance(scale, Tensor):
                totals[2:4] /= scale.to(totals.device)
            self._measured.append(totals)

    def _make_rows(self, parameters: list[Tensor]) -> None:
        view = self._view
        size = 0 if view is None else view.size
        self._rows = (FlatRow(size), FlatRow(size), FlatRow(size))
        self._gradient_parts = [] if view is None else view.parts_of(self._rows[2], parameters)
        ends = [*itertools.accumulate([parameter.numel() for parameter in parameters])]
        self._matrix_places = [slice(([0, *ends])[index], ends[index]) for index in _matrices(parameters)]

    def _work_out(self) -> None:
        """Do the arithmetic of a small network's look: not in the look, where its code would have to be fetched."""
        if not self._is_open:
            return
        self._is_open = False
        update, weights, gradient = (row.numbers for row in self._rows)
        with np.errstate(all="ignore"):  # a diverging run overflows here; others deal with that
            update -= weights
            norms = measure_rows(update, weights, gradient)
            places = self._matrix_places if self.needs_layers else ()
            ratios = [_ratio(update[place], weights[place]) for place in places]
        self._measured.append([*norms[:2], norms[2] / self._scale, norms[3] / self._scale, *ratios])

    def pending(self) -> list[Row]:
        """What was measured since the last `collect`: rows of four, then a ratio for each layer where they are needed.

        They are tensors where they are still on a device.
        """
        self._work_out()
        return self._measured

    def forget(self) -> None:
        """Drop the weights seen last: they belong to a past that was rolled back."""
        self._before_count = -1

    def collect(self, rows: Sequence[Sequence[float]]) -> tuple[float, float, float]:
        """Summarise what was measured and begin anew.

        Args:
            rows: The values of `pending`, brought over by the caller in the same transfer as the losses.

        Returns:
            Means over the measured steps of |g|, cos(g, u) and |u| / |theta|; NaN where nothing usable was measured.
        """
        self._measured = []
        norms, cosines, ratios = [], [], []
        for update, weight, gradient, product, *_ in rows:
            if math.isfinite(gradient):
                norms.append(gradient)
            if update > 0 and gradient > 0 and math.isfinite(product):
                cosines.append(max(-1.0, min(1.0, product / update / gradient)))
            if update > 0 and weight > 0 and math.isfinite(update):
                ratios.append(update / weight)
        if self.needs_layers:
            self.layer_ratios = _spread([row[4:] for row in rows])
        return _mean(norms), _mean(cosines), _mean(ratios)

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to go on in the middle of an interval."""
        self._work_out()
        everything = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        places = {id(parameter): place for place, parameter in enumerate(everything)}
        has_copy = self._before_count == self._count[0] and all(id(parameter) in places for parameter in self._kept)
        return {
            "of": [places[id(parameter)] for parameter in self._kept] if has_copy else [],
            "found_inf": self.count_found_inf(),
            "before": [tensor.clone() for tensor in self._before] if has_copy and self._view is None else [],
            "row": torch.from_numpy(self._rows[0].numbers.copy()) if has_copy and self._view is not None else None,
            "before_count": self._before_count if has_copy else -1,
            "measured": [row if isinstance(row, list) else row.clone() for row in self._measured],
            "left": self._left,
            "is_single": self._is_single,
            "is_frozen": self.is_frozen,
            "count": list(self._count),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        self._kept = [parameters[place] for place in state["of"]]
        self._before = [kept.to(p.device, copy=True) for kept, p in zip(state["before"], self._kept, strict=False)]
        self._before_count = state["before_count"]
        self._view, self._is_open = None, False
        row = state["row"]
        if row is not None:
            view = FlatView(self._kept) if FlatView.fits(self._kept) else None
            if view is not None and view.size == row.numel():
                self._view = view
                self._make_rows(self._kept)
                self._rows[0].numbers[:] = row.numpy()
            else:
                self._before_count = -1
        device = parameters[0].device
        self._measured = [kept if isinstance(kept, list) else kept.to(device, copy=True) for kept in state["measured"]]
        self._left = state["left"]
        self._found_inf = state["found_inf"]
        self._is_single = state["is_single"]
        self.is_frozen = state["is_frozen"]
        self._count[:] = state["count"]  # the hook holds the list itself


def measure_rows(update: Floats, weights: Floats, gradient: Floats) -> list[float]:
    """[|u|, |theta|, |g|, <g, u>] of three rows of equal length."""
    squares = [float(row.dot(row)) for row in (update, weights, gradient)]
    return [*map(math.sqrt, squares), float(gradient.dot(update))]


def _are_like(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(tensors) == len(others) and all(
        [
            a.shape == b.shape and a.device == b.device and a.dtype == b.dtype
            for a, b in zip(tensors, others, strict=True)
        ]
    )


def measure_each(
    updates: Sequence[Tensor], weights: list[Tensor], gradients: list[Tensor], matrices: Sequence[int] = ()
) -> Tensor:
    """The same, tensor by tensor: for networks too large, or too mixed, to be laid end to end.

    Then |u| / |theta| of each tensor whose number is in `matrices`.
    """
    each = [gather(torch._foreach_norm(row)) for row in (list(updates), weights, gradients)]
    norms = [torch.linalg.vector_norm(row) for row in each]
    product = gather([_dot(g, u) for g, u in zip(gradients, updates, strict=True)]).sum()
    totals = torch.stack([*norms, product])
    return torch.cat([totals, (each[0] / each[1])[list(matrices)]]) if matrices else totals


def _matrices(parameters: Sequence[Tensor]) -> list[int]:
    return [index for index, parameter in enumerate(parameters) if parameter.dim() >= 2]


def _ratio(update: Floats, weights: Floats) -> float:
    whole = float(weights.dot(weights))
    return math.sqrt(float(update.dot(update)) / whole) if whole > 0 else math.nan


def _spread(rows: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Smallest, median (the lower of two) and largest of the layers' means; rows of another length are left out."""
    same = [row for row in rows if len(row) == len(rows[-1])]
    means = [_mean([ratio for ratio in column if 0 < ratio < math.inf]) for column in zip(*same, strict=True)]
    known = sorted(mean for mean in means if mean == mean)
    return (known[0], known[(len(known) - 1) // 2], known[-1]) if known else (math.nan, math.nan, math.nan)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """<a, b>; half precision is too short to add up in."""
    if a.dtype in (torch.float32, torch.float64) and a.dtype == b.dtype:
        return torch.dot(a.reshape(-1), b.reshape(-1))
    return (a.double() * b.double()).sum()


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
