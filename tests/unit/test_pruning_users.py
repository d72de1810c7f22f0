"""Networks as users have them: written in place, computed weights, products, sigmoids; scored and counted right."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trimtab
from trimtab.cost import count_by_module
from trimtab.errors import InputError
from trimtab.pruning.evaluation import CachedEvaluator, _Run
from trimtab.pruning.in_place import writers
from trimtab.pruning.network import PrunableNetwork
from trimtab.pruning.scores import score_sum
from trimtab.pruning.validation import Validation


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Net(nn.Module):
    """Four layers; `kind` says in which way the forward writes in place, or what else it does."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 8)
        self.head, self.side = nn.Linear(8, 3), nn.Linear(8, 3)
        self.act = nn.ReLU(inplace=True)
        self.unused = nn.Linear(5, 5)
        self.register_buffer("near", numbers(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "inputs":
            x -= 0.5
        x = self.one(x)
        if self.kind == "products":
            return self.head(torch.relu(self.near @ self.two(torch.relu(torch.matmul(self.near, x)))))
        if self.kind == "count":
            x = x / torch.numel(x)
        y = self.two(x)
        if self.kind == "older name":
            F.relu_(x)
        elif self.kind == "view":
            x.view(-1).mul_(2.0)
        elif self.kind == "sum":
            y += x
        elif self.kind == "module":
            x = self.act(x)
        return self.head(y) + self.side(x)


def prunable(kind: str, shape: tuple[int, ...] = (5, 6)) -> tuple[PrunableNetwork, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net(kind).double()
    inputs = numbers(*shape)
    return PrunableNetwork(model, inputs[:1].clone(), multiple=1), inputs


@pytest.mark.parametrize("kind", ["inputs", "older name", "view", "sum", "module", "count"])
def test_what_is_kept_is_not_written_into(kind: str) -> None:
    net, inputs = prunable(kind)
    before = inputs.clone()
    validation = Validation((inputs, torch.zeros(5, 3, dtype=torch.float64)), net.model, 1)
    evaluator = CachedEvaluator(net, validation)
    for configuration in [net.dense, (3, 5)[: len(net.parts)], (8, 2)[: len(net.parts)], net.dense]:
        cut = net.cut(configuration)
        assert (evaluator.outputs(configuration) - cut(inputs.clone())).abs().max() < 1e-10
        assert evaluator.score(configuration) == pytest.approx(validation.rate(cut))
    assert torch.equal(inputs, before)
    by_older_name = writers(net.couplings.trace.graph, net.model, net.inputs) is None
    assert by_older_name == (kind in ("older name", "view"))


def test_products_of_results_cost_what_is_counted() -> None:
    net, inputs = prunable("products", (5, 4, 6))
    for one, two in [net.dense, (3, 5), (8, 2)]:
        # 4 places: two products with the 4 x 4 numbers, and three layers.
        assert net.flops((one, two)) == 2 * 4 * (6 * one + 4 * one + one * two + 4 * two + 3 * two)
        assert net.flops((one, two)) == count_by_module(net.cut((one, two)), inputs[:1])[""]


def test_a_layer_that_is_never_called_is_named_as_such() -> None:
    net, _ = prunable("sum")
    assert net.refused["unused"] == "the forward never calls it"


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore")
def test_computed_weights_are_refused(norm: object) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))
    norm(model[0])
    with torch.no_grad():
        model(torch.zeros(1, 6))  # after which it can be copied, and looks as if it had a weight of its own
    net = PrunableNetwork(model, torch.zeros(1, 6), multiple=1)
    assert "is computed from other tensors" in net.refused["0"]
    assert net.cut(net.smallest())(torch.zeros(2, 6)).shape == (2, 3)


def test_a_batch_norm_over_units_takes_an_example_of_one_sample() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)).eval()
    net = PrunableNetwork(model, torch.zeros(1, 1, 4, 4), multiple=1)
    assert net.flops((2,)) == 2 * (2 * 9 * 4 + 8 * 3)
    assert net.cut((2,))[2].running_mean.shape == (8,)


def test_random_importance_of_heads_is_drawn_for_each() -> None:
    layer = nn.TransformerEncoderLayer(16, 8, 32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    net = PrunableNetwork(nn.Sequential(encoder), torch.zeros(1, 3, 16), importance="random")
    heads = [scores for scores, part in zip(net.scores, net.parts, strict=True) if part.kind == "heads"]
    assert len(heads) == 2
    assert not torch.equal(*heads)


def test_a_sigmoid_at_the_end_is_a_probability() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1), nn.Sigmoid())
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.1], [0.0, 0.1]]))
        model[2].weight.copy_(torch.tensor([[1.0, -1.0, 0.0, 0.0]]))
        model[0].bias.zero_()
        model[2].bias.zero_()
    inputs = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    for targets in (torch.tensor([1, 0, 1, 1]), torch.tensor([[1], [0], [1], [1]])):
        result = trimtab.prune(model, inputs[:1], validation=(inputs, targets), agent="uniform")
        assert result.report.dense.score == 0.75
    logits = Validation((inputs, torch.tensor([1, 0, 1, 1])), model[:3], 1)
    assert (logits.threshold, logits.rate(model[:3])) == (0.0, 0.75)


def test_scores_are_of_what_belongs_together() -> None:
    with pytest.raises(InputError, match=r"puts out \(2, 3\) and the targets are torch.float32 \(3, 2\)"):
        score_sum(torch.zeros(2, 3), torch.zeros(3, 2))
    assert score_sum(torch.ones(3, 1), torch.zeros(3)) == (-3.0, 3)
    assert score_sum(torch.ones(3), torch.zeros(3, 1)) == (-3.0, 3)
    total, n = score_sum(torch.tensor([[0.0, math.nan], [1.0, 0.0]]), torch.tensor([0, 0]))
    assert (math.isnan(total), n) == (True, 2)
    inputs = torch.zeros(3, 4)
    with pytest.raises(
        InputError, match=r"the targets have a class 7 and the network puts out \(3, 2\): classes 0 to 1"
    ):
        Validation((inputs, torch.tensor([0, 1, 7])), nn.Linear(4, 2), 1)
    assert len(Validation((inputs, torch.tensor([0, 1, -100])), nn.Linear(4, 2), 1).batches) == 1


def test_fine_tuning_that_ends_in_nan_is_a_failure() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    inputs, n_calls = torch.randn(9, 6), 0

    def fine_tune(net: nn.Module) -> None:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 1:
            net[0].weight.data.fill_(math.nan)

    result = trimtab.prune(
        model, inputs[:1], validation=(inputs, torch.zeros(9, dtype=torch.long)), fine_tune=fine_tune,
        agent="exhaustive", n_best=2,
    )  # fmt: skip
    assert [c.failure for c in result.report.candidates] == ["", "its score after fine-tuning is nan"]


class Optional(nn.Module):
    """A second input that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(6, 8), nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, y: Tensor | None = None, scale: float = 2.0) -> Tensor:
        x = self.one(x) * scale
        if y is not None:
            x = x + self.two(y)
        return self.head(torch.relu(x))


def test_an_input_that_may_be_left_out() -> None:
    torch_inputs = (torch.ones(1, 6), torch.ones(1, 4))
    without = PrunableNetwork(Optional(), torch_inputs[0], multiple=1)
    assert [part.layers for part in without.parts] == [("one",)]
    assert without.refused["two"] == "the forward never calls it"
    cut = without.cut((3,))
    validation = Validation((torch.ones(2, 6), torch.zeros(2, dtype=torch.long)), without.model, 1)
    assert torch.allclose(CachedEvaluator(without, validation).outputs((3,)), cut(torch.ones(2, 6)), atol=1e-6)
    both = PrunableNetwork(Optional(), torch_inputs, multiple=1)
    assert [part.layers for part in both.parts] == [("one", "two")]


def test_results_are_let_go_of_when_they_were_read_for_the_last_time(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [layer for _ in range(20) for layer in (nn.Tanh(), nn.Dropout())]  # none of which is kept
    net = PrunableNetwork(nn.Sequential(nn.Linear(6, 8), *layers, nn.Linear(8, 3)), torch.zeros(1, 6), multiple=1)
    inputs = torch.zeros(2, 6)
    evaluator = CachedEvaluator(net, Validation((inputs, torch.zeros(2, dtype=torch.long)), net.model, 1))
    most: list[int] = []
    computed = _Run._computed

    def watched(run: _Run, node: object) -> object:
        most.append(len(run._values))
        return computed(run, node)

    monkeypatch.setattr(_Run, "_computed", watched)
    evaluator.score(net.dense)
    assert len(most) == 42
    assert max(most) <= 2
