"""What `import trimtab` gives: at most twenty sorted names, each of which resolves, and one version everywhere."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import pytest

import trimtab

ROOT = Path(__file__).parents[1]


def test_the_names_are_few_sorted_and_there() -> None:
    assert list(trimtab.__all__) == sorted(trimtab.__all__)
    assert len(trimtab.__all__) == len(set(trimtab.__all__)) <= 20
    assert dir(trimtab) == sorted(trimtab.__all__)
    assert {"Brain", "Controller", "ControlSpec", "RLScheduler"} <= set(trimtab.__all__)


@pytest.mark.parametrize("name", trimtab.__all__)
def test_each_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(trimtab, name)
    if name != "__version__":
        assert inspect.isclass(value) or callable(value)
        assert inspect.getdoc(value)
        assert value.__name__ == name


def test_what_type_checkers_see_is_what_is_resolved() -> None:
    source = Path(trimtab.__file__).read_text(encoding="utf-8")
    block = source.split("if TYPE_CHECKING:")[1].split("\n\n")[0]
    shown = {
        name.strip(): module
        for module, names in re.findall(r"from (\S+) import (.+)", block)
        for name in names.split(",")
    }
    assert shown == trimtab._HOMES
    assert set(shown) == set(trimtab.__all__) - {"__version__"}


def test_an_unknown_name_says_what_there_is() -> None:
    with pytest.raises(AttributeError, match="module 'trimtab' has no attribute 'Contoller'; it has Brain, "):
        trimtab.Contoller  # noqa: B018


def test_one_version_everywhere() -> None:
    if sys.version_info >= (3, 11):
        import tomllib

        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert project["version"] == trimtab.__version__
    assert f'version = "{trimtab.__version__}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == trimtab.__version__
    assert len(headings) == len(set(headings))


def test_typed_packages_say_so() -> None:
    assert (Path(trimtab.__file__).parent / "py.typed").is_file()
