"""A training run of a few microseconds a step, for tests of everything that watches or moves one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "momentum": lambda parameters, **options: torch.optim.SGD(parameters, momentum=0.9, **options),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
}
BATCH = 8
ROWS = 64


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's global generator, seeded for a while and put back."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


class Toy:
    """An MLP 4-8-3 on 64 rows of a fixed teacher; batch t is the same in every run."""

    def __init__(
        self,
        optimizer: str = "sgd",
        lr: Any = 0.1,
        *,
        two_groups: bool = False,
        batch_norm: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        poison: Collection[int] = (),
        **options: Any,
    ) -> None:
        generator = torch.Generator().manual_seed(11)
        self.inputs = torch.randn(ROWS, 4, generator=generator).to(device, dtype)
        teacher = torch.randn(4, 3, generator=generator).to(device, dtype)
        self.targets = (self.inputs @ teacher).argmax(1)
        with seeded(7):
            norm: list[nn.Module] = [nn.BatchNorm1d(8)] if batch_norm else []
            self.model = nn.Sequential(nn.Linear(4, 8), *norm, nn.Tanh(), nn.Linear(8, 3)).to(device, dtype)
        parameters: Any = self.model.parameters()
        if two_groups:
            parameters = [{"params": self.model[0].parameters()}, {"params": self.model[-1].parameters(), "lr": lr / 4}]
        self.optimizer = OPTIMIZERS[optimizer](parameters, lr=lr, **options)
        self.poison = set(poison)
        self.t = 0

    def forward(self, t: int) -> Tensor:
        rows = (torch.arange(BATCH, device=self.inputs.device) + t * BATCH) % ROWS
        loss = nn.functional.cross_entropy(self.model(self.inputs[rows]), self.targets[rows])
        return loss * float("nan") if t in self.poison else loss

    def step(self) -> Tensor:
        """One optimizer step; the loss of it."""
        self.optimizer.zero_grad()
        loss = self.forward(self.t)
        loss.backward()
        self.optimizer.step()
        self.t += 1
        return loss.detach()

    @torch.no_grad()
    def val_loss(self) -> float:
        self.model.eval()
        loss = nn.functional.cross_entropy(self.model(self.inputs), self.targets)
        self.model.train()
        return float(loss)

    @property
    def rates(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def weights(self) -> Tensor:
        """Every parameter and buffer, flat, as float64."""
        return torch.cat([value.detach().double().reshape(-1).cpu() for value in self.model.state_dict().values()])

    def state(self) -> dict[str, Any]:
        return {"model": _copy(self.model.state_dict()), "optimizer": _copy(self.optimizer.state_dict()), "t": self.t}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.t = state["t"]


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value
