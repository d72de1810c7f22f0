"""Dropout wherever it may be, and clipping in a hook or a loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import InputError
from trimtab.knobs.clipping import GradClip
from trimtab.knobs.model import Dropout
from trimtab.places import dropout_places
from trimtab.run_state import RunState


class Functional(nn.Module):
    """Reads the number that it keeps."""

    def __init__(self, name: str) -> None:
        super().__init__()
        setattr(self, name, 0.25)
        self._name = name

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, getattr(self, self._name), self.training)


KINDS: dict[str, tuple[Any, list[str]]] = {
    "module": (lambda: nn.Dropout(0.25), ["p"]),
    "of channels": (lambda: nn.Dropout2d(0.25), ["p"]),
    "alpha": (lambda: nn.AlphaDropout(0.25), ["p"]),
    "feature alpha": (lambda: nn.FeatureAlphaDropout(0.25), ["p"]),
    "lstm": (lambda: nn.LSTM(3, 4, 2, dropout=0.25), ["dropout"]),
    "gru": (lambda: nn.GRU(3, 4, 3, dropout=0.25, bidirectional=True), ["dropout"]),
    "rnn": (lambda: nn.RNN(3, 4, 2, dropout=0.25), ["dropout"]),
    "attention": (lambda: nn.MultiheadAttention(4, 2, dropout=0.25), ["dropout"]),
    "transformer": (lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.25), ["dropout", "p", "p", "p"]),
    "functional": (lambda: Functional("dropout"), ["dropout"]),
    "functional p": (lambda: Functional("dropout_p"), ["dropout_p"]),
}


def run_of(model: nn.Module | None) -> RunState:
    return RunState(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), model)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_found_written_and_read_back(kind: str) -> None:
    make, names = KINDS[kind]
    model = nn.Sequential(nn.Linear(2, 2), make())
    assert [name for _, name in dropout_places(model)] == names
    knob, state = Dropout(), run_of(model)
    assert knob.bind(state).tolist() == [0.25]
    knob.write(state, np.array([0.5]))
    assert [getattr(module, name) for module, name in dropout_places(model)] == [0.5] * len(names)
    assert knob.read(state).tolist() == [0.5]


@pytest.mark.parametrize("kind", ["module", "lstm", "attention", "functional", "functional p"])
def test_it_acts_at_the_next_forward_pass(kind: str) -> None:
    model = KINDS[kind][0]()
    inputs: tuple[Tensor, ...] = (torch.ones(6, 5, 3),) if kind == "lstm" else (torch.ones(64, 64, 4),)
    if kind == "attention":
        inputs = inputs * 3
    knob, state = Dropout(0.0, 0.9), run_of(model)
    knob.bind(state)

    def draw() -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            out = model(*inputs)
        return (out[0] if isinstance(out, tuple) else out).detach()

    before = draw()
    knob.write(state, np.array([0.8]))
    assert not torch.equal(draw(), before)
    knob.write(state, np.array([0.25]))
    assert torch.equal(draw(), before)
    if kind in ("module", "functional", "functional p"):
        knob.write(state, np.array([0.8]))
        assert float((draw() == 0).double().mean()) == pytest.approx(0.8, abs=0.02)


def test_ratios_are_kept_and_a_zero_stays() -> None:
    model = nn.Sequential(nn.Dropout(0.2), nn.Dropout(0.4), nn.Dropout(0.0))
    knob, state = Dropout(), run_of(model)
    knob.bind(state)
    knob.write(state, np.array([0.3]))
    assert [place.p for place in model] == pytest.approx([0.3, 0.6, 0.0])
    knob.write(state, np.array([0.7]))
    assert [place.p for place in model] == pytest.approx([0.7, 0.95, 0.0])  # 1.4 is no probability
    knob.write(state, np.array([0.2]))
    assert [place.p for place in model] == pytest.approx([0.2, 0.4, 0.0])


def test_where_all_have_zero_all_move() -> None:
    model = nn.Sequential(nn.Dropout(0.0), nn.Dropout(0.0))
    knob, state = Dropout(), run_of(model)
    assert knob.bind(state).tolist() == [0.0]
    knob.write(state, np.array([0.3]))
    assert [place.p for place in model] == [0.3, 0.3]


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (None, "the knob 'dropout' acts in the model: give it as model="),
        (nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2)), "Sequential has no dropout: no nn.Dropout of any kind"),
        (nn.Dropout(1.0), r"Dropout.p is 1.0; expected a probability in \[0, 1\)"),
    ],
)
def test_what_is_refused(model: nn.Module | None, text: str) -> None:
    with pytest.raises(InputError, match=text):
        Dropout().bind(run_of(model))


def test_another_writer_is_named() -> None:
    model = nn.Sequential(nn.Dropout(0.2))
    knob, state = Dropout(), run_of(model)
    knob.bind(state)
    model[0].p = 0.9
    assert knob.find_conflict(state) == "Dropout.p is 0.9 where 0.2 was written"


# ---- clipping -------------------------------------------------------------------------------------------------------


def clipped_step(optimizer: torch.optim.Optimizer) -> Tensor:
    """Updates at a rate of 1 from the gradient (3, 4), whose norm is 5."""
    parameters = optimizer.param_groups[0]["params"]
    before = torch.cat([parameter.detach().clone() for parameter in parameters])
    for parameter, gradient in zip(parameters, (3.0, 4.0), strict=True):
        parameter.grad = torch.tensor([gradient])
    optimizer.step()
    return before - torch.cat([parameter.detach() for parameter in parameters])


def two_numbers() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))], lr=1.0)


def test_the_norm_of_all_gradients_together_is_limited() -> None:
    optimizer = two_numbers()
    knob, state = GradClip(0.1, 4.0), RunState(optimizer)
    assert knob.bind(state).tolist() == [4.0]
    assert clipped_step(optimizer).tolist() == [3.0, 4.0]  # at the upper bound nothing is clipped
    knob.write(state, np.array([1.0]))
    assert clipped_step(optimizer).tolist() == pytest.approx([0.6, 0.8], rel=1e-5)
    knob.write(state, np.array([4.0]))
    assert clipped_step(optimizer).tolist() == pytest.approx([3.0, 4.0], rel=1e-6)


def test_a_second_controller_finds_the_hook_of_the_first() -> None:
    optimizer = two_numbers()
    first, second, state = GradClip(), GradClip(), RunState(optimizer)
    first.bind(state)
    first.write(state, np.array([2.0]))
    assert second.bind(state).tolist() == [2.0]
    second.write(state, np.array([1.0]))
    assert first.find_conflict(state) == "grad_clip is 1.0 where 2.0 was written"
    assert clipped_step(optimizer).tolist() == pytest.approx([0.6, 0.8], rel=1e-5)


def test_the_scale_of_a_gradient_scaler_is_taken_along() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))], lr=1.0, fused=True)
    knob, state = GradClip(), RunState(optimizer)
    knob.bind(state)
    knob.write(state, np.array([1.0]))
    # As a scaler hands them to fused optimizers, which divide by the scale themselves.
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    assert clipped_step(optimizer).tolist() == pytest.approx([0.6, 0.8], rel=1e-5)


class ClippingLoop:
    grad_clip: Any = 0.5

    def __iter__(self) -> Any:
        return iter(())


def test_a_loop_that_clips_is_asked_to_do_so() -> None:
    loop, optimizer = ClippingLoop(), two_numbers()
    knob, state = GradClip(), RunState(optimizer, loader=loop)
    assert knob.bind(state).tolist() == [0.5]
    knob.write(state, np.array([3.0]))
    assert loop.grad_clip == 3.0
    assert not optimizer._optimizer_step_pre_hooks
    loop.grad_clip = None
    assert knob.find_conflict(state) == "grad_clip is None where 3.0 was written"


def test_a_limit_that_makes_no_sense_is_refused() -> None:
    loop = ClippingLoop()
    loop.grad_clip = -1.0
    with pytest.raises(InputError, match=r"grad_clip is -1.0; expected a positive finite norm, or None"):
        GradClip().bind(RunState(two_numbers(), loader=loop))
