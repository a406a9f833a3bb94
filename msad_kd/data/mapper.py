"""The mapper that gives one image at two resolutions.

H, W: height and width of the low-resolution image; k: high-resolution side / low-resolution side.
"""

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import build_augmentation
from detectron2.modeling import META_ARCH_REGISTRY
from fvcore.transforms.transform import TransformList

from msad_kd.data.transforms import scale_transforms
from msad_kd.modeling.pyramid import level_shift
from msad_kd.utils.errors import InputError


def jitter_arguments(cfg: CfgNode, is_train: bool) -> dict:
    """Return the arguments of ``DatasetMapper`` for large-scale jitter, or {} if it is off.

    Jitter is a random scale from INPUT.JITTER.SCALES, a crop of fixed size (padded if the image is
    smaller) and the flip of INPUT.RANDOM_FLIP. It excludes INPUT.CROP (InputError).
    """
    jitter = cfg.INPUT.JITTER
    if not is_train or not jitter.SIZE:
        return {}
    if len(jitter.SCALES) != 2 or not 0 < jitter.SCALES[0] <= jitter.SCALES[1]:
        raise InputError(f"INPUT.JITTER.SCALES is {jitter.SCALES}; it should be a range")
    if cfg.INPUT.CROP.ENABLED:
        raise InputError("INPUT.CROP.ENABLED and INPUT.JITTER.SIZE both crop; turn one of them off")
    resize = T.ResizeScale(*jitter.SCALES, target_height=jitter.SIZE, target_width=jitter.SIZE)
    flips = build_augmentation(cfg, is_train)[1:]  # without the usual resize
    return {
        "augmentations": [resize, T.FixedSizeCrop((jitter.SIZE, jitter.SIZE)), *flips],
        "recompute_boxes": cfg.MODEL.MASK_ON,  # the box of what the crop leaves of a mask
    }


class _PairedAugmentations:
    """Augments an image at both resolutions; takes the place of a mapper's ``AugmentationList``.

    Random numbers are drawn once, for low resolution. The mapper goes on with the image of
    ``frame``; the other image is left in ``other_image``.
    """

    def __init__(self, augmentations: T.AugmentationList, scale: int, frame: str):
        self.augmentations, self.scale, self.frame = augmentations, scale, frame
        self.other_image: np.ndarray | None = None

    def __call__(self, inputs: T.AugInput) -> TransformList:
        image, sem_seg = inputs.image, inputs.sem_seg
        low = self.augmentations(inputs)
        high = scale_transforms(low, self.scale)
        if self.frame == "lr":
            self.other_image = high.apply_image(image)
            return low
        self.other_image = inputs.image
        inputs.image = high.apply_image(image)
        if sem_seg is not None:
            inputs.sem_seg = high.apply_segmentation(sem_seg)
        return high


class TwoResolutionMapper(DatasetMapper):
    """Detectron2's mapper, plus the image at a second resolution.

    The low-resolution image is bit for bit the one that ``DatasetMapper`` makes. The
    high-resolution image is resized from the original as well, to exactly k times that size, with
    the same random flips, crops and colours.

    ``frame="lr"`` (students): ``image`` (3, H, W) and ``instances`` at low resolution, plus
    ``image_hr`` (3, kH, kW). ``frame="hr"`` (multi-resolution teachers): ``image`` (3, kH, kW) and
    ``instances`` at high resolution, plus ``image_lr`` (3, H, W). INPUT.MIN_SIZE_*, MAX_SIZE_* and
    JITTER.SIZE are in pixels of the frame.
    """

    @configurable
    def __init__(self, is_train: bool, *, frame: str, scale: int, augmentations, **kwargs):
        """Build the mapper.

        Args:
            is_train: as in ``DatasetMapper``.
            frame: "lr" or "hr".
            scale: k, a power of two.
            augmentations: augmentations to low resolution, in both frames.
            **kwargs: the other arguments of ``DatasetMapper``.
        """
        if frame not in ("lr", "hr"):
            raise InputError(f"the frame is 'lr' or 'hr', not '{frame}'")
        level_shift(scale)
        super().__init__(is_train, augmentations=augmentations, **kwargs)
        self.augmentations = _PairedAugmentations(self.augmentations, scale, frame)

    @classmethod
    def from_config(cls, cfg, is_train: bool = True, *, frame: str):
        """Return the constructor's arguments for a config."""
        scale = cfg.KD.SCALE
        if frame == "hr":
            cfg = cfg.clone()
            cfg.defrost()
            inputs = cfg.INPUT
            # Rounded up, as in the paper: 1333 px at high resolution are 667 px at low resolution.
            inputs.MIN_SIZE_TRAIN = tuple(-(-size // scale) for size in inputs.MIN_SIZE_TRAIN)
            for key in ("MAX_SIZE_TRAIN", "MIN_SIZE_TEST", "MAX_SIZE_TEST"):
                inputs[key] = -(-inputs[key] // scale)
            inputs.JITTER.SIZE = -(-inputs.JITTER.SIZE // scale)
        arguments = {**super().from_config(cfg, is_train), **jitter_arguments(cfg, is_train)}
        return {**arguments, "frame": frame, "scale": scale}

    def __call__(self, dataset_dict: dict) -> dict:
        """Map a dict and add the image at the other resolution."""
        mapped = super().__call__(dataset_dict)
        paired = self.augmentations
        image, paired.other_image = paired.other_image, None
        image = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return {**mapped, "image_hr" if paired.frame == "lr" else "image_lr": image}


def build_mapper(cfg: CfgNode, is_train: bool) -> DatasetMapper:
    """Build the mapper for a config's meta-architecture.

    A student gets the "lr" frame in training, a multi-resolution teacher always the "hr" frame. Any
    other model, and a student in evaluation, gets the stock mapper.
    """
    frame = getattr(META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE), "frame", None)
    if frame is None or (frame == "lr" and not is_train):
        return DatasetMapper(cfg, is_train, **jitter_arguments(cfg, is_train))
    return TwoResolutionMapper(cfg, is_train, frame=frame)


def longest_side(cfg: CfgNode) -> float:
    """Return to how many pixels, at the most, the longer side of a training image is resized.

    It is that of the smallest image that the mapper may make: of the low-resolution one.
    """
    jitter, frame = cfg.INPUT.JITTER, META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    longest = jitter.SIZE * jitter.SCALES[0] if jitter.SIZE else cfg.INPUT.MAX_SIZE_TRAIN
    return longest / cfg.KD.SCALE if getattr(frame, "frame", None) == "hr" else longest
