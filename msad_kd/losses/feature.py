"""Losses between two feature maps, and the registry that names them.

N: images, C: channels, H, W: height and width of a level. Every loss takes the student's and the
teacher's map, (N, C, H, W), and returns a scalar whose gradient flows to the student's map. One
with a parameter ``weights``, (N, 1, H, W), can look at some cells more than at others.
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from detectron2.utils.registry import Registry
from torch import nn

from msad_kd.losses.ssim import functional
from msad_kd.losses.ssim.blur import PADDINGS
from msad_kd.utils.schema import Positive, Share

# A loss's name in KD.LOSSES is its function's name; KD.LOSSES can set the arguments with a default.
# Their annotations are checked when the config is read; utils.schema says what they can be.
DISTILL_LOSS_REGISTRY = Registry("DISTILL_LOSS")

_ODD = "an odd whole number above 0"
_EXPONENTS = "a list of 3 numbers, none negative"


def with_parts(build: Callable[[int], nn.Module]) -> Callable:
    """Declare that a loss trains a module of its own, its third argument.

    ``build`` makes one for each level from the teacher's channels C. They are part of the student's
    ``distiller``, so they are not in the stripped checkpoint.
    """
    return partial(add_attributes, parts=build)


def diagnosed(**measures: Callable) -> Callable:
    """Declare what is logged for each level every KD.DIAGNOSTICS_PERIOD iterations, by name.

    The ``measures`` are functions that take the loss's arguments and return a scalar.
    """
    return partial(add_attributes, measures=measures)


def add_attributes(loss: Callable, **attributes) -> Callable:
    """Declare something of a loss: set attributes of its function, and return it."""
    vars(loss).update(attributes)
    return loss


Weights = torch.Tensor | None  # (N, 1, H, W); None: all 1


def _mean(loss: Callable, student: torch.Tensor, teacher: torch.Tensor, weights: Weights):
    if weights is None:
        return loss(student, teacher)
    return (weights * loss(student, teacher, reduction="none")).mean()


@DISTILL_LOSS_REGISTRY.register()
def l1(student: torch.Tensor, teacher: torch.Tensor, weights: Weights = None) -> torch.Tensor:
    """Return the mean of |S - T|, MSAD's loss (arXiv 2109.06875, sec. 3.3)."""
    return _mean(F.l1_loss, student, teacher, weights)


@DISTILL_LOSS_REGISTRY.register()
def mse(student: torch.Tensor, teacher: torch.Tensor, weights: Weights = None) -> torch.Tensor:
    """Return the mean of (S - T)^2."""
    return _mean(F.mse_loss, student, teacher, weights)


def _blind_share(student, teacher, rescale="channel", exponents=None, **arguments):
    maps = (functional.rescale(x, rescale) for x in (student, teacher))
    return functional.blind_share(*maps, **arguments)


@DISTILL_LOSS_REGISTRY.register()
@diagnosed(blind_share=_blind_share)
def ssim(
    student: torch.Tensor,
    teacher: torch.Tensor,
    rescale: Literal[functional.SCOPES] = "channel",
    exponents: Annotated[tuple[float, float, float], lambda x: min(x) >= 0, _EXPONENTS] = (1, 1, 1),
    window_size: Annotated[int, lambda size: size > 0 and size % 2 == 1, _ODD] = 11,
    sigma: Positive = 1.5,
    data_range: Positive = 1.0,
    padding: Literal[PADDINGS] = "reflect",
    weights: Weights = None,
) -> torch.Tensor:
    """Return the mean of (1 - SSIM) / 2 of the rescaled maps (Structural KD, arXiv 2211.13133).

    It is from 0 (equal after rescaling) to 1. The paper's weight is 4; 2 works as well there.
    ``kd/ssim_blind_share_<level>`` logs the share of windows too flat for SSIM to see structure.
    ``rescale`` is psi: the scope of ``functional.rescale``. The rest are ``functional.ssim``'s.
    """
    maps = (functional.rescale(x, rescale) for x in (student, teacher))
    window = {"window_size": window_size, "sigma": sigma, "padding": padding}
    options = {"exponents": exponents, "data_range": data_range, **window}
    if weights is None:
        return functional.ssim_loss(*maps, **options)
    losses = functional.ssim_loss(*maps, reduction="none", **options)
    # Without padding the map has only the windows that lie inside.
    rows, columns = ((a - b) // 2 for a, b in zip(weights.shape[-2:], losses.shape[-2:]))
    height, width = losses.shape[-2:]
    return (weights[..., rows : rows + height, columns : columns + width] * losses).mean()


@DISTILL_LOSS_REGISTRY.register()
def pkd(
    student: torch.Tensor,
    teacher: torch.Tensor,
    eps: Annotated[float, lambda x: 1e-12 <= x <= 1, "a number from 1e-12 to 1"] = 1e-6,
    weights: Weights = None,
) -> torch.Tensor:
    """Return 1 - Pearson correlation per channel over (N, H, W), averaged (PKD, NeurIPS 2022).

    This is half the mean squared difference of the maps with each channel standardised: from 0
    (equal up to a positive scale and an offset) to 2 (opposite). ``eps`` is for constant channels.
    """
    axes = {"dim": (0, 2, 3), "keepdim": True}
    maps = (x.float() for x in (student, teacher))
    # std, not the root of the variance: its gradient would be NaN where a channel is constant.
    s, t = ((x - x.mean(**axes)) / (x.std(**axes, correction=0) + eps) for x in maps)
    return _mean(F.mse_loss, s, t, weights) / 2


@DISTILL_LOSS_REGISTRY.register()
def cwd(
    student: torch.Tensor, teacher: torch.Tensor, tau: Positive = 1.0, weights: Weights = None
) -> torch.Tensor:
    """Return tau^2 KL(T || S) of each channel's softmax over cells, averaged (CWD, ICCV 2021).

    It compares where a channel is strong, whatever its offset. ``tau``, above 0, divides the maps.
    With ``weights`` w it is the sum of w (t log(t / s) - t + s), which is least for s = t, too.
    """
    if not tau > 0:
        raise ValueError(f"tau is {tau}; it has to be above 0")
    log_s, log_t = ((x.float().flatten(2) / tau).log_softmax(-1) for x in (student, teacher))
    losses = F.kl_div(log_s, log_t, log_target=True, reduction="none")
    if weights is not None:
        losses = weights.flatten(2) * (losses - log_t.exp() + log_s.exp())
    return tau**2 * losses.sum(-1).mean()


def generator(channels: int) -> nn.Module:
    """Build MGD's generation block: 3x3 convolution, ReLU, 3x3 convolution."""
    first, second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
    return nn.Sequential(first, nn.ReLU(inplace=True), second)


@DISTILL_LOSS_REGISTRY.register()
@with_parts(generator)
def mgd(
    student: torch.Tensor,
    teacher: torch.Tensor,
    parts: nn.Module,
    mask_ratio: Share = 0.65,
    weights: Weights = None,
) -> torch.Tensor:
    """Return the sum of (T - G(masked S))^2 over N: masked generative distillation (ECCV 2022).

    It is a sum, as published, so the weights are small: 2e-5 for RetinaNet with ``mask_ratio``
    0.65, 5e-7 for Mask R-CNN with 0.45. ``parts`` is G; ``mask_ratio``, in [0, 1), is lambda, the
    share of cells set to 0 in all channels.
    """
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio is {mask_ratio}; it has to be from 0 to below 1")
    kept = torch.rand_like(student[:, :1]) >= mask_ratio
    generated = parts(student * kept).float()
    if weights is None:
        return F.mse_loss(generated, teacher.float(), reduction="sum") / len(student)
    return (weights * F.mse_loss(generated, teacher.float(), reduction="none")).sum() / len(student)
