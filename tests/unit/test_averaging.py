"""The running average of the weights: its numbers, what it leaves alone, and what `best_state` makes of it."""

import numpy as np
import pytest
import torch
from torch import nn

import trimtab
from trimtab.averaging import WeightAverage
from trimtab.controller import Controller
from trimtab.errors import InputError

N = 60


def network(*more):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), *more, nn.Tanh(), nn.Linear(7, 2))


def batch(t, size=8):
    generator = torch.Generator().manual_seed(t)
    inputs = torch.randn(size, 5, generator=generator)
    return inputs, (inputs.sum(1) > 0).long()


class Run:
    """A small run under RLScheduler, stepped by hand."""

    def __init__(self, total_steps=N, *more, rate=0.05, **options):
        self.model = network(*more)
        self.optimizer = torch.optim.Adam(self.model.parameters(), rate)
        self.t = 0
        self.scheduler = trimtab.RLScheduler(self.optimizer, total_steps, model=self.model, **options)

    def go(self, n, spoil_at=None):
        for _ in range(n):
            inputs, targets = batch(self.t)
            loss = nn.functional.cross_entropy(self.model(inputs), targets)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.t += 1
            if self.t == spoil_at:
                with torch.no_grad():
                    self.model[0].weight.fill_(torch.nan)
            self.scheduler.step(loss)
        return self

    def weights(self):
        return [parameter.detach().clone() for parameter in self.model.parameters()]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ---- its numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("total_steps", "first"), [(None, 1), (600, 300), (1, 1)])
def test_each_look_weighs_what_the_formula_says(total_steps, first):
    weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    model = nn.ParameterList([weight])
    average = WeightAverage(torch.optim.SGD([weight], 0.1), model, total_steps)
    values, times, t = [], [], 0
    rng = np.random.default_rng(0)
    assert average.next_look == first
    for t in range(1, 601):
        value = rng.standard_normal(3)
        with torch.no_grad():
            weight.copy_(torch.from_numpy(value))
        if t == average.next_look:
            average.look(t)
            values.append(value)
            times.append(t)
    ends = np.array([0, *times]) / times[-1]
    shares = np.diff(ends**10)
    expected = (shares[:, None] * values).sum(axis=0)
    with average.applied():
        np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-12)
    np.testing.assert_array_equal(weight.detach().numpy(), value)
    assert shares.sum() == pytest.approx(1.0)
    assert times[-1] > 590


def test_weights_that_do_not_move_are_their_own_average():
    run = Run(rate=0.05)
    average = WeightAverage(run.optimizer, run.model)
    before = run.weights()
    for t in range(1, 50):
        average.look(t)
    with average.applied():
        assert equal(run.weights(), before)


def test_a_group_that_is_added_begins_the_average_anew():
    weight, late = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], 0.1)
    average = WeightAverage(optimizer, nn.ParameterList([weight, late]))
    average.look(1)
    optimizer.add_param_group({"params": [late]})
    with torch.no_grad():
        weight.fill_(5.0)
    average.look(2)
    with average.applied():
        assert (weight.item(), late.item()) == (5.0, 1.0)


# ---- what it leaves alone ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [(), (nn.Dropout(0.5),)])
def test_a_run_is_the_same_to_the_bit_with_and_without(more):
    with_it, without = Run(N, *more), Run(N, *more, average=False)
    ends = []
    for run in (with_it, without):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            run.go(N - 20)
            if run is with_it:
                with run.scheduler.averaged():
                    run.scheduler.report(val_loss=0.1, accuracy=0.9)
            ends.append((run.go(20).weights(), run.scheduler.decisions))
    assert equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]  # what is reported of the average is no news of the run


def test_statistics_of_batch_norm_are_measured_and_put_back():
    run = Run(N, nn.BatchNorm1d(7)).go(N)
    norm = run.model[1]
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    random = torch.get_rng_state()
    batches = [batch(t) for t in range(100, 105)]
    run.model.eval()
    with run.scheduler.averaged(batches):
        with torch.no_grad():
            outputs = [run.model[0](inputs) for inputs, _ in batches]
        mean = torch.stack([output.mean(0) for output in outputs]).mean(0)
        variance = torch.stack([output.var(0) for output in outputs]).mean(0)
        torch.testing.assert_close(norm.running_mean, mean)
        torch.testing.assert_close(norm.running_var, variance)
        assert norm.momentum == 0.1
        assert not run.model.training
    assert equal(before.values(), run.model.state_dict().values())
    assert torch.equal(torch.get_rng_state(), random)


# ---- what best_state makes of it --------------------------------------------------------------------------------


def test_best_state_is_the_average_where_it_is_reported_as_better():
    run = Run().go(N)
    scheduler = run.scheduler
    scheduler.report(val_loss=0.5)
    assert not scheduler.best_is_averaged
    with scheduler.averaged():
        average = run.weights()
        scheduler.report(val_loss=0.6)
    assert equal(scheduler.best_state().values(), run.weights())
    with scheduler.averaged():
        scheduler.report(val_loss=0.4)
    assert scheduler.best_is_averaged
    assert equal(scheduler.best_state().values(), average)
    assert not equal(average, run.weights())
    scheduler.report(val_loss=0.3)
    assert not scheduler.best_is_averaged
    assert equal(scheduler.best_state().values(), run.weights())


def test_an_interval_that_is_rolled_back_is_not_averaged():
    run = Run().go(N, spoil_at=40)
    assert [decision.source for decision in run.scheduler.decisions].count("guard") == 1
    with run.scheduler.averaged():
        assert all(bool(torch.isfinite(weight).all()) for weight in run.weights())
    assert all(bool(torch.isfinite(weight).all()) for weight in run.weights())


@pytest.mark.parametrize("at", [20, 45])
def test_resumed_is_uninterrupted_to_the_bit(at, tmp_path):
    whole, first = Run().go(N), Run().go(at)
    if at > N // 2:
        with first.scheduler.averaged():
            first.scheduler.report(val_loss=0.4)
    saved = [first.model.state_dict(), first.optimizer.state_dict(), first.scheduler.state_dict()]
    torch.save(saved, tmp_path / "run.pt")
    second = Run()
    for part, state in zip((second.model, second.optimizer, second.scheduler),
                           torch.load(tmp_path / "run.pt", weights_only=True), strict=True):  # fmt: skip
        part.load_state_dict(state)
    second.t = at
    assert second.scheduler.best_is_averaged == (at > N // 2)
    second.go(N - at)
    ends = []
    for run in (whole, second):
        with run.scheduler.averaged():
            ends.append(run.weights())
    assert equal(*ends)


# ---- what it refuses --------------------------------------------------------------------------------------------


def test_what_it_refuses_is_named():
    run = Run().go(10)
    with pytest.raises(InputError, match="no average of the weights yet: the first look is after optimizer step 30"):
        run.scheduler.averaged().__enter__()
    run.go(30)
    with run.scheduler.averaged():
        with pytest.raises(InputError, match=r"step\(\) was called inside averaged\(\)"):
            run.scheduler.step(0.5)
        with pytest.raises(InputError, match="entered twice"):
            run.scheduler.averaged().__enter__()
    assert run.scheduler.status == "running"
    without = Run(average=False)
    for scheduler in (without.scheduler, trimtab.RLScheduler(Run().optimizer, N)):
        with pytest.raises(InputError, match=r"averaged\(\) needs the model and average=True"):
            scheduler.averaged().__enter__()
    with pytest.raises(InputError, match="average is 'yes'; expected True or False"):
        Run(average="yes")
    with pytest.raises(InputError, match="average=True needs the model"):
        Controller("constant", optimizer=without.optimizer, average=True)
    with pytest.raises(InputError, match="saved with average: True, the controller has False"):
        without.scheduler.load_state_dict(run.scheduler.state_dict())


def test_batch_norm_needs_batches():
    run = Run(N, nn.BatchNorm1d(7)).go(N)
    before = [value.clone() for value in run.model.state_dict().values()]
    with pytest.raises(InputError, match="the model has batch norm"):
        run.scheduler.averaged().__enter__()
    with pytest.raises(InputError, match="was given no batch"):
        run.scheduler.averaged([]).__enter__()
    assert equal(before, run.model.state_dict().values())
    assert run.scheduler.status == "over"
