"""Structural similarity between feature maps: structural distillation, arXiv 2211.13133.

N: images, C: channels, H, W: height and width of a level, M = N * C maps, H', W': size of the
similarity map, smaller than H, W when the border is "valid".

This is the interface; the computation is in ``ssim_moments`` (torch) and ``ssim_triton`` (CUDA).
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from msad_kd.losses.ssim.blur import PADDINGS, blur_matrix
from msad_kd.losses.ssim.moments import Window, chunks, compute_dtype, similarity

__all__ = ["blind_share", "rescale", "ssim", "ssim_loss"]

REDUCTIONS = ("mean", "none")
SCOPES = ("channel", "image", "none")

# Variances under this share of the data range squared count as this: the root has no gradient at 0.
VARIANCE_FLOOR = 1e-10
# A negative component has no fractional power; it counts as this, whose gradient is finite.
COMPONENT_FLOOR = 1e-6


def ssim(
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    window_size: int = 11,
    sigma: float = 1.5,
    data_range: float = 1.0,
    k1: float = 0.01,
    k2: float = 0.03,
    padding: str = "reflect",
    exponents: tuple[float, float, float] = (1, 1, 1),
    reduction: str = "mean",
) -> torch.Tensor:
    """Structural similarity l^a c^b s^g of two maps, channel by channel (arXiv 2211.13133, sec. 3).

    With means m, variances s and covariance s_xy under a Gaussian window, C1 = (k1 L)^2,
    C2 = (k2 L)^2 and C3 = C2 / 2, L being the data range:

        luminance l = (2 m_x m_y + C1) / (m_x^2 + m_y^2 + C1)
        contrast  c = (2 sqrt(s_x s_y) + C2) / (s_x + s_y + C2)
        structure s = (s_xy + C3) / (sqrt(s_x s_y) + C3)

    1 where the maps are equal, -1 at least, symmetric in x and y. Computed in fp32, or fp64 where
    an input is, whatever autocast says. The gradient is written by hand at unit exponents, where
    "mean" keeps one map per input that wants a gradient until the backward, in the dtype of that
    input, and "none" the two inputs; it can't be differentiated a second time.

    Args:
        x, y: (N, C, H, W), of any floating dtypes. Values are expected in a range of L.
        window_size: side of the window in cells, odd. On a map that is too small for it, the
            largest odd k with k // 2 < min(H, W), for "valid" k <= min(H, W).
        sigma: standard deviation of the window in cells.
        data_range: L, the distance from the least to the greatest value that x and y can have.
        k1, k2: the constants that keep both quotients away from 0 / 0.
        padding: "reflect" (mirror without repeating the border), "zero" or "valid" (windows inside
            the map alone: smaller result). They differ in value.
        exponents: of l, c and s, not negative; 0 leaves a component out. Under a
            fractional exponent a component below 1e-6 counts as 1e-6.
        reduction: "mean" over everything, or "none".

    Returns:
        a scalar for "mean", for "none" (N, C, H, W), with "valid" (N, C, H', W'); fp32, or fp64
        where an input is.

    Raises:
        ValueError: unequal or not four-dimensional shapes, maps without a cell, an even window, a
            negative exponent, an unknown padding or reduction.
    """
    _check(x, y, window_size, padding, reduction, exponents)
    window = Window.of(x, window_size, sigma, data_range, k1, k2, padding)
    if tuple(exponents) == (1, 1, 1):
        return (_Mean if reduction == "mean" else _Map).apply(x, y, window)
    with torch.autocast(x.device.type, enabled=False):
        result = _by_components(x, y, window, exponents, VARIANCE_FLOOR * data_range**2)
    return result.mean() if reduction == "mean" else result


def ssim_loss(x: torch.Tensor, y: torch.Tensor, **kwargs) -> torch.Tensor:
    """(1 - SSIM) / 2, between 0 (equal) and 1; see ``ssim`` for everything else."""
    return (1 - ssim(x, y, **kwargs)) / 2


def _check(x, y, window_size, padding, reduction, exponents):
    if x.dim() != 4 or y.dim() != 4:
        raise ValueError(
            f"ssim needs maps of shape (N, C, H, W), not {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if x.shape != y.shape:
        raise ValueError(
            f"ssim needs two maps of one shape, not {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if x.numel() == 0:
        raise ValueError(f"ssim needs maps that have a cell, not {tuple(x.shape)}")
    if window_size < 1 or window_size % 2 == 0:
        raise ValueError(f"window_size is {window_size}; it must be odd, for a cell in its middle")
    if padding not in PADDINGS:
        raise ValueError(f"padding is '{padding}'; it must be one of {', '.join(PADDINGS)}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is '{reduction}'; it must be one of {', '.join(REDUCTIONS)}")
    if len(exponents) != 3 or min(exponents) < 0:
        raise ValueError(f"exponents are {exponents}; give three, for l, c and s, none negative")


class _Mean(torch.autograd.Function):
    """Mean similarity; the gradient is ready when the forward is, and is all that is kept."""

    @staticmethod
    def forward(ctx, x, y, window):
        total, gradients = similarity(x, y, window, wanted=ctx.needs_input_grad[:2])
        ctx.save_for_backward(*gradients)
        ctx.count = x.shape[:2].numel() * window.out_cells(x)
        return total / ctx.count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        # Divided by their number only here: so small, they would suffer from being kept in fp16.
        grad = grad / ctx.count
        return *(None if x is None else (x * grad).to(x.dtype) for x in ctx.saved_tensors), None


class _Map(torch.autograd.Function):
    """Similarity map; the backward computes the moments again and keeps only the inputs."""

    @staticmethod
    def forward(ctx, x, y, window):
        ctx.save_for_backward(x, y)
        ctx.window = window
        return similarity(x, y, window, as_map=True)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        wanted = ctx.needs_input_grad[:2]
        _, gradients = similarity(*ctx.saved_tensors, ctx.window, weight=grad, wanted=wanted)
        return *gradients, None


def _by_components(x, y, window, exponents, variance_floor):
    """Similarity map at any exponents, (N, C, H', W'), differentiated by autograd."""
    dtype = compute_dtype(x, y)
    height, width = x.shape[-2:]
    args = window.size, window.sigma, window.padding, dtype, x.device
    down, across = blur_matrix(height, *args), blur_matrix(width, *args).T
    x, y, mean_x, mean_y = x.to(dtype), y.to(dtype), 0.0, 0.0
    if window.padding != "zero":
        mean_x = x.detach().mean(dim=(2, 3), keepdim=True)
        mean_y = y.detach().mean(dim=(2, 3), keepdim=True)
        x, y = x - mean_x, y - mean_y
    p, q = down @ x @ across, down @ y @ across
    deviation_x = (down @ (x * x) @ across - p * p).clamp(min=variance_floor).sqrt()
    deviation_y = (down @ (y * y) @ across - q * q).clamp(min=variance_floor).sqrt()
    covariance = down @ (x * y) @ across - p * q
    both = deviation_x * deviation_y
    mean_x, mean_y = p + mean_x, q + mean_y
    components = (
        (2 * mean_x * mean_y + window.c1) / (mean_x**2 + mean_y**2 + window.c1),
        (2 * both + window.c2) / (deviation_x**2 + deviation_y**2 + window.c2),
        (covariance + window.c2 / 2) / (both + window.c2 / 2),
    )
    result = torch.ones_like(p)
    for component, exponent in zip(components, exponents):
        if exponent != int(exponent):
            component = component.clamp(min=COMPONENT_FLOOR)
        if exponent:
            result = result * component**exponent
    return result


def rescale(x: torch.Tensor, scope: str = "channel", eps: float = 1e-6) -> torch.Tensor:
    """Bring maps to [0, 1] by their least and greatest value: psi of arXiv 2211.13133, sec. 3.

    The paper does not say over what the two are taken. The gradient flows through them too.

    Args:
        x: (N, C, H, W); fp16 and bf16 become fp32.
        scope: "channel", of each image and channel; "image", of each image; "none" leaves x as it
            is.
        eps: added to the range, for maps that are constant: they become 0.

    Returns:
        (N, C, H, W).

    Raises:
        ValueError: an unknown scope.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope is '{scope}'; it must be one of {', '.join(SCOPES)}")
    if scope == "none":
        return x
    x = x if x.dtype == torch.float64 else x.float()
    dim = (2, 3) if scope == "channel" else (1, 2, 3)
    low, high = x.amin(dim=dim, keepdim=True), x.amax(dim=dim, keepdim=True)
    return (x - low) / (high - low + eps)


@torch.no_grad()
def blind_share(
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    threshold: float = 0.1,
    window_size: int = 11,
    sigma: float = 1.5,
    data_range: float = 1.0,
    k2: float = 0.03,
    padding: str = "reflect",
) -> torch.Tensor:
    """Share of windows where SSIM sees next to no structure: s_x + s_y < threshold * C2.

    There, C2 outweighs the variances, contrast and structure are near 1 whatever the maps hold,
    and their gradient is small. Costs as much as a forward without gradient.

    Args:
        x, y, window_size, sigma, data_range, k2, padding: as given to ``ssim``.
        threshold: share of C2 = (k2 * data_range)^2.

    Returns:
        fp32 scalar in [0, 1], on the device of x.

    Raises:
        ValueError: as ``ssim``.
    """
    _check(x, y, window_size, padding, "mean", (1, 1, 1))
    window = Window.of(x, window_size, sigma, data_range, 0.0, k2, padding)
    blind, count = torch.zeros((), device=x.device), 0
    with torch.autocast(x.device.type, enabled=False):
        for _, moments in chunks(x.flatten(0, 1), y.flatten(0, 1), window):
            # s_u + s_v + 2 C2 = 2 (s_x + s_y + C2)
            blind += (moments.d2 < 2 * (1 + threshold) * window.c2).sum()
            count += moments.d2.numel()
    return blind / count
