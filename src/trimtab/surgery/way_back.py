"""Way back: what a network's shape was before a change, so that the change can be taken out again much later.

Called by `surgeon`. An undo right after a failed change puts the old tensors back; here only shapes are kept, so that
the memory of a long run does not grow with its changes. What was replaced comes back as zeros, for a state to be loaded
into.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trimtab.surgery.layers import set_module
from trimtab.surgery.units import Copies

__all__ = ["History", "WayBack"]


@dataclass(frozen=True)
class _Like:
    """A tensor's shape and kind, without its numbers."""

    shape: torch.Size
    is_parameter: bool
    requires_grad: bool
    marks: dict[str, Any]

    def make(self, beside: Tensor) -> Tensor:
        new = torch.zeros(self.shape, dtype=beside.dtype, device=beside.device)
        if not self.is_parameter:
            return new
        parameter = nn.Parameter(new, requires_grad=self.requires_grad)
        parameter.__dict__.update(self.marks)
        return parameter


@dataclass
class WayBack:
    """What one change replaced.

    Attributes:
        groups: Names of the parameters in each of the optimizer's groups before the change; None without an optimizer.
            A parameter that the network has not stands there itself.
        copies: Which units were copies of which before it.
    """

    groups: list[list[str | Tensor]] | None
    copies: Mapping[nn.Module, list[int]]
    _modules: list[tuple[str, nn.Module]] = field(default_factory=list)
    _attributes: list[tuple[nn.Module, str, Any]] = field(default_factory=list)

    @classmethod
    def before(cls, model: nn.Module, optimizer: Optimizer | None, copies: Mapping[nn.Module, Copies]) -> WayBack:
        """Note what is there before a change."""
        groups: list[list[str | Tensor]] | None = None
        if optimizer is not None:
            names = {id(parameter): name for name, parameter in model.named_parameters()}
            groups = [[names.get(id(p), p) for p in group["params"]] for group in optimizer.param_groups]
        return cls(groups, {module: list(kept.sources) for module, kept in copies.items()})

    def note_module(self, name: str, old: nn.Module) -> None:
        """A module is about to be replaced under its name."""
        self._modules.append((name, old))

    def note_attribute(self, module: nn.Module, attribute: str, old: Any) -> None:
        """A parameter, a buffer or a size of a module is about to be replaced."""
        if isinstance(old, Tensor):
            is_parameter = isinstance(old, nn.Parameter)
            old = _Like(old.shape, is_parameter, old.requires_grad, dict(old.__dict__) if is_parameter else {})
        self._attributes.append((module, attribute, old))

    def go(self, model: nn.Module, optimizer: Optimizer | None) -> dict[nn.Module, Copies]:
        """Give network and optimizer the shape of before; state of what was replaced is dropped.

        Returns:
            The copies of before.
        """
        for name, module in reversed(self._modules):
            set_module(model, name, module)
        for module, attribute, old in reversed(self._attributes):
            setattr(module, attribute, old.make(getattr(module, attribute)) if isinstance(old, _Like) else old)
        for module in dict.fromkeys(module for module, _, _ in self._attributes):
            if isinstance(module, nn.RNNBase):
                module.flatten_parameters()
        if optimizer is not None and self.groups is not None:
            parameters = dict(model.named_parameters())
            for group, names in zip(optimizer.param_groups, self.groups, strict=False):
                group["params"][:] = [parameters[name] if isinstance(name, str) else name for name in names]
                if "param_names" in group:
                    group["param_names"][:] = [name if isinstance(name, str) else "" for name in names]
            there = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            for parameter in [p for p in optimizer.state if id(p) not in there]:
                del optimizer.state[parameter]
        return {module: Copies(sources) for module, sources in self.copies.items()}


class History:
    """What became of a network, for a surgeon that is made later. It must not hold the network itself.

    Args:
        model: As it is now.
        plan: Changes so far.
        ways: The way back over each.
        copies: Which units are copies of which.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: list[dict[str, Any]],
        ways: Sequence[WayBack],
        copies: Mapping[nn.Module, list[int]],
    ) -> None:
        self._plan, self.ways, self.copies = plan, list(ways), copies
        self._shapes = _shapes(model)

    @property
    def plan(self) -> list[dict[str, Any]]:
        """A copy of it."""
        return [dict(entry, units=list(entry["units"])) for entry in self._plan]

    def fits(self, model: nn.Module) -> bool:
        """Whether the network still has the shape of then."""
        return _shapes(model) == self._shapes


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}
