"""Losses between two feature maps, and the registry that names them.

N: images, C: channels, H, W: height and width of a level. Every function takes the student's map
first and the teacher's second, both (N, C, H, W), and returns a scalar; the gradient goes to the
student's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from detectron2.utils.registry import Registry
from torch import nn

from msad_kd.losses.ssim import functional as similarity

__all__ = [
    "DISTILL_LOSS_REGISTRY",
    "cwd",
    "diagnosed",
    "generator",
    "l1",
    "mgd",
    "mse",
    "pkd",
    "ssim",
    "with_parts",
]

DISTILL_LOSS_REGISTRY = Registry("DISTILL_LOSS")
DISTILL_LOSS_REGISTRY.__doc__ = """
Losses by the name KD.LOSSES calls them, which is the function's. They take (student, teacher,
**arguments), both maps of shape (N, C, H, W), and return a scalar. An argument with a default is a
field of KD.LOSSES.
"""


def with_parts(build: Callable[[int], nn.Module]) -> Callable:
    """Decorates a loss that trains a module of its own, which it takes as its third argument.

    Args:
        build: from C, the teacher's channels, to the module. Each level has one; they live in the
            student's ``distiller``, are trained with it, and are in no exported model.
    """

    def decorate(loss: Callable) -> Callable:
        loss.parts = build
        return loss

    return decorate


def diagnosed(**measures: Callable) -> Callable:
    """Decorates a loss with what is worth watching beside its value.

    Args:
        measures: by name, functions of the loss's own arguments that return a scalar; they are
            logged for each level every KD.DIAGNOSTICS_PERIOD iterations.
    """

    def decorate(loss: Callable) -> Callable:
        loss.measures = measures
        return loss

    return decorate


@DISTILL_LOSS_REGISTRY.register()
def l1(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean of |S - T|: MSAD's loss (arXiv 2109.06875, sec. 3.3), 0 when the maps are equal."""
    return F.l1_loss(student, teacher)


@DISTILL_LOSS_REGISTRY.register()
def mse(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean of (S - T)^2."""
    return F.mse_loss(student, teacher)


def _blind_share(
    student: torch.Tensor, teacher: torch.Tensor, rescale: str = "channel", **arguments
) -> torch.Tensor:
    arguments.pop("exponents", None)
    return similarity.blind_share(
        *(similarity.rescale(x, rescale) for x in (student, teacher)), **arguments
    )


@DISTILL_LOSS_REGISTRY.register()
@diagnosed(blind_share=_blind_share)
def ssim(
    student: torch.Tensor,
    teacher: torch.Tensor,
    rescale: str = "channel",
    exponents: tuple[float, float, float] = (1, 1, 1),
    window_size: int = 11,
    sigma: float = 1.5,
    data_range: float = 1.0,
    padding: str = "reflect",
) -> torch.Tensor:
    """Mean of (1 - SSIM) / 2 of the rescaled maps: structural distillation (arXiv 2211.13133).

    Between 0 (equal, up to what the rescaling takes away) and 1. Weight 4 is the paper's, 2 does as
    well there. ``kd/ssim_blind_share_<level>`` tells the share of windows that are too flat to have
    a structure in SSIM's eyes.

    Args:
        rescale: psi, to [0, 1] by least and greatest value: "channel" (of each image and channel),
            "image" or "none".
        exponents: of luminance, contrast and structure; 0 leaves one out.
        window_size, sigma: of the Gaussian window, in cells; on small maps the window shrinks.
        data_range: of the maps after rescaling.
        padding: "reflect", "zero" or "valid".
    """
    return similarity.ssim_loss(
        *(similarity.rescale(x, rescale) for x in (student, teacher)),
        exponents=tuple(exponents),
        window_size=window_size,
        sigma=sigma,
        data_range=data_range,
        padding=padding,
    )


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


@DISTILL_LOSS_REGISTRY.register()
def cwd(student: torch.Tensor, teacher: torch.Tensor, tau: float = 1.0) -> torch.Tensor:
    """tau^2 KL(T || S) of each channel's softmax over its cells, mean over (N, C) (CWD, ICCV'21).

    It compares where a channel is strong: an offset of a channel does not matter.

    Args:
        tau: the temperature, above 0; the maps are divided by it first.

    Raises:
        ValueError: of tau.
    """
    if not tau > 0:
        raise ValueError(f"tau is {tau}; it has to be above 0")
    log_s, log_t = ((x.float().flatten(2) / tau).log_softmax(-1) for x in (student, teacher))
    return tau**2 * F.kl_div(log_s, log_t, log_target=True, reduction="none").sum(-1).mean()


def generator(channels: int) -> nn.Module:
    """MGD's generation block: 3x3 convolution, ReLU, 3x3 convolution, of as many channels."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels, 3, padding=1),
    )


@DISTILL_LOSS_REGISTRY.register()
@with_parts(generator)
def mgd(
    student: torch.Tensor, teacher: torch.Tensor, parts: nn.Module, mask_ratio: float = 0.65
) -> torch.Tensor:
    """Sum of (T - G(S masked))^2 over N: masked generative distillation (MGD, ECCV'22).

    A sum and not a mean, as published, so its weight is small: 2e-5 for RetinaNet with
    ``mask_ratio`` 0.65, 5e-7 for Mask R-CNN with 0.45.

    Args:
        parts: G, which makes the teacher's map from what is left of the student's.
        mask_ratio: lambda, the share of cells that are set to 0 (in all channels alike), from 0 to
            below 1.

    Raises:
        ValueError: of mask_ratio.
    """
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio is {mask_ratio}; it has to be from 0 to below 1")
    kept = torch.rand_like(student[:, :1]) >= mask_ratio
    return F.mse_loss(parts(student * kept).float(), teacher.float(), reduction="sum") / len(
        student
    )
