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

import torch
from torch import nn

from trimtab.errors import InputError, RunFailedError, TrimtabError
from trimtab.pruning.budget import Prunable
from trimtab.pruning.fingerprint import fingerprint
from trimtab.pruning.parts import Configuration
from trimtab.seeding import derive_seed, scoped_global_rng, scoped_numpy_rng, torch_generator
from trimtab.storage import append_lines, atomic_write, read_lines

__all__ = ["Scorer", "check_one"]


def check_one(evaluate: object, validation: object) -> None:
    """Refuse anything but one of them.

    Raises:
        InputError: Both or neither are given, or `evaluate` is no function.
    """
    if (evaluate is None) == (validation is None):
        raise InputError(
            f"{'neither' if evaluate is None else 'both'} of evaluate= and validation= given; give one: a function of "
            "the network that returns a float, or (inputs, targets)"
        )
    if evaluate is not None and not callable(evaluate):
        raise InputError(f"evaluate is {type(evaluate).__name__}; expected a function of the network, -> float")


class Scorer:
    """Scores configurations.

    A configuration that was scored before costs nothing. The dense network is scored first and is not counted. Where
    the user's function fails, or gives no finite number, for the dense network or for the first pruned one, that is an
    error; later ones are worth less than any other, counted in `n_failed`, and the search goes on.

    While the user's function runs it is lent torch's and NumPy's global generators, set by the seed and put back: what
    it draws, or seeds, is no business of an agent that draws from them too, and is the same after a search was resumed.

    Args:
        network: What is pruned.
        evaluate: Function of a network, in evaluation; a float, higher is better. None: `score_of` is given.
        score_of: Function of a configuration, such as `CachedEvaluator.score`.
        log: File that every score is appended to; what it holds already of the same weights is believed.
        seed: Of what the user's function draws.

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
        seed: int = 0,
    ) -> None:
        check_one(evaluate, score_of)
        self._network, self._log, self._seed = network, log, seed
        self._of = "" if log is None else fingerprint(network.model.state_dict())
        self._failures: dict[Configuration, str] = {}
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
            if self.scores[key] == -math.inf:
                self.n_failed += 1
                self.first_failure = self.first_failure or self._failures.get(key, "")
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
            self._failures[key], found = str(error), -math.inf
        self._write(key, found)
        return found

    def _checked(self, key: Configuration) -> float:
        what = "the dense network" if key == self._network.dense else f"the network with widths {key}"
        try:
            found = self._asked(key)
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

    def _asked(self, key: Configuration) -> float:
        device = next((p.device for p in self._network.model.parameters()), torch.device("cpu"))
        states = [torch_generator(self._seed, "evaluation").get_state()]
        if device.type == "cuda":
            states.append(torch.Generator(device).manual_seed(self._seed).get_state())
        numpy_rng = scoped_numpy_rng(derive_seed(self._seed, "evaluation"))
        with scoped_global_rng(states, device), numpy_rng, torch.set_grad_enabled(torch.is_grad_enabled()):
            return float(self._ask(key))

    def _read(self) -> dict[Configuration, float]:
        found: dict[Configuration, float] = {}
        if self._log is None or not self._log.exists():
            return found
        rows = read_lines(self._log)  # without a torn line, which the next one would be torn with
        atomic_write(self._log, "".join(json.dumps(row) + "\n" for row in rows))
        for row in rows:
            try:
                if row["network"] != self._of:
                    continue
                key = tuple(int(width) for width in row["widths"])
                found[key] = -math.inf if row["score"] is None else float(row["score"])
                self._failures[key] = str(row["failure"])
            except (TypeError, KeyError, ValueError) as error:
                raise RunFailedError(
                    f"{self._log} is no record of a search ({error}); remove it to begin anew"
                ) from error
        return found

    def _write(self, key: Configuration, score: float) -> None:
        if self._log is not None:
            failure = self._failures.get(key, "")
            row = {"widths": list(key), "score": score, "failure": failure, "network": self._of}
            append_lines(self._log, [row])
