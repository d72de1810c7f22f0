"""What an arm's brain has seen and cost before the study: whether it may be judged on a task, and at what price.

Called by trimtab.experiments.single. A brain that `trimtab learn` made lists its `sources`, the data that it was taught
on; one that a run of a study saved says how many runs it took, and hands on the sources of the brain that it went on
from. That a later run goes on from runs on the same task is what such a brain is for, so that this is not refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.brain import Brain
from trimtab.errors import InputError
from trimtab.learning.provenance import check_provenance
from trimtab.tasks.base import Task

__all__ = ["check_brain", "sources_of", "what_it_took"]


def check_brain(source: str, task: Task) -> None:
    """Refuse a brain on a task whose data it was taught on.

    Args:
        source: Name or folder of the brain.
        task: The task of a run that counts.

    Raises:
        InputError: It was taught on this data.
    """
    brain = Brain.load(source)
    if "sources" not in brain.provenance:
        return
    try:
        check_provenance(brain, [task.name, task.dataset])
    except InputError as error:
        raise type(error)(
            f"{error}; leave out the task or the arm, or name under restricted: the arms that the task is run with"
        ) from error


def sources_of(source: str) -> dict[str, Any]:
    """`sources` of a brain, to be handed on to one that goes on from it; nothing where it lists none."""
    sources = Brain.load(source).provenance.get("sources")
    return {} if sources is None else {"sources": sources}


def what_it_took(source: str) -> dict[str, int | None]:
    """What a brain cost: networks or runs and their optimizer steps, None where it does not say; nothing of a rule."""
    brain = Brain.load(source)
    if not brain.agent.state_dict():
        return {}
    cost = brain.provenance.get("cost")
    known = cost if isinstance(cost, Mapping) else {"networks": brain.provenance.get("runs"), **brain.provenance}
    return {key: _whole(known.get(key)) for key in ("networks", "optimizer_steps")}


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
