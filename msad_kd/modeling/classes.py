"""What a config says of its model: its kind, its classes, masks and anchors."""

from operator import attrgetter

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, RetinaNet

from msad_kd.modeling.fcos import FCOS

# The config key with the number of classes of each kind of detector.
_CLASS_KEYS = {
    GeneralizedRCNN: "MODEL.ROI_HEADS.NUM_CLASSES",
    RetinaNet: "MODEL.RETINANET.NUM_CLASSES",
    FCOS: "MODEL.FCOS.NUM_CLASSES",
}


def is_a(cfg: CfgNode, kind: type) -> bool:
    """Return whether a config's meta-architecture is ``kind`` or a subclass of it."""
    meta = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    return isinstance(meta, type) and issubclass(meta, kind)


def frame_of(cfg: CfgNode) -> str | None:
    """Return "lr" for a student, "hr" for a multi-resolution teacher, None for other models.

    It is the resolution of what the model predicts, and its mapper makes images of both.
    """
    return getattr(META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE), "frame", None)


def class_key(cfg: CfgNode) -> str | None:
    """Return the config key with the number of classes; None for unknown meta-architectures."""
    return next((key for kind, key in _CLASS_KEYS.items() if is_a(cfg, kind)), None)


def number_of_classes(cfg: CfgNode) -> int | None:
    """Return the number of classes; None for unknown meta-architectures."""
    key = class_key(cfg)
    return attrgetter(key)(cfg) if key else None


def anchor_sizes(cfg: CfgNode, factor: float = 1) -> list[list[float]]:
    """Return MODEL.ANCHOR_GENERATOR.SIZES times a factor, a list for each level or one for all.

    The key may hold the list for all levels itself: [32, 64] means [[32, 64]].
    """
    sizes = cfg.MODEL.ANCHOR_GENERATOR.SIZES
    levels = sizes if isinstance(sizes[0], (list, tuple)) else [sizes]
    return [[factor * size for size in level] for level in levels]


def has_masks(cfg: CfgNode) -> bool:
    """Return whether the model predicts masks; dense detectors do not read MODEL.MASK_ON."""
    return cfg.MODEL.MASK_ON and not (is_a(cfg, RetinaNet) or is_a(cfg, FCOS))
