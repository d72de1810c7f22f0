"""Tiny networks that read a few characters and say which comes next: a causal transformer, and a GRU.

Called by `Network.make`. Both are made of plain torch modules with torch's default initial weights, have no dropout and
keep nothing between calls, so that copies of one can be trained at once by `trimtab.training.functional`. Characters
come as whole numbers in floats, since the inputs of a `SmallTask` are floats. One class is given for a whole row, the
character after its last one: what only earlier positions would need of the last layer is not worked out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

__all__ = ["CharGRU", "CharTransformer"]


class CharTransformer(nn.Module):
    """Token and position embeddings, blocks with LayerNorm before attention and MLP, LayerNorm, readout.

    Source: Vaswani et al. 2017, arXiv:1706.03762, with the LayerNorm in front (Xiong et al. 2020, arXiv:2002.04745).

    Args:
        n_characters: Size of the alphabet, inputs and outputs.
        context: T, characters in a row.
        width: Of the embeddings; a multiple of `heads`. The MLP is twice as wide.
        n_blocks: At least 1.
        heads: Of the attention.
        activation: Makes the MLP's activation.
    """

    def __init__(
        self,
        n_characters: int,
        context: int,
        width: int,
        n_blocks: int,
        heads: int,
        activation: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(n_characters, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(_Block(width, heads, activation()) for _ in range(n_blocks))
        self.norm = nn.LayerNorm(width)
        self.readout = nn.Linear(width, n_characters)

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, T) characters -> (B, n_characters) logits of the one after the last."""
        x = self.tokens(inputs.long()) + self.positions.weight
        for block in self.blocks[:-1]:
            x = block(x, x.shape[-2])
        logits: Tensor = self.readout(self.norm(self.blocks[-1](x, 1)).squeeze(-2))
        return logits


class _Block(nn.Module):
    """Causal self-attention, then an MLP on each position; both are added to what they read."""

    def __init__(self, width: int, heads: int, activation: nn.Module) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        # Without a bias: that of keys changes nothing, so that its gradient is rounding alone, which Adam would follow.
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), activation, nn.Linear(2 * width, width))

    def forward(self, x: Tensor, n_last: int) -> Tensor:
        """(B, T, width) -> (B, n_last, width), the last positions alone."""
        read = self.norm1(x)
        x = x[:, -n_last:]
        queries = self._by_head(self.query(read[:, -n_last:]))
        keys, values = (self._by_head(part) for part in self.key_value(read).chunk(2, -1))
        scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])  # (B, heads, n_last, T)
        if n_last > 1:
            later = torch.ones(n_last, n_last, dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(later, -math.inf)
        mixed = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        added: Tensor = x + self.mlp(self.norm2(x))
        return added

    def _by_head(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, heads, T, width / heads)."""
        return x.view(*x.shape[:-1], self.heads, -1).transpose(1, 2)


class CharGRU(nn.Module):
    """Embedding, layers of gated recurrent units, readout of the last state.

    Source: Cho et al. 2014, arXiv:1406.1078, in the form of `torch.nn.GRU` (the reset gate acts on the product with the
    state's matrix), whose own kernel cannot be run for several sets of weights at once.

    Args:
        n_characters: Size of the alphabet, inputs and outputs.
        widths: Units of each layer; the embedding is as wide as the first.
    """

    def __init__(self, n_characters: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.tokens = nn.Embedding(n_characters, widths[0])
        sizes = [widths[0], *widths]
        self.from_input = nn.ModuleList(nn.Linear(n, 3 * m) for n, m in zip(sizes[:-1], widths, strict=True))
        self.from_state = nn.ModuleList(nn.Linear(width, 3 * width) for width in widths)
        self.readout = nn.Linear(widths[-1], n_characters)

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, T) characters -> (B, n_characters) logits of the one after the last."""
        x = self.tokens(inputs.long())
        for from_input, from_state in zip(self.from_input, self.from_state, strict=True):
            states = self._layer(from_input(x).unbind(1), from_state)
            x = torch.stack(states, 1)
        logits: Tensor = self.readout(states[-1])
        return logits

    @staticmethod
    def _layer(inputs: Sequence[Tensor], from_state: nn.Module) -> list[Tensor]:
        """The states (B, width) after each position; its products with the layer's input are given, (B, 3 width)."""
        width = inputs[0].shape[-1] // 3
        state = inputs[0].new_zeros(inputs[0].shape[0], width)
        states = []
        for given in inputs:
            recurrent = from_state(state)
            gates = torch.sigmoid(given[:, : 2 * width] + recurrent[:, : 2 * width])
            candidate = torch.tanh(given[:, 2 * width :] + gates[:, :width] * recurrent[:, 2 * width :])
            state = candidate + gates[:, width:] * (state - candidate)
            states.append(state)
        return states
