"""One root seed, and independent generators by name.

Called by everything that draws. Nothing here or elsewhere seeds a global generator, so that drawing for one
purpose (exploration) never moves what another draws (data order).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from trimtab.errors import InputError

__all__ = ["derive_seed", "numpy_generator", "scoped_global_rng", "scoped_numpy_rng", "torch_generator"]


def derive_seed(root: int, *path: str | int) -> int:
    """Derive a 63-bit seed from a root seed and a path of names, with NumPy's SeedSequence.

    Args:
        root: The root seed, 0 or more.
        path: Names and numbers of 0 or more that say what is drawn, for example "data order", 3. A number 0 at the
            end counts for nothing, as NumPy has it: use a path with it or without, not both.

    Raises:
        InputError: A number is negative.

    >>> derive_seed(0, "weights") == derive_seed(0, "weights") != derive_seed(0, "data order")
    True
    """
    if root < 0 or any(isinstance(part, int) and part < 0 for part in path):
        raise InputError(f"seed {root} with the path {path}; expected whole numbers of 0 or more")
    words = [part if isinstance(part, int) else zlib.crc32(part.encode()) for part in path]
    return int(np.random.SeedSequence([root, *words]).generate_state(2, np.uint32).view(np.uint64)[0] >> np.uint64(1))


def numpy_generator(root: int, *path: str | int) -> np.random.Generator:
    """Independent NumPy generator for one purpose."""
    return np.random.default_rng(derive_seed(root, *path))


def torch_generator(root: int, *path: str | int) -> torch.Generator:
    """Independent CPU generator of torch for one purpose."""
    return torch.Generator().manual_seed(derive_seed(root, *path))


@contextmanager
def scoped_global_rng(states: list[torch.Tensor] | None, device: torch.device) -> Iterator[list[torch.Tensor]]:
    """Lend torch's global generators to code that can draw from nothing else (dropout, weight initialisation).

    On entry the generators of the CPU and of `device` are set to `states`; on exit the list holds where they
    ended, and the generators are put back to what they were before.

    Args:
        states: [CPU state, device state if `device` is CUDA]; changed in place. None lends them as they are.
        device: The device whose generator is lent beside the CPU's.
    """
    is_cuda = device.type == "cuda"
    before = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if is_cuda else [])]
    lent = [state.clone() for state in before] if states is None else states
    try:
        torch.set_rng_state(lent[0])
        if is_cuda:
            torch.cuda.set_rng_state(lent[1], device)
        yield lent
    finally:
        lent[0] = torch.get_rng_state()
        torch.set_rng_state(before[0])
        if is_cuda:
            lent[1] = torch.cuda.get_rng_state(device)
            torch.cuda.set_rng_state(before[1], device)


@contextmanager
def scoped_numpy_rng(seed: int) -> Iterator[None]:
    """Lend NumPy's global generator, set by a seed, to a library that can draw from nothing else; then put it back.

    Args:
        seed: 0 or more, as `derive_seed` gives it.
    """
    before = np.random.get_state()  # noqa: NPY002 (lent, not drawn from)
    try:
        np.random.set_state(dict(np.random.MT19937(seed).state))  # noqa: NPY002
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002
