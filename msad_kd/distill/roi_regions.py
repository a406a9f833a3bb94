"""RoI heads: which can be compared, and what those of two nets predict for the same regions.

R: regions, M: those that have a mask, K: classes, S: the side of a mask.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from detectron2.config import CfgNode
from detectron2.modeling import ROI_HEADS_REGISTRY, GeneralizedRCNN
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from detectron2.structures import Boxes
from torch import nn

from msad_kd.losses.roi import RoIPredictions
from msad_kd.modeling.capture import recording
from msad_kd.modeling.classes import is_a
from msad_kd.modeling.pyramid import Pyramid
from msad_kd.utils.errors import InputError

__all__ = ["RoIHeadsSpec", "check_roi_heads", "predict_regions", "recording_regions"]


@dataclass(frozen=True)
class RoIHeadsSpec:
    """What decides whether a model's RoI heads can be compared with another's."""

    model: str  # the meta-architecture
    kind: type | None = None  # of its heads; None without any
    classes: int = 0
    masks: bool = False
    box_weights: tuple[float, ...] = ()  # that the four deltas of a box are multiplied by

    @property
    def is_standard(self) -> bool:
        """Whether each region is pooled from an FPN and predicted once."""
        standard = self.kind is not None and issubclass(self.kind, StandardROIHeads)
        return standard and not issubclass(self.kind, CascadeROIHeads)

    @classmethod
    def of_config(cls, cfg: CfgNode) -> RoIHeadsSpec:
        """Of the model that a config is of."""
        name, keys = cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.ROI_HEADS
        if not is_a(cfg, GeneralizedRCNN):
            return cls(name)
        return cls(
            name,
            kind=ROI_HEADS_REGISTRY.get(keys.NAME),
            classes=keys.NUM_CLASSES,
            masks=cfg.MODEL.MASK_ON,
            box_weights=tuple(cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS),
        )

    @classmethod
    def of_model(cls, model: nn.Module) -> RoIHeadsSpec:
        """Of a model that is there."""
        name, heads = type(model).__name__, getattr(model, "roi_heads", None)
        found = cls(name, None if heads is None else type(heads))
        if not found.is_standard:
            return found
        return cls(
            name,
            kind=type(heads),
            classes=heads.num_classes,
            masks=heads.mask_on,
            box_weights=tuple(heads.box_predictor.box2box_transform.weights),
        )


def check_roi_heads(student: RoIHeadsSpec, teacher: RoIHeadsSpec | None, names: list[str]) -> None:
    """See that a student and its teacher have RoI heads whose predictions can be compared.

    Args:
        student, teacher: theirs; None for a teacher that is not known yet.
        names: of the losses that compare them.

    Raises:
        InputError: if one of the two has no such heads, or they predict other classes or, for
            ``roi_box``, boxes in other units.
    """
    for whose, each in (("student", student), ("teacher", teacher)):
        if each is None:
            continue
        if each.kind is None:
            raise InputError(
                f"KD.LOSSES: '{names[0]}' compares what RoI heads predict, and the {whose}, a "
                f"{each.model}, has none"
            )
        if not each.is_standard:
            raise InputError(
                f"KD.LOSSES: '{names[0]}' needs StandardROIHeads, and the {whose}'s "
                f"MODEL.ROI_HEADS.NAME is {each.kind.__name__}"
            )
        if "roi_mask" in names and not each.masks:
            raise InputError(
                f"KD.LOSSES: 'roi_mask' compares masks, and the {whose}'s MODEL.MASK_ON is False"
            )
    if teacher is None:
        return
    if student.classes != teacher.classes:
        raise InputError(
            f"KD.LOSSES: '{names[0]}' compares classes, and the student has {student.classes}, the "
            f"teacher {teacher.classes} (MODEL.ROI_HEADS.NUM_CLASSES)"
        )
    if "roi_box" in names and student.box_weights != teacher.box_weights:
        raise InputError(
            "KD.LOSSES: 'roi_box' compares the deltas of boxes, and MODEL.ROI_BOX_HEAD."
            f"BBOX_REG_WEIGHTS is {student.box_weights} in the student and {teacher.box_weights} "
            "in the teacher"
        )


def _of_class(masks: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """(M, K or 1, S, S) masks to each one's own, (M, S, S)."""
    if masks.shape[1] == 1:
        return masks[:, 0]
    return masks[torch.arange(len(masks), device=masks.device), classes]


@contextmanager
def recording_regions(heads: StandardROIHeads, masks: bool = True):
    """Yields an object that has, after a training step of these heads, the ``regions`` (a list of
    ``Boxes``, one an image), those that are ``masked``, the ``classes`` of the latter (M,), and the
    ``predictions`` for them, with their graph.

    Args:
        masks: without them nothing is ``masked``.
    """
    seen = SimpleNamespace(regions=None, masked=None, classes=None, predictions=None)
    masks = masks and heads.mask_on
    with ExitStack() as stack:
        pooled, predicted = (
            stack.enter_context(recording(each)) for each in (heads.box_pooler, heads.box_predictor)
        )
        if masks:
            parts = (heads.mask_pooler, heads.mask_head, heads.mask_head.predictor)
            cropped, masked, drawn = (stack.enter_context(recording(each)) for each in parts)
        yield seen
    seen.regions, own = pooled.inputs[1], None
    if masks:
        seen.masked = cropped.inputs[1]
        seen.classes = torch.cat([each.gt_classes for each in masked.inputs[1]])
        own = _of_class(drawn.output, seen.classes)
    seen.predictions = RoIPredictions(*predicted.output, own)


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
