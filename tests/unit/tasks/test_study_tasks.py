"""All tasks of the learning-rate study: an epoch at smoke, a restored run to the bit, bf16, reads of the test split."""

from __future__ import annotations

import math

import pytest
import torch
from test_task_reviews import write_imdb
from test_task_sentences import write_sst2
from test_task_vision import write_cifar10, write_mnist

from trimtab import registry
from trimtab.places import dropout_places
from trimtab.storage import load_state, save_state
from trimtab.tasks.base import Data, Task
from trimtab.training.loop import TrainingLoop

IMAGES = [f"{data}-{model}" for data in ("mnist", "cifar10") for model in ("cnn", "resnet18", "vgg16")]
BERTS = ["imdb-bert", "sst2-bert"]
NAMES = [*IMAGES, "imdb-lstm", "imdb-bilstm", "sst2-lstm", *BERTS, "diabetes-mlp"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    write_cifar10(path / "cifar10", 800, 200)
    write_mnist(path / "mnist", 800, 200)
    write_imdb(path / "imdb")
    write_sst2(path / "sst2")
    return path


def get(name: str, folder) -> tuple[Task, Data]:
    """The task, augmented where it has images."""
    if name in BERTS:
        pytest.importorskip("transformers", reason="the extra [hf] is not installed")
    task = registry.load("task", name)("smoke")
    return task.replace(is_augmented=task.augmentation is not None), task.load(folder)


def same(first, second) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


@pytest.mark.parametrize("name", NAMES)
def test_an_epoch_is_trained_and_goes_on_from_a_file_to_the_bit(name, folder, tmp_path):
    task, data = get(name, folder)
    assert task.is_augmented is (name in IMAGES)
    before = torch.get_rng_state()
    first, second = (TrainingLoop(task, data, seed=seed) for seed in (0, 1))
    assert task.total_steps >= first.steps_per_epoch  # smoke is an epoch or more
    if name in BERTS or name.endswith("-cnn"):  # what has dropout must go on with its draws too
        assert dropout_places(first.model)
    for _ in range(first.steps_per_epoch - 2):
        assert math.isfinite(first.step().item())
    save_state(tmp_path / "state.safetensors", first.state_dict())
    second.load_state_dict(load_state(tmp_path / "state.safetensors"))
    losses = [[loop.step().item() for _ in range(3)] for loop in (first, second)]  # into the next epoch
    assert losses[0] == losses[1]
    assert first.epoch > 1
    assert same(first.state_dict(), second.state_dict())
    assert torch.equal(torch.get_rng_state(), before)
    first.evaluate("val")
    assert first.test_reads == 0
    assert math.isfinite(first.evaluate("test")["loss"])
    assert first.test_reads == 1


@pytest.mark.parametrize("name", NAMES)
def test_every_network_learns_in_bf16_on_every_device(name, folder, device):
    task, data = get(name, folder)
    half, full = (
        TrainingLoop(task, data, seed=0, device=str(device), precision=precision) for precision in ("bf16", "float32")
    )
    before = {key: value.clone() for key, value in half.model.named_parameters() if key.endswith("weight")}
    # Dropout draws the same on the same device, so that only the rounding of products is between the two.
    assert half.step().item() == pytest.approx(full.step().item(), abs=0.1)
    assert all(value.dtype == torch.float32 for value in half.model.state_dict().values() if value.is_floating_point())
    assert [key for key, value in before.items() if torch.equal(value, half.model.get_parameter(key))] == []
    assert half.evaluate("val")["loss"] == pytest.approx(full.evaluate("val")["loss"], abs=0.2)
