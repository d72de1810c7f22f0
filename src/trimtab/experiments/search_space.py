"""The space of a search: the values that its parameters may have, how they are drawn, and how they act on a fresh run.

Called by trials, search_methods and pbt. A parameter is a registered knob with its bounds and scale. Its values are the
knob's settings; of a knob with named choices (`optimizer`) the names.

Values act before the first step: those that an optimizer is made with are given to the task, which then makes it as it
makes its own; all others are written by the knob. What is read back by the knob must be what was asked for. A network
whose shape was changed draws all of its weights anew, from the run's own stream: surgery widens by copies, which a
network that begins there would not have.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from trimtab.errors import InputError
from trimtab.knobs.base import CategoricalKnob, Knob
from trimtab.run_state import RunState
from trimtab.seeding import scoped_global_rng, torch_generator
from trimtab.spec import ControlSpec
from trimtab.tasks.base import Task
from trimtab.training.loop import TrainingLoop

__all__ = ["Space", "Values"]

Values = dict[str, float | str]

# Fields of a task from which it makes its optimizer. A decay of 0 could not be multiplied, but it can be replaced.
_OF_TASK = ("lr", "optimizer", "weight_decay")
# Shapes come first, since others are counted off the network; the algorithm before what its groups hold.
_FIRST = ("layers", "units", "optimizer")


class Space:
    """The parameters of a search.

    Args:
        names: Names of registered knobs.
        options: Knob -> its options.

    Attributes:
        knobs: Name -> knob, in the order given. Their bounds hold; `fit` narrows them to what a run can take.
        masked: Parameters that `fit` found to be none of the run, and why.

    Raises:
        InputError: A knob or one of its options is unknown or wrong.
    """

    def __init__(self, names: Sequence[str], options: Mapping[str, Mapping[str, Any]]) -> None:
        self._spec = ControlSpec(knobs=tuple(names), knob_options=options)
        self.knobs = self._make()
        self.masked: dict[str, str] = {}
        for knob in self.knobs.values():
            if knob.moves_rate and not isinstance(knob, CategoricalKnob):
                raise InputError(
                    f"{knob.name}: what its moves do to the rate is for runs that are under way; leave it out"
                )

    def _make(self) -> dict[str, Knob]:
        return dict(zip(self._spec.knobs, self._spec.make_knobs(), strict=True))

    @property
    def shapes(self) -> list[str]:
        """Parameters that change the shape of the network."""
        return [name for name, knob in self.knobs.items() if knob.changes_shape]

    def bounds(self) -> dict[str, Any]:
        """Name -> what its values may be, for the record."""
        return {
            name: list(knob.choices)
            if isinstance(knob, CategoricalKnob)
            else {"low": knob.low, "high": knob.high, "scale": knob.scale}
            for name, knob in self.knobs.items()
        }

    # ---- drawing ------------------------------------------------------------------------------------------------

    def value(self, name: str, setting: float) -> float | str:
        """A knob's setting as a value of the search."""
        knob = self.knobs[name]
        return knob.choices[int(setting)] if isinstance(knob, CategoricalKnob) else float(setting)

    def draw(self, units: Mapping[str, float]) -> Values:
        """Values from numbers in [0, 1), even on each knob's scale; every whole number gets a share of its own."""
        return {name: self.value(name, _draw(self.knobs[name], unit)) for name, unit in units.items()}

    def grid(self, points: int) -> list[Values]:
        """Every combination of `points` values of each parameter, even on its scale; all choices of one with names.

        Whole numbers that fall together count once. The last parameter changes fastest.
        """
        columns = []
        for name, knob in self.knobs.items():
            settings = knob.from_unit(np.linspace(0, 1, points))
            if isinstance(knob, CategoricalKnob):
                settings = np.arange(len(knob.choices), dtype=np.float64)
            columns.append([(name, self.value(name, setting)) for setting in np.unique(settings).tolist()])
        return [dict(chosen) for chosen in itertools.product(*columns)]

    # ---- acting -------------------------------------------------------------------------------------------------

    def fit(self, make_loop: Callable[[Values], TrainingLoop], seed: int, *, masks: bool = False) -> TrainingLoop:
        """Narrow the bounds to what a run can take: samples that there are, layers that have to stay.

        Args:
            make_loop: Makes the loop of a run from the values that its task can take.
            seed: Of the run's weights.
            masks: Leave out what the run has not, instead of refusing it.

        Returns:
            The loop of a run without the values of a trial.

        Raises:
            InputError: The run has no such knob, or none at all; or its network cannot be drawn anew in another shape.
        """
        first = {name: self.value(name, self.knobs[name].high) for name in _OF_TASK if name in self.knobs}
        loop = make_loop(first)
        is_like_others = not self.shapes or _draws_alike(loop.model, seed)
        state = RunState(loop.optimizer, loop.model, loop, loop.total_steps)
        for name in self._order():
            knob = self.knobs[name]
            try:
                if knob.changes_shape and not is_like_others:
                    raise InputError(
                        f"the network of {loop.task.name!r} draws its weights in a way of its own, so that one of "
                        f"another shape cannot be drawn like it; leave {name!r} out of the space"
                    )
                knob.bind(state)
            except InputError as error:
                if not masks:
                    raise
                self.masked[name] = str(error)
        if len(self.masked) == len(self.knobs):
            raise InputError(f"search: no parameter of the space can act: {'; '.join(self.masked.values())}")
        self._leave_out(self.masked)
        return loop

    def _leave_out(self, names: Collection[str]) -> None:
        kept = [name for name in self.knobs if name not in names]
        options = {name: given for name, given in self._spec.knob_options.items() if name in kept}
        self._spec = ControlSpec(knobs=tuple(kept), knob_options=options)
        self.knobs = {name: self.knobs[name] for name in kept}

    def on_task(self, task: Task, values: Values) -> Task:
        """The task, with the values from which it makes its optimizer."""
        return task.replace(**{name: values[name] for name in _OF_TASK if name in values})

    def act(self, loop: TrainingLoop, values: Values, seed: int) -> tuple[RunState, dict[str, Knob]]:
        """Make values act on a run that has not begun, and read each of them back.

        Args:
            loop: Of a task that came through `on_task`.
            values: One for each parameter.
            seed: Of the run's weights.

        Returns:
            What knobs see of the run, and the knobs, which are bound to it.

        Raises:
            InputError: What was read back is not what was asked for.
        """
        state = RunState(loop.optimizer, loop.model, loop, loop.total_steps)
        knobs = self._make()
        has_moved = False
        order = self._order()
        for place, name in enumerate(order):
            knob, setting = knobs[name], self.setting(name, values[name])
            knob.bind(state)
            if knob.get(state) != setting:
                knob.write(state, np.array([setting]))
                has_moved |= knob.changes_shape
            is_last_shape = knob.changes_shape and not any(knobs[other].changes_shape for other in order[place + 1 :])
            if is_last_shape and has_moved:
                _draw_anew(loop.model, seed)
        self.check(state, knobs, values)
        return state, knobs

    def check(self, state: RunState, knobs: Mapping[str, Knob], values: Values, but: Sequence[str] = ()) -> None:
        """Compare what acts with what was asked for.

        Raises:
            InputError: They differ.
        """
        for name, knob in knobs.items():
            found = knob.get(state)
            if name not in but and found != self.setting(name, values[name]):
                raise InputError(f"{name}: {found!r} was read back where {values[name]!r} was written")

    def setting(self, name: str, value: float | str) -> float:
        """Inverse of `value`."""
        knob = self.knobs[name]
        return float(knob.choices.index(str(value)) if isinstance(knob, CategoricalKnob) else value)

    def _order(self) -> list[str]:
        first = [name for name in _FIRST if name in self.knobs]
        return [*first, *(name for name in self.knobs if name not in first)]


def _draw(knob: Knob, unit: float) -> float:
    if not knob.is_whole:
        return float(knob.from_unit(np.array([unit]))[0])
    low, high = knob.low - 0.5, knob.high + 0.5
    value = low * (high / low) ** unit if knob.scale == "log" else low + unit * (high - low)
    return float(knob.clip(np.array([value]))[0])


def _draw_anew(model: nn.Module, seed: int) -> None:
    """Draw all weights as layers do when they are made, from the stream that the run's network was drawn from."""
    devices = {parameter.device for parameter in model.parameters()}
    device = next(iter(devices), torch.device("cpu"))
    model.cpu()  # drawn there, so that every device starts from the same weights
    with scoped_global_rng([torch_generator(seed, "weights").get_state()], torch.device("cpu")), torch.no_grad():
        for module in model.modules():
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
    model.to(device)


def _draws_alike(model: nn.Module, seed: int) -> bool:
    """Whether drawing anew gives a fresh network the weights that it has; it has them afterwards in any case."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _draw_anew(model, seed)
    is_alike = all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.load_state_dict(before)
    return is_alike
