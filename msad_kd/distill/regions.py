"""Regions for which a student's and its teacher's RoI heads both predict.

N: images, R: regions, M: regions with a mask, K: classes, S: side of a mask. Regions are in pixels
of the student's images. They are kept as an object with ``regions`` (a list of N ``Boxes``),
``masked`` (those with a mask, or None) and the ``classes`` (M,) of the masks.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import torch
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Boxes, ImageList
from torch import nn

from msad_kd.distill.teacher import Teacher
from msad_kd.losses.roi import RoIPredictions
from msad_kd.modeling.capture import recording
from msad_kd.modeling.pyramid import Pyramid


def _masks_of_classes(masks: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Pick each region's mask by its class: (M, K or 1, S, S) to (M, S, S)."""
    if masks.shape[1] == 1:
        return masks[:, 0]
    return masks[torch.arange(len(masks), device=masks.device), classes]


@contextmanager
def recording_regions(heads: StandardROIHeads, masks: bool = True) -> Iterator[SimpleNamespace]:
    """Record the regions and predictions of a training step of RoI heads.

    Args:
        heads: the student's.
        masks: whether to record masks as well.

    Yields:
        An object that has, when the block ends, ``regions``, ``masked``, ``classes`` and the
        ``predictions``, with graph.
    """
    seen = SimpleNamespace(masked=None)
    modules = [heads.box_pooler, heads.box_predictor]
    if masks and heads.mask_on:
        modules += [heads.mask_pooler, heads.mask_head, heads.mask_head.predictor]
    with ExitStack() as stack:
        pooler, predictor, *mask_calls = [stack.enter_context(recording(x)) for x in modules]
        yield seen
    seen.regions, predicted_masks = pooler.inputs[1], None
    if mask_calls:
        mask_pooler, mask_head, mask_predictor = mask_calls
        seen.masked = mask_pooler.inputs[1]
        seen.classes = torch.cat([instances.gt_classes for instances in mask_head.inputs[1]])
        predicted_masks = _masks_of_classes(mask_predictor.output, seen.classes)
    seen.predictions = RoIPredictions(*predictor.output, predicted_masks)


def _pool(
    pooler: nn.Module, levels: list[str], pyramid: Pyramid, boxes: list[Boxes], scale: int
) -> torch.Tensor:
    scaled = [Boxes(image_boxes.tensor * scale) for image_boxes in boxes]
    return pooler([pyramid[level] for level in levels], scaled)


def _predict_boxes(
    heads: StandardROIHeads, pyramid: Pyramid, boxes: list[Boxes], scale: int
) -> tuple[torch.Tensor, torch.Tensor]:
    features = _pool(heads.box_pooler, heads.box_in_features, pyramid, boxes, scale)
    return heads.box_predictor(heads.box_head(features))


def _predict_masks(
    heads: StandardROIHeads, pyramid: Pyramid, seen: SimpleNamespace, scale: int
) -> torch.Tensor | None:
    if not heads.mask_on or seen.masked is None:
        return None
    features = _pool(heads.mask_pooler, heads.mask_in_features, pyramid, seen.masked, scale)
    return _masks_of_classes(heads.mask_head.layers(features), seen.classes)


def predict_regions(
    heads: StandardROIHeads, pyramid: Pyramid, seen: SimpleNamespace, scale: int
) -> RoIPredictions:
    """Predict for regions with any RoI heads.

    Args:
        heads: should be in eval mode.
        pyramid: the levels that the heads read, level name to (N, C, H, W).
        seen: the regions.
        scale: the side of an image in the heads' frame over its side in the student's.

    Returns:
        Classes and box deltas of the R regions, and masks of the M regions that have one.
    """
    boxes = _predict_boxes(heads, pyramid, seen.regions, scale)
    return RoIPredictions(*boxes, _predict_masks(heads, pyramid, seen, scale))


@torch.no_grad()
def propose_regions(
    teacher: Teacher,
    pyramid: Pyramid,
    sizes: list[tuple[int, int]],
    heads: StandardROIHeads,
    masks: bool,
) -> tuple[SimpleNamespace, RoIPredictions]:
    """Return a teacher's proposals and its predictions for them.

    Args:
        teacher: an R-CNN.
        pyramid: its levels, level name to (N, C, H, W).
        sizes: the (height, width) of each image of the student, without padding.
        heads: the student's; their BATCH_SIZE_PER_IMAGE is how many regions an image has at most,
            and their POSITIVE_FRACTION how many of them have a mask.
        masks: whether the regions that the teacher takes for objects get masks, of the class that
            it finds best. Of too many, those with the highest objectness do.
    """
    scale, theirs = teacher.image_scale, teacher.model.roi_heads
    images = ImageList(torch.empty(0), [(scale * height, scale * width) for height, width in sizes])
    proposals, _ = teacher.model.proposal_generator(images, pyramid)  # best first
    count = heads.batch_size_per_image
    boxes = [Boxes(x.proposal_boxes.tensor[:count] / scale) for x in proposals]
    seen = SimpleNamespace(regions=boxes, masked=None)
    classes, deltas = _predict_boxes(theirs, pyramid, boxes, scale)
    if masks:
        most = int(count * heads.positive_fraction)
        best = classes.argmax(dim=1).split([len(x) for x in boxes])
        rows = [(x < theirs.num_classes).nonzero()[:most, 0] for x in best]
        seen.masked = [image_boxes[kept] for image_boxes, kept in zip(boxes, rows)]
        seen.classes = torch.cat([x[kept] for x, kept in zip(best, rows)])
    return seen, RoIPredictions(classes, deltas, _predict_masks(theirs, pyramid, seen, scale))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode for a while: it draws nothing and keeps its batch statistics."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
