"""In-place operations of a forward pass: which there are, and whether results can be kept in spite of them.

Called by `evaluation`, which runs operations one by one and keeps what they put out: what a later operation writes into
is no more what was kept. torch counts the writes to each tensor, so that they are seen whatever they are called.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

__all__ = ["tensors_of", "writers"]


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in a nest."""
    for leaf in tree_leaves(value):
        tensor = leaf.data if isinstance(leaf, PackedSequence) else leaf
        if isinstance(tensor, Tensor):
            yield tensor


def writers(graph: fx.Graph, model: nn.Module, inputs: tuple[Any, ...]) -> frozenset[fx.Node] | None:
    """Operations that write into what they are given and that others hold too, so that they have to be given copies.

    Args:
        graph: Of the forward.
        model: In evaluation; it is copied.
        inputs: Of its forward; they are copied.

    Returns:
        None where an operation reads by an older name what was written into: with copies it would read something else.
    """
    with torch.inference_mode(False), torch.no_grad():  # in which writes are counted
        probe = _Probe(copy.deepcopy(model), graph)
        probe.run(*copy.deepcopy(inputs))
    places = {node: place for place, node in enumerate(graph.nodes)}
    found = set()
    for writer, storages in probe.written.items():
        holders = {node for storage in storages for node in probe.holders[storage] if places[node] < places[writer]}
        users = {user for node in holders for user in node.users} - holders - {writer}
        if any(places[user] > places[writer] for user in users):
            return None
        if users or any(node.op in ("placeholder", "get_attr") for node in holders):
            found.add(writer)
    return frozenset(found)


class _Probe(fx.Interpreter):
    """Runs a graph and notes who holds which memory, and who writes into it.

    Attributes:
        written: Operation -> memory that was there before and that it wrote into.
        holders: Memory -> operations whose results lie in it.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, garbage_collect_values=False, graph=graph)  # kept, so that no address comes twice
        self.written: dict[fx.Node, set[int]] = {}
        self.holders: dict[int, set[fx.Node]] = defaultdict(set)

    def run_node(self, n: fx.Node) -> Any:
        before = [(t, t._version) for source in n.all_input_nodes for t in tensors_of(self.env[source])]
        value = super().run_node(n)
        changed = {_memory(tensor) for tensor, version in before if tensor._version != version}
        if changed:
            self.written[n] = changed
        for tensor in tensors_of(value):
            self.holders[_memory(tensor)].add(n)
        return value


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
