"""Other writers of an optimizer's rate are found by name; those that are gone, or write no more, are not."""

from __future__ import annotations

from typing import Any

import pytest
from torch.optim import lr_scheduler

import trimtab
from toy import Toy
from trimtab.controller import Controller
from trimtab.writers import find_writers


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda o: lr_scheduler.StepLR(o, 3), ["StepLR"]),
        (lambda o: lr_scheduler.ReduceLROnPlateau(o), ["ReduceLROnPlateau"]),
        (lambda o: lr_scheduler.OneCycleLR(o, 0.1, 10), ["OneCycleLR"]),
        (lambda o: lr_scheduler.LambdaLR(o, lambda step: 1.0), ["LambdaLR"]),
        (
            lambda o: lr_scheduler.SequentialLR(
                o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [5]
            ),
            ["ConstantLR", "ExponentialLR", "SequentialLR"],
        ),
        (
            lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(o, 0.9)]),
            ["ChainedScheduler", "ExponentialLR"],
        ),
        (lambda o: Controller("constant", optimizer=o), ["Controller"]),
        (lambda o: trimtab.RLScheduler(o, 10), ["Controller", "RLScheduler"]),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected call of")
def test_living_writers_are_named(make: Any, names: list[str]) -> None:
    toy, other = Toy(), Toy()
    writer = make(toy.optimizer)
    assert find_writers(toy.optimizer) == names
    assert find_writers(other.optimizer) == []
    del writer
    assert find_writers(toy.optimizer) == []


def test_the_one_who_asks_and_the_scheduler_around_it_are_left_out() -> None:
    toy = Toy()
    scheduler = trimtab.RLScheduler(toy.optimizer, 10)
    assert find_writers(toy.optimizer, but=scheduler._controller) == []
    assert find_writers(toy.optimizer, but=object()) == ["Controller", "RLScheduler"]


def test_a_controller_whose_control_has_ended_writes_no_more() -> None:
    toy = Toy()
    scheduler = trimtab.RLScheduler(toy.optimizer, 3)
    for _ in range(3):
        scheduler.step(toy.step())
    assert scheduler.status == "over"
    assert find_writers(toy.optimizer) == []


def test_a_subclass_of_somebody_elses_is_named_as_theirs() -> None:
    class TheirScheduler(lr_scheduler.LRScheduler):
        def get_lr(self) -> list[Any]:
            return [group["lr"] for group in self.optimizer.param_groups]

    toy = Toy()
    scheduler = TheirScheduler(toy.optimizer)
    assert find_writers(toy.optimizer) == ["TheirScheduler"]
    assert scheduler.last_epoch == 0
