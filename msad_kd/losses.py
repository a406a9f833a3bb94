"""Losses between two feature maps, and the registry that names them.

N: images, C: channels, H, W: height and width of a level. Every function takes the student's map
first and the teacher's second, both (N, C, H, W), and returns a scalar; the gradient goes to the
student's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.utils.registry import Registry

__all__ = ["DISTILL_LOSS_REGISTRY", "l1", "mse", "pkd"]

DISTILL_LOSS_REGISTRY = Registry("DISTILL_LOSS")
DISTILL_LOSS_REGISTRY.__doc__ = """
Losses by the name KD.LOSSES calls them, which is the function's. They take (student, teacher,
**arguments), both maps of shape (N, C, H, W), and return a scalar.
"""


@DISTILL_LOSS_REGISTRY.register()
def l1(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean of |S - T|: MSAD's loss (arXiv 2109.06875, sec. 3.3), 0 when the maps are equal."""
    return F.l1_loss(student, teacher)


@DISTILL_LOSS_REGISTRY.register()
def mse(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean of (S - T)^2."""
    return F.mse_loss(student, teacher)


@DISTILL_LOSS_REGISTRY.register()
def pkd(student: torch.Tensor, teacher: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """1 - Pearson correlation of each channel over (N, H, W), mean over channels (PKD, NeurIPS'22).

    Half the mean squared difference of the two maps after each channel has been brought to mean 0
    and variance 1: between 0 (equal up to a positive scale and an offset) and 2 (opposite).

    Args:
        eps: added to the standard deviation, for channels that are constant.
    """

    def standardised(x: torch.Tensor) -> torch.Tensor:
        x = x.float()
        mean = x.mean(dim=(0, 2, 3), keepdim=True)
        # Not the root of the variance, whose gradient is NaN where a channel is constant.
        std = x.std(dim=(0, 2, 3), keepdim=True, correction=0)
        return (x - mean) / (std + eps)

    return F.mse_loss(standardised(student), standardised(teacher)) / 2
