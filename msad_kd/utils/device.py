"""The device of a run: whether this machine has it, and whether it fits the run's processes."""

import logging

import torch
import torch.distributed as dist
from detectron2.utils import comm

from msad_kd.utils.errors import InputError


def find_device(name: str, key: str = "MODEL.DEVICE") -> str:
    """Return the device to use: the one named, or without any GPU, after a warning, the CPU.

    A GPU that is named by its number becomes PyTorch's current one.

    Args:
        name: cpu, cuda, or one GPU as cuda:0.
        key: the config key that says so, for the messages.

    Raises:
        InputError: if there is no such device, or if it does not fit several processes.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        words = "it should be cpu, cuda, or one GPU as cuda:0"
        raise InputError(f"{key} is '{name}'; {words}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        logging.getLogger(__name__).warning(f"No GPU is available: {key} is cpu")
        return "cpu"
    if device.type == "cuda" and device.index is not None:
        if comm.get_world_size() > 1:
            words = "but each process has a GPU of its own; set it to cuda"
            raise InputError(f"{key} is '{name}', {words}")
        if device.index >= (count := torch.cuda.device_count()):
            raise InputError(f"{key} is '{name}', but the last GPU here is cuda:{count - 1}")
        torch.cuda.set_device(device)  # seeds, clocks and memory are read from the current one
    elif device.type == "cpu" and dist.is_initialized() and dist.get_backend() == "nccl":
        raise InputError(
            f"{key} is cpu, but the processes were joined for GPUs; to train on the CPU, "
            "hide them: CUDA_VISIBLE_DEVICES= python train_net.py ..."
        )
    return name
