"""What a surgeon is asked for, checked: numbers of units, places of units, entries of a plan.

Called by `surgeon`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab.errors import InputError
from trimtab.surgery.couplings import Group

__all__ = ["check_entry", "check_number", "check_units"]

_OPERATIONS = ("widen", "narrow", "deepen", "remove_layer")


def check_entry(entry: Any, place: int) -> tuple[str, str, list[int]]:
    """Operation, target and units of an entry of a plan; its place is for the message.

    Raises:
        InputError: It is no such entry.
    """
    try:
        operation, target, units = entry["operation"], entry["target"], list(entry["units"])
    except (KeyError, TypeError):
        operation, target, units = None, None, []
    if operation not in _OPERATIONS or not isinstance(target, str) or (operation in _OPERATIONS[:2]) != bool(units):
        raise InputError(
            f"entry {place} of the plan is {entry!r}; expected {{'operation': one of {', '.join(_OPERATIONS)}, "
            "'target': a name, 'units': a list of places, empty for layers}, as Surgeon.plan has them"
        )
    return operation, target, units


def check_number(n: object, lowest: int, highest: int | None, what: str) -> None:
    """Refuse what is no whole number from `lowest` to `highest` (None: without end).

    Raises:
        InputError: Naming n and what it is for.
    """
    is_whole = isinstance(n, int) and not isinstance(n, bool)
    if not is_whole or n < lowest or (highest is not None and n > highest):  # type: ignore[operator]
        expected = f"{lowest} or more" if highest is None else f"{lowest} to {highest}"
        raise InputError(f"n is {n!r}; to {what}, give a whole number, {expected}")


def check_units(units: Sequence[int], group: Group, *, several: bool = False) -> list[int]:
    """Places of units: some and not all of them, each once unless they are copied.

    Raises:
        InputError: They are not.
    """
    listed = list(units)
    known = all(isinstance(unit, int) and not isinstance(unit, bool) and 0 <= unit < group.size for unit in listed)
    if not known or not listed or (not several and not len(set(listed)) == len(listed) < group.size):
        raise InputError(
            f"units is {listed!r}; give different places from 0 to {group.size - 1}, not all {group.size} units of "
            f"{group.name!r}"
        )
    return listed
