"""Latency: seconds of a forward pass, measured, of whole networks and of the operations in one.

Called by `trimtab.pruner` for the report (dense against pruned) and by `latency_table` for targets of latency. Time is
read here and nowhere else in pruning; what is measured enters a search through the table alone, which is measured once,
so that a search itself can be repeated to the bit.

A machine is never quiet. What is compared is therefore run in turns, each in every repeat, in one process, with a
number of threads that is set and told; medians are taken; and every pass whose time is kept comes straight after one of
the same network whose time is not, so that caches hold what they hold when one network runs all the time. One thread on
CPU is timed by `time.thread_time` unless another clock is given, which leaves out the turns of other processes: by
`time.perf_counter` on two cores that five processes shared, the CNN of FINDINGS section 4 took a median of 15.5 ms at
batch size 1, and a first quartile of 2.6.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from trimtab.cost import as_inputs, size_of
from trimtab.errors import InputError
from trimtab.machine import torch_threads
from trimtab.pruning.network import PrunableNetwork
from trimtab.pruning.parts import Configuration
from trimtab.surgery.trace import evaluating

__all__ = [
    "Clock", "Latencies", "OperationTimer", "OperationTimes", "Progress", "Timing", "check_count", "clock_for",
    "clock_name", "device_name", "heads", "measure", "repeated",
]  # fmt: skip

Clock = Callable[[], float]  # seconds, from any start
Progress = Callable[[int, int], None]  # passes done, of how many

_REPEATS = 30  # of whole networks: quartiles of 30 are steady to a few per cent on a machine that others use too
_TOGETHER = 1 << 30  # bytes of networks that wait for their turn at once
_MARK = "trimtab_stopwatch"


@dataclass(frozen=True)
class Timing:
    """Time of one network at one batch size.

    Attributes:
        model: Its name.
        batch_size: Samples of a forward pass.
        median_s: Of a forward pass.
        lower_s: First quartile.
        upper_s: Third quartile.
        ratio: To the first network: the median over the repeats of its time in units of the first one's in the same
            repeat, which what else runs on the machine slows alike; below 1 is faster.
    """

    model: str
    batch_size: int
    median_s: float
    lower_s: float
    upper_s: float
    ratio: float


@dataclass(frozen=True)
class Latencies:
    """Times of several networks, measured in turns.

    Attributes:
        device: What they ran on: "cpu", or the name of a CUDA device.
        threads: That torch ran one operation on, on CPU.
        clock: The function that the time was read from; "thread_time" leaves out waiting, also that of the network.
        repeats: Passes that each median is of.
        timings: Batch size by batch size, the networks in the order in which they were given.
    """

    device: str
    threads: int
    clock: str
    repeats: int
    timings: tuple[Timing, ...]

    def of(self, model: str, batch_size: int) -> Timing:
        """Time of one network.

        Raises:
            InputError: It was not measured.
        """
        for timing in self.timings:
            if (timing.model, timing.batch_size) == (model, batch_size):
                return timing
        known = ", ".join(f"{timing.model!r} at {timing.batch_size}" for timing in self.timings)
        raise InputError(f"{model!r} was not measured at batch size {batch_size!r}; measured: {known}")

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**dataclasses.asdict(self), "timings": [dataclasses.asdict(timing) for timing in self.timings]}


def measure(
    models: Mapping[str, nn.Module],
    inputs: object,
    *,
    batch_sizes: Sequence[int] = (1, 64),
    repeats: int = _REPEATS,
    threads: int = 1,
    clock: Clock | None = None,
    progress: Progress | None = None,
) -> Latencies:
    """Seconds of a forward pass in evaluation without gradients, the networks in turns.

    On CUDA the clock is read when the device has finished. Modes of modules and the number of torch's threads are
    afterwards what they were.

    Args:
        models: By name; the first is the one that the others are compared with. All on one device.
        inputs: Example inputs: a tensor, or a tuple of the forward's positional arguments. A batch of another size is
            made of their samples, see `repeated`, and put on the networks' device.
        batch_sizes: Samples of a forward pass.
        repeats: Times that are kept of each network at each batch size.
        threads: That torch may use for one operation.
        clock: Seconds; see `clock_for`.
        progress: Told after every turn how many of all are over.

    Raises:
        InputError: There is no network, one fails on the inputs or they are on several devices, or a number is none.
    """
    if not isinstance(models, Mapping) or not models or not all(isinstance(m, nn.Module) for m in models.values()):
        raise InputError(
            f"models is {models!r}; expected networks by name, such as {{'dense': model, 'pruned': small}}"
        )
    check_count("repeats", repeats)
    check_count("threads", threads)
    devices = {_device(model) for model in models.values()}
    if len(devices) > 1:
        raise InputError(f"the networks are on {sorted(map(str, devices))}; expected one device: move them with .to()")
    device = devices.pop()
    clock = clock_for(next(iter(models.values())), threads, clock)
    timings, per_size = [], (repeats + 1) * len(models)
    for number, batch_size in enumerate(batch_sizes):
        batch = _on(repeated(as_inputs(inputs), batch_size), device)
        passes = [_whole_pass(model, batch, device, clock) for model in models.values()]
        tell = _part_of(progress, number * per_size, len(batch_sizes) * per_size)
        with torch_threads(threads), evaluating(nn.ModuleList(models.values())), torch.no_grad():
            times = np.array(_in_turns(passes, repeats, tell))[..., 0]  # (models, repeats)
        for name, row in zip(models, times, strict=True):
            lower, median, upper = (float(q) for q in np.quantile(row, (0.25, 0.5, 0.75)))
            timings.append(Timing(name, batch_size, median, lower, upper, float(np.median(row / times[0]))))
    return Latencies(device_name(next(iter(models.values()))), threads, clock_name(clock), repeats, tuple(timings))


def repeated(inputs: tuple[Any, ...], batch_size: int) -> tuple[Any, ...]:
    """A batch of some size, made of the samples of example inputs.

    Samples lie along axis 0: its length in the first tensor is their number. Every tensor that is as long along axis 0
    gets the first samples of them, again from the start where they are too few; the other arguments stay.

    Raises:
        InputError: No argument is a tensor with samples, or the size is none.
    """
    check_count("batch_size", batch_size)
    n = next((len(value) for value in inputs if isinstance(value, Tensor) and value.ndim > 0), 0)
    if n == 0:
        kinds = ", ".join(type(value).__name__ for value in inputs)
        raise InputError(f"the example inputs ({kinds}) have no samples; give a tensor with samples along axis 0")
    if n == batch_size:
        return inputs
    index = torch.arange(batch_size) % n
    return tuple(
        value.index_select(0, index.to(value.device))
        if isinstance(value, Tensor) and value.ndim > 0 and len(value) == n
        else value
        for value in inputs
    )


# Operations of one network


@dataclass(frozen=True)
class OperationTimes:
    """What configurations of a network took.

    Attributes:
        whole: (samples,) seconds of the dense network's forward; the first ones are of the turns of the first
            configuration.
        operations: (configurations, repeats, operations) seconds; what runs before the first operation with weights is
            the first, see `heads`.
    """

    whole: np.ndarray
    operations: np.ndarray


def heads(network: PrunableNetwork) -> tuple[fx.Node, ...]:
    """Calls of modules with weights (parameters with two axes or more), in the order of the forward.

    An operation is such a call and all that runs after it until the next.
    """
    c = network.couplings
    calls = [node for node in c.trace.graph.nodes if node.op == "call_module"]
    return tuple(node for node in calls if any(p.ndim >= 2 for p in c.trace.module(node).parameters()))


class OperationTimer:
    """Measures operations where they are: in whole forward passes of cut networks.

    The clock is read between the operations of a pass, so that each finds caches, memory and queue as it does in use.
    Configurations are run in turns, as many as together have 1 GiB of weights, and in every turn the dense network,
    whole and without looking at the clock in between. On CUDA operations are timed by events, and nothing waits for the
    device in between.

    Args:
        network: What is pruned.
        batch_size: Samples of a forward pass, made of its example inputs.
        repeats: Times that are kept of each configuration.
        threads: That torch may use for one operation.
        clock: Seconds; see `clock_for`.
        progress: Told after every turn how many of all are over.
    """

    def __init__(
        self,
        network: PrunableNetwork,
        batch_size: int,
        *,
        repeats: int,
        threads: int = 1,
        clock: Clock | None = None,
        progress: Progress | None = None,
    ) -> None:
        check_count("repeats", repeats)
        check_count("threads", threads)
        self._network = network
        self._repeats, self._threads, self._progress = repeats, threads, progress
        self._clock = clock_for(network.model, threads, clock)
        self._device = _device(network.model)
        self._batch = _on(repeated(network.inputs, batch_size), self._device)
        self._heads = set(heads(network))

    def __call__(self, configurations: Sequence[Configuration]) -> OperationTimes:
        """Times of these configurations.

        Raises:
            InputError: The network fails on a batch of this size.
        """
        dense = _whole_pass(self._network.model, self._batch, self._device, self._clock)
        groups = self._groups(configurations)
        total = (self._repeats + 1) * (len(configurations) + len(groups))
        whole: list[list[float]] = []
        found: list[list[list[float]]] = []
        done = 0
        with torch_threads(self._threads), torch.no_grad():
            for group in groups:
                passes = [dense, *(self._marked_pass(configuration) for configuration in group)]
                tell = _part_of(self._progress, done, total)
                first, *others = _in_turns(passes, self._repeats, tell)
                whole += first
                found += others
                done += (self._repeats + 1) * len(passes)
        return OperationTimes(np.array(whole)[:, 0], np.array(found))

    def _groups(self, configurations: Sequence[Configuration]) -> list[list[Configuration]]:
        dense = size_of(self._network.model)[1] / self._network.parameters(self._network.dense)
        groups: list[list[Configuration]] = []
        there = 0.0
        for configuration in configurations:
            size = dense * self._network.parameters(configuration)
            if there + size > _TOGETHER or not groups:
                groups.append([])
                there = 0
            groups[-1].append(configuration)
            there += size
        return groups

    def _marked_pass(self, configuration: Configuration) -> Callable[[], list[float]]:
        """A forward pass of a cut network in which the clock is read before each operation and at the end."""
        model = self._network.cut(configuration)
        watch = _Stopwatch(self._device, self._clock, by_events=self._device.type == "cuda")
        model.add_module(_MARK, watch)
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        is_started = False
        for node in self._network.couplings.trace.graph.nodes:
            if not is_started and node.op != "placeholder":
                graph.call_module(_MARK)  # what comes before the first module with weights is one by itself
                is_started = True
            if node in self._heads or node.op == "output":
                graph.call_module(_MARK)
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].meta.pop("is_wrapped", None)  # or GraphModule wraps it for every later trace, which then fails
        forward = fx.GraphModule(model, graph)

        def run() -> list[float]:
            forward(*self._batch)
            return watch.laps()

        return run


class _Stopwatch(nn.Module):
    """Notes the time whenever a forward comes by.

    Args:
        device: That is waited for, where it is CUDA.
        clock: Seconds.
        by_events: Let the device note its own time, and wait for nothing.
    """

    def __init__(self, device: torch.device, clock: Clock, *, by_events: bool = False) -> None:
        super().__init__()
        self._device, self._clock, self._by_events = device, clock, by_events
        self._times: list[Any] = []

    def forward(self) -> None:
        """Note the time."""
        if self._by_events:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
            self._times.append(event)
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._times.append(self._clock())

    def laps(self) -> list[float]:
        """Seconds between the times that were noted, which are forgotten."""
        times, self._times = self._times, []
        if self._by_events:
            torch.cuda.synchronize(self._device)
            return [one.elapsed_time(two) / 1e3 for one, two in itertools.pairwise(times)]
        return [two - one for one, two in itertools.pairwise(times)]


def _whole_pass(
    model: nn.Module, batch: tuple[Any, ...], device: torch.device, clock: Clock
) -> Callable[[], list[float]]:
    watch = _Stopwatch(device, clock)

    def run() -> list[float]:
        watch()
        try:
            model(*batch)
        except Exception as error:  # whatever the user's forward raises
            shapes = ", ".join(str(tuple(v.shape)) if isinstance(v, Tensor) else type(v).__name__ for v in batch)
            raise InputError(
                f"{type(model).__name__} fails on inputs {shapes}: {type(error).__name__}: {error}; its forward has to "
                "take batches of every size that is measured, with samples along axis 0"
            ) from error
        watch()
        return watch.laps()

    return run


def _in_turns(
    passes: Sequence[Callable[[], list[float]]], repeats: int, tell: Callable[[int], None]
) -> list[list[list[float]]]:
    """Times by pass and repeat; the first turn warms up."""
    times: list[list[list[float]]] = [[] for _ in passes]
    done = 0
    for turn in range(repeats + 1):
        for run, kept in zip(passes, times, strict=True):
            run()  # caches are now this network's
            if turn > 0:
                kept.append(run())
            done += 1
            tell(done)
    return times


def _part_of(progress: Progress | None, before: int, total: int) -> Callable[[int], None]:
    return lambda done: None if progress is None else progress(before + done, total)


def _device(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def clock_for(model: nn.Module, threads: int, clock: Clock | None) -> Clock:
    """The clock that is given, or `time.thread_time` for one thread on CPU and `time.perf_counter` elsewhere."""
    if clock is not None:
        return clock
    return time.thread_time if threads == 1 and _device(model).type == "cpu" else time.perf_counter


def clock_name(clock: Clock) -> str:
    """What a clock is called in a report."""
    return getattr(clock, "__name__", type(clock).__name__)


def device_name(model: nn.Module) -> str:
    """What the device of a network is called in a report: "cpu", or a CUDA device's own name."""
    device = _device(model)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _on(batch: tuple[Any, ...], device: torch.device) -> tuple[Any, ...]:
    return tuple(value.to(device) if isinstance(value, Tensor) else value for value in batch)


def check_count(name: str, value: object) -> None:
    """Refuse what is no number of things.

    Raises:
        InputError: It is no whole number of 1 or more.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} is {value!r}; expected a whole number of 1 or more")
