"""RLSchedulers on toy runs: how the tests of it make, run, save and compare them."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch

import trimtab
from toy import Toy
from trimtab.agents.base import Base, Timing
from trimtab.agents.scripted import Replay
from trimtab.brain import Brain
from trimtab.spec import ControlSpec

STEPS = 40


def make(toy: Toy, total_steps: int | None = STEPS, **options: Any) -> trimtab.RLScheduler:
    return trimtab.RLScheduler(toy.optimizer, total_steps, **options)


def replay(*settings: float, every: int = 10, base: str = "constant", high: float | None = None) -> Brain:
    agent = Replay([[setting] for setting in settings], Timing(every=every), Base(base))
    options = {} if high is None else {"lr": {"high": high}}
    return Brain(agent, ControlSpec.for_agent(agent, knob_options=options))


def run(toy: Toy, scheduler: trimtab.RLScheduler, n_steps: int = STEPS) -> list[list[float]]:
    rates = []
    for _ in range(n_steps):
        scheduler.step(toy.step())
        rates.append(toy.rates)
    return rates


def brain_of(agent: Any) -> Brain:
    return Brain(agent, ControlSpec.for_agent(agent))


def saved(value: Any, how: str) -> Any:
    if how == "pickle":
        return pickle.loads(pickle.dumps(value))  # noqa: S301 (what users do; ours holds no code)
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def flat(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist().__repr__()
    if isinstance(value, dict):
        return {key: flat(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [flat(item) for item in value]
    return repr(value)
