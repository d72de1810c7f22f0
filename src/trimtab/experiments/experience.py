"""From the files of a finished run to its transitions, for later runs to learn from.

Called by `trimtab.experiments.single`, at the end of a learned arm's run. The folder is OUT/experience; a run that is
done again takes the place of what it stored before.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.agents.base import Agent, keep_actions
from trimtab.errors import InputError
from trimtab.experience import ExperienceStore, Transitions
from trimtab.spec import ControlSpec
from trimtab.storage import RunDirectory, read_lines

__all__ = ["FOLDER", "check_experience", "read_experience", "run_id_of", "store_run", "transitions_of"]

FOLDER = "experience"  # below the study's


def run_id_of(job: Mapping[str, Any]) -> str:
    """What a run is stored under: the same for the same run of the same study."""
    rate = "task" if job["initial_lr"] is None else repr(job["initial_lr"])
    parts = (job["study"], job["task"], job["arm"], job["role"], f"lr={rate}", f"seed={job['seed']}")
    return "-".join(str(part) for part in parts)[:150]


def transitions_of(folder: RunDirectory) -> Transitions:
    """What the agent of a run saw, did and got.

    A decision counts where the agent was asked and a reward followed: not the last one, which nothing follows, and not
    where the guard took its place.
    """
    spec = ControlSpec.from_json(folder.header()["spec"])
    rows = read_lines(folder.series)[1:]  # the first is of before the first interval
    moves: dict[int, dict[str, float]] = {}
    for decision in read_lines(folder.decisions):
        if decision["source"] == "agent":
            moves.setdefault(decision["index"], {})[decision["knob"]] = decision["action"]
    nothing = keep_actions(spec.actions, np.zeros((1, 0)), spec.n_moved)[0].astype(np.float64)
    seen, did, got, then, ends = [], [], [], [], []
    for index, (before, after) in enumerate(itertools.pairwise(rows)):
        signals = [[row["signals"][name] for name in spec.signals] for row in (before, after)]
        known = index in moves and after["reward"] is not None and None not in (*signals[0], *signals[1])
        if not known:
            continue
        action = nothing.copy()
        if spec.turns:
            action[0] = next(iter(moves[index].values()))
        else:
            for name, move in moves[index].items():
                action[spec.knobs.index(name)] = move
        seen.append(signals[0])
        did.append(action)
        got.append(after["reward"])
        then.append(signals[1])
        ends.append(index + 2 == len(rows))
    width = len(spec.signals)
    return Transitions(
        np.array(seen, dtype=np.float64).reshape(-1, width),
        np.array(did, dtype=np.float64).reshape(-1, spec.n_moved),
        np.array(got, dtype=np.float64),
        np.array(then, dtype=np.float64).reshape(-1, width),
        np.array(ends, dtype=np.bool_),
    )


def read_experience(job: Mapping[str, Any], spec: ControlSpec, out: Path) -> Transitions:
    """Transitions of earlier runs that fit a job's spec.

    Raises:
        InputError: The folder is the study's own, which fills while it is read.
    """
    folder = Path(job["experience"])
    if folder.resolve() == (out / FOLDER).resolve():
        raise InputError(
            f"arm {job['arm']!r}: experience {folder} is the study's own, and what lies there depends on which run "
            "ends first; give that of an earlier study"
        )
    return ExperienceStore(folder).read(spec.fingerprint)


def check_experience(job: Mapping[str, Any], spec: ControlSpec, agent: Agent) -> None:
    """Check, before anything is trained, that a job's agent can learn from the experience that it names.

    Raises:
        InputError: There is none that fits, or the agent learns from what it does itself alone.
    """
    folder = Path(job["experience"])
    if type(agent).learn_from_earlier is Agent.learn_from_earlier:
        raise InputError(f"agent {agent.name!r} does not learn from earlier runs' transitions; leave experience out")
    if not ExperienceStore(folder).files(spec.fingerprint):
        raise InputError(
            f"experience {folder} has no runs of the spec {spec.fingerprint} (knobs {', '.join(spec.knobs)}); see "
            f"`trimtab list experience --dir {folder}`"
        )


def store_run(job: Mapping[str, Any], folder: RunDirectory, out: Path) -> None:
    """Add a finished run to the study's experience; one without transitions is left out.

    Raises:
        OutputError: It cannot be written.
    """
    transitions = transitions_of(folder)
    if not len(transitions):
        return
    header = folder.header()
    ExperienceStore(out / FOLDER).append(
        transitions,
        spec=header["spec"],
        fingerprint=header["fingerprint"],
        run={key: job[key] for key in ("study", "task", "arm", "agent", "role", "seed")},
        run_id=run_id_of(job),
        replace=True,
    )
