"""The regions that a student's RoI heads see, and what other heads predict for them.

N: images, R: regions, M: regions with a mask, K: classes, S: side of a mask.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import torch
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Boxes
from torch import nn

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
        An object that has, when the block ends, ``regions`` (a list of N ``Boxes``), ``masked``
        (those with a mask, or None), their ``classes`` (M,) and the ``predictions``, with graph.
    """
    seen = SimpleNamespace(masked=None)
    masks = masks and heads.mask_on
    modules = [heads.box_pooler, heads.box_predictor]
    if masks:
        modules += [heads.mask_pooler, heads.mask_head, heads.mask_head.predictor]
    with ExitStack() as stack:
        pooler, predictor, *mask_calls = [stack.enter_context(recording(x)) for x in modules]
        yield seen
    seen.regions, predicted_masks = pooler.inputs[1], None
    if masks:
        mask_pooler, mask_head, mask_predictor = mask_calls
        seen.masked = mask_pooler.inputs[1]
        seen.classes = torch.cat([instances.gt_classes for instances in mask_head.inputs[1]])
        predicted_masks = _masks_of_classes(mask_predictor.output, seen.classes)
    seen.predictions = RoIPredictions(*predictor.output, predicted_masks)


@torch.no_grad()
def predict_regions(
    heads: StandardROIHeads, pyramid: Pyramid, seen: SimpleNamespace, scale: int
) -> RoIPredictions:
    """Predict with other heads for recorded regions.

    Args:
        heads: the teacher's, in eval mode.
        pyramid: the levels that the heads read, level name to (N, C, H, W).
        seen: from ``recording_regions``.
        scale: the side of the image in the heads' frame over its side in the recorded one.

    Returns:
        Classes and box deltas of the R regions, and masks of the M regions that have one.
    """

    def pool(pooler: nn.Module, levels: list[str], boxes: list[Boxes]) -> torch.Tensor:
        scaled = [Boxes(image_boxes.tensor * scale) for image_boxes in boxes]
        return pooler([pyramid[level] for level in levels], scaled)

    features = pool(heads.box_pooler, heads.box_in_features, seen.regions)
    classes, deltas = heads.box_predictor(heads.box_head(features))
    masks = None
    if heads.mask_on and seen.masked is not None:
        features = pool(heads.mask_pooler, heads.mask_in_features, seen.masked)
        masks = _masks_of_classes(heads.mask_head.layers(features), seen.classes)
    return RoIPredictions(classes, deltas, masks)
