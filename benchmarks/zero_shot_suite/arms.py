"""The arms: what is called after each optimizer step of a run.

| arm | rate | told the validation loss |
|---|---|---|
| cosine, wsd, plateau, constant, schedule-free | tuned on the grid | plateau |
| default | drawn | yes: `RLScheduler(optimizer, total_steps, model=model)`, `report` at the task's `eval_every` |
| default-loss | drawn | no: `RLScheduler(optimizer, total_steps)`, only ever `step(loss)` |
| default-open | drawn | yes: as default, without `total_steps`: it does not know when the run ends |
| brain:NAME | drawn | yes, as default, with `brain=DIR`, and `loader=loop` for what moves the batch size |
| uwhg | drawn | yes, as default, with the rule as brain |
| q_learning | drawn | yes; from an empty table, over a cosine |
| placebo:default | drawn | yes; decides, and only its base schedule is written |
| yoked:default | drawn | no; replays what `default` decided under the next report seed, from that run's rate |
| default-cosine | a default per optimizer (1e-3; SGD 0.1) | no |
| prodigy, prodigy-cosine | 1 | no; constant, and with the cosine that its authors recommend |

A brain over a constant base has no end to decay to: it is made for runs whose end is not known, and is not told it.

Every arm has the same training FLOPs: those of the part's optimizer steps as its task has them. A brain that moves the
batch size takes more steps or fewer. Knobs of a brain that cannot act on a part (dropout, where there is none) are left
out there.

Baselines run without the guard, as everybody uses them; learned arms, rules and twins have it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

import trimtab
from trimtab.agents.base import Timing
from trimtab.agents.scripted import Replay
from trimtab.brain import Brain
from trimtab.controller import Controller
from trimtab.errors import InputError
from trimtab.safety import Safety
from trimtab.seeding import derive_seed
from trimtab.spec import ControlSpec, make_agent
from trimtab.tasks.base import Task
from trimtab.training.loop import TrainingLoop
from trimtab.training.own_optimizers import evaluated_weights, put_in

__all__ = ["DRAWN", "TUNED", "Driver", "identity", "make_driver"]

TUNED = ("cosine", "wsd", "plateau", "schedule-free", "constant")
DRAWN = (
    "default",
    "default-loss",
    "default-open",
    "uwhg",
    "default-cosine",
    "prodigy",
    "prodigy-cosine",
    "q_learning",
    "placebo:default",
    "yoked:default",
)
_PLATEAU = {"factor": 0.5, "patience": 2}  # as in FINDINGS' trial: with 10 to 30 validations torch's 10 does nothing
_VERSION = 1  # of the arms below: raised when what one of them does changes, so that it is run anew


class Driver:
    """What is called in a run of one arm.

    Args:
        loop: The run.
        control: Moves the rate; None for an optimizer that needs no schedule.
        reports: Whether `control` is told the validation loss.
        has_best: Whether whoever uses this arm has a validation loss, and so weights of the best one.
    """

    def __init__(
        self,
        loop: TrainingLoop,
        control: Controller | trimtab.RLScheduler | None,
        *,
        reports: bool = False,
        has_best: bool = True,
    ) -> None:
        self._loop = loop
        self._control = control
        self._reports = reports
        self.has_best = has_best
        self._start = loop.task.lr

    def step(self, loss: Tensor) -> None:
        """After an optimizer step."""
        if self._control is not None:
            self._control.step(loss)

    def report(self, val_loss: float) -> None:
        """After a validation, before `step` of the same optimizer step."""
        if self._control is not None and self._reports:
            self._control.report(val_loss=val_loss)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put the weights that count into the model, for the time of an evaluation."""
        with evaluated_weights(self._loop.optimizer):
            yield

    def best_state(self) -> dict[str, Tensor] | None:
        """The weights of the best validation loss, if the arm keeps them itself."""
        is_ours = isinstance(self._control, trimtab.RLScheduler) and self._reports
        return self._control.best_state() if is_ours else None  # type: ignore[union-attr]

    def has_given_up(self) -> bool:
        """Whether the guard ended the run, and put the best weights back."""
        return self._control is not None and self._control.status == "gave_up"

    def n_restored(self) -> int:
        """How often other weights than those of the last optimizer step were put into the model."""
        decisions = [] if self._control is None else self._control.decisions
        return sum(decision.source in ("guard", "gave_up") for decision in decisions)

    @property
    def status(self) -> str:
        """How the run ended: "over", "gave_up", or "done" without a controller."""
        return "done" if self._control is None else self._control.status

    def masked(self) -> list[str]:
        """Names of the knobs that cannot act on this part."""
        return sorted(self._control.masked) if self._control is not None else []

    def replay(self) -> dict[str, Any] | None:
        """What a twin would do again: the settings that were granted, decision by decision; None for a baseline."""
        scheduler = self._control
        if not isinstance(scheduler, trimtab.RLScheduler):
            return None
        spec, agent = scheduler.brain.spec, scheduler.brain.agent
        start = agent.initial_setting(type(self._loop.optimizer).__name__) or self._start
        settings = [start]
        for decision in scheduler.decisions:
            if decision.knob == "lr":
                settings += [settings[-1]] * (decision.index + 2 - len(settings))
                settings[decision.index + 1] = decision.setting
        rows = [[setting] for setting in settings[1:] or settings]
        return {"start": start, "settings": rows, "timing": asdict(spec.timing), "base": asdict(spec.base)}


def make_driver(job: Mapping[str, Any], loop: TrainingLoop) -> Driver:
    """Attach an arm to a run.

    Args:
        job: See `single.run_job`.
        loop: The run, at its start.

    Raises:
        InputError: A network that Schedule-Free cannot evaluate.
        MissingExtraError: The optimizer of an arm is not installed.
    """
    arm, task = str(job["arm"]), loop.task
    if arm in ("default", "default-loss", "default-open", "uwhg") or arm.startswith("brain:"):
        return _ours(arm, job, loop)
    if arm == "schedule-free":
        put_in(loop, arm)
        return Driver(loop, None)
    if arm.startswith("prodigy"):
        put_in(loop, "prodigy")
        return Driver(loop, _control(loop, "cosine", _cosine_of(task)) if arm == "prodigy-cosine" else None)
    if arm == "placebo:default":
        brain = Brain.load("default")
        placebo = Controller(brain, optimizer=loop.optimizer, total_steps=loop.total_steps, mode="placebo")
        return Driver(loop, placebo, reports=True)
    if arm == "yoked:default":
        return Driver(loop, _twin(job, loop))
    if arm == "q_learning":
        return Driver(loop, _q_learning(job, loop), reports=True)
    options = {
        "cosine": _cosine_of(task),
        "default-cosine": _cosine_of(task),
        "wsd": {"min_factor": task.min_lr_factor},
        "plateau": {**_PLATEAU, "every": task.eval_every},
        "constant": {},
    }
    if arm not in options:
        raise InputError(f"unknown arm {arm!r}; known: {', '.join((*TUNED, *DRAWN))}, brain:NAME")
    return Driver(loop, _control(loop, arm, options[arm]), reports=arm == "plateau")


def _ours(arm: str, job: Mapping[str, Any], loop: TrainingLoop) -> Driver:
    """RLScheduler, in the way that the README shows; untouched means without a further argument."""
    reports = arm != "default-loss"
    options: dict[str, Any] = {"model": loop.model} if reports else {}
    if arm == "uwhg":
        options["brain"] = _rule()
    elif arm.startswith("brain:"):
        options |= {"brain": job["brain"], "loader": loop}
    given = options.get("brain", "default-open" if arm == "default-open" else "default")
    brain = given if isinstance(given, Brain) else Brain.load(given)
    total_steps = None if brain.spec.base.name == "constant" else loop.total_steps
    scheduler = trimtab.RLScheduler(loop.optimizer, total_steps=total_steps, **options)
    return Driver(loop, scheduler, reports=reports, has_best=reports)


def _rule() -> Brain:
    agent = make_agent("uwhg")
    return Brain(agent, ControlSpec.for_agent(agent))


def _cosine_of(task: Task) -> dict[str, Any]:
    return {"warmup_steps": task.warmup_steps, "min_factor": task.min_lr_factor}


def _control(loop: TrainingLoop, agent: str, options: Mapping[str, Any]) -> Controller:
    made = make_agent(agent, options)
    safety = Safety(rollback=False)
    return Controller(made, optimizer=loop.optimizer, total_steps=loop.total_steps, safety=safety)


def _q_learning(job: Mapping[str, Any], loop: TrainingLoop) -> Controller:
    task = loop.task
    options = {"every": task.eval_every, "base": "cosine", "base_options": _cosine_of(task)}
    agent = make_agent(
        "q_learning", options, seed=derive_seed(0, "zero-shot exploration", job["part"], job["index"] + 1)
    )
    return Controller(agent, optimizer=loop.optimizer, model=loop.model, total_steps=loop.total_steps)


def _twin(job: Mapping[str, Any], loop: TrainingLoop) -> Controller:
    replay = job["replay"]
    for group in loop.optimizer.param_groups:
        group["lr"] = replay["start"]
    agent = Replay(replay["settings"], Timing(**replay["timing"]), replay["base"])
    return Controller(agent, optimizer=loop.optimizer, model=loop.model, total_steps=loop.total_steps)


def identity(arm: str, brains: Mapping[str, str | Path]) -> str:
    """What an arm is, so that runs of what it was before are told apart: an agent's name and a hash of its brain.

    Args:
        arm: Its name.
        brains: NAME -> folder, for the arms brain:NAME.

    Raises:
        BrainError: A brain cannot be loaded.
    """
    if arm == "uwhg":
        brain = _rule()
    elif arm.startswith("brain:"):
        brain = Brain.load(brains[arm.partition(":")[2]])
    elif arm == "default-open":
        brain = Brain.load(arm)
    elif "default" in arm and arm != "default-cosine":
        brain = Brain.load("default")
    else:
        return f"v{_VERSION}"
    digest = hashlib.sha256(f"v{_VERSION} {brain.spec.fingerprint}".encode())
    digest.update(json.dumps(brain.agent.options, sort_keys=True).encode())
    for key, value in sorted(brain.agent.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.numpy().tobytes() if isinstance(value, Tensor) else json.dumps(value).encode())
    return f"{brain.agent.name} {digest.hexdigest()[:12]}"
