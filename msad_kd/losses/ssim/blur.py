"""Gaussian blur of maps and its adjoint, in two ways: as banded matrix products, as convolution.

K: kinds of map (say, mean and square), M: maps of each kind (images times channels), H, W: their
height and width, H', W': those of the blurred map, smaller than H, W when the border is "valid".

Both ways are used alike: ``arrange`` brings maps into the layout that suits the blur, ``pad`` does
what the border needs first, a call blurs, ``adjoint`` is the adjoint of the last two together.
None is differentiable by autograd.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F

__all__ = ["PADDINGS", "ConvBlur", "MatrixBlur", "blur_for", "blur_matrix", "fitting_window"]

PADDINGS = ("reflect", "zero", "valid")

# Rows of a matrix that are multiplied at once. Smaller tiles skip more of the zeros off the
# diagonal, larger ones suit the matrix product better; between 16 and 48 it hardly matters.
TILE = 32

# Up to so many cells of a blurred map, one product with a (H' W', H W) matrix beats two per map.
KRON_CELLS = 128

# From so many cells a map, convolution is faster than the matrix products. Measured with
# `tools/analysis/benchmark_ssim.py --blurs`: at 13x21 the matrices win with two of the three
# paddings, at 25x42 and beyond convolution does, with all.
CONV_CELLS = 600


def fitting_window(window_size: int, height: int, width: int, padding: str) -> int:
    """The largest odd window, ``window_size`` at most, that a map of this size allows.

    "reflect" mirrors each side once, so it needs k // 2 < min(H, W); "zero" could do without, but
    has the same window, that the two be comparable. "valid" has to fit inside: k <= min(H, W).
    """
    smallest = min(height, width)
    largest = smallest - 1 + smallest % 2 if padding == "valid" else 2 * smallest - 1
    return min(window_size, largest)


def _matrix(length: int, window: int, sigma: float, padding: str) -> torch.Tensor:
    offsets = torch.arange(window, dtype=torch.float64) - window // 2
    weights = torch.exp(-(offsets**2) / (2 * sigma**2))
    weights /= weights.sum()
    first, last = (window // 2, length - window // 2) if padding == "valid" else (0, length)
    rows = torch.arange(last - first)[:, None].expand(-1, window)
    columns = rows + first + torch.arange(window) - window // 2
    weights = weights.expand(len(rows), -1)
    if padding == "reflect":
        columns = columns.abs()
        columns = torch.where(columns < length, columns, 2 * (length - 1) - columns)
    else:
        weights = weights * ((columns >= 0) & (columns < length))
        columns = columns.clamp(0, length - 1)
    matrix = torch.zeros(last - first, length, dtype=torch.float64)
    return matrix.index_put_((rows, columns), weights, accumulate=True)


@lru_cache(maxsize=1024)
@torch.inference_mode(False)  # made once, perhaps in an evaluation, and used in training too
def blur_matrix(
    length: int, window: int, sigma: float, padding: str, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """(length', length) matrix that blurs along one axis; the weights of the window sum to 1.

    Args:
        window: odd and small enough for the length, see ``fitting_window``.
        padding: one of ``PADDINGS``.
    """
    return _matrix(length, window, sigma, padding).to(device, dtype)


def _tiles(matrix: torch.Tensor, dtype, device) -> list[tuple[slice, slice, torch.Tensor]]:
    """Tiles of rows with only those columns that are not zero: (rows, columns, tile)."""
    tiles = []
    for start in range(0, len(matrix), TILE):
        rows = slice(start, min(start + TILE, len(matrix)))
        used = matrix[rows].any(dim=0).nonzero()
        columns = slice(int(used.min()), int(used.max()) + 1)
        tiles.append((rows, columns, matrix[rows, columns].contiguous().to(device, dtype)))
    return tiles


class MatrixBlur:
    """Blur by products with banded matrices: any dtype and device, and the faster on small maps.

    Blurring the rows of a map is a product with a W' x W matrix that has the window on its
    diagonal. The border lives in that matrix too: a cell that reflection would read from beyond
    the border has its weight added where its mirror image is. The adjoint is then the product with
    the transpose, whatever the padding. Large matrices are multiplied by tiles of rows, without
    the zeros far off the diagonal; on tiny maps one product does both axes.
    """

    maps_at_once = 1

    def __init__(self, height, width, window, sigma, padding, dtype, device):
        down = _matrix(height, window, sigma, padding)
        across = _matrix(width, window, sigma, padding)
        self.in_shape, self.out_shape = (height, width), (len(down), len(across))
        axes = [down, across]
        if len(down) * len(across) <= KRON_CELLS:
            axes = [None, torch.kron(down, across)]
        self._down, self._across = (m if m is None else _tiles(m, dtype, device) for m in axes)
        axes = [m if m is None else m.T for m in axes]
        self._down_adjoint, self._across_adjoint = (
            m if m is None else _tiles(m, dtype, device) for m in axes
        )

    def arrange(self, x: torch.Tensor, dtype: torch.dtype, mean=None) -> torch.Tensor:
        """(M, H, W) less (M, 1, 1), if given, in ``dtype`` and the layout that suits the blur."""
        return x.to(dtype) if mean is None else x - mean

    def empty(self, kinds: int, like: torch.Tensor) -> torch.Tensor:
        """Memory for (K, M, H, W) in that layout, (M, H, W) being that of ``like``."""
        return like.new_empty(kinds, *like.shape)

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """(K, M, H, W) to what a call takes. The square may be taken before or after."""
        return x

    def __call__(self, padded: torch.Tensor) -> torch.Tensor:
        """Padded maps to blurred ones, (K, M, H', W')."""
        x = padded.flatten(0, 1)
        x = x.flatten(1) if self._down is None else _times_columns(x, self._down)
        return _times_rows(x, self._across).view(*padded.shape[:2], *self.out_shape)

    def adjoint(self, x: torch.Tensor) -> torch.Tensor:
        """Adjoint of padding and blurring: (K, M, H', W') to (K, M, H, W). May overwrite x."""
        kinds, maps, height, width = x.shape
        if self._down is None:
            x = _times_rows(x.flatten(0, 1).flatten(1), self._across_adjoint)
        else:
            x = _times_rows(x.flatten(0, 1), self._across_adjoint)
            x = _times_columns(x.view(kinds * maps, height, -1), self._down_adjoint)
        return x.view(kinds, maps, *self.in_shape)


def _times_rows(x, tiles):
    """Each row of (..., length) by the matrix: (rows, length')."""
    x = x.reshape(-1, x.shape[-1])
    result = x.new_empty(len(x), tiles[-1][0].stop)
    for rows, columns, tile in tiles:
        torch.mm(x[:, columns], tile.T, out=result[:, rows])
    return result


def _times_columns(x, tiles):
    """Each column of (maps, length, width) by the matrix: (maps, length', width)."""
    result = x.new_empty(len(x), tiles[-1][0].stop, x.shape[2])
    for rows, columns, tile in tiles:
        torch.bmm(tile.expand(len(x), -1, -1), x[:, columns], out=result[:, rows])
    return result


class ConvBlur:
    """Blur by two depthwise convolutions, in fp32 on a CPU; the same interface.

    The maps are innermost in memory (channels last), so that one vector instruction works on a
    cell of 16 maps; with one map after the other a convolution is several times slower, and with
    the channels folded into the batch 10 to 100 times.
    """

    maps_at_once = 16  # fp32 numbers in a vector of 512 bits

    def __init__(self, height, width, window, sigma, padding):
        self._taps = blur_matrix(window, window, sigma, "valid", torch.float32, torch.device("cpu"))
        self._margin = window // 2
        self._mirrors = padding == "reflect"
        self._zeros = self._margin if padding == "zero" else 0

    def arrange(self, x, dtype, mean=None):
        maps, height, width = x.shape
        cells = x.new_empty(height * width, maps, dtype=dtype)
        if mean is None:
            cells.copy_(x.reshape(maps, -1).T)
        else:
            torch.sub(x.reshape(maps, -1).T, mean.view(maps), out=cells)
        return cells.view(height, width, maps).permute(2, 0, 1)

    def empty(self, kinds, like):
        maps, height, width = like.shape
        return like.new_empty(kinds, height, width, maps).permute(0, 3, 1, 2)

    def pad(self, x):
        return F.pad(x, [self._margin] * 4, mode="reflect") if self._mirrors else x

    def __call__(self, padded):
        down, across = self._filters(padded.shape[1])
        x = F.conv2d(padded, down, padding=(self._zeros, 0), groups=len(down))
        return F.conv2d(x, across, padding=(0, self._zeros), groups=len(down))

    def adjoint(self, x):
        # In the other order, so that what lies between is as small as can be.
        down, across = self._filters(x.shape[1])
        zeros = 2 * self._margin - self._zeros
        x = F.conv2d(x, across, padding=(0, zeros), groups=len(down))
        x = F.conv2d(x, down, padding=(zeros, 0), groups=len(down))
        if self._mirrors and self._margin:
            # What fell beyond the border goes back to the cell it is the mirror image of.
            m = self._margin
            for y in (x, x.transpose(2, 3)):
                y[:, :, m + 1 : 2 * m + 1] += y[:, :, :m].flip(2)
                y[:, :, -2 * m - 1 : -m - 1] += y[:, :, -m:].flip(2)
            x = x[:, :, m:-m, m:-m]
        return x

    def _filters(self, maps):
        taps = self._taps.expand(maps, 1, -1)
        return taps[..., None], taps[:, :, None]


@lru_cache(maxsize=512)
@torch.inference_mode(False)
def blur_for(
    maps: int,
    height: int,
    width: int,
    window: int,
    sigma: float,
    padding: str,
    dtype: torch.dtype,
    device: torch.device,
) -> MatrixBlur | ConvBlur:
    """The faster blur of so many maps of this size."""
    args = height, width, window, sigma, padding
    suits = device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available()
    if suits and maps >= ConvBlur.maps_at_once and height * width >= CONV_CELLS:
        return ConvBlur(*args)
    return MatrixBlur(*args, dtype, device)
