"""One root seed, independent generators, and nothing global that moves."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from trimtab.errors import InputError
from trimtab.seeding import derive_seed, numpy_generator, scoped_global_rng, scoped_numpy_rng, torch_generator


def test_the_same_path_is_the_same_seed_and_any_other_is_another() -> None:
    roots, parts = (0, 1, 7, 2**62 + 5), ("a", "b", "data order", 1, 2)
    paths = [(), *((part,) for part in parts), *itertools.product((*parts, 0), parts), ("a", 0, 0, "b")]
    seeds = [derive_seed(root, *path) for root in roots for path in paths]
    assert len(set(seeds)) == len(seeds)
    assert seeds == [derive_seed(root, *path) for root in roots for path in paths]
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("path", [(-1,), (0, -3)])
def test_negative_numbers_are_refused(path: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="expected whole numbers of 0 or more"):
        derive_seed(*path)


def test_seeds_are_fixed_for_good() -> None:
    """These numbers are what published runs were made with: a change of them changes every result."""
    assert derive_seed(0) == 7896617691693857887
    assert derive_seed(0, "data order", 3) == 1727909562909093916


def test_generators_are_independent_and_repeat() -> None:
    first, second = numpy_generator(0, "x").normal(size=1000), numpy_generator(0, "y").normal(size=1000)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1
    assert np.array_equal(first, numpy_generator(0, "x").normal(size=1000))
    draws = [torch.rand(3, generator=torch_generator(0, name)) for name in ("x", "y", "x")]
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])


def test_the_global_generator_is_lent_and_put_back(device: torch.device) -> None:
    def draw() -> torch.Tensor:
        return torch.cat([torch.rand(3), torch.rand(3, device=device).cpu()])

    with scoped_global_rng(None, device):
        expected = draw()
    assert torch.equal(draw_restored(device), expected), "drawing inside moved the generator outside"
    states = [torch_generator(1, "dropout").get_state()]
    if device.type == "cuda":
        states.append(torch.Generator(device).manual_seed(5).get_state())
    first_states = [state.clone() for state in states]
    before = torch.get_rng_state()
    with scoped_global_rng(states, device):
        first = draw()
    with scoped_global_rng(states, device):
        second = draw()
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, second), "the state was not carried on"
    with scoped_global_rng(first_states, device):
        assert torch.equal(draw(), first)
        assert torch.equal(draw(), second)


def draw_restored(device: torch.device) -> torch.Tensor:
    with scoped_global_rng(None, device):
        return torch.cat([torch.rand(3), torch.rand(3, device=device).cpu()])


def test_it_is_put_back_after_an_error_too() -> None:
    before = torch.get_rng_state()
    with pytest.raises(KeyError), scoped_global_rng(None, torch.device("cpu")):
        raise KeyError(torch.rand(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_numpys_global_generator_is_lent_and_put_back() -> None:
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    drawn = []
    for _ in range(2):
        with scoped_numpy_rng(2**62 + 1):
            drawn.append(np.random.random(3).tolist())  # noqa: NPY002
    with scoped_numpy_rng(5):
        drawn.append(np.random.random(3).tolist())  # noqa: NPY002
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(KeyError), scoped_numpy_rng(5):
        raise KeyError
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002
