"""Prune a network of your own: train it, take half of its FLOPs away, fine-tune it, save it, load it again.

    python examples/prune_own_network.py

Everything is chosen on the validation images; the test images are read once, at the end.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from sklearn.datasets import load_digits
from torch import nn

import trimtab


class Digits(nn.Module):
    """Two convolutions and a dense layer with a shortcut, for images of 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(1, 32, 3, padding=1)
        self.two = nn.Conv2d(32, 32, 3, padding=1)
        self.dense = nn.Linear(32 * 16, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (B, 10) of images (B, 1, 8, 8)."""
        x = torch.relu(self.one(images))
        x = torch.relu(x + self.two(x))
        x = nn.functional.max_pool2d(x, 2).flatten(1)
        return self.head(torch.relu(self.dense(x)))


def main() -> None:
    """Train, prune, fine-tune, save, load, and read the test images once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10, help="epochs of training; fine-tuning takes one")
    epochs = parser.parse_args().epochs

    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, classes = images[order], torch.tensor(labels)[order]
    train, val, test = (slice(0, 1000), slice(1000, 1400), slice(1400, None))

    def fit(model: nn.Module, epochs: int, lr: float) -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr)
        for _ in range(epochs):
            for rows in torch.randperm(1000).split(32):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images[train][rows]), classes[train][rows]).backward()
                optimizer.step()

    def accuracy(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model(images[test]).argmax(1) == classes[test]).float().mean())

    torch.manual_seed(0)
    model = Digits()
    fit(model, epochs, 1e-3)
    result = trimtab.prune(
        model,
        images[:1],
        validation=(images[val], classes[val]),
        fine_tune=lambda pruned: fit(pruned, 1, 5e-4),
        target={"flops": 0.5},
        max_evaluations=40,
        baselines=["uniform", "random-search"],
    )
    print(result.report)

    with tempfile.TemporaryDirectory() as folder:
        result.save(folder)
        loaded = trimtab.load_pruned(folder, Digits())
    print(f"test accuracy: dense {accuracy(model.eval()):.3f}, pruned {accuracy(loaded):.3f}")


if __name__ == "__main__":
    main()
