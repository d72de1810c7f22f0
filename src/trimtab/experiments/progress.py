"""What a person sees while a study runs: what is done and left, what runs, its loss so far, the time left.

Called by trimtab.experiments.run, and the only place that writes while a study runs. On a terminal it is a
live block of bars; elsewhere (a log, a pipe) it is a plain line every few seconds.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from trimtab.experiments.plan import Job

__all__ = ["Display", "Live", "Plain", "Silent", "make_display"]

_PLAIN_EVERY_S = 5.0


def describe(job: Job) -> str:
    """One run in a few words."""
    rate = "" if job.initial_lr is None else f", rate {job.initial_lr:g}"
    role = "" if job.role == "report" else f" ({job.role})"
    return f"{job.arm} on {job.task}{role}, seed {job.seed}{rate}"


def news_in_words(news: Mapping[str, Any]) -> str:
    """What a running job said last: its step and its losses, as far as it said them."""
    words = []
    if "optimizer_step" in news:
        of = f"/{news['total_steps']}" if news.get("total_steps") else ""
        words.append(f"step {news['optimizer_step']}{of}")
    for key, name in (("train_loss", "train loss"), ("val_loss", "validation loss")):
        if isinstance(news.get(key), (int, float)):
            words.append(f"{name} {news[key]:.4g}")
    return ", ".join(words)


class Display(ABC):
    """Shows a study under way; used as a context manager around it."""

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop showing."""
        return

    @abstractmethod
    def begin(self, total: int, done: int) -> None:
        """Say how many runs there are, and how many of them were done before."""

    @abstractmethod
    def started(self, job: Job) -> None:
        """A run begins."""

    @abstractmethod
    def news(self, job: Job, news: Mapping[str, Any]) -> None:
        """A run says how far it is."""

    @abstractmethod
    def over(self, job: Job) -> None:
        """A run is over, well or not."""

    @abstractmethod
    def say(self, text: str) -> None:
        """Something that a person must not miss."""


class Silent(Display):
    """Shows nothing: the default for calls from Python."""

    def begin(self, total: int, done: int) -> None:
        """See Display."""

    def started(self, job: Job) -> None:
        """See Display."""

    def news(self, job: Job, news: Mapping[str, Any]) -> None:
        """See Display."""

    def over(self, job: Job) -> None:
        """See Display."""

    def say(self, text: str) -> None:
        """See Display."""


class Plain(Display):
    """A line every few seconds.

    Args:
        console: Where to write.
        every_s: Seconds between two lines.
    """

    def __init__(self, console: Console, every_s: float = _PLAIN_EVERY_S) -> None:
        self._console = console
        self._every_s = every_s
        self._running: dict[str, str] = {}
        self._total = self._done = self._done_before = 0
        self._begun_s = self._last_s = time.monotonic()

    def begin(self, total: int, done: int) -> None:
        """See Display."""
        self._total, self._done, self._done_before = total, done, done
        self._begun_s = self._last_s = time.monotonic()
        before = f", {done} of them done before" if done else ""
        self.say(f"{total} runs{before}")

    def started(self, job: Job) -> None:
        """See Display."""
        self._running[job.directory] = describe(job)
        self._line()

    def news(self, job: Job, news: Mapping[str, Any]) -> None:
        """See Display."""
        words = news_in_words(news)
        self._running[job.directory] = f"{describe(job)} ({words})" if words else describe(job)
        self._line()

    def over(self, job: Job) -> None:
        """See Display."""
        self._running.pop(job.directory, None)
        self._done += 1
        self._line()

    def say(self, text: str) -> None:
        """See Display."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _line(self) -> None:
        now = time.monotonic()
        if now - self._last_s < self._every_s:
            return
        self._last_s = now
        left = self._total - self._done
        done_now = self._done - self._done_before
        time_left = f", about {(now - self._begun_s) / done_now * left:.0f} s to go" if done_now else ""
        running = "; ".join(self._running.values()) or "none"
        self.say(f"{self._done} of {self._total} runs done, {left} left{time_left}; running: {running}")


class Live(Display):
    """Bars on a terminal: one for the study, and a line for each run under way."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[words]}"),
            console=console,
            transient=True,
        )
        self._all: TaskID | None = None
        self._rows: dict[str, TaskID] = {}

    def __enter__(self) -> Display:
        """Start drawing."""
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take the bars away."""
        self._progress.stop()

    def begin(self, total: int, done: int) -> None:
        """See Display."""
        self._all = self._progress.add_task("all runs", total=total, words="")
        # Not `completed=`: runs done before must not count for the time left.
        self._progress.update(self._all, completed=done)
        self._progress.tasks[0]._progress.clear()

    def started(self, job: Job) -> None:
        """See Display."""
        name = escape(describe(job))
        self._rows[job.directory] = self._progress.add_task(name, total=None, words="")

    def news(self, job: Job, news: Mapping[str, Any]) -> None:
        """See Display."""
        row = self._rows.get(job.directory)
        if row is not None:
            self._progress.update(
                row,
                total=news.get("total_steps"),
                completed=news.get("optimizer_step"),
                words=news_in_words({key: value for key, value in news.items() if key != "optimizer_step"}),
            )

    def over(self, job: Job) -> None:
        """See Display."""
        row = self._rows.pop(job.directory, None)
        if row is not None:
            self._progress.remove_task(row)
        if self._all is not None:
            self._progress.advance(self._all)

    def say(self, text: str) -> None:
        """See Display."""
        self._progress.console.print(text, markup=False, highlight=False)


def make_display(console: Console) -> Display:
    """The display that suits where the console writes to."""
    return Live(console) if console.is_terminal else Plain(console)
