"""RLScheduler keeps the adapters' contract, and the battery notices each way of breaking it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

import trimtab
from trimtab.agents.q_learning import QLearning
from trimtab.brain import Brain
from trimtab.spec import ControlSpec
from trimtab.testing import ContractError, check_adapter

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of")


def learner() -> Brain:
    agent = QLearning(every=3, epsilon=0.5, base="cosine")
    return Brain(agent, ControlSpec.for_agent(agent))


def test_the_default_brain() -> None:
    check_adapter(trimtab.RLScheduler)


def test_a_brain_that_learns() -> None:
    check_adapter(lambda optimizer, total_steps: trimtab.RLScheduler(optimizer, total_steps, brain=learner()))


class NeverDecides(trimtab.RLScheduler):
    @property
    def decisions(self) -> Any:
        return []


class WantsGradients(trimtab.RLScheduler):
    def step(self, loss: Any = None) -> None:
        has_gradients = all(p.grad is not None for group in self.optimizer.param_groups for p in group["params"])
        super().step(loss if has_gradients or loss is None else 0 * loss)
        if not has_gradients:
            self.optimizer.param_groups[0]["params"][0].data *= 0.99


class ForgetsItsState(trimtab.RLScheduler):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        hand = self._controller._hand
        hand.write_all(0)


class SwallowsConflicts(trimtab.RLScheduler):
    def __init__(self, optimizer: Optimizer, total_steps: int) -> None:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            super().__init__(optimizer, total_steps, on_conflict="warn")


class SaysOneThing(trimtab.RLScheduler):
    def get_last_lr(self) -> list[float | torch.Tensor]:
        return [0.1, 0.2]


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        (NeverDecides, "no decision in 24 steps"),
        (WantsGradients, "it matters whether zero_grad"),
        (ForgetsItsState, "resumed after 1 steps, the run is not the uninterrupted one"),
        (SwallowsConflicts, "a second scheduler on the same optimizer was not refused"),
        (SaysOneThing, "get_last_lr is not what the groups hold"),
    ],
)
def test_each_violation_is_named(broken: Any, text: str) -> None:
    with pytest.raises(ContractError, match=text):
        check_adapter(broken)


def test_a_plain_torch_scheduler_is_no_adapter() -> None:
    with pytest.raises((ContractError, AttributeError)):
        check_adapter(lambda optimizer, total_steps: CosineAnnealingLR(optimizer, total_steps))
