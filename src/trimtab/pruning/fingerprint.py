"""Fingerprint: a short name for what tensors hold, by which scores that were written down are known to be theirs.

Called by `scorer` for a network's weights and by `trimtab.pruner` for what a folder was made with.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

__all__ = ["fingerprint"]


def fingerprint(nest: Any) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of everything in a nest of tensors: values, shapes, types, names.

    Args:
        nest: Tensors in dicts, lists and tuples, such as a `state_dict`; of what is no tensor its `repr` counts.
    """
    found = hashlib.sha256()
    leaves, structure = tree_flatten(nest)
    found.update(str(structure).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            found.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            flat = leaf.detach().cpu().contiguous().flatten()
            found.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
        else:
            found.update(repr(leaf).encode())
    return found.hexdigest()[:16]
