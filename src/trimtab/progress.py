"""What a person sees while long work goes on: what is done and left, what runs, how far it is, the time left.

Called by the experiments and by the learning of brains; nothing else writes while they work. On a terminal it is a
live block of bars; elsewhere (a log, a pipe) it is a plain line every few seconds.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

__all__ = ["Display", "Live", "News", "Plain", "Silent", "make_display"]

_PLAIN_EVERY_S = 5.0


@dataclass(frozen=True)
class News:
    """How far a piece of work is.

    Attributes:
        unit: What is counted, such as "step".
        done: How many are done; None where nothing was said.
        total: Of how many, where it is known.
        words: What else is to be said of it.
        left_s: Seconds that it will still take, about, where it can tell; bars tell by themselves.
    """

    unit: str
    done: int | None = None
    total: int | None = None
    words: str = ""
    left_s: float | None = None

    def __str__(self) -> str:
        of = f"/{self.total}" if self.total else ""
        count = [] if self.done is None else [f"{self.unit} {self.done}{of}"]
        left = [] if self.left_s is None else [f"about {self.left_s:.0f} s to go"]
        return ", ".join([*count, *([self.words] if self.words else []), *left])


class Display(ABC):
    """Shows work under way; used as a context manager around it."""

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop showing."""
        return

    @abstractmethod
    def begin(self, total: int, done: int, what: str = "runs", *, alike: bool = True) -> None:
        """Say what there is to do.

        Args:
            total: Pieces of work.
            done: How many of them were done before.
            what: What they are called.
            alike: Whether they take about equally long, so that those done tell how long the others will take.
        """

    @abstractmethod
    def started(self, key: str, name: str) -> None:
        """A piece of work begins; `name` is what a person calls it."""

    @abstractmethod
    def news(self, key: str, news: News) -> None:
        """A piece of work says how far it is."""

    @abstractmethod
    def over(self, key: str) -> None:
        """A piece of work is over, well or not."""

    @abstractmethod
    def say(self, text: str) -> None:
        """Something that a person must not miss."""


class Silent(Display):
    """Shows nothing: the default for calls from Python."""

    def begin(self, total: int, done: int, what: str = "runs", *, alike: bool = True) -> None:
        """See Display."""

    def started(self, key: str, name: str) -> None:
        """See Display."""

    def news(self, key: str, news: News) -> None:
        """See Display."""

    def over(self, key: str) -> None:
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
        self._names: dict[str, str] = {}
        self._running: dict[str, str] = {}
        self._what, self._alike = "runs", True
        self._total = self._done = self._done_before = 0
        self._begun_s = self._last_s = time.monotonic()

    def begin(self, total: int, done: int, what: str = "runs", *, alike: bool = True) -> None:
        """See Display."""
        self._what, self._alike = what, alike
        self._total, self._done, self._done_before = total, done, done
        self._begun_s = self._last_s = time.monotonic()
        before = f", {done} of them done before" if done else ""
        self.say(f"{total} {what}{before}")

    def started(self, key: str, name: str) -> None:
        """See Display."""
        self._running[key] = self._names[key] = name
        self._line()

    def news(self, key: str, news: News) -> None:
        """See Display."""
        name, words = self._names[key], str(news)
        self._running[key] = f"{name} ({words})" if words else name
        self._line()

    def over(self, key: str) -> None:
        """See Display."""
        self._running.pop(key, None)
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
        time_left = f", about {(now - self._begun_s) / done_now * left:.0f} s to go" if done_now and self._alike else ""
        running = "; ".join(self._running.values()) or "none"
        self.say(f"{self._done} of {self._total} {self._what} done, {left} left{time_left}; running: {running}")


class Live(Display):
    """Bars on a terminal: one for everything, and a line for each piece of work under way."""

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
        self._alike = True
        self._rows: dict[str, TaskID] = {}

    def __enter__(self) -> Display:
        """Start drawing."""
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take the bars away."""
        self._progress.stop()

    def begin(self, total: int, done: int, what: str = "runs", *, alike: bool = True) -> None:
        """See Display."""
        self._all = self._progress.add_task(f"all {what}", total=total, words="")
        # Not `completed=`: runs done before must not count for the time left.
        self._progress.update(self._all, completed=done)
        self._alike = alike
        self._forget_speed()

    def started(self, key: str, name: str) -> None:
        """See Display."""
        self._rows[key] = self._progress.add_task(escape(name), total=None, words="")

    def news(self, key: str, news: News) -> None:
        """See Display."""
        row = self._rows.get(key)
        if row is not None:
            self._progress.update(row, total=news.total, completed=news.done, words=news.words)

    def over(self, key: str) -> None:
        """See Display."""
        row = self._rows.pop(key, None)
        if row is not None:
            self._progress.remove_task(row)
        if self._all is not None:
            self._progress.advance(self._all)
            if not self._alike:
                self._forget_speed()

    def _forget_speed(self) -> None:
        self._progress.tasks[0]._progress.clear()

    def say(self, text: str) -> None:
        """See Display."""
        self._progress.console.print(text, markup=False, highlight=False)


def make_display(console: Console) -> Display:
    """The display that suits where the console writes to."""
    return Live(console) if console.is_terminal else Plain(console)
