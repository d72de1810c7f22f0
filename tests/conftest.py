"""Guards that every test passes through, and fixtures that every folder of tests shares."""

from __future__ import annotations

import gc
import importlib
import os
import random
import signal
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

torch.set_num_threads(1)  # results to the bit, and two cores are shared by several workers
# What draws random numbers when it is first imported: scikit-learn, and torch's compiler with the first optimizer.
importlib.import_module("sklearn.datasets")
torch.optim.SGD([torch.zeros(1)], 0.1)
# A job that a shell starts in the background ignores Ctrl-C, and so would the processes that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Take what pytest and the libraries hold out of sight of `find_writers`, which goes through all other objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def leaves_no_trace() -> Iterator[None]:
    """Fail a test that seeds a global generator, leaves an environment variable, or a thread that keeps us alive."""
    seed, environment, threads = torch.initial_seed(), dict(os.environ), set(threading.enumerate())
    drawn = (random.getstate(), np.random.get_state()[1].tobytes())  # noqa: NPY002 (looked at, not drawn from)
    yield
    assert torch.initial_seed() == seed, "the test seeded torch's global generator"
    now = (random.getstate(), np.random.get_state()[1].tobytes())  # noqa: NPY002
    assert now == drawn, "the test drew from or seeded the global generator of random or numpy"
    left = {key for key in {*environment, *os.environ} if environment.get(key) != os.environ.get(key)}
    # What libraries set when they are first imported: torch's compiler, scikit-learn, gymnasium.
    left -= {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR"}
    left -= {"KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK", "PYGAME_HIDE_SUPPORT_PROMPT"}
    assert not left, f"environment variables were left changed: {sorted(left)}"
    alive = [thread.name for thread in set(threading.enumerate()) - threads if not thread.daemon and thread.is_alive()]
    assert not alive, f"threads were left running: {alive}"


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
            ],
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that there is."""
    return torch.device(request.param)


@pytest.fixture
def unwatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for no other writers: going through all objects of a test session takes 0.1 s for each scheduler."""
    monkeypatch.setattr("trimtab.controller.find_writers", lambda optimizer, but=None: [])
