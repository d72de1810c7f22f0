"""Population-based training: members that train in turn, of which the worst go on from the best with moved values.

Called by searches. Source: Jaderberg et al. 2017, arXiv:1711.09846, section 3 and appendix A: truncation selection for
exploit, moves by 0.8 or 1.2 for explore. Deviations: a quarter instead of a fifth, so that four members are enough; no
parameter is drawn anew; a round is a share of a member's budget; members are compared on the validation loss.

A copy takes the weights and all that the optimizer remembers. It keeps what belongs to the member: data order, dropout,
and what it has spent, so that its schedule goes on and no member spends more than its share.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.errors import InputError
from trimtab.experiments.search_methods import random_values
from trimtab.experiments.search_space import Space, Values
from trimtab.experiments.trials import Record, Setup, TrialRun, read_record, trial_folder, write_record
from trimtab.knobs.base import CategoricalKnob
from trimtab.seeding import numpy_generator
from trimtab.storage import append_lines, atomic_write, read_lines

__all__ = ["Population", "check_population"]

_FACTORS = (0.8, 1.2)
_QUARTER = 4
HISTORY = "pbt.jsonl"


def check_population(space: Space, size: int) -> None:
    """Refuse what cannot be copied or moved.

    Raises:
        InputError: A parameter changes shapes or has no order, or there is nobody to copy.
    """
    for name, knob in space.knobs.items():
        if knob.changes_shape:
            raise InputError(
                f"search: {name!r} changes the shape of the network, and pbt copies weights between members of one "
                "shape; leave it out of the space, or use another method"
            )
        if isinstance(knob, CategoricalKnob):
            raise InputError(
                f"search: {name!r} has choices without an order, which pbt cannot move by a factor; leave it out of "
                "the space, or use another method"
            )
    if size < 2:
        raise InputError(f"search: pbt has {size} trial; expected a population of 2 or more")


class Population:
    """All members of a search.

    Args:
        setup: What they share; its parts are the rounds.
        steps: Budget of each member, in optimizer steps of the task's own cost.
        folder: Of the search.
        progress: Called with a member's number and run after each of its turns.
    """

    def __init__(
        self, setup: Setup, steps: Sequence[int], folder: Path, progress: Callable[[int, TrialRun], None]
    ) -> None:
        self._setup = setup
        self._steps = list(steps)
        self._folder = folder
        self._progress = progress
        self._history = folder / HISTORY
        self._values = [random_values(setup.job, setup.space, number) for number in range(len(steps))]
        self._sources = list(range(len(steps)))
        self._losses = [math.inf] * len(steps)

    def train(self) -> list[Record]:
        """Train every member to its end, or go on from the last turn that was kept.

        Returns:
            The members' records.
        """
        done = [read_record(trial_folder(self._folder, number)) for number in range(len(self._steps))]
        if all(record is not None for record in done):
            return [record for record in done if record is not None]
        for number in range(self._recall() + 1, self._setup.n_parts + 1):
            for member in range(len(self._steps)):
                self._turn(member, number)
            rows = self._select(number)
            append_lines(self._history, rows)
            for member in range(len(self._steps)):
                self.path(member, number - 1).unlink(missing_ok=True)
        return [self._finish(member) for member in range(len(self._steps))]

    def path(self, member: int, number: int | None = None) -> Path:
        """Where a member's state after a round lies; None is the last."""
        number = self._setup.n_parts if number is None else number
        return trial_folder(self._folder, member) / f"round-{number}.safetensors"

    def _recall(self) -> int:
        """Take in the rounds that are over; returns the number of the last one."""
        rows, size = read_lines(self._history), len(self._steps)
        n_rounds = len(rows) // size
        rows = rows[: n_rounds * size]
        atomic_write(self._history, "".join(json.dumps(row) + "\n" for row in rows))  # without a torn line
        for row in rows[-size:]:
            self._values[row["member"]], self._sources[row["member"]] = row["after"], row["source"]
        return n_rounds

    def _turn(self, member: int, number: int) -> None:
        """One member's part of one round."""
        run = TrialRun(self._setup, self._values[member], self._steps[member])
        if self.path(member, number).exists():
            run.load(self.path(member, number))
        else:
            if number > 1:
                source = self._sources[member]
                kept = None if source == member else self.path(source, number - 1)
                run.load(self.path(member, number - 1), kept)
            run.train(number)
            run.save(self.path(member, number))
        loss = run.rows[-1]["val_loss"]
        self._losses[member] = loss if math.isfinite(loss) else math.inf
        self._progress(member, run)

    def _select(self, number: int) -> list[dict[str, Any]]:
        """Who goes on from whom, and with which values; the lines of the history."""
        size, job = len(self._steps), self._setup.job
        generator = numpy_generator(job["root_seed"], "search", job["task"], job["seed"], number, "pbt")
        ranked = sorted(range(size), key=lambda member: (self._losses[member], member))
        quarter = max(1, size // _QUARTER)
        best, worst = ranked[:quarter], ranked[-quarter:]
        rows: list[dict[str, Any]] = []
        for member in range(size):
            source, before = member, self._values[member]
            if member in worst and number < self._setup.n_parts:
                chosen = best[int(generator.integers(quarter))]
                factors = {name: _FACTORS[int(generator.integers(2))] for name in self._setup.space.knobs}
                if math.isfinite(self._losses[chosen]):
                    source = chosen
            after = dict(before) if source == member else _moved(self._setup.space, self._values[source], factors)
            loss = self._losses[member]
            rows.append({
                "round": number,
                "member": member,
                "val_loss": loss if math.isfinite(loss) else None,
                "source": source,
                "before": before,
                "copied": None if source == member else self._values[source],
                "after": after,
            })  # fmt: skip
        self._values = [row["after"] for row in rows]
        self._sources = [row["source"] for row in rows]
        return rows

    def _finish(self, member: int) -> Record:
        run = TrialRun(self._setup, self._values[member], self._steps[member])
        run.load(self.path(member))
        record = run.record(member)
        write_record(trial_folder(self._folder, member), record)
        return record


def _moved(space: Space, values: Values, factors: Mapping[str, float]) -> Values:
    """Values after moves on each knob's scale, inside its bounds."""
    moved: Values = {}
    for name, knob in space.knobs.items():
        asked = knob.move_one(float(values[name]), factors[name])
        moved[name] = min(max(asked, knob.low), knob.high)
    return moved
