"""Families of small tasks to learn controllers on: one seed, and as many independent tasks as wanted.

Called by the learning of brains and by its benchmarks. What is drawn, from which ranges, stands in docs/families.md.
A controller that is shipped is judged on data sets it never saw: no source here is one of `HELD_OUT`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, TypeVar

import numpy as np

from trimtab.errors import InputError, unknown_name
from trimtab.seeding import numpy_generator
from trimtab.tasks import bundled, generated_images, generated_vectors, python_source
from trimtab.tasks.pools import (
    MAX_LABEL_NOISE,
    TRAIN_ROWS,
    Pool,
    Sizes,
    cut,
    draw_sizes,
    flip_labels,
    log_uniform,
    log_uniform_count,
)
from trimtab.tasks.small import Network, SmallTask

__all__ = [
    "BATCH_SIZES",
    "FAMILIES",
    "HELD_OUT",
    "SEQUENCE_FAMILIES",
    "SOURCES",
    "check_train_rows",
    "draw_task",
    "draw_tasks",
    "is_held_out",
]

HELD_OUT = ("cifar10", "digits", "imdb", "mnist", "shakespeare", "sst2", "titanic")

BATCH_SIZES = (8, 16, 32, 64)
MLP_WIDTH = (4, 32)
MLP_LAYERS = (1, 3)
IMAGE_MLP_WIDTH = (16, 64)
WIDE_MLP_WIDTH = (64, 128)
CNN_CHANNELS = (2, 8)
CNN_LAYERS = (1, 2)
SEQUENCE_WIDTHS = {8: 0.4, 16: 0.4, 32: 0.2}  # powers of two, which heads divide
SEQUENCE_LAYERS = {1: 0.6, 2: 0.4}
ATTENTION_HEADS = {1: 0.5, 2: 0.5}
# Of fewer characters a network learns hardly more than how often each occurs; a wide one learns fewer rows by heart.
MANY_TRAIN_ROWS = (512, 4096)
MOST_TRAIN_ROWS = 16384  # what there is of Python's source; and drawing more takes longer than training on them
DROPOUT = (0.05, 0.3)
COUPLED_DECAY = (1e-5, 1e-2)  # SGD and Adam, where it is added to the gradient
DECOUPLED_DECAY = (1e-3, 1e-1)  # AdamW, where it is multiplied by the rate

_SHARE_WITHOUT = {"label noise": 0.5, "dropout": 0.75, "weight decay": 0.6}
_OPTIMIZERS: dict[tuple[Literal["sgd", "adam", "adamw"], float], float] = {
    ("sgd", 0.9): 0.25,
    ("sgd", 0.0): 0.15,
    ("adam", 0.0): 0.35,
    ("adamw", 0.0): 0.25,
}
_BETAS = {(0.9, 0.999): 0.7, (0.9, 0.99): 0.2, (0.9, 0.95): 0.1}
_ACTIVATIONS: dict[Literal["relu", "tanh", "gelu"], float] = {"relu": 0.5, "tanh": 0.25, "gelu": 0.25}
# The four tables are tiny: most tasks are generated, so that a controller cannot learn the tables by heart.
_MLP_SOURCES = {
    "teacher-student": 0.35,
    "make-classification": 0.25,
    "wine": 0.1,
    "breast-cancer": 0.1,
    "iris": 0.1,
    "diabetes": 0.1,
}
# Textures are left out: where a network has no filters, hardly anything can be learned of them.
_FLAT_SOURCES = {"smooth-fields": 0.5, "shifted-prototypes": 0.3, "gratings": 0.2}
_SHARES = {
    "mlp": _MLP_SOURCES,
    "image_mlp": _FLAT_SOURCES,
    "wide_mlp": _FLAT_SOURCES,
    "cnn": dict.fromkeys(generated_images.IMAGES, 1 / len(generated_images.IMAGES)),
    "quadratic": {"linear-regression": 1.0},
    "attention": {"python-source": 1.0},
    "recurrent": {"python-source": 1.0},
}
_WIDTHS = {"mlp": MLP_WIDTH, "image_mlp": IMAGE_MLP_WIDTH, "wide_mlp": WIDE_MLP_WIDTH}
FAMILIES = tuple(_SHARES)
SEQUENCE_FAMILIES = ("attention", "recurrent")
SOURCES = {family: tuple(shares) for family, shares in _SHARES.items()}

_MAKERS: dict[str, Callable[[np.random.Generator, Sizes], Pool]] = {
    **bundled.BUNDLED,
    **generated_images.IMAGES,
    "linear-regression": generated_vectors.linear_regression,
    "make-classification": generated_vectors.make_classification,
    "python-source": python_source.python_source,
    "teacher-student": generated_vectors.teacher_student,
}
_T = TypeVar("_T")


def draw_tasks(family: str, n: int, seed: int, *, batch_size: int | None = None) -> list[SmallTask]:
    """Draw independent tasks of a family; task i depends on the family, the seed and i alone.

    Args:
        family: One of `FAMILIES`.
        n: How many, at least 1.
        seed: Root seed, 0 or more.
        batch_size: See `draw_task`.

    Raises:
        UnknownNameError: No such family.
        InputError: A number out of range.
    """
    _check_family(family)
    if not _is_whole(n) or n < 1:
        raise InputError(f"n is {n!r}; expected how many tasks to draw, a whole number of at least 1")
    if not _is_whole(seed) or seed < 0:
        raise InputError(f"seed is {seed!r}; expected a whole number of at least 0")
    generators = (numpy_generator(seed, "small task", index, family) for index in range(n))
    return [draw_task(family, generator, batch_size=batch_size) for generator in generators]


def draw_task(
    family: str,
    generator: np.random.Generator,
    *,
    batch_size: int | None = None,
    train_rows: tuple[int, int] | None = None,
    like: SmallTask | None = None,
) -> SmallTask:
    """Draw one task of a family.

    Args:
        family: One of `FAMILIES`.
        generator: What everything is drawn from.
        batch_size: Rows of an optimizer step, 1 to 64 (the least rows of train); None draws one of `BATCH_SIZES`. All
            else is drawn the same with and without it.
        train_rows: Least and most rows of train, 64 or more, drawn log-uniformly; a table of few rows gives at most
            half of what it has. None is the family's own range.
        like: A task of the same family, one of `SEQUENCE_FAMILIES`, whose network and length of rows are taken, so that
            both can be trained as copies of one network; None draws them.

    Raises:
        UnknownNameError: No such family.
        InputError: `like` is of another family, or of one whose networks are stacked as they are; the generator, the
            batch size or the range of rows is not one; or Python's source, which a family reads, is not there.
    """
    _check_family(family)
    if not isinstance(generator, np.random.Generator):
        raise InputError(f"generator is {generator!r}; expected a numpy Generator, such as numpy.random.default_rng(0)")
    if batch_size is not None and not (_is_whole(batch_size) and 1 <= batch_size <= BATCH_SIZES[-1]):
        raise InputError(f"batch_size is {batch_size!r}; expected None or a whole number of 1 to {BATCH_SIZES[-1]}")
    check_train_rows(train_rows)
    if like is not None and not (like.family == family in SEQUENCE_FAMILIES):
        raise InputError(
            f"like is a task of family {like.family!r} for one of {family!r}; expected None, or one of the same family "
            f"among {', '.join(SEQUENCE_FAMILIES)}"
        )
    source = _choose(generator, _SHARES[family])
    has_many_rows = family in (*SEQUENCE_FAMILIES, "wide_mlp")
    rows = train_rows or (MANY_TRAIN_ROWS if has_many_rows else TRAIN_ROWS)
    sizes = draw_sizes(generator, bundled.N_ROWS.get(source), rows)
    if like is not None:
        pool = python_source.python_source(generator, sizes, context=like.input_shape[0])
    elif family == "wide_mlp":
        pool = generated_images.LARGE_IMAGES[source](generator, sizes)
    else:
        pool = _MAKERS[source](generator, sizes)
    if family in ("image_mlp", "wide_mlp"):
        pool = replace(pool, inputs=pool.inputs.reshape(len(pool.inputs), -1))
    is_classification = pool.targets.dtype == np.int64
    drawn = dict(pool.drawn)
    if is_classification:
        noise = _sometimes(generator, "label noise", generator.uniform(0.0, MAX_LABEL_NOISE))
        # In all four splits, so that they stay draws of one distribution, as where wrong labels are in the data.
        labels = flip_labels(pool.targets, pool.n_outputs, noise, generator)
        drawn["label_noise"] = noise
        pool = Pool(pool.inputs, labels, pool.n_outputs, drawn, pool.scaling)
    train, val, score, test = cut(pool, sizes)
    optimizer, momentum = _choose(generator, _OPTIMIZERS)
    decay = log_uniform(generator, *(DECOUPLED_DECAY if optimizer == "adamw" else COUPLED_DECAY))
    betas = _choose(generator, _BETAS)
    own_batch_size = int(generator.choice(BATCH_SIZES))
    network = _draw_network(family, generator)
    return SmallTask(
        family=family,
        source=source,
        kind="classification" if is_classification else "regression",
        train=train,
        val=val,
        score=score,
        test=test,
        n_outputs=pool.n_outputs,
        network=network if like is None else like.network,
        optimizer=optimizer,
        momentum=momentum,
        betas=betas,
        weight_decay=_sometimes(generator, "weight decay", decay),
        batch_size=own_batch_size if batch_size is None else batch_size,
        drawn=drawn,
    )


def check_train_rows(train_rows: tuple[int, int] | None) -> None:
    """Raise InputError where it is not None, or two whole numbers in order of 64 (the largest batch) to 16384."""
    if train_rows is None:
        return
    numbers = isinstance(train_rows, tuple) and len(train_rows) == 2 and all(_is_whole(rows) for rows in train_rows)
    if not numbers or not BATCH_SIZES[-1] <= train_rows[0] <= train_rows[1] <= MOST_TRAIN_ROWS:
        raise InputError(
            f"train_rows is {train_rows!r}; expected None, or the least and most rows of train, "
            f"{BATCH_SIZES[-1]} to {MOST_TRAIN_ROWS} and in order"
        )


def is_held_out(name: str) -> bool:
    """Whether a data set or task is one that controllers are judged on, however it is spelled.

    Args:
        name: Such as "uoft-cs/cifar10", "digits-mlp" or "SST-2". Variants count too: "fashion-mnist" is held out.

    >>> is_held_out("SST-2"), is_held_out("wine")
    (True, False)
    """
    letters = re.sub(r"[^a-z0-9]", "", name.lower())
    return any(held in letters for held in HELD_OUT)


def _draw_network(family: str, generator: np.random.Generator) -> Network:
    """All hidden layers have one width but the convolutions of a CNN, whose channels are drawn one by one."""
    activation = _choose(generator, _ACTIVATIONS)
    dropout = _sometimes(generator, "dropout", generator.uniform(*DROPOUT))
    if family == "quadratic":
        return Network("mlp", (), "relu")
    if family in _WIDTHS:
        n_layers = int(generator.integers(MLP_LAYERS[0], MLP_LAYERS[1] + 1))
        width = log_uniform_count(generator, *_WIDTHS[family])
        return Network("mlp", (width,) * n_layers, activation, dropout)
    if family in SEQUENCE_FAMILIES:
        hidden = (_choose(generator, SEQUENCE_WIDTHS),) * _choose(generator, SEQUENCE_LAYERS)
        heads = _choose(generator, ATTENTION_HEADS)
        if family == "recurrent":
            return Network("recurrent", hidden, "tanh")
        return Network("attention", hidden, activation, heads=heads)
    n_layers = int(generator.integers(CNN_LAYERS[0], CNN_LAYERS[1] + 1))
    channels = tuple(log_uniform_count(generator, *CNN_CHANNELS) for _ in range(n_layers))
    return Network("cnn", channels, activation, dropout)


def _choose(generator: np.random.Generator, shares: dict[_T, float]) -> _T:
    """One of the keys, each with its share."""
    return list(shares)[int(generator.choice(len(shares), p=list(shares.values())))]


def _sometimes(generator: np.random.Generator, what: str, value: float) -> float:
    """0 in a share of the draws, else the value."""
    return 0.0 if generator.random() < _SHARE_WITHOUT[what] else value


def _check_family(family: str) -> None:
    if family not in FAMILIES:
        raise unknown_name("family of tasks", family, FAMILIES)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
