"""Losses between the predictions of two dense heads, or two RPNs, and their registry.

R: anchors (FCOS: locations) of all levels and images, K: classes. Every loss takes the student's
and the teacher's predictions for the same anchors and returns a scalar whose gradient flows to the
student's. Sums over anchors are divided by ``soft_count``, the teacher's own number of positives,
because images without labels have no other.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from detectron2.utils.registry import Registry

from msad_kd.losses.feature import add_attributes
from msad_kd.utils.schema import NotNegative, WholeNumber

# A loss's name in KD.LOSSES is its function's name; KD.LOSSES can set the arguments with a default.
DENSE_LOSS_REGISTRY = Registry("DENSE_LOSS")

# An anchor counts where the teacher's best score is at least Detectron2's threshold of a detection.
_POSITIVE = 0.05


@dataclass(frozen=True)
class DensePredictions:
    """Predictions for R anchors."""

    classes: torch.Tensor  # (R, K) logits; of an RPN, K is 1
    boxes: torch.Tensor  # (R, 4) corners, in pixels of the student's image
    centerness: torch.Tensor | None = None  # (R,) logits of FCOS


def of_head(part: str) -> Callable:
    """Declare which predictions a loss compares: "own", "cross" or "rpn".

    "own" are those of the student's head. "cross" are those of the teacher's head for the features
    in the student's; the argument ``convs`` tells after how many convolutions. "rpn" are the
    student's RPN's. Without a declaration they are "own".
    """
    return partial(add_attributes, part=part)


def importance(teacher: DensePredictions) -> torch.Tensor:
    """Return the teacher's best class score of each anchor, (R,), or 0 if it is below 0.05."""
    scores = teacher.classes.float().sigmoid().amax(dim=1)
    return scores * (scores >= _POSITIVE)


def soft_count(teacher: DensePredictions) -> torch.Tensor:
    """Return the sum of the anchors' importance, at least 1."""
    return importance(teacher).sum().clamp(min=1.0)


def _class_loss(student: DensePredictions, teacher: DensePredictions) -> torch.Tensor:
    """Return the quality focal loss, sum |p - q| BCE(p, q) of scores (arXiv 2006.04388, eq. 5).

    The exponent, beta there, is 1. The sum is 0, and has no gradient, where p = q.
    """
    logits, targets = student.classes.float(), teacher.classes.float().sigmoid()
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return ((logits.sigmoid() - targets).abs() * losses).sum() / soft_count(teacher)


def _box_loss(student: DensePredictions, teacher: DensePredictions) -> torch.Tensor:
    losses = 1 - _giou(student.boxes.float(), teacher.boxes.float())
    sides = teacher.boxes[:, 2:] - teacher.boxes[:, :2]
    weights = importance(teacher) * (sides > 0).all(dim=1)  # FCOS predicts boxes without area, too
    return (weights * losses).sum() / soft_count(teacher)


def _centerness_loss(student: DensePredictions, teacher: DensePredictions) -> torch.Tensor:
    """Binary cross-entropy without the teacher's entropy, so that equal predictions give 0."""
    s, t = student.centerness.float(), teacher.centerness.float()
    targets = t.sigmoid()
    cross, entropy = (
        F.binary_cross_entropy_with_logits(x, targets, reduction="none") for x in (s, t)
    )
    return (importance(teacher) * (cross - entropy)).sum() / soft_count(teacher)


@DENSE_LOSS_REGISTRY.register()
@of_head("cross")
def cross_head(
    student: DensePredictions,
    teacher: DensePredictions,
    convs: WholeNumber = 3,
    box_weight: NotNegative = 1.0,
    centerness_weight: NotNegative = 1.0,
) -> torch.Tensor:
    """Return the sum of a class, a box and, for FCOS, a centerness loss (CrossKD, CVPR 2024).

    ``student`` is what the teacher's head predicts from the student's features after ``convs``
    convolutions of each tower; the paper takes 3 of 4. Classes: quality focal loss. Boxes: 1 - GIoU
    and centerness: binary cross-entropy, both weighted by ``importance``.
    """
    loss = _class_loss(student, teacher) + box_weight * _box_loss(student, teacher)
    if student.centerness is None:
        return loss
    return loss + centerness_weight * _centerness_loss(student, teacher)


@DENSE_LOSS_REGISTRY.register()
def dense_class(student: DensePredictions, teacher: DensePredictions) -> torch.Tensor:
    """Return the quality focal loss against the teacher's scores (BCKD, ICCV 2023)."""
    return _class_loss(student, teacher)


@DENSE_LOSS_REGISTRY.register()
def dense_box(student: DensePredictions, teacher: DensePredictions) -> torch.Tensor:
    """Return 1 - IoU of the boxes, weighted by max_c |p_T - p_S| (BCKD, ICCV 2023).

    The weight has no gradient. The loss is 0 where the scores agree.
    """
    s, t = (x.classes.detach().float().sigmoid() for x in (student, teacher))
    weights = (s - t).abs().amax(dim=1)
    losses = 1 - _iou(student.boxes.float(), teacher.boxes.float())
    return (weights * losses).sum() / soft_count(teacher)


@DENSE_LOSS_REGISTRY.register()
@of_head("rpn")
def rpn_class(student: DensePredictions, teacher: DensePredictions) -> torch.Tensor:
    """Return the quality focal loss of the objectness against the teacher's."""
    return _class_loss(student, teacher)


@DENSE_LOSS_REGISTRY.register()
@of_head("rpn")
def rpn_box(student: DensePredictions, teacher: DensePredictions) -> torch.Tensor:
    """Return 1 - GIoU of the boxes at every anchor, weighted by the teacher's objectness."""
    return _box_loss(student, teacher)


def _iou(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the intersection over union of boxes (R, 4) pair by pair: (R,)."""
    inner, union = _overlap(one, other)
    return inner / union.clamp(min=1e-7)


def _giou(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the generalised IoU of boxes (R, 4) pair by pair, (R,), as fvcore's ``giou_loss``.

    fvcore's asserts and masks would make the host wait for a GPU in each step.
    """
    inner, union = _overlap(one, other)
    sides = torch.maximum(one[:, 2:], other[:, 2:]) - torch.minimum(one[:, :2], other[:, :2])
    hull = sides[:, 0] * sides[:, 1]
    return inner / (union + 1e-7) - (hull - union) / (hull + 1e-7)


def _overlap(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the areas of intersection and union of boxes (R, 4) pair by pair, each (R,)."""
    corner = torch.maximum(one[:, :2], other[:, :2])
    sides = (torch.minimum(one[:, 2:], other[:, 2:]) - corner).clamp(min=0)
    inner = sides[:, 0] * sides[:, 1]  # prod() would wait for a GPU in its backward pass
    areas = ((x[:, 2] - x[:, 0]) * (x[:, 3] - x[:, 1]) for x in (one, other))
    return inner, sum(areas) - inner
