"""Distillation losses between feature maps or RoI predictions, and how KD.LOSSES sets them."""

from msad_kd.losses.feature import DISTILL_LOSS_REGISTRY, diagnosed, with_parts
from msad_kd.losses.roi import ROI_LOSS_REGISTRY, RoIPredictions, without_masks
from msad_kd.losses.terms import LossTerm, read_losses

__all__ = [
    "DISTILL_LOSS_REGISTRY",
    "ROI_LOSS_REGISTRY",
    "LossTerm",
    "RoIPredictions",
    "diagnosed",
    "read_losses",
    "with_parts",
    "without_masks",
]
