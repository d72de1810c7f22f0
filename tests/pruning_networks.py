"""Networks that pruning has to cut, configurations for them, and the masked twin that a cut network is held against."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from surgery_networks import make
from trimtab.pruning.network import PrunableNetwork
from trimtab.pruning.parts import Configuration


class Encoder(nn.Module):
    """Two layers of torch's transformer between an embedding and a small head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, 12)
        layer = nn.TransformerEncoderLayer(12, 3, 10, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.dense = nn.Linear(12, 7)
        self.head = nn.Linear(7, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.dense(self.encoder(self.tokens(tokens)).mean(1))))


def network(name: str, **options: object) -> tuple[PrunableNetwork, Tensor]:
    """A network by name with every width open, and its inputs."""
    if name == "encoder":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model, inputs = Encoder().double(), torch.randint(0, 20, (4, 6))
    else:
        model, inputs = make(name)
    return PrunableNetwork(model, inputs, **{"multiple": 1, **options}), inputs


def drawn(net: PrunableNetwork, rng: np.random.Generator, *, removal: bool = True) -> Configuration:
    """A configuration; `removal` allows layers to be taken out."""
    return tuple(int(rng.choice([w for w in part.widths if removal or w > 0])) for part in net.parts)


def masked(net: PrunableNetwork, configuration: Configuration) -> nn.Module:
    """The dense network in which nothing reads the units that would go: every weight that does is zero."""
    model = copy.deepcopy(net.model)
    names = {module: name for name, module in net.model.named_modules()}
    for place, (width, way) in enumerate(zip(configuration, net.ways, strict=True)):
        if way.space is None:
            continue
        gone = net.orders[place][width:].tolist()
        for slot in net.couplings.slots:
            if slot.role != "reads" or way.space not in net.couplings.spaces.in_layout(slot.layout):
                continue
            weight = getattr(model.get_submodule(names[slot.module]), slot.attribute)
            start = 0
            for segment in slot.layout:
                length = net.couplings.spaces.size((segment,))
                if segment.space is not None and net.couplings.spaces.root(segment.space) == way.space:
                    for unit in gone:
                        first = start + unit * segment.width
                        weight.data.narrow(slot.dim, first, segment.width).zero_()
                start += length
    return model
