"""Regions for which a student's and its teacher's RoI heads both predict.

N: images, R: regions, M: regions with a mask, P: regions with keypoints, J: keypoints of a region,
K: classes, S: side of a mask or heat map.
"""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from detectron2.modeling.roi_heads import BaseKeypointRCNNHead, StandardROIHeads
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn

from msad_kd.distill.teacher import Teacher
from msad_kd.losses.roi import RoIPredictions
from msad_kd.modeling.capture import recording
from msad_kd.modeling.pyramid import Pyramid
from msad_kd.utils.replaced import replaced

ALL_PARTS = ("masks", "keypoints")


@dataclass
class Regions:
    """Holds the regions of a batch, in pixels of the student's images.

    Attributes:
        boxes: one ``Boxes`` for each of N images, R regions together.
        masked: those of them with a mask, M together; None if no mask is compared.
        classes: (M,), of the masks.
        pointed: those with keypoints, P together; None if no keypoint is compared.
        visible: (P, J), which of their keypoints are compared.
        predictions: of the heads that were recorded, with graph; of keypoints, the visible ones.
    """

    boxes: list[Boxes]
    masked: list[Boxes] | None = None
    classes: torch.Tensor | None = None
    pointed: list[Boxes] | None = None
    visible: torch.Tensor | None = None
    predictions: RoIPredictions | None = None


def _masks_of_classes(masks: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Pick each region's mask by its class: (M, K or 1, S, S) to (M, S, S)."""
    if masks.shape[1] == 1:
        return masks[:, 0]
    return masks[torch.arange(len(masks), device=masks.device), classes]


@contextmanager
def recording_regions(
    heads: StandardROIHeads, parts: Collection[str] = ALL_PARTS
) -> Iterator[Regions]:
    """Record the regions and predictions of a training step of RoI heads.

    Args:
        heads: the student's.
        parts: which of "masks" and "keypoints" to record as well, if the heads predict them.

    Yields:
        The regions, which are filled in when the block ends.
    """
    seen = Regions([])
    mask_modules = ()
    if "masks" in parts and heads.mask_on:
        mask_modules = heads.mask_pooler, heads.mask_head, heads.mask_head.predictor
    with_keypoints = "keypoints" in parts and heads.keypoint_on
    with ExitStack() as stack:
        modules = (heads.box_pooler, heads.box_predictor, *mask_modules)
        pooler, predictor, *mask_calls = [stack.enter_context(recording(x)) for x in modules]
        if with_keypoints:
            keypoint_call = stack.enter_context(_recording_heat_maps(heads.keypoint_head))
        yield seen
    seen.boxes, predicted_masks, heat_maps = pooler.inputs[1], None, None
    if mask_calls:
        mask_pooler, mask_head, mask_predictor = mask_calls
        seen.masked = mask_pooler.inputs[1]
        seen.classes = torch.cat([instances.gt_classes for instances in mask_head.inputs[1]])
        predicted_masks = _masks_of_classes(mask_predictor.output, seen.classes)
    if with_keypoints:
        instances = keypoint_call.inputs[1]
        seen.pointed = [x.proposal_boxes for x in instances]
        seen.visible = _visible_keypoints(instances, keypoint_call.heat_maps)
        heat_maps = keypoint_call.heat_maps[seen.visible]
    seen.predictions = RoIPredictions(*predictor.output, predicted_masks, heat_maps)


@contextmanager
def _recording_heat_maps(head: BaseKeypointRCNNHead) -> Iterator[SimpleNamespace]:
    """Record the last call of a keypoint head, with ``heat_maps`` (P, J, S, S)."""
    layers = head.layers  # it returns the loss alone

    def keep(x: torch.Tensor) -> torch.Tensor:
        call.heat_maps = layers(x)
        return call.heat_maps

    with recording(head) as call, replaced(head, layers=keep):
        yield call


def _visible_keypoints(instances: list[Instances], heat_maps: torch.Tensor) -> torch.Tensor:
    """Return which keypoints (P, J) Detectron2's loss reads: those labelled, in their region."""
    side, found = heat_maps.shape[-1], [x for x in instances if len(x)]
    rows = [x.gt_keypoints.to_heatmap(x.proposal_boxes.tensor, side)[1] for x in found]
    return torch.cat(rows).bool() if rows else heat_maps.new_zeros(heat_maps.shape[:2]).bool()


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
    heads: StandardROIHeads, pyramid: Pyramid, seen: Regions, scale: int
) -> torch.Tensor | None:
    if not heads.mask_on or seen.masked is None:
        return None
    features = _pool(heads.mask_pooler, heads.mask_in_features, pyramid, seen.masked, scale)
    return _masks_of_classes(heads.mask_head.layers(features), seen.classes)


def _predict_keypoints(
    heads: StandardROIHeads, pyramid: Pyramid, seen: Regions, scale: int
) -> torch.Tensor | None:
    if not heads.keypoint_on or seen.pointed is None:
        return None
    levels, pooler = heads.keypoint_in_features, heads.keypoint_pooler
    features = _pool(pooler, levels, pyramid, seen.pointed, scale)
    return heads.keypoint_head.layers(features)[seen.visible]


def predict_regions(
    heads: StandardROIHeads, pyramid: Pyramid, seen: Regions, scale: int
) -> RoIPredictions:
    """Predict for regions with any RoI heads.

    Args:
        heads: should be in eval mode.
        pyramid: the levels that the heads read, level name to (N, C, H, W).
        seen: the regions.
        scale: the side of an image in the heads' frame over its side in the student's.

    Returns:
        Classes and box deltas of the R regions, masks of the M regions that have one, and heat maps
        of the keypoints to compare.
    """
    boxes, given = _predict_boxes(heads, pyramid, seen.boxes, scale), (pyramid, seen, scale)
    return RoIPredictions(*boxes, _predict_masks(heads, *given), _predict_keypoints(heads, *given))


@torch.no_grad()
def propose_regions(
    teacher: Teacher,
    pyramid: Pyramid,
    sizes: list[tuple[int, int]],
    heads: StandardROIHeads,
    parts: Collection[str],
) -> tuple[Regions, RoIPredictions]:
    """Return a teacher's proposals and its predictions for them.

    Args:
        teacher: an R-CNN.
        pyramid: its levels, level name to (N, C, H, W).
        sizes: the (height, width) of each image of the student, without padding.
        heads: the student's; their BATCH_SIZE_PER_IMAGE is how many regions an image has at most,
            and their POSITIVE_FRACTION how many of them have a mask or keypoints.
        parts: what the regions that the teacher takes for objects get: "masks", of the class that
            it finds best, or "keypoints", all of them. Of too many, those with the highest
            objectness do.
    """
    scale, theirs = teacher.image_scale, teacher.model.roi_heads
    images = ImageList(torch.empty(0), [(scale * height, scale * width) for height, width in sizes])
    proposals, _ = teacher.model.proposal_generator(images, pyramid)  # best first
    count = heads.batch_size_per_image
    boxes = [Boxes(x.proposal_boxes.tensor[:count] / scale) for x in proposals]
    seen = Regions(boxes)
    classes, deltas = _predict_boxes(theirs, pyramid, boxes, scale)
    if parts:
        most = int(count * heads.positive_fraction)
        best = classes.argmax(dim=1).split([len(x) for x in boxes])
        rows = [(x < theirs.num_classes).nonzero()[:most, 0] for x in best]
        objects = [image_boxes[kept] for image_boxes, kept in zip(boxes, rows)]
        seen.classes = torch.cat([x[kept] for x, kept in zip(best, rows)])
        seen.masked = objects if "masks" in parts else None
        if "keypoints" in parts and theirs.keypoint_on:
            seen.pointed = objects
            shape = len(seen.classes), theirs.keypoint_head.num_keypoints
            seen.visible = torch.ones(shape, dtype=torch.bool, device=classes.device)
    given = pyramid, seen, scale
    predicted = _predict_masks(theirs, *given), _predict_keypoints(theirs, *given)
    return seen, RoIPredictions(classes, deltas, *predicted)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode for a while: it draws nothing and keeps its batch statistics."""
    with ExitStack() as modes:
        for part in module.modules():
            modes.enter_context(replaced(part, training=False))
        yield
