"""The tree of errors is the one that its module draws, and a wrong name is helped."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

from trimtab import errors
from trimtab.errors import TrimtabError, unknown_name, warn


def test_the_drawn_tree_is_the_real_one() -> None:
    drawn: list[tuple[int, str, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^[\s│├└─]*?([A-Z]\w+Error)(?: \((\w+)\))?", line)
        if match and not line.startswith("The"):
            drawn.append((match.start(1), match[1], match[2] or ""))
    assert {name for _, name, _ in drawn} == {
        name for name in errors.__all__ if isinstance(getattr(errors, name), type)
    }
    parents: list[tuple[int, str]] = []
    for depth, name, builtin in drawn:
        parents = [(d, n) for d, n in parents if d < depth]
        kind = getattr(errors, name)
        assert kind.__bases__[0].__name__ == (parents[-1][1] if parents else "Exception"), name
        if builtin:
            assert builtin in {base.__name__ for base in kind.__bases__}, name
        parents.append((depth, name))


def test_every_error_of_ours_is_one_to_catch() -> None:
    kinds = [getattr(errors, name) for name in errors.__all__ if name.endswith("Error")]
    assert all(issubclass(kind, TrimtabError) for kind in kinds)


@pytest.mark.parametrize(
    ("kind", "name", "known", "text"),
    [
        ("knob", "lrr", ["weight_decay", "lr"], "unknown knob 'lrr'; did you mean 'lr'? known: lr, weight_decay"),
        ("knob", "learning_rate", ["lr"], "unknown knob 'learning_rate'; did you mean 'lr'? known: lr"),
        ("knob", "WD", ["weight_decay"], "unknown knob 'WD'; did you mean 'weight_decay'? known: weight_decay"),
        ("arm", "zzz", ["a", "b"], "unknown arm 'zzz'; known: a, b"),
        ("arm", 5, ["a"], "unknown arm '5'; known: a"),
        ("arm", None, [], "unknown arm 'None'; known: none"),
    ],
)
def test_unknown_name(kind: str, name: object, known: list[str], text: str) -> None:
    assert str(unknown_name(kind, name, known)) == text


def test_a_warning_points_at_the_line_that_called_us() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn("look here")
    assert [(str(one.message), one.category, Path(one.filename)) for one in caught] == [
        ("look here", RuntimeWarning, Path(__file__))
    ]
