"""LatencyTable: seconds of every configuration, from operations that were measured once at few widths.

Called by `trimtab.pruner` for a target of latency; `seconds` is what `budget.Budget` asks. As in AMC (He et al. 2018,
arXiv:1802.03494) the time of a network is the sum of its operations', each looked up by its widths; see `latency_grids`
for what an operation is. Deviations:

- At most 5 widths of a part are measured, and between them the time is interpolated linearly in each width. That is
  exact for what a convolution or a product computes, a + b x in + c x out + d x in x out, and so for FLOPs. Against
  complete grids of convolutions and products the median error was 3 to 20 % of a cell (kernels work in steps), and 5 to
  20 % with logarithms of widths and times.
- Widths between those that can be chosen count as the next larger one: kernels work in blocks.
- Cells are measured in place, in forward passes of whole cut networks, each of which has a cell of every operation;
  25 networks are enough for a chain of any depth.
- A cell is the median of all that was measured of it. Noise would make the table fall where a width grows; a cell is
  replaced by the mean of the largest value at smaller or equal widths and the smallest at larger or equal ones, which
  is monotone in each width and leaves a monotone table as it is.
- What the dense network takes as a whole and its operations in the same turn do not (the median over the turns) is a
  constant that every configuration pays; operations that no part touches are in it. Where the operations took longer
  than the whole (reading the clock, noise) they are scaled by the median ratio instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from trimtab.errors import InputError
from trimtab.pruning.budget import floor
from trimtab.pruning.latency import (
    Clock,
    OperationTimer,
    OperationTimes,
    Progress,
    check_count,
    clock_for,
    clock_name,
    device_name,
)
from trimtab.pruning.latency_grids import Grid, cover, operations
from trimtab.pruning.network import PrunableNetwork
from trimtab.pruning.parts import Configuration

__all__ = ["LatencyTable"]

_REPEATS = 15  # of each network; most cells are in several


class LatencyTable:
    """Seconds of a forward pass by configuration.

    Everything is measured when the table is made: a search that asks it can be repeated.

    Args:
        network: What is pruned.
        batch_size: Samples of a forward pass, made of the network's example inputs (`latency.repeated`).
        repeats: Times that are kept of each network that is run.
        threads: That torch may use for one operation.
        clock: Seconds; see `latency.clock_for`.
        progress: Told after every forward's turn how many of all are over.
        timer: Measures configurations, instead of an `OperationTimer` with the above.

    Attributes:
        whole_s: Median of the dense network's forward.
        overhead_s: That every configuration pays.
        scale: That the operations' times are multiplied by; 1 but where they took longer than the whole.
        n_cells: That were measured.

    Raises:
        InputError: The network cannot be measured at this batch size, or an argument is none.
    """

    def __init__(
        self,
        network: PrunableNetwork,
        batch_size: int,
        *,
        repeats: int = _REPEATS,
        threads: int = 1,
        clock: Clock | None = None,
        progress: Progress | None = None,
        timer: Callable[[Sequence[Configuration]], OperationTimes] | None = None,
    ) -> None:
        self._prepare(network, batch_size)
        if timer is None:
            timer = OperationTimer(
                network, batch_size, repeats=repeats, threads=threads, clock=clock, progress=progress
            )
        name = clock_name(clock_for(network.model, threads, clock))
        self._made = {"repeats": repeats, "threads": threads, "clock": name}
        wanted = [cell for grid in self._grids for cell in grid.cells().values()]
        configurations = cover(wanted, network.dense, floor(network))
        times = timer(configurations)
        for grid in self._grids:
            medians = np.empty(grid.shape)
            for index, cell in grid.cells().items():
                rows = [k for k, c in enumerate(configurations) if all(c[part] == w for part, w in cell.items())]
                medians[index] = np.median(times.operations[rows, :, grid.operation])
            grid.fill(medians)
        self._calibrate(times)

    def _prepare(self, network: PrunableNetwork, batch_size: int) -> None:
        if not isinstance(network, PrunableNetwork):
            raise InputError(
                f"network is {type(network).__name__}; a table of latencies needs the operations of a PrunableNetwork: "
                "give one, or a target of flops or params"
            )
        check_count("batch_size", batch_size)
        self.network, self.batch_size = network, batch_size
        self._operations = operations(network)
        self._grids = [grid for operation in self._operations for grid in operation.all_grids()]
        self._kept: list[dict[tuple[int, ...], float]] = [{} for _ in self._operations]
        self.n_cells = sum(math.prod(grid.shape) for grid in self._grids)

    def _calibrate(self, times: OperationTimes) -> None:
        """Hold the operations against the whole turn by turn; over all turns other load would fall on the whole alone."""
        self.whole_s, self.overhead_s, self.scale = float(np.median(times.whole)), 0.0, 1.0
        touched = [number for number, operation in enumerate(self._operations) if operation.parts]
        in_parts = times.operations[0][:, touched].sum(1)  # (repeats,) of the dense network, which is the first
        whole = times.whole[: len(in_parts)]
        overhead_s = float(np.median(whole - in_parts))
        if overhead_s >= 0:
            self.overhead_s = overhead_s
        else:
            self.scale = float(np.median(whole / in_parts))

    def seconds(self, configuration: Sequence[int]) -> float:
        """Seconds of a forward pass.

        Args:
            configuration: A width for each part; 0 where its layer is taken out.

        Raises:
            InputError: It has not one of its widths for each part.
        """
        widths, is_there = self.network.effective(configuration)
        rounded = [
            next(w for w in part.widths if w >= width) for width, part in zip(widths, self.network.parts, strict=True)
        ]
        total = 0.0
        for operation, kept in zip(self._operations, self._kept, strict=True):
            key = tuple(rounded[part] if is_there[part] else -rounded[part] for part in operation.parts)
            if key not in kept:
                kept[key] = operation.seconds(rounded, is_there)
            total += kept[key]
        return self.overhead_s + self.scale * total

    # JSON

    def to_dict(self) -> dict[str, Any]:
        """For JSON: what was measured, of what and how; `load` takes it.

        Cells are medians as measured, in seconds, an axis of a nested list for each of `axes`.
        """
        return {**self._describe(), **self._made, **self._calibration(), "operations": [
            {"name": operation.name, "tables": [self._grid_to_dict(grid) for grid in operation.all_grids()]}
            for operation in self._operations
        ]}  # fmt: skip

    def _calibration(self) -> dict[str, float]:
        return {"whole_s": self.whole_s, "overhead_s": self.overhead_s, "scale": self.scale}

    def _grid_to_dict(self, grid: Grid) -> dict[str, Any]:
        names = [part.name for part in self.network.parts]
        return {
            "fixed": {names[part]: width for part, width in grid.fixed.items()},
            "axes": [
                {"parts": [names[part] for part in axis.parts], "widths": [list(level) for level in axis.levels]}
                for axis in grid.axes
            ],
            "seconds": grid.seconds.tolist(),
        }

    def _describe(self) -> dict[str, Any]:
        """What a table has to be of to be this one's."""
        network = self.network
        dtypes = sorted({str(parameter.dtype) for parameter in network.model.parameters()})
        parts = [[part.name, part.kind, part.size, list(part.widths)] for part in network.parts]
        return {
            "network": {
                "parts": parts,
                "flops": network.flops(network.dense),
                "parameters": network.parameters(network.dense),
                "dtypes": dtypes,
            },
            "batch_size": self.batch_size,
            "device": device_name(network.model),
        }

    @classmethod
    def load(cls, network: PrunableNetwork, batch_size: int, data: Mapping[str, Any]) -> LatencyTable:
        """A table that was measured before, with the same numbers; nothing is measured.

        Args:
            network: The one that it was measured on.
            batch_size: That it was measured at.
            data: What `to_dict` gave.

        Raises:
            InputError: The table is of another network, batch size or device, or is none.
        """
        table = cls.__new__(cls)
        table._prepare(network, batch_size)
        measure_again = "measure again: LatencyTable(network, batch_size)"
        try:
            other = [key for key, value in table._describe().items() if data[key] != value]
            if other:
                said = "; ".join(
                    f"{key} is {_brief(data[key])}, expected {_brief(table._describe()[key])}" for key in other
                )
                raise InputError(
                    f"the table of latencies is not of this network, batch size and device: {said}; {measure_again}"
                )
            table._made = {key: data[key] for key in ("repeats", "threads", "clock")}
            for operation, saved in zip(table._operations, data["operations"], strict=True):
                for grid, cells in zip(operation.all_grids(), saved["tables"], strict=True):
                    seconds = np.array(cells["seconds"], dtype=np.float64)
                    if seconds.shape != grid.shape or not np.all(np.isfinite(seconds) & (seconds >= 0)):
                        raise ValueError(f"cells of {operation.name!r} are missing or no times")
                    grid.fill(seconds)
                    if table._grid_to_dict(grid) != cells:
                        raise ValueError(f"tables of {operation.name!r} are over other widths")
            table.whole_s, table.overhead_s, table.scale = (float(data[k]) for k in ("whole_s", "overhead_s", "scale"))
            if not all(math.isfinite(value) and value >= 0 for value in table._calibration().values()):
                raise ValueError(f"whole_s, overhead_s and scale are {table._calibration()}")
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise InputError(
                f"the table of latencies is broken ({type(error).__name__}: {error}); {measure_again}"
            ) from error
        return table


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
