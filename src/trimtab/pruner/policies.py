"""Policies: what the agent "ppo" knows before it sees a network, as a brain file.

Called by `stage`, which starts from one, and by `learn`, which makes one. Only the weights are kept: what they are for
is fixed by the features and actions of `trimtab/Pruning-v0`, which stand in the file and are compared.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from trimtab import brain_files, brains
from trimtab.envs.pruning import FEATURES, N_LEVELS
from trimtab.errors import BrainError, InputError

__all__ = ["KIND", "SHIPPED", "TaughtPolicy"]

SHIPPED = "pruning"
KIND = "trimtab-pruning-policy"
VERSION = 1


@dataclass(frozen=True)
class TaughtPolicy:
    """A policy of widths.

    Attributes:
        weights: Of `trimtab.agents.widths.WidthPolicy`.
        provenance: JSON-able: where it comes from.
    """

    weights: Mapping[str, Tensor]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def for_methods(cls, methods: Collection[str], source: str | Path = SHIPPED) -> TaughtPolicy | None:
        """The policy where "ppo" is among the methods; None where it is not.

        Raises:
            BrainError: It cannot be loaded.
            InputError: Another one than ours was given, and nothing starts from it.
        """
        if "ppo" in methods:
            return cls.load(source)
        if source != SHIPPED:
            raise InputError(
                f"brain {str(source)!r} is what 'ppo' starts from, and {', '.join(methods)} is not; leave it out"
            )
        return None

    @classmethod
    def load(cls, source: str | Path = SHIPPED) -> TaughtPolicy:
        """Load the one we ship, by its name, or one from its folder.

        Raises:
            BrainError: The folder holds none, or a broken one, or one for other features; nothing is executed.
        """
        folder = (brains.folder_of(source) if isinstance(source, str) else None) or Path(source)
        data = brain_files.read_description(
            folder, kind=KIND, version=VERSION, shipped=SHIPPED, others=("features", "n_actions")
        )
        if data["features"] != list(FEATURES) or data["n_actions"] != N_LEVELS:
            raise BrainError(
                f"the policy in {folder} was taught for other features or actions than this trimtab's "
                "trimtab/Pruning-v0; make it anew with `trimtab learn pruning`"
            )
        weights = brain_files.read_weights(folder, data)
        return cls(dict(sorted(weights.items())), data["provenance"])  # the file's order is another one each time

    def save(self, directory: str | Path) -> Path:
        """Write it into a folder, each file whole or not at all, the description last.

        Returns:
            The folder.

        Raises:
            OutputError: The folder cannot be written.
        """
        description = {"features": list(FEATURES), "n_actions": N_LEVELS, "provenance": dict(self.provenance)}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.weights.items()}
        return brain_files.write(directory, description, tensors, kind=KIND, version=VERSION)
