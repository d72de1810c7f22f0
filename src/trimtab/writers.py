"""Who else writes an optimizer's rate: living torch schedulers and controllers that hold it.

Called by the controller, at construction and when a rate is found changed. Two writers of one value, silently one
of them winning, is the error that this project exists to end (FINDINGS section 1).
"""

from __future__ import annotations

import gc
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["find_writers"]


def find_writers(optimizer: Optimizer, *, but: object = None) -> list[str]:
    """Class names of the living schedulers and controllers attached to an optimizer.

    Args:
        optimizer: Whose writers are looked for.
        but: A controller that asks: it, and the scheduler around it, are left out.
    """
    if _holders(optimizer, but):  # not kept in a name: that would hold alive what is looked for
        gc.collect()  # one that its owner has let go may only wait for the collector
    return sorted({type(holder).__name__ for holder in _holders(optimizer, but)})


def _holders(optimizer: Optimizer, but: object) -> list[Any]:
    holders = []
    for item in gc.get_objects():
        kind = type(item)
        if issubclass(kind, LRScheduler):
            owned, controller = vars(item).get("optimizer"), vars(item).get("_controller")
        elif kind.__name__ == "Controller" and kind.__module__ == "trimtab.controller":
            owned, controller = getattr(vars(item).get("state"), "optimizer", None), item
        else:
            continue
        if owned is optimizer and (but is None or controller is not but):
            holders.append(item)
    return holders
