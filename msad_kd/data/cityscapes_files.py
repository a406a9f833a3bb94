"""Read Cityscapes safely by Detectron2: name what is wrong with its files, and end its processes.

It reads IMAGES/CITY/*_leftImg8bit.png and, below the folder of the ground truth, their
CITY/*_gtFine_polygons.json.
"""

import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

from detectron2.data import MetadataCatalog
from detectron2.data.datasets import cityscapes
from detectron2.utils.file_io import PathManager

from msad_kd.utils.errors import InputError
from msad_kd.utils.replaced import replaced
from msad_kd.utils.signals import heed_parent_alone

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
        with ending_pools():
            yield
    except (OSError, AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        for name in filter(is_cityscapes, names):
            if fault := next(faults(name), None):
                raise InputError(f"data set '{name}': {fault}") from error
        raise


@contextmanager
def ending_pools():
    """Let the pools of processes that Detectron2 opens for Cityscapes, and never closes, end.

    Their processes are forked. Spawned ones, the default in a launched process, would import
    everything anew, in seconds each. They are born with SIGTERM blocked until they heed their
    parent's: a handler that they inherit could swallow an earlier one, and the pool would not end.
    """
    context, pools = multiprocessing.get_context("fork"), []

    def pool(processes: int):
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            pools.append(context.Pool(processes, heed_parent_alone, (os.getpid(),)))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return pools[-1]

    with replaced(cityscapes, mp=SimpleNamespace(Pool=pool, cpu_count=multiprocessing.cpu_count)):
        try:
            yield
        finally:
            for each in pools:
                each.terminate()
                each.join()


def faults(name: str) -> Iterator[str]:
    """Find what is wrong with the files of a data set; the folders come first."""
    metadata = MetadataCatalog.get(name)
    images, truth = map(PathManager.get_local_path, (metadata.image_dir, metadata.gt_dir))
    for folder in (images, truth):
        if not os.path.isdir(folder):
            words = "set DETECTRON2_DATASETS to the folder that has 'cityscapes'"
            yield f"'{folder}' does not exist; {words}"
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
            label = item["label"]
            if not {label, label.removesuffix("group")} & name2label.keys():
                return f"object {place} has the unknown label {label!r}"
            if len(item["polygon"]) < 3:
                return f"the polygon of object {place} has fewer than 3 points"
    except KeyError as error:
        return f"it has no {error}"
    except (OSError, AttributeError, TypeError, ValueError) as error:
        return str(error)
    return ""
