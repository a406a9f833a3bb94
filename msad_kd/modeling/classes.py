"""The classes and masks that a config's model predicts, checked against the data sets."""

import json
from operator import attrgetter

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, RetinaNet
from detectron2.utils.file_io import PathManager

from msad_kd.modeling.fcos import FCOS
from msad_kd.utils.errors import InputError

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


def class_key(cfg: CfgNode) -> str | None:
    """Return the config key with the number of classes; None for unknown meta-architectures."""
    return next((key for kind, key in _CLASS_KEYS.items() if is_a(cfg, kind)), None)


def number_of_classes(cfg: CfgNode) -> int | None:
    """Return the number of classes; None for unknown meta-architectures."""
    key = class_key(cfg)
    return attrgetter(key)(cfg) if key else None


def has_masks(cfg: CfgNode) -> bool:
    """Return whether the model predicts masks; dense detectors do not read MODEL.MASK_ON."""
    return cfg.MODEL.MASK_ON and not (is_a(cfg, RetinaNet) or is_a(cfg, FCOS))


def _class_names(data_set: str) -> list[str]:
    """Return a data set's classes, read from its file if it is not loaded yet; [] if unknown."""
    metadata = MetadataCatalog.get(data_set)
    names = metadata.get("thing_classes")
    if names is None and PathManager.isfile(metadata.get("json_file", "")):
        try:
            with PathManager.open(metadata.json_file) as file:
                names = [category["name"] for category in json.load(file)["categories"]]
        except (KeyError, TypeError, ValueError):
            pass  # not in COCO format, which is an error when the data set is loaded
    return names or []


def check_classes(cfg: CfgNode, data_sets: tuple[str, ...]) -> None:
    """Check that the model has all classes of the data sets.

    A model may have more classes than the data: these are never seen.

    Raises:
        InputError: if a data set has more classes than the model.
    """
    count = number_of_classes(cfg)
    for data_set in data_sets if count is not None else ():
        names = _class_names(data_set)
        if len(names) > count:
            raise InputError(
                f"{class_key(cfg)} is {count}, but the data set '{data_set}' has {len(names)} "
                f"classes ({', '.join(names[:3])}, ...); set it to {len(names)}"
            )
