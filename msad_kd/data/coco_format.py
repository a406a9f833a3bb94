"""Data sets in COCO format, or folders of images, registered from the config and checked."""

import logging
import os
from collections import defaultdict
from functools import partial
from itertools import count
from typing import Annotated

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from msad_kd.data.annotations import compressed, read_annotations, read_kept
from msad_kd.data.dict_checks import check_files
from msad_kd.data.images import ImageError, image_size, list_images
from msad_kd.utils.errors import InputError
from msad_kd.utils.schema import read_fields

_logger = logging.getLogger(__name__)

KEYPOINT_NAMES = Annotated[
    list[str], lambda names: 0 < len(set(names)) == len(names), "a list of different names"
]
_PAIRS = Annotated[list[tuple[str, str]], lambda _: True, "a list of pairs of keypoint_names"]
# What an entry of DATASETS.COCO_FORMAT may say of keypoints.
_KEYPOINTS = {"keypoint_names": KEYPOINT_NAMES, "keypoint_flip_map": _PAIRS, "skeleton": _PAIRS}


def register_coco_format(cfg: CfgNode) -> None:
    """Register the data sets of DATASETS.COCO_FORMAT under their names.

    An entry without ``json`` is a folder of images without labels; see ``load_folder``. Registering
    the same files under the same name twice is allowed. What an entry says of keypoints becomes
    metadata; ``data/keypoints.py`` reads the rest from the file.

    Raises:
        InputError: if an entry lacks a field or has an unknown one, or if its name is taken.
    """
    invalid = cfg.DATASETS.INVALID_ANNOTATIONS
    if not isinstance(cfg.DATASETS.COCO_FORMAT, (list, tuple)):
        raise InputError("DATASETS.COCO_FORMAT should be a list of {name, json, images}")
    fields = {"name": str, "json": str, "images": str, **_KEYPOINTS}
    for number, entry in enumerate(cfg.DATASETS.COCO_FORMAT, start=1):
        read_fields(entry, "DATASETS.COCO_FORMAT", f"data set {number}", fields, ("name", "images"))
        name, images = entry["name"], _locate(entry["images"])
        json_file = _locate(entry["json"]) if "json" in entry else None
        if name in DatasetCatalog.list():
            registered = MetadataCatalog.get(name)
            if (registered.get("json_file"), registered.get("image_root")) != (json_file, images):
                words = f"'{name}' exists already; rename your data set"
                raise InputError(f"DATASETS.COCO_FORMAT: {words}")
        elif json_file is None:
            DatasetCatalog.register(name, partial(load_folder, images, name, invalid=invalid))
            MetadataCatalog.get(name).set(image_root=images)
        else:
            loader = partial(load_checked, json_file, images, name, invalid=invalid)
            DatasetCatalog.register(name, loader)
            new = {"json_file": json_file, "image_root": images, "evaluator_type": "coco"}
            MetadataCatalog.get(name).set(**new)
        known = vars(MetadataCatalog.get(name))  # metadata refuse to change
        if _is_own(name):
            for key in _KEYPOINTS:  # an earlier config of this process may have set it
                known.pop(key, None)
        known.update({key: entry[key] for key in _KEYPOINTS if key in entry})


def _is_own(name: str) -> bool:
    return getattr(DatasetCatalog.data.get(name), "func", None) in (load_folder, load_checked)


def dicts_of(name: str, invalid: str) -> list[dict]:
    """Return the dicts of a data set; of one in DATASETS.COCO_FORMAT, by this INVALID_ANNOTATIONS.

    An earlier config of this process may have registered it with another value.
    """
    return DatasetCatalog.data[name](invalid=invalid) if _is_own(name) else DatasetCatalog.get(name)


def is_folder(name: str) -> bool:
    """Return whether a data set is a folder of images without labels."""
    return getattr(DatasetCatalog.data.get(name), "func", None) is load_folder


def datasets_folder() -> str:
    """Return the folder that DETECTRON2_DATASETS names, where relative paths start."""
    return os.path.expanduser(os.getenv("DETECTRON2_DATASETS") or "datasets")


def _locate(path: str) -> str:
    return os.path.join(datasets_folder(), os.path.expanduser(path))


def load_checked(
    json_file: str,
    images: str,
    name: str,
    invalid: str = "error",
    classes: list[str] | None = None,
    keep: bool = False,
) -> list[dict]:
    """Load a COCO-format data set as Detectron2's dicts, and check that every image exists.

    Args:
        json_file: the annotation file.
        images: the folder that ``file_name`` entries are relative to.
        name: the data set's name; its metadata receive the class names.
        invalid: DATASETS.INVALID_ANNOTATIONS.
        classes: the class names in the model's order, which the file's categories are mapped to by
            name; None for the file's own, in the order of their ids.
        keep: whether to keep the file's content for ``read_kept``.

    Returns:
        The dicts that Detectron2's ``load_coco_json`` returns for a valid file; annotations that
        have a ``score`` keep it.

    Raises:
        InputError: if something is missing, or if the file is not in COCO format.
    """
    _check_exists(json_file, "annotation file", name)
    _check_exists(images, "image folder", name)
    content = (read_kept if keep else read_annotations)(json_file, name, invalid)
    classes, index_of = class_order(content["categories"], name, classes)
    # Metadata refuse to change. A run may have other classes than the one before in this process.
    new = {"thing_classes": classes, "thing_dataset_id_to_contiguous_id": index_of}
    vars(MetadataCatalog.get(name)).update(new)
    dicts = make_dicts(content, images, index_of)
    check_files([entry["file_name"] for entry in dicts], json_file, name)
    _logger.info("Loaded %d images in COCO format from %s", len(dicts), json_file)
    return dicts


def load_folder(images: str, name: str, invalid: str = "error") -> list[dict]:
    """List a folder's images, in the order of their names, as Detectron2's dicts without labels.

    A file is an image if Pillow knows its suffix; hidden files and folders within are left out.

    Args:
        images: the folder.
        name: the data set's name, for messages.
        invalid: DATASETS.INVALID_ANNOTATIONS: "drop" leaves out images that cannot be opened.

    Raises:
        InputError: if the folder is missing or has no images, or if one cannot be opened.
    """
    _check_exists(images, "image folder", name)
    dicts, broken = [], []
    for file in list_images(images):
        try:
            height, width = image_size(file)
        except ImageError as error:
            broken.append(error)
            continue
        dicts.append({"file_name": file, "height": height, "width": width, "image_id": len(dicts)})
    if broken and invalid != "drop":
        raise InputError(f"data set '{name}': {broken[0]} ({len(broken)} such images in all)")
    if broken:
        _logger.warning("Data set '%s': %d images are left out: %s", name, len(broken), broken[0])
    if not dicts:
        raise InputError(f"data set '{name}': the folder '{images}' has no images")
    _logger.info("Found %d images without labels in %s", len(dicts), images)
    return dicts


def _check_exists(path: str, kind: str, name: str) -> None:
    if not PathManager.exists(path):
        raise InputError(
            f"data set '{name}': the {kind} '{path}' does not exist; check DETECTRON2_DATASETS, "
            "where relative paths start, and if it is yours, its entry of DATASETS.COCO_FORMAT"
        )


def class_order(
    categories: list[dict], name: str, classes: list[str] | None = None
) -> tuple[list[str], dict[int, int]]:
    """Return the class names of a data set, and the class of each category id.

    A class that the file lacks gets an id that it does not use: Detectron2 wants one for each.

    Args:
        categories: the categories of the annotation file.
        name: the data set's name, for messages.
        classes: as for ``load_checked``.

    Raises:
        InputError: if a category is not among ``classes``.
    """
    categories = sorted(categories, key=lambda category: category["id"])
    names = [category["name"] for category in categories]
    classes = names if classes is None else list(classes)
    unknown = [category for category in names if category not in classes]
    if unknown:
        words = f"the class '{unknown[0]}' is not one of {', '.join(classes)}"
        raise InputError(f"data set '{name}': {words}")
    index_of = {category["id"]: classes.index(category["name"]) for category in categories}
    unused = count(max(index_of, default=0) + 1)
    absent = sorted(set(range(len(classes))) - set(index_of.values()))
    return classes, index_of | {next(unused): index for index in absent}


def make_dicts(content: dict, image_root: str, index_of: dict[int, int]) -> list[dict]:
    """Return Detectron2's dicts of a normalised annotation file, images in the order of their ids.

    Args:
        content: what ``read_annotations`` returns; it stays as it is.
        image_root: the folder of the images.
        index_of: category id to class.
    """
    objects = defaultdict(list)
    for annotation in content["annotations"]:
        entry = {key: annotation[key] for key in ("iscrowd", "bbox")}
        if segmentation := annotation.get("segmentation"):
            is_rle = isinstance(segmentation, dict)
            entry["segmentation"] = compressed(segmentation) if is_rle else segmentation
        if keypoints := annotation.get("keypoints"):
            # COCO's keypoints are pixel indices; half a pixel makes them coordinates.
            entry["keypoints"] = [v if i % 3 == 2 else v + 0.5 for i, v in enumerate(keypoints)]
        if "score" in annotation:  # of a label that a model has given
            entry["score"] = annotation["score"]
        entry["bbox_mode"] = BoxMode.XYWH_ABS
        entry["category_id"] = index_of[annotation["category_id"]]
        objects[annotation["image_id"]].append(entry)
    return [
        {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": objects[image["id"]],
        }
        for image in sorted(content["images"], key=lambda image: image["id"])
    ]
