"""Who says which values are tried: a grid, random draws, or TPE with Hyperband (Optuna).

Called by searches, which trains the trials one after another; pbt.py is another matter. All of them say the same for
the same job whatever was interrupted in between: draws come from the job's seed, the number of the trial and the name
of the parameter, never from what a generator did before.

Sources: Bergstra and Bengio 2012, JMLR 13 (random search); Bergstra et al. 2011, "Algorithms for hyper-parameter
optimization", NeurIPS (TPE); Li et al. 2018, arXiv:1603.06560 (Hyperband); Falkner et al. 2018, arXiv:1807.01774, for
their union, from which we have the number of random trials before the model, one more than there are parameters.
Deviation from the latter two: trials come one after another, so a trial is stopped as soon as it is not among the best
third of those that got as far before it (Optuna's asynchronous form).
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typing_extensions import override

from trimtab.errors import MissingExtraError
from trimtab.experiments.jobs import Job
from trimtab.experiments.search_space import Space, Values
from trimtab.experiments.trials import Record
from trimtab.knobs.base import CategoricalKnob, Knob
from trimtab.seeding import derive_seed, numpy_generator
from trimtab.training.loop import ROUNDING

__all__ = ["PARTS", "Drawn", "Listed", "Method", "Tpe", "count_idle", "import_optuna", "random_values"]

# Parts of a trial. A power of Hyperband's factor of 3, so that its brackets stop trials after 1/9, after 1/3, or never.
PARTS = 9
_FACTOR = 3


class Method(ABC):
    """Says which values come next, and for how long."""

    @abstractmethod
    def steps(self, records: Sequence[Record]) -> int:
        """Budget of the next trial, in optimizer steps of the task's own cost; 0 where there is none any more.

        Args:
            records: The trials so far.
        """

    @abstractmethod
    def ask(self, number: int) -> Values:
        """Values of a trial; asked once, in the order of the numbers."""

    def knows(self, number: int) -> bool:
        """Whether the method itself remembers a trial that is over."""
        del number
        return True

    def should_stop(self, row: dict[str, Any]) -> bool:
        """Whether the trial that was asked for last is to end after a part."""
        del row
        return False

    def tell(self, record: Record) -> None:
        """Take in the trial that was asked for last, now that it is over."""
        del record

    def close(self) -> None:  # noqa: B027 (most have nothing to let go of)
        """Let go of files."""


class Listed(Method):
    """Trials that are known beforehand: the points of a grid.

    Args:
        values: Of each trial.
        total: Budget of all of them; those that come first get one optimizer step more where it does not divide.
    """

    def __init__(self, values: Sequence[Values], total: int) -> None:
        self._values = list(values)
        self._total = total

    @override
    def steps(self, records: Sequence[Record]) -> int:
        return _part(self._total, len(self._values), len(records))

    @override
    def ask(self, number: int) -> Values:
        return dict(self._values[number])


class Drawn(Method):
    """Trials at random. What its part of the budget pays no step for does not count, and others are drawn instead.

    Args:
        job: Whose seeds the draws come from.
        space: The parameters.
        trials: How many are trained, of equal parts of the budget, as in `Listed`.
        total: Budget of all of them.
    """

    def __init__(self, job: Job, space: Space, trials: int, total: int) -> None:
        self._job, self._space, self._trials, self._total = job, space, trials, total

    @override
    def steps(self, records: Sequence[Record]) -> int:
        n_idle = count_idle(records)
        return _part(self._total, self._trials, len(records) - min(n_idle, self._trials))

    @override
    def ask(self, number: int) -> Values:
        return random_values(self._job, self._space, number)


def _part(total: int, trials: int, number: int) -> int:
    return 0 if number >= trials else total // trials + (number < total % trials)


def count_idle(records: Sequence[Record]) -> int:
    """Trials whose part of the budget did not pay for a single step."""
    return sum(record["status"] == "idle" for record in records)


def random_values(job: Job, space: Space, number: int) -> Values:
    """Values of one trial, even on each knob's scale; another parameter in the space does not change them."""
    path = ("search", job["task"], job["seed"], number)
    return space.draw({name: numpy_generator(job["root_seed"], *path, name).random() for name in space.knobs})


class Tpe(Method):
    """TPE with Hyperband, in a database of its own.

    Each trial may spend `total / trials`, of which Hyperband's resources are ninths. What stopped trials leave is spent
    on further ones, as long as it pays for a whole one. Beyond as many as there are `trials`, those whose part pays
    for no step count as if they had spent it, so that there is an end.

    Args:
        path: The database.
        job: Whose seeds the draws come from.
        space: The parameters.
        trials: Whole trials that the budget pays for.
        total: Budget of the search.

    Raises:
        MissingExtraError: Optuna is not installed.
    """

    def __init__(self, path: Path, job: Job, space: Space, trials: int, total: int) -> None:
        self._optuna = import_optuna()
        self._path, self._job, self._space = path, job, space
        self._trials, self._total = trials, total
        self._steps = total // trials
        self._verbosity = self._optuna.logging.get_verbosity()
        self._optuna.logging.set_verbosity(self._optuna.logging.ERROR)
        self._trial: Any = None
        self._name = str(job["directory"])  # decides, with a trial's number, which bracket it is in
        self._open()

    def _open(self) -> None:
        """Open the database, without a trial that was asked for and never came to its end: it is asked for again."""
        self._storage, self._study = self._study_in(self._path)
        over = [trial for trial in self._study.get_trials() if trial.state.is_finished()]
        if len(over) == len(self._study.get_trials()):
            return
        self._dispose()
        new = self._path.with_suffix(".new")
        new.unlink(missing_ok=True)
        storage, study = self._study_in(new)
        study.add_trials(over)
        _dispose(storage)
        os.replace(new, self._path)
        self._storage, self._study = self._study_in(self._path)

    def _study_in(self, path: Path) -> tuple[Any, Any]:
        storage = self._optuna.storages.RDBStorage(f"sqlite:///{path}")
        pruner = self._optuna.pruners.HyperbandPruner(1, PARTS, _FACTOR)
        return storage, self._optuna.create_study(
            storage=storage, pruner=pruner, study_name=self._name, load_if_exists=True
        )

    @override
    def steps(self, records: Sequence[Record]) -> int:
        spent = math.fsum(record["spent"] for record in records)
        spent += self._steps * max(0, count_idle(records) - self._trials)
        return self._steps if self._total - spent + ROUNDING >= self._steps else 0

    @override
    def knows(self, number: int) -> bool:
        return number < len(self._study.get_trials(deepcopy=False))

    @override
    def ask(self, number: int) -> Values:
        job, space = self._job, self._space
        seed = derive_seed(job["root_seed"], "search", job["task"], job["seed"], number, "tpe") % 2**32
        # A sampler of its own for each trial: what it draws does not hang on what this process has drawn before.
        self._study.sampler = self._optuna.samplers.TPESampler(n_startup_trials=len(space.knobs) + 1, seed=seed)
        self._trial = self._study.ask({_key(knob): self._distribution(knob) for knob in space.knobs.values()})
        return {name: _value(knob, self._trial.params[_key(knob)]) for name, knob in space.knobs.items()}

    def _distribution(self, knob: Knob) -> Any:
        kinds = self._optuna.distributions
        if isinstance(knob, CategoricalKnob):
            return kinds.CategoricalDistribution(knob.choices)
        if knob.scale == "reverse_log":
            return kinds.FloatDistribution(1 - knob.high, 1 - knob.low, log=True)
        if knob.is_whole:
            return kinds.IntDistribution(int(knob.low), int(knob.high), log=knob.scale == "log")
        return kinds.FloatDistribution(knob.low, knob.high, log=knob.scale == "log")

    @override
    def should_stop(self, row: dict[str, Any]) -> bool:
        self._trial.report(_finite(row["val_loss"]), row["part"])
        return row["part"] < PARTS and bool(self._trial.should_prune())

    @override
    def tell(self, record: Record) -> None:
        state = self._optuna.trial.TrialState
        if record["status"] == "pruned":
            self._study.tell(self._trial, state=state.PRUNED)
        else:
            self._study.tell(self._trial, _finite(record["val_loss"]))

    @override
    def close(self) -> None:
        self._dispose()
        self._optuna.logging.set_verbosity(self._verbosity)

    def _dispose(self) -> None:
        _dispose(self._storage)


def import_optuna() -> Any:
    """The module.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise MissingExtraError(
            'the search method tpe needs the package optuna, which is not installed; pip install "trimtab[search]"'
        ) from error
    return optuna


def _dispose(storage: Any) -> None:
    storage.remove_session()
    storage.engine.dispose()


def _finite(loss: float | None) -> float:
    """A loss that can be ranked; one that is not finite comes last."""
    return math.inf if loss is None or not math.isfinite(loss) else float(loss)


def _key(knob: Knob) -> str:
    return f"1 - {knob.name}" if knob.scale == "reverse_log" else knob.name


def _value(knob: Knob, found: Any) -> float | str:
    if isinstance(knob, CategoricalKnob):
        return str(found)
    return 1 - float(found) if knob.scale == "reverse_log" else float(found)
