"""One proximal update of a learned policy from a few earlier runs of the task that it is to control.

Called by `PPOAgent.learn_from_earlier`. Source: Schulman et al. 2017, arXiv:1707.06347, section 3 (the clipped
objective). Deviations, since there are a hundred transitions and not a hundred thousand: no value network (what other
runs got from the same decision on is the baseline), all transitions in every step, and an end to the steps where the
policy has moved by `MAX_KL` from what it was, so that a few lucky runs cannot undo what it was taught.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trimtab.agents.base import Array

__all__ = ["MAX_KL", "advantages_of", "improve"]

MAX_KL = 0.05  # mean over the transitions, of the policy before from the one after
CLIP = 0.2  # of the ratio of probabilities, as published
LEARNING_RATE = 3e-4  # Adam's
MAX_STEPS = 200  # of Adam; at this rate no weight moves by more than 0.06


def advantages_of(rewards: Array, terminated: npt.NDArray[np.bool_]) -> Array:
    """What followed each decision, less the mean of what followed that decision in all runs, in standard deviations.

    Args:
        rewards: (T,), run after run.
        terminated: True at the end of each run; (T,).

    Returns:
        (T,); zeros where nothing differs from run to run, as with a single run.
    """
    ends = np.flatnonzero(terminated) + 1
    starts = [0, *ends.tolist()]
    runs = [rewards[a:b] for a, b in zip(starts, [*ends.tolist(), len(rewards)], strict=True) if b > a]
    returns = [np.cumsum(run[::-1])[::-1] for run in runs]
    longest = max((len(run) for run in runs), default=0)
    means = [float(np.mean([run[k] for run in returns if len(run) > k])) for k in range(longest)]
    away = np.concatenate([run - np.array(means[: len(run)]) for run in returns]) if runs else np.zeros(0)
    spread = float(away.std()) if len(away) else 0.0
    return np.asarray(away / spread if spread > 1e-12 else np.zeros_like(away), dtype=np.float64)


def improve(
    weights: Sequence[Array],
    biases: Sequence[Array],
    features: Array,
    choices: npt.NDArray[np.int64],
    advantages: Array,
) -> tuple[list[Array], list[Array]]:
    """Weights after the update; those given are not changed.

    Args:
        weights: Of each layer, (members, in, out); the last layer gives the logits of M moves of one knob.
        biases: Of each layer, (members, 1, out).
        features: What the network sees; (T, S).
        choices: Index of the move that was made; (T,).
        advantages: (T,).
    """
    tensors = [torch.from_numpy(array.copy()).requires_grad_() for array in (*weights, *biases)]
    n, x = len(weights), torch.from_numpy(features)[None]
    chosen, gain = torch.from_numpy(choices), torch.from_numpy(advantages)
    with torch.no_grad():
        before = _probabilities(tensors[:n], tensors[n:], x)
    first = before.gather(1, chosen[:, None])[:, 0]
    adam = torch.optim.Adam(tensors, lr=LEARNING_RATE)
    kept = [tensor.detach().clone() for tensor in tensors]
    for _ in range(MAX_STEPS):
        now = _probabilities(tensors[:n], tensors[n:], x)
        divergence = float((before * (before.log() - now.detach().log())).sum(dim=1).mean())
        if not divergence <= MAX_KL:
            break
        kept = [tensor.detach().clone() for tensor in tensors]
        ratio = now.gather(1, chosen[:, None])[:, 0] / first
        adam.zero_grad()
        loss = -torch.minimum(ratio * gain, ratio.clamp(1 - CLIP, 1 + CLIP) * gain).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
    arrays = [tensor.numpy() for tensor in kept]
    return arrays[:n], arrays[n:]


def _probabilities(weights: Sequence[Tensor], biases: Sequence[Tensor], x: Tensor) -> Tensor:
    """Mean over the members of the probability of each move; (1, T, S) -> (T, M)."""
    last = len(weights) - 1
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = x @ weight + bias
        if index < last:
            x = torch.tanh(x)
    return torch.softmax(x, dim=-1).mean(dim=0)
