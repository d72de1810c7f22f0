"""Pruning by Torch-Pruning: the same as ours where both can, and nothing of it believed that was not looked at."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pruning_networks import Encoder
from surgery_networks import make
from trimtab.cost import count_cost
from trimtab.errors import InputError, MissingExtraError, RunFailedError, UnknownNameError
from trimtab.pruning.allocations import by_threshold, draw, on_grid, uniform
from trimtab.pruning.budget import Budget, Prunable, Target
from trimtab.pruning.network import PrunableNetwork, units_of
from trimtab.pruning.torch_pruning import TorchPruningNetwork
from trimtab.tasks.residual import ResNet18
from trimtab.tasks.vgg import vgg16

try:
    import torch_pruning
except ImportError:
    torch_pruning = None

needs_it = pytest.mark.skipif(torch_pruning is None, reason="needs Torch-Pruning (the extra [prune])")


class SideBySide(nn.Module):
    """Two branches of convolutions, concatenated, and a third that both are added to."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(2, 4, 3, padding=1)
        self.two = nn.Conv2d(2, 6, 1)
        self.both = nn.Conv2d(10, 5, 3)
        self.head = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([torch.relu(self.one(x)), torch.tanh(self.two(x))], dim=1)
        return self.head(torch.relu(self.both(x)).flatten(1))


class Branching(nn.Module):
    """Goes by the values of its inputs, which no tracing of operations can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.one(x)) if x.mean() > 0 else torch.tanh(self.one(x))
        return self.head(torch.relu(self.two(h)))


class Recurrent(nn.Module):
    def __init__(self, kind: str, reads_state: bool) -> None:
        super().__init__()
        self.before, self.after, self.head = nn.Linear(3, 4), nn.Linear(4, 6), nn.Linear(6, 2)
        self.cells = getattr(nn, kind)(4, 4, batch_first=True)
        self.reads_state = reads_state

    def forward(self, x: Tensor) -> Tensor:
        outputs, state = self.cells(self.before(x))
        state = state[0] if isinstance(self.cells, nn.LSTM) else state
        return self.head(torch.relu(self.after(state[-1] if self.reads_state else outputs[:, -1])))


class Scaled(nn.Module):
    """Units that meet a parameter of the network's own, and a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.two(self.one(x) * self.scale)))


class ChannelsLast(nn.Module):
    """Flattens with the channels behind the places, while Torch-Pruning takes them to be before."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.dense, self.head = nn.Conv2d(2, 6, 3), nn.Linear(24, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.dense(torch.relu(self.conv(x)).permute(0, 2, 3, 1).flatten(1))))


class Mixing(nn.Module):
    """Mixes places by a matrix that is no module's, so that its FLOPs are none's either."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.head = nn.Linear(4, 6), nn.Linear(6, 2)
        self.register_buffer("mix", torch.randn(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.mix @ self.one(x)))


def drawn(build: Callable[[], nn.Module], *shape: int) -> tuple[nn.Module, Tensor]:
    """A network and inputs, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return build().double().train(), torch.randn(*shape, dtype=torch.float64)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mlp": lambda: make("mlp"),
    "cnn": lambda: make("cnn"),
    "residual": lambda: make("residual"),
    "side by side": lambda: drawn(SideBySide, 3, 2, 4, 4),
    "resnet-18": lambda: drawn(lambda: ResNet18(10, width=1 / 8), 2, 3, 16, 16),
    "vgg-16": lambda: drawn(lambda: vgg16(10, width=1 / 8), 2, 3, 32, 32),
}


@cache
def both(name: str) -> tuple[TorchPruningNetwork, PrunableNetwork, Tensor]:
    model, inputs = NETWORKS[name]()
    return (
        TorchPruningNetwork(model, inputs, multiple=1),
        PrunableNetwork(model, inputs, multiple=1, removal=False),
        inputs,
    )


@needs_it
@pytest.mark.parametrize("name", NETWORKS)
def test_parts_and_scores_are_ours(name: str) -> None:
    theirs, ours, _ = both(name)
    assert theirs.parts == ours.parts
    assert theirs.dense == ours.dense
    assert theirs.refused.keys() == ours.refused.keys()
    for found, expected in zip(theirs.scores, ours.scores, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


@needs_it
@pytest.mark.parametrize("name", NETWORKS)
def test_cuts_are_ours(name: str) -> None:
    theirs, ours, inputs = both(name)
    rng = np.random.default_rng(1)
    for _ in range(2):
        configuration = tuple(int(rng.integers(1, part.size + 1)) for part in ours.parts)
        orders = tuple(torch.from_numpy(rng.permutation(part.size)) for part in ours.parts)
        found, expected = theirs.cut(configuration, orders), ours.cut(configuration, orders)
        assert str(found) == str(expected)
        with torch.no_grad():
            torch.testing.assert_close(found(inputs), expected(inputs), atol=1e-10, rtol=0)
        cost = count_cost(found, inputs)
        assert theirs.flops(configuration) == ours.flops(configuration) == cost.forward_flops
        assert theirs.parameters(configuration) == ours.parameters(configuration) == cost.parameters
    assert theirs.costs is not None


@needs_it
def test_random_scores_are_ours() -> None:
    model, inputs = make("cnn")
    theirs = TorchPruningNetwork(model, inputs, multiple=1, importance="random", seed=3)
    ours = PrunableNetwork(model, inputs, multiple=1, importance="random", seed=3)
    for found, expected in zip(theirs.scores, ours.scores, strict=True):
        assert torch.equal(found, expected)


@needs_it
def test_the_model_is_never_touched() -> None:
    model, inputs = make("cnn")
    model.train()
    model[0].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    net = TorchPruningNetwork(model, inputs, multiple=1)
    new = net.cut((2, 3, 2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"0.weight"}
    assert {name for name, p in new.named_parameters() if not p.requires_grad} == {"0.weight"}
    assert model.training
    assert not new.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in new.modules())
    new(inputs).sum().backward()  # training goes on
    assert new[8].weight.grad.shape == (2, 3)


@needs_it
def test_a_branch_on_data_is_cut() -> None:
    model, inputs = drawn(Branching, 7, 4)
    with pytest.raises(InputError, match="cannot be traced"):
        PrunableNetwork(model, inputs, multiple=1)
    net = TorchPruningNetwork(model, inputs, multiple=1)
    assert [(part.name, part.size) for part in net.parts] == [("one", 6), ("two", 5)]
    assert net.refused == {"head": "its units are the network's output"}
    new = net.cut((3, 4))
    assert [new.one.weight.shape, new.two.weight.shape, new.head.weight.shape] == [(3, 4), (4, 3), (2, 4)]
    with torch.no_grad():  # the dense network, in which nothing reads the units that went
        model.two.weight[:, net.orders[0][3:]] = 0
        model.head.weight[:, net.orders[1][4:]] = 0
        for batch in (inputs.abs(), -inputs.abs()):
            torch.testing.assert_close(new(batch), model(batch), atol=1e-10, rtol=0)
    assert net.flops((3, 4)) == 2 * 7 * (4 * 3 + 3 * 4 + 4 * 2)
    assert net.parameters((3, 4)) == (4 + 1) * 3 + (3 + 1) * 4 + (4 + 1) * 2


@needs_it
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # torch takes LSTMs apart in the second
@pytest.mark.parametrize("reads_state", [False, True])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_recurrent_layers_are_refused_by_name(kind: str, reads_state: bool, dtype: torch.dtype) -> None:
    model, inputs = drawn(lambda: Recurrent(kind, reads_state), 3, 5, 3)
    net = TorchPruningNetwork(model.to(dtype), inputs.to(dtype), multiple=1)
    assert [part.name for part in net.parts] == ["after"]
    reason = f"Torch-Pruning does not cut {kind} layers, or cuts them wrongly"
    assert net.refused["cells"] == reason
    assert net.refused["before"] == f"its units meet 'cells' ({kind}): {reason}"
    new = net.cut((2,))
    assert new.head.in_features == 2
    assert "forward" not in vars(new.cells)
    assert new.cells(torch.zeros(1, 2, 4, dtype=dtype))[0].shape == (1, 2, 4)


@needs_it
def test_attention_and_lone_parameters_are_refused_by_name() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model, tokens = Encoder().double(), torch.randint(0, 20, (4, 6))
    net = TorchPruningNetwork(model, tokens, multiple=1)
    assert [part.name for part in net.parts] == ["encoder.layers.0.linear1", "encoder.layers.1.linear1", "dense"]
    assert "cannot cut the heads" in net.refused["encoder.layers.0.self_attn"]
    assert "meet 'encoder.layers" in net.refused["encoder.layers.0.linear2"]
    assert "tokens" in net.refused
    net = TorchPruningNetwork(*drawn(Scaled, 3, 4), multiple=1)
    assert [part.name for part in net.parts] == ["two"]
    assert net.refused["one"] == "its units meet 'scale', of which Torch-Pruning guesses the axis that they lie on"
    assert net.refused["scale"].startswith("a parameter by itself")


@needs_it
def test_groups_of_channels_are_refused() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.Conv2d(4, 6, 1, groups=2), nn.Conv2d(6, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 6, 1),
        nn.GroupNorm(1, 6), nn.Flatten(), nn.Linear(54, 2),
    )  # fmt: skip
    net = TorchPruningNetwork(model, torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0)), multiple=1)
    assert [part.name for part in net.parts] == ["4"]
    assert net.refused["0"] == "its units meet '1' (Conv2d): a convolution of 2 groups"
    assert net.refused["1"] == "a convolution of 2 groups"
    assert net.refused["2"] == "its units meet '3' (GroupNorm): a group norm of 2 groups"
    assert net.cut((2,))[7].in_features == 18


@needs_it
def test_transposed_convolutions_are_cut() -> None:
    model, inputs = drawn(
        lambda: nn.Sequential(
            nn.ConvTranspose2d(2, 4, 2), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2), nn.ReLU(), nn.Conv2d(6, 3, 1)
        ), 3, 2, 4, 4,
    )  # fmt: skip
    net = TorchPruningNetwork(model, inputs, multiple=1)
    new = net.cut((1, 5))
    assert [tuple(new[place].weight.shape[:2]) for place in (0, 2, 4)] == [(2, 1), (1, 5), (3, 5)]
    assert [units_of(new, part) for part in net.parts] == [1, 5]
    cost = count_cost(new, inputs)
    assert (net.flops((1, 5)), net.parameters((1, 5))) == (cost.forward_flops, cost.parameters)
    assert net.costs is not None
    with torch.no_grad():
        model[2].weight[net.orders[0][1:]] = 0
        model[4].weight[:, net.orders[1][5:]] = 0
        torch.testing.assert_close(new(inputs), model(inputs), atol=1e-10, rtol=0)


@needs_it
def test_shared_and_computed_weights_are_refused() -> None:
    model = nn.Sequential(
        nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)
    )
    model[2].weight = model[0].weight
    torch.nn.utils.parametrizations.weight_norm(model[3])
    net = TorchPruningNetwork(model, torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), multiple=1)
    assert [part.name for part in net.parts] == ["4"]
    assert net.refused["0"] == net.refused["2"] == "it shares a parameter with another module"
    assert net.refused["3"] == "its weight is computed from other tensors; remove the parametrization"


@needs_it
def test_units_from_the_wrong_places_are_found() -> None:
    net = TorchPruningNetwork(*drawn(ChannelsLast, 3, 2, 4, 4), multiple=1)
    assert [part.name for part in net.parts] == ["dense"]
    assert "computes something else than the network without those units" in net.refused["conv"]


@needs_it
def test_a_silent_no_op_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = make("mlp")
    net = TorchPruningNetwork(model, inputs, multiple=1)
    monkeypatch.setattr(torch_pruning.dependency.Group, "prune", lambda *_, **__: None)
    with pytest.raises(RunFailedError, match=r"did not cut '0' as it was asked: weight should be \[2, 6\] and is \[5"):
        net.cut((2, 5))
    with pytest.raises(
        InputError, match=r"nothing of Sequential can be pruned: 4: its units.*0: Torch-Pruning did not"
    ):
        TorchPruningNetwork(model, inputs, multiple=1)


@needs_it
def test_failures_of_the_library_are_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = make("mlp")
    net = TorchPruningNetwork(model, inputs, multiple=1)

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(torch_pruning.dependency.Group, "prune", fail)
    with pytest.raises(RunFailedError, match="Torch-Pruning fails to cut '0': AssertionError"):
        net.cut((2, 5))


@needs_it
def test_costs_without_a_closed_form_are_counted() -> None:
    model, inputs = drawn(Mixing, 3, 5, 4)
    net = TorchPruningNetwork(model, inputs, multiple=1)
    assert net.costs is None
    assert net.flops((2,)) == 2 * 3 * (5 * 4 * 2 + 5 * 5 * 2 + 5 * 2 * 2)
    assert net.parameters((2,)) == (4 + 1) * 2 + (2 + 1) * 2
    assert net._counted.keys() == {(2,)}  # once for both


@needs_it
@pytest.mark.parametrize("target", [{"flops": 0.4}, {"params": 0.5}])
def test_rules_without_learning_take_it(target: dict[str, float]) -> None:
    found, expected = [], []
    theirs, ours, _ = both("residual")
    networks: tuple[tuple[Prunable, list[object]], ...] = ((theirs, found), (ours, expected))
    for network, results in networks:
        budget = Budget(network, Target.parse(target))
        results += [uniform(budget), by_threshold(budget, "global"), by_threshold(budget, "lamp")]
        results += [on_grid(budget, uniform(budget)), draw(budget, np.random.default_rng(0))]
        assert all(budget.fits(configuration) for configuration in results)  # type: ignore[arg-type]
    assert found == expected


@needs_it
def test_bad_input_is_one_error() -> None:
    model, inputs = make("mlp")
    with pytest.raises(UnknownNameError, match=r"importance for Torch-Pruning 'product'.*known: l2, random"):
        TorchPruningNetwork(model, inputs, importance="product")
    with pytest.raises(InputError, match="multiple is 0; expected a whole number of 1 or more"):
        TorchPruningNetwork(model, inputs, multiple=0)
    with pytest.raises(UnknownNameError, match="layer to ignore '5'"):
        TorchPruningNetwork(model, inputs, multiple=1, ignore=("5",))
    with pytest.raises(InputError, match="fails on the example inputs"):
        TorchPruningNetwork(model, inputs[:, :3], multiple=1)
    with pytest.raises(InputError, match=r"of Sequential can be pruned: 0: it has one unit; 1: its units are the netw"):
        TorchPruningNetwork(nn.Sequential(nn.Linear(6, 1), nn.Linear(1, 3)).double(), inputs)
    net = TorchPruningNetwork(model, inputs, multiple=1, ignore=("0",))
    assert net.refused["0"] == "it was asked to stay (ignore)"
    with pytest.raises(InputError, match="has 2 widths; expected 1, one for each of 2"):
        net.cut((2, 2))


def test_a_missing_library_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    model, inputs = make("mlp")
    with pytest.raises(
        MissingExtraError, match=r'torch-pruning, which is not installed; pip install "trimtab\[prune\]"'
    ):
        TorchPruningNetwork(model, inputs)
