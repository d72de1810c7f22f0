"""Policies: what the agent "ppo" knows before it sees a network, as a brain file.

Called by `stage`, which starts from one, and by `learn`, which makes one. Only the weights are kept: what they are for
is fixed by the features and actions of `trimtab/Pruning-v0`, which stand in the file and are compared.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab import brain_files, brains
from trimtab.agents.widths import shapes_of
from trimtab.envs.pruning import FEATURES, N_LEVELS
from trimtab.errors import BrainError, InputError

__all__ = ["BRAIN", "KIND", "SHIPPED", "TaughtPolicy"]

SHIPPED = "pruning"
BRAIN = "brain"  # below the folder of `trimtab learn pruning`
KIND = "trimtab-pruning-policy"
VERSION = 1


@dataclass(frozen=True)
class TaughtPolicy:
    """A policy of widths.

    Attributes:
        weights: Of `trimtab.agents.widths.WidthPolicy`.
        provenance: JSON-able: where it comes from.
        digest: SHA-256 of the file of its weights; empty where it has none yet.
    """

    weights: Mapping[str, Tensor]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""

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
        """Load the one we ship, by its name, or one from its folder, or from that of `trimtab learn pruning`.

        Raises:
            BrainError: The folder holds none, or a broken one, or one for other features; nothing is executed.
            InputError: It is neither a name nor a folder.
        """
        if not isinstance(source, (str, Path)):
            raise InputError(
                f"brain is {source!r}; expected {SHIPPED!r}, or a folder that `trimtab learn pruning` made"
            )
        folder = (brains.folder_of(source) if isinstance(source, str) else None) or Path(source)
        if (folder / BRAIN / "brain.json").is_file():
            folder = folder / BRAIN
        data = brain_files.read_description(
            folder, kind=KIND, version=VERSION, shipped=SHIPPED, others=("features", "n_actions")
        )
        if data["features"] != list(FEATURES) or data["n_actions"] != N_LEVELS:
            raise BrainError(
                f"the policy in {folder} was taught for other features or actions than this trimtab's "
                "trimtab/Pruning-v0; make it anew with `trimtab learn pruning`"
            )
        weights = brain_files.read_weights(folder, data)
        _check(weights, folder)
        found = dict(sorted(weights.items()))  # the file's order is another one each time
        return cls(found, data["provenance"], data["sha256"])

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


def _check(weights: Mapping[str, Tensor], folder: Path) -> None:
    """Refuse weights of another network, or that are no numbers, before anything is scored.

    Raises:
        BrainError: Naming the tensor.
    """
    expected = shapes_of(len(FEATURES), N_LEVELS)
    for name in [*expected, *(name for name in weights if name not in expected)]:
        found = tuple(weights[name].shape) if name in weights else "missing"
        if found != expected.get(name):
            wanted = expected.get(name, "no such tensor")
            raise BrainError(f"the policy in {folder}: {name} is {found}, expected {wanted}; make it anew")
        if not bool(torch.isfinite(weights[name]).all()):
            raise BrainError(f"the policy in {folder}: {name} has numbers that are not finite; make it anew")
