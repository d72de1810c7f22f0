"""Small networks of every kind that surgery has to change, and what its tests compare."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.tasks import models


class Residual(nn.Module):
    """Convolutions with batch norm around residual additions, a functional activation, then the mean over space."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.one = nn.Conv2d(6, 5, 3, padding=1)
        self.norm_one = nn.BatchNorm2d(5)
        self.two = nn.Conv2d(5, 6, 3, padding=1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.two(torch.relu(self.norm_one(self.one(x))))
        y = self.depthwise(x)
        y += x
        return self.head(y.mean((2, 3)))


class Concatenation(nn.Module):
    """Two branches side by side, one of them flattened channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.side = nn.Linear(32, 4)
        self.hidden = nn.Linear(12 + 4, 6)
        self.head = nn.Linear(6 + 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.max_pool2d(F.gelu(self.conv(x)), 1)
        side = torch.tanh(self.side(x.reshape(x.size(0), -1)))
        hidden = self.hidden(torch.cat([pooled.view(pooled.size(0), -1), side], dim=1)).sigmoid()
        return self.head(torch.cat((hidden, side), 1))


class Recurrent(nn.Module):
    """A recurrent network of two layers in both directions, its last output and its last states into dense layers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, 5)
        self.cells = getattr(nn, kind)(5, 4, num_layers=2, batch_first=True, bidirectional=True)
        self.norm = nn.LayerNorm(7)
        self.dense = nn.Linear(8 + 4, 7)
        self.head = nn.Linear(7, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        outputs, state = self.cells(self.tokens(tokens))
        state = state[0] if isinstance(self.cells, nn.LSTM) else state
        return self.head(self.norm(self.dense(torch.cat((outputs[:, -1], state[-1]), dim=-1))))


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 2, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Flatten(), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.PReLU(5), nn.Linear(5, 3),
    )  # fmt: skip


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))


def make(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """A network with weights of its own, and a batch for it; drawn without touching torch's generator."""
    images = torch.randn(7, 2, 4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    words = torch.tensor([[3, 4, 5, 6], [3, 4, 0, 0], [3, 0, 0, 0]])
    makers: dict[str, Any] = {
        "mlp": (mlp, images[:, 0, :1, :].flatten(1).repeat(1, 2)[:, :6]),
        "cnn": (cnn, images),
        "residual": (Residual, images),
        "concatenation": (Concatenation, images),
        "lstm": (lambda: Recurrent("LSTM"), words),
        "gru": (lambda: Recurrent("GRU"), words),
        "digits-mlp": (lambda: models.mlp(64, [64], 10, dropout=0.1), images.flatten(1).repeat(1, 2)),
        "mnist-cnn": (lambda: models.mnist_cnn(10), images[:2, :1].repeat(1, 1, 7, 7)),
        "cifar10-cnn": (lambda: models.cifar10_cnn(10), images[:2, :1].repeat(1, 3, 8, 8)),
        "sst2-bilstm": (lambda: models.BiLSTM(20, 6, 5, 2), words),
        "sst2-mlp": (lambda: models.MeanEmbedding(20, 6, 5, 2), words),
    }
    build, inputs = makers[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = build().to(dtype)
        with torch.no_grad():
            for module in model.modules():  # a batch norm that does something
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_()
                    module.running_mean.normal_()
                    module.running_var.uniform_(0.5, 2.0)
    return model, inputs.to(dtype) if inputs.is_floating_point() else inputs


ALL = ("mlp", "cnn", "residual", "concatenation", "lstm", "gru")
TASKS = ("digits-mlp", "mnist-cnn", "cifar10-cnn", "sst2-bilstm", "sst2-mlp")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def train(model: nn.Module, inputs: Tensor, optimizer: torch.optim.Optimizer, steps: int = 1) -> float:
    """A few steps on fixed targets; the last loss."""
    loss = torch.tensor(float("nan"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        for _ in range(steps):
            optimizer.zero_grad()
            outputs = model(inputs)
            loss = F.cross_entropy(outputs, torch.arange(len(outputs)) % outputs.shape[1])
            loss.backward()
            optimizer.step()
    return loss.item()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_consistent(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The optimizer has every parameter, in the network's order, and state of its shape for those it has moved."""
    listed = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert [id(parameter) for parameter in listed] == [id(parameter) for parameter in model.parameters()]
    assert {id(parameter) for parameter in optimizer.state} <= {id(parameter) for parameter in listed}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            assert not isinstance(value, Tensor) or value.ndim == 0 or value.shape == parameter.shape, key
    for parameter in listed:
        assert parameter.grad is None or parameter.grad.shape == parameter.shape
