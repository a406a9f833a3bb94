"""The mappers: Detectron2's for anyone's images, and one that gives an image at two resolutions.

H, W: height and width of the low-resolution image; k: high-resolution side / low-resolution side.
"""

import logging
import math
from functools import partial

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import SizeMismatchError
from fvcore.transforms.transform import Transform, TransformList

from msad_kd.data.augmentation import (
    colour_augmentations,
    divide_sizes,
    jitter_arguments,
    longest_side,
)
from msad_kd.data.images import ImageError, read_image, unreadable
from msad_kd.data.keypoints import naming_keypoints
from msad_kd.data.transforms import scale_transforms
from msad_kd.modeling.classes import frame_of
from msad_kd.modeling.pyramid import level_shift
from msad_kd.utils.compat import images_read_by
from msad_kd.utils.errors import InputError


class _NoPixels(ValueError):
    """Resize or crop leaves no pixel of an image."""


class _CheckedInput(T.AugInput):
    """An image to augment; a transform that leaves no pixel of it raises ``_NoPixels``."""

    def transform(self, tfm: Transform) -> None:
        """Apply a transform to all that is held."""
        height, width = self.image.shape[:2]
        after = getattr(tfm, "new_h", 1), getattr(tfm, "new_w", 1)
        if min(after) > 0:
            super().transform(tfm)
            after = self.image.shape[:2]
        if min(after) == 0:
            raise _NoPixels(f"its {width} x {height} px would become {after[1]} x {after[0]} px")


class _Augmentations:
    """Augments an image, at both resolutions if there are two; a mapper's ``AugmentationList``.

    Random numbers are drawn once, for low resolution. The mapper goes on with the image of
    ``frame``; the other image is left in ``other_image``.
    """

    def __init__(self, augmentations: T.AugmentationList, scale: int = 1, frame: str | None = None):
        self.augmentations, self.scale, self.frame = augmentations, scale, frame
        self.other_image: np.ndarray | None = None

    def __call__(self, inputs: T.AugInput) -> TransformList:
        image, sem_seg = inputs.image, inputs.sem_seg
        checked = _CheckedInput(image, sem_seg=sem_seg)
        low = self.augmentations(checked)
        inputs.image, inputs.sem_seg = _planar(checked.image), checked.sem_seg
        if self.frame is None:
            return low
        high = scale_transforms(low, self.scale)
        self.other_image = _planar(high.apply_image(image))
        if self.frame == "lr":
            return low
        inputs.image, self.other_image = self.other_image, inputs.image
        if sem_seg is not None:
            inputs.sem_seg = high.apply_segmentation(sem_seg)
        return high


def _planar(image: np.ndarray) -> np.ndarray:
    """Return an image (H, W, C) as a view of planes (C, H, W), which a mapper has to return.

    OpenCV takes a tenth of the time that numpy takes.
    """
    for axis in (0, 1):
        if image.strides[axis] < 0:  # numpy's flips are views, which OpenCV would copy by numpy
            image = cv2.flip(np.flip(image, axis), axis).reshape(image.shape)
    planes = np.empty((image.shape[2], *image.shape[:2]), image.dtype)
    cv2.split(image, list(planes))
    return planes.transpose(1, 2, 0)


class _RowsOfMasks(T.NoOpTransform):
    """Stores a mask by rows, as Pillow needs it; pycocotools decodes it by columns.

    Pillow would let numpy do it, which takes ten times as long: most of the mapping of a dense
    scene. No value changes.
    """

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Return the mask (H, W), stored by rows."""
        return cv2.transpose(segmentation.T)


class CheckedDatasetMapper(DatasetMapper):
    """Detectron2's mapper with ``data.images.read_image`` and errors that name the image.

    It has the augmentations of INPUT.JITTER and INPUT.COLOR beside Detectron2's.

    An image that cannot be read, has another size than the annotation file says, or would have no
    pixel left after resize and crop raises an ``InputError``. With DATASETS.INVALID_ANNOTATIONS
    "drop", it is logged and counted in training instead, and None is returned for it.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        longest_side: float = math.inf,
        skip_unusable: bool = False,
        **kwargs,
    ):
        """Build the mapper.

        Args:
            is_train: as in ``DatasetMapper``.
            longest_side: to how many pixels the longer side of an image is resized at most, with
                INPUT.JITTER at its smallest scale (of the smaller image, if there are two).
            skip_unusable: return None for images that cannot be used.
            **kwargs: the other arguments of ``DatasetMapper``.
        """
        super().__init__(is_train, **kwargs)
        self.augmentations = _Augmentations(self.augmentations)
        self.longest_side, self.skip_unusable = longest_side, skip_unusable
        self.skipped: set[str] = set()  # files, in this process

    @classmethod
    def from_config(cls, cfg, is_train: bool = True):
        """Return the constructor's arguments for a config."""
        with naming_keypoints(cfg, is_train):
            arguments = {**super().from_config(cfg, is_train), **jitter_arguments(cfg, is_train)}
        colours = colour_augmentations(cfg, is_train)
        return {
            **arguments,
            "augmentations": [*colours, *arguments["augmentations"]],
            "longest_side": longest_side(cfg.INPUT, is_train),
            "skip_unusable": is_train and cfg.DATASETS.INVALID_ANNOTATIONS == "drop",
        }

    def __call__(self, dataset_dict: dict) -> dict | None:
        """Map a dict, or return None if its image cannot be used and such images are skipped."""
        file = dataset_dict["file_name"]
        read = partial(_read, label_file=dataset_dict.get("sem_seg_file_name"))
        try:
            with images_read_by(read):
                return super().__call__(dataset_dict)
        except ImageError as error:
            message = str(error)
        except SizeMismatchError as error:
            message = str(unreadable(file, error))
        except _NoPixels as error:
            words = f"{error} by the sizes of INPUT; crop it or remove it from the data set"
            message = f"image '{file}' cannot be used: {words}"
        if not self.skip_unusable:
            raise InputError(message)
        if file not in self.skipped:
            self.skipped.add(file)
            count = len(self.skipped)
            logging.getLogger(__name__).warning(f"Skipped ({count} in this process): {message}")
        return None

    def _transform_annotations(self, dataset_dict, transforms, image_shape):
        # An image without objects has no masks from which boxes could be computed.
        recompute_boxes = self.recompute_boxes
        objects = [x for x in dataset_dict["annotations"] if x.get("iscrowd", 0) == 0]
        self.recompute_boxes = recompute_boxes and bool(objects)
        transforms = TransformList([_RowsOfMasks(), *transforms.transforms])
        super()._transform_annotations(dataset_dict, transforms, image_shape)
        self.recompute_boxes = recompute_boxes


def _read(file_name: str, format: str | None = None, *, label_file: str | None) -> np.ndarray:
    return read_image(file_name, format, labels=file_name == label_file)


class TwoResolutionMapper(CheckedDatasetMapper):
    """The same mapper, plus the image at a second resolution.

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
            **kwargs: the other arguments of ``CheckedDatasetMapper``.
        """
        if frame not in ("lr", "hr"):
            raise InputError(f"the frame is 'lr' or 'hr', not '{frame}'")
        level_shift(scale)
        super().__init__(is_train, augmentations=augmentations, **kwargs)
        self.augmentations.scale, self.augmentations.frame = scale, frame

    @classmethod
    def from_config(cls, cfg, is_train: bool = True, *, frame: str):
        """Return the constructor's arguments for a config."""
        scale = cfg.KD.SCALE
        if frame == "hr":
            cfg = cfg.clone()
            cfg.defrost()
            divide_sizes(cfg.INPUT, scale)
        return {**super().from_config(cfg, is_train), "frame": frame, "scale": scale}

    def __call__(self, dataset_dict: dict) -> dict | None:
        """Map a dict and add the image at the other resolution."""
        mapped = super().__call__(dataset_dict)
        paired = self.augmentations
        image, paired.other_image = paired.other_image, None
        if mapped is None:
            return None
        image = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return {**mapped, "image_hr" if paired.frame == "lr" else "image_lr": image}


def build_mapper(cfg: CfgNode, is_train: bool) -> DatasetMapper:
    """Build the mapper for a config's meta-architecture.

    A student gets the "lr" frame in training, a multi-resolution teacher always the "hr" frame. Any
    other model, and a student in evaluation, gets the mapper of one image.
    """
    frame = frame_of(cfg)
    if frame is None or (frame == "lr" and not is_train):
        return CheckedDatasetMapper(cfg, is_train)
    return TwoResolutionMapper(cfg, is_train, frame=frame)
