"""Batch-norm statistics of cut networks: closed forms, who has them, and what they are worth."""

from __future__ import annotations

import copy

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import trimtab
from trimtab.pruning.calibration import has_statistics, recalibrate
from trimtab.pruning.evaluation import CachedEvaluator
from trimtab.pruning.network import PrunableNetwork
from trimtab.pruning.validation import Validation


def block(before: int, after: int) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels)


@pytest.fixture(scope="module")
def trained(digits: tuple[Tensor, Tensor]) -> nn.Module:
    """Five convolutions with batch norm, trained on 1,000 digits."""
    images, labels = digits
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = (1, 16, 16, 16, 16, 16)
        layers = [layer for n in range(5) for layer in block(sizes[n], sizes[n + 1])]
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for step in range(120):
            rows = slice(50 * (step % 20), 50 * (step % 20) + 50)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    return model.eval()


def test_statistics_are_plain_means_over_the_batches() -> None:
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(3, momentum=0.3)).eval()
    model[1].running_mean.fill_(7.0)
    batches = [(torch.randn(5, 3, generator=torch.Generator().manual_seed(n)),) for n in range(3)]
    state = torch.get_rng_state()
    recalibrate(model, batches)
    assert torch.equal(state, torch.get_rng_state())  # dropout was off
    means = torch.stack([batch.mean(0) for (batch,) in batches]).mean(0)
    variances = torch.stack([batch.var(0) for (batch,) in batches]).mean(0)
    torch.testing.assert_close(model[1].running_mean, means)
    torch.testing.assert_close(model[1].running_var, variances)
    assert (model[1].momentum, model[1].training, model.training) == (0.3, False, False)


def test_who_has_statistics() -> None:
    assert has_statistics(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    assert not has_statistics(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    assert not has_statistics(nn.BatchNorm1d(2, track_running_stats=False))


def test_of_which_samples() -> None:
    model = nn.Sequential(nn.Linear(2, 3))
    pair = (torch.zeros(257, 2), torch.zeros(257, dtype=torch.long))
    assert [len(batch[0]) for batch in Validation(pair, model, 1).calibration] == [256]  # one sample has no variance
    pair = (torch.zeros(2000, 2), torch.zeros(2000, dtype=torch.long))
    assert [len(batch[0]) for batch in Validation(pair, model, 1).calibration] == [256] * 4


def test_what_is_scored_is_what_is_given_back(trained: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits[0][1000:1400], digits[1][1000:1400]
    before = copy.deepcopy(trained.state_dict())
    for backend in ("surgery", "torch-pruning"):
        result = trimtab.prune(
            trained, images[:1], validation=(images, labels), target={"flops": 0.4}, agent="random-search",
            max_evaluations=8, multiple=4, backend=backend,
        )  # fmt: skip
        with torch.no_grad():
            found = (result.model(images).argmax(1) == labels).double().mean()
        assert result.report.score_before == pytest.approx(float(found), abs=1e-12)
        layer = result.model[1]
        with torch.no_grad():
            seen = [result.model[0](part) for part in images.split(256)]
        means = torch.stack([part.mean((0, 2, 3)) for part in seen]).mean(0)
        torch.testing.assert_close(layer.running_mean, means, rtol=1e-4, atol=1e-5)
    after = trained.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_without_them_a_search_has_nothing_to_go_by(trained: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    pair = (digits[0][1000:1400], digits[1][1000:1400])
    network = PrunableNetwork(trained, pair[0][:1], multiple=4)
    validation = Validation(pair, network.model, 1)
    assert validation.rate(network.model) > 0.9
    fewer = tuple(3 * part.size // 4 for part in network.parts)
    old = CachedEvaluator(network, validation).score(fewer)
    assert old == pytest.approx(validation.rate(network.cut(fewer)), abs=1e-12)
    network.calibration = validation.calibration
    new = CachedEvaluator(network, validation).score(fewer)
    assert new == pytest.approx(validation.rate(network.cut(fewer)), abs=1e-12)
    assert new > old + 0.1
    assert network.cut(network.dense)[1].running_mean.equal(trained[1].running_mean)  # nothing was cut
