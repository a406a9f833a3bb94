"""Distillation losses between feature maps or RoI predictions, and how KD.LOSSES sets them."""

from msad_kd.losses.dense import DENSE_LOSS_REGISTRY, DensePredictions, of_head
from msad_kd.losses.feature import DISTILL_LOSS_REGISTRY, diagnosed, with_parts
from msad_kd.losses.roi import ROI_LOSS_REGISTRY, RoIPredictions, reads
from msad_kd.losses.terms import LossTerm, read_losses
