"""Augmentation: pixels where they should be, draws of the run's own, train batches alone, resumption to the bit."""

from __future__ import annotations

import math

import pytest
import torch
from test_task_vision import write_cifar10
from torch import nn

from trimtab import registry
from trimtab.errors import InputError
from trimtab.tasks import vision
from trimtab.tasks.augmentation import Augmentation, _crop, _rotate
from trimtab.tasks.base import Data, Split, Task
from trimtab.training.batches import EpochBatches
from trimtab.training.loop import TrainingLoop

FILL = (-1.0, -2.0, -3.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(n: int = 4, height: int = 6, width: int = 5) -> torch.Tensor:
    return torch.rand(n, 3, height, width, generator=generator(9))


def image_task(**changes) -> Task:
    settings = {"batch_size": 4, "augmentation": Augmentation(FILL, flip=True, padding=2, degrees=10.0)}
    flat = nn.Flatten()
    return Task("pictures", "none", "classification", lambda path: image_data(),
                lambda data: nn.Sequential(flat, nn.Linear(90, 2)), **(settings | changes))  # fmt: skip


def image_data() -> Data:
    part = Split(pictures(11), torch.arange(11) % 2)
    return Data(part, part, part, {"n_classes": 2})


def test_a_crop_copies_pixels_and_fills_what_lies_outside():
    images = pictures(3)
    kept = images.clone()
    shifts = torch.tensor([[0, 1, -2], [0, 2, -1]])
    whole, cut, other = _crop(images, torch.tensor([False, False, True]), shifts, FILL)
    assert torch.equal(whole, images[0])
    assert torch.equal(cut[:, :5, :3], images[1, :, 1:, 2:])
    outside = torch.tensor(FILL).view(3, 1, 1)
    assert torch.equal(cut[:, 5:], outside.expand(3, 1, 5))
    assert torch.equal(cut[:, :, 3:], outside.expand(3, 6, 2))
    by_hand = outside.repeat(1, 6, 5)
    by_hand[:, 2:, 1:] = images[2, :, :4, :4]
    assert torch.equal(other, by_hand.flip(2))  # cropped, then mirrored
    assert torch.equal(images, kept)


def test_a_rotation_by_a_quarter_is_that_of_torch():
    square = pictures(2, 6, 6)
    turned = _rotate(square, torch.tensor([math.pi / 2, -math.pi / 2]), FILL)
    torch.testing.assert_close(turned[0], square[0].rot90(1, (1, 2)), rtol=0, atol=1e-5)
    torch.testing.assert_close(turned[1], square[1].rot90(-1, (1, 2)), rtol=0, atol=1e-5)
    wide = pictures(1, 4, 8)
    torch.testing.assert_close(_rotate(wide, torch.tensor([math.pi]), FILL), wide.flip(2, 3), rtol=0, atol=1e-5)
    # Of a wide image a quarter keeps the square in the middle, and fills what it had no pixels for.
    quarter = _rotate(wide, torch.tensor([math.pi / 2]), FILL)[0]
    torch.testing.assert_close(quarter[:, :, 2:6], wide[0, :, :, 2:6].rot90(1, (1, 2)), rtol=0, atol=1e-5)
    torch.testing.assert_close(quarter[:, :, :2], torch.tensor(FILL).view(3, 1, 1).expand(3, 4, 2), rtol=0, atol=1e-5)


def test_what_is_drawn_is_what_was_asked_for():
    images = pictures(400, 7, 7)
    flipped = Augmentation(FILL, flip=True)(images, generator())
    is_mirrored = (flipped == images.flip(3)).flatten(1).all(1)
    assert ((flipped == images).flatten(1).all(1) ^ is_mirrored).all()
    assert 150 < is_mirrored.sum() < 250
    shifted = Augmentation(FILL, padding=2)(images, generator())
    places = (shifted[:, 0] == images[:, 0, 3, 3].view(-1, 1, 1)).nonzero()  # where the middle went
    assert len(places) == 400
    assert set(places[:, 1].tolist()) == set(places[:, 2].tolist()) == {1, 2, 3, 4, 5}
    same = Augmentation(FILL, degrees=10.0)(torch.full((400, 3, 7, 7), 0.5), generator())
    torch.testing.assert_close(same[:, :, 2:5, 2:5], torch.full((400, 3, 3, 3), 0.5))
    assert same[:, :, 0, 0].lt(0.4).any()
    assert not torch.equal(same[0], same[1])  # a corner leaves the image, each by its own angle


def test_no_image_is_rotated_by_more_than_was_asked_for():
    # A ramp from left to right, rotated, rises along the angle: that of its slope in the middle is what was drawn.
    ramp = torch.arange(31.0).expand(2000, 3, 31, 31)
    turned = Augmentation(FILL, degrees=10.0)(ramp, generator())[:, 0]
    across, down = turned[:, 15, 16] - turned[:, 15, 14], turned[:, 16, 15] - turned[:, 14, 15]
    angles = torch.atan2(down, across).rad2deg()
    assert -10.01 < angles.min() < -9.8
    assert 9.8 < angles.max() < 10.01
    assert abs(angles.mean()) < 0.4  # a deviation of the mean is 0.13
    assert angles.std() == pytest.approx(20 / 12**0.5, abs=0.3)  # of an even draw


def test_images_are_decoded_once_and_kept(tmp_path, monkeypatch):
    write_cifar10(tmp_path / "cifar10", 800, 200)
    calls = []
    decode = vision.decode_images
    monkeypatch.setattr(vision, "decode_images", lambda *given, **named: calls.append(1) or decode(*given, **named))
    task = registry.load("task", "cifar10-cnn")("smoke").replace(is_augmented=True)
    data = task.load(tmp_path)
    kept = data.train.inputs.clone()
    assert len(calls) == 3  # train, val and test
    loop = TrainingLoop(task, data, seed=0)
    for _ in range(21):  # into the next epoch
        loop.step()
    loop.evaluate("val")
    assert len(calls) == 3
    assert torch.equal(data.train.inputs, kept)


def test_the_tasks_of_the_study_have_one_and_mnist_is_not_mirrored():
    names = ["cifar10-cnn", "cifar10-resnet18", "cifar10-vgg16", "mnist-cnn", "mnist-resnet18", "mnist-vgg16"]
    for name in names:
        task = registry.load("task", name)("small")
        assert task.is_augmented is False
        is_colour = task.dataset == "cifar10"
        black = [-0.4914 / 0.2470, -0.4822 / 0.2435, -0.4465 / 0.2616] if is_colour else [-0.1307 / 0.3081]
        assert task.augmentation == Augmentation(tuple(black), flip=is_colour, padding=4, degrees=10.0)
        assert task.replace(is_augmented=True).is_augmented


def test_train_batches_alone_are_augmented_and_the_order_stays():
    plain, augmented = (TrainingLoop(image_task(is_augmented=on), image_data(), seed=0) for on in (False, True))
    assert plain.evaluate("val") == augmented.evaluate("val")
    assert plain.evaluate("test") == augmented.evaluate("test")
    streams = [loop._batches for loop in (plain, augmented)]
    (inputs, targets), (others, same_targets) = (stream.next() for stream in streams)
    assert torch.equal(targets, same_targets)
    assert not torch.equal(inputs, others)
    by_hand = image_task().augmentation(inputs, augmented_generator(0))
    assert torch.equal(others, by_hand)
    assert torch.equal(augmented._splits["train"].inputs, image_data().train.inputs)
    assert torch.equal(streams[1].example(4), image_data().train.inputs[:4])


def augmented_generator(seed: int) -> torch.Generator:
    from trimtab.seeding import torch_generator

    return torch_generator(seed, "augmentation")


def test_a_restored_run_goes_on_to_the_bit_and_another_is_refused(tmp_path):
    write_cifar10(tmp_path / "cifar10", 800, 200)
    task = registry.load("task", "cifar10-cnn")("smoke").replace(is_augmented=True)
    data = task.load(tmp_path)
    before = torch.get_rng_state()
    first, second = (TrainingLoop(task, data, seed=seed) for seed in (0, 1))
    for _ in range(3):
        first.step()
    state = first.state_dict()
    second.load_state_dict(state)
    assert [first.step().item() for _ in range(4)] == [second.step().item() for _ in range(4)]
    assert first.evaluate("val") == second.evaluate("val")
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(InputError, match="the state is of a run with augmentation and this one is not; set the task's"):
        TrainingLoop(task.replace(is_augmented=False), data, seed=0).load_state_dict(state)


def test_what_cannot_be_is_refused():
    with pytest.raises(InputError, match=r"augmentation: padding is 1.5; expected a whole number of pixels, 0 or more"):
        Augmentation(FILL, padding=1.5)
    with pytest.raises(InputError, match="augmentation: degrees is -1; expected a number from 0 to 180"):
        Augmentation(FILL, degrees=-1)
    with pytest.raises(InputError, match="augmentation: degrees is '10'; expected a number from 0 to 180"):
        Augmentation(FILL, degrees="10")
    with pytest.raises(InputError, match="augmentation: flip is 'no'; expected True or False"):
        Augmentation(FILL, flip="no")
    with pytest.raises(InputError, match=r"augmentation: fill is 0\.0; expected a tuple of numbers, one a channel"):
        Augmentation(0.0, flip=True)
    with pytest.raises(InputError, match="augmentation: nothing would be done; give flip, padding or degrees"):
        Augmentation(FILL)
    with pytest.raises(
        InputError, match="task 'digits-mlp': is_augmented is True; expected False, since it has no aug"
    ):
        registry.load("task", "digits-mlp")("smoke").replace(is_augmented=True)
    gray = Split(pictures(11)[:, :1], torch.arange(11) % 2)
    text = (
        r"task 'pictures': augmentation is for images \(B, 3, height, width\) in floats; its inputs are \(11, 1, 6, 5\)"
    )
    with pytest.raises(InputError, match=text):
        TrainingLoop(image_task(is_augmented=True), Data(gray, gray, gray, {"n_classes": 2}), seed=0)


def test_a_stream_without_augmentation_saves_what_it_always_saved():
    stream = EpochBatches(image_data().train, 4, generator())
    assert set(stream.state_dict()) == {"order", "position", "generator"}
