"""Data sets in COCO format, registered from the config and checked before training starts."""

import os
from functools import partial

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils.file_io import PathManager

from msad_kd.utils.errors import InputError


def register_coco_format(cfg: CfgNode) -> None:
    """Register the data sets of DATASETS.COCO_FORMAT under their names.

    Registering the same files under the same name twice is allowed.

    Raises:
        InputError: if an entry lacks a field or has an unknown one, or if its name is taken.
    """
    if not isinstance(cfg.DATASETS.COCO_FORMAT, (list, tuple)):
        raise InputError("DATASETS.COCO_FORMAT should be a list of {name, json, images}")
    for entry in cfg.DATASETS.COCO_FORMAT:
        if not isinstance(entry, dict) or set(entry) != {"name", "json", "images"}:
            raise InputError(f"DATASETS.COCO_FORMAT: {entry} needs fields name, json and images")
        name, json_file, images = entry["name"], _locate(entry["json"]), _locate(entry["images"])
        if name in DatasetCatalog.list():
            registered = MetadataCatalog.get(name)
            if (registered.get("json_file"), registered.get("image_root")) == (json_file, images):
                continue
            raise InputError(f"DATASETS.COCO_FORMAT: '{name}' exists already; rename your data set")
        DatasetCatalog.register(name, partial(load_checked, json_file, images, name))
        MetadataCatalog.get(name).set(json_file=json_file, image_root=images, evaluator_type="coco")


def _locate(path: str) -> str:
    return os.path.join(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")), path)


def load_checked(
    json_file: str,
    images: str,
    name: str,
    invalid: str = "error",
    classes: list[str] | None = None,
) -> list[dict]:
    """Load a COCO-format data set as Detectron2's dicts, and check that every image exists.

    Args:
        json_file: the annotation file.
        images: the folder that ``file_name`` entries are relative to.
        name: the data set's name; its metadata receive the class names.
        invalid: DATASETS.INVALID_ANNOTATIONS.
        classes: the class names in the model's order, which the file's categories are mapped to by
            name; None for the file's own, in the order of their ids.

    Raises:
        InputError: if something is missing, or if the file is not in COCO format.
    """
    for path, kind in ((json_file, "annotation file"), (images, "image folder")):
        if not PathManager.exists(path):
            raise InputError(
                f"data set '{name}': the {kind} '{path}' does not exist; check "
                "DATASETS.COCO_FORMAT, and DETECTRON2_DATASETS, where relative paths start"
            )
    try:
        dicts = load_coco_json(json_file, images, name)
    except (AttributeError, AssertionError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"data set '{name}': '{json_file}' is not in COCO format ({type(error).__name__}: "
            f"{error}), which has images, annotations and categories"
        ) from error
    if not dicts:
        raise InputError(f"data set '{name}': '{json_file}' is not in COCO format, or is empty")
    missing = [d["file_name"] for d in dicts if not PathManager.exists(d["file_name"])]
    if missing:
        raise InputError(
            f"data set '{name}': {len(missing)} of the {len(dicts)} images in '{json_file}' are "
            f"missing, e.g. '{missing[0]}'"
        )
    return dicts
