"""Gymnasium environments in which agents learn; importing this registers them.

`gymnasium.make("trimtab/Training-v0", task="digits-mlp")` makes one run of a task,
`gymnasium.make_vec("trimtab/Training-v0", num_envs=256, families=("mlp",))` R runs of small networks at once,
`gymnasium.make("trimtab/Pruning-v0", model=..., ...)` the widths of a trained network, one part after the other.
Without an import: `gymnasium.make("trimtab.envs:trimtab/Training-v0", ...)`.
"""

from __future__ import annotations

import gymnasium

__all__ = ["PRUNING", "TRAINING", "register"]

TRAINING = "trimtab/Training-v0"
PRUNING = "trimtab/Pruning-v0"


def register() -> None:
    """Register the environments, once: called at import, and by tools that read the entry points `gymnasium.envs`."""
    if TRAINING not in gymnasium.registry:
        gymnasium.register(
            TRAINING,
            entry_point="trimtab.envs.training:TrainingEnv",
            vector_entry_point="trimtab.envs.batched:TrainingVectorEnv",
        )
    if PRUNING not in gymnasium.registry:
        gymnasium.register(PRUNING, entry_point="trimtab.envs.pruning:PruningEnv")


register()
