"""The moments of SSIM, the similarity they make, and its gradient, in torch.

N: images, C: channels, H, W: height and width of a level, M = N * C maps, H', W': size of the
similarity map, smaller than H, W for padding "valid".

With u = x + y and v = x - y, the similarity needs only the means m and variances s of u and v:

    S = (m_u^2 - m_v^2 + 2 C1) / (m_u^2 + m_v^2 + 2 C1) * (s_u - s_v + 2 C2) / (s_u + s_v + 2 C2)

because 4 m_x m_y = m_u^2 - m_v^2, and so on. That takes four blurred maps (u, v, u^2, v^2), not
five, and as m^2 and s are not negative, rounding cannot bring S out of [-1, 1].
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from msad_kd.losses.ssim.blur import blur_for, fitting_window

try:
    from msad_kd.losses.ssim import triton as ssim_triton
except ImportError:  # there is no Triton for this platform
    ssim_triton = None

# Cells of all maps that are computed at once. On a CPU, per thread: their intermediate results fit
# the cache. On CUDA: enough to keep the GPU busy, few enough to spare its memory.
CHUNK_CELLS = 2**17
CUDA_CHUNK_CELLS = 2**24


@dataclass(frozen=True)
class Window:
    """A Gaussian window, its padding, and SSIM's constants C1 and C2."""

    size: int
    sigma: float
    c1: float
    c2: float
    padding: str

    @classmethod
    def of(cls, x: torch.Tensor, window_size, sigma, data_range, k1, k2, padding) -> "Window":
        """Return the window for maps (..., H, W), smaller than ``window_size`` if they are."""
        size = fitting_window(window_size, *x.shape[-2:], padding)
        return cls(size, sigma, (k1 * data_range) ** 2, (k2 * data_range) ** 2, padding)

    def mean(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the mean, (..., 1, 1), to subtract from maps (..., H, W) before they are blurred.

        Far from 0, rounding would lose the variance. Zero padding forbids it: the mean is then 0.
        """
        if self.padding == "zero":
            return x.new_zeros(*x.shape[:-2], 1, 1, dtype=dtype)
        return x.mean(dim=(-2, -1), keepdim=True, dtype=dtype)


def compute_dtype(x: torch.Tensor, y: torch.Tensor) -> torch.dtype:
    """Return fp64 if one of the maps is fp64, else fp32."""
    return torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32


def _empty(kinds: int, like: torch.Tensor) -> torch.Tensor:
    """Return memory for (kinds, M, H, W) in the layout of maps (M, H, W)."""
    return like.new_empty_strided((kinds, *like.shape), (like.numel(), *like.stride()))


class Moments:
    """Blurred moments of maps x and y, (M, H, W), with their similarity and its gradient."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor, window: Window, blur):
        self.blur = blur
        mean_x, mean_y = (window.mean(z, compute_dtype(x, y)) for z in (x, y))
        x, y = blur.arrange(x, mean_x), blur.arrange(y, mean_y)
        uv = _empty(2, x)
        self.u, self.v = torch.add(x, y, out=uv[0]), torch.sub(x, y, out=uv[1])
        padded = blur.pad(uv)
        self.p, self.q = means = blur(padded)
        variances = blur(padded * padded).addcmul_(means, means, value=-1).clamp_(min=0)
        # S = luminance * structure = (a - b) / (a + b) * (A - B) / (A + B), with
        # a = m_u^2 + 2 C1, b = m_v^2, A = s_u + 2 C2 and B = s_v.
        self.mean_u, self.mean_v = self.p + (mean_x + mean_y), self.q + (mean_x - mean_y)
        self.a, self.b = (self.mean_u * self.mean_u).add_(2 * window.c1), self.mean_v * self.mean_v
        self.A, self.B = variances[0].add_(2 * window.c2), variances[1]
        self.d1, self.d2 = self.a + self.b, self.A + self.B
        self.luminance = (self.a - self.b).div_(self.d1)
        self.structure = (self.A - self.B).div_(self.d2)

    def gradients(self, weight: torch.Tensor | None, outs: list[torch.Tensor | None]) -> None:
        """Write the gradients of sum(weight * S) for x and y to ``outs``, (M, H, W) or None each.

        With the blur G, its adjoint G' and p the blur of u without its mean, d sum(S) / du =
        G'(dS/dm_u - 2 p dS/ds_u) + 2 u G'(dS/ds_u), and likewise for v. The sum of both is x's
        gradient, the difference y's; the factor 4 comes last. This overwrites the moments.
        """
        wanted = [(sign, out) for sign, out in zip((1, -1), outs) if out is not None]
        by_s = self.luminance.div_(self.d2).div_(self.d2)
        by_m = self.structure.div_(self.d1).div_(self.d1)
        if weight is not None:
            weight = self.blur.arrange(weight, by_s.new_zeros(len(by_s), 1, 1))
            by_s, by_m = by_s.mul_(weight), by_m.mul_(weight)
        stack = _empty(2 + len(wanted), self.p)
        by_su, by_sv = torch.mul(by_s, self.B, out=stack[0]), torch.mul(by_s, self.A, out=stack[1])
        by_mu = by_m.mul(self.b).mul_(self.mean_u).addcmul_(self.p, by_su, value=-1)
        by_mv = by_m.mul_(self.a).mul_(self.mean_v).neg_().addcmul_(self.q, by_sv)
        for (sign, _), by_m in zip(wanted, stack[2:]):
            torch.add(by_mu, by_mv, alpha=sign, out=by_m)
        by_u, by_v, *by_ms = self.blur.adjoint(stack)
        by_u, by_v = self.u.mul_(by_u), self.v.mul_(by_v)
        for (sign, out), by_m in zip(wanted, by_ms):
            torch.mul(torch.sub(by_u, by_v, alpha=sign).add_(by_m), 4, out=out)


def chunks(x: torch.Tensor, y: torch.Tensor, window: Window) -> Iterator[tuple[slice, Moments]]:
    """Yield slices of the maps (M, H, W) with their moments, a chunk that fits the cache each."""
    arguments = window.size, window.sigma, window.padding, compute_dtype(x, y), x.device
    blur = blur_for(*x.shape, *arguments)
    cells = CHUNK_CELLS * torch.get_num_threads() if x.device.type == "cpu" else CUDA_CHUNK_CELLS
    size = max(-(-(cells // x[0].numel()) // blur.maps_at_once), 1) * blur.maps_at_once
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        yield part, Moments(x[part], y[part], window, blur)


def _run_kernels(x, y, window, *args):
    """Return the result of the Triton kernels, or None where they cannot run."""
    global ssim_triton
    if ssim_triton is None or not ssim_triton.runs_on(x, window.size, compute_dtype(x, y)):
        return None
    try:
        return ssim_triton.similarity(x, y, window, *args)
    except Exception as error:
        # The interpreter of Triton is there to find faults.
        if isinstance(error, torch.OutOfMemoryError) or not x.is_cuda:
            raise
        # Triton compiles on the machine it runs on, which may lack a C compiler.
        logging.getLogger(__name__).warning("Triton failed; SSIM runs without it:", exc_info=True)
        ssim_triton = None


@torch.autocast("cpu", enabled=False)
@torch.autocast("cuda", enabled=False)
def similarity(x, y, window, *, weight=None, as_map=False, wanted=(False, False)):
    """Return SSIM and its gradients for two maps (N, C, H, W).

    The first result is the sum over the similarity map, or with ``as_map`` the map itself. The
    second are the gradients of sum(weight * map) for x and y, in the shape and dtype of their
    input, None where not ``wanted``; the ``weight`` is (N, C, H', W'), None for 1.
    """
    gradients = [z.new_empty(z.shape) if want else None for z, want in zip((x, y), wanted)]
    tensors, shape = (x, y, weight, *gradients), x.shape[:2]
    x, y, weight, *flat = (None if z is None else z.flatten(0, 1) for z in tensors)
    result = _run_kernels(x, y, window, weight, as_map, flat)
    if result is None:
        results = []
        for part, moments in chunks(x, y, window):
            product = moments.luminance * moments.structure
            results.append(product.contiguous() if as_map else product.sum())
            if any(wanted):
                weights, *outs = (None if z is None else z[part] for z in (weight, *flat))
                moments.gradients(weights, outs)
        result = torch.cat(results) if as_map else sum(results)
    return result.unflatten(0, shape) if as_map else result, gradients
