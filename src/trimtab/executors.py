"""Where work is done: in this process, or in local worker processes that are used again and again.

Called by trimtab.experiments.run. A piece of work is a key and JSON arguments; the function that does it is
named "module:attribute" and is called as `function(*arguments, progress)`, where `progress(dict)` says how
far it is. What happens comes back as events, in the order in which it happens.

Workers are started with the spawn method, speak JSON over a pipe of their own (a queue shared by all would
stay locked for ever when one of them is killed while it writes), keep their imports over many pieces of work
(importing torch costs seconds), and die with the process that started them, whatever kills it. A worker that
dies takes the piece of work that it had with it, and no other.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from trimtab import registry
from trimtab.errors import InputError, RunFailedError, TrimtabError, unknown_name
from trimtab.machine import torch_threads

__all__ = ["Event", "Executor", "InProcess", "LocalProcesses", "OnEvent", "make_executor"]

_PROGRESS_EVERY_S = 0.2  # at most five messages a second and worker: a screen shows no more
_GRACE_S = 2.0  # how long a worker may take to end before it is killed
_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


@dataclass(frozen=True)
class Event:
    """Something that happened to one piece of work.

    Attributes:
        kind: "started", "progress", "done" or "failed".
        key: The key it was submitted under.
        data: What `progress` was given, what the function returned, or {"error": text, "traceback": text},
            where the traceback is None for our own errors.
    """

    kind: str
    key: str
    data: dict[str, Any] = field(default_factory=dict)


OnEvent = Callable[[Event], None]


class Executor(ABC):
    """Does submitted work; used as a context manager, which ends what it started.

    Args:
        function: "module:attribute" of what does the work.
        threads: Threads that torch may use for one piece of work; None leaves torch alone and unimported.
    """

    def __init__(self, function: str, *, threads: int | None = None) -> None:
        self._function = function
        self._threads = threads
        self._pending: deque[tuple[str, list[Any]]] = deque()

    def submit(self, key: str, *arguments: Any) -> None:
        """Queue one piece of work; the arguments must be JSON."""
        self._pending.append((key, list(arguments)))

    @abstractmethod
    def drain(self, on_event: OnEvent) -> None:
        """Do everything that was submitted, and what `on_event` submits meanwhile.

        Raises:
            RunFailedError: No work can be done at all, for example since workers do not start.
        """

    def close(self) -> None:
        """End what was started; work under way is dropped."""
        self._pending.clear()

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class InProcess(Executor):
    """One piece of work after another, in this process: for debugging and for tests."""

    def drain(self, on_event: OnEvent) -> None:
        """See Executor.drain."""
        if not self._pending:
            return  # nothing to import for
        function = _resolve(self._function)
        with torch_threads(self._threads):
            while self._pending:
                key, arguments = self._pending.popleft()
                on_event(Event("started", key))
                try:
                    data = function(*arguments, lambda news, key=key: on_event(Event("progress", key, news)))
                except Exception as error:  # noqa: BLE001 (whatever it is, it fails this piece of work by name)
                    on_event(Event("failed", key, _failure(error)))
                else:
                    on_event(Event("done", key, data))


class LocalProcesses(Executor):
    """Several worker processes on this machine.

    Args:
        function: See Executor.
        threads: See Executor.
        workers: Processes at once.
    """

    def __init__(self, function: str, *, threads: int | None = None, workers: int = 1) -> None:
        super().__init__(function, threads=threads)
        if workers < 1:
            raise InputError(f"workers: got {workers}, expected a whole number of at least 1")
        self._n_workers = workers
        self._workers: list[_Worker] = []

    def drain(self, on_event: OnEvent) -> None:
        """See Executor.drain."""
        while self._pending or any(worker.key is not None for worker in self._workers):
            self._start_workers()
            self._assign(on_event)
            for ready in wait([worker.connection for worker in self._workers], timeout=1.0):
                worker = next(worker for worker in self._workers if worker.connection is ready)
                self._listen(worker, on_event)

    def close(self) -> None:
        """See Executor.close."""
        super().close()
        for worker in self._workers:
            worker.connection.close()  # an idle worker ends by itself
            if worker.key is not None or not worker.is_ready:
                worker.process.terminate()
        deadline = time.monotonic() + _GRACE_S
        for worker in self._workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.process.close()
        self._workers.clear()

    def _start_workers(self) -> None:
        busy = sum(worker.key is not None for worker in self._workers)
        wanted = min(self._n_workers, busy + len(self._pending))
        while len(self._workers) < wanted:
            self._workers.append(_start_worker(self._function, self._threads))

    def _assign(self, on_event: OnEvent) -> None:
        for worker in self._workers:
            if worker.key is None and worker.is_ready and self._pending:
                worker.key, arguments = self._pending.popleft()
                with contextlib.suppress(OSError):  # it has just died: _listen finds the end of its pipe
                    worker.connection.send_bytes(json.dumps(arguments).encode())
                on_event(Event("started", worker.key))

    def _listen(self, worker: _Worker, on_event: OnEvent) -> None:
        try:
            kind, data = json.loads(worker.connection.recv_bytes())
        except (EOFError, OSError, ValueError):
            self._bury(worker, on_event)
            return
        if kind == "ready":
            worker.is_ready = True
        elif kind == "broken":
            raise RunFailedError(f"a worker process cannot start: {data['error']}")
        elif worker.key is not None:
            key = worker.key
            if kind in ("done", "failed"):
                worker.key = None
            on_event(Event(kind, key, data))

    def _bury(self, worker: _Worker, on_event: OnEvent) -> None:
        self._workers.remove(worker)
        worker.connection.close()
        worker.process.join(_GRACE_S)
        if worker.process.is_alive():  # it closed its pipe and lives on: of no use any more
            worker.process.kill()
            worker.process.join()
        how = _how_it_ended(worker.process.exitcode)
        worker.process.close()
        if not worker.is_ready:
            raise RunFailedError(
                f"a worker process {how} before it could start; a script that runs a study must do so under "
                f"`if __name__ == '__main__':`"
            )
        if worker.key is not None:
            on_event(Event("failed", worker.key, {"error": f"its worker process {how}", "traceback": None}))


def make_executor(name: str, function: str, *, workers: int, threads: int | None = None) -> Executor:
    """Build an executor by name.

    Args:
        name: "local"; "ray" is known and refused, since it is not built yet.
        function: "module:attribute" of what does the work.
        workers: Processes at once; 0 does the work in this process.
        threads: Threads that torch may use for one piece of work.

    Raises:
        UnknownNameError: No executor has this name.
        InputError: The executor cannot be had, or `workers` is negative.
    """
    if name == "ray":
        raise InputError("executor 'ray' is not available in this version; use 'local' (--executor local)")
    if name != "local":
        raise unknown_name("executor", name, ["local", "ray"])
    if workers == 0:
        return InProcess(function, threads=threads)
    return LocalProcesses(function, threads=threads, workers=workers)


@dataclass
class _Worker:
    """A worker process as its parent sees it; `key` is the work that it has."""

    process: BaseProcess
    connection: Connection
    key: str | None = None
    is_ready: bool = False


def _start_worker(function: str, threads: int | None) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_work, args=(theirs, function, threads, os.getpid(), registry.added()), daemon=True
    )
    with _interrupts_ignored():
        process.start()
    theirs.close()  # so that the worker's death ends the pipe
    return _Worker(process, ours)


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Let a child inherit that Ctrl-C is ignored: its parent decides how things end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _work(connection: Connection, function: str, threads: int | None, parent: int, added: list[list[str]]) -> None:
    """A worker's whole life: read arguments, do the work, answer, until the pipe ends."""
    _die_with(parent)
    registry.adopt(added)
    try:
        do = _resolve(function)
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        _send(connection, json.dumps(["ready", {}]))
    except Exception as error:  # noqa: BLE001 (said by the parent, who ends the study)
        _send(connection, json.dumps(["broken", _failure(error)]))
        os._exit(1)
    while True:
        try:
            arguments = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            # Semaphores that were made on the way (torch.fx makes one) would else be called leaked when all is over.
            multiprocessing.util._exit_function()  # type: ignore[attr-defined]
            os._exit(0)  # nobody asks any more; torch's own clean-up takes longer than it is worth
        try:
            reply = json.dumps(["done", do(*arguments, _Progress(connection, parent))])
        except Exception as error:  # noqa: BLE001 (whatever it is, it fails this piece of work by name)
            reply = json.dumps(["failed", _failure(error)])
        _send(connection, reply)


def _die_with(parent: int) -> None:
    """End this process when its parent ends, even by kill -9, so that two never write into one folder."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


class _Progress:
    """What a worker calls to say how far it is; says it a few times a second; ends when nobody listens."""

    def __init__(self, connection: Connection, parent: int) -> None:
        self._connection = connection
        self._parent = parent
        self._last_s = 0.0

    def __call__(self, news: dict[str, Any]) -> None:
        now = time.monotonic()
        if now - self._last_s < _PROGRESS_EVERY_S:
            return
        self._last_s = now
        if os.getppid() != self._parent:
            os._exit(1)
        _send(self._connection, json.dumps(["progress", news]))


def _send(connection: Connection, message: str) -> None:
    try:
        connection.send_bytes(message.encode())
    except OSError:
        os._exit(1)  # the parent is gone


def _failure(error: Exception) -> dict[str, Any]:
    if isinstance(error, TrimtabError):
        return {"error": str(error), "traceback": None}
    return {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}


def _how_it_ended(exit_code: int | None) -> str:
    if exit_code is None:
        return "vanished"
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    name = signal.Signals(-exit_code).name if -exit_code in set(signal.Signals) else str(-exit_code)
    return f"was killed by {name}" + (" (out of memory?)" if -exit_code == signal.SIGKILL else "")


def _resolve(function: str) -> Callable[..., dict[str, Any]]:
    module, _, attribute = function.partition(":")
    found: Callable[..., dict[str, Any]] = getattr(importlib.import_module(module), attribute)
    return found
