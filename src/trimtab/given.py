"""What a controller is given: checked, and turned into an agent and its spec.

Called by the controller, when it is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from typing import Any

from torch import nn
from torch.optim import Optimizer

from trimtab import registry
from trimtab.agents.base import Agent, Timing
from trimtab.brain import Brain
from trimtab.errors import InputError, unknown_name
from trimtab.run_state import BatchingLoop
from trimtab.spec import ControlSpec, make_agent

__all__ = ["check_run", "epoch_steps_of", "resolve"]


def check_run(optimizer: object, model: object, total_steps: object, mode: str) -> None:
    """Refuse what cannot be controlled.

    Raises:
        InputError: See `trimtab.Controller`.
    """
    if not isinstance(optimizer, Optimizer):
        raise InputError(f"optimizer is a {type(optimizer).__name__}; expected a torch.optim.Optimizer")
    if model is not None and not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}; expected a torch.nn.Module or None")
    whole = isinstance(total_steps, int) and not isinstance(total_steps, bool) and total_steps >= 1
    if total_steps is not None and not whole:
        raise InputError(f"total_steps is {total_steps!r}; expected a number of optimizer steps of 1 or more, or None")
    if mode not in ("learn", "use", "placebo"):
        raise unknown_name("mode", mode, ("learn", "use", "placebo"))


def resolve(
    given: Agent | Brain | str, knobs: Sequence[str] | None, every: int | str | None, spec: ControlSpec | None
) -> tuple[Agent, ControlSpec]:
    """The agent, and the spec it is used with.

    Raises:
        InputError: See `trimtab.Controller`.
    """
    if spec is not None and (knobs is not None or every is not None):
        raise InputError("give either spec, or knobs and every, not both")
    if knobs is not None and (isinstance(knobs, str) or not isinstance(knobs, Sequence)):
        raise InputError(f"knobs {knobs!r}; expected a sequence of names, such as ('lr',)")
    if isinstance(given, Brain):
        changes: dict[str, Any] = {} if knobs is None else {"knobs": tuple(knobs)}
        if every is not None:
            changes["timing"] = Timing(every=every)
        wanted = spec or ControlSpec(**{**_fields(given.spec), **changes})
        given.check_spec(wanted)
        return given.agent, wanted
    names = ("lr",) if knobs is None else tuple(knobs)
    if isinstance(given, str) and given in registry.entries("agent") and registry.entries("agent")[given].needs_brain:
        raise InputError(
            f"agent {given!r} knows nothing by itself; give a brain that holds one, trimtab.Brain.load(...)"
        )
    n_knobs = len(names) if spec is None else spec.n_moved
    agent = make_agent(given, n_knobs=n_knobs) if isinstance(given, str) else given
    if not callable(getattr(agent, "predict", None)):
        raise InputError(f"agent_or_brain is a {type(given).__name__}; expected an Agent, a Brain or an agent's name")
    if spec is not None:
        return agent, spec
    changes = {"knobs": names}
    if every is not None:
        changes["timing"] = Timing(every=every)
    return agent, ControlSpec.for_agent(agent, **changes)


def _fields(spec: ControlSpec) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in spec.__dataclass_fields__}


def epoch_steps_of(timing: Timing, loader: Iterable[Any] | BatchingLoop | None) -> int | None:
    """Optimizer steps of an epoch where decisions are counted in epochs; else None.

    Raises:
        InputError: The loader has no known length.
    """
    if timing.every != "epoch":
        return None
    if not isinstance(loader, Sized) or len(loader) < 1:
        raise InputError("every='epoch' needs the data loader with a known length: give loader=...")
    return len(loader)
