"""What can be pruned of a network, the cut, and what it costs: against masking, counting, and numbers by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pruning_networks import drawn, masked, network
from surgery_networks import ALL, TASKS, make
from trimtab.cost import count_cost
from trimtab.errors import InputError
from trimtab.pruning.network import PrunableNetwork
from trimtab.pruning.parts import width_grid


@pytest.mark.parametrize("name", ["mlp", "cnn", "residual", "concatenation", *TASKS])
def test_sliced_is_masked(name: str) -> None:
    net, inputs = network(name)
    rng = np.random.default_rng(0)
    for _ in range(15):
        configuration = drawn(net, rng, removal=False)
        sliced, twin = net.cut(configuration)(inputs), masked(net, configuration)(inputs)
        assert (sliced - twin).abs().max() < 1e-10, configuration


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_sliced_is_masked_in_recurrent_networks_but_for_a_norm_over_the_units(name: str) -> None:
    net, inputs = network(name, ignore=("dense",))  # what LayerNorm makes of fewer units is not what it makes of zeros
    rng = np.random.default_rng(0)
    for _ in range(15):
        configuration = drawn(net, rng)
        sliced, twin = net.cut(configuration)(inputs), masked(net, configuration)(inputs)
        assert (sliced - twin).abs().max() < 1e-10, configuration


@pytest.mark.parametrize("name", [*ALL, *TASKS, "encoder"])
def test_costs_are_those_that_are_counted(name: str) -> None:
    net, inputs = network(name)
    rng = np.random.default_rng(1)
    for configuration in [net.dense, net.smallest(), *(drawn(net, rng) for _ in range(6))]:
        cost = count_cost(net.cut(configuration), inputs)
        assert (net.flops(configuration), net.parameters(configuration)) == (cost.forward_flops, cost.parameters)


def test_cnn_costs_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(64 * 14 * 14, 512), nn.ReLU(), nn.Linear(512, 10),
    )  # fmt: skip
    net = PrunableNetwork(model, torch.zeros(1, 3, 32, 32))
    assert [part.widths for part in net.parts] == [width_grid(32, 8), width_grid(64, 8), width_grid(512, 8)]
    for one, two, three in [(32, 64, 512), (16, 40, 96)]:
        macs = 27 * one * 900 + 9 * one * two * 784 + 196 * two * three + 10 * three
        numbers = 28 * one + (9 * one + 1) * two + (196 * two + 1) * three + 10 * (three + 1)
        assert net.flops((one, two, three)) == 2 * macs
        assert net.parameters((one, two, three)) == numbers
    assert net.flops(net.dense) == 2 * 21_655_936  # FINDINGS section 4
    assert net.parameters(net.dense) == 6_447_562


def test_lstm_costs_by_hand() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(1000, 64)
            self.lstm = nn.LSTM(64, 128, batch_first=True)
            self.dense = nn.Linear(128, 64)
            self.head = nn.Linear(64, 1)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(torch.relu(self.dense(self.lstm(self.tokens(tokens))[0][:, -1])))

    net = PrunableNetwork(Classifier(), torch.zeros(1, 200, dtype=torch.long))
    for width, units, dense in [(64, 128, 64), (24, 56, 40)]:
        assert net.flops((width, units, dense)) == 2 * (200 * 4 * units * (width + units) + units * dense + dense)
        assert net.parameters((width, units, dense)) == (
            1000 * width + 4 * units * (width + units + 2) + (units + 1) * dense + dense + 1
        )
    pruned = net.cut((24, 56, 40))
    assert (pruned.lstm.hidden_size, pruned.lstm.weight_hh_l0.shape) == (56, (224, 56))


def test_transformer_block_costs_by_hand() -> None:
    net, tokens = network("encoder")
    assert {part.kind for part in net.parts} == {"Linear", "heads", "feed-forward"}
    by_name = {part.name: place for place, part in enumerate(net.parts)}
    widths = list(net.dense)
    widths[by_name["encoder.layers.0.self_attn"]] = 1
    widths[by_name["encoder.layers.1.linear1"]] = 4
    batch, length, embedding, per_head = 4, 6, 12, 4

    def macs(heads: int, units: int) -> int:
        inside = heads * per_head
        projections = 4 * length * embedding * inside
        scores = 2 * length * length * inside
        return batch * (projections + scores + 2 * length * embedding * units)

    head = batch * (12 * 7 + 7 * 2)
    assert net.flops(net.dense) == 2 * (2 * macs(3, 10) + head)
    assert net.flops(tuple(widths)) == 2 * (macs(1, 10) + macs(3, 4) + head)
    lost_heads = 2 * (4 * per_head * embedding + 3 * per_head)
    assert net.parameters(net.dense) - net.parameters(tuple(widths)) == lost_heads + 6 * (12 + 1 + 12)
    assert net.cut(tuple(widths))(tokens).shape == (4, 2)


def test_a_layer_that_is_taken_out_lets_through_what_it_read() -> None:
    net, inputs = network("mlp")
    assert [part.widths[0] for part in net.parts] == [1, 0]  # the second makes as much as it reads
    pruned = net.cut((3, 0))
    assert isinstance(pruned[2], nn.Identity)
    kept = torch.sort(net.orders[0][:3]).values
    hidden = torch.relu(torch.tanh(nn.functional.linear(inputs, net.model[0].weight[kept], net.model[0].bias[kept])))
    expected = nn.functional.linear(hidden, net.model[4].weight[:, kept], net.model[4].bias)
    assert torch.equal(pruned(inputs), expected)  # the last layer reads what the first makes


def test_the_model_that_is_given_stays_and_the_cut_one_can_be_trained() -> None:
    model, inputs = make("cnn")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    net = PrunableNetwork(model, inputs, multiple=1)
    pruned = net.cut(net.smallest()).train()
    optimizer = torch.optim.SGD(pruned.parameters(), 0.05)
    targets = torch.arange(7) % 3
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(pruned(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_most_important_units_stay() -> None:
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
        model[2].weight.copy_(torch.tensor([[4.0, 1.0, 2.0]]))
    net = PrunableNetwork(model, torch.zeros(1, 2), multiple=1)
    assert net.scores[0].tolist() == pytest.approx([5.0, 2**0.5, 2.0])  # norms of all weights of each unit
    assert net.orders[0].tolist() == [0, 2, 1]
    assert net.cut((2,))[0].weight.tolist() == [[3.0, 0.0], [0.0, 0.0]]
    chosen = net.cut((1,), [torch.tensor([1, 0, 2])])
    assert chosen[0].weight.tolist() == [[0.0, 1.0]]
    random = [PrunableNetwork(model, torch.zeros(1, 2), multiple=1, importance="random", seed=s) for s in (1, 1, 2)]
    assert torch.equal(random[0].scores[0], random[1].scores[0])
    assert not torch.equal(random[0].scores[0], random[2].scores[0])


def test_nothing_is_passed_over_in_silence() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 16)
            self.two = nn.Linear(16, 4)
            self.up = nn.ConvTranspose1d(1, 1, 3)
            self.three = nn.Linear(6, 16)
            self.head = nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.two(torch.relu(self.one(x)))
            return self.head(torch.relu(self.three(self.up(x[:, None])[:, 0])))

    net = PrunableNetwork(Odd(), torch.zeros(1, 4), ignore=("three",))
    assert [part.name for part in net.parts] == ["one"]
    assert net.refused == {
        "two": "they go through module 'up' (ConvTranspose1d), of which it is not known that it keeps units apart",
        "three": "it was asked to stay (ignore)",
        "head": "they are an output of the network, whose size is the task's",
        "up": "no rule says what the units of ConvTranspose1d are coupled to",
    }


def test_bad_input_is_one_error() -> None:
    model, inputs = make("mlp")

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) if x.sum() > 0 else x

    for call, text in [
        (lambda: PrunableNetwork(nn.Linear, inputs), "model is type; expected a trained torch.nn.Module"),
        (lambda: PrunableNetwork(model, inputs, multiple=0), "multiple is 0; expected a whole number of 1 or more"),
        (lambda: PrunableNetwork(model, inputs, importance="l1"), "importance 'l1'"),
        (lambda: PrunableNetwork(model, inputs, ignore=["fc"]), "layer to ignore 'fc'"),
        (lambda: PrunableNetwork(model, inputs[:, :3]), "Sequential fails on the example inputs"),
        (lambda: PrunableNetwork(Branching(), torch.zeros(1, 2)), "Branching cannot be traced by torch.fx"),
        (lambda: PrunableNetwork(nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 2)), "nothing of Sequential can be"),
        (
            lambda: PrunableNetwork(nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 2)), torch.zeros(1, 2)),
            "0: it has one unit; 1: they",
        ),
        (lambda: PrunableNetwork(model, inputs, multiple=1).cut((1,)), r"\(1,\) has 1 widths; expected 2"),
        (lambda: PrunableNetwork(model, inputs, multiple=1).cut((0, 5)), "width 0 of '0'; expected 1 to 5"),
        (lambda: PrunableNetwork(model, inputs, multiple=1).cut((5, 9)), "width 9 of '2'; expected 0"),
        (lambda: PrunableNetwork(model, inputs, multiple=1).flops((5, 2.0)), "width 2.0 of '2'"),
    ]:
        with pytest.raises(InputError, match=text):
            call()
