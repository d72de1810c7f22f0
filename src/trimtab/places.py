"""Where the modules of a model keep a probability of dropout.

Called by the knob `dropout`, and by the training loop, which lends a generator to models that draw.
"""

from __future__ import annotations

from torch import nn

__all__ = ["dropout_places"]

# Numbers under these names are dropout wherever they stand: of `nn.MultiheadAttention`, and by convention of modules
# of a user's own that call `F.dropout` or `F.scaled_dot_product_attention` with them.
NAMES = ("dropout", "dropout_p")


def dropout_places(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Module and attribute of each probability, in the order of `model.modules()`.

    `p` of the dropout modules of torch; `dropout` of `nn.LSTM`, `nn.GRU` and `nn.RNN` of several layers (of one alone
    it does nothing); a number `dropout` or `dropout_p` of any other module.
    """
    found: list[tuple[nn.Module, str]] = []
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            found.append((module, "p"))
        elif isinstance(module, nn.RNNBase):
            found += [(module, "dropout")] if module.num_layers > 1 else []
        else:
            found += [(module, name) for name in NAMES if _is_number(getattr(module, name, None))]
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
