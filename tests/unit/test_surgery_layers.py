"""Deepening and taking layers out: the function, exact inverses, optimizer groups, plans, and refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery_networks import assert_consistent, generator, make, train, weights
from trimtab.errors import InputError
from trimtab.surgery import Deepened, Head, Surgeon, replay


def test_deepening_keeps_the_function_to_the_bit_without_batch_norm():
    for network, after in (("mlp", "2"), ("digits-mlp", "0"), ("mnist-cnn", "2"), ("cifar10-cnn", "7")):
        model, inputs = make(network)
        model.eval()
        surgeon, before = Surgeon(model, inputs), model(inputs)
        change = surgeon.deepen(after)
        assert torch.equal(model(inputs), before)
        assert (change.operation, change.target, change.units) == ("deepen", after, ())
        assert change.new_size == change.old_size + 1 == len(surgeon.layers)
        assert change.cost_after.forward_flops > change.cost_before.forward_flops


@pytest.mark.parametrize(("network", "after"), [("cnn", "0"), ("cnn", "4"), ("residual", "stem"), ("residual", "one")])
def test_deepening_behind_batch_norm_keeps_the_function_in_evaluation(network, after):
    model, inputs = make(network)
    model.eval()
    surgeon, before = Surgeon(model, inputs), model(inputs)
    surgeon.deepen(after)
    assert (model(inputs) - before).abs().max() < 1e-10


def test_in_training_the_new_batch_norm_is_nearly_the_identity_on_the_example_inputs():
    """Statistics of the example inputs are those of evaluation; so the batch norms before are put to them as well."""
    model, inputs = make("cnn")
    model[1].running_mean, model[1].running_var = _statistics(model[0](inputs))
    model[5].running_mean, model[5].running_var = _statistics(model[:5].eval()(inputs))
    twin = copy.deepcopy(model).train()
    Surgeon(model.train(), inputs).deepen("4")
    new: Any = model[5][-1]
    assert torch.allclose(new.weight, (new.running_var + new.eps).sqrt(), rtol=1e-12)
    assert (model(inputs) - twin(inputs)).abs().max() < 1e-10


def _statistics(values: Tensor) -> tuple[Tensor, Tensor]:
    flat = values.detach().transpose(0, 1).flatten(1)
    return flat.mean(1), flat.var(1, unbiased=False)


def test_what_is_put_in_and_where():
    model, inputs = make("cnn")
    norm = model[1]
    surgeon = Surgeon(model, inputs)
    surgeon.deepen("0")
    new = model[1]
    assert isinstance(new, Deepened)
    assert [type(module) for module in new] == [nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.BatchNorm2d]
    assert new.host is norm
    assert (new.layer.kernel_size, new.layer.padding) == ((3, 3), (1, 1))
    ones = torch.ones(1, 4, 3, 3, dtype=torch.float64)
    assert torch.equal(new.layer(ones), ones)
    assert surgeon.layers == ("0", "1.2", "4", "8", "11")
    surgeon.deepen("4")  # an even kernel has no middle: 3 x 3 is put in; no bias behind it, as before
    assert (model[5].layer.kernel_size, model[5].layer.bias) == ((3, 3), None)


@pytest.mark.parametrize(("network", "after"), [("cnn", "0"), ("mlp", "2"), ("residual", "one"), ("mnist-cnn", "7")])
def test_taking_out_what_was_put_in_leaves_no_trace(network, after):
    model, inputs = make(network)
    optimizer = torch.optim.Adam(model.parameters())
    train(model, inputs, optimizer)
    surgeon, before, outputs = Surgeon(model, inputs, optimizer), weights(model.eval()), model(inputs)
    state = copy.deepcopy(optimizer.state_dict())
    structure = repr(model)
    surgeon.deepen(after)
    assert_consistent(model, optimizer)
    change = surgeon.remove_layer()
    assert change.operation == "remove_layer"
    assert_consistent(model, optimizer)
    assert torch.equal(model(inputs), outputs)
    assert list(model.state_dict()) == list(before)
    assert repr(model) == structure
    after_state = optimizer.state_dict()
    assert after_state["param_groups"] == state["param_groups"]
    for place, expected in state["state"].items():
        assert all(torch.equal(after_state["state"][place][key], expected[key]) for key in expected)


def test_new_parameters_come_where_a_fresh_optimizer_has_them():
    model, inputs = make("cnn")
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "lr": 0.3},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, 0.1)
    train(model, inputs, optimizer)
    surgeon = Surgeon(model, inputs, optimizer)
    surgeon.deepen("0")
    surgeon.deepen("1.2")
    first, second = optimizer.param_groups
    assert [id(p) for p in first["params"]] == [id(p) for p in model.parameters() if p.ndim > 1]
    assert [id(p) for p in second["params"]] == [id(p) for p in model.parameters() if p.ndim <= 1]
    assert (first["lr"], second["weight_decay"]) == (0.3, 0.0)
    new = model[1].layer
    assert new.weight not in optimizer.state
    train(model, inputs, optimizer)
    assert float(optimizer.state[new.weight]["step"]) == 1.0


def test_names_given_to_the_optimizer_follow():
    model, inputs = make("mlp")
    optimizer = torch.optim.SGD(model.named_parameters(), 0.1)
    surgeon = Surgeon(model, inputs, optimizer)
    surgeon.deepen("2")
    surgeon.widen("0", 7, generator=generator())
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    surgeon.remove_layer("2.2")
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]


def test_a_frozen_layer_gets_a_frozen_one_behind_it_that_the_optimizer_does_not_have():
    model, inputs = make("mlp")
    model[2].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    Surgeon(model, inputs, optimizer).deepen("2")
    assert not any(p.requires_grad for p in model[2].parameters())
    assert len(optimizer.param_groups[0]["params"]) == 4


def test_the_least_important_layer_is_the_one_nearest_to_the_identity():
    hidden = [layer for _ in range(3) for layer in (nn.Linear(4, 4), nn.ReLU())]
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), *hidden, nn.Linear(4, 2)).double()
    with torch.no_grad():
        for place, distance in ((2, 0.5), (4, 0.1), (6, 0.3)):
            model[place].weight.copy_(torch.eye(4) + distance * torch.ones(4, 4) / 2)
            model[place].bias.fill_(distance / 4)
    inputs = torch.randn(5, 3, generator=generator(), dtype=torch.float64)
    surgeon = Surgeon(model, inputs)
    # |A - 1| = 2 d, |b| = d / 2, |1| = 2
    assert surgeon.removable() == pytest.approx({"4": 0.125, "6": 0.375, "2": 0.625})
    assert surgeon.remove_layer().target == "4"
    assert isinstance(model[4], nn.Identity)
    assert surgeon.remove_layer("2").target == "2"
    expected = model[8](F.relu(model[6](F.relu(model[0](inputs)))))
    assert torch.equal(model(inputs), expected)
    assert surgeon.layers == ("0", "6", "8")


def test_an_activation_that_is_not_idempotent_goes_with_its_layer():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    inputs = torch.randn(5, 3, generator=generator())
    expected = model[4](torch.tanh(model[0](inputs)))
    Surgeon(model, inputs).remove_layer("2")
    assert torch.equal(model(inputs), expected)


def test_a_layer_goes_with_its_batch_norm():
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(),
        nn.Flatten(), nn.Linear(48, 2),
    ).eval()  # fmt: skip
    inputs = torch.randn(5, 2, 4, 4, generator=generator())
    expected = model[6](F.relu(model[0](inputs)).flatten(1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    Surgeon(model, inputs, optimizer).remove_layer()
    assert torch.equal(model(inputs), expected)
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias", "6.weight", "6.bias"]
    assert_consistent(model, optimizer)


def test_a_layer_put_in_between_stays_when_the_one_before_it_goes():
    model, inputs = make("cnn")
    model.eval()
    surgeon, before = Surgeon(model, inputs), model(inputs)
    surgeon.deepen("0")
    surgeon.deepen("1.2")
    assert surgeon.layers[:3] == ("0", "1.2", "1.3.2")
    surgeon.remove_layer("1.2")  # its batch norm holds the second one
    assert surgeon.layers[:2] == ("0", "1.3.2")
    assert (model(inputs) - before).abs().max() < 1e-10


def test_deepened_layers_are_widened_and_the_plan_makes_the_same_network():
    model, inputs = make("cnn")
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    surgeon = Surgeon(model, inputs, optimizer)
    surgeon.deepen("0")
    train(model, inputs, optimizer)
    surgeon.widen("1.2", 7, generator=generator())
    surgeon.widen("0", 6, generator=generator())
    train(model, inputs, optimizer, 2)
    surgeon.narrow("8", 3)
    surgeon.deepen("4")
    fresh, _ = make("cnn")
    fresh_optimizer = torch.optim.Adam(fresh.parameters(), 0.01)
    again = replay(fresh, inputs, surgeon.plan, fresh_optimizer)
    fresh.load_state_dict(model.state_dict())
    fresh_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert again.plan == surgeon.plan
    assert again.groups == surgeon.groups
    assert again.cost == surgeon.cost
    assert train(model, inputs, optimizer) == train(fresh, inputs, fresh_optimizer)
    # The replayed surgeon knows of the copies, too.
    assert again.narrow("1.2", 4).units == surgeon.narrow("1.2", 4).units == (4, 5, 6)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


def test_the_deepened_network_is_one_that_torch_can_copy_and_script_nothing_else():
    model, inputs = make("residual")
    surgeon = Surgeon(model.eval(), inputs)
    surgeon.deepen("one")
    assert torch.equal(copy.deepcopy(model)(inputs), model(inputs))
    assert [name for name in model.state_dict() if name.startswith("norm_one.2")] == [
        "norm_one.2.weight",
        "norm_one.2.bias",
    ]


def test_modes_of_single_modules_stay():
    model, inputs = make("cnn")
    model.train()
    model[1].eval()  # a frozen batch norm
    surgeon = Surgeon(model, inputs)
    surgeon.deepen("0")
    assert [module.training for module in model[1]] == [False, True, True, False]
    assert model[1].training
    surgeon.remove_layer()
    assert (model[1].training, model[0].training) == (False, True)


def test_new_layers_are_drawn_from_no_generator():
    model, inputs = make("cnn")
    state = torch.get_rng_state()
    surgeon = Surgeon(model, inputs)
    surgeon.deepen("0")
    surgeon.remove_layer()
    assert torch.equal(torch.get_rng_state(), state)


class Forked(nn.Module):
    """What `hidden` makes is used before its activation, too."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(3, 4)
        self.same = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.hidden(x)
        x = F.relu(x) + x
        return self.head(torch.tanh(self.same(x)))


def test_refusals_of_deepening():
    model, inputs = make("mlp")
    surgeon = Surgeon(model, inputs)
    with pytest.raises(
        InputError, match=r"behind '0': its activation is Tanh, and Tanh\(Tanh\(x\)\) is not Tanh\(x\), so"
    ):
        surgeon.deepen("0")
    with pytest.raises(InputError, match="no layer can be put in behind '4': what it makes is the network's output"):
        surgeon.deepen("4")
    with pytest.raises(InputError, match="module '3' is ReLU; layers are put in behind, and taken out of, Linear and"):
        surgeon.deepen("3")
    with pytest.raises(InputError, match="unknown layer '9'; known: 0, 2, 4"):
        surgeon.deepen("9")
    forked = Surgeon(Forked(), torch.zeros(5, 3))
    with pytest.raises(InputError, match="what layer 'hidden' puts out is used in 2 places before any activation"):
        forked.deepen("hidden")
    with pytest.raises(InputError, match="behind 'same': its activation is tanh, and tanh"):
        forked.deepen("same")
    lstm, words = make("lstm")
    with pytest.raises(InputError, match="module 'cells' is LSTM; layers are put in"):
        Surgeon(lstm, words).deepen("cells")
    shared, inputs = make("residual")
    shared.also = shared.norm_one
    with pytest.raises(
        InputError, match=r"'norm_one' is registered in several places \(norm_one, also\); it has to stay"
    ):
        Surgeon(shared, inputs).deepen("one")
    for norm, missing in ((nn.BatchNorm1d(4, affine=False), "weights"), (_without_statistics(), "running statistics")):
        net = nn.Sequential(nn.Linear(3, 4), norm, nn.ReLU(), nn.Linear(4, 2))
        with pytest.raises(InputError, match=f"behind '0': its batch norm '1' has no {missing}, so that a second one"):
            Surgeon(net, torch.zeros(5, 3)).deepen("0")
    assert surgeon.plan == []


def _without_statistics() -> nn.Module:
    return nn.BatchNorm1d(4, track_running_stats=False)


def test_refusals_of_taking_out():
    model, inputs = make("mlp")
    surgeon = Surgeon(model, inputs)
    surgeon.widen("2", 6, generator=generator())
    text = (
        "layer '0' cannot be taken out: it reads the network's input; layer '2' cannot be taken out: it reads (7, 5) "
        "and makes (7, 6), which have to be equal; layer '4' cannot be taken out: it makes the network's output"
    )
    with pytest.raises(InputError) as caught:
        surgeon.remove_layer()
    assert str(caught.value) == f"no layer can be taken out: {text}"
    with pytest.raises(InputError, match=r"^layer '2' cannot be taken out: it reads \(7, 5\) and makes"):
        surgeon.remove_layer("2")
    with pytest.raises(InputError, match="unknown layer 'x'; known: 0, 2, 4"):
        surgeon.remove_layer("x")
    with pytest.raises(InputError, match="layer 'same' cannot be taken out: its activation tanh would then be applied"):
        Surgeon(Forked(), torch.zeros(5, 3)).remove_layer("same")


def test_refusals_of_plans():
    model, inputs = make("mlp")
    good = {"operation": "widen", "target": "0", "units": [1]}
    cases: list[tuple[Any, str]] = [
        ({"operation": "grow", "target": "0", "units": [1]}, "entry 1 of the plan is .*'grow'.*; expected {'op"),
        ({"operation": "widen", "target": "0", "units": []}, "entry 1 of the plan is"),
        ({"operation": "deepen", "target": "0", "units": [1]}, "entry 1 of the plan is"),
        ("widen", "entry 1 of the plan is 'widen'; expected"),
        ({"operation": "widen", "target": "0", "units": [6]}, r"entry 1 \(widen '0'\): units is \[6\]; give different"),
        ({"operation": "narrow", "target": "7", "units": [1]}, r"entry 1 \(narrow '7'\): unknown group of units '7'"),
        ({"operation": "deepen", "target": "0", "units": []}, "^the plan does not fit the network: entry 1 "),
        ({"operation": "remove_layer", "target": "0", "units": []}, r"entry 1 \(remove_layer '0'\): layer '0' cannot"),
    ]  # fmt: skip
    for entry, text in cases:
        with pytest.raises(InputError, match=text):
            replay(copy.deepcopy(model), inputs, [good, entry])


def with_head() -> tuple[nn.Sequential, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        body = [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()]
        model = nn.Sequential(*body, Head(nn.Flatten(), nn.Linear(4 * 9, 4), nn.ReLU(), nn.Linear(4, 3)))
        return model, torch.randn(5, 2, 3, 3)


def test_layers_in_a_head_do_not_count_and_stay_but_their_units_move():
    model, inputs = with_head()
    surgeon = Surgeon(model, inputs)
    assert surgeon.hidden == ("0", "2")
    assert surgeon.layers == ("0", "2", "4.1", "4.3")
    places, refused = surgeon.deepenable()
    assert places == ["0", "2"]
    text = "layer '4.1' stands in the Head '4'; none is put in behind it, and it has to stay"
    assert refused["4.1"] == text
    assert list(surgeon.removable()) == ["2"]
    for change in (surgeon.deepen, surgeon.remove_layer):
        with pytest.raises(InputError) as caught:
            change("4.1")
        assert str(caught.value) == text
    before = model(inputs)
    surgeon.widen("4.1", 6, generator=generator())
    assert model[4][1].out_features == 6
    torch.testing.assert_close(model(inputs), before)
    surgeon.remove_layer("2")
    assert surgeon.hidden == ("0",)


class AfterRecurrent(nn.Module):
    """A dense layer that is the only one a layer could be put in behind."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.GRU(3, 4, batch_first=True)
        self.dense = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.dense(self.cells(x)[0][:, -1])))


@pytest.mark.parametrize("is_split", [False, True])
def test_a_layer_is_put_where_one_was_taken_out(is_split):
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        with torch.random.fork_rng():
            torch.manual_seed(2)
            model = AfterRecurrent()
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim == 1]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}] if is_split else model.parameters()
        return model, torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()

    inputs = torch.randn(6, 5, 3, generator=generator())
    model, optimizer = fresh()
    step(model, optimizer)
    surgeon = Surgeon(model, inputs, optimizer)
    assert surgeon.deepenable()[0] == ["dense"]
    surgeon.remove_layer("dense")
    assert (type(model.dense), surgeon.hidden) == (nn.Identity, ("cells",))
    before = model(inputs)
    surgeon.deepen("dense")
    assert torch.equal(model(inputs), before)
    assert (type(model.dense.layer), surgeon.hidden) == (nn.Linear, ("cells", "dense.1"))
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    wanted = list(model.parameters())
    if is_split:
        wanted = [p for p in wanted if p.ndim > 1] + [p for p in wanted if p.ndim == 1]
    assert all(one is other for one, other in zip(held, wanted, strict=True))
    step(model, optimizer)
    assert not torch.equal(model.dense.layer.weight, torch.eye(4))
    surgeon.deepen("dense.1")  # behind the one that was put in, as behind any other
    assert surgeon.hidden == ("cells", "dense.1.0", "dense.1.2")
    twin, its_optimizer = fresh()
    replay(twin, inputs, surgeon.plan, its_optimizer)
    twin.load_state_dict(model.state_dict())
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(model, optimizer)
    step(twin, its_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    surgeon.remove_layer("dense.1.2")
    surgeon.remove_layer("dense.1")
    assert (type(model.dense), surgeon.hidden) == (nn.Identity, ("cells",))
    surgeon.follow([])
    assert (type(model.dense), surgeon.hidden) == (nn.Linear, ("cells", "dense"))


def test_a_place_whose_activation_went_too_takes_no_layer():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    surgeon = Surgeon(model, torch.zeros(2, 3))
    surgeon.remove_layer("2")
    text = "no layer can be put in where '2' was taken out: no activation follows, or a batch norm"
    with pytest.raises(InputError, match=text):
        surgeon.deepen("2")
    assert surgeon.deepenable()[1]["2"] == text
    # A user's own Identity is no such place.
    surgeon = Surgeon(nn.Sequential(nn.Linear(3, 4), nn.Identity(), nn.ReLU(), nn.Linear(4, 2)), torch.zeros(2, 3))
    with pytest.raises(InputError, match="module '1' is Identity; layers are put in behind, and taken out of, Linear"):
        surgeon.deepen("1")


def test_a_layer_that_is_first_in_the_order_of_parameters_is_not_put_in_again():
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second, self.first, self.head = nn.Linear(4, 4), nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.second(torch.relu(self.first(x)))))

    surgeon = Surgeon(Backwards(), torch.zeros(2, 3))
    surgeon.remove_layer("second")
    with pytest.raises(InputError, match="no layer can be put in where the network's first one, in the order of its"):
        surgeon.deepen("second")
    assert surgeon.hidden == ("first",)
    assert surgeon.deepen("first").new_size == 3
