"""Compare what a student's and its teacher's RoI heads predict for the same regions.

N: images, R: regions, M: regions with a mask, K: classes, S: side of a mask.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import torch
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from detectron2.structures import Boxes
from torch import nn

from msad_kd.distill.distiller import Distiller, Losses
from msad_kd.losses.roi import RoIPredictions
from msad_kd.losses.terms import LossTerm
from msad_kd.modeling.capture import recording
from msad_kd.modeling.pyramid import Pyramid
from msad_kd.utils.errors import InputError


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


class RoIDistiller(Distiller):
    """Compares predictions for the regions that the student samples from its proposals.

    The teacher needs the same classes and ``StandardROIHeads``; the strides of its levels do not
    matter. Nothing is trained here.

    Args:
        terms: the losses.
        diagnostics_period: see ``Distiller``.
    """

    def __init__(self, terms: list[LossTerm], diagnostics_period: int = 0):
        super().__init__(terms, diagnostics_period)
        self.reads_masks = any(getattr(term.function, "reads_masks", True) for term in terms)

    def connect(self, student: nn.Module, teacher: nn.Module) -> set[str]:
        """Check that both detectors' heads can be compared, and return the levels that are read.

        Raises:
            InputError: if one has no ``StandardROIHeads`` or lacks the masks that a loss compares,
                or if their classes differ or, for ``roi_box``, the units of their boxes.
        """
        if not self.terms:
            return set()
        _check_roi_heads(student, teacher, [term.name for term in self.terms])
        heads = teacher.roi_heads
        with_masks = heads.mask_on and self.reads_masks
        return {*heads.box_in_features, *(heads.mask_in_features if with_masks else ())}

    def forward(self, seen: SimpleNamespace, teacher: RoIPredictions, iteration: int) -> Losses:
        """Compare the predictions for one batch at an iteration of the trainer.

        Args:
            seen: the student's regions and predictions, from ``recording_regions``.
            teacher: the teacher's predictions, from ``predict_regions``.
            iteration: counted from 0.

        Returns:
            ``loss_kd_<name>``, weighted, for each loss.
        """
        pair = seen.predictions, teacher
        values = [(term, {term.name: self.evaluate(term, *pair)}) for term in self.terms]
        return self.weigh(values, iteration)


def _check_roi_heads(student: nn.Module, teacher: nn.Module, names: list[str]) -> None:
    for role, model in (("student", student), ("teacher", teacher)):
        heads = getattr(model, "roi_heads", None)
        if not isinstance(heads, StandardROIHeads) or isinstance(heads, CascadeROIHeads):
            kind = "none" if heads is None else type(heads).__name__
            raise InputError(
                f"KD.LOSSES: '{names[0]}' compares predictions of StandardROIHeads, and the {role},"
                f" a {type(model).__name__}, has {kind} (MODEL.ROI_HEADS.NAME)"
            )
        if "roi_mask" in names and not heads.mask_on:
            raise InputError(
                f"KD.LOSSES: 'roi_mask' compares masks, and the {role}'s MODEL.MASK_ON is False"
            )
    heads = student.roi_heads, teacher.roi_heads
    settings = {"MODEL.ROI_HEADS.NUM_CLASSES": [x.num_classes for x in heads]}
    if "roi_box" in names:
        weights = [tuple(x.box_predictor.box2box_transform.weights) for x in heads]
        settings["MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS"] = weights
    for key, (mine, theirs) in settings.items():
        if mine != theirs:
            raise InputError(
                f"KD.LOSSES: losses of RoI heads need the same {key} in both models; it is {mine} "
                f"in the student and {theirs} in the teacher"
            )
