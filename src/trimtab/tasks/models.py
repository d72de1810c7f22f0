"""Networks of the tasks: MLP, small convolutional networks, classifiers of sentences, and a GPT.

Called by the task modules. Weights are drawn from torch's global generator, which the training loop lends.

The GPT is the architecture of nanoGPT (https://github.com/karpathy/nanoGPT, model.py; MIT), written anew:
pre-norm blocks, causal attention, GELU, an output head tied to the token embedding, normal(0, 0.02) weights
and residual projections scaled by 1/sqrt(2 layers). Deviation: none in the mathematics; the exact (erf) GELU
as there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from trimtab.errors import InputError
from trimtab.surgery import Head

__all__ = [
    "GPT",
    "PADDING",
    "BiLSTM",
    "BiLSTMDense",
    "GPTConfig",
    "LSTMDense",
    "MeanEmbedding",
    "PackedLSTM",
    "cifar10_cnn",
    "conv_dense",
    "digits_cnn",
    "mlp",
    "mnist_cnn",
    "scaled_width",
    "two_convolutions",
]

PADDING = 0  # the token that fills a sentence up to the common length


def mlp(n_inputs: int, hidden: Sequence[int], n_outputs: int, dropout: float = 0.0) -> nn.Sequential:
    """Fully connected network with ReLU, torch's default initialisation.

    Args:
        n_inputs: Features of a sample.
        hidden: Width of each hidden layer.
        n_outputs: Logits, or numbers.
        dropout: Probability after each hidden layer; 0 leaves the layer out.
    """
    layers: list[nn.Module] = []
    width = n_inputs
    for units in hidden:
        layers += [nn.Linear(width, units), nn.ReLU(), *([nn.Dropout(dropout)] if dropout > 0 else [])]
        width = units
    return nn.Sequential(*layers, nn.Linear(width, n_outputs))


def digits_cnn(n_classes: int, dropout: float = 0.0) -> nn.Sequential:
    """Two convolutions with pooling for images of 8 x 8: (B, 1, 8, 8) -> (B, n_classes)."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),  # (B, 16, 4, 4)
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),  # (B, 32, 2, 2)
        nn.Flatten(), *([nn.Dropout(dropout)] if dropout > 0 else []), nn.Linear(128, n_classes),
    )  # fmt: skip


def mnist_cnn(n_classes: int) -> nn.Sequential:
    """The network of PyTorch's MNIST example: (B, 1, 28, 28) -> (B, n_classes), 1,199,882 parameters for 10.

    Source: https://github.com/pytorch/examples, mnist/main.py. Deviation: logits instead of
    log-probabilities.
    """
    return nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(),  # (B, 32, 26, 26)
        nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25),  # (B, 64, 12, 12)
        nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, n_classes),
    )  # fmt: skip


def cifar10_cnn(n_classes: int, units: int = 64, dropout: float = 0.25) -> nn.Sequential:
    """Two convolutions with pooling and a dense layer: (B, 3, 32, 32) -> (B, n_classes), 282,250 parameters for 10."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),  # (B, 32, 16, 16)
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),  # (B, 64, 8, 8)
        nn.Flatten(), nn.Linear(4096, units), nn.ReLU(), nn.Dropout(dropout), nn.Linear(units, n_classes),
    )  # fmt: skip


def conv_dense(
    channels: int, side: int, n_classes: int, *, units: int = 64, stride: int = 1, dropout: float = 0.5
) -> nn.Sequential:
    """Conv2D, MaxPool, Conv2D, MaxPool, Flatten, Dense, Output: (B, channels, side, side) -> (B, n_classes).

    Both convolutions (3 x 3) have `units` filters and the dense layer as many units, all with ReLU; dropout stands in
    front of the dense layer. Flatten, Dense and Output are a `trimtab.surgery.Head`: as hidden layers count the two
    convolutions.

    Args:
        channels: Of an image.
        side: Its height and width; a multiple of 4 times the stride.
        n_classes: Logits.
        units: Of each layer but the output.
        stride: Of the first convolution; 2 reads an image at half its resolution, at about a quarter of the cost.
        dropout: Probability.
    """
    places = (side // stride // 4) ** 2
    return nn.Sequential(
        nn.Conv2d(channels, units, 3, stride=stride, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(units, units, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        Head(
            nn.Flatten(), nn.Dropout(dropout), nn.Linear(units * places, units), nn.ReLU(), nn.Linear(units, n_classes),
        ),
    )  # fmt: skip


def two_convolutions(channels: int, side: int, n_classes: int, widths: tuple[int, int, int]) -> nn.Sequential:
    """Conv2D, Conv2D, MaxPool, Flatten, Dense, Output: (B, channels, side, side) -> (B, n_classes).

    Convolutions are 3 x 3 without padding, pooling is 2 x 2, and all but the output have ReLU. There is neither dropout
    nor normalisation: what a unit is worth stands in its weights alone.

    Args:
        channels: Of an image.
        side: Its height and width, at least 6.
        n_classes: Logits.
        widths: Filters of the first and of the second convolution, units of the dense layer.
    """
    first, second, dense = widths
    places = ((side - 4) // 2) ** 2
    return nn.Sequential(
        nn.Conv2d(channels, first, 3), nn.ReLU(),
        nn.Conv2d(first, second, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(second * places, dense), nn.ReLU(), nn.Linear(dense, n_classes),
    )  # fmt: skip


def scaled_width(n_filters: int, width: float) -> int:
    """Filters of a layer of a network that is made wider or narrower as a whole.

    Args:
        n_filters: At a width of 1.
        width: Factor; the result is rounded.

    Raises:
        InputError: No filter is left, or `width` is no finite number.

    >>> scaled_width(64, 0.25)
    16
    """
    if not 0 < width < math.inf or round(n_filters * width) < 1:
        raise InputError(f"width is {width!r}; expected a factor that leaves at least one of {n_filters} filters: 0.25")
    return round(n_filters * width)


class MeanEmbedding(nn.Module):
    """Mean of the embeddings of a sentence's tokens, then an MLP: tokens (B, L) -> (B, n_classes).

    Args:
        vocab_size: V, `PADDING` included.
        width: Of an embedding.
        units: Of the hidden layer.
        n_classes: Logits.
    """

    def __init__(self, vocab_size: int, width: int, units: int, n_classes: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width, padding_idx=PADDING)
        self.mlp = mlp(width, [units], n_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits; padding changes nothing.

        Args:
            tokens: (B, L) int64, each row a sentence of one token or more, filled up with `PADDING`.
        """
        is_word = tokens.ne(PADDING).unsqueeze(2)  # (B, L, 1)
        mean = (self.tokens(tokens) * is_word).sum(1) / is_word.sum(1)
        logits: Tensor = self.mlp(mean)
        return logits


class PackedLSTM(nn.Module):
    """Embedding, one LSTM over packed sentences, dense layer on its last state: tokens (B, L) -> (B, n_classes).

    Args:
        vocab_size: V, `PADDING` included.
        width: Of an embedding.
        units: Of each direction.
        n_classes: Logits.
        is_bidirectional: A second direction, which reads from the end; the dense layer reads both last states.
    """

    def __init__(
        self, vocab_size: int, width: int, units: int, n_classes: int, *, is_bidirectional: bool = False
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width, padding_idx=PADDING)
        self.lstm = nn.LSTM(width, units, batch_first=True, bidirectional=is_bidirectional)
        self.head = nn.Linear((2 if is_bidirectional else 1) * units, n_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits; padding changes nothing: no direction reads it, and the backward one begins at the last token.

        Args:
            tokens: (B, L) int64, each row a sentence of one token or more, filled up with `PADDING` behind it.
        """
        lengths = tokens.ne(PADDING).sum(1).cpu()  # packing wants them there
        packed = pack_padded_sequence(self.tokens(tokens), lengths, batch_first=True, enforce_sorted=False)
        _, (last, _) = self.lstm(packed)  # (1 or 2, B, units)
        logits: Tensor = self.head(torch.cat((last[0], last[1]), dim=1) if self.lstm.bidirectional else last[0])
        return logits


class BiLSTM(PackedLSTM):
    """`PackedLSTM` of both directions.

    Args:
        vocab_size: V, `PADDING` included.
        width: Of an embedding.
        units: Of each direction.
        n_classes: Logits.
    """

    def __init__(self, vocab_size: int, width: int, units: int, n_classes: int) -> None:
        super().__init__(vocab_size, width, units, n_classes, is_bidirectional=True)


class BiLSTMDense(nn.Module):
    """Embedding, bidirectional LSTM, dense layer, output: tokens (B, L) -> (B, n_classes).

    The dense layer (ReLU) reads the mean of the LSTM's states over the tokens, both directions side by side, behind
    dropout. It has as many units as it reads, so that it can be taken out of the network.

    Args:
        vocab_size: V, `PADDING` included.
        width: Of an embedding.
        n_classes: Logits.
        units: Of each direction; half of those of the dense layer.
        dropout: Probability.
    """

    def __init__(self, vocab_size: int, width: int, n_classes: int, *, units: int = 64, dropout: float = 0.5) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width, padding_idx=PADDING)
        self.lstm = nn.LSTM(width, units, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(dropout)
        self.dense = nn.Linear(2 * units, 2 * units)
        self.head = nn.Linear(2 * units, n_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits; padding changes nothing: neither direction reads it, and it is not in the mean.

        Args:
            tokens: (B, L) int64, each row a sentence of one token or more, filled up with `PADDING`.
        """
        lengths = tokens.ne(PADDING).sum(1, keepdim=True)  # (B, 1)
        # Packing wants the lengths on the CPU.
        words = pack_padded_sequence(
            self.tokens(tokens), lengths.squeeze(1).cpu(), batch_first=True, enforce_sorted=False
        )
        states, _ = self.lstm(words)
        padded, _ = pad_packed_sequence(states, batch_first=True)  # (B, L, 2 units), zeros behind each sentence
        logits: Tensor = self.head(self.dense(self.dropout(padded.sum(1) / lengths)).relu())
        return logits


class LSTMDense(nn.Module):
    """Embedding, LSTM, dense layer with ReLU, output: tokens (B, L) -> (B, 1), the logit of the second of two classes.

    The dense layer reads the LSTM's state behind each sentence's last word. Padding stands behind that, so the LSTM
    runs over all L tokens and nothing has to be packed: what a batch costs depends on its shape alone.

    Args:
        vocab_size: V, `PADDING` included.
        width: Of an embedding.
        units: Of the LSTM.
        dense: Units of the dense layer.
    """

    def __init__(self, vocab_size: int, width: int = 64, *, units: int = 128, dense: int = 64) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width, padding_idx=PADDING)
        self.lstm = nn.LSTM(width, units, batch_first=True)
        self.dense = nn.Linear(units, dense)
        self.head = nn.Linear(dense, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits; padding changes nothing.

        Args:
            tokens: (B, L) int64, each row a sentence of one token or more, filled up with `PADDING` behind it.
        """
        is_word = tokens.ne(PADDING)  # (B, L)
        is_last = is_word & is_word.cumsum(1).eq(is_word.sum(1, keepdim=True))
        states, _ = self.lstm(self.tokens(tokens))  # (B, L, units)
        last = (states * is_last.unsqueeze(2)).sum(1)  # the one state that is taken
        logits: Tensor = self.head(self.dense(last).relu())
        return logits


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a GPT; n_embd is a multiple of n_head."""

    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0
    bias: bool = False


class _Attention(nn.Module):
    """Causal self-attention over all heads at once."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.projection = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        # A module although only its p is read, so that whoever looks for dropout in the model finds it.
        self.attention_dropout = nn.Dropout(config.dropout)
        self.residual_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (B, H, T, C/H)
        p = self.attention_dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        out: Tensor = self.residual_dropout(self.projection(y.transpose(1, 2).reshape(B, T, C)))
        return out


class _Block(nn.Module):
    """Pre-norm residual block: attention, then the feed-forward part."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attention = _Attention(config)
        self.norm_mlp = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.expand = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.projection = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_attention(x))
        out: Tensor = x + self.dropout(self.projection(F.gelu(self.expand(self.norm_mlp(x)))))
        return out


class GPT(nn.Module):
    """Decoder-only transformer: tokens (B, T) -> logits (B, T, V).

    Args:
        config: Its shape.

    Raises:
        InputError: n_embd is no multiple of n_head.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if config.n_embd % config.n_head:
            raise InputError(f"n_embd {config.n_embd} is no multiple of n_head {config.n_head}; change one of them")
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        self._draw_weights()

    def _draw_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.endswith("projection.weight"):  # two residual additions in each block
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token at every place.

        Args:
            tokens: (B, T) int64, T at most `block_size`.

        Returns:
            (B, T, V).
        """
        x = self.dropout(self.tokens(tokens) + self.positions.weight[: tokens.shape[1]])
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def n_parameters(self, *, with_positions: bool = False) -> int:
        """Number of parameters; without the position embedding, as nanoGPT counts them."""
        count = sum(parameter.numel() for parameter in self.parameters())
        return count if with_positions else count - self.positions.weight.numel()

    @torch.no_grad()
    def generate(self, tokens: Tensor, n_new: int, *, generator: torch.Generator) -> Tensor:
        """Continue sequences by sampling from the model, one token at a time.

        Args:
            tokens: (B, T) int64, T at least 1; all but the last `block_size` are out of the model's sight.
            n_new: Tokens to add.
            generator: What the samples are drawn from; on the device of `tokens`.

        Returns:
            (B, T + n_new).
        """
        was_training = self.training
        self.eval()
        try:
            for _ in range(n_new):
                logits = self(tokens[:, -self.config.block_size :])[:, -1]
                new = torch.multinomial(logits.float().softmax(dim=-1), 1, generator=generator)
                tokens = torch.cat((tokens, new), dim=1)
        finally:
            self.train(was_training)
        return tokens
