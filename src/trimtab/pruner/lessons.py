"""Lessons: small trained networks that a policy learns on how wide parts should be.

Called by `teach`. Data are generated (`trimtab.tasks.families`): none of the sets that reports are made from. Networks
are drawn here, wider than the families' own, since there has to be something to prune: dense ones, and convolutions
with dense layers behind them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.seeding import derive_seed, numpy_generator, scoped_global_rng, torch_generator
from trimtab.tasks.families import draw_task

__all__ = ["FAMILIES", "Lesson", "draw_lesson"]

FAMILIES = ("mlp", "image_mlp", "wide_mlp", "cnn")
DENSE_WIDTHS = (32, 48, 64, 96, 128, 192, 256)
DENSE_LAYERS = (2, 4)
CHANNELS = (16, 24, 32, 48, 64)
CONVOLUTIONS = (1, 3)
TRAIN_ROWS = (1024, 4096)
STEPS = (150, 500)
BATCH_SIZE = 64
RATES = (5e-4, 3e-3)  # Adam's
LEAST_GAIN = 0.15  # of the accuracy over chance: a network that has learned nothing teaches nothing

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Lesson:
    """A trained network and what it is scored on.

    Attributes:
        model: In evaluation.
        inputs: (N, ...) that it was not trained on.
        targets: (N,) classes.
        family: Of the data.
        source: Where they come from.
        accuracy: Of the network on them.
    """

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    family: str
    source: str
    accuracy: float


def draw_lesson(seed: int, number: int) -> Lesson:
    """Draw data and a network, and train it; lesson `number` depends on the two numbers alone.

    What has not learned at least a seventh of the way from chance to perfect is drawn again.
    """
    for attempt in range(100):
        generator = numpy_generator(seed, "lesson", number, "attempt", attempt)
        family = FAMILIES[int(generator.integers(len(FAMILIES)))]
        task = draw_task(family, generator, batch_size=BATCH_SIZE, train_rows=TRAIN_ROWS)
        if task.kind != "classification" or len(task.train.inputs) < TRAIN_ROWS[0] // 2:
            continue
        states = [torch_generator(derive_seed(seed, "lesson", number), "weights", attempt).get_state()]
        with scoped_global_rng(states, _CPU):
            model = _network(generator, tuple(task.train.inputs.shape[1:]), task.n_outputs)
        _train(model, task.train.inputs, task.train.targets, generator)
        inputs = torch.cat([task.val.inputs, task.score.inputs, task.test.inputs])
        targets = torch.cat([task.val.targets, task.score.targets, task.test.targets])
        with torch.no_grad():
            accuracy = float((model(inputs).argmax(1) == targets).double().mean())
        chance = 1 / task.n_outputs
        if accuracy > chance + LEAST_GAIN * (1 - chance):
            return Lesson(model, inputs, targets, family, task.source, accuracy)
    raise RuntimeError(f"a hundred networks in a row learned nothing (seed {seed}, lesson {number})")


def _network(generator: np.random.Generator, shape: tuple[int, ...], n_outputs: int) -> nn.Module:
    layers: list[nn.Module] = []
    width = math.prod(shape)
    if len(shape) == 3:
        width, side = shape[0], shape[1]
        for _ in range(int(generator.integers(CONVOLUTIONS[0], CONVOLUTIONS[1] + 1))):
            channels = int(generator.choice(CHANNELS))
            layers += [nn.Conv2d(width, channels, 3, padding=1)]
            layers += [nn.BatchNorm2d(channels)] if generator.random() < 0.5 else []
            layers.append(nn.ReLU())
            if side >= 4 and generator.random() < 0.7:
                layers.append(nn.MaxPool2d(2))
                side //= 2
            width = channels
        layers.append(nn.Flatten())
        width *= side * side
    n_dense = int(generator.integers(DENSE_LAYERS[0], DENSE_LAYERS[1] + 1)) - (len(shape) == 3)
    activation = nn.ReLU if generator.random() < 0.7 else nn.GELU
    for _ in range(n_dense):
        units = int(generator.choice(DENSE_WIDTHS))
        layers += [nn.Linear(width, units), activation()]
        width = units
    return nn.Sequential(*layers, nn.Linear(width, n_outputs))


def _train(model: nn.Module, inputs: Tensor, targets: Tensor, generator: np.random.Generator) -> None:
    low, high = np.log(RATES)
    optimizer = torch.optim.Adam(model.parameters(), float(np.exp(generator.uniform(low, high))))
    n_steps, done = int(generator.integers(STEPS[0], STEPS[1] + 1)), 0
    model.train()
    while done < n_steps:
        for rows in np.split(generator.permutation(len(inputs)), range(BATCH_SIZE, len(inputs), BATCH_SIZE)):
            index = torch.from_numpy(rows)
            loss = nn.functional.cross_entropy(model(inputs[index]), targets[index])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            done += 1
            if done == n_steps:
                break
    model.eval()
