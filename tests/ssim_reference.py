"""What the tests of SSIM share: pairs of maps, and the formula as it is published."""

import torch
import torch.nn.functional as F

SIZES = [(1, 1), (1, 7), (3, 3), (5, 5), (7, 11), (4, 20), (8, 9), (17, 23)]
FRACTIONAL = (0.5, 1, 1.5)


def maps(*shape, dtype=torch.float64, seed=0):
    """Two maps in [0, 1] that are alike, the same at every call."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, dtype=torch.float64, generator=generator)
    y = (x + 0.3 * torch.rand(shape, dtype=torch.float64, generator=generator)) / 1.3
    return x.to(dtype), y.to(dtype)


def plain_mean(z, size=11, padding="reflect"):
    """The mean of (N, C, H, W) within the square Gaussian window, sigma 1.5."""
    x = torch.arange(size, dtype=torch.float64) - size // 2
    taps = torch.exp(-0.5 * (x / 1.5) ** 2)
    window = torch.outer(taps, taps).to(z)[None, None] / taps.sum() ** 2
    if padding != "valid" and size > 1:
        z = F.pad(z, [size // 2] * 4, mode="reflect" if padding == "reflect" else "constant")
    return F.conv2d(z.flatten(0, 1)[:, None], window).unflatten(0, z.shape[:2])[:, :, 0]


def plain(x, y, size, padding):
    """The formula as it is published, by a convolution with the square window; differentiable."""
    c1, c2 = 0.01**2, 0.03**2
    mx, my, xx, yy, xy = (plain_mean(z, size, padding) for z in (x, y, x * x, y * y, x * y))
    sx, sy, sxy = xx - mx**2, yy - my**2, xy - mx * my
    return (2 * mx * my + c1) * (2 * sxy + c2) / ((mx**2 + my**2 + c1) * (sx + sy + c2))
