"""Task: what it refuses, what `replace` does, the three losses, and every registered task at every scale."""

import math
import re

import pytest
import torch

from trimtab import registry
from trimtab.errors import InputError, UnknownNameError
from trimtab.tasks.base import Data, Split, Task

OURS = ["digits-cnn", "digits-mlp", "enwik8-gpt", "mnist-cnn", "shakespeare-gpt", "text8-gpt", "titanic-fcnn"]


def no_data(data_dir):
    empty = Split(torch.empty(0), torch.empty(0))
    return Data(empty, empty, empty, {})


def make_task(**changes):
    kind = changes.pop("kind", "classification")
    return Task("t", "none", kind, no_data, lambda data: torch.nn.Linear(1, 1), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "task 't': lr is 0.0; expected a finite number above 0"),
        ({"lr": math.nan}, "task 't': lr is nan; expected a finite number above 0"),
        ({"lr": "1e-3"}, "task 't': lr is '1e-3'; expected a finite number above 0"),
        ({"batch_size": 0}, "task 't': batch_size is 0; expected a whole number of at least 1"),
        ({"accumulation": True}, "task 't': accumulation is True; expected a whole number of at least 1"),
        ({"total_steps": 2.5}, "task 't': total_steps is 2.5; expected a whole number of at least 1"),
        ({"weight_decay": -1.0}, "task 't': weight_decay is -1.0; expected a finite number of at least 0"),
        ({"betas": (0.9, 1.0)}, "task 't': betas is (0.9, 1.0); expected two numbers in [0, 1)"),
        ({"grad_clip": 0.0}, "task 't': grad_clip is 0.0; expected a finite number above 0, or None"),
        ({"warmup_steps": -1}, "task 't': warmup_steps is -1; expected 0 or a whole number"),
        (
            {"block_size": 8},
            "task 't': block_size is 8; expected a whole number of at least 1 for text, and None",
        ),
        (
            {"kind": "language-modelling"},
            "task 't': block_size is None; expected a whole number of at least 1",
        ),
        ({"kind": "clasification"}, "unknown kind of task 'clasification'; did you mean 'classification'?"),
        ({"optimizer": "sdg"}, "unknown optimizer 'sdg'; did you mean 'sgd'? known: adam, adamw, sgd"),
    ],
)
def test_a_wrong_value_is_refused_by_name(changes, message):
    with pytest.raises(InputError, match=re.escape(message)):
        make_task(**changes)


def test_replace_changes_the_named_fields_alone():
    task = make_task()
    other = task.replace(lr=0.5, accumulation=2)
    assert (other.lr, other.accumulation, other.batch_size) == (0.5, 2, task.batch_size)
    assert task.lr == 1e-3


def test_replace_refuses_unknown_fields_and_wrong_values():
    with pytest.raises(UnknownNameError, match=r"unknown field of a task 'learning_rate'; did you mean 'lr'\?"):
        make_task().replace(learning_rate=0.1)
    with pytest.raises(InputError, match="lr is -1"):
        make_task().replace(lr=-1)


def test_losses_have_their_closed_forms():
    classes = make_task().loss(torch.zeros(4, 10), torch.arange(4))
    text = make_task(kind="language-modelling", block_size=3).loss(
        torch.zeros(2, 3, 65), torch.zeros(2, 3, dtype=torch.int64)
    )
    numbers = make_task(kind="regression").loss(torch.tensor([[1.0], [3.0]]), torch.tensor([0.0, 0.0]))
    assert classes.item() == pytest.approx(math.log(10))
    assert text.item() == pytest.approx(math.log(65))
    assert numbers.item() == 5.0


def test_one_logit_is_the_second_of_two_whose_first_is_0():
    logits = torch.tensor([[2.0], [-1.0], [0.5], [0.0]], dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([1, 1, 0, 0])
    loss = make_task().loss(logits, targets)
    both = torch.cat((torch.zeros_like(logits), logits), dim=1)
    expected = make_task().loss(both, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert loss.item() == pytest.approx(
        (math.log1p(math.exp(-2)) + math.log1p(math.exp(1)) + math.log1p(math.exp(0.5)) + math.log(2)) / 4
    )
    gradients = [torch.autograd.grad(value, logits)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)
    for outputs in (logits, both):
        assert make_task().predicted_classes(outputs, 2).tolist() == [1, 0, 1, 0]


def test_one_logit_cannot_tell_three_classes_apart():
    text = "task 't': the network has one output, which tells two classes apart, and there are 3; give it 3 outputs"
    with pytest.raises(InputError, match=re.escape(text)):
        make_task().predicted_classes(torch.zeros(4, 1), 3)


@pytest.mark.parametrize("name", OURS)
def test_every_task_has_three_scales_and_refuses_others(name):
    make = registry.load("task", name)
    tasks = [make(scale) for scale in ("smoke", "small", "full")]
    assert [task.name for task in tasks] == [name] * 3
    assert tasks[0].total_steps < tasks[1].total_steps <= tasks[2].total_steps
    assert all(task.total_steps >= 4 * task.eval_every and task.warmup_steps < task.total_steps for task in tasks)
    assert make() == make("small") or make().replace(load=tasks[1].load, make_model=tasks[1].make_model) == tasks[1]
    with pytest.raises(
        UnknownNameError, match=r"unknown scale 'smal'; did you mean 'small'\? known: full, small, smoke"
    ):
        make("smal")


def test_the_registry_lists_exactly_these_tasks():
    assert [name for name in registry.names("task") if name in OURS] == OURS
