"""Latency: what is measured, in which turns, and that a table adds up to the closed form; no real clock is judged."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pruning_networks import drawn, network
from surgery_networks import ALL, TASKS
from trimtab.cost import count_by_module
from trimtab.errors import InputError
from trimtab.pruning.budget import Budget, Target, floor
from trimtab.pruning.latency import OperationTimer, OperationTimes, heads, measure, repeated
from trimtab.pruning.latency_grids import monotone
from trimtab.pruning.latency_table import LatencyTable
from trimtab.pruning.network import PrunableNetwork
from trimtab.pruning.parts import Configuration

PER_FLOP, CONSTANT = 2.0**-30, 0.125  # seconds


def by_flops(net: PrunableNetwork, asked: list[Configuration] | None = None) -> Callable[..., OperationTimes]:
    """Times that follow the FLOPs, and a constant of the whole."""

    def timer(configurations: Sequence[Configuration]) -> OperationTimes:
        rows = []
        for configuration in configurations:
            if asked is not None:
                asked.append(configuration)
            counts = count_by_module(net.cut(configuration), net.inputs)
            rows.append([[0.0, *(PER_FLOP * counts.get(str(head.target), 0) for head in heads(net))]])
        whole = np.full(3, PER_FLOP * net.flops(net.dense) + CONSTANT)
        return OperationTimes(whole, np.array(rows))

    return timer


def alike(net: PrunableNetwork, seconds: float, whole: float) -> Callable[..., OperationTimes]:
    """Every operation takes as long."""
    shape = (2, 1 + len(heads(net)))
    return lambda cs: OperationTimes(np.full(2, whole), np.full((len(cs), *shape), seconds))


def chain(n_convolutions: int) -> PrunableNetwork:
    layers: list[nn.Module] = []
    for number in range(n_convolutions):
        layers += [nn.Conv2d(16 if number else 3, 16, 1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 4, 2))
    return PrunableNetwork(model, torch.zeros(2, 3, 2, 2), multiple=1, removal=False)


class Ticking(nn.Module):
    """Takes so many seconds of a clock of its own, one number a pass, and notes how it is called."""

    now = 0.0
    calls: list[tuple[str, int, bool, bool, int]]

    def __init__(self, name: str, seconds: Sequence[float]) -> None:
        super().__init__()
        self.name, self.seconds = name, itertools.cycle(seconds)

    def forward(self, x: Tensor) -> Tensor:
        Ticking.now += next(self.seconds)
        Ticking.calls.append((self.name, len(x), self.training, torch.is_grad_enabled(), torch.get_num_threads()))
        return x


@pytest.fixture
def ticking() -> Callable[[], float]:
    """The clock."""
    Ticking.now, Ticking.calls = 0.0, []
    return lambda: Ticking.now


# Whole networks


def test_networks_are_measured_in_turns(ticking) -> None:
    dense, pruned = Ticking("dense", [8]), Ticking("pruned", [2])
    dense.train()
    told = []
    found = measure(
        {"dense": dense, "pruned": pruned},
        torch.zeros(3, 2),
        batch_sizes=(4,),
        repeats=5,
        threads=2,
        clock=ticking,
        progress=lambda done, total: told.append((done, total)),
    )
    a_turn = ["dense", "dense", "pruned", "pruned"]  # one pass that settles the caches, one that counts
    assert [call[0] for call in Ticking.calls] == ["dense", "pruned", *(a_turn * 5)]
    assert {call[1:] for call in Ticking.calls} == {(4, False, False, 2)}
    assert dense.training
    assert torch.get_num_threads() == 1
    assert told == [(k, 12) for k in range(1, 13)]
    assert (found.device, found.threads, found.repeats) == ("cpu", 2, 5)
    assert (found.of("dense", 4).median_s, found.of("pruned", 4).median_s, found.of("pruned", 4).ratio) == (8, 2, 0.25)


def test_quartiles_and_ratios_of_each_repeat(ticking) -> None:
    dense = Ticking("dense", [7, 7, 1, 7, 2, 7, 3, 7, 4, 7, 8])
    pruned = Ticking("pruned", [7, 7, 0.5, 7, 0.5, 7, 1.5, 7, 1, 7, 2])
    found = measure({"a": dense, "b": pruned}, torch.zeros(1, 2), batch_sizes=(1,), repeats=5, clock=ticking)
    one, two = found.of("a", 1), found.of("b", 1)
    assert (one.lower_s, one.median_s, one.upper_s, one.ratio) == (2, 3, 4, 1)
    assert (two.lower_s, two.median_s, two.upper_s) == (0.5, 1, 1.5)
    assert two.ratio == 0.25  # the median of 1/2, 1/4, 1/2, 1/4, 1/4
    assert json.loads(json.dumps(found.to_dict())) == {
        "device": "cpu",
        "threads": 1,
        "clock": "<lambda>",
        "repeats": 5,
        "timings": [
            {"model": "a", "batch_size": 1, "median_s": 3, "lower_s": 2, "upper_s": 4, "ratio": 1},
            {"model": "b", "batch_size": 1, "median_s": 1, "lower_s": 0.5, "upper_s": 1.5, "ratio": 0.25},
        ],
    }
    with pytest.raises(InputError, match=r"'a' was not measured at batch size 64; measured: 'a' at 1, 'b' at 1"):
        found.of("a", 64)


def test_threads_and_modes_are_put_back_after_an_error() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(InputError, match=r"Linear fails on inputs \(1, 5\): RuntimeError: .*batches of every size"):
        measure({"dense": model}, torch.zeros(4, 5), threads=2)
    assert torch.get_num_threads() == 1
    assert model.training


def test_a_real_measurement(device) -> None:
    models = {"wide": nn.Linear(8, 64, device=device), "small": nn.Linear(8, 2, device=device)}
    found = measure(models, torch.zeros(2, 8), batch_sizes=(1, 5), repeats=3)
    assert [(t.model, t.batch_size) for t in found.timings] == [("wide", 1), ("small", 1), ("wide", 5), ("small", 5)]
    assert all(0 < t.lower_s <= t.median_s <= t.upper_s for t in found.timings)
    assert (found.of("wide", 1).ratio, found.of("wide", 5).ratio) == (1, 1)
    assert found.clock == ("thread_time" if device.type == "cpu" else "perf_counter")
    assert measure(models, torch.zeros(2, 8), batch_sizes=(1,), repeats=1, threads=2).clock == "perf_counter"


def test_batches_are_made_of_the_samples_that_there_are() -> None:
    x, lengths, mask = torch.arange(6).reshape(3, 2), torch.tensor([5, 6, 7]), torch.zeros(2, 2)
    more = repeated((x, lengths, mask, None, 4), 5)
    assert more[0][:, 0].tolist() == [0, 2, 4, 0, 2]
    assert more[1].tolist() == [5, 6, 7, 5, 6]
    assert more[2] is mask
    assert more[3:] == (None, 4)
    assert [len(value) for value in repeated((x, lengths), 1)] == [1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": {}}, "models is {}; expected networks by name"),
        ({"models": {"dense": 3}}, "expected networks by name"),
        ({"batch_sizes": (0,)}, "batch_size is 0; expected a whole number of 1 or more"),
        ({"repeats": 1.5}, "repeats is 1.5; expected a whole number of 1 or more"),
        ({"threads": True}, "threads is True; expected a whole number of 1 or more"),
        ({"inputs": (3,)}, r"the example inputs \(int\) have no samples; give a tensor with samples along axis 0"),
        ({"inputs": torch.zeros(0, 3)}, r"the example inputs \(Tensor\) have no samples"),
        (
            {"models": {"a": nn.Linear(1, 1), "b": nn.Linear(1, 1, device="meta")}},
            r"are on \['cpu', 'meta'\]; expected",
        ),
    ],
)
def test_bad_input_to_measure(change, message) -> None:
    given = {"models": {"dense": nn.Linear(3, 2)}, "inputs": torch.zeros(4, 3), **change}
    with pytest.raises(InputError, match=message):
        measure(given.pop("models"), given.pop("inputs"), **given)


# Operations


def test_operations_get_the_time_of_what_runs_until_the_next() -> None:
    now = [0.0]
    model = nn.Sequential(nn.Dropout(), nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))

    def takes(seconds: float) -> Callable[..., None]:
        def hook(module: nn.Module, *_: object) -> None:
            now[0] += seconds * getattr(module, "out_features", 1)

        return hook

    for layer, seconds in zip(model, (0.5, 1.0, 0.25, 2.0, 0.125, 4.0), strict=True):
        layer.register_forward_hook(takes(seconds))
    net = PrunableNetwork(model, torch.zeros(2, 3), multiple=1, removal=False)
    told = []
    timer = OperationTimer(
        net, 5, repeats=2, clock=lambda: now[0], progress=lambda done, total: told.append((done, total))
    )
    times = timer([(6, 4), (1, 3)])
    assert times.operations[:, 0].tolist() == [[0.5, 6.25, 8.125, 8.0], [0.5, 1.25, 6.125, 8.0]]
    assert torch.equal(torch.tensor(times.operations[:, 0]), torch.tensor(times.operations[:, 1]))
    assert times.whole.tolist() == [22.875, 22.875]
    assert told == [(k, 9) for k in range(1, 10)]

    table = LatencyTable(net, 5, repeats=1, clock=lambda: now[0])
    for one, two in [(6, 4), (1, 3), (5, 1), (2, 2)]:  # a pass of the network itself
        assert table.seconds((one, two)) == pytest.approx(0.5 + one + 0.25 + 2 * two + 0.125 + 8, rel=1e-12)


def test_networks_that_do_not_fit_together_are_measured_one_after_the_other(monkeypatch) -> None:
    monkeypatch.setattr("trimtab.pruning.latency._TOGETHER", 1)
    net, told, clock = chain(2), [], itertools.count()
    timer = OperationTimer(
        net, 2, repeats=3, clock=lambda: float(next(clock)), progress=lambda done, total: told.append((done, total))
    )
    times = timer([net.dense, (1, 1)])
    assert times.operations.tolist() == np.ones((2, 3, 4)).tolist()  # the clock is read once between two operations
    assert times.whole.tolist() == [1.0] * 6  # the dense network has its turn in both
    assert told == [(k, 16) for k in range(1, 17)]


@pytest.mark.parametrize("name", ["mlp", "sst2-bilstm", "encoder"])
def test_a_real_table(name: str, device) -> None:
    net, inputs = network(name)
    net = PrunableNetwork(net.model.to(device), inputs.to(device), multiple=1)
    table = LatencyTable(net, 2, repeats=1)
    assert 0 < table.seconds(floor(net)) <= table.seconds(net.dense)
    assert PrunableNetwork(net.model, inputs, multiple=1).parts == net.parts  # torch.fx traces as it did


# The table


@pytest.mark.parametrize("name", [*ALL, *TASKS, "encoder"])
def test_a_table_adds_up_to_the_closed_form(name: str) -> None:
    net, _ = network(name)
    table = LatencyTable(net, len(net.inputs[0]), timer=by_flops(net))
    rng = np.random.default_rng(0)
    for configuration in [net.dense, net.smallest(), *(drawn(net, rng) for _ in range(20))]:
        expected = PER_FLOP * net.flops(configuration) + CONSTANT
        assert table.seconds(configuration) == pytest.approx(expected, rel=1e-9), configuration
    assert (table.scale, table.whole_s) == (1, PER_FLOP * net.flops(net.dense) + CONSTANT)


def test_many_parts_that_are_read_together_share_an_axis() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolutions = nn.ModuleList(nn.Conv2d(2 + 8 * k, 8, 3, padding=1) for k in range(4))
            self.head = nn.Linear((2 + 8 * 4) * 4 + 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            last = x
            for convolution in self.convolutions:
                last = torch.relu(convolution(x))
                x = torch.cat([x, last], 1)
            return self.head(torch.cat([torch.flatten(x, 1), last.mean((2, 3))], 1))  # the last has five places a unit

    net = PrunableNetwork(Dense(), torch.zeros(2, 2, 2, 2), multiple=1)
    table = LatencyTable(net, 2, timer=by_flops(net))
    assert table.n_cells == 5 + 25 + 25 + 25 + 5  # each reads all before it; the head makes nothing that is pruned
    rng = np.random.default_rng(0)
    for configuration in (drawn(net, rng) for _ in range(20)):
        expected = PER_FLOP * net.flops(configuration) + CONSTANT
        assert table.seconds(configuration) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("depth", "n_cells"), [(2, 35), (6, 135), (20, 485)])
def test_25_networks_hold_the_cells_of_any_depth(depth: int, n_cells: int) -> None:
    net, asked = chain(depth), []
    timer = alike(net, 1.0, 50.0)
    table = LatencyTable(net, 2, timer=lambda cs: (asked.extend(cs), timer(cs))[1])
    assert table.n_cells == n_cells  # 5 of the first and of the last, 25 of each in between
    assert len(asked) == len(set(asked)) == 25
    assert asked[0] == net.dense


def test_layers_that_are_made_alike_are_measured_once() -> None:
    net, asked = network("encoder")[0], []
    table = LatencyTable(net, 4, timer=by_flops(net, asked))
    assert [part.kind for part in net.parts].count("heads") == 2
    assert table.n_cells == 1 + 3 + 5 + 5 + 5  # the encoder, its heads, its units; dense; head
    rng = np.random.default_rng(3)
    for configuration in (drawn(net, rng) for _ in range(10)):
        expected = PER_FLOP * net.flops(configuration) + CONSTANT
        assert table.seconds(configuration) == pytest.approx(expected, rel=1e-9)


def test_widths_in_between_count_as_the_next_larger_one() -> None:
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 20), nn.ReLU(), nn.Linear(20, 2))
    net = PrunableNetwork(model, torch.zeros(2, 4))
    table = LatencyTable(net, 2, timer=by_flops(net))
    assert table.seconds((9, 17)) == table.seconds((16, 20)) > table.seconds((8, 16)) == table.seconds((1, 9))
    with pytest.raises(InputError, match="width 33 of '0'; expected 1 to 32"):
        table.seconds((33, 20))


def test_noise_does_not_make_a_larger_network_faster() -> None:
    net, exact = chain(3), by_flops(chain(3))
    rng = np.random.default_rng(0)

    def noisy(configurations: Sequence[Configuration]) -> OperationTimes:
        times = exact(configurations)
        noise = rng.lognormal(0, 0.7, (len(configurations), 1, times.operations.shape[2]))
        return OperationTimes(times.whole, times.operations * noise)

    table = LatencyTable(net, 2, timer=noisy)
    cells = [np.array(t["seconds"]) for o in table.to_dict()["operations"] for t in o["tables"]]
    assert any((np.diff(c, axis=axis) < 0).any() for c in cells for axis in range(c.ndim))  # as measured
    for start in [(1, 9, 4), (16, 5, 8), (7, 7, 7)]:
        for part in range(3):
            steps = [table.seconds((*start[:part], width, *start[part + 1 :])) for width in range(1, 17)]
            assert (np.diff(steps) >= 0).all()


def test_monotone_by_hand() -> None:
    assert monotone(np.array([1.0, 3.0, 2.0])).tolist() == [1.0, 2.5, 2.5]
    ordered = np.array([[1.0, 2.0], [4.0, 8.0]])
    assert monotone(ordered).tolist() == ordered.tolist()
    assert monotone(np.array([[1.0, 2.0], [0.0, 8.0]])).tolist() == [[0.5, 2.0], [0.5, 8.0]]


def test_operations_that_took_longer_than_the_whole_are_scaled_to_it() -> None:
    net = chain(2)
    table = LatencyTable(net, 2, timer=alike(net, 1.0, 1.5))
    assert (table.scale, table.overhead_s, table.seconds(net.dense)) == (0.5, 0.0, 1.5)


def test_load_that_falls_on_most_whole_passes_and_on_few_operations_is_no_overhead() -> None:
    net = chain(2)
    load = np.array([[0, 90, 0, 0], [0, 0, 90, 0], [0, 0, 0, 90.0]])  # by repeat and operation

    def timer(configurations: Sequence[Configuration]) -> OperationTimes:
        return OperationTimes(np.array([93.5, 93.5, 93.5]), np.stack([1 + load] * len(configurations)))

    table = LatencyTable(net, 2, timer=timer)
    assert (table.whole_s, table.overhead_s, table.seconds(net.dense)) == (93.5, 0.5, 3.5)


def test_a_layer_that_is_taken_out_costs_nothing() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    net = PrunableNetwork(model, torch.zeros(2, 6), multiple=1)
    assert [part.widths[0] for part in net.parts] == [1, 0, 0]
    table = LatencyTable(net, 2, timer=alike(net, 1.0, 5.0))
    assert (table.seconds((4, 4, 4)), table.overhead_s) == (5.0, 1.0)
    assert table.seconds((3, 0, 2)) == 4.0
    assert table.seconds((3, 2, 0)) == 5.0  # the activation behind it is still there, and was measured


def test_a_budget_of_latency_asks_the_table() -> None:
    net = chain(2)
    table = LatencyTable(net, 2, timer=by_flops(net))
    share = (table.seconds((1, 1)) / table.seconds(net.dense) + 1) / 2
    budget = Budget(net, Target.parse({"latency": share, "batch_size": 2}), latency=table.seconds)
    assert budget.dense == table.seconds(net.dense)
    assert not budget.fits(net.dense)
    assert budget.fits((1, 1))


# JSON


def test_a_loaded_table_says_the_same() -> None:
    net, _ = network("mlp")
    table = LatencyTable(net, 7, repeats=4, threads=3, timer=by_flops(net))
    text = json.dumps(table.to_dict())
    loaded = LatencyTable.load(net, 7, json.loads(text))
    assert json.dumps(loaded.to_dict()) == text
    rng = np.random.default_rng(0)
    for configuration in [drawn(net, rng) for _ in range(20)]:
        assert loaded.seconds(configuration) == table.seconds(configuration)
    assert {key: table.to_dict()[key] for key in ("batch_size", "device", "repeats", "threads", "clock")} == {
        "batch_size": 7, "device": "cpu", "repeats": 4, "threads": 3, "clock": "perf_counter",
    }  # fmt: skip


def test_a_table_of_something_else_is_refused() -> None:
    net, other = chain(2), chain(3)
    data = LatencyTable(net, 2, timer=by_flops(net)).to_dict()
    with pytest.raises(InputError, match="batch_size is 2, expected 64; measure again"):
        LatencyTable.load(net, 64, data)
    with pytest.raises(InputError, match="not of this network, batch size and device: network is"):
        LatencyTable.load(other, 2, data)
    with pytest.raises(InputError, match="device is NVIDIA H100, expected cpu; measure again"):
        LatencyTable.load(net, 2, {**data, "device": "NVIDIA H100"})


def spoiled(how: str) -> object:
    data = copy.deepcopy(LatencyTable(chain(2), 2, timer=by_flops(chain(2))).to_dict())
    table = data["operations"][1]["tables"][0]
    if how == "key":
        del data["whole_s"]
    elif how == "negative":
        data["overhead_s"] = -1.0
    elif how == "nan":
        table["seconds"][0] = float("nan")
    elif how == "short":
        del table["seconds"][0]
    elif how == "widths":
        table["axes"][0]["widths"][0] = [2]
    elif how == "operation":
        del data["operations"][1]
    elif how == "text":
        table["seconds"][0] = "fast"
    return None if how == "nothing" else data


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("key", "KeyError: 'whole_s'"),
        ("negative", "ValueError: whole_s, overhead_s and scale are .*'overhead_s': -1.0"),
        ("nan", "ValueError: cells of '0' are missing or no times"),
        ("short", "ValueError: cells of '0' are missing or no times"),
        ("widths", "ValueError: tables of '0' are over other widths"),
        ("operation", "ValueError"),
        ("text", "ValueError: could not convert"),
        ("nothing", "TypeError"),
    ],
)
def test_a_broken_table_is_refused(how: str, message: str) -> None:
    with pytest.raises(InputError, match=rf"the table of latencies is broken \({message}.*\); measure again"):
        LatencyTable.load(chain(2), 2, spoiled(how))


def test_bad_input_to_a_table() -> None:
    with pytest.raises(InputError, match="network is Linear; a table of latencies needs the operations of a Prunable"):
        LatencyTable(nn.Linear(3, 2), 1)
    with pytest.raises(InputError, match="batch_size is 0; expected a whole number of 1 or more"):
        LatencyTable(chain(2), 0)
    with pytest.raises(InputError, match="repeats is 0; expected a whole number of 1 or more"):
        LatencyTable(chain(2), 1, repeats=0)
    with pytest.raises(InputError, match="threads is -1; expected a whole number of 1 or more"):
        LatencyTable(chain(2), 1, threads=-1)


def test_a_network_that_takes_one_batch_size_alone_says_so() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.relu(self.one(x))).reshape(4, 2)

    net = PrunableNetwork(Fixed(), torch.zeros(4, 3), multiple=1)
    with pytest.raises(InputError, match=r"Fixed fails on inputs \(6, 3\): RuntimeError: .* batches of every size"):
        LatencyTable(net, 6, repeats=1)
