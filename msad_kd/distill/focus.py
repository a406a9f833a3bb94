"""Where a loss between feature maps looks: a weight for every cell of a level.

N: images, A: anchors of a cell, K: classes, H, W: height and width of a level. Weights are
(N, 1, H, W) with mean 1, so a constant focus is no focus. With ``focus: boxes``, an image without
boxes keeps only the background's share, so its mean is below 1.
"""

import torch

from msad_kd.distill.dense_distiller import Head
from msad_kd.modeling.pyramid import Pyramid
from msad_kd.utils.errors import InputError


def box_focus(boxes: list[torch.Tensor], stride: float, like: torch.Tensor) -> torch.Tensor:
    """Weight each cell by 1 / area of the smallest box around its centre (FGD, CVPR 2022, eq. 3).

    A box that holds no centre, since it is smaller than a cell, takes the cell of its own centre.

    Args:
        boxes: of each image, (n, 4) corners in pixels, on the map's device.
        stride: a cell's side in pixels.
        like: a map (N, C, H, W) of the level.

    Returns:
        (N, 1, H, W), 0 outside of all boxes; the cells of one box sum up to about 1.
    """
    height, width = like.shape[-2:]
    weights = like.new_zeros(len(boxes), 1, height, width, dtype=torch.float32)
    rows, columns = (torch.arange(side, device=like.device)[None] + 0.5 for side in (height, width))
    for image, corners in zip(weights, boxes):
        if len(corners) == 0:
            continue
        cells = corners.float() / stride
        centre = ((cells[:, :2] + cells[:, 2:]) / 2).floor() + 0.5
        inside = []
        for axis, line in ((0, columns), (1, rows)):
            low, high = cells[:, axis, None], cells[:, axis + 2, None]
            inside.append((low <= line) & (line <= high) | (line == centre[:, axis, None]))
        masks = inside[1][:, :, None] & inside[0][:, None]  # (n, H, W)
        areas = masks.sum(dim=(1, 2)).clamp(min=1)
        image[0] = (masks / areas[:, None, None]).amax(dim=0)
    return weights


def check_scores(head: Head | None, levels: set[str]) -> set[str]:
    """Check that a teacher has scores on its ``levels``, and return the levels that they need.

    Raises:
        InputError: if it has none.
    """
    if head is None:
        raise InputError(
            "KD.LOSSES: 'focus: scores' needs a teacher with an RPN, or the head of RetinaNet or "
            "FCOS; use 'focus: boxes'"
        )
    if missing := levels - set(head.levels):
        raise InputError(
            f"KD.LOSSES: 'focus: scores' needs scores on level {min(missing)} of the teacher, "
            f"whose head reads {', '.join(head.levels)}; name other 'levels'"
        )
    return set(head.levels)


@torch.no_grad()
def score_focus(head: Head, pyramid: Pyramid) -> Pyramid:
    """Return the highest class score at each cell, level name to (N, 1, H, W).

    Args:
        head: the teacher's dense head, or its RPN's, whose score is the objectness.
        pyramid: the levels that it reads, level name to (N, C, H, W).
    """
    logits = head.module([pyramid[level] for level in head.levels])[0]  # (N, A K, H, W) each
    best = (maps.float().amax(dim=1, keepdim=True).sigmoid() for maps in logits)
    return dict(zip(head.levels, best))


def cell_weights(focus: torch.Tensor, background: float) -> torch.Tensor:
    """Turn a focus into weights of mean 1.

    Args:
        focus: (N, 1, H, W), at least 0.
        background: the weight of all cells together against that of the focus.

    Returns:
        focus / mean(focus) + background, over 1 + background. Where an image has no focus at all,
        every cell has the weight background / (1 + background).
    """
    mean = focus.mean(dim=(1, 2, 3), keepdim=True)
    return (focus / mean.clamp(min=1e-12) + background) / (1 + background)


def boxes_of(batched_inputs: list[dict]) -> list[torch.Tensor]:
    """Return the ground-truth boxes of each image, (n, 4), without ignored ones.

    Images without labels have none.
    """
    labels = (x.get("instances") for x in batched_inputs)
    return [
        torch.zeros(0, 4) if x is None else x.gt_boxes.tensor[x.gt_classes >= 0] for x in labels
    ]
