"""Check the numbers and choices of a config, and its schedule."""

import logging
from operator import attrgetter
from typing import Annotated, Literal

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_lr_scheduler

from msad_kd.losses.terms import LossTerm
from msad_kd.utils.errors import InputError
from msad_kd.utils.schema import Count, NotNegative, Positive, Share, WholeNumber, check_value


def _rise_from_one(steps) -> bool:
    return all(a < b for a, b in zip((0, *steps), steps))


def _are_scores(values) -> bool:
    return len(values) > 0 and all(0 <= x <= 1 for x in values)


_VALUES = {
    "DATASETS.INVALID_ANNOTATIONS": Literal["error", "drop"],
    "SOLVER.MAX_ITER": Count,
    "SOLVER.IMS_PER_BATCH": Count,
    "SOLVER.UNLABELED_PER_BATCH": WholeNumber,
    "SOLVER.ACCUMULATE": Count,
    "SOLVER.CHECKPOINT_PERIOD": Count,
    "SOLVER.STEPS": Annotated[tuple[int, ...], _rise_from_one, "whole numbers that rise from 1"],
    "SOLVER.BASE_LR": NotNegative,
    "SOLVER.GAMMA": NotNegative,
    "SOLVER.MOMENTUM": Share,
    "SOLVER.WEIGHT_DECAY": NotNegative,
    "SOLVER.WARMUP_ITERS": WholeNumber,
    "SOLVER.WARMUP_FACTOR": Annotated[float, lambda x: 0 <= x <= 1, "a number from 0 to 1"],
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": Literal["value", "norm", "full_norm", "full_model"],
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": Annotated[float, lambda x: x > 0, "a number above 0"],
    "SOLVER.REFERENCE_WORLD_SIZE": WholeNumber,
    "DATALOADER.NUM_WORKERS": WholeNumber,
    "DATALOADER.RANDOM_SUBSET_RATIO": Annotated[float, lambda x: 0 < x <= 1, "above 0, up to 1"],
    "DATALOADER.REPEAT_THRESHOLD": NotNegative,
    "INPUT.MIN_SIZE_TRAIN": Annotated[
        tuple[WholeNumber, ...], len, "one or more whole numbers of 0 or more"
    ],
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": Literal["choice", "range"],
    "INPUT.RANDOM_FLIP": Literal["none", "horizontal", "vertical"],
    "INPUT.CROP.TYPE": Literal["relative", "relative_range", "absolute", "absolute_range"],
    "INPUT.MIN_SIZE_TEST": WholeNumber,
    "INPUT.MAX_SIZE_TRAIN": Count,
    "INPUT.MAX_SIZE_TEST": Count,
    "INPUT.JITTER.SIZE": WholeNumber,
    "INPUT.JITTER.SCALES": Annotated[
        tuple[float, float], lambda x: 0 < x[0] <= x[1], "a range of two numbers above 0"
    ],
    "INPUT.COLOR.BRIGHTNESS": Share,
    "INPUT.COLOR.CONTRAST": Share,
    "INPUT.COLOR.SATURATION": Share,
    "INPUT.MIXUP.PROB": Annotated[float, lambda x: 0 <= x <= 1, "a number from 0 to 1"],
    "INPUT.MIXUP.ALPHA": Positive,
    "MODEL.MULTI_RESOLUTION.FUSED_WEIGHT": NotNegative,
    "MODEL.MULTI_RESOLUTION.REDUCTION": Count,
    "KD.TEACHER.AMP": Literal["", "bf16", "fp16"],
    "KD.UNLABELED.WEIGHT": NotNegative,
    "KD.UNLABELED.SCORE": Annotated[
        tuple[float, ...], _are_scores, "a list of numbers from 0 to 1, one or one a class"
    ],
    "KD.UNLABELED.IGNORE_SCORE": Annotated[float, lambda x: 0 <= x <= 1, "a number from 0 to 1"],
    "KD.DIAGNOSTICS_PERIOD": WholeNumber,
    "KD.GRADIENT_RATIO_PERIOD": WholeNumber,
    "TEST.EVAL_PERIOD": WholeNumber,
    "TEST.PATIENCE": WholeNumber,
}


def check_values(cfg: CfgNode) -> None:
    """Check a config's numbers and choices, and that its learning rate has a schedule.

    Raises:
        InputError: if not; the message names the key.
    """
    for key, annotation in _VALUES.items():
        check_value(attrgetter(key)(cfg), annotation, key)
    sides = cfg.INPUT.MIN_SIZE_TRAIN
    is_range = cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range"
    if is_range and (len(sides) != 2 or sides[0] > sides[1]):
        raise InputError(
            f"INPUT.MIN_SIZE_TRAIN is {tuple(sides)}; it should be the smallest and largest, as "
            "INPUT.MIN_SIZE_TRAIN_SAMPLING is range"
        )
    _check_schedule(cfg)


def _check_schedule(cfg: CfgNode) -> None:
    solver = cfg.SOLVER
    cfg = CfgNode({"SOLVER": solver})  # a copy of the part that is read: a whole one takes long
    cfg.defrost()
    # Detectron2 leaves out later steps, with a warning.
    cfg.SOLVER.STEPS = tuple(step for step in solver.STEPS if step <= solver.MAX_ITER)
    multi_step = solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR"  # others do not read STEPS
    if multi_step and solver.MAX_ITER in cfg.SOLVER.STEPS:
        raise InputError(
            f"SOLVER.STEPS is {tuple(solver.STEPS)}, but a step is as late as the end of training "
            f"(SOLVER.MAX_ITER {solver.MAX_ITER}); leave it out"
        )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    try:
        build_lr_scheduler(cfg, optimizer)
    except (ValueError, ArithmeticError, AssertionError) as error:
        keys = ("LR_SCHEDULER_NAME", "WARMUP_METHOD", "STEPS", "MAX_ITER")
        values = ", ".join(f"{key} {solver[key]}" for key in keys)
        raise InputError(f"SOLVER: there is no such schedule: {error} ({values})") from error


def warn_of_long_warmups(cfg: CfgNode, terms: list[LossTerm]) -> None:
    """Warn if the learning rate or the weight of a loss rises for longer than the training."""
    iterations, warmup = cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS
    slow = [term for term in terms if term.warmup_iters > iterations]
    warnings = []
    if slow:
        names = ", ".join(f"{term.name} (warmup_iters {term.warmup_iters})" for term in slow)
        warnings.append(f"KD.LOSSES: {names} will not reach their weight")
    if warmup > iterations:
        warnings.append(f"The learning rate will not reach BASE_LR (WARMUP_ITERS {warmup})")
    for words in warnings:
        logging.getLogger(__name__).warning(
            f"{words}, because the run ends after {iterations} iterations (SOLVER.MAX_ITER)"
        )
