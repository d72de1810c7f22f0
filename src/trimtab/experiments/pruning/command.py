"""`trimtab prune TASK`: one network of a task, pruned to one target; a study of pruning of one piece of work.

Called by the command line. The folder is a study's, so that `trimtab report`, `trimtab show` and `--resume` work on it;
OUT/pruned holds the pruned network, which `trimtab.load_pruned` reads without being given a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trimtab import registry
from trimtab.errors import InputError, unknown_name
from trimtab.experiments.jobs import load_data
from trimtab.experiments.pruning.run import run_pruning_study
from trimtab.experiments.pruning.schema import ALL_METHODS, parse_pruning_study, resolve, target_name
from trimtab.experiments.run import Outcome
from trimtab.experiments.schema import SCALES
from trimtab.progress import Display
from trimtab.pruner.methods import METHODS
from trimtab.pruner.policies import SHIPPED
from trimtab.pruning.budget import Target
from trimtab.tasks.base import Task

__all__ = ["SAVED", "parse_target", "prune_task"]

SAVED = "pruned"  # folder of the pruned network, in the command's


def parse_target(text: str) -> dict[str, Any]:
    """A target as people type it: "flops=0.5", or "latency=0.5,batch_size=64".

    Raises:
        InputError: It is none.

    >>> parse_target("latency=0.5,batch_size=64")
    {'latency': 0.5, 'batch_size': 64}
    """
    found: dict[str, Any] = {}
    for part in text.split(","):
        key, _, value = (word.strip() for word in part.partition("="))
        try:
            found[key] = int(value) if key == "batch_size" else float(value)
        except ValueError:
            raise InputError(
                f"target: got {text!r}, expected a cost and the share of it that may be left, such as flops=0.5, "
                "params=0.25 or latency=0.5,batch_size=64"
            ) from None
    return Target.parse(found).to_dict()


def prune_task(  # noqa: PLR0913 (each by name, and most of them left as they are)
    task: str,
    *,
    target: str,
    agent: str = "ppo",
    baselines: Sequence[str] = (),
    max_evaluations: int = 100,
    fine_tune_steps: int | None = None,
    score_steps: int = 0,
    stages: int = 1,
    multiple: int = 8,
    brain: str | Path = SHIPPED,
    model: str | Path | None = None,
    scale: str = "small",
    seed: int = 0,
    out: str | Path | None = None,
    data_dir: str | Path | None = None,
    resume: bool = False,
    display: Display | None = None,
) -> Outcome:
    """Train a task's network (or load one), prune it, fine-tune it, read test, and report.

    Args:
        task: Registered name.
        target: What may be left, see `parse_target`.
        agent: The method whose network is kept, one of `trimtab.pruner.methods.METHODS`.
        baselines: Other methods to compare with, "scratch" among them.
        max_evaluations: Configurations that a search scores.
        fine_tune_steps: Optimizer steps of a fine-tuning; one pass over the training samples where it is None.
        score_steps: Optimizer steps before each score of a search, for networks that guess when they are cut.
        stages: In which the agent prunes and fine-tunes.
        multiple: Widths are multiples of it.
        brain: What "ppo" starts from: "pruning", which we ship, or a folder that `trimtab learn pruning` made.
        model: Folder of a network of this task, dense or pruned, that is pruned instead of one that is trained.
        scale: Of the task.
        seed: Root of all seeds.
        out: Folder; runs/prune-TASK where it is None.
        data_dir: Folder with the data sets as files.
        resume: Go on from what is in `out`.
        display: Where to show how it goes; nowhere where it is None.

    Raises:
        InputError: Something that was given is wrong; nothing was started and nothing is left behind.
        RunFailedError: It could not go on.
    """
    if task not in registry.names("task"):
        raise unknown_name("task", task, registry.names("task"))
    if scale not in SCALES:
        raise unknown_name("scale", scale, SCALES)
    if agent not in METHODS:
        raise unknown_name("agent", agent, METHODS)
    for name in baselines:
        if name not in ALL_METHODS:
            raise unknown_name("baseline", name, ALL_METHODS)
    if agent in baselines:
        raise InputError(f"baselines: {agent!r} is the agent itself; leave it out")
    parsed = parse_target(target)
    if fine_tune_steps is None:
        made: Task = registry.load("task", task)(scale)
        data = load_data(task, scale, None if data_dir is None else str(Path(data_dir)))
        fine_tune_steps = max(1, len(data.train.targets) // made.batch_size)
    file = parse_pruning_study(
        {
            "study": f"prune-{task}",
            "kind": "pruning",
            "idea": f"The network of {task}, pruned to {target_name(parsed)} by {agent}.",
            "tasks": [task],
            "targets": [parsed],
            "methods": [agent, *baselines],
            "max_evaluations": max_evaluations,
            "fine_tune_steps": fine_tune_steps,
            "score_steps": score_steps,
            "stages": {agent: stages} if stages != 1 else {},
            "multiple": multiple,
            "brain": str(brain),
            "n_seeds": 1,
            "seed": seed,
        },
        "trimtab prune",
        scale,
    )
    study = resolve(file, "trimtab prune", scale)
    study = replace(study, model=None if model is None else str(model), save={agent: SAVED})
    folder = Path("runs") / study.study if out is None else Path(out)
    # One piece of work: another process would only take time to start.
    return run_pruning_study(
        study, folder, data_dir=None if data_dir is None else Path(data_dir), workers=0, resume=resume, display=display
    )
