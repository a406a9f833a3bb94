"""Errors, seeds, checks of config entries, and what differs between versions of Detectron2."""

from msad_kd.utils.errors import InputError
from msad_kd.utils.seed import derive_seed, preserved_rng, seed_all
