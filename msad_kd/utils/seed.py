"""Random numbers that depend on where they are drawn, not on what ran before."""

import random
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(*parts: int) -> int:
    """Mix non-negative integers, such as (seed, rank, iteration), into one 31-bit seed."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0] >> 1)


def seed_all(seed: int, *, devices: bool = True) -> None:
    """Seed the generators of Python, NumPy and torch; those of the GPUs only with ``devices``."""
    random.seed(seed)
    np.random.seed(seed)
    (torch if devices else torch.default_generator).manual_seed(seed)


@contextmanager
def preserved_rng(*, devices: bool = True):
    """Restore the generators of Python, NumPy and torch when the block ends.

    Args:
        devices: also restore the current GPU's generator. Must be False in a data loader's worker:
            it is a fork, in which CUDA cannot be used.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    # Only this process's GPU: forking the generators of all GPUs would create a context on each.
    gpus = [torch.cuda.current_device()] if devices and torch.cuda.is_available() else []
    with torch.random.fork_rng(gpus):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
