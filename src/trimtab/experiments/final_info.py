"""final_info.json of studies of language models, in the form of the write-up that such studies answer.

Called by report.py. arms/ARM/final_info.json holds one arm, OUT/final_info.json all of them by their names:

    {"DATASET": {"means": {KEY: number}, "stderrs": {KEY: number or null}, "final_info_dict": {KEY: [one a seed]}}}

A standard error of one seed is null, as is what no seed has; seeds without a value are left out of both and are
null in the list.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from trimtab.experiments.metrics import run_metrics
from trimtab.experiments.plot_style import slug
from trimtab.experiments.reading import LANGUAGE_DATASETS, Arm, StudyFolder
from trimtab.experiments.stats import summarize
from trimtab.storage import write_json

__all__ = ["final_info", "write_final_info"]

_KEYS = ("final_train_loss", "best_val_loss", "total_train_time", "avg_inference_tokens_per_second")


def final_info(study: StudyFolder) -> dict[str, Any]:
    """Arm -> data set -> means, standard errors, values; empty for studies that it is not written for."""
    everywhere = bool(study.plan.get("final_info"))
    tasks = [task for task in study.tasks if everywhere or study.dataset(task) in LANGUAGE_DATASETS]
    if not tasks:
        return {}
    return {arm.id: {_key(study, task): _entry(study, arm, task) for task in tasks} for arm in study.arms}


def write_final_info(study: StudyFolder, out: Path) -> None:
    """Write one file for each arm and the merged one, where the study is one of language models.

    Raises:
        OutputError: The folder cannot be written.
    """
    merged = final_info(study)
    for arm, found in merged.items():
        safe = arm if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+:-]*", arm) else slug(arm)
        write_json(out / "arms" / safe / "final_info.json", found)
    if merged:
        write_json(out / "final_info.json", merged)


def _key(study: StudyFolder, task: str) -> str:
    """The data set's name, or the task's where two tasks share a data set."""
    dataset = study.dataset(task)
    return dataset if sum(study.dataset(other) == dataset for other in study.tasks) == 1 else task


def _entry(study: StudyFolder, arm: Arm, task: str) -> dict[str, Any]:
    runs = [run_metrics(run, None) for run in study.of(arm=arm.id, task=task, role="report") if run.is_over]
    found = {key: summarize([run[key] for run in runs]) for key in _KEYS}
    return {
        "means": {key: summary.mean for key, summary in found.items()},
        "stderrs": {key: summary.stderr for key, summary in found.items()},
        "final_info_dict": {key: list(summary.values) for key, summary in found.items()},
    }
