"""Errors, seeds, flat configs, and the differences between versions of the libraries below us."""

from msad_kd.utils.errors import InputError
from msad_kd.utils.seed import derive_seed, preserved_rng, seed_all

__all__ = [name for name in globals() if not name.startswith("_")]
