"""What is wrong with the files of a Cityscapes data set, which Detectron2's reader does not say.

It reads IMAGES/CITY/*_leftImg8bit.png and, below the folder of the ground truth, their
CITY/*_gtFine_polygons.json.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager

from msad_kd.utils.errors import InputError

IMAGE, POLYGONS = "_leftImg8bit.png", "_gtFine_polygons.json"
INSTANCES, _LABELS = "_gtFine_instanceIds.png", "_gtFine_labelIds.png"


def is_cityscapes(name: str) -> bool:
    """Return whether a data set is one of Cityscapes' instances, as Detectron2 registers them."""
    metadata = MetadataCatalog.get(name)
    folders = metadata.get("image_dir") and metadata.get("gt_dir")
    return bool(folders) and metadata.get("evaluator_type") == "cityscapes_instance"


@contextmanager
def explain_cityscapes(names: tuple[str, ...]):
    """Turn what Detectron2 raises for a file of Cityscapes into an ``InputError`` that names it."""
    try:
        yield
    except (OSError, AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        for name in filter(is_cityscapes, names):
            if fault := next(faults(name), None):
                raise InputError(f"data set '{name}': {fault}") from error
        raise


def faults(name: str) -> Iterator[str]:
    """Find what is wrong with the files of a data set; the folders come first."""
    metadata = MetadataCatalog.get(name)
    images, truth = map(PathManager.get_local_path, (metadata.image_dir, metadata.gt_dir))
    for folder in (images, truth):
        if not os.path.isdir(folder):
            yield f"'{folder}' does not exist; DETECTRON2_DATASETS is the folder of 'cityscapes'"
            return
    scenes = []
    for city in sorted(os.scandir(images), key=lambda x: x.name):
        if not city.is_dir():
            yield f"'{city.path}' is no folder of a city; remove it"
            continue
        for file in sorted(os.listdir(city.path)):
            if file.endswith(IMAGE):
                scenes.append(os.path.join(truth, city.name, file.removesuffix(IMAGE)))
            else:
                yield f"'{os.path.join(city.path, file)}' is no '*{IMAGE}'; remove it"
    for suffix in (POLYGONS, INSTANCES, _LABELS):
        lost = [scene for scene in scenes if not os.path.isfile(scene + suffix)]
        if lost:
            words = f"{len(lost)} of the {len(scenes)} scenes have no '*{suffix}'"
            yield f"{words}, e.g. '{lost[0]}{suffix}'; unpack gtFine_trainvaltest.zip again"
    for scene in scenes:
        if os.path.isfile(scene + POLYGONS) and (fault := _fault_of(scene + POLYGONS)):
            yield f"'{scene}{POLYGONS}' cannot be used ({fault}); replace it"


def _fault_of(file: str) -> str:
    """Return what is wrong with a file of polygons, "" if it can be read."""
    from cityscapesscripts.helpers.labels import name2label

    try:
        with open(file, "rb") as opened:
            content = json.load(opened)
        content["imgHeight"], content["imgWidth"]
        for place, item in enumerate(content["objects"], start=1):
            if "deleted" in item:
                continue
            if (
                item["label"] not in name2label
                and item["label"].removesuffix("group") not in name2label
            ):
                return f"object {place} has the unknown label {item['label']!r}"
            if len(item["polygon"]) < 3:
                return f"the polygon of object {place} has fewer than 3 points"
    except KeyError as error:
        return f"it has no {error}"
    except (
        OSError,
        AttributeError,
        TypeError,
        ValueError,
    ) as error:
        return str(error)
    return ""
