"""Losses between what two R-CNNs predict for the same regions, and the registry that names them.

R: regions, K: classes without the background, M: regions that have a mask, S: the side of a mask.
Every function takes the student's predictions first and the teacher's second and returns a scalar;
the gradient goes to the student's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.utils.registry import Registry

__all__ = [
    "ROI_LOSS_REGISTRY",
    "RoIPredictions",
    "roi_box",
    "roi_class",
    "roi_mask",
    "without_masks",
]

ROI_LOSS_REGISTRY = Registry("ROI_LOSS")
ROI_LOSS_REGISTRY.__doc__ = """
Losses by the name KD.LOSSES calls them, which is the function's. They take (student, teacher,
**arguments), both ``RoIPredictions``, and return a scalar. An argument with a default is a field of
KD.LOSSES.
"""


@dataclass(frozen=True)
class RoIPredictions:
    """What RoI heads predict for R regions, of all images of a batch."""

    classes: torch.Tensor  # (R, K + 1) logits, the background last
    deltas: torch.Tensor  # (R, 4K) or, of all classes alike, (R, 4): from region to box
    masks: torch.Tensor | None  # (M, S, S) logits, of each region's own class; None: not predicted


def without_masks(loss: Callable) -> Callable:
    """Decorates a loss that reads no masks: where all are so, the teacher is not asked for any."""
    loss.reads_masks = False
    return loss


@ROI_LOSS_REGISTRY.register()
@without_masks
def roi_class(
    student: RoIPredictions, teacher: RoIPredictions, temperature: float = 1.0
) -> torch.Tensor:
    """tau^2 KL(p_T || p_S), mean over the regions, of the classes' probabilities at temperature tau
    (Hinton et al., arXiv 1503.02531); 0 when they are equal, and without regions.

    Raises:
        ValueError: if the temperature isn't above 0.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it should be above 0")
    if len(student.classes) == 0:
        return student.classes.sum()
    s, t = (F.log_softmax(x.classes.float() / temperature, dim=1) for x in (student, teacher))
    return temperature**2 * F.kl_div(s, t, reduction="batchmean", log_target=True)


@ROI_LOSS_REGISTRY.register()
@without_masks
def roi_box(student: RoIPredictions, teacher: RoIPredictions) -> torch.Tensor:
    """Sum over a region's four deltas of |S - T|, of the object class that the teacher thinks most
    likely and times its probability; mean over the regions, as Detectron2's own box loss is.

    So background, as the teacher sees it, hardly counts; 0 without regions.
    """
    regions = len(student.deltas)
    if regions == 0:
        return student.deltas.sum()
    sure, likely = teacher.classes.float().softmax(dim=1)[:, :-1].max(dim=1)  # (R,), (R,)

    def own(deltas):  # (R, 4)
        each = deltas.float().view(regions, -1, 4)
        rows = torch.arange(regions, device=each.device)
        return each[:, 0] if each.shape[1] == 1 else each[rows, likely]

    difference = (own(student.deltas) - own(teacher.deltas)).abs().sum(dim=1)
    return (sure * difference).mean()


@ROI_LOSS_REGISTRY.register()
def roi_mask(student: RoIPredictions, teacher: RoIPredictions) -> torch.Tensor:
    """Binary cross-entropy with the teacher's mask probabilities as targets, mean over cells; not 0
    but the teacher's own entropy when they are equal, and 0 without masks.

    Raises:
        ValueError: if one of the two predicts no masks.
    """
    if student.masks is None or teacher.masks is None:
        raise ValueError("it needs masks of student and teacher (MODEL.MASK_ON True)")
    if len(student.masks) == 0:
        return student.masks.sum()
    return F.binary_cross_entropy_with_logits(
        student.masks.float(), teacher.masks.float().sigmoid()
    )
