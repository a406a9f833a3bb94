"""What differs between versions of the libraries below us, and the patches they need.

Supported are Detectron2 0.6 and its git main. A patch is a context manager, and its docstring says
which version needs it.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import ModuleType, SimpleNamespace
from unittest import mock

import numpy as np
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, TrainerBase, defaults
from detectron2.evaluation import coco_evaluation
from detectron2.utils import comm


def add_missing_keys(cfg: CfgNode) -> None:
    """Add to a config the keys of git main that this project reads and Detectron2 0.6 lacks."""
    # The share of the images that RandomSubsetTrainingSampler draws from.
    cfg.DATALOADER.setdefault("RANDOM_SUBSET_RATIO", 1.0)


def ddp_on(device: str) -> AbstractContextManager:
    """Let ``DefaultTrainer`` wrap a model on this device in DistributedDataParallel.

    Both versions pass ``device_ids``, which torch refuses for a model on the CPU.
    """
    if device != "cpu":
        return nullcontext()
    wrap = partial(defaults.create_ddp_model, device_ids=None)
    return mock.patch.object(defaults, "create_ddp_model", wrap)


def create_local_process_group(processes: int) -> None:
    """Tell Detectron2 which processes run on the same machine.

    Git main has a function for this. Detectron2 0.6 does it inside ``launch``, which needs GPUs.

    Args:
        processes: the number of processes on each machine.
    """
    for first in range(0, dist.get_world_size(), processes):
        ranks = range(first, first + processes)
        group = dist.new_group(ranks)  # every process has to create every group
        if dist.get_rank() in ranks:
            comm._LOCAL_PROCESS_GROUP = group


def trainer_state(trainer: DefaultTrainer) -> dict:
    """Return a trainer's state for a checkpoint, with the optimizer.

    The optimizer belongs to the inner trainer, which Detectron2 0.6 leaves out of checkpoints.
    """
    return {**TrainerBase.state_dict(trainer), "_trainer": trainer._trainer.state_dict()}


def load_trainer_state(trainer: DefaultTrainer, state: dict) -> bool:
    """Restore what ``trainer_state`` returned.

    Git main refuses a checkpoint without optimizer state, such as one that 0.6 itself wrote.

    Returns:
        Whether the state has the optimizer's.
    """
    TrainerBase.load_state_dict(trainer, state)
    if "_trainer" in state:
        trainer._trainer.load_state_dict(state["_trainer"])
    return "_trainer" in state


def repeat_factor_options(cfg: CfgNode) -> dict[str, bool]:
    """Return the options of ``repeat_factors_from_category_frequency`` that this version takes.

    Git main has DATALOADER.REPEAT_SQRT. Detectron2 0.6 has no such key and always takes the root.
    """
    return {"sqrt": cfg.DATALOADER.REPEAT_SQRT} if "REPEAT_SQRT" in cfg.DATALOADER else {}


def coco_eval_class(cls: type) -> AbstractContextManager:
    """Let ``COCOEvaluator`` compute AP by ``cls`` where it would use its own C++ code.

    Neither version has an option for this.
    """
    return mock.patch.object(coco_evaluation, "COCOeval_opt", cls)


def numpy_with_in1d(module: ModuleType) -> AbstractContextManager:
    """Give a module that has NumPy as ``np`` one with ``in1d``; no other module sees it.

    cityscapesScripts 2.3 calls ``in1d``, which NumPy 2.4 dropped.
    """
    return mock.patch.object(module, "np", SimpleNamespace(**{**vars(np), "in1d": np.isin}))
