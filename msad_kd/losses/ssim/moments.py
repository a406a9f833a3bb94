"""The moments of SSIM, the similarity they make and its gradient, for torch on any device.

N: images, C: channels, H, W: height and width of a level, M = N * C maps, H', W': size of the
similarity map, smaller than H, W when the border is "valid".

With u = x + y and v = x - y, the similarity of two windows needs the means m and variances s of u
and v alone:

    S = (m_u^2 - m_v^2 + 2 C1) / (m_u^2 + m_v^2 + 2 C1) * (s_u - s_v + 2 C2) / (s_u + s_v + 2 C2)

because 4 m_x m_y = m_u^2 - m_v^2, 2 (m_x^2 + m_y^2) = m_u^2 + m_v^2, and so on. That is four
blurred maps (u, v, u^2, v^2) where x and y take five, and since m^2 and s are not negative, no
rounding can bring S out of [-1, 1].
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from msad_kd.losses.ssim.blur import blur_for, fitting_window

try:
    from msad_kd.losses.ssim import triton as ssim_triton
except ImportError:  # no Triton for this platform: torch alone does it too
    ssim_triton = None

logger = logging.getLogger(__name__)

__all__ = ["Moments", "Window", "chunks", "compute_dtype", "similarity"]

# Cells of all maps that are worked on at once. On a CPU, per thread: the intermediate results of
# that many stay in the cache. On CUDA: enough to be busy, few enough to spare the memory.
CHUNK_CELLS = 2**17
CUDA_CHUNK_CELLS = 2**24


@dataclass(frozen=True)
class Window:
    """What makes two calls compute the same."""

    size: int
    sigma: float
    c1: float
    c2: float
    padding: str

    @classmethod
    def of(cls, x: torch.Tensor, window_size, sigma, data_range, k1, k2, padding) -> Window:
        """The window for maps (..., H, W); it shrinks where they are too small for its size."""
        size = fitting_window(window_size, *x.shape[-2:], padding)
        return cls(size, sigma, (k1 * data_range) ** 2, (k2 * data_range) ** 2, padding)

    def out_cells(self, x: torch.Tensor) -> int:
        """H' W' for maps (..., H, W)."""
        height, width = x.shape[-2:]
        shrinks = self.size - 1 if self.padding == "valid" else 0
        return (height - shrinks) * (width - shrinks)

    def blur(self, x: torch.Tensor, dtype: torch.dtype):
        """The blur for maps (M, H, W)."""
        return blur_for(*x.shape, self.size, self.sigma, self.padding, dtype, x.device)


def compute_dtype(x: torch.Tensor, y: torch.Tensor) -> torch.dtype:
    """What both are computed in: fp32, or fp64 where one of them is."""
    return torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32


class Moments:
    """Blurred moments of some maps, the similarity they make, and its gradient."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor, window: Window, blur):
        """
        Args:
            x, y: (M, H, W).
        """
        self.blur, dtype = blur, compute_dtype(x, y)
        mean_x = mean_y = None
        mean_u = mean_v = 0.0
        if window.padding != "zero":
            # The variance does not change, but its two terms become small: far from 0, their
            # difference would otherwise be lost in rounding. Zeros beyond the border forbid it.
            mean_x, mean_y = (z.mean(dim=(1, 2), keepdim=True, dtype=dtype) for z in (x, y))
            mean_u, mean_v = mean_x + mean_y, mean_x - mean_y
        x, y = blur.arrange(x, dtype, mean_x), blur.arrange(y, dtype, mean_y)
        uv = blur.empty(2, x)
        self.u, self.v = torch.add(x, y, out=uv[0]), torch.sub(x, y, out=uv[1])
        padded = blur.pad(uv)
        self.p, self.q = means = blur(padded)
        variances = blur(padded * padded).addcmul_(means, means, value=-1).clamp_(min=0)
        # Named as in S = luminance * structure = n1 / d1 * n2 / d2, with a = m_u^2 + 2 C1,
        # b = m_v^2, A = s_u + 2 C2 and B = s_v.
        self.mean_u, self.mean_v = self.p + mean_u, self.q + mean_v
        self.a, self.b = (self.mean_u * self.mean_u).add_(2 * window.c1), self.mean_v * self.mean_v
        self.A, self.B = variances[0].add_(2 * window.c2), variances[1]
        self.d1, self.d2 = self.a + self.b, self.A + self.B
        self.luminance = (self.a - self.b).div_(self.d1)
        self.structure = (self.A - self.B).div_(self.d2)

    def gradients(self, weight, wanted):
        """A quarter of the gradients of sum(weight * S) for x and y: (M, H, W) each, or None.

        Args:
            weight: (M, H', W') or None, which is 1 everywhere.
            wanted: whether x's and whether y's are.

        With G the blur and G' its adjoint, d sum(S) / du = G'(dS/dm_u - 2 p dS/ds_u)
        + 2 u G'(dS/ds_u), p being the blurred u without its mean; likewise v; and x's gradient is
        the sum, y's the difference of the two. All terms share the factor 4, which is left out.
        Overwrites the moments.
        """
        by_s = self.luminance.div_(self.d2).div_(self.d2)
        by_m = self.structure.div_(self.d1).div_(self.d1)
        if weight is not None:
            weight = self.blur.arrange(weight, by_s.dtype)
            by_s *= weight
            by_m *= weight
        x_wanted, y_wanted = wanted
        stack = self.blur.empty(2 + x_wanted + y_wanted, self.p)
        by_su, by_sv = torch.mul(by_s, self.B, out=stack[0]), torch.mul(by_s, self.A, out=stack[1])
        by_mu = by_m.mul(self.b).mul_(self.mean_u).addcmul_(self.p, by_su, value=-1)
        by_mv = by_m.mul_(self.a).mul_(self.mean_v).neg_().addcmul_(self.q, by_sv)
        if x_wanted:
            torch.add(by_mu, by_mv, out=stack[2])
        if y_wanted:
            torch.sub(by_mu, by_mv, out=stack[-1])
        stack = self.blur.adjoint(stack)
        by_u, by_v = self.u.mul_(stack[0]), self.v.mul_(stack[1])
        return (
            (by_u - by_v).add_(stack[2]) if x_wanted else None,
            (by_u + by_v).add_(stack[-1]) if y_wanted else None,
        )


def chunks(x: torch.Tensor, y: torch.Tensor, window: Window):
    """The moments of some maps at a time, with the slice of the (M, H, W) that they are."""
    maps, height, width = x.shape
    blur = window.blur(x, compute_dtype(x, y))
    cells = CHUNK_CELLS * torch.get_num_threads()
    size = (cells if x.device.type == "cpu" else CUDA_CHUNK_CELLS) // (height * width)
    size = max(-(-size // blur.maps_at_once), 1) * blur.maps_at_once
    for start in range(0, maps, size):
        part = slice(start, start + size)
        yield part, Moments(x[part], y[part], window, blur)


def _by_kernels(x, y, window, weight, as_map, gradients):
    """What the Triton kernels return, or None where they don't run."""
    global ssim_triton
    if ssim_triton is None or not ssim_triton.runs_on(x, window.size, compute_dtype(x, y)):
        return None
    try:
        return ssim_triton.similarity(
            x, y, window, weight=weight, as_map=as_map, gradients=gradients
        )
    except torch.OutOfMemoryError:
        raise
    except Exception:
        if not x.is_cuda:  # the interpreter, whose purpose is to find faults
            raise
        # It compiles on the machine it runs on, and there a C compiler can be missing.
        logger.warning("SSIM without its Triton kernels, which failed:", exc_info=True)
        ssim_triton = None
        return None


@torch.autocast("cpu", enabled=False)
@torch.autocast("cuda", enabled=False)
def similarity(x, y, window, *, weight=None, as_map=False, wanted=(False, False)):
    """SSIM of two maps (N, C, H, W) and its gradients.

    Args:
        weight: (N, C, H', W') or None; the gradients are those of sum(weight * map).
        as_map: return the map, not its sum.
        wanted: whether x's gradient and whether y's is.

    Returns:
        the sum or map, and the two gradients, (N, C, H, W) in the dtype of their input, or None.
    """
    gradients = [z.new_empty(z.shape) if want else None for z, want in zip((x, y), wanted)]
    shape = x.shape[:2]
    x, y, weight = (None if z is None else z.flatten(0, 1) for z in (x, y, weight))
    flat = [None if z is None else z.flatten(0, 1) for z in gradients]
    result = _by_kernels(x, y, window, weight, as_map, flat)
    if result is not None:
        return result.unflatten(0, shape) if as_map else result, gradients

    results = []
    for part, moments in chunks(x, y, window):
        product = moments.luminance * moments.structure
        results.append(product.contiguous() if as_map else product.sum())
        if any(wanted):
            pieces = moments.gradients(None if weight is None else weight[part], wanted)
            for whole, piece in zip(flat, pieces):
                if whole is not None:
                    torch.mul(piece, 4, out=whole[part])
    return torch.cat(results).unflatten(0, shape) if as_map else sum(results), gradients
