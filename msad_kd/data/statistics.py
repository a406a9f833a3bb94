"""How many objects of which class a data set has, and how large they are in resized images.

N objects. The side of an object is the shorter side of its box: an object that is narrower than a
cell of the pyramid's finest level (p2: 4 px) leaves little trace in it, however long it is.
"""

import logging
from dataclasses import dataclass

import numpy as np
from detectron2.config import CfgNode
from detectron2.structures import BoxMode

from msad_kd.modeling.classes import frame_of

LIMITS = (4, 8)  # px: a cell of p2, and two of them
MANY = 0.25  # the share of images or objects from which on there is a warning


@dataclass
class Objects:
    """The objects of a data set, without crowds."""

    sides: np.ndarray  # (N,), in pixels of the image
    image_sides: np.ndarray  # (N, 2): shorter and longer side of each object's image, in pixels
    classes: np.ndarray  # (N,)


def collect_objects(dicts: list[dict]) -> Objects:
    """Return the objects in Detectron2's dicts; images without height and width are left out."""
    rows = []
    for entry in dicts:
        if "height" not in entry or "width" not in entry:  # Detectron2 needs neither
            continue
        image_sides = sorted((entry["height"], entry["width"]))
        for x in entry.get("annotations", ()):
            if not x.get("iscrowd", 0):
                box = BoxMode.convert(list(x["bbox"]), x["bbox_mode"], BoxMode.XYWH_ABS)
                rows.append((min(box[2:4]), *image_sides, x["category_id"]))
    table = np.array(rows, dtype=float).reshape(-1, 4)
    return Objects(table[:, 0], table[:, 1:3], table[:, 3].astype(int))


def enlarged_share(image_sides: np.ndarray, short: float, longest: float) -> float:
    """Return the share of images (0 to 1) that resizing enlarges; arguments as for the scales."""
    return float(np.mean(resize_scales(image_sides, short, longest) > 1)) if len(image_sides) else 0


def warn_of_small_images(cfg: CfgNode, dicts: list[dict]) -> None:
    """Warn if the images are smaller than the low resolution that a config's model trains on."""
    frame = frame_of(cfg)
    sizes = [size for size in cfg.INPUT.MIN_SIZE_TRAIN if size]
    if frame is None or not sizes or cfg.INPUT.JITTER.SIZE:
        return
    factor = cfg.KD.SCALE if frame == "hr" else 1
    short, longest = max(sizes) / factor, cfg.INPUT.MAX_SIZE_TRAIN / factor
    sides = [(x["height"], x["width"]) for x in dicts if "height" in x and "width" in x]
    share = enlarged_share(np.sort(np.array(sides).reshape(-1, 2)), short, longest)
    if share > MANY:
        logging.getLogger(__name__).warning(
            f"DATASETS.TRAIN: {share:.0%} of the images are smaller than the low resolution "
            f"(INPUT.MIN_SIZE_TRAIN, a short side of {short:g} px): both resolutions are enlarged, "
            "and the high one shows nothing more; choose smaller sizes"
        )


def resize_scales(image_sides: np.ndarray, short: float, longest: float) -> np.ndarray:
    """Return the factors (N,) by which Detectron2 resizes images.

    Args:
        image_sides: shorter and longer sides (N, 2), in pixels.
        short: what the shorter side becomes (INPUT.MIN_SIZE_TEST) ...
        longest: ... unless the longer side would exceed this (INPUT.MAX_SIZE_TEST).
    """
    return np.minimum(short / image_sides[:, 0], longest / image_sides[:, 1])
