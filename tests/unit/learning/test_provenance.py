"""Where a brain comes from, and that no report shows it on what it was taught on as if it had not seen it."""

from __future__ import annotations

from typing import Any

import pytest

from trimtab import registry
from trimtab.brain import Brain
from trimtab.errors import InputError
from trimtab.learning.provenance import check_provenance
from trimtab.spec import ControlSpec, make_agent
from trimtab.tasks.families import HELD_OUT, SOURCES


def brain(provenance: dict[str, Any], agent: str = "ppo") -> Brain:
    made = make_agent(agent, {})
    return Brain(made, ControlSpec.for_agent(made), provenance)


def test_a_brain_may_be_shown_on_what_it_has_not_seen():
    every = [source for sources in SOURCES.values() for source in sources]
    tasks = ["digits-mlp", "uoft-cs/cifar10", "CIFAR-10", "titanic-fcnn", "shakespeare-gpt", "SST-2", *HELD_OUT]
    check_provenance(brain({"sources": every}), tasks)


@pytest.mark.parametrize(
    ("task", "source"),
    [("wine", "wine"), ("wine-mlp", "wine"), ("Breast Cancer", "breast-cancer"), ("sklearn/iris", "iris")],
)
def test_an_overlap_fails_and_names_both(task, source):
    with pytest.raises(InputError) as caught:
        check_provenance(brain({"sources": ["teacher-student", source]}), ["digits-mlp", task])
    assert str(caught.value) == (
        f"task {task!r} is no test of this brain: it was taught on {source!r}; report it in a table of its own"
    )


@pytest.mark.parametrize("source", ["sklearn digits", "uoft-cs/cifar10", "Fashion-MNIST"])
def test_no_brain_is_taught_on_what_brains_are_judged_on(source):
    with pytest.raises(InputError, match=rf"this brain was taught on {source}, on which brains are judged"):
        check_provenance(brain({"sources": ["wine", source]}), [])


@pytest.mark.parametrize("provenance", [{}, {"sources": []}, {"sources": "wine"}, {"sources": [3]}])
def test_a_brain_that_does_not_say_what_it_has_seen_is_not_believed(provenance):
    with pytest.raises(InputError, match="the brain's provenance does not list its sources"):
        check_provenance(brain(provenance), ["digits-mlp"])


def test_a_rule_has_seen_nothing():
    check_provenance(brain({}, "uwhg"), ["wine", "digits-mlp"])
    check_provenance(Brain.load("default-open"), ["wine"])


def test_the_shipped_default_has_not_seen_what_it_is_judged_on():
    judged_on = [name for name in registry.names("task") if not name.startswith(("enwik8", "text8", "diabetes"))]
    check_provenance(Brain.load("default"), judged_on)
    with pytest.raises(InputError, match="task 'diabetes-mlp' is no test of this brain: it was taught on 'diabetes'"):
        check_provenance(Brain.load("default"), ["diabetes-mlp"])
    with pytest.raises(InputError, match="task 'wine' is no test of this brain: it was taught on 'wine'"):
        check_provenance(Brain.load("default"), ["wine"])
