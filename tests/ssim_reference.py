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


def taps(size, sigma=1.5):
    x = torch.arange(size, dtype=torch.float64) - size // 2
    weights = torch.exp(-0.5 * (x / sigma) ** 2)
    return weights / weights.sum()


def plain(x, y, size, padding):
    """The formula as it is published, by a convolution with the square window; differentiable."""
    c1, c2 = 0.01**2, 0.03**2
    window = torch.outer(taps(size), taps(size)).to(x)[None, None]
    pad = [size // 2] * 4

    def mean(z):
        n, c, h, w = z.shape
        if padding == "reflect" and size > 1:
            z = F.pad(z, pad, mode="reflect")
        elif padding == "zero":
            z = F.pad(z, pad)
        return F.conv2d(z.flatten(0, 1)[:, None], window).unflatten(0, (n, c))[:, :, 0]

    mx, my = mean(x), mean(y)
    sx, sy, sxy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    return (2 * mx * my + c1) * (2 * sxy + c2) / ((mx**2 + my**2 + c1) * (sx + sy + c2))


def plain_mean(z):
    """The mean of (2, 3, H, W) within the square window of 11, reflected at the border."""
    z = F.pad(z, [5] * 4, mode="reflect").flatten(0, 1)[:, None]
    window = torch.outer(taps(11), taps(11))[None, None]
    return F.conv2d(z, window).view(2, 3, z.shape[2] - 10, -1)
