"""What a person sees of one job of a study while it runs, in words.

Called by trimtab.experiments.conductor; how it is shown stands in trimtab.progress.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.experiments.plan import Job
from trimtab.progress import News

__all__ = ["describe", "news_of"]


def describe(job: Job) -> str:
    """One run in a few words."""
    rate = "" if job.initial_lr is None else f", rate {job.initial_lr:g}"
    role = "" if job.role == "report" else f" ({job.role})"
    return f"{job.arm} on {job.task}{role}, seed {job.seed}{rate}"


def news_of(news: Mapping[str, Any]) -> News:
    """What a running job said last: its step and its losses, as far as it said them."""
    words = []
    for key, name in (("train_loss", "train loss"), ("val_loss", "validation loss")):
        if isinstance(news.get(key), (int, float)):
            words.append(f"{name} {news[key]:.4g}")
    spent = news.get("spent", news.get("optimizer_step"))
    return News("step", None if spent is None else round(spent), news.get("total_steps"), ", ".join(words))
