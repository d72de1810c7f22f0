"""Units and layers through their knobs: what is preserved, what moves together, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from surgery_networks import assert_consistent, make, train, weights
from trimtab import InputError, registry
from trimtab.knobs.data import ResizableBatchSampler
from trimtab.knobs.layers import Layers
from trimtab.knobs.units import Units
from trimtab.run_state import RunState
from trimtab.surgery import Surgeon, replay
from trimtab.training.loop import TrainingLoop

IMAGES = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def relu_cnn() -> nn.Module:
    """Two convolutions with batch norm, flattened channels, two dense layers."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(32, 6), nn.ReLU(), nn.Linear(6, 3),
    )  # fmt: skip


def drawn(build: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model: nn.Module = build()
    return model


def run_of(model: nn.Module, inputs: Any = None, loader: Any = None, rule: str = "adam") -> RunState:
    makers = {"adam": torch.optim.Adam, "sgd": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)}
    state = RunState(makers[rule](model.parameters(), 0.01), model, loader)
    state.example_inputs = inputs
    return state


def network(name: str) -> tuple[nn.Module, Tensor]:
    return (drawn(relu_cnn).double(), IMAGES) if name == "relu-cnn" else make(name)


def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    was = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        result: Tensor = model(inputs)
    for module, mode in was:
        module.training = mode
    return result


def write(knob: Any, state: RunState, value: float) -> None:
    knob.write(state, np.array([value]))
    assert knob.read(state).tolist() == [value]
    assert knob.find_conflict(state) is None


# ---- what is preserved ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["adam", "sgd"])
@pytest.mark.parametrize("name", ["mlp", "relu-cnn", "sst2-bilstm", "gru", "residual"])
def test_more_units_keep_the_function_and_fewer_give_it_back_exactly(name: str, rule: str) -> None:
    model, inputs = network(name)
    state = run_of(model, inputs, rule=rule)
    train(model, inputs, state.optimizer, 3)
    knob = Units(1, 40)
    found = float(knob.bind(state)[0])
    before, kept = outputs(model, inputs), weights(model)
    write(knob, state, 2 * found + 1)
    assert (outputs(model, inputs) - before).abs().max() < 1e-10
    assert_consistent(model, state.optimizer)
    assert knob.cost is not None
    assert knob.cost["parameters"] > knob.cost["parameters_before"] == sum(p.numel() for p in parameters_of(kept))
    assert knob.cost["step_flops"] > knob.cost["step_flops_before"]
    write(knob, state, found)
    assert torch.equal(outputs(model, inputs), before)
    now = weights(model)
    assert list(now) == list(kept)
    assert all(torch.equal(now[key], kept[key]) for key in kept)


def parameters_of(kept: dict[str, Tensor]) -> list[Tensor]:
    """Those of a state that are no buffers."""
    return [value for key, value in kept.items() if "running" not in key and "num_batches" not in key]


@pytest.mark.parametrize("name", ["relu-cnn", "mnist-cnn"])
def test_more_layers_keep_the_function_and_the_least_important_go(name: str) -> None:
    model, inputs = network(name)
    state = run_of(model, inputs)
    train(model, inputs, state.optimizer, 2)
    knob = Layers(1, 8)
    found = float(knob.bind(state)[0])
    before = outputs(model, inputs)
    write(knob, state, found + 2)
    assert (outputs(model, inputs) - before).abs().max() < 1e-10
    assert_consistent(model, state.optimizer)
    train(model, inputs, state.optimizer, 1)
    before = outputs(model, inputs)
    write(knob, state, found + 3)
    write(knob, state, found + 2)  # the newest, which is the identity still
    assert torch.equal(outputs(model, inputs), before)
    write(knob, state, found)
    assert_consistent(model, state.optimizer)
    assert train(model, inputs, state.optimizer, 1) < 100


def test_a_layer_that_was_just_put_in_goes_without_a_trace() -> None:
    model, inputs = network("relu-cnn")
    state, knob = run_of(model, inputs), Layers()
    found = float(knob.bind(state)[0])
    before, kept, there = outputs(model, inputs), weights(model), list(model)
    write(knob, state, found + 1)
    write(knob, state, found)
    assert torch.equal(outputs(model, inputs), before)
    assert list(model) == there
    assert all(torch.equal(a, b) for a, b in zip(weights(model).values(), kept.values(), strict=True))


def test_noise_tells_copies_apart() -> None:
    model, inputs = network("mlp")
    state = run_of(model, inputs)
    knob = Units(1, 40, noise=0.01, seed=4)
    knob.bind(state)
    before = outputs(model, inputs)
    write(knob, state, 10.0)
    change = (outputs(model, inputs) - before).abs().max()
    assert 1e-6 < change < 0.5
    model[0](inputs).sum().backward()
    first = model[0].weight
    assert len({tuple(row.tolist()) for row in first}) == 10


# ---- what moves together --------------------------------------------------------------------------------------------


def sizes(state: RunState) -> dict[str, int]:
    return {group.name: group.size for group in state.structure.surgeon.groups}


def test_all_groups_keep_their_ratio_to_the_first_and_come_back() -> None:
    model, inputs = network("relu-cnn")
    state, knob = run_of(model, inputs), Units(2, 64)
    assert knob.bind(state).tolist() == [4.0]
    for value in (7, 3, 1, 40, 4):
        write(knob, state, value)
        assert sizes(state) == {"0": value, "4": 2 * value, "8": max(1, round(1.5 * value)), "10": 3}


def test_one_named_group_moves_alone() -> None:
    model, inputs = network("relu-cnn")
    state, knob = run_of(model, inputs), Units(group="8")
    assert knob.bind(state).tolist() == [6.0]
    write(knob, state, 9)
    assert sizes(state) == {"0": 4, "4": 8, "8": 9, "10": 3}


def test_a_new_layer_takes_the_ratio_of_the_one_it_stands_behind_and_the_reference_is_kept() -> None:
    model = drawn(lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 2)))
    inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    state, units, layers = run_of(model, inputs), Units(2, 40), Layers(1, 5)
    assert units.bind(state).tolist() == [6.0]
    assert layers.bind(state).tolist() == [2.0]
    assert layers.low == 2.0  # neither of them makes as much as it reads
    write(units, state, 5)
    write(layers, state, 4)
    assert units.find_conflict(state) is None
    assert sizes(state) == {"0": 5, "2.0": 2, "2.2.0": 2, "2.2.2": 2, "4": 2}
    write(units, state, 12)
    assert list(sizes(state).values()) == [12, 6, 6, 6, 2]  # half, as at first; not 2/5
    with torch.no_grad():  # far from the identity, both
        for name in ("2.2.0", "2.2.2"):
            model.get_submodule(name).weight.normal_()
    write(layers, state, 2)
    assert list(sizes(state).values()) == [12, 6, 2]
    assert units.find_conflict(state) is None


def test_the_layer_that_units_is_read_from_is_never_taken_out() -> None:
    model = drawn(
        lambda: nn.Sequential(nn.Embedding(9, 6), nn.Flatten(), nn.Unflatten(1, (3, 6)), nn.Linear(6, 6), nn.ReLU(),
                              nn.Linear(6, 6), nn.ReLU(), nn.Flatten(), nn.Linear(18, 2))
    )  # fmt: skip
    inputs = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with torch.no_grad():
        nn.init.eye_(model[3].weight)  # the nearest to the identity by far
        model[3].bias.zero_()
    alone = run_of(model, inputs)
    layers = Layers()
    assert layers.bind(alone).tolist() == [2.0]
    both = run_of(model, inputs)
    units, layers = Units(group="3"), Layers()
    units.bind(both)
    layers.bind(both)
    write(layers, both, 1)
    assert isinstance(model[3], nn.Linear)
    assert isinstance(model[5], nn.Identity)
    assert units.find_conflict(both) is None


def test_embeddings_and_layer_norms_are_left_alone() -> None:
    model, tokens = make("lstm")
    state, knob = run_of(model, tokens), Units(1, 64)
    assert knob.bind(state).tolist() == [4.0]  # the LSTM; the dense layer has a LayerNorm behind it
    write(knob, state, 6)
    assert sizes(state) == {"tokens": 5, "cells": 6, "dense": 7, "head": 2}
    named = Units(1, 64, group="tokens")
    assert named.bind(run_of(model, tokens)).tolist() == [5.0]


# ---- what is refused ------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """Looks at its data."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else self.layer(-x)


@pytest.mark.parametrize(
    ("knob", "model", "text"),
    [
        (
            Units(),
            lambda: nn.Sequential(nn.Linear(5, 2)),
            r"Sequential has no units that can be changed: '0' \(Linear\): they are an output of the.*'units' out",
        ),
        (Units(), Branches, "Branches cannot be traced by torch.fx: symbolically traced variables cannot be used"),
        (Layers(), Branches, "Branches cannot be traced by torch.fx"),
        (
            Layers(),
            lambda: nn.Sequential(nn.Linear(5, 2)),
            "Sequential takes no further layer: .*what it makes is the network's output",
        ),
        (
            Layers(),
            lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)),
            r"its activation is Tanh, and Tanh\(Tanh\(x\)\) is not Tanh\(x\).*; leave the knob 'layers' out",
        ),
        (Units(group="7"), lambda: nn.Linear(5, 2), "unknown group of units '7'"),
        (
            Units(group="1"),
            lambda: nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2)),
            "the units of '1' .*cannot be changed",
        ),
        (
            Units(group="0"),
            lambda: nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 2)),
            "units of '0' can be widened to whole multiples of their number only",
        ),
        (
            Layers(1, 2),
            lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)),
            r"layers: at least 2 have to stay \(layers: none of the 2 hidden layers can be taken out\); high is 2",
        ),
    ],
)  # fmt: skip
def test_a_network_that_cannot_be_changed_is_refused_by_name(knob: Any, model: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        knob.bind(run_of(drawn(model), torch.randn(3, 5, generator=torch.Generator().manual_seed(1))))


def test_a_recurrent_network_takes_no_layer() -> None:
    model, tokens = make("sst2-bilstm")
    with pytest.raises(InputError, match=r"BiLSTM takes no further layer: .*no layer is put in behind 'lstm' \(LSTM\)"):
        Layers().bind(run_of(model, tokens))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"low": 0.5}, "low is 0.5; expected a whole number"),
        ({"low": 0}, "expected 0 < low"),
        ({"group": 3}, "group is 3; expected the name of a layer"),
        ({"importance": "size"}, "unknown importance of the knob 'units' 'size'.*incoming, outgoing, product"),
        ({"noise": -0.1}, "noise is -0.1; expected a finite number of 0 or more"),
        ({"noise": float("nan")}, "noise is nan"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_options_are_checked(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        Units(**options)


def test_no_hidden_layers_are_none() -> None:
    with pytest.raises(InputError, match=r"layers: bounds \[0, 4\]; expected 1 or more"):
        Layers(low=0)
    model, inputs = network("relu-cnn")
    state, knob = run_of(model, inputs), Layers()
    knob.bind(state)
    with pytest.raises(InputError, match=r"layers: got 0\.0; expected a whole number of 1 or more"):
        knob.write(state, np.array([0.0]))
    kept = {name: id(value) for name, value in model.named_parameters()}
    with pytest.raises(InputError, match="layers: none of the 3 hidden layers can be taken out"):
        knob.write(state, np.array([1.0]))
    assert {name: id(value) for name, value in model.named_parameters()} == kept


def test_an_optimizer_whose_state_is_not_known_is_refused() -> None:
    model, inputs = network("mlp")
    state = RunState(torch.optim.RMSprop(model.parameters()), model)
    state.example_inputs = inputs
    with pytest.raises(InputError, match="'units' cannot carry over what RMSprop keeps; expected SGD, Adam, AdamW"):
        Units().bind(state)


# ---- where the example inputs come from -----------------------------------------------------------------------------


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))


class Rows(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        yield torch.zeros(5)


def test_a_loaders_data_give_the_example_inputs_and_its_order_does_not_move() -> None:
    data = TensorDataset(torch.randn(20, 5, generator=torch.Generator().manual_seed(1)), torch.zeros(20))
    sampler = ResizableBatchSampler(data, 8, seed=3)
    loader = DataLoader(data, batch_sampler=sampler)
    before = torch.get_rng_state()
    state = run_of(drawn(dense), loader=loader)
    Units(2).bind(state)
    assert torch.equal(torch.get_rng_state(), before)
    expected = list(ResizableBatchSampler(data, 8, seed=3))
    assert list(sampler) == expected
    cost = state.structure.surgeon.cost
    assert cost.forward_flops == 2 * 8 * (5 * 4 + 4 * 2)  # of a batch of 8


@pytest.mark.parametrize(
    ("loader", "text"),
    [
        (
            None,
            r"'units' needs a batch of the model's inputs: give Controller\(example_inputs=...\).*loader is NoneType",
        ),
        (DataLoader(Rows(), batch_size=2), "loader is DataLoader"),
        (DataLoader([{"text": torch.zeros(5)}], batch_size=1), "a batch of this one begins with dict"),
        (ResizableBatchSampler(20, 4), "loader is ResizableBatchSampler"),
    ],
)
def test_without_example_inputs_one_error_says_what_to_give(loader: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        Units().bind(run_of(drawn(dense), loader=loader))


def test_a_loop_gives_its_own() -> None:
    task = registry.load("task", "digits-mlp")("smoke")
    loop = TrainingLoop(task, task.load(None), seed=0)
    state = RunState(loop.optimizer, loop.model, loop)
    units, layers = Units(), Layers()
    assert (units.bind(state).tolist(), layers.bind(state).tolist()) == ([64.0], [1.0])
    assert state.structure.surgeon is loop.surgeon
    state = RunState(loop.optimizer, loop.model, loop)
    state.example_inputs = torch.zeros(2, 64)
    with pytest.raises(InputError, match="example_inputs beside loader=TrainingLoop, which has its own"):
        Units().bind(state)
    with pytest.raises(InputError, match="model and optimizer given are not those of loader=TrainingLoop"):
        Units().bind(RunState(loop.optimizer, drawn(dense), loop))
    with pytest.raises(InputError, match="the knob 'layers' acts in the model: give it as model="):
        Layers().bind(RunState(loop.optimizer))


# ---- a plan of another's --------------------------------------------------------------------------------------------


def test_the_surgeon_follows_plans_forth_and_back() -> None:
    model, inputs = network("relu-cnn")
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    train(model, inputs, optimizer, 2)
    surgeon = Surgeon(model, inputs, optimizer)
    generator = torch.Generator().manual_seed(0)
    plans, shapes = [surgeon.plan], [shapes_of(model)]
    for change in (
        lambda: surgeon.widen("4", 11, generator=generator),
        lambda: surgeon.deepen("8"),
        lambda: surgeon.narrow("0", 2),
        lambda: surgeon.remove_layer(),
        lambda: surgeon.widen("8", 8, generator=generator),
    ):
        change()
        plans.append(surgeon.plan)
        shapes.append(shapes_of(model))
        train(model, inputs, optimizer, 1)
    for place in (5, 2, 0, 4, 1, 3, 5):
        surgeon.follow(plans[place])
        assert surgeon.plan == plans[place]
        assert shapes_of(model) == shapes[place]
        assert_consistent(model, optimizer)
        train(model, inputs, optimizer, 1)
    with pytest.raises(InputError, match="entry 1 of the plan is"):
        surgeon.follow([plans[1][0], {"operation": "double"}])
    assert surgeon.plan == plans[5]


@pytest.mark.parametrize("with_optimizer", [True, False])
def test_a_replayed_network_keeps_its_history(with_optimizer: bool) -> None:
    model, inputs = network("relu-cnn")
    first = Surgeon(model, inputs)
    first.widen("4", 11, generator=torch.Generator().manual_seed(0))
    fresh, _ = network("relu-cnn")
    optimizer = torch.optim.Adam(fresh.parameters(), 0.01)
    replay(fresh, inputs, first.plan, optimizer if with_optimizer else None)
    optimizer = optimizer if with_optimizer else torch.optim.Adam(fresh.parameters(), 0.01)
    second = Surgeon(fresh, inputs, optimizer)
    assert second.plan == first.plan
    second.narrow("4", 8)  # it knows which are copies
    assert second.plan[-1]["units"] == [8, 9, 10]
    second.follow(first.plan)
    if with_optimizer:
        second.follow([])
        assert shapes_of(fresh) == shapes_of(network("relu-cnn")[0])
        assert_consistent(fresh, optimizer)
    else:  # which of the optimizer's groups the old parameters were in is not known
        with pytest.raises(InputError, match=r"Sequential was replayed without its optimizer.*take a fresh network"):
            second.follow([])
    assert Surgeon(network("relu-cnn")[0], inputs).plan == []


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def test_several_changes_are_made_whole_or_not_at_all() -> None:
    model, inputs = network("relu-cnn")
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    train(model, inputs, optimizer, 2)
    surgeon = Surgeon(model, inputs, optimizer)
    before, cost = outputs(model, inputs), surgeon.cost
    kept = [id(parameter) for parameter in model.parameters()]

    def change() -> None:
        with surgeon.together():
            surgeon.deepen("8")
            surgeon.narrow("4", 3)
            surgeon.widen("0", 9, generator=torch.Generator().manual_seed(0))
            surgeon.narrow("0", 9)

    with pytest.raises(InputError, match="n is 9; to narrow '0', which has 9 units"):
        change()
    assert [id(parameter) for parameter in model.parameters()] == kept
    assert torch.equal(outputs(model, inputs), before)
    assert (surgeon.plan, surgeon.cost) == ([], cost)
    assert_consistent(model, optimizer)
