"""Scaling of transforms, so that one set of random draws serves both resolutions.

k: high-resolution side / low-resolution side.
"""

import copy
from functools import singledispatch

import numpy as np
from detectron2.data import transforms as T
from fvcore.transforms import transform as base

from msad_kd.utils.errors import InputError

# Attributes of flips, crops and paddings that are pixels of the image.
_PIXELS = ("width", "height", "x0", "y0", "x1", "y1", "w", "h", "orig_w", "orig_h")


@singledispatch
def scale_transform(transform: base.Transform, scale: int) -> base.Transform:
    """Return the transform that does the same to an image k times as large.

    Add a kind of transform with ``@scale_transform.register``; others raise an ``InputError``.
    """
    raise InputError(
        f"{type(transform).__name__} follows the last resize and cannot be scaled by {scale}; put "
        "it before the resize, drop it, or say how with msad_kd.data.scale_transform.register"
    )


@scale_transform.register(base.NoOpTransform)
@scale_transform.register(T.ColorTransform)
def _(transform, scale):
    return transform  # it moves no pixel


@scale_transform.register
def _(transform: base.BlendTransform, scale):
    # RandomSaturation blends with an image that is made from the low-resolution one.
    if np.ndim(transform.src_image) > 1:
        return scale_transform.dispatch(object)(transform, scale)
    return transform


@scale_transform.register(base.HFlipTransform)
@scale_transform.register(base.VFlipTransform)
@scale_transform.register(base.CropTransform)
@scale_transform.register(base.PadTransform)
def _(transform, scale):
    scaled = copy.copy(transform)  # with the pad values, of which newer fvcore has two
    for name in _PIXELS:
        if (pixels := getattr(transform, name, None)) is not None:
            setattr(scaled, name, pixels * scale)
    return scaled


@scale_transform.register
def _(t: T.ResizeTransform, scale):
    return T.ResizeTransform(t.h, t.w, t.new_h * scale, t.new_w * scale, t.interp)


def scale_transforms(transforms: base.TransformList, scale: int) -> base.TransformList:
    """Return the same transforms with an output exactly k times as large.

    What precedes the last resize stays as it is, since it works on the original image.

    Raises:
        InputError: if there is no resize, or if a transform after it cannot be scaled.
    """
    if scale == 1:
        return transforms
    flat = transforms.transforms  # fvcore's list has no lists within
    resizes = [i for i, t in enumerate(flat) if isinstance(t, T.ResizeTransform)]
    if not resizes:  # a resize to the size that an image already has counts as one
        raise InputError(
            "the augmentations have no resize, so there is no second resolution; set "
            "INPUT.MIN_SIZE_TRAIN and INPUT.MIN_SIZE_TEST to a size above 0"
        )
    last = resizes[-1]
    return base.TransformList(flat[:last] + [scale_transform(t, scale) for t in flat[last:]])
