"""RLScheduler in a training loop of one's own: digits, from a rate that is far too low.

    python examples/own_loop.py [--steps 400]

Prints what the controller decided, and the accuracy with a fixed rate beside the one with the controller.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

import trimtab


def train(steps: int, is_controlled: bool) -> tuple[float, list[trimtab.Decision]]:
    """Accuracy on held-out digits after so many steps, and the decisions taken."""
    digits = load_digits()
    images = torch.tensor(digits.data / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=generator)
    held_out, rest = order[:360], order[360:]
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
    scheduler = trimtab.RLScheduler(optimizer, total_steps=steps, model=model) if is_controlled else None
    for _ in range(steps):
        batch = rest[torch.randint(len(rest), (32,), generator=generator)]
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step(loss)
        optimizer.zero_grad()
    with torch.no_grad():
        accuracy = (model(images[held_out]).argmax(1) == labels[held_out]).double().mean().item()
    return accuracy, [] if scheduler is None else scheduler.decisions


def main() -> None:
    """Train twice and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args().steps
    fixed, _ = train(steps, is_controlled=False)
    controlled, decisions = train(steps, is_controlled=True)
    for decision in decisions[:8]:
        print(
            f"step {decision.optimizer_step:4d}: rate {decision.before:.2e} -> {decision.read_back:.2e} {decision.note}"
        )
    print(f"accuracy after {steps} steps from a rate of 1e-5: fixed {fixed:.3f}, controlled {controlled:.3f}")


if __name__ == "__main__":
    main()
