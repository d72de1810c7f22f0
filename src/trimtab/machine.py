"""On what something runs: versions, device, threads, and how many processes this machine has room for.

Called by the experiments for study.json, by the learning of brains, and by what lends torch a number of threads. Asking
for versions imports nothing.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

from trimtab.errors import InputError
from trimtab.version import __version__

__all__ = ["default_workers", "describe", "differences", "resolve_device", "torch_threads"]

_PACKAGES = ("torch", "numpy")


def describe(settings: Mapping[str, Any], packages: Sequence[str] = _PACKAGES) -> dict[str, Any]:
    """What a folder of results says of the machine.

    Args:
        settings: device and threads.
        packages: Installed packages whose versions count.
    """
    return {
        "python": platform.python_version(),
        "trimtab": __version__,
        **{name: metadata.version(name) for name in packages},
        "device": resolve_device(str(settings["device"])),
        "threads": settings["threads"],
        "platform": f"{platform.system()} {platform.machine()}",
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any], what: str = "study") -> list[str]:
    """What is not as it was when something (a study) was begun, one line for each difference."""
    return [
        f"{key} was {before[key]} when this {what} was begun and is {value} now"
        for key, value in now.items()
        if key in before and before[key] != value
    ]


def resolve_device(device: str) -> str:
    """The device that "auto" stands for on this machine; any other one as it is, if it is there.

    Raises:
        InputError: A CUDA device is asked for and there is none.
    """
    if device == "cpu":
        return device
    import torch

    has_cuda = torch.cuda.is_available()
    if device == "auto":
        return "cuda" if has_cuda else "cpu"
    index = int(device.partition(":")[2] or 0)
    if not has_cuda or index >= torch.cuda.device_count():
        found = torch.cuda.device_count() if has_cuda else 0
        raise InputError(f"device: got {device!r}, but torch finds {found} CUDA devices; give 'cpu' or 'auto'")
    return device


def default_workers(device: str, threads: int) -> int:
    """Processes at once: one for each core that we may use, by threads; a GPU is not shared."""
    if device.startswith("cuda"):
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // threads)


@contextlib.contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Lend torch a number of threads in a process that is not ours alone; None leaves it as it is."""
    if threads is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
