"""Feature pyramids of two resolutions: how their levels are paired and their images padded.

N: images, C: channels, H, W: height and width, k: high-resolution side / low-resolution side.
Level p<s> has stride 2^s in pixels of the image it was computed from.
"""

import math
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from torch import nn

from msad_kd.utils.errors import InputError

Pyramid = dict[str, torch.Tensor]


def level_shift(scale: int) -> int:
    """Return the level shift m = log2 k.

    Raises:
        InputError: if ``scale`` is not a power of two, 1 included.
    """
    if scale < 1 or 2 ** int(math.log2(scale)) != scale:
        raise InputError(
            f"KD.SCALE is {scale}, but only levels of resolutions that differ by a power of two "
            "align; set it to 1, 2, 4, ..."
        )
    return int(math.log2(scale))


def shift_levels(pyramid: dict[str, Any], shift: int) -> dict[str, Any]:
    """Rename p<s> to p<s+shift>: the low-resolution pyramid P'_{s-m} in high-resolution terms."""
    return {f"p{int(name[1:]) + shift}": feature for name, feature in pyramid.items()}


def in_high_resolution(levels: dict[str, ShapeSpec], factor: int) -> dict[str, ShapeSpec]:
    """Return a backbone's levels with strides in pixels of an image ``factor`` times as large."""
    shapes = {name: (shape.channels, shape.stride * factor) for name, shape in levels.items()}
    return {name: ShapeSpec(channels=x, stride=stride) for name, (x, stride) in shapes.items()}


def aligned_levels(levels: dict[str, ShapeSpec], scale: int) -> dict[str, ShapeSpec]:
    """Return a backbone's levels that both resolutions have: p3..p7 of p2..p7 for k = 2."""
    renamed = shift_levels(levels, level_shift(scale))
    return {name: shape for name, shape in levels.items() if name in renamed}


def pair_levels(
    student: dict[str, float], teacher: dict[str, float]
) -> tuple[list[tuple[str, str]], list[str]]:
    """Pair the levels of two pyramids that have the same stride.

    Args:
        student: level name to stride in pixels of the high-resolution image.
        teacher: the same of the teacher.

    Returns:
        the pairs (student level, teacher level), finest first, and the student's other levels.

    Raises:
        InputError: if there is no pair.
    """
    by_stride = {stride: name for name, stride in teacher.items()}
    ordered = sorted(student.items(), key=lambda item: item[1])
    pairs = [(name, by_stride[stride]) for name, stride in ordered if stride in by_stride]
    if not pairs:
        raise InputError(
            f"no level of the student has the stride of a teacher's level: {student} and {teacher} "
            "in pixels of the high-resolution image; check KD.SCALE and both backbones' levels"
        )
    return pairs, [name for name, stride in ordered if stride not in by_stride]


def check_images(inputs: list[dict], frame: str, scale: int) -> None:
    """Check that inputs have images of both resolutions, as ``TwoResolutionMapper`` makes them.

    Raises:
        InputError: if an image is missing, or one isn't exactly ``scale`` times the other: nobody
            would notice that features are shifted.
    """
    high, low = ("image", "image_lr") if frame == "hr" else ("image_hr", "image")
    for sample in inputs:
        if absent := {high, low} - sample.keys():
            raise InputError(
                f"the data lack '{absent.pop()}', the image of the other resolution; use "
                f"TwoResolutionMapper(cfg, is_train, frame='{frame}') as the mapper"
            )
        size, expected = sample[high].shape[-2:], [scale * side for side in sample[low].shape[-2:]]
        if list(size) != expected:
            raise InputError(
                f"an image of {tuple(size)} px should have {tuple(expected)} px, exactly KD.SCALE "
                "times its low resolution, as TwoResolutionMapper makes it"
            )


def normalized_batch(
    model: nn.Module, images: list[torch.Tensor], height: int, width: int
) -> torch.Tensor:
    """Normalise images (C, h, w) in 0..255 by a detector's mean and std, on its device.

    Returns:
        the images, padded with zeros at the right and bottom: (N, C, height, width).
    """
    mean, std = model.pixel_mean, model.pixel_std
    # A mean in whole numbers is a tensor of whole numbers, but an image over std is not.
    batch = (mean / std).new_zeros(len(images), len(mean), height, width)
    for slot, image in zip(batch, images):
        slot[:, : image.shape[1], : image.shape[2]] = (image.to(mean.device) - mean) / std
    return batch


def valid_masks(sizes: list[tuple[int, int]], padded: tuple[int, int], pyramid: Pyramid) -> Pyramid:
    """Return masks of the cells that see an image and not only its padding.

    Args:
        sizes: (height, width) of each of the N images, in pixels.
        padded: (height, width) of the padded batch, in pixels.
        pyramid: level name to (N, C, H, W).

    Returns:
        level name to (N, 1, H, W) in the map's dtype: 1 where a cell touches the image, else 0.
    """
    masks = {}
    for name, feature in pyramid.items():
        mask = feature.new_zeros(len(sizes), 1, *feature.shape[-2:])
        # Strides are powers of two. A level's last cells may reach beyond the padded image.
        spans = [padded[i] / mask.shape[i - 2] for i in (0, 1)]
        stride = 2 ** math.ceil(math.log2(max(spans)))
        for slot, (height, width) in zip(mask, sizes):
            slot[:, : -(-height // stride), : -(-width // stride)] = 1
        masks[name] = mask
    return masks
