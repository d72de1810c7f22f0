"""Names: listing imports nothing, every entry loads, a wrong name is helped."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from typing import Any

import pytest

from trimtab import registry
from trimtab.errors import InputError, UnknownNameError

KINDS = ("task", "agent", "knob", "signal", "reward")


def every() -> list[tuple[str, str]]:
    return [(kind, name) for kind in KINDS for name in registry.names(kind)]


def test_listing_imports_neither_torch_nor_the_entries() -> None:
    code = (
        "import sys, trimtab; from trimtab import registry\n"
        f"names = [registry.names(kind) for kind in {KINDS!r}]; assert all(names)\n"
        "loaded = {'torch', 'numpy', 'scipy', 'matplotlib', 'trimtab.tasks', 'trimtab.agents'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(("kind", "name"), every())
def test_every_entry_loads_and_says_what_it_is(kind: str, name: str) -> None:
    assert callable(registry.load(kind, name))
    description = registry.entries(kind)[name].description
    assert 10 < len(description) <= 100
    assert not description.endswith(".")


def test_what_the_issue_names_is_there() -> None:
    assert set(registry.names("task")) >= {
        "digits-mlp",
        "digits-cnn",
        "titanic-fcnn",
        "titanic-tuning",
        "cifar10-tuning",
        "imdb-tuning",
        "sst2-tuning",
        "digits-tuning",
        "cifar10-pruning",
        "digits-pruning",
        "imdb-pruning",
        "cifar10-resnet18",
        "cifar10-vgg16",
        "mnist-resnet18",
        "mnist-vgg16",
        "mnist-mlp",
        "mnist-cnn",
        "cifar10-cnn",
        "sst2-mlp",
        "sst2-bilstm",
        "shakespeare-gpt",
        "enwik8-gpt",
        "text8-gpt",
    }
    assert set(registry.names("agent")) >= {
        *("constant", "step", "exponential", "cosine", "wsd", "plateau"),
        *("default-cosine", "replay", "random", "uwhg", "q_learning"),
    }
    assert set(registry.names("knob")) >= {"lr", "weight_decay"}


def test_an_agents_name_is_its_name_in_the_registry() -> None:
    from trimtab.spec import make_agent

    for name in registry.names("agent"):
        options: dict[str, Any] = {"settings": [[0.1]]} if name == "replay" else {}
        agent = make_agent(name, options)
        assert agent.name == name
        assert agent.is_taught == registry.entries("agent")[name].needs_brain
    assert {name for name, entry in registry.entries("agent").items() if entry.needs_brain} == {
        "dqn",
        "evolution",
        "ppo",
    }


@pytest.mark.parametrize(
    ("kind", "name", "text"),
    [
        ("agent", "q-learning", "unknown agent 'q-learning'; did you mean 'q_learning'"),
        ("knob", "learning_rate", "unknown knob 'learning_rate'; did you mean 'lr'"),
        ("task", "mnist", "unknown task 'mnist'; did you mean 'mnist-mlp'"),
        ("agent", "zzz", "unknown agent 'zzz'; known: constant, cosine"),
        ("agents", "cosine", "unknown kind of thing 'agents'; did you mean 'agent'"),
    ],
)
def test_a_wrong_name_is_helped(kind: str, name: str, text: str) -> None:
    with pytest.raises(UnknownNameError, match=text):
        registry.load(kind, name)


def test_added_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._TABLES, "signal", dict(registry._TABLES["signal"]))
    registry.add("signal", "mine", "trimtab.signals:progress", "progress again")
    assert registry.load("signal", "mine") is registry.load("signal", "progress")
    assert "mine" in registry.names("signal")
    with pytest.raises(InputError, match="signal 'mine' is registered already"):
        registry.add("signal", "mine", "x:y")
    with pytest.raises(InputError, match="signal 'progress' is registered already"):
        registry.add("signal", "progress", "x:y")


def test_other_packages_add_entries_but_take_none(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        metadata.EntryPoint("theirs", "trimtab.signals:progress", "trimtab.signals"),
        metadata.EntryPoint("progress", "os:getcwd", "trimtab.signals"),
    ]
    monkeypatch.setattr(metadata, "entry_points", lambda group: points if group == "trimtab.signals" else [])
    registry._of_packages.cache_clear()
    try:
        assert registry.load("signal", "theirs") is registry.load("signal", "progress")
        assert registry.entries("signal")["progress"].target == "trimtab.signals:progress"
        assert registry.entries("signal")["theirs"].description == "from a package"
    finally:
        registry._of_packages.cache_clear()
