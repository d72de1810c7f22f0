"""Generated tables, as pools: scikit-learn's make_classification, a random teacher network, a linear regression.

Called by `families`. The linear regression is made so that the loss surface is known: over the train rows the
inputs have mean 0 and exactly the covariance that was drawn, so that a linear model with squared error is a quadratic
whose Hessian is twice that covariance for the weights, and 2 for the bias.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from trimtab.tasks.pools import Pool, Sizes, log_uniform, log_uniform_count

__all__ = [
    "CLASSES",
    "CLASS_SEPARATION",
    "CONDITION",
    "FEATURES",
    "REGRESSION_NOISE",
    "REGRESSION_SCALE",
    "TEACHER_BIAS",
    "TEACHER_GAIN",
    "TEACHER_LAYERS",
    "TEACHER_NOISE",
    "TEACHER_WIDTH",
    "linear_regression",
    "make_classification",
    "teacher_student",
]

FEATURES = (4, 32)
CLASSES = (2, 10)
CLASS_SEPARATION = (0.5, 2.0)
TEACHER_LAYERS = (1, 2)
TEACHER_WIDTH = (4, 32)
TEACHER_GAIN = (1.0, 3.0)  # above 1 a teacher is clearly not linear
TEACHER_BIAS = 0.5  # deviation of the biases of its hidden units
TEACHER_NOISE = (0.0, 0.5)  # deviation, of a signal with deviation 1
CONDITION = (1.0, 1e4)
REGRESSION_SCALE = (0.3, 3.0)  # root of the inputs' mean variance: curvatures differ 100 times between tasks
REGRESSION_NOISE = (0.03, 1.0)  # deviation, of a signal with deviation 1
ROWS_PER_FEATURE = 4  # train rows for each feature of a linear regression, at least

Floats = npt.NDArray[np.float64]


def make_classification(generator: np.random.Generator, sizes: Sizes) -> Pool:
    """Gaussian clusters at the corners of a hypercube, some features useless, some combinations of others."""
    from sklearn.datasets import make_classification as sample

    n_features, n_classes = _whole(generator, FEATURES), _whole(generator, CLASSES)
    n_clusters = _whole(generator, (1, 2))
    if n_classes * n_clusters > 2**n_features:  # corners that there are
        n_clusters = 1
    n_informative = _whole(generator, (math.ceil(math.log2(n_classes * n_clusters)), n_features))
    n_redundant = int(generator.integers(0, n_features - n_informative + 1))
    separation = log_uniform(generator, *CLASS_SEPARATION)
    inputs, labels = sample(
        n_samples=sizes.total,
        n_features=n_features,
        n_informative=n_informative,
        n_redundant=n_redundant,
        n_classes=n_classes,
        n_clusters_per_class=n_clusters,
        flip_y=0.0,  # wrong labels are put in for all sources alike
        class_sep=separation,
        random_state=int(generator.integers(2**31)),
    )
    drawn = {
        "n_informative": n_informative,
        "n_redundant": n_redundant,
        "n_clusters": n_clusters,
        "class_separation": separation,
    }
    return Pool(inputs, labels.astype(np.int64), n_classes, drawn, "feature")


def teacher_student(generator: np.random.Generator, sizes: Sizes) -> Pool:
    """Normal inputs, and what a random network makes of them: its number plus noise, or its largest output.

    Outputs of the teacher are standardised over the pool, so that the classes are of about the same size.
    """
    is_classification = bool(generator.random() < 0.5)
    n_features = _whole(generator, FEATURES)
    n_layers, width = _whole(generator, TEACHER_LAYERS), log_uniform_count(generator, *TEACHER_WIDTH)
    gain = log_uniform(generator, *TEACHER_GAIN)
    is_relu = bool(generator.random() < 0.5)
    n_outputs = _whole(generator, CLASSES) if is_classification else 1
    inputs = generator.standard_normal((sizes.total, n_features))
    values = inputs
    for _ in range(n_layers):
        values = values @ (generator.standard_normal((values.shape[1], width)) * gain / math.sqrt(values.shape[1]))
        values = values + generator.standard_normal(width) * TEACHER_BIAS
        values = np.maximum(values, 0.0) if is_relu else np.tanh(values)
    outputs = values @ generator.standard_normal((width, n_outputs))
    deviation = outputs.std(axis=0)
    outputs = (outputs - outputs.mean(axis=0)) / np.where(deviation > 0, deviation, 1.0)  # 0: units that are all dead
    drawn: dict[str, float | str] = {
        "teacher_layers": n_layers,
        "teacher_width": width,
        "teacher_gain": gain,
        "teacher_activation": "relu" if is_relu else "tanh",
    }
    if is_classification:
        return Pool(inputs, outputs.argmax(axis=1).astype(np.int64), n_outputs, drawn, "feature")
    noise = generator.uniform(*TEACHER_NOISE)
    targets = outputs[:, 0] + noise * generator.standard_normal(sizes.total)
    return Pool(inputs, targets, 1, drawn | {"noise": noise}, "feature")


def linear_regression(generator: np.random.Generator, sizes: Sizes) -> Pool:
    """Numbers that are linear in the inputs, plus noise; the inputs' covariance has a drawn spectrum.

    Eigenvalues are log-uniform between 1 and 1 / condition, both of which occur, then scaled; eigenvectors are a
    random rotation. The coefficient along an eigenvector with eigenvalue e is normal with deviation e^(-a/2), a
    uniform in [0, 1]: at a = 1 every direction is worth as much to the loss, at a = 0 the flat ones hardly count.
    """
    most = min(FEATURES[1], sizes.train // ROWS_PER_FEATURE)
    n_features = _whole(generator, (FEATURES[0], most))
    condition = log_uniform(generator, *CONDITION)
    scale = log_uniform(generator, *REGRESSION_SCALE)
    flatness, noise = generator.uniform(), log_uniform(generator, *REGRESSION_NOISE)
    inner = [log_uniform(generator, 1.0 / condition, 1.0) for _ in range(n_features - 2)]
    eigenvalues = np.array([1.0, *inner, 1.0 / condition])
    eigenvalues *= scale**2 / eigenvalues.mean()
    rotation = _rotation(generator, n_features)
    white = _whitened(generator.standard_normal((sizes.total, n_features)), sizes.train)
    signal = white @ (eigenvalues ** ((1.0 - flatness) / 2) * generator.standard_normal(n_features))
    targets = signal / signal[: sizes.train].std() + noise * generator.standard_normal(sizes.total)
    inputs = (white * np.sqrt(eigenvalues)) @ rotation.T
    drawn = {"condition": condition, "scale": scale, "flatness": flatness, "noise": noise}
    return Pool(inputs, targets, 1, drawn, "none")


def _whitened(rows: Floats, n_train: int) -> Floats:
    """Rows shifted and mixed so that the first `n_train` have mean 0 and the unit matrix as covariance."""
    centred = rows - rows[:n_train].mean(axis=0)
    factor = np.linalg.cholesky(centred[:n_train].T @ centred[:n_train] / n_train)
    whitened: Floats = np.linalg.solve(factor, centred.T).T
    return whitened


def _rotation(generator: np.random.Generator, size: int) -> Floats:
    """A random orthogonal matrix, all equally likely."""
    q, r = np.linalg.qr(generator.standard_normal((size, size)))
    rotation: Floats = q * np.sign(np.diag(r))  # without the signs some matrices are likelier
    return rotation


def _whole(generator: np.random.Generator, bounds: tuple[int, int]) -> int:
    """A whole number within the bounds, both included, all equally likely."""
    return int(generator.integers(bounds[0], bounds[1] + 1))
