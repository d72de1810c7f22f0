"""What knobs of the network's shape have in common: units per layer, and hidden layers, of a network that is training.

Called by those knobs and by the hand. Both knobs work through one `trimtab.surgery.Surgeon` of the run, which changes
network and optimizer together; docs/surgery.md says what is preserved. Parameters that change are new objects: whoever
holds them is told by `has_touched_state`, and the controller lets go of what it held.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from trimtab.cost import Cost
from trimtab.errors import InputError
from trimtab.knobs.base import Knob
from trimtab.run_state import Array, RunState
from trimtab.surgery import Surgeon

__all__ = ["StructuralKnob", "Structure", "cost_change", "structure_of", "tree_of"]

_OPTIMIZERS = ("SGD", "Adam", "AdamW", "NAdam", "RAdam")  # those of torch whose state surgery knows


class Structure:
    """What the structural knobs of one run share.

    Args:
        surgeon: Of the run's model and optimizer.

    Attributes:
        surgeon: See above.
        kept: Modules that a knob reads its value from: they are not taken out.
    """

    def __init__(self, surgeon: Surgeon) -> None:
        self.surgeon = surgeon
        self.kept: set[nn.Module] = set()


class StructuralKnob(Knob):
    """A knob that puts other parameters into the model, and other layers.

    Its state holds the plan of all changes, so that a network of the original shape follows it.
    """

    is_whole = True
    changes_shape = True

    def __init__(self, low: float, high: float) -> None:
        super().__init__(low, high)
        if low < 1:
            raise InputError(f"{self.name}: bounds [{low}, {high}]; expected 1 or more")
        self._structure: Structure | None = None
        self._pending: dict[str, Any] | None = None  # a loaded state that the network has not followed yet
        self._version = -1  # of the surgeon, when its groups were looked at last
        self._seen: list[tuple[str, nn.Module]] = []  # the model's modules when they were last found as they should be
        self._written = 0

    @property
    def _surgeon(self) -> Surgeon:
        if self._structure is None:
            raise InputError(f"the knob {self.name!r} is not bound to a run; call bind first")
        return self._structure.surgeon

    @override
    def check_values(self, values: Any) -> Array:
        checked = super().check_values(values)
        if checked[0] < 1:
            raise InputError(f"{self.name}: got {float(checked[0])!r}; expected a whole number of 1 or more")
        return checked

    @override
    def put(self, state: RunState, value: float) -> None:
        """Make the change, which takes as long as a few training steps and waits for the device."""
        self.reshape(state)
        self._look()
        self.cost = None
        surgeon, number = self._surgeon, int(value)
        if not self._is_at(number):
            before = surgeon.cost
            with surgeon.together():
                self._change(number)
                after = surgeon.cost  # a network that fails now is put back
            self.cost = cost_change(before, after)
            self.has_touched_state = True
        self._written = number
        self._look()

    def adopt(self, state: RunState) -> float:
        """Take over the value that the surgeon has left in the network, and return it."""
        self._look()
        self._written = int(self.get(state))
        return float(self._written)

    @override
    def reshape(self, state: RunState) -> None:
        if self._pending is not None:
            self._surgeon.follow(self._pending["plan"])
            pending, self._pending = self._pending, None
            self._restore(pending)
            self._written = pending["written"]
            self._version = -1
            self._look()

    @override
    def find_conflict(self, state: RunState) -> str | None:
        if self._pending is not None:
            return None
        self._look()
        modules = tree_of(self._surgeon.model)
        if modules != self._seen:  # most often nobody has touched them
            if (found := self._find_other()) is not None:
                return found
            self._seen = modules
        return self._find_other_size()

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._pending is not None:
            return copy.deepcopy(self._pending)
        if self._structure is None:
            return {"written": 0, "plan": None}
        self._look()
        return {"written": self._written, **self._own_state(), "plan": self._surgeon.plan}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._pending = copy.deepcopy(state) if state["plan"] is not None else None

    def _look(self) -> None:
        """Take in what the surgeon has changed since the last look, for whichever knob."""
        surgeon = self._surgeon
        if self._version != surgeon.version:
            self._take_in(surgeon)
            self._version, self._seen = surgeon.version, []

    def _module_of(self, name: str) -> nn.Module | None:
        """What stands in the live model under a name; None where nothing does."""
        try:
            return self._surgeon.model.get_submodule(name)
        except AttributeError:
            return None

    @abstractmethod
    def _take_in(self, surgeon: Surgeon) -> None:
        """Look at the network's groups and layers anew."""

    @abstractmethod
    def _is_at(self, value: int) -> bool:
        """Whether the network has this value already."""

    @abstractmethod
    def _change(self, value: int) -> None:
        """Give the network this value."""

    @abstractmethod
    def _find_other(self) -> str | None:
        """What somebody else has changed among the modules."""

    def _find_other_size(self) -> str | None:
        """What somebody else has changed inside of them."""
        return None

    def _own_state(self) -> dict[str, Any]:
        """What the knob remembers beside its value."""
        return {}

    def _restore(self, state: dict[str, Any]) -> None:
        """Take that in, now that the network has the shape of then."""


def tree_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The model and all modules in it, with the names they have where they stand; quicker than `named_modules`."""
    found = [("", model)]
    for _, module in found:
        found += [(name, child) for name, child in module._modules.items() if child is not None]
    return found


def cost_change(before: Cost, after: Cost) -> dict[str, float]:
    """Cost of the network before and after, under the keys of `Knob.cost`."""
    return {
        "step_flops_before": float(before.step_flops),
        "step_flops": float(after.step_flops),
        "parameters_before": float(before.parameters),
        "parameters": float(after.parameters),
    }


def structure_of(state: RunState, knob: str) -> Structure:
    """What the structural knobs of the run share; made for the first of them.

    Raises:
        InputError: There is no model or no example inputs, or the model cannot be traced.
    """
    if state.model is None:
        raise InputError(f"the knob {knob!r} acts in the model: give it as model=...")
    kind = type(state.optimizer)
    if kind.__module__.startswith("torch.optim.") and kind.__name__ not in _OPTIMIZERS:
        raise InputError(
            f"the knob {knob!r} cannot carry over what {kind.__name__} keeps; expected {', '.join(_OPTIMIZERS)}"
        )
    structure = state.structure
    if structure is None:
        structure = state.structure = Structure(_surgeon_of(state, knob))
    found: Structure = structure
    found.surgeon.check()
    return found


def _surgeon_of(state: RunState, knob: str) -> Surgeon:
    """The loop's own surgeon where it has one; else a new one on example inputs, or a batch of the loader's data."""
    model, loader = state.model, state.loader
    if hasattr(type(loader), "surgeon"):
        if state.example_inputs is not None:
            raise InputError(f"example_inputs beside loader={type(loader).__name__}, which has its own; leave them out")
        own: Surgeon = loader.surgeon  # type: ignore[union-attr]
        if own.model is not model or own.optimizer is not state.optimizer:
            raise InputError(
                f"the knob {knob!r}: the model and optimizer given are not those of loader={type(loader).__name__}; "
                "give its own"
            )
        return own
    inputs = state.example_inputs
    if inputs is None:
        inputs = _first_inputs(loader, knob)
        device = next(p.device for group in state.optimizer.param_groups for p in group["params"])
        inputs = inputs.to(device)
    return Surgeon(model, inputs, state.optimizer)  # type: ignore[arg-type]


def _first_inputs(loader: object, knob: str) -> Tensor:
    """Inputs of the first samples of a loader's data; neither its order nor a random generator moves.

    Raises:
        InputError: The loader is none that can be asked, or its batches do not begin with a tensor.
    """
    need = (
        f"the knob {knob!r} needs a batch of the model's inputs: give Controller(example_inputs=...), a tensor or a "
        "tuple of the forward's positional arguments, or a TrainingLoop or DataLoader as loader=..."
    )
    data: Any = getattr(loader, "dataset", None)
    if not isinstance(loader, DataLoader) or not hasattr(data, "__len__") or len(data) < 1:
        raise InputError(f"{need}; loader is {type(loader).__name__}")
    collate: Callable[[list[Any]], Any] | None = loader.collate_fn
    count = min(len(data), int(getattr(loader.batch_sampler, "batch_size", None) or 1))
    with torch.random.fork_rng(devices=()):
        samples = [data[index] for index in range(count)]
        batch = collate(samples) if collate is not None else samples
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(first, Tensor):
        raise InputError(f"{need}; a batch of this one begins with {type(first).__name__}")
    return first
