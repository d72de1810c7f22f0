"""Random sequences of changes and training: everything stays consistent, and a plan replayed takes the checkpoint."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from surgery_networks import assert_consistent, generator, make, train
from trimtab.errors import InputError
from trimtab.surgery import Surgeon, replay

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, 0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 0.01, amsgrad=True),
}
# (operation, which group or layer, how far, how many training steps follow)
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["widen", "widen", "narrow", "deepen", "remove_layer"]),
        st.integers(0, 7),
        st.floats(0.0, 1.0),
        st.integers(0, 2),
    ),
    min_size=1,
    max_size=6,
)


def change(surgeon: Surgeon, operation: str, which: int, far: float, seed: int) -> None:
    """One change; what does not apply is refused with nothing changed."""
    open_groups = [group for group in surgeon.groups if group.refusal is None]
    group = open_groups[which % len(open_groups)]
    if operation == "widen":
        n = group.size + 1 + round(far * group.size)
        n = 2 * group.size if group.whole_multiples else n
        if n <= 24:
            surgeon.widen(group.name, n, generator=generator(seed), noise=0.05 if which % 2 else 0.0)
    elif operation == "narrow" and group.size > 1:
        surgeon.narrow(group.name, max(1, math.ceil(far * (group.size - 1))))
    elif operation == "deepen":
        surgeon.deepen(surgeon.layers[which % len(surgeon.layers)])
    elif operation == "remove_layer":
        surgeon.remove_layer()


@pytest.mark.parametrize("network", ["mlp", "cnn", "residual", "sst2-bilstm"])
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(changes=CHANGES, rule=st.sampled_from(sorted(OPTIMIZERS)))
def test_any_sequence_of_changes(network, changes, rule):
    model, inputs = make(network)
    optimizer = OPTIMIZERS[rule](model.parameters())
    surgeon = Surgeon(model, inputs, optimizer)
    outputs_shape = model(inputs).shape
    for seed, (operation, which, far, steps) in enumerate(changes):
        before, plan = {k: id(v) for k, v in model.named_parameters()}, surgeon.plan
        try:
            change(surgeon, operation, which, far, seed)
        except InputError:
            assert {k: id(v) for k, v in model.named_parameters()} == before
            assert surgeon.plan == plan
        assert_consistent(model, optimizer)
        assert_sizes_told(model)
        assert model(inputs).shape == outputs_shape
        if steps:
            assert math.isfinite(train(model, inputs, optimizer, steps))

    fresh, _ = make(network)
    fresh_optimizer = OPTIMIZERS[rule](fresh.parameters())
    again = replay(fresh, inputs, json.loads(json.dumps(surgeon.plan)), fresh_optimizer)
    fresh.load_state_dict(model.state_dict())
    fresh_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), fresh.state_dict().values(), strict=True))
    assert again.groups == surgeon.groups
    assert train(model, inputs, optimizer, 2) == train(fresh, inputs, fresh_optimizer, 2)
    group = next(group for group in surgeon.groups if group.refusal is None)
    if group.size > 1:  # both know of the same copies
        assert again.narrow(group.name, 1).units == surgeon.narrow(group.name, 1).units
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


def assert_sizes_told(model: nn.Module) -> None:
    """The numbers in which modules keep their sizes are those of their tensors."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == module.weight.shape
        elif isinstance(module, nn.Conv2d):
            assert (module.out_channels, module.in_channels // module.groups) == module.weight.shape[:2]
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert (module.num_features,) == module.weight.shape == module.running_mean.shape
        elif isinstance(module, nn.LSTM):
            assert module.weight_ih_l0.shape == (4 * module.hidden_size, module.input_size)
            assert [id(w) for w in module._flat_weights] == [id(w) for w in module.parameters()]
