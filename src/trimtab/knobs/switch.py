"""Knob of the optimizer's algorithm: SGD, Adam or AdamW, of the one object that the user's loop steps.

Called through the registry. A switch gives the living object the other class, so that `optimizer.step()`, its
`param_groups`, hooks and `state_dict` go on working for whoever holds it; docs/decisions.md says why. The param groups
keep the keys of every algorithm, so that nothing is forgotten on the way there and back.

What is carried over, with mu = momentum = betas[0], m the first and v the second moment, both bias-corrected:

    Adam -> SGD   buffer = exp_avg / (1 - mu)     an average of gradients becomes their sum, exactly
    SGD -> Adam   m = (1 - mu) buffer;  v = mean square of all gradients, measured under SGD, the same for each number

and Adam's count of steps begins at `WORTH`: bias correction is over for m, and what was measured counts in v as much as
that many steps. The rate, and AdamW's decay, are converted so that the updates are of equal size in the metric of v,

    sum v u^2 is kept:   lr_sgd / (1 - mu) = kappa lr_adam,   kappa^2 = sum v (v / (sqrt(v) + eps)^2) / sum v^2

because v stands for the curvature, so that it is the rise of the loss by noise which is kept; the plain norm would
let SGD go much further than Adam along the steepest directions. Where v is one number, Adam's first step is the one
that SGD would have taken, and it grows into its own over the next hundred. AdamW's decay is kappa times that of the
others.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from typing_extensions import override

from trimtab.errors import InputError
from trimtab.flat import gather
from trimtab.knobs.base import CategoricalKnob
from trimtab.knobs.momentum import get_momentum, set_momentum
from trimtab.run_state import Array, RunState

__all__ = ["OptimizerChoice"]

_CLASSES: dict[str, type[Optimizer]] = {"sgd": SGD, "adam": Adam, "adamw": AdamW}
_NAMES = {kind: name for name, kind in _CLASSES.items()}
WORTH = 100  # steps: v forgets its warm start over about as many, slowly enough that nothing jumps
MEASURE_EVERY = 10  # optimizer steps of SGD between two looks at the squared gradients, after the first ten
_NEWEST = 0.1  # weight of the newest look
# What the formulas above do not hold for.
_REFUSED = ("nesterov", "dampening", "amsgrad", "capturable", "differentiable")


class OptimizerChoice(CategoricalKnob):
    """The algorithm of a `torch.optim.SGD`, `Adam` or `AdamW`; no other class, and none derived from these.

    It acts at the next `optimizer.step()`. The rate is converted at a switch, which the controller records as a second
    decision, so "lr" has to be among the knobs; so is the weight decay where AdamW is entered or left.

    Args:
        choices: Algorithms that a controller may choose from; the one found must be among them.
    """

    name = "optimizer"
    known = ("sgd", "adam", "adamw")
    moves_rate = True

    def __init__(self, choices: Sequence[str] = ("sgd", "adam", "adamw")) -> None:
        super().__init__(choices)
        self._written = 0
        self._squares = _Squares()

    @override
    def bind(self, state: RunState) -> Array:
        optimizer = state.optimizer
        name = _name(optimizer)
        if name is None:
            raise InputError(
                f"the knob 'optimizer' cannot act on a {type(optimizer).__name__}; expected torch's own SGD, Adam or "
                "AdamW; leave it out"
            )
        if name not in self.choices:
            raise InputError(f"optimizer: {name!r} is in use, which is not among the choices {list(self.choices)}")
        for index, group in enumerate(optimizer.param_groups):
            for key in _REFUSED:
                if group.get(key):
                    raise InputError(
                        f"the knob 'optimizer' cannot carry over {key}={group[key]!r} of param group {index}; make the "
                        f"optimizer without {key}"
                    )
        if found := _wrapper(optimizer):
            raise InputError(f"the knob 'optimizer' cannot act: {found}; remove it")
        for choice in self.choices:  # so that other knobs find what they move, whatever the algorithm now
            _add_keys(optimizer, _CLASSES[choice])
        self._squares.watch(optimizer)
        self._written = self.choices.index(name)
        return np.array([float(self._written)])

    @override
    def get(self, state: RunState) -> float:
        name = _name(state.optimizer)
        return float(self.choices.index(name)) if name in self.choices else -1.0

    @override
    def put(self, state: RunState, value: float) -> None:
        self._written = int(value)
        name = self.choices[self._written]
        if _name(state.optimizer) != name:
            self._switch(state.optimizer, name)
            self.has_touched_state = True

    @override
    def find_conflict(self, state: RunState) -> str | None:
        if found := _wrapper(state.optimizer):
            return found
        wanted = self.choices[self._written]
        if _name(state.optimizer) == wanted:
            return None
        return f"the optimizer is a {type(state.optimizer).__name__} where {wanted!r} was written"

    @override
    def consequences(self, state: RunState, before: float, now: float) -> Mapping[str, float]:
        old, new = self.choices[int(before)], self.choices[int(now)]
        optimizer = state.optimizer
        kappa = None if old == new else self._kappa(optimizer)
        if kappa is None:
            return {}
        share = 1 - float(get_momentum(optimizer, optimizer.param_groups[0]))
        factors = {}
        if old == "sgd":
            factors["lr"] = 1 / (share * kappa)
        elif new == "sgd":
            factors["lr"] = share * kappa
        if any(group["weight_decay"] > 0 for group in optimizer.param_groups) and "adamw" in (old, new):
            factors["weight_decay"] = kappa if new == "adamw" else 1 / kappa
        return factors

    @override
    def take_along(self, state: RunState, name: str, factor: float) -> None:
        for group in state.optimizer.param_groups:
            group[name] = group[name] * factor

    @torch.no_grad()
    def _kappa(self, optimizer: Optimizer) -> float | None:
        """See the head of this file; None where nothing is known of the squared gradients."""
        above, below = 0.0, 0.0
        for group in optimizer.param_groups:
            eps = float(group.get("eps", 1e-8))
            for parameter in group["params"]:
                square = self._square(optimizer, group, parameter)
                if square is not None:
                    count = parameter.numel() / square.numel()
                    scaled = square / (square.sqrt() + eps) ** 2
                    above += count * float((square * scaled).sum())
                    below += count * float((square * square).sum())
        return math.sqrt(above / below) if above > 0 and below > 0 and math.isfinite(above / below) else None

    def _square(self, optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> Tensor | None:
        """Second moment of a parameter, bias-corrected, in double precision: of each number, or one for all of them."""
        entry = optimizer.state.get(parameter, {})
        if "exp_avg_sq" not in entry:
            mean = self._squares.known()
            return None if mean is None else torch.tensor(mean, dtype=torch.float64)
        steps = float(entry["step"])
        return entry["exp_avg_sq"].double() / (1 - group["betas"][1] ** steps) if steps > 0 else None

    @torch.no_grad()
    def _switch(self, optimizer: Optimizer, name: str) -> None:
        old = [float(get_momentum(optimizer, group)) for group in optimizer.param_groups]
        optimizer.__class__ = _CLASSES[name]
        optimizer._patch_step_function()  # torch puts the calls of hooks into a class when one is first made of it
        _add_keys(optimizer, _CLASSES[name])
        for group in [optimizer.defaults, *optimizer.param_groups]:
            if "decoupled_weight_decay" in group:  # by which newer versions of torch tell AdamW from Adam
                group["decoupled_weight_decay"] = name == "adamw"
        # Not where a state was loaded, which is of the new algorithm already: what was measured belongs to it.
        is_live = name == "sgd" and any("exp_avg" in entry for entry in optimizer.state.values())
        for group, momentum in zip(optimizer.param_groups, old, strict=True):
            set_momentum(group, momentum)
            for parameter in group["params"]:
                convert = _to_sgd if name == "sgd" else self._to_adam
                convert(optimizer, group, parameter, momentum)
        if any(group.get("fused") for group in optimizer.param_groups):
            for flag in ("_step_supports_amp_scaling", "_need_device_dtype_check_for_fused"):
                setattr(optimizer, flag, True)
        if is_live:
            self._squares.restart()

    def _to_adam(self, optimizer: Optimizer, group: dict[str, Any], parameter: Tensor, momentum: float) -> None:
        entry, square = optimizer.state.get(parameter, {}), self._squares.known()
        if "exp_avg" in entry:  # from Adam to AdamW or back; or the state was loaded before this knob's
            return
        buffer = entry.pop("momentum_buffer", None)
        if momentum == 0:  # what is left there is of before the momentum was lowered to 0
            buffer = None
        if square is None or (buffer is None and momentum > 0):  # no gradient was ever seen: Adam begins by itself
            optimizer.state.pop(parameter, None)
            return
        beta2 = group["betas"][1]
        mean = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        if buffer is not None:
            mean.copy_(buffer).mul_((1 - momentum) * (1 - momentum**WORTH))
        optimizer.state[parameter] = {
            "step": _count(group, parameter, WORTH),
            "exp_avg": mean,
            "exp_avg_sq": torch.full_like(parameter, square * (1 - beta2**WORTH), memory_format=torch.preserve_format),
        }

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"written": self._written, **self._squares.state_dict()}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._written = state["written"]
        self._squares.load_state_dict(state)


def _to_sgd(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor, momentum: float) -> None:
    entry = optimizer.state.get(parameter, {})
    # SGD counts no steps. But an Adam that a resumed run was made with takes no state without a count, even where this
    # knob will make an SGD of it in a moment.
    steps = entry.get("step", _count(group, parameter, 0))
    if "exp_avg" in entry:
        mean = entry["exp_avg"]
        optimizer.state[parameter] = {"step": steps}
        if momentum > 0:
            optimizer.state[parameter]["momentum_buffer"] = mean.div_(1 - momentum)
    elif "step" not in entry:
        optimizer.state[parameter] = {"step": steps, **entry}


def _count(group: dict[str, Any], parameter: Tensor, steps: int) -> Tensor:
    """A count of steps as Adam keeps it."""
    if group.get("fused"):
        return torch.tensor(float(steps), dtype=torch.float32, device=parameter.device)
    is_double = torch.get_default_dtype() == torch.float64
    return torch.tensor(float(steps), dtype=torch.float64 if is_double else torch.float32)


class _Squares:
    """Mean square of all numbers of the gradient, looked at now and then before the steps of an SGD.

    Attributes:
        mean: It, in double precision on the gradients' device; None before the first look.
    """

    def __init__(self) -> None:
        self.mean: Tensor | None = None
        self._n_steps = 0
        self._n_looks = 0

    def watch(self, optimizer: Optimizer) -> None:
        """Look at the coming steps of this optimizer for as long as somebody holds this object."""
        me = weakref.ref(self)

        def hook(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
            squares = me()
            if squares is not None and optimizer.__class__ is SGD:
                squares._n_steps += 1
                if squares._n_steps <= MEASURE_EVERY or squares._n_steps % MEASURE_EVERY == 0:
                    squares._look(optimizer)

        optimizer.register_step_pre_hook(hook)

    def restart(self) -> None:
        """What is known is old: the next look takes its place."""
        self._n_steps = self._n_looks = 0

    @torch.no_grad()
    def _look(self, optimizer: Optimizer) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        given = [p.grad for p in parameters if p.grad is not None and not p.grad.is_sparse]
        if not given:
            return
        norms = gather(torch._foreach_norm(given))
        device = norms.device
        new = norms.square().sum() / sum([gradient.numel() for gradient in given])
        scale = getattr(optimizer, "grad_scale", None)
        if isinstance(scale, Tensor):  # a fused optimizer takes a gradient scaler's scale out by itself, after this
            new = new / scale.to(new) ** 2
        kept = new if self.mean is None else self.mean.to(device)
        self._n_looks += 1
        mixed = torch.lerp(kept, new, max(_NEWEST, 1 / self._n_looks))
        self.mean = torch.where(mixed.isfinite(), mixed, torch.where(new.isfinite(), new, kept))

    def known(self) -> float | None:
        """The mean, waiting for its device; None where there is none of use."""
        mean = math.nan if self.mean is None else float(self.mean)
        return mean if math.isfinite(mean) else None

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.known(), "n_steps": self._n_steps, "n_looks": self._n_looks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        mean = state["mean"]
        self.mean = None if mean is None else torch.tensor(mean, dtype=torch.float64)
        self._n_steps, self._n_looks = state["n_steps"], state["n_looks"]


def _add_keys(optimizer: Optimizer, kind: type[Optimizer]) -> None:
    """Give every param group, and those added later, the settings that a class reads, at its defaults."""
    for key, value in kind([torch.zeros(1)], lr=1.0).defaults.items():  # type: ignore[call-arg]
        for group in [optimizer.defaults, *optimizer.param_groups]:
            group.setdefault(key, value)


def _name(optimizer: Optimizer) -> str | None:
    return _NAMES.get(type(optimizer))


def _wrapper(optimizer: Optimizer) -> str | None:
    """What stands in front of the class's own `step`, which would go on calling the old one."""
    if "step" not in vars(optimizer):
        return None
    return "optimizer.step was replaced on this very object, as torch's own schedulers and torch.compile do"
