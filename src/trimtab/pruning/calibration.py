"""Calibration: batch-norm statistics of a cut network, taken anew.

Called by the networks that are pruned, at the end of a cut. A layer behind one that has lost units sees other numbers
than those that its running statistics are of, and a deep network with old statistics guesses, whatever its widths: all
configurations of ResNet-18 at a quarter of its FLOPs scored 10 % of ten classes, and a search had nothing to go by.
Source: adaptive batch normalization of EagleEye (Li et al. 2020, arXiv:2007.02491). Only inputs are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["SAMPLES", "has_statistics", "recalibrate"]

SAMPLES = 1024  # that are enough for means and variances of units

_Batch = tuple[Tensor, ...]


def has_statistics(model: nn.Module) -> bool:
    """Whether a network has batch-norm layers with running statistics."""
    return bool(_layers(model))


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Sequence[_Batch]) -> None:
    """Take the running statistics anew, in place: plain means over the batches; all else is as in evaluation.

    Args:
        model: In evaluation, and left so.
        batches: Positional arguments of the forward, of more than one sample each.
    """
    layers = _layers(model)
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # torch's word for a plain mean
        layer.train()
    for batch in batches:
        model(*(tensor.clone() for tensor in batch))  # a forward may work on its inputs in place
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()


def _layers(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    found = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return [module for module in found if module.track_running_stats and module.running_mean is not None]
