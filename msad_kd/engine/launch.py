"""Starting the processes of a run, on GPUs or, where there are none, on the CPU."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable

import torch
import torch.distributed as dist
from detectron2.engine import defaults
from detectron2.engine import launch as launch_on_gpus
from detectron2.utils import comm
from torch import multiprocessing
from torch.distributed.elastic.utils.distributed import get_free_port

__all__ = ["ddp_on_cpu", "launch"]


def launch(
    main: Callable,
    num_gpus_per_machine: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    args: tuple = (),
) -> None:
    """Detectron2's ``launch``, with processes on the CPU where there is no GPU.

    Detectron2 0.6 insists on GPUs as soon as there is more than one process.

    Args:
        main: what each process calls, with ``args``.
        num_gpus_per_machine: processes of a machine.
        num_machines, machine_rank, dist_url: as ``launch`` of Detectron2 has them.
    """
    world_size = num_gpus_per_machine * num_machines
    if world_size <= 1 or torch.cuda.is_available():
        launch_on_gpus(main, num_gpus_per_machine, num_machines, machine_rank, dist_url, args)
        return
    logging.getLogger(__name__).warning(
        "No GPU is at hand: %d processes on the CPU", num_gpus_per_machine
    )
    if dist_url == "auto":
        dist_url = f"tcp://127.0.0.1:{get_free_port()}"
    arguments = (main, num_gpus_per_machine, num_machines, machine_rank, dist_url, args)
    multiprocessing.spawn(_cpu_worker, arguments, nprocs=num_gpus_per_machine)


def _cpu_worker(local_rank, main, processes, num_machines, machine_rank, dist_url, args):
    dist.init_process_group(
        "gloo",
        init_method=dist_url,
        world_size=processes * num_machines,
        rank=machine_rank * processes + local_rank,
    )
    # What Detectron2 asks for ranks within a machine; 0.6 has no function that makes it.
    groups = [
        dist.new_group(range(machine * processes, (machine + 1) * processes))
        for machine in range(num_machines)
    ]
    comm._LOCAL_PROCESS_GROUP = groups[machine_rank]
    comm.synchronize()
    main(*args)


@contextlib.contextmanager
def ddp_on_cpu():
    """Lets ``DefaultTrainer`` wrap a model that is on the CPU.

    Detectron2 always names the device, and torch accepts none for the CPU.
    """
    wrap = defaults.create_ddp_model
    defaults.create_ddp_model = functools.partial(wrap, device_ids=None)
    try:
        yield
    finally:
        defaults.create_ddp_model = wrap
