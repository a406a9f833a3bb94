"""Seeds that say where they are used, and generators left alone."""

import itertools
import random

import numpy as np
import torch

from msad_kd.utils.seed import derive_seed, preserved_rng, seed_all


def draws():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_each_place_has_a_seed_of_its_own():
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


def test_generators_are_left_as_they_were():
    seed_all(5)
    expected = draws()
    for devices in (True, False):
        seed_all(5)
        with preserved_rng(devices=devices):
            seed_all(9)
            draws()
        assert draws() == expected


def test_generators_are_left_as_they_were_after_an_error():
    seed_all(5)
    expected = draws()
    seed_all(5)
    try:
        with preserved_rng():
            seed_all(9)
            raise RuntimeError
    except RuntimeError:
        pass
    assert draws() == expected
