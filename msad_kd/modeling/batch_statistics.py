"""Running statistics of batch normalisation: for each resolution, and of several processes.

In training, both resolutions of one backbone are normalised by the statistics of their own batch.
At test time one shared set of running statistics would fit neither.
"""

from contextlib import contextmanager

import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from msad_kd.utils.errors import InputError
from msad_kd.utils.flat_config import flatten_config

# The low resolution's running_mean is called running_mean_lr, and so on.
LOW_SUFFIX = "_lr"
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def _batch_norms(module: nn.Module) -> list[_BatchNorm]:
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    return [m for m in norms if m.track_running_stats]


def add_low_resolution_statistics(module: nn.Module) -> int:
    """Give a module's batch normalisations a second set of statistics; return how many got one.

    Frozen ones have one set for both resolutions, that which they were trained with.
    """
    norms = [m for m in _batch_norms(module) if all(p.requires_grad for p in m.parameters())]
    for norm in norms:
        for name in _STATISTICS:
            norm.register_buffer(name + LOW_SUFFIX, getattr(norm, name).clone())
    return len(norms)


def has_low_resolution_statistics(norm: nn.Module) -> bool:
    """Return whether a batch normalisation has a second set of statistics."""
    return _STATISTICS[0] + LOW_SUFFIX in norm._buffers


@contextmanager
def low_resolution_statistics(module: nn.Module):
    """Let a module read and update the second set of statistics, if it has one."""
    norms = [n._buffers for n in _batch_norms(module) if has_low_resolution_statistics(n)]

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


def share_statistics(module: nn.Module) -> None:
    """Give all processes the running statistics of the main one, which are those it saves.

    Each process averages over its own images. In training these averages are written, never read.
    """
    if comm.get_world_size() == 1:
        return
    for norm in module.modules():
        if isinstance(norm, _NormBase):
            for statistic in norm.buffers(recurse=False):
                dist.broadcast(statistic, 0)


def check_synchronised(module: nn.Module, cfg: CfgNode) -> None:
    """Raise an InputError if several processes on the CPU would train with torch's SyncBN."""
    count, on_cpu = comm.get_world_size(), cfg.MODEL.DEVICE == "cpu"
    if count > 1 and on_cpu and any(isinstance(m, nn.SyncBatchNorm) for m in module.modules()):
        flat = flatten_config(cfg)
        keys = [key for key, value in flat.items() if value in ("SyncBN", "nnSyncBN")]
        raise InputError(
            f"{', '.join(keys) or 'the model'}: SyncBN needs GPUs, and {count} processes train on "
            "the CPU; use BN instead, or one process"
        )
