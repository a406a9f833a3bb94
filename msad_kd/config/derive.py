"""Derive the configs of an aligned teacher, its student and the control from a detector's config.

The detector reads images at high resolution, the student images whose sides are 1/k of theirs.
"""

from detectron2.config import CfgNode

from msad_kd.data.augmentation import divide_sizes
from msad_kd.modeling.classes import anchor_sizes, frame_of
from msad_kd.modeling.pyramid import level_shift
from msad_kd.utils.errors import InputError

# A detector and what it is as a student and as a multi-resolution teacher.
KINDS = {
    "GeneralizedRCNN": ("DistilledRCNN", "MultiResolutionRCNN"),
    "RetinaNet": ("DistilledRetinaNet", "MultiResolutionRetinaNet"),
    "FCOS": ("DistilledFCOS", "MultiResolutionFCOS"),
}
# FPNs by what is below them: at low resolution, and a multi-resolution teacher's.
FPNS = {
    "build_resnet_fpn_backbone": "resnet",
    "build_retinanet_resnet_fpn_backbone": "resnet",
    "build_five_level_resnet_fpn_backbone": "resnet",
    "build_timm_fpn_backbone": "timm",
}
STAGES = ["res2", "res3", "res4", "res5"]
LEVELS = 5  # of the pyramid, which the heads read
WARMUP_SHARE = 0.1  # of a schedule, at the most
# A student starts from the teacher's weights. At the teacher's own rate it loses what they know: on
# Shapes its control had 1.2 box AP less.
STUDENT_RATE = 1 / 3


def derive_configs(cfg: CfgNode, scale: int) -> dict[str, CfgNode]:
    """Derive the configs of teacher, student and control.

    The teacher has the detector's images, anchors and schedule; its heads read levels of k times
    the stride that the student's read. The student has all sizes divided by k, and a third of the
    learning rate. The control is the student without distillation, started from the same weights.

    Args:
        cfg: the complete config of a Mask R-CNN, Faster R-CNN, RetinaNet or FCOS with an FPN.
        scale: k, a power of two from 2.

    Returns:
        "teacher", "student" and "control", without the weights they start from.

    Raises:
        InputError: if the detector has no levels to align, or sizes that k does not divide.
    """
    shift = level_shift(scale)
    _check(cfg, scale)
    student, teacher = KINDS[cfg.MODEL.META_ARCHITECTURE]
    kind = FPNS[cfg.MODEL.BACKBONE.NAME]
    base = cfg.clone()
    base.defrost()
    base.KD.SCALE = scale
    base.TEST.EXPECTED_RESULTS = []  # of the detector that they are derived from
    if kind == "resnet":
        base.MODEL.RESNETS.OUT_FEATURES = STAGES
    base.MODEL.FPN.IN_FEATURES = STAGES
    if not base.MODEL.FPN.NORM:  # levels of such convolutions would outweigh others in a loss
        base.MODEL.FPN.TOP_BLOCK = "maxpool"
    fit_warmups(base)
    configs = {"teacher": base.clone(), "control": base.clone()}

    cfg = configs["teacher"]
    cfg.MODEL.META_ARCHITECTURE = teacher
    cfg.MODEL.BACKBONE.NAME = f"build_aligned_{kind}_fpn_backbone"
    _set_levels(cfg, first=2 + shift)
    norms = {cfg.MODEL.FPN.NORM, cfg.MODEL.TIMM.NORM if kind == "timm" else cfg.MODEL.RESNETS.NORM}
    # Running statistics of both resolutions together fit neither.
    cfg.MODEL.MULTI_RESOLUTION.SEPARATE_STATISTICS = bool(norms & {"BN", "SyncBN"})
    cfg.TEST.AUG.ENABLED = cfg.TEST.PRECISE_BN.ENABLED = False  # no teacher has them

    cfg = configs["control"]
    if kind == "timm":
        cfg.MODEL.BACKBONE.NAME = "build_timm_fpn_backbone"
    elif cfg.MODEL.FPN.TOP_BLOCK == "maxpool":  # Detectron2's, so that it loads the student
        cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    else:
        cfg.MODEL.BACKBONE.NAME = "build_five_level_resnet_fpn_backbone"
    _set_levels(cfg, first=2)
    _divide_sizes(cfg, scale)
    cfg.SOLVER.BASE_LR *= STUDENT_RATE

    cfg = configs["student"] = configs["control"].clone()
    cfg.MODEL.META_ARCHITECTURE = student
    cfg.KD.LOSSES = default_losses(cfg)
    return configs


def fit_warmups(cfg: CfgNode, losses: bool = True) -> None:
    """Shorten the warm-ups of a config, in place, to WARMUP_SHARE of its schedule.

    Args:
        cfg: the config.
        losses: whether those of a student's distillation losses, too.
    """
    most = int(WARMUP_SHARE * cfg.SOLVER.MAX_ITER)
    cfg.SOLVER.WARMUP_ITERS = min(cfg.SOLVER.WARMUP_ITERS, max(1, most))
    for term in cfg.KD.LOSSES if losses and frame_of(cfg) == "lr" else ():
        term["warmup_iters"] = min(term.get("warmup_iters", 0), most)


def default_losses(cfg: CfgNode) -> list[dict]:
    """Return losses to begin with for a student's config.

    Which loss wins depends on the data. Those of RoI heads need no weight to be found first, as
    they do not depend on the scale of the features; docs/losses.md has what was measured.
    """
    warmup = {"warmup_iters": min(500, int(WARMUP_SHARE * cfg.SOLVER.MAX_ITER))}
    ssim = {"name": "ssim", "weight": 10.0, **warmup}
    if cfg.MODEL.META_ARCHITECTURE == "DistilledRetinaNet":
        convs = min(3, max(1, cfg.MODEL.RETINANET.NUM_CONVS - 1))  # CrossKD has 3 of 4
        return [ssim, {"name": "cross_head", "weight": 1.0, "convs": convs, **warmup}]
    if cfg.MODEL.META_ARCHITECTURE != "DistilledRCNN":
        return [ssim]
    if cfg.MODEL.ROI_HEADS.NAME != "StandardROIHeads":
        return [{"name": "l1", "weight": 0.6, **warmup}]
    parts = {"roi_mask": cfg.MODEL.MASK_ON, "roi_keypoint": cfg.MODEL.KEYPOINT_ON}
    names = ["roi_class", "roi_box", *(name for name, predicted in parts.items() if predicted)]
    return [{"name": name, "weight": 1.0, **warmup} for name in names]


def _check(cfg: CfgNode, scale: int) -> None:
    model = cfg.MODEL
    name = model.META_ARCHITECTURE
    if name not in KINDS:
        known = ", ".join(KINDS)
        words = "it is derived, not given" if frame_of(cfg) else "its levels cannot be aligned"
        raise InputError(f"MODEL.META_ARCHITECTURE is {name}: {words}; give one of {known}")
    if model.BACKBONE.NAME not in FPNS:
        raise InputError(
            f"MODEL.BACKBONE.NAME is {model.BACKBONE.NAME}, which has no pyramid whose levels can "
            f"be shifted (a C4 or DC5 model has one level); use one of {', '.join(FPNS)}"
        )
    if scale < 2:
        raise InputError("the scale is 1: there is no second resolution; use 2 or 4")
    if model.LOAD_PROPOSALS:
        raise InputError("MODEL.LOAD_PROPOSALS is True: proposals of a file are of one resolution")
    inputs = cfg.INPUT
    trained = inputs.JITTER.SIZE or all(inputs.MIN_SIZE_TRAIN)
    if not (trained and inputs.MIN_SIZE_TEST):
        raise InputError(
            "INPUT.MIN_SIZE_TRAIN or MIN_SIZE_TEST is 0, so images keep their size; name the sizes "
            "of the high resolution"
        )
    for key in ("SIZES", "ASPECT_RATIOS") if name != "FCOS" else ():
        lists = model.ANCHOR_GENERATOR[key]
        if isinstance(lists[0], (list, tuple)) and len(lists) not in (1, LEVELS):
            raise InputError(
                f"MODEL.ANCHOR_GENERATOR.{key} has {len(lists)} lists, but teacher and student "
                f"read {LEVELS} levels; give one list, or {LEVELS}"
            )
    smallest = min(map(min, anchor_sizes(cfg)))
    if name != "FCOS" and smallest / scale < 2:
        raise InputError(
            f"the smallest of MODEL.ANCHOR_GENERATOR.SIZES is {smallest:g} px; divided by {scale} "
            "it is under 2 px, too small for any level"
        )


def _set_levels(cfg: CfgNode, first: int) -> None:
    """Let the heads read LEVELS levels, p<first> and coarser; RoI heads all but the last."""
    levels = [f"p{level}" for level in range(first, first + LEVELS)]
    model = cfg.MODEL
    if model.META_ARCHITECTURE.endswith("RCNN"):
        model.RPN.IN_FEATURES, model.ROI_HEADS.IN_FEATURES = levels, levels[:-1]
    elif model.META_ARCHITECTURE.endswith("RetinaNet"):
        model.RETINANET.IN_FEATURES = levels
    else:
        model.FCOS.IN_FEATURES = levels


def _divide_sizes(cfg: CfgNode, scale: int) -> None:
    """Divide sizes of images, as the mapper of two resolutions does, and of anchors."""
    divide_sizes(cfg.INPUT, scale)
    aug = cfg.TEST.AUG
    aug.MIN_SIZES = tuple(-(-size // scale) for size in aug.MIN_SIZES)
    aug.MAX_SIZE = -(-aug.MAX_SIZE // scale)
    if cfg.MODEL.META_ARCHITECTURE == "FCOS":
        return  # it has no anchors; its ranges of sizes follow the strides
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = anchor_sizes(cfg, 1 / scale)
