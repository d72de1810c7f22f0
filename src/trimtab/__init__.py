"""trimtab: reinforcement-learning controllers that set hyperparameters while a PyTorch model trains.

Public names are resolved when they are first used (PEP 562), so that importing trimtab imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from trimtab.version import __version__

if TYPE_CHECKING:
    from trimtab.adapters.ask_tell import HyperParameterOptimizer
    from trimtab.adapters.pytorch import RLScheduler
    from trimtab.brain import Brain
    from trimtab.controller import Controller
    from trimtab.errors import ConflictError, InputError, RunFailedError, TrimtabError
    from trimtab.experiments.run import run
    from trimtab.pruner.loading import load_pruned
    from trimtab.pruner.prune import prune
    from trimtab.records import Decision
    from trimtab.safety import Gate, Safety
    from trimtab.spec import ControlSpec

__all__ = [
    "Brain",
    "ConflictError",
    "ControlSpec",
    "Controller",
    "Decision",
    "Gate",
    "HyperParameterOptimizer",
    "InputError",
    "RLScheduler",
    "RunFailedError",
    "Safety",
    "TrimtabError",
    "__version__",
    "load_pruned",
    "prune",
    "run",
]

_HOMES = {
    "Brain": "trimtab.brain",
    "ConflictError": "trimtab.errors",
    "ControlSpec": "trimtab.spec",
    "Controller": "trimtab.controller",
    "Decision": "trimtab.records",
    "Gate": "trimtab.safety",
    "HyperParameterOptimizer": "trimtab.adapters.ask_tell",
    "InputError": "trimtab.errors",
    "RLScheduler": "trimtab.adapters.pytorch",
    "RunFailedError": "trimtab.errors",
    "Safety": "trimtab.safety",
    "TrimtabError": "trimtab.errors",
    "load_pruned": "trimtab.pruner.loading",
    "prune": "trimtab.pruner.prune",
    "run": "trimtab.experiments.run",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'trimtab' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
