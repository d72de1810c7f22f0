"""Who else writes an optimizer's rate: living torch schedulers and controllers that hold it.

Called by the controller, at construction and when a rate is found changed. Two writers of one value, silently one
of them winning, is the error that this project exists to end (FINDINGS section 1).
"""

from __future__ import annotations

import gc
import itertools
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["find_writers"]


def find_writers(optimizer: Optimizer, *, but: object = None) -> list[str]:
    """Class names of the living schedulers and controllers attached to an optimizer.

    Args:
        optimizer: Whose writers are looked for.
        but: A controller that asks: it, and the scheduler around it, are left out. So are controllers whose control
            has ended: they write nothing any more.
    """
    if _holders(optimizer, but):  # not kept in a name: that would hold alive what is looked for
        gc.collect()  # one that its owner has let go may only wait for the collector
    return sorted({type(holder).__name__ for holder in _holders(optimizer, but)})


def _holders(optimizer: Optimizer, but: object) -> list[Any]:
    holders = []
    everything = gc.get_objects()
    kinds = {kind for kind in set(map(type, everything)) if issubclass(kind, LRScheduler) or _is_controller(kind)}
    # Half a million objects: what looks at each of them has to be written in C.
    for item in itertools.compress(everything, map(kinds.__contains__, map(type, everything))):
        controller = item if _is_controller(type(item)) else vars(item).get("_controller")
        holder = vars(item) if controller is None else vars(vars(controller).get("state", item))
        has_ended = controller is not None and vars(controller).get("status", "running") != "running"
        if holder.get("optimizer") is optimizer and not has_ended and (but is None or controller is not but):
            holders.append(item)
    return holders


def _is_controller(kind: type) -> bool:
    return kind.__name__ == "Controller" and kind.__module__ == "trimtab.controller"
