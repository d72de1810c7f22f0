"""What changes together, found by following the forward, and everything that refuses to be changed, with its text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery_networks import TASKS, generator, make
from trimtab.errors import InputError
from trimtab.surgery import Surgeon
from trimtab.tasks.models import GPT, GPTConfig


class Net(nn.Module):
    """Linear(6, 4) called `hidden`, anything, Linear(4, 3) called `head`; the forward is given."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        self.hidden = nn.Linear(6, 4)
        self.head = nn.Linear(4, 3)
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def refusal(net: nn.Module, inputs: Tensor | None = None, group: str = "hidden") -> str:
    """Why a group cannot be changed; the same text comes as the error."""
    surgeon = Surgeon(net, torch.zeros(5, 6) if inputs is None else inputs)
    found = next(g for g in surgeon.groups if group in g.producers)
    assert found.refusal is not None
    for call in (lambda: surgeon.widen(group, 9, generator=generator()), lambda: surgeon.narrow(group, 2)):
        with pytest.raises(InputError) as caught:
            call()
        assert str(caught.value) == f"the units of {group!r} ({found.kind}) cannot be changed: {found.refusal}"
    return found.refusal


def groups(name: str) -> dict[str, tuple[Any, ...]]:
    found = Surgeon(*make(name)).groups
    return {g.name: (g.size, g.producers, g.riders, g.consumers, g.refusal is None) for g in found}


def test_residual_additions_tie_producers():
    assert groups("residual") == {
        "stem": (6, ("stem", "two"), ("norm", "depthwise"), ("one", "head"), True),
        "one": (5, ("one",), ("norm_one",), ("two",), True),
        "head": (3, ("head",), (), (), False),
    }


def test_concatenation_does_not_tie():
    assert groups("concatenation") == {
        "conv": (3, ("conv",), (), ("hidden",), True),
        "side": (4, ("side",), (), ("hidden", "head"), True),
        "hidden": (6, ("hidden",), (), ("head",), True),
        "head": (2, ("head",), (), (), False),
    }


def test_recurrent_layers_read_themselves():
    assert groups("lstm") == {
        "tokens": (5, ("tokens",), (), ("cells",), True),
        "cells": (4, ("cells",), (), ("cells", "dense"), True),
        "dense": (7, ("dense",), ("norm",), ("head",), True),
        "head": (2, ("head",), (), (), False),
    }


@pytest.mark.parametrize("task", TASKS)
def test_every_hidden_layer_of_the_tasks_can_be_changed(task):
    surgeon = Surgeon(*make(task))
    assert [group.name for group in surgeon.groups if group.refusal is not None] == [surgeon.groups[-1].name]


def test_order_of_modules_does_not_matter():
    net = Net(lambda self, x: self.head(self.late(self.hidden(x))))
    net.late = nn.Linear(4, 4)  # registered after the head that reads it
    found = {g.name: g.consumers for g in Surgeon(net, torch.zeros(5, 6)).groups}
    assert found == {"hidden": ("late",), "late": ("head",), "head": ()}


def test_packed_sequences_that_are_padded_again():
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = nn.LSTM(4, 3, batch_first=True)
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor, lengths: Tensor) -> Any:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            outputs, lengths = nn.utils.rnn.pad_packed_sequence(self.cells(packed)[0], batch_first=True)
            return self.head(outputs.sum(1) / lengths.unsqueeze(1))

    net = Packed().double()
    inputs = (torch.randn(2, 5, 4, generator=generator(), dtype=torch.float64), torch.tensor([3, 5]))
    surgeon, before = Surgeon(net, inputs), net(*inputs)
    surgeon.widen("cells", 5, generator=generator())
    assert (net(*inputs) - before).abs().max() < 1e-10


class Cells(nn.Module):
    """A recurrent network of any kind, its outputs and its first layer's last state into a dense layer."""

    def __init__(self, cells: nn.RNNBase) -> None:
        super().__init__()
        self.cells = cells
        self.head = nn.Linear(cells.hidden_size * (2 + cells.bidirectional), 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs, last = self.cells(x)
        last = last[0] if isinstance(self.cells, nn.LSTM) else last
        return self.head(torch.cat((outputs.mean(0), last[0]), -1))


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("options", [{"num_layers": 3}, {"bias": False, "bidirectional": True}])
def test_recurrent_networks_of_every_kind(kind, options):
    net = Cells(kind(6, 4, **options)).double()
    inputs = torch.randn(7, 5, 6, generator=generator(), dtype=torch.float64)  # time first
    surgeon, before = Surgeon(net, inputs), net(inputs)
    surgeon.widen("cells", 11, generator=generator())
    assert net.cells.hidden_size == 11
    assert (net(inputs) - before).abs().max() < 1e-10
    surgeon.narrow("cells", 4)
    assert torch.equal(net(inputs), before)


def test_convolutions_of_one_and_three_axes():
    for k, kind in ((1, nn.Conv1d), (3, nn.Conv3d)):
        net = nn.Sequential(
            kind(2, 3, 3), nn.ReLU6(), kind(3, 4, 1), nn.Hardtanh(), nn.Flatten(), nn.Linear(4 * 2**k, 2)
        )
        net = net.double()
        inputs = torch.randn(5, 2, *[4] * k, generator=generator(), dtype=torch.float64)
        surgeon, before = Surgeon(net, inputs), net(inputs)
        for name in ("0", "2"):
            surgeon.deepen(name)
        for name in ("0.0", "0.2", "2.0", "2.2"):
            surgeon.widen(name, 7, generator=generator())
        assert (net(inputs) - before).abs().max() < 1e-10


def test_gpt_feed_forward_units_can_be_changed_and_its_width_is_refused():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT(GPTConfig(20, 8, 1, 2, 8)).double()
    tokens = torch.arange(12).view(2, 6)
    surgeon = Surgeon(model, tokens)
    before = model(tokens)
    surgeon.widen("blocks.0.expand", 48, generator=generator())
    assert (model(tokens) - before).abs().max() < 1e-10
    texts = {g.name: g.refusal for g in surgeon.groups}
    assert texts["blocks.0.attention.qkv"] == (
        "they go through the operation 'view' (node 'view'), of which it is not known that it keeps units apart"
    )
    assert texts["tokens"] == "the operation 'add' (node 'add') combines them with something of fixed size"


CASES: dict[str, tuple[Callable[[Any, Tensor], Any], dict[str, Callable[[], nn.Module]], str]] = {
    "output": (lambda s, x: (s.head(h := s.hidden(x)), h), {}, "they are an output of the network, whose size is"),
    "literal": (
        lambda s, x: s.head(s.hidden(x).view(5, 4)),
        {},
        "the operation 'view' (node 'view') writes out their number: 4; with -1 in its place it would follow",
    ),
    "split axis": (
        lambda s, x: s.head(s.hidden(x).view(5, 2, 2).flatten(1)),
        {},
        "they go through the operation 'view' (node 'view'), of which it is not known that it keeps units apart",
    ),
    "softmax": (
        lambda s, x: s.head(s.hidden(x).softmax(-1)),
        {},
        "the operation 'softmax' (node 'softmax') normalises over them",
    ),
    "softmax module": (
        lambda s, x: s.head(s.soft(s.hidden(x))),
        {"soft": lambda: nn.Softmax(1)},
        "module 'soft' (Softmax) normalises over them",
    ),
    "mean": (
        lambda s, x: s.head((h := s.hidden(x)) - h.mean(1, keepdim=True)),
        {},
        "the operation 'mean' (node 'mean') goes over them",
    ),
    "chunk": (
        lambda s, x: s.head(torch.cat(s.hidden(x).chunk(2, 1), 1)),
        {},
        "the operation 'chunk' (node 'chunk') divides them into parts",
    ),
    "index": (
        lambda s, x: s.head(h := s.hidden(x)) + h[:, :3],
        {},
        "the operation 'getitem' (node 'getitem') takes some of them by their place",
    ),
    "constant": (
        lambda s, x: s.head(s.hidden(x) + x[:, :4]),
        {},
        "the operation 'add' (node 'add') combines them with something of fixed size",
    ),
    "other arrangement": (
        lambda s, x: s.head(s.hidden(x) * torch.cat((h := s.pair(x), h), 1)),
        {"pair": lambda: nn.Linear(6, 2)},
        "the operation 'mul' (node 'mul') combines them with units in another arrangement",
    ),
    "matmul": (
        lambda s, x: s.head(h := s.hidden(x)) + (h @ h.T).sum(1, keepdim=True),
        {},
        "the operation 'matmul' (node 'matmul') sums over them",
    ),
    "unknown operation": (
        lambda s, x: s.head(torch.cumsum(s.hidden(x), 1)),
        {},
        "they go through the operation 'cumsum' (node 'cumsum'), of which it is not known that it keeps units apart",
    ),
    "unknown module": (
        lambda s, x: s.head(s.bilinear(s.hidden(x), x)),
        {"bilinear": lambda: nn.Bilinear(4, 6, 4)},
        "they go through module 'bilinear' (Bilinear), of which it is not known that it keeps units apart",
    ),
    "attention": (
        lambda s, x: s.head(s.attend(h := s.hidden(x), h, h)[0]),
        {"attend": lambda: nn.MultiheadAttention(4, 2)},
        "they go through module 'attend' (MultiheadAttention), of which it is not known that it keeps units apart",
    ),
    "called twice": (
        lambda s, x: s.head(s.again(s.again(s.hidden(x)))),
        {"again": lambda: nn.Linear(4, 4)},
        "module 'again' is called 2 times in one forward",
    ),
    "taken directly": (
        lambda s, x: s.head(s.hidden(x)) + s.hidden.weight.sum(),
        {},
        "the forward takes hidden.weight by itself as well as through its module",
    ),
    "two norms": (
        lambda s, x: s.wide(s.norm(torch.cat((s.hidden(x), x), 1))),
        {"norm": lambda: nn.LayerNorm(10), "wide": lambda: nn.Linear(10, 3)},
        "module 'norm' (LayerNorm) normalises over them together with others, so that its statistics would move",
    ),
    "group norm": (
        lambda s, x: s.head(s.norm(s.hidden(x))),
        {"norm": lambda: nn.GroupNorm(2, 4)},
        "module 'norm' (GroupNorm) has 2 groups of channels, whose borders move",
    ),
    "batch norm over time": (
        lambda s, x: s.head(s.norm(s.hidden(x).unsqueeze(1)).squeeze(1)),
        {"norm": lambda: nn.BatchNorm1d(1)},
        "module 'norm' (BatchNorm1d) averages over them",
    ),
    "first state": (
        lambda s, x: s.cells(x.unsqueeze(0), s.hidden(x[:1]).unsqueeze(0))[0],
        {"cells": lambda: nn.GRU(6, 4, batch_first=True)},
        "they are the first state of module 'cells' (GRU)",
    ),
    "flattened with another": (
        lambda s, x: s.flat(torch.bmm(s.hidden(x).unsqueeze(2), s.pair(x).unsqueeze(1)).flatten(1)),
        {"pair": lambda: nn.Linear(6, 2), "flat": lambda: nn.Linear(8, 2)},
        "the operation 'flatten' (node 'flatten') mixes two axes of units into one",
    ),
    "expand": (
        lambda s, x: s.head(s.hidden(x).expand(5, 4)),
        {},
        "they go through the operation 'expand' (node 'expand'), of which it is not known that it keeps units apart",
    ),
    "weight norm": (
        lambda s, x: s.head(s.normed(s.hidden(x))),
        {"normed": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))},
        "they go through",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_by_name(case):
    run, modules, text = CASES[case]
    found = refusal(Net(run, **{name: module() for name, module in modules.items()}))
    assert found.startswith(text)
    assert found == text or text.endswith((" is", "through"))


def test_a_single_unit_that_is_broadcast():
    net = Net(lambda self, x: self.head(self.one(x) * self.hidden(x)), one=nn.Linear(6, 1))
    text = refusal(net, group="one")
    assert text == "the operation 'mul' (node 'mul') repeats the only one of them"


def test_tied_parameters():
    net = Net(lambda self, x: self.head(self.twin(self.hidden(x))), twin=nn.Linear(4, 4))
    net.other = nn.Linear(4, 4)
    net.other.weight = net.twin.weight
    assert refusal(net) == "one parameter is used in several places: other.weight, twin.weight"


def test_grouped_and_sliding_convolutions():
    images = torch.zeros(2, 4, 6, 6)
    net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 8, 3, groups=2), nn.Flatten(), nn.Linear(128, 2))
    text = "module '1' (Conv2d) has 2 groups of channels, whose borders would move"
    assert refusal(net, images, "0") == text
    assert refusal(net, images, "1") == text
    over_units = nn.Sequential(nn.Linear(6, 6), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    assert refusal(over_units, images, "0") == "module '1' (Conv2d) slides over them"
    pooled = nn.Sequential(nn.Linear(6, 6), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2))
    assert refusal(pooled, images, "0") == "module '1' (MaxPool2d) goes over them"


def test_embeddings_that_are_more_than_a_table():
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    for options, text in (({"max_norm": 1.0}, "a largest norm of its rows"), ({"sparse": True}, "sparse gradients")):
        net = nn.Sequential(nn.Embedding(5, 4, **options), nn.Linear(4, 2))
        assert refusal(net, tokens, "0") == f"module '0' (Embedding) has {text}"


def test_projected_lstm():
    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = nn.LSTM(6, 4, proj_size=2)
            self.head = nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Any:
            return self.head(self.cells(x)[0])

    inputs = torch.zeros(5, 2, 6, dtype=torch.float64)
    assert refusal(Projected().double(), inputs, "cells") == "module 'cells' (LSTM) projects its states to 2"


@pytest.mark.parametrize("norm", [nn.GroupNorm(4, 4), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)])
def test_norms_of_each_channel_are_exact(norm):
    net = nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).double()
    images = torch.randn(3, 2, 4, 4, generator=generator(), dtype=torch.float64)
    surgeon, before = Surgeon(net, images), net(images)
    surgeon.widen("0", 7, generator=generator())
    assert (net(images) - before).abs().max() < 1e-10


@pytest.mark.parametrize("norm", [nn.GroupNorm(1, 4), nn.LayerNorm([4, 2, 2]), nn.RMSNorm([4, 2, 2])])
def test_norms_over_all_channels_are_exact_for_whole_multiples(norm):
    net = nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.Flatten(), nn.Linear(16, 3)).double()
    images = torch.randn(3, 2, 4, 4, generator=generator(), dtype=torch.float64)
    surgeon, before = Surgeon(net, images), net(images)
    with pytest.raises(InputError, match="only to whole multiples, not to 6: module '1'"):
        surgeon.widen("0", 6, generator=generator())
    surgeon.widen("0", 12, generator=generator())
    assert (net(images) - before).abs().max() < 1e-10
    surgeon.narrow("0", 4)
    assert torch.equal(net(images), before)


def test_sizes_that_follow_are_not_refused():
    def run(self: Any, x: Tensor) -> Tensor:
        hidden = F.relu(self.hidden(x))
        batch, units = hidden.shape
        split = torch.stack((hidden, 2 * hidden), dim=1)  # (5, 2, units)
        return self.head(split.permute(1, 0, 2)[0].reshape(batch, units).clamp(min=0.0).squeeze())

    net = Net(run).double()
    inputs = torch.randn(5, 6, generator=generator(), dtype=torch.float64)
    surgeon, before = Surgeon(net, inputs), net(inputs)
    surgeon.widen("hidden", 9, generator=generator())
    assert (net(inputs) - before).abs().max() < 1e-10


def test_networks_that_cannot_be_traced_or_run():
    branch = Net(lambda self, x: self.head(self.hidden(x)) if x.sum() > 0 else self.head(-self.hidden(x)))
    with pytest.raises(
        InputError, match=r"^Net cannot be traced by torch.fx: .*control flow.*; units and layers can be"
    ):
        Surgeon(branch, torch.zeros(5, 6))
    plain = Net(lambda self, x: self.head(self.hidden(x)))
    with pytest.raises(InputError, match=r"^Net fails on the example inputs: RuntimeError: .*; give a batch as its"):
        Surgeon(plain, torch.zeros(5, 7))
    two = Net(lambda self, x: self.head(self.hidden(x) if self.training else self.hidden(x).relu()))
    with pytest.raises(
        InputError, match=r"^Net runs other operations in training than in evaluation; units and layers"
    ):
        Surgeon(two, torch.zeros(5, 6))
    with pytest.raises(InputError, match=r"^example_inputs is NoneType; give a tensor, or a tuple"):
        Surgeon(plain, None)


def test_looking_leaves_the_network_as_it_was():
    net, images = make("cnn")
    net[1].eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    surgeon = Surgeon(net, images)
    assert surgeon.cost.forward_flops > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert [module.training for module in net][:3] == [True, False, True]
