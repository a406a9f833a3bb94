"""The augmentations that a config asks for: crop, resize or large-scale jitter, flips, colours."""

import math

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.data.detection_utils import build_augmentation

from msad_kd.utils.errors import InputError


def jitter_arguments(cfg: CfgNode, is_train: bool) -> dict:
    """Return the arguments of ``DatasetMapper`` for large-scale jitter, or {} if it is off.

    Jitter is a random scale from INPUT.JITTER.SCALES, a crop of fixed size (padded if the image is
    smaller) and the flip of INPUT.RANDOM_FLIP. It excludes INPUT.CROP (InputError).
    """
    jitter = cfg.INPUT.JITTER
    if not is_train or not jitter.SIZE:
        return {}
    if cfg.INPUT.CROP.ENABLED:
        raise InputError("INPUT.CROP.ENABLED and INPUT.JITTER.SIZE both crop; turn one of them off")
    resize = T.ResizeScale(*jitter.SCALES, target_height=jitter.SIZE, target_width=jitter.SIZE)
    crop = T.FixedSizeCrop((jitter.SIZE, jitter.SIZE))
    crop.seg_pad_value = 0  # git main pads with 255, which would be part of a mask; 0.6 ignores it
    flips = build_augmentation(cfg, is_train)[1:]  # without the usual resize
    return {
        "augmentations": [resize, crop, *flips],
        "recompute_boxes": cfg.MODEL.MASK_ON,  # the box of what the crop leaves of a mask
    }


def longest_side(inputs: CfgNode, is_train: bool) -> float:
    """Return to how many pixels at most the longer side of an image is resized.

    With INPUT.JITTER in training it is that of the smallest scale, which has to leave a narrow
    image a pixel.
    """
    if is_train and inputs.JITTER.SIZE:
        return inputs.JITTER.SIZE * inputs.JITTER.SCALES[0]
    if not (any(inputs.MIN_SIZE_TRAIN) if is_train else inputs.MIN_SIZE_TEST):
        return math.inf  # 0 turns the resize off
    return inputs.MAX_SIZE_TRAIN if is_train else inputs.MAX_SIZE_TEST


def divide_sizes(inputs: CfgNode, scale: int) -> None:
    """Divide the sizes of the section INPUT, in place, to those of low resolution.

    They are rounded up, as in the paper: 1333 px at high resolution are 667 px at low resolution.
    INPUT.CROP stays: it precedes the resize, so it is in pixels of the original.
    """
    inputs.MIN_SIZE_TRAIN = tuple(-(-size // scale) for size in inputs.MIN_SIZE_TRAIN)
    for key in ("MAX_SIZE_TRAIN", "MIN_SIZE_TEST", "MAX_SIZE_TEST"):
        inputs[key] = -(-inputs[key] // scale)
    inputs.JITTER.SIZE = -(-inputs.JITTER.SIZE // scale)


class _SaturationBGR(T.RandomSaturation):
    """``RandomSaturation`` for images whose channels are blue, green and red."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        return super().get_transform(image[:, :, ::-1])


def colour_augmentations(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """Return the augmentations of INPUT.COLOR that are on.

    They blend an image with its mean or its grey version, so they have to precede the resize: what
    does is the same for both resolutions.

    Raises:
        InputError: if the channels of INPUT.FORMAT are not colours.
    """
    saturation = _SaturationBGR if cfg.INPUT.FORMAT == "BGR" else T.RandomSaturation
    kinds = {"BRIGHTNESS": T.RandomBrightness, "CONTRAST": T.RandomContrast}
    kinds["SATURATION"] = saturation
    used = [(kind, cfg.INPUT.COLOR[name]) for name, kind in kinds.items()]
    used = [(kind, s) for kind, s in used if is_train and s > 0]
    if used and cfg.INPUT.FORMAT not in ("RGB", "BGR"):
        raise InputError(
            f"INPUT.COLOR needs images in RGB or BGR, but INPUT.FORMAT is '{cfg.INPUT.FORMAT}'; "
            "set INPUT.COLOR.BRIGHTNESS, CONTRAST and SATURATION to 0"
        )
    return [kind(1 - s, 1 + s) for kind, s in used]
