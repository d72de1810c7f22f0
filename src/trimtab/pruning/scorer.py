"""Scorer: what configurations are worth on validation, each asked for once, counted and written down.

Made by `trimtab.pruner` from what the user gives: a function of the network, or a validation set. The environment takes
its reward from it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from trimtab.errors import InputError, RunFailedError, TrimtabError
from trimtab.pruning.budget import Prunable
from trimtab.pruning.parts import Configuration
from trimtab.storage import append_lines, atomic_write, read_lines

__all__ = ["Scorer"]


class Scorer:
    """Scores configurations.

    A configuration that was scored before costs nothing. The dense network is scored first and is not counted. Where
    the user's function fails, or gives no finite number, for the dense network or for the first pruned one, that is an
    error; later ones are worth less than any other, counted in `n_failed`, and the search goes on.

    Args:
        network: What is pruned.
        evaluate: Function of a network, in evaluation; a float, higher is better. None: `score_of` is given.
        score_of: Function of a configuration, such as `CachedEvaluator.score`.
        log: File that every score is appended to; what it holds already is believed.

    Attributes:
        scores: Configuration -> score, in the order in which they were asked for; -inf for one that failed.
        dense: Score of the dense network.
        n_failed: Configurations that no score was had for.
        first_failure: What the first of them said; empty without.

    Raises:
        InputError: Neither or both functions are given, or the dense network has no score.
    """

    def __init__(
        self,
        network: Prunable,
        *,
        evaluate: Callable[[nn.Module], float] | None = None,
        score_of: Callable[[Configuration], float] | None = None,
        log: Path | None = None,
    ) -> None:
        if (evaluate is None) == (score_of is None):
            given = "both" if evaluate is not None else "neither"
            raise InputError(f"{given} of evaluate= and validation= given; give one: a function of the network that "
                             "returns a float, or (inputs, targets)")  # fmt: skip
        if evaluate is not None and not callable(evaluate):
            raise InputError(f"evaluate is {type(evaluate).__name__}; expected a function of the network, -> float")
        self._network, self._log = network, log
        self._ask: Callable[[Configuration], Any] = score_of or (lambda c: evaluate(network.cut(c)))  # type: ignore[misc]
        self._name = "evaluate" if evaluate is not None else "validation"
        self.scores: dict[Configuration, float] = {}
        self.n_failed = 0
        self.first_failure = ""
        self._known = self._read() if log is not None else {}
        self.dense = self._known.get(network.dense, math.nan)
        if not math.isfinite(self.dense):
            self.dense = self._checked(network.dense)
            self._write(network.dense, self.dense)

    @property
    def n_evaluations(self) -> int:
        """Configurations asked for, the dense one not among them."""
        return len(self.scores)

    def score(self, configuration: Sequence[int]) -> float:
        """The score of a configuration; -inf where none is to be had."""
        key: Configuration = tuple(configuration)
        if key == self._network.dense:
            return self.dense
        if key not in self.scores:
            found = self._known.get(key)
            self.scores[key] = self._new(key) if found is None else found
            self.n_failed += self.scores[key] == -math.inf
        return self.scores[key]

    def best(self, n: int) -> list[Configuration]:
        """The n best so far, the best first; of equal ones the first."""
        return sorted(self.scores, key=lambda key: -self.scores[key])[:n]

    def _new(self, key: Configuration) -> float:
        try:
            found = self._checked(key)
        except TrimtabError as error:
            if not self.scores:  # it would fail for all of them
                raise
            self.first_failure = self.first_failure or str(error)
            found = -math.inf
        self._write(key, found)
        return found

    def _checked(self, key: Configuration) -> float:
        what = "the dense network" if key == self._network.dense else f"the network with widths {key}"
        try:
            found = float(self._ask(key))
        except (TrimtabError, MemoryError):
            raise
        except Exception as error:  # whatever a user's function raises
            reason = f"{self._name} raised {type(error).__name__} for {what}: {error}"
            raise InputError(f"{reason}; it is called with a torch.nn.Module and returns a float") from error
        if not math.isfinite(found):
            raise InputError(
                f"{self._name} returned {found} for {what}; expected a finite number, higher is better: check the "
                "network's outputs for NaN"
            )
        return found

    def _read(self) -> dict[Configuration, float]:
        found: dict[Configuration, float] = {}
        rows = read_lines(self._log) if self._log is not None else []
        if self._log is not None and self._log.is_file() and not self._log.read_bytes().endswith(b"\n"):
            # A killed writer's half line: what is appended to it would be lost with it.
            atomic_write(self._log, "".join(json.dumps(row) + "\n" for row in rows))
        for row in rows:
            try:
                found[tuple(int(width) for width in row["widths"])] = (
                    -math.inf if row["score"] is None else row["score"]
                )
            except (TypeError, KeyError, ValueError) as error:
                raise RunFailedError(
                    f"{self._log} is no record of a search ({error}); remove it to begin anew"
                ) from error
        return found

    def _write(self, key: Configuration, score: float) -> None:
        if self._log is not None:
            append_lines(self._log, [{"widths": list(key), "score": score}])
