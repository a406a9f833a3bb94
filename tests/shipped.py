"""The shipped configs, and options with which they are trained for a step in a second."""

import torch
from detectron2.modeling import build_model
from helpers import ROOT, TINY_NET

from msad_kd.config.build import build_config
from msad_kd.utils.flat_config import flatten_config

FILES = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if not p.name.startswith("Base"))
NARROW = [item for pair in flatten_config(TINY_NET, "MODEL.").items() for item in pair]
# As many classes as the tiny data set has.
for part in ("ROI_HEADS", "RETINANET", "FCOS"):
    NARROW += [f"MODEL.{part}.NUM_CLASSES", 8]
NARROW += ["MODEL.RETINANET.NUM_CONVS", 1, "MODEL.FCOS.NUM_CONVS", 1]
SWIN = [["embed_dim", 24], ["depths", [1, 1, 2, 1]], ["num_heads", [1, 2, 4, 8]]]
NARROW += ["MODEL.TIMM.PRETRAINED", False]


def name_of(path):
    return str(path.relative_to(ROOT)).replace("configs/", "", 1)


def shrunk(cfg):
    """INPUT keys for images of about 50 to 100 px."""
    factor = 8 if cfg.INPUT.MIN_SIZE_TEST >= 400 else 2
    keys = ["INPUT.MIN_SIZE_TRAIN", tuple(size // factor for size in cfg.INPUT.MIN_SIZE_TRAIN)]
    for key in ("MAX_SIZE_TRAIN", "MIN_SIZE_TEST", "MAX_SIZE_TEST"):
        keys += [f"INPUT.{key}", cfg.INPUT[key] // factor]
    return keys


def tiny_options(path, folder, more=()):
    """Options for a narrow net on small images, with a teacher that was not trained.

    ``more`` is for both of them.
    """
    cfg = build_config(str(path), [])
    narrow = [*NARROW, *["MODEL.TIMM.ARGUMENTS", SWIN] * cfg.MODEL.TIMM.NAME.startswith("swin")]
    narrow += more
    options = [
        *narrow,
        *shrunk(cfg),
        *("SOLVER.REFERENCE_WORLD_SIZE", 0, "SOLVER.IMS_PER_BATCH", 2),
        *("SOLVER.MAX_ITER", 1, "SOLVER.STEPS", (), "OUTPUT_DIR", str(folder / "run")),
        *("DATALOADER.NUM_WORKERS", 0),
    ]
    if cfg.KD.TEACHER.CONFIG_FILE:
        teacher = build_model(build_config(cfg.KD.TEACHER.CONFIG_FILE, narrow))
        torch.save({"model": teacher.state_dict()}, folder / "teacher.pth")
        options += ["KD.TEACHER.WEIGHTS", str(folder / "teacher.pth")]
        options += ["KD.TEACHER.OPTS", narrow]
    return options
