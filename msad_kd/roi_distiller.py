"""The student's regions, predicted by its teacher's heads, too, and compared.

R: regions, M: those that have a mask, K: classes, S: the side of a mask.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY, GeneralizedRCNN
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from detectron2.structures import Boxes
from detectron2.utils.events import get_event_storage
from torch import nn

from msad_kd.errors import InputError
from msad_kd.hooking import recording
from msad_kd.loss_terms import LossTerm
from msad_kd.pyramid import Pyramid
from msad_kd.roi_losses import RoIPredictions

__all__ = ["RoIDistiller", "check_roi_heads", "predict_regions", "recording_regions"]


def check_roi_heads(cfg: CfgNode, teacher: CfgNode | None, names: list[str]) -> None:
    """See that a student and its teacher have RoI heads whose predictions can be compared.

    Args:
        cfg: of the student.
        teacher: its teacher's; None where that is not known yet.
        names: of the losses that compare them, for the message.

    Raises:
        InputError: if one of the two has no such heads, or they predict other classes.
    """
    for whose, each in (("student", cfg), ("teacher", teacher)):
        if each is None:
            continue
        meta, heads = each.MODEL.META_ARCHITECTURE, each.MODEL.ROI_HEADS.NAME
        kind = ROI_HEADS_REGISTRY.get(heads)
        if not issubclass(META_ARCH_REGISTRY.get(meta), GeneralizedRCNN):
            raise InputError(
                f"KD.LOSSES: '{names[0]}' compares what RoI heads predict, and the {whose}, a "
                f"{meta}, has none"
            )
        if not issubclass(kind, StandardROIHeads) or issubclass(kind, CascadeROIHeads):
            raise InputError(
                f"KD.LOSSES: '{names[0]}' needs StandardROIHeads, and the {whose}'s "
                f"MODEL.ROI_HEADS.NAME is {heads}"
            )
        if "roi_mask" in names and not each.MODEL.MASK_ON:
            raise InputError(
                f"KD.LOSSES: 'roi_mask' compares masks, and the {whose}'s MODEL.MASK_ON is False"
            )
    own = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if teacher is not None and own != teacher.MODEL.ROI_HEADS.NUM_CLASSES:
        raise InputError(
            f"KD.LOSSES: '{names[0]}' compares classes, and the student has {own}, the teacher "
            f"{teacher.MODEL.ROI_HEADS.NUM_CLASSES} (MODEL.ROI_HEADS.NUM_CLASSES)"
        )


def _of_class(masks: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """(M, K or 1, S, S) masks to each one's own, (M, S, S)."""
    if masks.shape[1] == 1:
        return masks[:, 0]
    return masks[torch.arange(len(masks), device=masks.device), classes]


@contextmanager
def recording_regions(heads: StandardROIHeads):
    """Yields an object that has, after a training step of these heads, the ``regions`` (a list of
    ``Boxes``, one an image), those that are ``masked``, the ``classes`` of the latter (M,), and the
    ``predictions`` for them, with their graph."""
    seen = SimpleNamespace(regions=None, masked=None, classes=None, predictions=None)
    with ExitStack() as stack:
        pooled, predicted = (
            stack.enter_context(recording(each)) for each in (heads.box_pooler, heads.box_predictor)
        )
        if heads.mask_on:
            parts = (heads.mask_pooler, heads.mask_head, heads.mask_head.predictor)
            cropped, masked, drawn = (stack.enter_context(recording(each)) for each in parts)
        yield seen
    seen.regions, masks = pooled.inputs[1], None
    if heads.mask_on:
        seen.masked = cropped.inputs[1]
        seen.classes = torch.cat([each.gt_classes for each in masked.inputs[1]])
        masks = _of_class(drawn.output, seen.classes)
    seen.predictions = RoIPredictions(*predicted.output, masks)


@torch.no_grad()
def predict_regions(
    heads: StandardROIHeads, pyramid: Pyramid, seen: SimpleNamespace, scale: int
) -> RoIPredictions:
    """What other heads predict for the same regions.

    Args:
        heads: in eval mode.
        pyramid: what they read, level name to (N, C, H, W).
        seen: from ``recording_regions``.
        scale: the side of an image of these heads over one of those that were recorded.
    """

    def pool(pooler: nn.Module, levels: list[str], boxes: list[Boxes]) -> torch.Tensor:
        scaled = [Boxes(each.tensor * scale) for each in boxes]
        return pooler([pyramid[level] for level in levels], scaled)

    features = pool(heads.box_pooler, heads.box_in_features, seen.regions)
    classes, deltas = heads.box_predictor(heads.box_head(features))
    masks = None
    if heads.mask_on and seen.masked is not None:
        features = pool(heads.mask_pooler, heads.mask_in_features, seen.masked)
        masks = _of_class(heads.mask_head.layers(features), seen.classes)
    return RoIPredictions(classes, deltas, masks)


class RoIDistiller:
    """The losses between what a student and its teacher predict for the student's regions.

    Both see the same regions, the student's sampled proposals, so any teacher will do that has the
    same classes and RoI heads, whatever the strides of its levels. It trains nothing of its own.
    """

    def __init__(self, terms: list[LossTerm], diagnostics_period: int = 0):
        """
        Args:
            terms: the losses, which are summed.
            diagnostics_period: as of ``Distiller``.
        """
        self.terms = terms
        self.diagnostics_period = diagnostics_period
        self._values: dict[str, torch.Tensor] = {}

    def __call__(
        self, seen: SimpleNamespace, teacher: RoIPredictions, iteration: int
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            seen: from ``recording_regions``.
            teacher: from ``predict_regions``.
            iteration: the trainer's, counting from 0.

        Returns:
            ``loss_kd_<name>``, weighted, for each loss.

        Raises:
            InputError: if a loss refuses its fields or the predictions.
        """
        losses: dict[str, torch.Tensor] = {}
        due = self.diagnostics_period and (iteration + 1) % self.diagnostics_period == 0
        self._values = {}
        for term in self.terms:
            try:
                value = term.function(seen.predictions, teacher, **term.arguments)
            except ValueError as error:
                raise InputError(f"KD.LOSSES: '{term.name}': {error}") from error
            self._values[term.name] = self._values.get(term.name, 0.0) + value.detach()
            key = f"loss_kd_{term.name}"
            losses[key] = losses.get(key, 0.0) + term.weight_at(iteration) * value
        if due:
            for name, value in self._values.items():
                get_event_storage().put_scalar(f"kd/{name}", value)
        return losses

    def not_finite(self) -> list[str]:
        """As of ``Distiller``."""
        return [name for name, value in self._values.items() if not value.isfinite().all()]
