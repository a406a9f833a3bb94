"""The classes of data sets: read from their files, and mapped by name to those of the model.

The model's classes, in its order, are DATASETS.CLASSES or, by default, those of the data set in
DATASETS.TRAIN that has most. Other data sets may have fewer, in any order.
"""

import json
import os
from collections.abc import Sequence
from functools import lru_cache, partial

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager
from torch import nn

from msad_kd.data.annotations import whole_number
from msad_kd.data.coco_format import load_checked
from msad_kd.modeling.classes import class_key, number_of_classes
from msad_kd.utils.errors import InputError

# The modules whose functions load a data set from a file in COCO format.
_COCO_LOADERS = ("detectron2.data.datasets.coco", "msad_kd.data.coco_format")


def annotation_file(data_set: str) -> str | None:
    """Return the file in COCO format that a data set is loaded from, None if there is none."""
    load = DatasetCatalog.data.get(data_set)
    known = getattr(getattr(load, "func", load), "__module__", None) in _COCO_LOADERS
    return MetadataCatalog.get(data_set).get("json_file") if known else None


def file_categories(data_set: str) -> tuple[dict, ...]:
    """Return the categories of a data set's annotation file in the order of their ids.

    They are () without such a file, or if it is not in COCO format, an error when it is loaded.
    """
    file = annotation_file(data_set)
    if file is None or not PathManager.isfile(file):
        return ()
    file = PathManager.get_local_path(file)
    return _categories_in(file, os.stat(file).st_mtime_ns)


def class_names(data_set: str) -> list[str]:
    """Return a data set's own classes in the order of their ids; [] if unknown."""
    if annotation_file(data_set) is None:
        return _metadata_classes(data_set)
    return [category["name"] for category in file_categories(data_set)]


def _metadata_classes(data_set: str) -> list[str]:
    return list(MetadataCatalog.get(data_set).get("thing_classes") or ())


@lru_cache(maxsize=256)
def _categories_in(file: str, _modified: int) -> tuple[dict, ...]:
    with open(file, "rb") as opened:
        content = opened.read()
    try:
        # COCO's training file has 450 MB, of which the categories are a few kilobytes.
        _, *after = content.split(b'"categories"')
        if len(after) == 1:
            text = after[0].lstrip(b" \t\r\n:").decode()
            categories = json.JSONDecoder().raw_decode(text)[0]
        else:  # other parts of the file may use this word
            categories = json.loads(content)["categories"]
        ordered = sorted(categories, key=lambda x: whole_number(x["id"]))
        named = all(isinstance(category["name"], str) for category in ordered)
        return tuple(ordered) if named else ()
    except (KeyError, TypeError, ValueError, RecursionError):
        return ()


def model_classes(cfg: CfgNode) -> tuple[list[str], str]:
    """Return the names of a model's classes, [] if unknown, and where they come from.

    Raises:
        InputError: if DATASETS.CLASSES is not a list of different names.
    """
    names = list(cfg.DATASETS.CLASSES)
    if len({name for name in names if isinstance(name, str)}) != len(names):
        raise InputError(f"DATASETS.CLASSES is {names}; it should be a list of different names")
    if names:
        return names, "the model (DATASETS.CLASSES, or its checkpoint's classes)"
    known = {name: class_names(name) for name in cfg.DATASETS.TRAIN or ()}
    for name in [name for name in known if not known[name]]:  # without the file, such as COCO's
        expected = _metadata_classes(name)
        known[name] = expected if len(expected) == number_of_classes(cfg) else []
    first = max(known, key=lambda data_set: len(known[data_set]), default=None)
    return (known[first], _describe(first)) if first else ([], "")


def class_labels(cfg: CfgNode) -> list[str]:
    """Return a name for each class of a model: "class 3" where there is none."""
    names = model_classes(cfg)[0]
    return names + [f"class {index}" for index in range(len(names), number_of_classes(cfg) or 0)]


def _describe(data_set: str) -> str:
    file = annotation_file(data_set)
    return f"data set '{data_set}'" + (f" ('{file}')" if file else "")


def align_classes(cfg: CfgNode, data_sets: Sequence[str] | None) -> None:
    """Check the classes of data sets, and number those of their dicts as the model does.

    Afterwards, metadata and dicts of a data set with an annotation file have all of the model's
    classes. A class that the file lacks gets an id that the file does not use. A model may have
    more classes than the data: these have no names and are never seen.

    Raises:
        InputError: if a data set has a class that the model lacks, if the names of the model's
            are unknown and it has more, or if the order differs and cannot be changed.
    """
    classes, source = model_classes(cfg)
    limit = number_of_classes(cfg)
    for data_set in data_sets or ():
        own = class_names(data_set)
        if classes and own:
            _check_names(data_set, own, classes, source)
        if limit is not None and len(own) > limit:
            raise InputError(_too_many(cfg, f"the data set '{data_set}'", own))
        if not classes and own and limit not in (None, len(own)):
            raise InputError(
                f"{_describe(data_set)} has {len(own)} classes and the model {limit}, whose names "
                "are unknown; list the model's classes in DATASETS.CLASSES"
            )
        if limit is not None and len(classes) > limit:
            raise InputError(_too_many(cfg, source, classes))
        if file := annotation_file(data_set):
            images = MetadataCatalog.get(data_set).image_root
            invalid = cfg.DATASETS.INVALID_ANNOTATIONS
            # Evaluations read their file again; training data may be too large to be kept.
            keep = data_set in {*(cfg.DATASETS.TEST or ())} - {*(cfg.DATASETS.TRAIN or ())}
            options = {"invalid": invalid, "classes": classes or None, "keep": keep}
            DatasetCatalog.data[data_set] = partial(load_checked, file, images, data_set, **options)


def _check_names(data_set: str, own: list[str], classes: list[str], source: str) -> None:
    unknown = [name for name in own if name not in classes]
    if unknown:
        examples = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        raise InputError(
            f"{_describe(data_set)} has classes that {source} lacks: {examples}; give a class the "
            "same name in all files, or list all classes that a model to be trained should have in "
            "DATASETS.CLASSES"
        )
    if annotation_file(data_set) is None and own != classes[: len(own)]:
        raise InputError(
            f"{_describe(data_set)} has its classes in another order than {source}, and no "
            f"annotation file in which they could be mapped; set DATASETS.CLASSES to {own}"
        )


def spare_classes(cfg: CfgNode) -> str:
    """Return a warning if a model has more classes than DATASETS.TRAIN, and "" if not."""
    names, count = model_classes(cfg)[0], number_of_classes(cfg)
    if not names or count is None or count <= len(names):
        return ""
    return (
        f"{class_key(cfg)} is {count}, and the data have {len(names)} classes: the others are "
        f"never seen; set it to {len(names)}"
    )


def _too_many(cfg: CfgNode, owner: str, names: list[str]) -> str:
    return (
        f"{class_key(cfg)} is {number_of_classes(cfg)}, but {owner} has {len(names)} classes "
        f"({', '.join(names[:3])}, ...); set it to {len(names)}"
    )


def with_classes_of(cfg: CfgNode, model: nn.Module) -> CfgNode:
    """Return a config whose DATASETS.CLASSES are those that a model's checkpoint names.

    ``load_strictly`` keeps them as ``model.classes``. If there are none, nothing changes.

    Raises:
        InputError: if DATASETS.CLASSES has others already.
    """
    classes, now = list(getattr(model, "classes", ())), list(cfg.DATASETS.CLASSES)
    if now and classes not in ([], now):
        raise InputError(
            f"DATASETS.CLASSES is {now}, but the model's checkpoint was trained on {classes}; "
            "correct DATASETS.CLASSES or leave it empty"
        )
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATASETS.CLASSES = classes or now
    cfg.freeze()
    return cfg
