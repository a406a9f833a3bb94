"""Feature pyramids of two resolutions: how their levels are paired and their images padded.

N: images, C: channels, H, W: height and width, k: high-resolution side / low-resolution side.
Level p<s> has stride 2^s in pixels of the image it was computed from.
"""

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
    """Return a backbone's levels with strides in pixels of an image ``factor`` times as large."""
    return {
        name: ShapeSpec(channels=shape.channels, stride=shape.stride * factor)
        for name, shape in levels.items()
    }


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
        the pairs (student level, teacher level), finest first, and the student's levels without a
        partner.

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
    """Normalise images (3, H, W) in 0..255 by a detector's mean and std, on its device."""
    mean, std = model.pixel_mean, model.pixel_std
    return [(image.to(mean.device) - mean) / std for image in images]


def check_sizes(images: list[torch.Tensor], expected: list[tuple[int, int]]) -> None:
    """Check that images (3, H, W) have the sizes that their other resolution asks for.

    Raises:
        InputError: if a size differs from ``expected``, (height, width): the features would be
            shifted, and nobody would notice.
    """
    for image, size in zip(images, expected):
        if tuple(image.shape[-2:]) != tuple(size):
            raise InputError(
                f"an image of {tuple(image.shape[-2:])} px should have {tuple(size)} px beside its "
                "other resolution: the high-resolution image has to be exactly KD.SCALE times the "
                "low-resolution one, as TwoResolutionMapper makes it"
            )


def pad_batch(images: list[torch.Tensor], height: int, width: int) -> torch.Tensor:
    """Batch images (C, h, w), padded with zeros at the right and bottom, to (N, C, H, W).

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
    """Return masks of the cells that see an image and not only its padding.

    Args:
        sizes: (height, width) of each of the N images, in pixels.
        padded: (height, width) of the padded batch, in pixels.
        pyramid: level name to a map of shape (N, C, H, W).

    Returns:
        level name to a mask of shape (N, 1, H, W) in the dtype of the map: 1 where a cell touches
        the image, else 0.
    """
    masks = {}
    for name, feature in pyramid.items():
        rows, columns = feature.shape[-2:]
        mask = feature.new_zeros(len(sizes), 1, rows, columns)
        for slot, (height, width) in zip(mask, sizes):
            # Ceiling division by the stride, which is padded[0] / rows.
            slot[:, : -(-height * rows // padded[0]), : -(-width * columns // padded[1])] = 1
        masks[name] = mask
    return masks


def cells_in_boxes(boxes: torch.Tensor, stride: float, height: int, width: int) -> torch.Tensor:
    """Return a mask (height, width) of the cells that boxes touch, on the CPU, to analyse losses.

    ``boxes`` is (n, 4): left, top, right and bottom in pixels; ``stride`` is a cell's side in
    pixels.
    """
    cells = torch.zeros(height, width, dtype=torch.bool)
    for left, top, right, bottom in (boxes / stride).tolist():
        cells[int(top) : -int(-bottom // 1), int(left) : -int(-right // 1)] = True
    return cells
