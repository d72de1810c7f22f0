"""Gymnasium environments in which agents learn; importing this registers them.

`gymnasium.make_vec("trimtab/Training-v0", num_envs=256, families=("mlp",))` makes R runs at once.
"""

from __future__ import annotations

import gymnasium

__all__ = ["TRAINING"]

TRAINING = "trimtab/Training-v0"

if TRAINING not in gymnasium.registry:
    gymnasium.register(TRAINING, vector_entry_point="trimtab.envs.batched:TrainingVectorEnv")
