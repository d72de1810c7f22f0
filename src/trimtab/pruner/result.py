"""Result: a pruned network with what is to be said of it, on disk and on paper.

Returned by `prune`; `load_pruned` reads what `save` wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from trimtab.pruner.choice import Candidate
from trimtab.pruning.saving import save_pruned

__all__ = ["Costs", "PruneReport", "PruneResult"]


@dataclass(frozen=True)
class Costs:
    """What a network costs, counted, and how good it is.

    Attributes:
        score: On validation.
        flops: Of a forward pass of the example inputs; two a multiply-add.
        parameters: Numbers in all parameters.
        bytes: Of all parameters and buffers, as on disk.
    """

    score: float
    flops: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class PruneReport:
    """What was asked, tried and found.

    Attributes:
        target: As it was given.
        agent: Name of the agent.
        seed: Of the search.
        dense: Of the network that was given.
        pruned: Of the result.
        score_before: Of the result in the search: before it was fine-tuned, after `score_after` where that was given.
        widths: Part -> (units of the dense network, units that stay); 0 for a layer that was taken out.
        refused: Layer -> why its units had to stay.
        evaluations: Configurations that were scored in the search.
        max_evaluations: As many might have been.
        failed: Of them, how many had no score.
        candidates: What the agent proposed, after fine-tuning, the chosen one first.
        baselines: The best of each other method that was asked for, at the same budget with the same fine-tuning.
        notes: What else has to be said.
        latency: Measured seconds of the dense and the pruned network, where the target was latency.
    """

    target: Mapping[str, Any]
    agent: str
    seed: int
    dense: Costs
    pruned: Costs
    score_before: float
    widths: Mapping[str, tuple[int, int]]
    refused: Mapping[str, str]
    evaluations: int
    max_evaluations: int
    failed: int
    candidates: tuple[Candidate, ...]
    baselines: tuple[Candidate, ...] = ()
    notes: tuple[str, ...] = ()
    latency: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        dense, pruned = self.dense, self.pruned
        lines = [f"{'':<12}{'dense':>14}{'pruned':>14}{'left':>8}"]
        for name in ("flops", "parameters", "bytes"):
            one, two = getattr(dense, name), getattr(pruned, name)
            lines.append(f"{name:<12}{one:>14,}{two:>14,}{two / one:>8.3f}")
        lines.append(
            f"{'score':<12}{dense.score:>14.4f}{pruned.score:>14.4f}   {self.score_before:.4f} before fine-tuning"
        )
        lines += [
            f"{name}: {old} -> {'taken out' if new == 0 else new}"
            for name, (old, new) in self.widths.items()
            if new != old
        ]
        lines += [f"{name}: stays, {reason}" for name, reason in self.refused.items()]
        for candidate in (*self.candidates[:1], *self.baselines):
            after = "failed" if candidate.after is None else f"{candidate.after:.4f}"
            lines.append(
                f"{candidate.name}: {candidate.before:.4f} -> {after} at {candidate.share:.3f} of the cost, "
                f"{candidate.evaluations} evaluations"
            )
        return "\n".join([*lines, *self.notes])


@dataclass(frozen=True)
class PruneResult:
    """A pruned network.

    Attributes:
        model: Smaller than the one that was given, in evaluation; may be trained further.
        report: What is to be said of it; `print` shows it.
    """

    model: nn.Module
    report: PruneReport

    def save(self, directory: str | Path, *, builder: Mapping[str, Any] | None = None) -> None:
        """Write the network and the report into a folder: `pruned.json` and `weights.safetensors`.

        Args:
            directory: Made if it is missing.
            builder: JSON-able; see `trimtab.pruning.saving.save_pruned`.

        Raises:
            InputError: The network has state that cannot be written safely.
            OutputError: The folder cannot be written.
        """
        save_pruned(self.model, directory, extra=self.report.to_dict(), builder=builder)
