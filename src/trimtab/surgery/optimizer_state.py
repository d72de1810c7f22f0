"""What an optimizer keeps for parameters that are replaced, added or taken away.

Called by `surgeon`. State follows the gradient that it is made of: where k units share the work of one, each gets 1/k
of the gradient of what makes it (momentum / k, second moment / k^2), and the gradient of what reads a unit is the same
for every copy (state copied as it is). `.grad` is treated as a first moment. docs/surgery.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from trimtab.errors import InputError
from trimtab.surgery.units import Share

__all__ = ["Before", "OptimizerState", "check_optimizer"]

# State tensors of a parameter's shape, by the power of the gradient that they hold.
_MOMENTS = {"momentum_buffer": 1, "exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}
_ADVICE = "surgery knows SGD (with momentum), Adam and AdamW, and optimizers that keep the same"


def check_optimizer(optimizer: Optimizer, model: nn.Module) -> None:
    """Refuse an optimizer that keeps, for any parameter, what surgery does not know how to carry over.

    Raises:
        InputError: Naming the optimizer and what it keeps; or it has none of the network's parameters.
    """
    owned = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in owned for group in optimizer.param_groups for parameter in group["params"]):
        raise InputError(
            f"{type(optimizer).__name__} has none of the parameters of {type(model).__name__}; give the optimizer that "
            "trains this network, made after it was moved to its device"
        )
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.ndim > 0 and key not in _MOMENTS:
                raise InputError(f"{type(optimizer).__name__} keeps {key!r} for its parameters; {_ADVICE}")
            if key in _MOMENTS and isinstance(value, Tensor) and value.shape != parameter.shape:
                raise InputError(
                    f"{type(optimizer).__name__} keeps a {key!r} of shape {tuple(value.shape)} for a parameter of "
                    f"{tuple(parameter.shape)}; load a state that belongs to these parameters"
                )


class OptimizerState:
    """Changes of one optimizer that can be taken back.

    Args:
        optimizer: None where there is none; every method then does nothing.
    """

    def __init__(self, optimizer: Optimizer | None) -> None:
        self.optimizer = optimizer

    def snapshot(self) -> Callable[[], None]:
        """What puts groups and state back to where they are now; tensors are not copied, since none is written to."""
        if self.optimizer is None:
            return lambda: None
        optimizer = self.optimizer
        groups = [
            (group, list(group["params"]), list(group.get("param_names", []))) for group in optimizer.param_groups
        ]
        state = dict(optimizer.state)

        def restore() -> None:
            for group, parameters, names in groups:
                group["params"][:] = parameters
                if "param_names" in group:
                    group["param_names"][:] = names
            optimizer.state.clear()
            optimizer.state.update(state)

        return restore

    def replace(self, old: nn.Parameter, new: nn.Parameter, follow: Callable[[Tensor, Share], Tensor]) -> None:
        """Put a new parameter in the old one's place, its state and `.grad` following.

        Args:
            old: Left as it is.
            new: The same, changed.
            follow: (tensor of the old shape, how the gradient's share in it is) -> tensor of the new shape.
        """
        if old.grad is not None:
            new.grad = follow(old.grad, "divided")
        if self.optimizer is None:
            return
        for group in self.optimizer.param_groups:
            group["params"][:] = [new if parameter is old else parameter for parameter in group["params"]]
        if old in self.optimizer.state:
            state = self.optimizer.state.pop(old)
            self.optimizer.state[new] = {key: _followed(key, value, follow) for key, value in state.items()}

    def insert(self, new: nn.Parameter, twin: nn.Parameter | None, after: Sequence[nn.Parameter]) -> None:
        """Put a new parameter into the group of its twin, behind the last of those in `after` there, without state.

        So the order in a group stays that of `model.parameters()`, and a fresh optimizer of a network that was changed
        in the same way has it too. A parameter whose twin the optimizer does not have is left out.
        """
        if self.optimizer is None or twin is None:
            return
        for group in self.optimizer.param_groups:
            places = {id(parameter): place for place, parameter in enumerate(group["params"])}
            if id(twin) in places:
                at = 1 + max(places[id(parameter)] for parameter in (twin, *after) if id(parameter) in places)
                group["params"].insert(at, new)
                if "param_names" in group:
                    group["param_names"].insert(at, "")
        count = self.optimizer.state.get(twin, {}).get("step")
        if type(self.optimizer) is SGD and isinstance(count, Tensor):  # it was an Adam, into which its state has to fit
            self.optimizer.state[new] = {"step": torch.zeros_like(count)}

    def remove(self, gone: Iterable[nn.Parameter]) -> None:
        """Take parameters and their state out; a group that becomes empty stays, with its options."""
        if self.optimizer is None:
            return
        ids = {id(parameter) for parameter in gone}
        for group in self.optimizer.param_groups:
            kept = [place for place, parameter in enumerate(group["params"]) if id(parameter) not in ids]
            group["params"][:] = [group["params"][place] for place in kept]
            if "param_names" in group:
                group["param_names"][:] = [group["param_names"][place] for place in kept]
        for parameter in [p for p in self.optimizer.state if id(p) in ids]:
            del self.optimizer.state[parameter]

    def rename(self, model: nn.Module) -> None:
        """Names that the optimizer was given with its parameters follow the network's."""
        if self.optimizer is None:
            return
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for group in self.optimizer.param_groups:
            if "param_names" in group:
                old = zip(group["params"], group["param_names"], strict=True)
                group["param_names"][:] = [names.get(id(parameter), name) for parameter, name in old]


class Before:
    """What stands in front of a layer in a network's order of parameters, for one whose own group nothing tells.

    Args:
        model: The network.
        layer: In it.

    Attributes:
        parameters: In the network's order.
        weight: The last matrix of them.
        bias: The last vector of them, else the matrix.

    Raises:
        InputError: There is no matrix among them.
    """

    def __init__(self, model: nn.Module, layer: nn.Module) -> None:
        own = {id(parameter) for parameter in layer.parameters()}
        self.parameters = list(takewhile(lambda parameter: id(parameter) not in own, model.parameters()))
        self.weight = next((p for p in reversed(self.parameters) if p.ndim > 1), None)
        if self.weight is None:
            raise InputError(
                "no layer can be put in where the network's first one, in the order of its parameters, was taken out: "
                "there is none whose group of the optimizer it could join"
            )
        self.bias = next((p for p in reversed(self.parameters) if p.ndim == 1), self.weight)


def _followed(key: str, value: Any, follow: Callable[[Tensor, Share], Tensor]) -> Any:
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    return follow(value, "divided" if _MOMENTS[key] == 1 else "divided_twice")
