"""Which classes and masks a model has, by its config, and whether they suit the data."""

from __future__ import annotations

import json

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, RetinaNet
from detectron2.utils.file_io import PathManager
from torch import nn

from msad_kd.modeling.fcos import FCOS
from msad_kd.utils.errors import InputError

__all__ = ["check_classes", "class_key", "has_masks", "is_a", "number_of_classes"]

# Meta-architecture to the config key that says how many classes it tells apart.
_KEYS: tuple[tuple[type[nn.Module], str], ...] = (
    (GeneralizedRCNN, "MODEL.ROI_HEADS.NUM_CLASSES"),
    (RetinaNet, "MODEL.RETINANET.NUM_CLASSES"),
    (FCOS, "MODEL.FCOS.NUM_CLASSES"),
)


def is_a(cfg: CfgNode, kind: type) -> bool:
    """Whether a config's meta-architecture is of a kind."""
    meta = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    return isinstance(meta, type) and issubclass(meta, kind)


def class_key(cfg: CfgNode) -> str | None:
    """The config key with the model's number of classes; None for an unknown meta-architecture."""
    return next((key for kind, key in _KEYS if is_a(cfg, kind)), None)


def number_of_classes(cfg: CfgNode) -> int | None:
    """The number of classes of a config's model; None for an unknown meta-architecture."""
    node, key = cfg, class_key(cfg)
    if key is None:
        return None
    for name in key.split("."):
        node = node[name]
    return node


def has_masks(cfg: CfgNode) -> bool:
    """Whether a config's model predicts masks; dense detectors do not read MODEL.MASK_ON."""
    dense = any(is_a(cfg, kind) for kind, _ in _KEYS if kind is not GeneralizedRCNN)
    return cfg.MODEL.MASK_ON and not dense


def _class_names(data_set: str) -> list[str]:
    """The classes of a data set; of one that is not loaded yet, by its file. Empty if unknown."""
    metadata = MetadataCatalog.get(data_set)
    names = metadata.get("thing_classes")
    if names is None and PathManager.isfile(metadata.get("json_file", "")):
        try:
            with PathManager.open(metadata.json_file) as file:
                names = [category["name"] for category in json.load(file)["categories"]]
        except (KeyError, TypeError, ValueError):
            pass  # it is not in COCO format, as will be told when it is loaded
    return names or []


def check_classes(cfg: CfgNode, data_sets: tuple[str, ...]) -> None:
    """Check that the model has all classes of some data sets.

    More classes than the data have are legal: they are never seen.

    Raises:
        InputError: if a data set has more classes.
    """
    own = number_of_classes(cfg)
    for data_set in data_sets if own is not None else ():
        names = _class_names(data_set)
        if len(names) > own:
            raise InputError(
                f"{class_key(cfg)} is {own}, but the data set '{data_set}' has {len(names)} "
                f"classes ({', '.join(names[:3])}, ...); set it to {len(names)}"
            )
