"""WeightAverage: a running average of the weights over the last part of a run, however long the run turns out to be.

Called by the controller. A decaying rate averages the noise of the last steps away by taking ever smaller ones; an
average does so whatever the rate is. Of weights w_i looked at after t_i steps, up to t:

    average = sum_i w_i ((t_i / t)^10 - (t_(i-1) / t)^10)
    and step by step: average += (w - average) (1 - (t_previous / t)^10)

an exponential average in log t: half of the weight lies on the last 7 % of the run so far, nine tenths on the last
21 %. No horizon has to be known for it. Source: polynomial-decay averaging of Shamir & Zhang 2013 (arXiv:1212.1824).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.swa_utils import update_bn

from trimtab.errors import InputError

__all__ = ["DECAY", "WeightAverage"]

DECAY = 10.0
_LOOKS = 100  # one look for each 1/100 of the steps so far: noise of neighbouring steps is alike, and a look costs


class WeightAverage:
    """Average of an optimizer's parameters.

    Args:
        optimizer: Whose parameters are averaged; a group added later begins the average anew.
        model: Into which the average is put to be looked at.
        total_steps: Planned optimizer steps; the first half is not looked at, it would not count. None looks from
            the first step on.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, total_steps: int | None = None) -> None:
        self._optimizer = optimizer
        self._model = model
        self._average: list[Tensor] = []
        self._sources: list[Tensor] = []
        self._last: float = 0  # optimizer steps at the last look; 0 before the first
        self.next_look: float = 1 if total_steps is None else max(1, total_steps // 2)

    @property
    def is_there(self) -> bool:
        """Whether anything was looked at yet."""
        return self._last > 0

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    def look(self, t: float) -> None:
        """Take in the weights as they are after t optimizer steps; to be called when t reaches `next_look`.

        Where the cost of a step changes, t is what of the budget is spent.
        """
        sources = self._parameters()
        if not self._last or [*map(id, sources)] != [*map(id, self._sources)]:
            self._average = [source.detach().clone() for source in sources]
            self._sources = sources
        else:
            with torch.no_grad():
                torch._foreach_lerp_(self._average, sources, 1.0 - (self._last / t) ** DECAY)
        self._last = t
        self.next_look = t + max(1, t // _LOOKS)

    def restart(self) -> None:
        """Forget what was averaged, because the run went back to other weights; the next look begins anew."""
        self._last = 0

    @contextmanager
    def applied(self, batches: Iterable[Any] | None = None) -> Iterator[None]:
        """The model with the average as its weights, for a while.

        Args:
            batches: Inputs, or tuples that begin with them, to measure the statistics of batch norm with; those that
                the run kept are of other weights. Needed if the model has batch norm.

        Raises:
            InputError: Nothing is averaged yet, or `batches` is missing.
        """
        if not self.is_there:
            raise InputError(
                f"there is no average of the weights yet: the first look is after optimizer step {self.next_look}"
            )
        norms = [module for module in self._model.modules() if isinstance(module, _BatchNorm)]
        has_statistics = any(norm.running_mean is not None for norm in norms)
        if has_statistics and batches is None:
            raise InputError(
                "the model has batch norm, whose statistics are those of other weights than the average; give batches "
                "of train inputs to measure them with: averaged(batches)"
            )
        buffers = [buffer for norm in norms for buffer in norm.buffers()]
        kept = [tensor.detach().clone() for tensor in (*self._sources, *buffers)]
        try:
            _put(self._sources, self._average)
            if has_statistics and batches is not None:
                _measure_statistics(self._model, norms, batches)
            yield
        finally:
            _put([*self._sources, *buffers], kept)

    def state_dict(self) -> dict[str, Any]:
        """The average, and how far it is."""
        return {
            "average": [tensor.clone() for tensor in self._average] if self._last else [],
            "last": self._last,
            "next_look": self.next_look,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`, for the same parameters.

        Raises:
            InputError: The state is of other parameters.
        """
        sources = self._parameters()
        if state["last"]:
            shapes = [tuple(tensor.shape) for tensor in state["average"]]
            if shapes != [tuple(source.shape) for source in sources]:
                raise InputError(f"this state has an average of parameters {shapes}; the optimizer has others")
        pairs = zip(sources, state["average"], strict=False)
        self._average = [tensor.to(source.device, copy=True) for source, tensor in pairs]
        self._sources = sources
        self._last, self.next_look = state["last"], state["next_look"]


@torch.no_grad()
def _put(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


def _measure_statistics(model: nn.Module, norms: Sequence[_BatchNorm], batches: Iterable[Any]) -> None:
    """Batch norm's running statistics from these batches; dropout draws nothing that the run would miss.

    Raises:
        InputError: There is no batch.
    """
    momenta = [norm.momentum for norm in norms]
    modes = [(module, module.training) for module in model.modules()]
    n_batches = 0

    def counted() -> Iterator[Any]:
        nonlocal n_batches
        for batch in batches:
            n_batches += 1
            yield batch

    devices = {parameter.device.index for parameter in model.parameters() if parameter.device.type == "cuda"}
    try:
        with torch.random.fork_rng([index for index in devices if index is not None]):
            update_bn(counted(), model)
    finally:
        # What torch leaves behind where a forward pass fails, or where modes of parts differ.
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, is_training in modes:
            module.training = is_training
    if not n_batches:
        raise InputError("averaged(batches) was given no batch; expected some of the train inputs")
