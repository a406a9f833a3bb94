"""One image at two resolutions: the mapper, and the transforms that keep both aligned.

H, W: height and width of the low-resolution image; k: high-resolution side / low-resolution side.
"""

from __future__ import annotations

from functools import singledispatch

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import build_augmentation
from detectron2.modeling import META_ARCH_REGISTRY
from fvcore.transforms import transform as base

from msad_kd.modeling.pyramid import level_shift
from msad_kd.utils.errors import InputError

__all__ = [
    "TwoResolutionMapper",
    "build_mapper",
    "jitter_arguments",
    "scale_transform",
    "scale_transforms",
]


@singledispatch
def scale_transform(transform: base.Transform, scale: int) -> base.Transform:
    """The transform that does to an image k times as large what ``transform`` does.

    A new kind of transform is taught with ``@scale_transform.register``.

    Raises:
        InputError: if it isn't known how to scale this kind.
    """
    raise InputError(
        f"{type(transform).__name__} follows the last resize and cannot be scaled by {scale}, so "
        "the two resolutions would not show the same picture; put it before the resize, drop it, "
        "or register how to scale it with msad_kd.data.mapper.scale_transform.register"
    )


@scale_transform.register(base.NoOpTransform)
@scale_transform.register(T.ColorTransform)
def _(transform, scale):
    return transform  # moves no pixel


@scale_transform.register
def _(transform: base.BlendTransform, scale):
    # RandomSaturation blends with an image, made of the low-resolution one.
    if np.ndim(transform.src_image) > 1:
        return scale_transform.dispatch(object)(transform, scale)
    return transform


@scale_transform.register
def _(transform: base.HFlipTransform, scale):
    return base.HFlipTransform(transform.width * scale)


@scale_transform.register
def _(transform: base.VFlipTransform, scale):
    return base.VFlipTransform(transform.height * scale)


def _times(value: int | None, scale: int) -> int | None:
    return None if value is None else value * scale


@scale_transform.register
def _(transform: base.CropTransform, scale):
    t = transform
    sides = (t.x0, t.y0, t.w, t.h, t.orig_w, t.orig_h)
    return base.CropTransform(*(_times(side, scale) for side in sides))


@scale_transform.register
def _(transform: base.PadTransform, scale):
    t = transform
    sides = (t.x0, t.y0, t.x1, t.y1, t.orig_w, t.orig_h)
    scaled = base.PadTransform(*(_times(side, scale) for side in sides), t.pad_value)
    # fvcore's later versions pad label maps with a value of their own.
    if hasattr(t, "seg_pad_value"):
        scaled.seg_pad_value = t.seg_pad_value
    return scaled


@scale_transform.register
def _(transform: T.ResizeTransform, scale):
    t = transform
    return T.ResizeTransform(t.h, t.w, t.new_h * scale, t.new_w * scale, t.interp)


def _flatten(transforms: base.TransformList) -> list[base.Transform]:
    flat = []
    for transform in transforms.transforms:
        nested = isinstance(transform, base.TransformList)
        flat.extend(_flatten(transform) if nested else [transform])
    return flat


def scale_transforms(transforms: base.TransformList, scale: int) -> base.TransformList:
    """The same transforms, ending in an image exactly k times as large.

    What precedes the last resize stays as it is, in pixels of the original; the last resize, and
    all that follows it, is scaled.

    Raises:
        InputError: if there is no resize, or if a transform after it cannot be scaled.
    """
    if scale == 1:
        return transforms
    flat = _flatten(transforms)
    resizes = [i for i, t in enumerate(flat) if isinstance(t, T.ResizeTransform)]
    # A shortest-edge resize to the size an image already has is still a ResizeTransform.
    if not resizes:
        raise InputError(
            "the augmentations have no resize, so there is no second resolution; set "
            "INPUT.MIN_SIZE_TRAIN and INPUT.MIN_SIZE_TEST to a size above 0"
        )
    last = resizes[-1]
    scaled = [scale_transform(t, scale) for t in flat[last:]]
    return base.TransformList(flat[:last] + scaled)


def jitter_arguments(cfg: CfgNode, is_train: bool) -> dict:
    """Arguments of ``DatasetMapper`` for large-scale jitter, none where it is off.

    A random scale of ``INPUT.JITTER.SCALES``, then a crop of fixed size, padded where the image is
    smaller, then the flip of ``INPUT.RANDOM_FLIP``. Both resolutions see the same crop.

    Raises:
        InputError: if the scales are no range, or if ``INPUT.CROP`` is on, too.
    """
    keys = cfg.INPUT.JITTER
    if not is_train or not keys.SIZE:
        return {}
    if len(keys.SCALES) != 2 or not 0 < keys.SCALES[0] <= keys.SCALES[1]:
        raise InputError(f"INPUT.JITTER.SCALES is {keys.SCALES}; it should be a range, [0.1, 2.0]")
    if cfg.INPUT.CROP.ENABLED:
        raise InputError("INPUT.CROP.ENABLED and INPUT.JITTER.SIZE both crop; turn one of them off")
    resize = T.ResizeScale(*keys.SCALES, target_height=keys.SIZE, target_width=keys.SIZE)
    flips = build_augmentation(cfg, is_train)[1:]  # without the usual resize
    return {
        "augmentations": [resize, T.FixedSizeCrop((keys.SIZE, keys.SIZE)), *flips],
        "recompute_boxes": cfg.MODEL.MASK_ON,  # of what the crop has left of a mask
    }


class _PairedAugmentations:
    """Stands in a mapper where its ``AugmentationList`` stood, and sees to both resolutions.

    The random numbers are drawn once, for the low resolution. The mapper goes on with the
    resolution called ``frame``; the other image is left in ``other``.
    """

    def __init__(self, augmentations: T.AugmentationList, scale: int, frame: str):
        self.augmentations = augmentations
        self.scale = scale
        self.frame = frame
        self.other: np.ndarray | None = None

    def __call__(self, inputs: T.AugInput) -> base.TransformList:
        image, sem_seg = inputs.image, inputs.sem_seg
        low = self.augmentations(inputs)
        high = scale_transforms(low, self.scale)
        if self.frame == "lr":
            self.other = high.apply_image(image)
            return low
        self.other = inputs.image
        inputs.image = high.apply_image(image)
        if sem_seg is not None:
            inputs.sem_seg = high.apply_segmentation(sem_seg)
        return high


class TwoResolutionMapper(DatasetMapper):
    """Detectron2's mapper, with the image at a second resolution beside it.

    The low-resolution image is bit for bit what ``DatasetMapper`` makes of the original; the
    high-resolution one is resized from the original too, to exactly k times its size, with the same
    random flips, crops and colours.

    ``frame="lr"`` (students): ``image`` (3, H, W) and ``instances`` at low resolution, plus
    ``image_hr`` (3, kH, kW). ``frame="hr"`` (multi-resolution teachers): ``image`` (3, kH, kW) and
    ``instances`` at high resolution, plus ``image_lr`` (3, H, W). INPUT.MIN_SIZE_*, MAX_SIZE_* and
    JITTER.SIZE are in pixels of the frame.
    """

    @configurable
    def __init__(self, is_train: bool, *, frame: str, scale: int, augmentations, **kwargs):
        """
        Args:
            is_train: as in ``DatasetMapper``.
            frame: "lr" or "hr".
            scale: k, a power of two.
            augmentations: augmentations to low resolution, whatever the frame.
            kwargs: the other arguments of ``DatasetMapper``.
        """
        if frame not in ("lr", "hr"):
            raise InputError(f"the frame is 'lr' or 'hr', not '{frame}'")
        level_shift(scale)
        super().__init__(is_train, augmentations=augmentations, **kwargs)
        self.augmentations = _PairedAugmentations(self.augmentations, scale, frame)

    @classmethod
    def from_config(cls, cfg, is_train: bool = True, *, frame: str):
        scale = cfg.KD.SCALE
        if frame == "hr":
            cfg = cfg.clone()
            cfg.defrost()
            inputs = cfg.INPUT
            # Upwards: 1333 px at high resolution is 667 at low, as the paper has it.
            inputs.MIN_SIZE_TRAIN = tuple(-(-size // scale) for size in inputs.MIN_SIZE_TRAIN)
            for key in ("MAX_SIZE_TRAIN", "MIN_SIZE_TEST", "MAX_SIZE_TEST"):
                inputs[key] = -(-inputs[key] // scale)
            inputs.JITTER.SIZE = -(-inputs.JITTER.SIZE // scale)
        arguments = {**super().from_config(cfg, is_train), **jitter_arguments(cfg, is_train)}
        return {**arguments, "frame": frame, "scale": scale}

    def __call__(self, dataset_dict: dict) -> dict:
        mapped = super().__call__(dataset_dict)
        other = np.ascontiguousarray(self.augmentations.other.transpose(2, 0, 1))
        mapped["image_hr" if self.augmentations.frame == "lr" else "image_lr"] = torch.from_numpy(
            other
        )
        self.augmentations.other = None
        return mapped


def build_mapper(cfg: CfgNode, is_train: bool) -> DatasetMapper:
    """The mapper a config's meta-architecture needs.

    A student is trained in the "lr" frame and evaluated as the stock detector it is; a
    multi-resolution teacher is in the "hr" frame always; anything else gets the stock mapper.
    """
    frame = getattr(META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE), "frame", None)
    if frame is None or (frame == "lr" and not is_train):
        return DatasetMapper(cfg, is_train, **jitter_arguments(cfg, is_train))
    return TwoResolutionMapper(cfg, is_train, frame=frame)
