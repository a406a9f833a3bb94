"""Separate running statistics of batch normalisation for each resolution of one backbone.

In training, both resolutions are normalised by the statistics of their own batch. At test time one
shared set of running statistics would fit neither.
"""

from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

# The low resolution's running_mean is called running_mean_lr, and so on.
LOW_SUFFIX = "_lr"
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def _batch_norms(module: nn.Module) -> list[_BatchNorm]:
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    return [m for m in norms if m.track_running_stats]


def add_low_resolution_statistics(module: nn.Module) -> int:
    """Give a module's batch normalisations a second set of statistics; return how many it has."""
    norms = _batch_norms(module)
    for norm in norms:
        for name in _STATISTICS:
            norm.register_buffer(name + LOW_SUFFIX, getattr(norm, name).clone())
    return len(norms)


@contextmanager
def low_resolution_statistics(module: nn.Module):
    """Let a module read and update the second set of statistics, if it has one."""
    second = _STATISTICS[0] + LOW_SUFFIX
    norms = [norm._buffers for norm in _batch_norms(module) if second in norm._buffers]

    def swap():
        for buffers in norms:
            for name in _STATISTICS:
                low = name + LOW_SUFFIX
                buffers[name], buffers[low] = buffers[low], buffers[name]

    swap()
    try:
        yield
    finally:
        swap()
