"""Seeds that depend on where they are used, and generators that are restored."""

import itertools
import random
from contextlib import suppress

import numpy as np
import pytest
import torch

from msad_kd.utils.seed import derive_seed, preserved_rng, seed_all


def draws():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_each_place_has_its_own_seed():
    places = list(itertools.product(range(10), repeat=3))
    seeds = {derive_seed(*place) for place in places}
    assert len(seeds) == len(places)
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert derive_seed(1, 2) != derive_seed(2, 1)


def test_a_seed_decides_every_generator():
    seed_all(5)
    first = draws()
    draws()
    seed_all(5, devices=False)
    assert draws() == first
    seed_all(6)
    assert not set(draws()) & set(first)


@pytest.mark.parametrize("error", [None, RuntimeError])
@pytest.mark.parametrize("devices", [True, False])
def test_generators_are_restored(devices, error):
    seed_all(5)
    expected = draws()
    seed_all(5)
    with suppress(RuntimeError), preserved_rng(devices=devices):
        seed_all(9)
        draws()
        if error:
            raise error
    assert draws() == expected
