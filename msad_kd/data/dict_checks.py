"""Checks of Detectron2's dicts of a data set before training starts."""

import logging
import math
import os
from collections.abc import Callable
from contextlib import contextmanager

import numpy as np
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from msad_kd.data.cityscapes_files import explain_cityscapes
from msad_kd.utils.compat import plain_proposals
from msad_kd.utils.errors import InputError

_logger = logging.getLogger(__name__)

_KEYS = ("annotations", "file_name", "height", "width", "image_id")  # of Detectron2's dicts


@contextmanager
def explain_missing_data(names: tuple[str, ...]):
    """Turn Detectron2's errors about the data sets ``names`` into an ``InputError``."""
    if not names:
        raise InputError("no data set is named; set DATASETS.TRAIN in the file of --config-file")
    data_sets = f"data set {', '.join(names)}"
    try:
        with plain_proposals(), explain_cityscapes(names):
            yield
    except FileNotFoundError as error:
        words = f"'{error.filename}' does not exist; set DETECTRON2_DATASETS to the folder with it"
        raise InputError(f"{data_sets}: {words}") from error
    except ImportError as error:
        words = "install the package, for Cityscapes cityscapesScripts"
        raise InputError(f"{data_sets}: {error}; {words}") from error
    except KeyError as error:
        if not error.args or error.args[0] not in _KEYS:  # of the data set's own function
            raise
        words = f"one of the dicts that its function returns has no {error}; add it to all of them"
        raise InputError(f"{data_sets}: {words}") from error
    except AssertionError as error:  # empty, or empty without the images that have no boxes
        raise InputError(f"{data_sets}: {error}") from error


def check_files(files: list[str], json_file: str, name: str) -> None:
    """Check that images are regular files: to open a pipe would wait for ever.

    Args:
        files: the images' files.
        json_file: the annotation file that names them, for the message.
        name: the data set's name.

    Raises:
        InputError: if one is missing or no regular file.
    """
    if missing := missing_files(files):
        raise InputError(
            f"data set '{name}': {len(missing)} of the {len(files)} images in '{json_file}' are "
            f"missing or no regular files, e.g. {missing[0][:300]!r}"
        )


def missing_files(files: list[str]) -> list[str]:
    """Return those of some files that are missing or no regular files.

    A folder is listed once, which takes a fraction of the time of asking for each file.
    """
    folders: dict[str, set[str]] = {}
    missing = []
    for file in files:
        folder, base = os.path.split(file)
        if folder not in folders:
            folders[folder] = _regular_files(folder)
        # A file that the listing lacks may be at an address, or differ in upper and lower case.
        if base not in folders[folder] and not PathManager.isfile(file):
            missing.append(file)
    return missing


def _regular_files(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (OSError, ValueError):
        return set()


def _objects(entry: dict) -> list[tuple[int, dict]]:
    """Return place and annotation of the objects of an image, without crowds, as a mapper does."""
    annotations = enumerate(entry.get("annotations", ()))
    return [(place, x) for place, x in annotations if not x.get("iscrowd", 0)]


def check_objects(cfg: CfgNode, dicts: list[dict], name: str, mapper: Callable) -> None:
    """Check that objects have the masks and keypoints that a model is trained on.

    Raises:
        InputError: if one lacks them; see the functions below.
    """
    if cfg.MODEL.MASK_ON:
        check_masks(dicts, name)
        accept_rles(mapper, dicts, name)
    if cfg.MODEL.KEYPOINT_ON:
        check_keypoint_counts(dicts, name, cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS)


def check_masks(dicts: list[dict], name: str) -> None:
    """Check that every object has a mask, as training with MODEL.MASK_ON needs.

    Args:
        dicts: Detectron2's dicts.
        name: the data sets' names, for the message.

    Raises:
        InputError: if an object has none.
    """
    words = "have no segmentation", "set MODEL.MASK_ON False, or add the masks"
    _refuse(dicts, name, lambda x: "segmentation" not in x, *words)


def check_keypoint_counts(dicts: list[dict], name: str, count: int) -> None:
    """Check that every object has as many keypoints as a model predicts.

    Args:
        dicts: Detectron2's dicts.
        name: the data sets' names, for the message.
        count: MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS.

    Raises:
        InputError: if an object has another number of keypoints, or none.
    """
    words = f"do not have {count} keypoints (MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS)"
    remedy = "set it to the number in the data, or MODEL.KEYPOINT_ON False"
    _refuse(dicts, name, lambda x: np.size(x.get("keypoints", ())) != 3 * count, words, remedy)


def _refuse(
    dicts: list[dict], name: str, is_bad: Callable[[dict], bool], words: str, remedy: str
) -> None:
    objects = [(entry, *item) for entry in dicts for item in _objects(entry)]
    bad = [item for item in objects if is_bad(item[2])]
    if bad:
        entry, place, _ = bad[0]
        raise InputError(
            f"data set '{name}': {len(bad)} of {len(objects)} annotations {words}, e.g. number "
            f"{place + 1} of image '{entry['file_name']}'; {remedy}"
        )


def accept_rles(mapper: Callable, dicts: list[dict], name: str) -> None:
    """Set a mapper's mask format to "bitmask" if an object's mask is an RLE.

    Bitmasks hold polygons and RLEs, polygons only themselves. Polygons alone stay polygons.
    """
    if getattr(mapper, "instance_mask_format", None) != "polygon" or not mapper.use_instance_mask:
        return
    objects = (x for entry in dicts for _, x in _objects(entry))
    if any(isinstance(x.get("segmentation"), dict) for x in objects):
        _logger.info("Data set '%s' has masks in RLE: INPUT.MASK_FORMAT is bitmask for it", name)
        mapper.instance_mask_format = "bitmask"


def check_shapes(
    dicts: list[dict], name: str, mapper: Callable, drop: bool | None = None
) -> list[dict]:
    """Find images so narrow that resizing would leave less than a pixel of the shorter side.

    Args:
        dicts: Detectron2's dicts.
        name: the data sets' names, for messages.
        mapper: resizes the images, to its ``longest_side`` at the most; others are not checked.
        drop: whether to leave such images out; None if that is not possible.

    Returns:
        The other images.

    Raises:
        InputError: if there are such images, and they are not to be dropped.
    """
    longest = getattr(mapper, "longest_side", math.inf)
    if longest == math.inf:
        return dicts
    sized = (d for d in dicts if "height" in d and "width" in d)  # Detectron2 needs neither
    sides = ((d, *sorted((d["height"], d["width"]))) for d in sized)
    narrow = [d for d, short, long in sides if int(short * longest / long + 0.5) < 1]
    if not narrow:
        return dicts
    first = narrow[0]
    words = (
        f"data set '{name}': {len(narrow)} of {len(dicts)} images are so narrow that nothing is "
        f"left of their shorter side when they are resized, e.g. '{first['file_name']}', "
        f"{first['width']} x {first['height']} px"
    )
    if not drop or len(narrow) == len(dicts):
        remedy = ", or set DATASETS.INVALID_ANNOTATIONS drop" if drop is False else ""
        raise InputError(f"{words}; remove them{remedy}")
    _logger.warning("%s; they are left out", words)
    dropped = set(map(id, narrow))
    return [d for d in dicts if id(d) not in dropped]
