"""check_agent: what every agent owes, learned or not.

Called from tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab import registry
from trimtab.agents.base import Agent, Array, Needs
from trimtab.errors import TrimtabError
from trimtab.spec import ControlSpec, make_agent
from trimtab.testing.contract import ContractError, is_plain, json_round_trip, require, requires_input_error, same

__all__ = ["check_agent"]

_KNOBS = ("lr", "weight_decay")


def check_agent(agent: Agent, *, n_knobs: int = 1, remake: Callable[[dict[str, Any]], Agent] | None = None) -> None:
    """Check that an agent keeps its contract; it is used up by it.

    Args:
        agent: A fresh agent.
        n_knobs: Knobs it moves, 1 or 2.
        remake: From its options to an equal fresh agent; None: through the registry under its name, or its class.

    Raises:
        ContractError: Names what was broken.
    """
    who = f"agent {getattr(agent, 'name', type(agent).__name__)!r}"
    require(isinstance(getattr(agent, "name", None), str), f"{who} has no name")
    require(isinstance(agent.needs, Needs), f"{who}: needs is a {type(agent.needs).__name__}, expected Needs")
    try:
        spec = ControlSpec.for_agent(agent, knobs=_KNOBS[:n_knobs])
    except TrimtabError as error:
        raise ContractError(f"{who}: no spec can be made of its needs: {error}") from error
    make = _maker(agent, n_knobs, remake, who)
    _check_predict(agent, spec, who)
    _check_options(agent, make, who)
    _check_exploration(make, spec, who)
    _check_state(agent, make, spec, who)


def _maker(
    agent: Agent, n_knobs: int, remake: Callable[[dict[str, Any]], Agent] | None, who: str
) -> Callable[[], Agent]:
    options = json_round_trip(agent.options, f"{who}: its options")
    if remake is not None:
        return lambda: remake(options)
    if agent.name in registry.entries("agent"):
        return lambda: make_agent(agent.name, options, seed=3, n_knobs=n_knobs)
    return lambda: type(agent)(**options)


def _observe(spec: ControlSpec, n_runs: int, seed: int) -> Array:
    """Observations within the signals' bounds, raw ones within reach of a loss."""
    rng = np.random.default_rng(seed)
    low, high = (np.clip(bound, -10.0, 10.0) for bound in (spec.observation_space.low, spec.observation_space.high))
    return np.asarray(rng.uniform(low, high, (n_runs, len(spec.signals))), dtype=np.float64)


def _check_predict(agent: Agent, spec: ControlSpec, who: str) -> None:
    count = len(spec.knobs)
    for n_runs in (1, 3):
        seen = _observe(spec, n_runs, n_runs)
        before = seen.copy()
        action, state = agent.predict(seen, None, np.ones(n_runs, np.bool_), deterministic=True)
        require(np.array_equal(seen, before), f"{who}: predict changed the observation that it was given")
        shape = np.shape(action)
        require(
            isinstance(action, np.ndarray) and shape == (n_runs, count),
            f"{who}: predict gave a {type(action).__name__} of shape {shape} for observations of shape "
            f"{seen.shape}; expected an array of shape ({n_runs}, {count})",
        )
        require(state is None or isinstance(state, tuple), f"{who}: predict's state is neither None nor a tuple")
        again, _ = agent.predict(seen, None, np.ones(n_runs, np.bool_), deterministic=True)
        require(np.array_equal(action, again), f"{who}: deterministic=True gave {action}, then {again}")
        _check_decoded(spec, action, who)
        if n_runs > 1:
            rows = [agent.predict(seen[i : i + 1], None, np.ones(1, np.bool_), True)[0] for i in range(n_runs)]
            alone = np.concatenate(rows)
            require(np.array_equal(alone, action), f"{who}: {n_runs} runs at once gave {action}, one by one {alone}")


def _check_decoded(spec: ControlSpec, action: npt.NDArray[Any], who: str) -> None:
    for run in action:
        value = run[0] if spec.action_space.shape == () else run
        require(
            spec.action_space.contains(np.asarray(value, dtype=spec.action_space.dtype)),
            f"{who}: the action {value} is not in the spec's action space {spec.action_space}",
        )
    try:
        settings = spec.decode(action, np.full(action.shape, 0.01))
    except Exception as error:
        raise ContractError(f"{who}: its action {action} cannot be decoded: {error}") from error
    good = bool(np.all(np.isfinite(settings)) and np.all(settings >= 0))
    require(good, f"{who}: its action {action} asks for the settings {settings}; expected finite ones of 0 or more")


def _check_options(agent: Agent, make: Callable[[], Agent], who: str) -> None:
    try:
        twin = make()
    except Exception as error:
        raise ContractError(f"{who}: its options {agent.options} do not make it again: {error}") from error
    require(type(twin) is type(agent) and twin.name == agent.name, f"{who}: its options make a {twin.name!r}")
    require(twin.needs == agent.needs, f"{who}: made again it needs {twin.needs}, not {agent.needs}")
    require(same(twin.options, agent.options), f"{who}: made again it has the options {twin.options}")


def _behave(agent: Agent, spec: ControlSpec, *, seed: int, learns: bool) -> list[list[Any]]:
    """Actions of a run of 12 decisions, explored; with learning in between, if asked for."""
    state, actions = None, []
    rng = np.random.default_rng(seed)
    seen = _observe(spec, 2, seed)
    for step in range(12):
        action, state = agent.predict(seen, state, np.full(2, step == 0))
        then = _observe(spec, 2, seed + 1 + step)
        if learns:
            agent.update(seen, action, rng.normal(size=2), then, np.full(2, step == 11))
        actions.append(np.asarray(action).tolist())
        seen = then
    return actions


def _global_state() -> bytes:
    state: Any = np.random.get_state()  # noqa: NPY002 (looked at, not drawn from)
    return bytes(state[1].tobytes())


def _check_exploration(make: Callable[[], Agent], spec: ControlSpec, who: str) -> None:
    before = _global_state()
    runs = []
    for _ in range(2):
        agent = make()
        agent.reseed(7)
        runs.append(_behave(agent, spec, seed=1, learns=False))
    require(runs[0] == runs[1], f"{who}: reseed with the same seed gave two different runs")
    require(_global_state() == before, f"{who} draws from NumPy's global generator")


def _check_state(agent: Agent, make: Callable[[], Agent], spec: ControlSpec, who: str) -> None:
    fresh = make().state_dict()
    before = agent.state_dict()
    _behave(agent, spec, seed=2, learns=True)
    kept = agent.state_dict()
    require(is_plain(kept), f"{who}: its state holds more than tensors and JSON scalars: {kept}")
    if not agent.is_learned:
        learned = {key: value for key, value in kept.items() if key != "rng"}
        require(
            same(learned, {key: value for key, value in before.items() if key != "rng"}),
            f"{who} changed its state by update, but says is_learned = False",
        )
    else:
        require(not same(kept, fresh), f"{who} says is_learned = True, but its state is as it was after 12 updates")
    twin = make()
    twin.load_state_dict(kept)
    require(same(twin.state_dict(), kept), f"{who}: a loaded state is not the one that was saved")
    mine, theirs = _behave(agent, spec, seed=3, learns=True), _behave(twin, spec, seed=3, learns=True)
    require(mine == theirs, f"{who}: after load_state_dict it behaves differently from the agent that was saved")
    require(same(agent.state_dict(), twin.state_dict()), f"{who}: after load_state_dict it learns differently")
    now = agent.state_dict()
    with requires_input_error(f"{who}: load_state_dict of a foreign state"):
        agent.load_state_dict({**now, "nonsense": 1})
    require(same(agent.state_dict(), now), f"{who}: a refused state changed it")
