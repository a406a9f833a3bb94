"""The processes of a run, on GPUs or, on a machine without GPU, on the CPU."""

import logging
from collections.abc import Callable

import torch
import torch.distributed as dist
from detectron2.engine import launch as launch_on_gpus
from detectron2.utils import comm
from torch import multiprocessing
from torch.distributed.elastic.utils.distributed import get_free_port

from msad_kd.utils.compat import create_local_process_group


def launch(
    main: Callable,
    num_gpus_per_machine: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    args: tuple = (),
) -> None:
    """Start processes as Detectron2's ``launch`` does, on the CPU if there is no GPU.

    Args:
        main: the function that each process calls with ``args``.
        num_gpus_per_machine: the number of processes on each machine.
        num_machines: the number of machines.
        machine_rank: the rank of this machine.
        dist_url: where the processes meet; "auto" picks a free port of this machine.
        args: arguments of ``main``.
    """
    world_size = num_gpus_per_machine * num_machines
    if world_size <= 1 or torch.cuda.is_available():
        launch_on_gpus(main, num_gpus_per_machine, num_machines, machine_rank, dist_url, args)
        return
    logging.getLogger(__name__).warning(
        "No GPU is available: starting %d processes on the CPU", num_gpus_per_machine
    )
    if dist_url == "auto":
        dist_url = f"tcp://127.0.0.1:{get_free_port()}"
    arguments = (main, num_gpus_per_machine, world_size, machine_rank, dist_url, args)
    multiprocessing.spawn(_cpu_worker, arguments, nprocs=num_gpus_per_machine)


def _cpu_worker(local_rank, main, processes, world_size, machine_rank, dist_url, args):
    rank = machine_rank * processes + local_rank
    dist.init_process_group("gloo", init_method=dist_url, world_size=world_size, rank=rank)
    create_local_process_group(processes)
    comm.synchronize()
    main(*args)
