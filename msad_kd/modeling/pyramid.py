"""Feature pyramids of two resolutions: which level meets which, and how the images are padded.

N: images, C: channels, H, W: height and width, k: high-resolution side / low-resolution side.
Level p<s> has stride 2^s in pixels of the image it was computed from.
"""

from __future__ import annotations

from typing import Any

import torch
from detectron2.layers import ShapeSpec
from torch import nn

from msad_kd.utils.errors import InputError

__all__ = [
    "aligned_levels",
    "cells_in_boxes",
    "check_sizes",
    "in_high_resolution",
    "level_shift",
    "normalize",
    "pad_batch",
    "pair_levels",
    "shift_levels",
    "valid_masks",
]

Pyramid = dict[str, torch.Tensor]


def level_shift(scale: int) -> int:
    """The level shift m = log2 k.

    Raises:
        InputError: if ``scale`` is not a power of two, 1 included.
    """
    if scale != int(scale) or int(scale) < 1 or int(scale) & (int(scale) - 1):
        raise InputError(
            f"KD.SCALE is {scale}, but levels of two resolutions align only when the sides differ "
            "by a power of two; set it to 1, 2, 4, ..."
        )
    return int(scale).bit_length() - 1


def shift_levels(pyramid: dict[str, Any], shift: int) -> dict[str, Any]:
    """Rename p<s> to p<s+shift>: the low-resolution pyramid P'_{s-m} in high-resolution terms."""
    return {f"p{int(name[1:]) + shift}": feature for name, feature in pyramid.items()}


def in_high_resolution(levels: dict[str, ShapeSpec], factor: int) -> dict[str, ShapeSpec]:
    """A backbone's levels, their strides in pixels of an image ``factor`` times as large."""
    return {
        name: ShapeSpec(channels=shape.channels, stride=shape.stride * factor)
        for name, shape in levels.items()
    }


def aligned_levels(levels: dict[str, ShapeSpec], scale: int) -> dict[str, ShapeSpec]:
    """Those of a backbone's levels that both resolutions have: p3..p7 of p2..p7 for k = 2."""
    renamed = shift_levels(levels, level_shift(scale))
    return {name: shape for name, shape in levels.items() if name in renamed}


def pair_levels(
    student: dict[str, float], teacher: dict[str, float]
) -> tuple[list[tuple[str, str]], list[str]]:
    """Pair the levels of two pyramids that have the same stride.

    Args:
        student, teacher: level name to stride, both in pixels of the high-resolution image.

    Returns:
        the pairs (student level, teacher level), finest first, and the student's levels that have
        no partner.

    Raises:
        InputError: if no level has a partner.
    """
    by_stride = {stride: name for name, stride in teacher.items()}
    ordered = sorted(student.items(), key=lambda item: item[1])
    pairs = [(name, by_stride[stride]) for name, stride in ordered if stride in by_stride]
    if not pairs:
        raise InputError(
            f"no level of the student (strides {student}) has the stride of a teacher's level "
            f"(strides {teacher}), in pixels of the high-resolution image; check KD.SCALE and both "
            "backbones' levels"
        )
    return pairs, [name for name, stride in ordered if stride not in by_stride]


def normalize(model: nn.Module, images: list[torch.Tensor]) -> list[torch.Tensor]:
    """Images of (3, H, W), 0..255, on a detector's device, by its mean and deviation."""
    mean, std = model.pixel_mean, model.pixel_std
    return [(image.to(mean.device) - mean) / std for image in images]


def check_sizes(images: list[torch.Tensor], expected: list[tuple[int, int]]) -> None:
    """See that images of (3, H, W) have the (height, width) their other resolution asks for.

    Raises:
        InputError: if one has not: its features would be shifted, and nobody would notice.
    """
    for image, size in zip(images, expected):
        if tuple(image.shape[-2:]) != tuple(size):
            raise InputError(
                f"an image of {tuple(image.shape[-2:])} stands beside one that asks for "
                f"{tuple(size)}: the high-resolution image has to be exactly KD.SCALE times the "
                "low-resolution one, as TwoResolutionMapper makes it"
            )


def pad_batch(images: list[torch.Tensor], height: int, width: int) -> torch.Tensor:
    """Batch images of (C, h, w), each padded with zeros at right and bottom, to (N, C, H, W).

    Raises:
        InputError: if an image is larger than (height, width).
    """
    batch = images[0].new_zeros(len(images), images[0].shape[0], height, width)
    for slot, image in zip(batch, images):
        h, w = image.shape[-2:]
        if h > height or w > width:
            raise InputError(
                f"an image of {h} x {w} does not fit the padded size {height} x {width}; the "
                "high-resolution image has to be exactly KD.SCALE times the low-resolution one"
            )
        slot[:, :h, :w].copy_(image)
    return batch


def valid_masks(sizes: list[tuple[int, int]], padded: tuple[int, int], pyramid: Pyramid) -> Pyramid:
    """Masks of the cells that see image, not only padding.

    Args:
        sizes: (height, width) of each of the N images, in pixels.
        padded: (height, width) of the padded batch, in pixels.
        pyramid: level name to a map of shape (N, C, H, W).

    Returns:
        level name to a mask of shape (N, 1, H, W), 1 inside an image and 0 outside, in the dtype
        of the map. A cell that the image touches is inside.
    """
    masks = {}
    for name, feature in pyramid.items():
        rows, columns = feature.shape[-2:]
        mask = feature.new_zeros(len(sizes), 1, rows, columns)
        for slot, (height, width) in zip(mask, sizes):
            # Ceiling division: heights / stride, the stride being padded / cells.
            slot[:, : -(-height * rows // padded[0]), : -(-width * columns // padded[1])] = 1
        masks[name] = mask
    return masks


def cells_in_boxes(boxes: torch.Tensor, stride: float, height: int, width: int) -> torch.Tensor:
    """The cells of a map that boxes touch.

    Args:
        boxes: (n, 4), left, top, right and bottom in pixels.
        stride: pixels of a cell's side.
        height, width: of the map, in cells.

    Returns:
        (height, width) of bool, on the CPU.
    """
    cells = torch.zeros(height, width, dtype=torch.bool)
    for left, top, right, bottom in (boxes / stride).tolist():
        cells[int(top) : -int(-bottom // 1), int(left) : -int(-right // 1)] = True
    return cells
