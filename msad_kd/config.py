"""The configuration keys this project adds to Detectron2's."""

from __future__ import annotations

from detectron2.config import CfgNode as CN

__all__ = ["add_msad_kd_config"]


def add_msad_kd_config(cfg: CN) -> None:
    """Add every key of msad_kd, with its default, to a Detectron2 config (in place)."""
    # Your own data sets in COCO format: a list of {name, json, images}. A relative path starts at
    # the folder DETECTRON2_DATASETS (./datasets when unset), as with Detectron2's builtin sets.
    cfg.DATASETS.COCO_FORMAT = []

    # The share of images RandomSubsetTrainingSampler draws; Detectron2 0.6 lacks the key.
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = cfg.DATALOADER.get("RANDOM_SUBSET_RATIO", 1.0)

    # "SGD" (Detectron2's own) or "ADAMW".
    cfg.SOLVER.OPTIMIZER = "SGD"

    # ---- The multi-resolution teacher (MODEL.META_ARCHITECTURE: MultiResolutionRCNN) ----
    cfg.MODEL.MULTI_RESOLUTION = CN()
    # Weight of the fused branch's loss next to L_HR + L_LR.
    cfg.MODEL.MULTI_RESOLUTION.FUSED_WEIGHT = 0.4
    # C-FF: its hidden layer has 2C / REDUCTION units, C being FPN.OUT_CHANNELS.
    cfg.MODEL.MULTI_RESOLUTION.REDUCTION = 16
    # C-FF pools a map without its padding; False pools the whole map, as the authors' code does.
    cfg.MODEL.MULTI_RESOLUTION.MASK_PADDING = True
    # Keep batch normalisation's running statistics for each resolution by itself; False shares one
    # set, as the authors' code does. A student gets those of its own resolution.
    cfg.MODEL.MULTI_RESOLUTION.SEPARATE_STATISTICS = False
    # The branch that predicts at test time: "fused", "hr" or "lr".
    cfg.MODEL.MULTI_RESOLUTION.TEST_BRANCH = "fused"

    # ---- Distillation (MODEL.META_ARCHITECTURE: Distilled*) ----
    cfg.KD = CN()
    # k, high-resolution side / low-resolution side: a power of two; m = log2 k is the level shift.
    cfg.KD.SCALE = 2
    # A list of {name, weight, levels, warmup_iters}: the loss's name in DISTILL_LOSS_REGISTRY, its
    # weight in the total loss (summed over levels), the student's levels, and the iterations over
    # which the weight rises from 0. Without `levels`: all that have a partner. Further entries are
    # arguments of the loss.
    cfg.KD.LOSSES = [{"name": "l1", "weight": 0.6, "warmup_iters": 500}]

    cfg.KD.TEACHER = CN()
    # The config the teacher was trained with, and KEY VALUE pairs on top of it. Like the weights'
    # path below, it starts at the current folder.
    cfg.KD.TEACHER.CONFIG_FILE = ""
    cfg.KD.TEACHER.OPTS = []
    # The teacher's checkpoint; every key has to fit.
    cfg.KD.TEACHER.WEIGHTS = ""
    # The pyramid to learn from: "fused", "hr" or "lr". A single-resolution teacher has "hr", read
    # from the high-resolution image, and "lr", read from the student's own image.
    cfg.KD.TEACHER.BRANCH = "fused"
    # KDTrainer starts the student from the teacher's weights, on a fresh start only.
    cfg.KD.TEACHER.INIT_STUDENT = True
    # KDTrainer evaluates the teacher on DATASETS.TEST before the first iteration.
    cfg.KD.TEACHER.EVAL_BEFORE_TRAIN = True
