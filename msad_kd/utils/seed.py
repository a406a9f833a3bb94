"""Random numbers as a function of where they are used, not of what ran before."""

from __future__ import annotations

import random
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["derive_seed", "seed_all", "preserved_rng"]


def derive_seed(*parts: int) -> int:
    """One well-mixed 31-bit seed from non-negative integers, such as (seed, rank, iteration)."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0] >> 1)


def seed_all(seed: int, *, devices: bool = True) -> None:
    """Seed the generators of Python, NumPy and torch, those of the GPUs included or not."""
    random.seed(seed)
    np.random.seed(seed)
    (torch if devices else torch.default_generator).manual_seed(seed)


@contextmanager
def preserved_rng(*, devices: bool = True):
    """Leave the generators of Python, NumPy and torch (with or without GPUs) as they were.

    A data loader's worker is a fork, in which CUDA cannot be touched: it passes ``devices=False``.
    """
    states = random.getstate(), np.random.get_state()
    # Only this process's GPU: forking the generators of all would make contexts on all.
    gpus = [torch.cuda.current_device()] if devices and torch.cuda.is_available() else []
    with torch.random.fork_rng(gpus):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
