"""Losses between the predictions of two R-CNNs for the same regions, and their registry.

R: regions, K: classes without the background, M: regions that have a mask, V: keypoints of
all regions, S: side of a mask or of a keypoint's heat map.
Every loss takes the student's and the teacher's predictions and returns a scalar whose gradient
flows to the student's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from detectron2.utils.registry import Registry

from msad_kd.losses.feature import add_attributes
from msad_kd.utils.schema import NotNegative, Positive

Weights = Annotated[
    list[NotNegative], lambda weights: any(weights), "a list of numbers of 0 or more, not all 0"
]

# A loss's name in KD.LOSSES is its function's name; KD.LOSSES can set the arguments with a default.
ROI_LOSS_REGISTRY = Registry("ROI_LOSS")


@dataclass(frozen=True)
class RoIPredictions:
    """Predictions of RoI heads for R regions of all images of a batch."""

    classes: torch.Tensor  # (R, K + 1) logits, the background last
    deltas: torch.Tensor  # from region to box: (R, 4K), or (R, 4) if box regression is agnostic
    masks: torch.Tensor | None  # (M, S, S) logits of each region's class; None: not predicted
    keypoints: torch.Tensor | None = None  # (V, S, S) logits of heat maps; None: not predicted

    @classmethod
    def cat(cls, parts: Sequence["RoIPredictions"]) -> "RoIPredictions":
        """Join predictions for several sets of regions; a part that one set lacks is left out."""
        if len(parts) == 1:
            return parts[0]
        columns = zip(*(vars(x).values() for x in parts))
        return cls(*(None if any(x is None for x in c) else torch.cat(c) for c in columns))


def reads(*parts: str) -> Callable[[Callable], Callable]:
    """Declare whether a loss reads "masks" or "keypoints"; what none reads is not predicted.

    A loss without this decorator reads both.
    """
    return partial(add_attributes, reads=frozenset(parts))


def parts_read(loss: Callable) -> frozenset[str]:
    """Return which of "masks" and "keypoints" a loss reads."""
    return getattr(loss, "reads", frozenset(("masks", "keypoints")))


@ROI_LOSS_REGISTRY.register()
@reads()
def roi_class(
    student: RoIPredictions,
    teacher: RoIPredictions,
    temperature: Positive = 1.0,
    class_weights: Weights | None = None,
) -> torch.Tensor:
    """Return tau^2 KL(p_T || p_S) of the class probabilities (Hinton et al., arXiv 1503.02531).

    It is the mean over regions, 0 without any. The temperature tau, above 0, divides the logits.
    ``class_weights`` are K + 1 numbers w, the background's last. With them the divergence is
    sum_c w_c (p_T log(p_T / p_S) - p_T + p_S) / mean(w): equal predictions stay its minimum, 0,
    and equal weights change nothing.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it should be above 0")
    if len(student.classes) == 0:
        return student.classes.sum()
    s, t = (F.log_softmax(x.classes.float() / temperature, dim=1) for x in (student, teacher))
    if class_weights is None:
        return temperature**2 * F.kl_div(s, t, reduction="batchmean", log_target=True)
    if len(class_weights) != s.shape[1]:
        raise ValueError(f"class_weights has {len(class_weights)} numbers, not {s.shape[1]}")
    weights = s.new_tensor(class_weights)
    parts = t.exp() * (t - s) - t.exp() + s.exp()  # (R, K + 1), each at least 0
    return temperature**2 * (weights / weights.mean() * parts).sum(dim=1).mean()


@ROI_LOSS_REGISTRY.register()
@reads()
def roi_box(student: RoIPredictions, teacher: RoIPredictions) -> torch.Tensor:
    """Return sum |S - T| of a region's four deltas, averaged over regions as Detectron2's box loss.

    The deltas are those of the teacher's most likely object class, and its probability weights the
    region, so that background hardly counts. The loss is 0 without regions.
    """
    regions = len(student.deltas)
    if regions == 0:
        return student.deltas.sum()
    probability, label = teacher.classes.float().softmax(dim=1)[:, :-1].max(dim=1)  # (R,), (R,)
    s, t = (x.deltas.float().view(regions, -1, 4) for x in (student, teacher))  # (R, K or 1, 4)
    rows = torch.arange(regions, device=label.device)
    s, t = (x[:, 0] if x.shape[1] == 1 else x[rows, label] for x in (s, t))
    return (probability * (s - t).abs().sum(dim=1)).mean()


@ROI_LOSS_REGISTRY.register()
@reads("masks")
def roi_mask(student: RoIPredictions, teacher: RoIPredictions) -> torch.Tensor:
    """Return the mean binary cross-entropy with the teacher's mask probabilities as targets.

    For equal predictions it is the teacher's entropy, not 0; without masked regions it is 0.
    """
    if student.masks is None or teacher.masks is None:
        raise ValueError("it needs masks of student and teacher (MODEL.MASK_ON True)")
    if len(student.masks) == 0:
        return student.masks.sum()
    targets = teacher.masks.float().sigmoid()
    return F.binary_cross_entropy_with_logits(student.masks.float(), targets)


@ROI_LOSS_REGISTRY.register()
@reads("keypoints")
def roi_keypoint(
    student: RoIPredictions, teacher: RoIPredictions, temperature: Positive = 1.0
) -> torch.Tensor:
    """Return tau^2 KL(p_T || p_S) of heat maps, each a softmax over its S^2 cells.

    It is the mean over keypoints, 0 without any. The temperature tau, above 0, divides the logits.
    """
    if student.keypoints is None or teacher.keypoints is None:
        raise ValueError("it needs keypoints of student and teacher (MODEL.KEYPOINT_ON True)")
    cells = (replace(x, classes=x.keypoints.flatten(1)) for x in (student, teacher))
    return roi_class(*cells, temperature)  # of S^2 classes
