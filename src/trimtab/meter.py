"""Meter: what is measured between two decisions, and brought over from the device in one transfer.

Called by the controller. A loss on a device stays there until `measure`; gradient statistics come from the probe.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from trimtab.errors import InputError
from trimtab.gradients import GradientProbe
from trimtab.run_state import Interval

__all__ = ["Meter", "to_number"]

_NO_LOSS = "step() needs the loss of the step just taken, one number; got {}"


class Meter:
    """Collects losses, validation and gradient statistics of the interval under way.

    Args:
        optimizer: Whose steps are measured.

    Attributes:
        probe: Looks at the gradients in the optimizer's steps.
        val_loss: Newest validation loss of the interval; NaN where there is none.
        accuracy: Newest validation accuracy of the interval; NaN where there is none.
        needs_spread: Whether the standard deviation of the losses is asked for.
        last_losses: Train losses of the second half of the interval measured last.
        first_loss: Train loss of its first step.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self.probe = GradientProbe(optimizer)
        self.val_loss = self.accuracy = math.nan
        self.needs_spread = False
        self.last_losses: list[float] = []
        self.first_loss = math.nan
        self._losses: list[Tensor | float] = []

    def add(self, loss: object) -> None:
        """Take in the train loss of a step, without waiting for its device.

        Raises:
            InputError: It is not one number.
        """
        if isinstance(loss, Tensor):
            scalar = loss if loss.dim() == 0 else _to_scalar(loss)
            # A copy: the caller may reuse the memory, as loops do that add up micro-batches in one tensor.
            self._losses.append(float(scalar.item()) if _is_near(scalar) else scalar.detach().clone())
        else:
            self._losses.append(to_number(loss, _NO_LOSS.format(repr(loss))))

    def measure(self, health: Tensor | float) -> tuple[Interval, float]:
        """Sum the interval up and begin the next.

        Args:
            health: A number to be brought over in the same transfer, if it lies on a device.

        Returns:
            The interval, and `health` as a plain number.
        """
        rows = self.probe.pending()
        parts = [row for row in rows if isinstance(row, Tensor)]
        losses = [loss for loss in self._losses if not isinstance(loss, Tensor)]
        if parts or isinstance(health, Tensor) or len(losses) < len(self._losses):
            losses, rows, health = self._bring(parts, rows, health)
        count, half = len(losses), max(1, len(losses) // 2)
        early, late = sum(losses[:half]), sum(losses[half:])
        mean = (early + late) / count
        interval = Interval(
            mean,
            early / half,
            late / (count - half) if count > half else math.nan,
            self.val_loss,
            self.accuracy,
            *self.probe.collect([row for row in rows if isinstance(row, list)]),
            _spread(losses, mean) if self.needs_spread else math.nan,
            *self.probe.layer_ratios,
            float(count),
        )
        self.first_loss, self.last_losses = losses[0], losses[half:]
        self._losses = []
        self.val_loss = self.accuracy = math.nan
        return interval, float(health)

    def _bring(
        self, parts: list[Tensor], rows: list[Tensor | list[float]], health: Tensor | float
    ) -> tuple[list[float], list[Tensor | list[float]], float]:
        """Losses, rows and health as plain numbers, in one transfer; what lies elsewhere is moved there first."""
        ends = [*itertools.accumulate([len(row) for row in parts])]
        on_device = [loss for loss in self._losses if isinstance(loss, Tensor)]
        parts += [torch.stack(on_device).view(-1)] if on_device else []
        parts += [health] if isinstance(health, Tensor) else []
        device = parts[0].device
        values = torch.cat([part if part.device == device else part.to(device) for part in parts]).tolist()
        brought = iter(values[ends[-1] if ends else 0 :])
        losses = [next(brought) if isinstance(loss, Tensor) else loss for loss in self._losses]
        measured = iter([values[start:end] for start, end in zip([0, *ends], ends, strict=False)])
        plain: list[Tensor | list[float]] = [next(measured) if isinstance(row, Tensor) else row for row in rows]
        return losses, plain, values[-1] if isinstance(health, Tensor) else health

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on in the middle of an interval."""
        return {
            "losses": [loss.clone() if isinstance(loss, Tensor) else loss for loss in self._losses],
            "val_loss": self.val_loss,
            "accuracy": self.accuracy,
            "last_losses": list(self.last_losses),
            "first_loss": self.first_loss,
            "probe": self.probe.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        device = next(p.device for group in self._optimizer.param_groups for p in group["params"])
        self._losses = [loss.to(device, copy=True) if isinstance(loss, Tensor) else loss for loss in state["losses"]]
        self.val_loss, self.accuracy = state["val_loss"], state["accuracy"]
        self.last_losses, self.first_loss = list(state["last_losses"]), state["first_loss"]
        self.probe.load_state_dict(state["probe"])


def _spread(losses: list[float], mean: float) -> float:
    """Standard deviation, as of a whole population."""
    return math.sqrt(sum([(loss - mean) * (loss - mean) for loss in losses]) / len(losses))


def _is_near(loss: Tensor) -> bool:
    """Whether a loss can be read without waiting for a device; reading it is a few us cheaper than copying it."""
    return loss.is_cpu


def to_number(value: object, wrong: str) -> float:
    """The value as a float.

    Raises:
        InputError: It is not one number; `wrong` is the message.
    """
    if not isinstance(value, (str, bool)):
        try:
            return float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, RuntimeError):
            pass
    raise InputError(wrong)


def _to_scalar(loss: Tensor) -> Tensor:
    if loss.numel() != 1:
        raise InputError(_NO_LOSS.format(f"a tensor of shape {tuple(loss.shape)}"))
    return loss.detach().reshape(())
