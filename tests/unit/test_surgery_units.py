"""Widening and narrowing: the function, exact undoing, and optimizer state against slow twins written out by hand."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn

from surgery_networks import ALL, TASKS, assert_consistent, generator, make, train, weights
from trimtab.errors import InputError
from trimtab.surgery import Surgeon, replay

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, 0.01, amsgrad=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 0.01),
}


@pytest.mark.parametrize("network", ALL + TASKS)
def test_widening_keeps_the_function_and_narrowing_gives_back_the_bits(network):
    model, inputs = make(network)
    model.eval()
    surgeon = Surgeon(model, inputs)
    before, outputs = weights(model), model(inputs)
    open_groups = [group for group in surgeon.groups if group.refusal is None]
    assert open_groups
    for group in open_groups:
        n = 2 * group.size if group.whole_multiples else group.size + group.size // 2 + 1
        change = surgeon.widen(group.name, n, generator=generator())
        assert (change.old_size, change.new_size) == (group.size, surgeon.group(group.name).size) == (group.size, n)
        assert change.cost_after.forward_flops >= change.cost_before.forward_flops
        assert change.cost_after.parameters > change.cost_before.parameters
        assert (model(inputs) - outputs).abs().max() < 1e-10
    for group in reversed(open_groups):
        change = surgeon.narrow(group.name, group.size)
        assert change.units == tuple(range(group.size, change.old_size))
    after = weights(model)
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(model(inputs), outputs)


@pytest.mark.parametrize("network", ["cnn", "residual", "lstm", "mlp"])
def test_training_mode_without_dropout_is_kept_too(network):
    model, inputs = make(network)
    model.train()
    twin = copy.deepcopy(model)
    surgeon = Surgeon(model, inputs)
    for group in surgeon.groups:
        if group.refusal is None:
            surgeon.widen(group.name, 2 * group.size, generator=generator())
    assert (model(inputs) - twin(inputs)).abs().max() < 1e-10


@pytest.mark.parametrize("factor", [3, 5, 7, 8, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_undoing_several_copies_of_each_is_exact_to_the_bit(factor, dtype):
    model, inputs = make("lstm", dtype)
    surgeon = Surgeon(model, inputs)
    before, outputs = weights(model), model(inputs)
    surgeon.widen("cells", 4 * factor, generator=generator())
    shares = model.head.weight.new_tensor([1.0 / factor]) * before["dense.weight"][:, :4].repeat(1, factor)
    rounding = 4 * torch.finfo(dtype).eps * before["dense.weight"].abs().max()
    in_order = model.dense.weight[:, : 4 * factor].gather(1, _by_source(surgeon, 4).expand(7, -1))
    assert (in_order - shares).abs().max() < factor * rounding
    assert (model(inputs) - outputs).abs().max() < 100 * torch.finfo(dtype).eps
    surgeon.narrow("cells", 4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def _by_source(surgeon: Surgeon, size: int) -> Tensor:
    """Places of the units such that sources run 0, 1, ..., size - 1, 0, 1, ..."""
    sources = torch.tensor([*range(size), *surgeon.plan[-1]["units"]])
    return torch.argsort(sources, stable=True).view(size, -1).T.reshape(1, -1)


def test_widening_twice_and_narrowing_in_two_goes():
    model, inputs = make("concatenation")
    surgeon, before = Surgeon(model, inputs), weights(model)
    surgeon.widen("side", 6, generator=generator(1))
    between = weights(model)
    surgeon.widen("side", 9, generator=generator(2))
    surgeon.narrow("side", 6)
    assert all(torch.equal(tensor, between[name]) for name, tensor in model.state_dict().items())
    surgeon.narrow("side", 4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_copies_that_trained_alike_are_still_folded():
    model, inputs = make("mlp")
    optimizer = OPTIMIZERS["adam"](model.parameters())
    surgeon = Surgeon(model, inputs, optimizer)
    surgeon.widen("2", 8, generator=generator())
    train(model, inputs, optimizer, 5)
    outputs = model(inputs)
    change = surgeon.narrow("2", 5)
    assert change.units == (5, 6, 7)
    assert (model(inputs) - outputs).abs().max() < 1e-12


@pytest.mark.parametrize("rule", OPTIMIZERS)
@pytest.mark.parametrize("network", ["mlp", "cnn", "lstm", "gru", "residual"])
def test_optimizer_state_is_given_back_and_trains_on_alike(network, rule):
    """widen + narrow = nothing, for the next steps as well; so every state tensor is where it was."""
    model, inputs = make(network)
    optimizer = OPTIMIZERS[rule](model.parameters())
    train(model, inputs, optimizer, 2)
    twin = copy.deepcopy(model)
    twin_optimizer = OPTIMIZERS[rule](twin.parameters())
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    surgeon = Surgeon(model, inputs, optimizer)
    name = {"lstm": "cells", "gru": "cells", "residual": "stem"}.get(network, "0")
    size = surgeon.group(name).size
    surgeon.widen(name, 2 * size + 1, generator=generator())
    assert_consistent(model, optimizer)
    surgeon.narrow(name, size)
    assert_consistent(model, optimizer)
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, two)
        for key, value in optimizer.state[one].items():
            expected = twin_optimizer.state[two][key]
            if key in ("exp_avg_sq", "max_exp_avg_sq"):  # of the unit that is there three times, v / 9 x 9
                assert torch.allclose(value, expected, rtol=1e-15, atol=0.0)
            else:
                assert torch.equal(value, expected)
    surgeon.widen(name, 2 * size, generator=generator())
    surgeon.narrow(name, size)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("network", ["cnn", "lstm"])
def test_training_goes_on_as_if_nothing_had_been(network):
    model, inputs = make(network)
    optimizer = OPTIMIZERS["adam"](model.parameters())
    train(model, inputs, optimizer, 2)
    twin = copy.deepcopy(model)
    twin_optimizer = OPTIMIZERS["adam"](twin.parameters())
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    surgeon = Surgeon(model, inputs, optimizer)
    group = next(group for group in surgeon.groups if group.refusal is None)
    surgeon.widen(group.name, 2 * group.size, generator=generator())
    surgeon.narrow(group.name, group.size)
    for _ in range(2):
        assert train(model, inputs, optimizer) == train(twin, inputs, twin_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("network", ["mlp", "cnn", "lstm", "gru", "residual", "concatenation"])
def test_first_moments_of_a_widened_network_are_its_own_gradients(network):
    """SGD's first momentum is the gradient: carried over, it has to be the gradient of the widened network."""
    model, inputs = make(network)
    optimizer = torch.optim.SGD(model.parameters(), 0.0, momentum=0.9)
    train(model, inputs, optimizer)
    surgeon = Surgeon(model, inputs, optimizer)
    for group in surgeon.groups:
        if group.refusal is None:
            surgeon.widen(
                group.name, 2 * group.size if group.whole_multiples else group.size + 3, generator=generator()
            )
    carried = {name: optimizer.state[p]["momentum_buffer"].clone() for name, p in model.named_parameters()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    train(model, inputs, torch.optim.SGD(model.parameters(), 0.0))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(carried[name], parameter.grad, rtol=1e-9, atol=1e-14), name
        assert torch.equal(gradients[name], carried[name])


def test_second_moments_of_a_widened_network_are_its_own_squared_gradients():
    model, inputs = make("cnn")
    optimizer = torch.optim.Adam(model.parameters(), 0.0, betas=(0.9, 0.99))
    train(model, inputs, optimizer)
    Surgeon(model, inputs, optimizer).widen("0", 11, generator=generator())  # three or two of each
    second = {name: optimizer.state[p]["exp_avg_sq"].clone() for name, p in model.named_parameters()}
    train(model, inputs, torch.optim.SGD(model.parameters(), 0.0))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(second[name], 0.01 * parameter.grad.square(), rtol=1e-9, atol=1e-20), name


def widened_by_hand(model: nn.Sequential, optimizer: torch.optim.Optimizer, copied: list[int]) -> nn.Sequential:
    """Slow twin: Linear(6, 5), Tanh, Linear(5, 5), ... with its first layer widened unit by unit; state beside it."""
    n = 5 + len(copied)
    sources = [*range(5), *copied]
    new = nn.Sequential(nn.Linear(6, n), nn.Tanh(), nn.Linear(n, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    new.load_state_dict(
        {k: v for k, v in model.state_dict().items() if k not in ("0.weight", "0.bias", "2.weight")}, strict=False
    )
    old = dict(model.named_parameters())
    with torch.no_grad():
        for to, unit in enumerate(sources):
            count = sources.count(unit)
            for column in range(6):
                new[0].weight[to, column] = old["0.weight"][unit, column]
            new[0].bias[to] = old["0.bias"][unit]
            for row in range(5):
                new[2].weight[row, to] = old["2.weight"][row, unit] / count
    states = {name: {k: v.clone() for k, v in optimizer.state[p].items()} for name, p in old.items()}
    for key, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
        rows, bias, columns = [], [], []
        for unit in sources:
            scale = sources.count(unit) ** power
            rows.append([float(x) / scale for x in states["0.weight"][key][unit]])
            bias.append(float(states["0.bias"][key][unit]) / scale)
            columns.append([float(x) for x in states["2.weight"][key][:, unit]])
        for name, values in (("0.weight", rows), ("0.bias", bias), ("2.weight", columns)):
            tensor = torch.tensor(values, dtype=torch.float64)
            states[name][key] = tensor.T.contiguous() if name == "2.weight" else tensor
    new.states = [states[name] for name, _ in new.named_parameters()]  # type: ignore[assignment]
    return new


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_one_step_after_widening_is_that_of_a_fresh_optimizer_with_the_state_worked_out_by_hand(kind):
    model, inputs = make("mlp")
    optimizer = kind(model.parameters(), 0.01, weight_decay=0.1)
    train(model, inputs, optimizer, 3)
    copied = [3, 1, 3]
    twin = widened_by_hand(model, optimizer, copied)
    fresh = kind(twin.parameters(), 0.01, weight_decay=0.1)
    state = dict(enumerate(twin.states))
    fresh.load_state_dict({"state": state, "param_groups": fresh.state_dict()["param_groups"]})
    surgeon = replay(model, inputs, [{"operation": "widen", "target": "0", "units": copied}], optimizer)
    assert surgeon.group("0").size == 8
    loss, twin_loss = train(model, inputs, optimizer), train(twin, inputs, fresh)
    assert abs(loss - twin_loss) < 1e-14
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert (one - two).abs().max() < 1e-14


@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_one_step_after_narrowing_is_that_of_a_fresh_optimizer_of_the_slice(rule):
    model, inputs = make("mlp")
    optimizer = OPTIMIZERS[rule](model.parameters())
    train(model, inputs, optimizer, 3)
    kept = [0, 2, 4]
    sliced = {"0.weight": (kept, slice(None)), "0.bias": (kept,), "2.weight": (slice(None), kept)}
    twin = nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    twin.load_state_dict({k: v[sliced.get(k, ())] for k, v in model.state_dict().items()})
    fresh = OPTIMIZERS[rule](twin.parameters())
    states = {}
    for place, (name, parameter) in enumerate(model.named_parameters()):
        state = optimizer.state[parameter]
        states[place] = {k: (v[sliced.get(name, ())] if v.ndim else v).clone() for k, v in state.items()}
    fresh.load_state_dict({"state": states, "param_groups": fresh.state_dict()["param_groups"]})
    change = Surgeon(model, inputs, optimizer).narrow("0", units=[3, 1])
    assert change.units == (3, 1)
    assert train(model, inputs, optimizer) == train(twin, inputs, fresh)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_narrowing_drops_the_least_important():
    model, inputs = make("mlp")
    surgeon = Surgeon(model, inputs)
    incoming = model[0].weight.double().norm(dim=1)
    outgoing = model[2].weight.double().norm(dim=0)
    assert torch.allclose(surgeon.importance("0"), incoming * outgoing, rtol=1e-12)
    assert torch.allclose(surgeon.importance("0", "incoming"), incoming, rtol=1e-12)
    assert torch.allclose(surgeon.importance("0", "outgoing"), outgoing, rtol=1e-12)
    least = sorted(torch.argsort(incoming * outgoing)[:2].tolist())
    assert list(surgeon.narrow("0", 3).units) == least
    scores = torch.tensor([3.0, 1.0, 2.0])
    assert surgeon.narrow("0", 1, importance=scores).units == (1, 2)


def test_importance_behind_batch_norm_is_its_weight():
    model, inputs = make("cnn")
    outgoing = model[8].weight.double().norm(dim=0)
    product = model[5].weight.double().abs() * outgoing
    assert torch.allclose(Surgeon(model, inputs).importance("4"), product, rtol=1e-12)


def test_narrowing_below_what_was_widened_folds_first_and_then_drops():
    model, inputs = make("mlp")
    surgeon, expected = Surgeon(model, inputs), Surgeon(copy.deepcopy(model), inputs)
    least = expected.narrow("0", 3).units
    surgeon.widen("0", 9, generator=generator())
    assert surgeon.narrow("0", 3).units == (*least, 5, 6, 7, 8)
    for one, two in zip(model.parameters(), expected.model.parameters(), strict=True):
        assert (one - two).abs().max() < 1e-15


def test_a_named_original_hands_over_to_its_copy():
    model, inputs = make("mlp")
    surgeon, outputs = Surgeon(model, inputs), model(inputs)
    surgeon.widen("0", 10, generator=generator())
    surgeon.narrow("0", units=[0, 1, 2, 3, 4])
    assert (model(inputs) - outputs).abs().max() < 1e-14


def test_noise_makes_copies_differ_and_is_drawn_from_the_generator():
    results = []
    for _ in range(2):
        model, inputs = make("lstm")
        outputs = model(inputs)
        surgeon = Surgeon(model, inputs)
        surgeon.widen("cells", 8, generator=generator(4), noise=0.01)
        distance = (model(inputs) - outputs).abs().max().item()
        assert 1e-6 < distance < 0.05
        results.append(weights(model))
        names = [f"{part}_l{layer}" for part in ("weight_ih", "weight_hh") for layer in (0, 1)]
        for name in names:
            weight = getattr(model.cells, name).unflatten(0, (4, 8))
            assert torch.equal(weight[:, :4], make("lstm")[0].cells.state_dict()[name].unflatten(0, (4, 4))) == (
                name == "weight_ih_l0"
            )
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_copies_that_drifted_apart_are_units_of_their_own():
    model, inputs = make("mlp")
    surgeon = Surgeon(model, inputs)
    surgeon.widen("0", 10, generator=generator(), noise=0.5)
    scores = surgeon.importance("0")
    assert list(surgeon.narrow("0", 9).units) == [int(scores.argmin())]


def test_groups_keep_options_and_places():
    model, inputs = make("cnn")
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "lr": 0.3}, {"params": plain, "weight_decay": 0.0}], 0.1)
    train(model, inputs, optimizer)
    surgeon = Surgeon(model, inputs, optimizer)
    surgeon.widen("0", 6, generator=generator())
    surgeon.narrow("4", 3)
    first, second = optimizer.param_groups
    assert (first["lr"], first["weight_decay"], second["lr"], second["weight_decay"]) == (0.3, 0.01, 0.1, 0.0)
    assert [id(p) for p in first["params"]] == [id(p) for p in model.parameters() if p.ndim > 1]
    assert [id(p) for p in second["params"]] == [id(p) for p in model.parameters() if p.ndim <= 1]


def test_frozen_parameters_and_marks_on_them_stay():
    model, inputs = make("mlp")
    model[0].weight.requires_grad_(False)
    model[0].weight.mark = "mine"
    surgeon = Surgeon(model, inputs)
    surgeon.widen("0", 6, generator=generator())
    assert not model[0].weight.requires_grad
    assert model[0].weight.mark == "mine"
    assert model[0].out_features == model[2].in_features == 6


def test_the_record_and_the_plan_are_json():
    model, inputs = make("mlp")
    surgeon = Surgeon(model, inputs)
    change = surgeon.widen("2", 6, generator=generator())
    record = json.loads(json.dumps(change.to_dict()))
    assert record["cost_before"]["forward_flops"] == 2 * 7 * (6 * 5 + 5 * 5 + 5 * 3)
    assert record["cost_after"]["forward_flops"] == 2 * 7 * (6 * 5 + 5 * 6 + 6 * 3)
    assert (record["operation"], record["target"], record["old_size"], record["new_size"]) == ("widen", "2", 5, 6)
    assert json.loads(json.dumps(surgeon.plan)) == [{"operation": "widen", "target": "2", "units": list(change.units)}]


def test_a_change_that_the_network_does_not_survive_is_taken_back(monkeypatch):
    model, inputs = make("mlp")
    optimizer = OPTIMIZERS["adam"](model.parameters())
    train(model, inputs, optimizer)
    surgeon = Surgeon(model, inputs, optimizer)
    before = {name: id(p) for name, p in model.named_parameters()}
    state = {id(p) for p in optimizer.state}

    def fails(*_: object) -> None:
        raise InputError("it does not run")

    monkeypatch.setattr("trimtab.surgery.surgeon.trace", fails)
    with pytest.raises(InputError, match="it does not run"):
        surgeon.widen("0", 9, generator=generator())
    monkeypatch.undo()
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert {id(p) for p in optimizer.state} == state
    assert_consistent(model, optimizer)
    assert (model[0].out_features, surgeon.group("0").size, surgeon.plan) == (5, 5, [])
    assert surgeon.widen("0", 6, generator=generator()).new_size == 6


def test_refusals():
    model, inputs = make("mlp")
    surgeon = Surgeon(model, inputs)
    g = generator()
    cases: list[tuple[object, str]] = [
        (lambda: surgeon.widen("0", 5, generator=g), r"n is 5; to widen '0', which has 5 units, give a whole number"),
        (lambda: surgeon.widen("0", True, generator=g), "n is True; to widen '0'"),
        (lambda: surgeon.widen("0", 6, generator=g, noise=-1.0), "noise is -1.0; expected 0 or more"),
        (lambda: surgeon.widen("9", 6, generator=g), "unknown group of units '9'; known: 0, 2, 4"),
        (lambda: surgeon.widen("4", 6, generator=g), r"the units of '4' \(Linear\) cannot be changed: they are an"),
        (lambda: surgeon.narrow("0", 5), "n is 5; to narrow '0', which has 5 units, give a whole number, 1 to 4"),
        (lambda: surgeon.narrow("0", 0), "n is 0; to narrow '0'"),
        (lambda: surgeon.narrow("0"), "narrow takes either n or units; given: n=None, units=None"),
        (lambda: surgeon.narrow("0", 3, units=[1]), r"narrow takes either n or units; given: n=3, units=\[1\]"),
        (lambda: surgeon.narrow("0", units=[1, 1]), r"units is \[1, 1\]; give different places from 0 to 4, not all 5"),
        (lambda: surgeon.narrow("0", units=[5]), r"units is \[5\]; give different places"),
        (lambda: surgeon.narrow("0", units=[0, 1, 2, 3, 4]), "give different places"),
        (lambda: surgeon.narrow("0", 3, importance="size"), "unknown importance 'size'; known: incoming, outgoing"),
        (lambda: surgeon.narrow("0", 3, importance=torch.ones(4)), r"importance has shape \(4,\); expected one finite"),
    ]  # fmt: skip
    for call, text in cases:
        with pytest.raises(InputError, match=text):
            call()  # type: ignore[operator]
    assert surgeon.plan == []


def test_an_optimizer_that_keeps_something_else_is_refused_by_name():
    model, inputs = make("mlp")
    optimizer = torch.optim.RMSprop(model.parameters(), 0.01)
    train(model, inputs, optimizer)
    with pytest.raises(InputError, match="RMSprop keeps 'square_avg' for its parameters; surgery knows SGD"):
        Surgeon(model, inputs, optimizer).widen("0", 9, generator=generator())
    model, inputs = make("mlp")
    adam = torch.optim.Adam(model.parameters())
    train(model, inputs, adam)
    adam.state[model[0].weight]["exp_avg"] = torch.zeros(2, 2)
    with pytest.raises(InputError, match=r"Adam keeps a 'exp_avg' of shape \(2, 2\) for a parameter of \(5, 6\)"):
        Surgeon(model, inputs, adam).narrow("2", 3)
    other = torch.optim.Adam(make("mlp")[0].parameters())
    with pytest.raises(
        InputError, match="Adam has none of the parameters of Sequential; give the optimizer that trains"
    ):
        Surgeon(model, inputs, other).narrow("2", 3)


def test_layer_norm_allows_whole_multiples_only():
    model, inputs = make("lstm")
    surgeon = Surgeon(model, inputs)
    with pytest.raises(
        InputError, match=r"can be widened from 7 only to whole multiples, not to 9: module 'norm' \(Lay"
    ):
        surgeon.widen("dense", 9, generator=generator())
    assert model.dense.out_features == 7
    outputs = model(inputs)
    surgeon.widen("dense", 21, generator=generator())
    assert model.norm.normalized_shape == (21,)
    assert (model(inputs) - outputs).abs().max() < 1e-10


def test_widening_leaves_global_generators_alone():
    model, inputs = make("digits-mlp")
    model.train()
    state = torch.get_rng_state()
    Surgeon(model, inputs).widen("0", 80, generator=generator())
    assert torch.equal(torch.get_rng_state(), state)
