"""Transitions: what an agent saw, did and got, as checked arrays.

Called by the store of experience and by what appends to it or learns from it. NumPy is imported where arrays are made,
so that what lists experience goes without.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trimtab.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["COLUMNS", "EXTRA_NAME", "EXTRA_TYPES", "Transitions", "check_count"]

_FLOATS = ("float32", "float64")
_NUMBERS = (*_FLOATS, "int64")
# Of each column that every run has: the types it may have, and its shape in letters.
COLUMNS = {
    "observations": (_FLOATS, ("T", "S")),
    "actions": (_NUMBERS, ("T", "K")),
    "rewards": (_FLOATS, ("T",)),
    "next_observations": (_FLOATS, ("T", "S")),
    "terminated": (("bool",), ("T",)),
}
EXTRA_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
EXTRA_TYPES = (*_NUMBERS, "bool")


@dataclass(frozen=True, eq=False)
class Transitions:
    """What an agent saw, did and got, decision after decision; the columns of an off-policy learner's memory.

    Attributes:
        observations: Signals before the decision; (T, S), float32 or float64.
        actions: As the agent gave them; (T, K), float32, float64 or int64.
        rewards: In the spec's unit; (T,), float32 or float64.
        next_observations: Signals at the end of the interval; (T, S), of the type of `observations`.
        terminated: The run ended with it, no value follows; (T,), bool.
        extra: More columns by name (`intervened`, `log_prob`, `value`); (T, ...), of any of these types.

    Raises:
        InputError: A column is no array, or has another type, shape or number of rows, or a number in it is not finite.
    """

    observations: npt.NDArray[Any]
    actions: npt.NDArray[Any]
    rewards: npt.NDArray[Any]
    next_observations: npt.NDArray[Any]
    terminated: npt.NDArray[np.bool_]
    extra: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.extra:
            if name in COLUMNS or not isinstance(name, str) or not EXTRA_NAME.fullmatch(name):
                raise InputError(
                    f"extra column {name!r}; expected a name of its own of small letters, digits and underscores"
                )
        checked = {name: _checked(name, column) for name, column in self.columns.items()}
        for name in COLUMNS:
            object.__setattr__(self, name, checked.pop(name))
        object.__setattr__(self, "extra", checked)
        for name, column in self.columns.items():
            if len(column) != len(self):
                raise InputError(
                    f"column {name!r} has {len(column)} rows, 'observations' has {len(self)}; "
                    "every column has one for each transition"
                )
        now, then = self.observations, self.next_observations
        if (now.shape, now.dtype) != (then.shape, then.dtype):
            raise InputError(
                f"'next_observations' are {then.dtype} of {then.shape[1]} numbers a row, 'observations' are "
                f"{now.dtype} of {now.shape[1]}; both hold the same signals"
            )

    def __len__(self) -> int:
        return len(self.observations)

    @property
    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """Every column by name, the extra ones last."""
        return {**{name: getattr(self, name) for name in COLUMNS}, **self.extra}

    @property
    def widths(self) -> dict[str, tuple[int, ...]]:
        """Shape of one row of every column, by its name; what has to be equal in what is joined."""
        return {name: column.shape[1:] for name, column in self.columns.items()}

    def describe_row(self) -> str:
        """The widths in words: "observations 5, actions 1, rewards, ..."."""
        return ", ".join(f"{name} {' x '.join(map(str, shape))}".rstrip() for name, shape in self.widths.items())

    @classmethod
    def from_columns(cls, columns: Mapping[str, npt.NDArray[Any]]) -> Transitions:
        """Inverse of `columns`.

        Raises:
            InputError: One that every run has is missing, or one is not as it has to be.
        """
        if missing := [name for name in COLUMNS if name not in columns]:
            raise InputError(f"there is no column {missing[0]!r}; there are {', '.join(columns) or 'none'}")
        extra = {name: column for name, column in columns.items() if name not in COLUMNS}
        return cls(**{name: columns[name] for name in COLUMNS}, extra=extra)

    @classmethod
    def nothing(cls, extra: Collection[str] = ()) -> Transitions:
        """No transition, of width 0, with extra columns of these names."""
        import numpy as np

        columns = {name: np.zeros((0,) * len(letters), types[0]) for name, (types, letters) in COLUMNS.items()}
        return cls.from_columns({**columns, **{name: np.zeros(0) for name in extra}})

    @classmethod
    def concatenate(cls, parts: Sequence[Transitions]) -> Transitions:
        """Join transitions, in the order given.

        Args:
            parts: One or more, of the same columns and widths; float32 beside float64 becomes float64, as in NumPy.

        Raises:
            InputError: There are none, or their columns or widths differ.
        """
        import numpy as np

        if not parts:
            raise InputError("there are no transitions to join; give one or more")
        for index, part in enumerate(parts):
            if part.widths != parts[0].widths:
                raise InputError(
                    f"part {index} has rows of {part.describe_row()}, part 0 of {parts[0].describe_row()}; "
                    "join what has the same columns"
                )
        return cls.from_columns(
            {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].widths}
        )

    def newest(self, count: int) -> Transitions:
        """The last transitions, or all where there are no more.

        Raises:
            InputError: `count` is no whole number of at least 0.
        """
        check_count("count", count, least=0)
        begin = max(len(self) - count, 0)
        return Transitions.from_columns({name: column[begin:] for name, column in self.columns.items()})

    def with_extra(self, names: Collection[str]) -> Transitions:
        """The same with these extra columns alone.

        Raises:
            InputError: One of them is not there.
        """
        if missing := [name for name in names if name not in self.extra]:
            raise InputError(f"there is no column {missing[0]!r}; there are {', '.join(self.columns)}")
        return Transitions.from_columns(
            {name: column for name, column in self.columns.items() if name in {*COLUMNS, *names}}
        )


def _checked(name: str, column: object) -> npt.NDArray[Any]:
    """A column of the right type and dimensions, finite, in memory as it will be written.

    Raises:
        InputError: It is none.
    """
    import numpy as np

    if not isinstance(column, np.ndarray):
        raise InputError(f"column {name!r} is a {type(column).__name__}; expected a NumPy array")
    types, letters = COLUMNS.get(name, (EXTRA_TYPES, ("T", "...")))
    if column.dtype.name not in types:
        raise InputError(f"column {name!r} is {column.dtype.name}; expected {' or '.join(types)}")
    if column.ndim < 1 or (name in COLUMNS and column.ndim != len(letters)):
        expected = f"({', '.join(letters)}{',' if len(letters) == 1 else ''})"
        raise InputError(f"column {name!r} has the shape {column.shape}; expected {expected}")
    if column.dtype.kind == "f":
        fine = np.isfinite(column).all(axis=tuple(range(1, column.ndim)))
        if not fine.all():
            row = int(np.argmin(fine))
            raise InputError(f"column {name!r} is not finite in row {row}; leave such transitions out")
    return np.ascontiguousarray(column, dtype=column.dtype.newbyteorder("="))


def check_count(name: str, value: object, least: int) -> None:
    """Refuse what is no count.

    Raises:
        InputError: It is no whole number, or below the least.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} is {value!r}; expected a whole number of at least {least}")
