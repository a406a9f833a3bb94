"""Structural similarity (SSIM) between feature maps: the functions to call.

N: images, C: channels, H, W: height and width of a level, H', W': size of the similarity map, which
is smaller than H, W for the padding "valid". ``moments`` (torch) and ``triton`` (CUDA) compute it.
"""

import torch

from msad_kd.losses.ssim.blur import PADDINGS, blur_matrix
from msad_kd.losses.ssim.moments import Window, chunks, compute_dtype, similarity

# The least variance, as a share of the data range squared: a root has no gradient at 0.
VARIANCE_FLOOR = 1e-10
# Over which cells ``rescale`` takes minimum and maximum.
SCOPES = ("channel", "image", "none")
# The least component under a fractional power, which a negative number does not have.
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
    """Return the structural similarity l^a c^b s^g of two maps (arXiv 2211.13133, sec. 3).

    With means m, variances s and covariance s_xy under a Gaussian window, C1 = (k1 L)^2,
    C2 = (k2 L)^2 and C3 = C2 / 2, L being the data range:

        luminance l = (2 m_x m_y + C1) / (m_x^2 + m_y^2 + C1)
        contrast  c = (2 sqrt(s_x s_y) + C2) / (s_x + s_y + C2)
        structure s = (s_xy + C3) / (sqrt(s_x s_y) + C3)

    It is in [-1, 1], 1 for equal maps, and symmetric; in fp32, also under autocast, or fp64 if an
    input is. At exponents (1, 1, 1) the gradient is written by hand: "mean" keeps one map for each
    input that needs a gradient, in that input's dtype, "none" keeps the two inputs, and a backward
    refuses ``create_graph=True``.

    Args:
        x: (N, C, H, W), of any floating dtype; values are expected in a range of length L.
        y: the same.
        window_size: side of the window in cells, odd; small maps have a ``fitting_window``.
        sigma: standard deviation of the window in cells.
        data_range: L, the distance from the least to the greatest possible value.
        k1: keeps l away from 0 / 0.
        k2: keeps c and s away from 0 / 0.
        padding: "reflect" (without repeating the border), "zero", or "valid" (only inside windows).
        exponents: of l, c and s, none negative; 0 leaves a component out. Under a fractional
            exponent a component below 1e-6 counts as 1e-6.
        reduction: "mean" for a scalar, or "none" for the map, (N, C, H', W').

    Raises:
        ValueError: if the shapes differ or have no cell, or if an argument is out of range.
    """
    _check(x, y, window_size, sigma, data_range, padding, reduction, exponents)
    window = Window.of(x, window_size, sigma, data_range, k1, k2, padding)
    if tuple(exponents) == (1, 1, 1):
        return (_Mean if reduction == "mean" else _Map).apply(x, y, window)
    with torch.autocast(x.device.type, enabled=False):
        result = _by_components(x, y, window, exponents, VARIANCE_FLOOR * data_range**2)
    return result.mean() if reduction == "mean" else result


def ssim_loss(x: torch.Tensor, y: torch.Tensor, **kwargs) -> torch.Tensor:
    """Return (1 - SSIM) / 2, from 0 (equal) to 1; the arguments are those of ``ssim``."""
    return (1 - ssim(x, y, **kwargs)) / 2


def _check(x, y, window_size, sigma, data_range, padding, reduction="mean", exponents=(1, 1, 1)):
    shapes = f"not {tuple(x.shape)} and {tuple(y.shape)}"
    odd, exponents_fit = window_size % 2 == 1, len(exponents) == 3 and min(exponents) >= 0
    for message, holds in {
        f"ssim needs maps of shape (N, C, H, W), {shapes}": x.dim() == y.dim() == 4,
        f"ssim needs two maps of one shape, {shapes}": x.shape == y.shape,
        f"ssim needs maps that have a cell, {shapes}": x.numel() > 0,
        f"window_size is {window_size}; it must be odd and above 0": odd and window_size > 0,
        f"sigma is {sigma}; it must be above 0": sigma > 0,
        f"data_range is {data_range}; it must be above 0": data_range > 0,
        f"padding is '{padding}'; it must be one of {', '.join(PADDINGS)}": padding in PADDINGS,
        f"reduction is '{reduction}'; it must be one of mean, none": reduction in ("mean", "none"),
        f"exponents are {exponents}; give three, of l, c and s, none negative": exponents_fit,
    }.items():
        if not holds:
            raise ValueError(message)


def _refuse_second_derivative() -> None:
    # A backward has gradients enabled only with create_graph=True. With torch's once_differentiable
    # instead, a loss with a gradient penalty would silently be trained without it.
    if torch.is_grad_enabled():
        raise RuntimeError("ssim cannot be differentiated a second time; drop create_graph=True")


class _Mean(torch.autograd.Function):
    """Mean similarity; the forward computes the gradients too and keeps nothing else."""

    @staticmethod
    def forward(ctx, x, y, window):
        total, gradients = similarity(x, y, window, wanted=ctx.needs_input_grad[:2])
        ctx.save_for_backward(*gradients)
        lost = window.size - 1 if window.padding == "valid" else 0
        ctx.count = x.shape[:2].numel() * (x.shape[2] - lost) * (x.shape[3] - lost)
        return total / ctx.count

    @staticmethod
    def backward(ctx, grad):
        _refuse_second_derivative()
        # The division by the count comes late: in fp16 the small quotients would lose precision.
        grad = grad / ctx.count
        return *(None if x is None else (x * grad).to(x.dtype) for x in ctx.saved_tensors), None


class _Map(torch.autograd.Function):
    """Similarity map; it keeps only the inputs, and the backward computes the moments again."""

    @staticmethod
    def forward(ctx, x, y, window):
        ctx.save_for_backward(x, y)
        ctx.window = window
        return similarity(x, y, window, as_map=True)[0]

    @staticmethod
    def backward(ctx, grad):
        _refuse_second_derivative()
        options = {"weight": grad, "wanted": ctx.needs_input_grad[:2]}
        return *similarity(*ctx.saved_tensors, ctx.window, **options)[1], None


def _by_components(x, y, window, exponents, variance_floor):
    """Return the similarity map for any exponents, (N, C, H', W'), as a graph of autograd."""
    dtype = compute_dtype(x, y)
    args = window.size, window.sigma, window.padding, dtype, x.device
    down, across = (blur_matrix(side, *args) for side in x.shape[-2:])

    def blur(z):
        return down @ z @ across.T

    mean_x, mean_y = (window.mean(z.detach(), dtype) for z in (x, y))
    x, y = x - mean_x, y - mean_y
    p, q = blur(x), blur(y)
    variances = (blur(z * z) - mean * mean for z, mean in ((x, p), (y, q)))
    deviation_x, deviation_y = (variance.clamp(min=variance_floor).sqrt() for variance in variances)
    covariance, both = blur(x * y) - p * q, deviation_x * deviation_y
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
    """Return maps rescaled to [0, 1] by minimum and maximum: psi of arXiv 2211.13133, sec. 3.

    The paper does not say over which axes; ``scope`` is "channel" (per image and channel), "image",
    or "none", which returns x. fp16 and bf16 become fp32. ``eps``, added to the range, makes
    constant maps 0. The gradient also flows through minimum and maximum.
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
    x, y, *, threshold=0.1, window_size=11, sigma=1.5, data_range=1.0, k2=0.03, padding="reflect"
) -> torch.Tensor:
    """Return the share of windows in which SSIM sees no structure, in [0, 1], in fp32.

    There s_x + s_y < threshold * C2: C2 dominates the variances, so contrast and structure are near
    1 whatever the maps hold, and their gradient is small. The other arguments are ``ssim``'s.
    """
    _check(x, y, window_size, sigma, data_range, padding)
    window = Window.of(x, window_size, sigma, data_range, 0.0, k2, padding)
    with torch.autocast(x.device.type, enabled=False):
        parts = chunks(x.flatten(0, 1), y.flatten(0, 1), window)
        # s_u + s_v + 2 C2 = 2 (s_x + s_y + C2)
        blind = torch.cat([moments.d2 < 2 * (1 + threshold) * window.c2 for _, moments in parts])
    return blind.sum() / blind.numel()
