"""Gaussian blur of maps and its adjoint, as banded matrix products or as convolutions.

K: kinds of map (for example mean and square), M: maps of each kind (images times channels), H, W:
their height and width, H', W': size of the blurred maps, smaller than H, W for padding "valid".

Both blurs have the same methods: ``arrange`` brings maps into the memory layout that suits the
blur, ``pad`` pads them, a call blurs padded maps, and ``adjoint`` is the adjoint of both steps.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F

PADDINGS = ("reflect", "zero", "valid")

# Rows of a matrix multiplied at once: smaller tiles skip more zeros off the diagonal, larger ones
# suit the matrix product better. From 16 to 48 it hardly matters.
TILE = 32

# Up to this many cells of a blurred map, one product with a (H' W', H W) matrix beats two.
KRON_CELLS = 128

# From this many cells of a map, convolution beats the matrix products (measured with
# `tools/analysis/benchmark_ssim.py --blurs`; the crossing is between 13x21 and 25x42).
CONV_CELLS = 600


def fitting_window(window_size: int, height: int, width: int, padding: str) -> int:
    """Return the largest odd window k, up to ``window_size``, that a map of this size allows.

    k // 2 < min(H, W) for "reflect", which mirrors once, and "zero"; k <= min(H, W) for "valid".
    """
    smallest = min(height, width)
    largest = smallest - 1 + smallest % 2 if padding == "valid" else 2 * smallest - 1
    return min(window_size, largest)


@lru_cache(maxsize=1024)
@torch.inference_mode(False)  # a matrix made in an evaluation is used in training too
def blur_matrix(length, window, sigma, padding, dtype, device) -> torch.Tensor:
    """Return the (length', length) matrix that blurs along one axis by an odd, fitting window."""
    offsets = torch.arange(window, dtype=torch.float64) - window // 2
    weights = torch.exp(-(offsets**2) / (2 * sigma**2))
    first, last = (window // 2, length - window // 2) if padding == "valid" else (0, length)
    rows = torch.arange(last - first)[:, None].expand(-1, window)
    columns = rows + first + torch.arange(window) - window // 2
    weights = (weights / weights.sum()).expand(len(rows), -1)
    if padding == "reflect":
        columns = columns.abs()
        columns = torch.where(columns < length, columns, 2 * (length - 1) - columns)
    else:
        weights = weights * ((columns >= 0) & (columns < length))
        columns = columns.clamp(0, length - 1)
    matrix = torch.zeros(last - first, length, dtype=torch.float64)
    return matrix.index_put_((rows, columns), weights, accumulate=True).to(device, dtype)


class MatrixBlur:
    """Blur by a matrix product along each axis: for any dtype and device, faster on small maps.

    The padding is part of the matrix: the weight of a cell beyond the border is added to that of
    the cell it mirrors. So the adjoint is the product with the transpose.
    """

    maps_at_once = 1

    def __init__(self, height, width, window, sigma, padding, dtype, device):
        args = window, sigma, padding, torch.float64, torch.device("cpu")
        down, across = (blur_matrix(side, *args) for side in (height, width))
        self.in_shape, self.out_shape = (height, width), (len(down), len(across))
        if len(down) * len(across) <= KRON_CELLS:
            down, across = down[:0], torch.kron(down, across)
        self._down, self._across, self._down_adjoint, self._across_adjoint = (
            _tiles(matrix, dtype, device) for matrix in (down, across, down.T, across.T)
        )

    def arrange(self, x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        """Return maps (M, H, W) less a mean (M, 1, 1), in its dtype and the blur's layout."""
        return (x - mean).contiguous()

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """Return (K, M, H, W) as a call takes it; squaring may come before or after."""
        return x

    def __call__(self, padded: torch.Tensor) -> torch.Tensor:
        """Return the blurred maps, (K, M, H', W')."""
        x = padded.flatten(0, 1)
        x = _multiply(x, self._down) if self._down else x.flatten(1)
        x = _multiply(x.reshape(-1, x.shape[-1]), self._across)
        return x.view(*padded.shape[:2], *self.out_shape)

    def adjoint(self, x: torch.Tensor) -> torch.Tensor:
        """Return the adjoint, (K, M, H, W), for (K, M, H', W'), which may be overwritten."""
        kinds, maps, height, width = x.shape
        x = _multiply(x.reshape(-1, width if self._down else height * width), self._across_adjoint)
        if self._down:
            x = _multiply(x.view(kinds * maps, height, -1), self._down_adjoint)
        return x.view(kinds, maps, *self.in_shape)


def _tiles(matrix: torch.Tensor, dtype, device) -> list[tuple[slice, slice, torch.Tensor]]:
    """Return (rows, columns, tile) for tiles of rows, without columns that are 0."""
    tiles = []
    for start in range(0, len(matrix) if matrix.numel() else 0, TILE):
        rows = slice(start, min(start + TILE, len(matrix)))
        used = matrix[rows].any(dim=0).nonzero()
        columns = slice(int(used.min()), int(used.max()) + 1)
        tiles.append((rows, columns, matrix[rows, columns].contiguous().to(device, dtype)))
    return tiles


def _multiply(x: torch.Tensor, tiles: list) -> torch.Tensor:
    """Return the product of the matrix with (n, length), or with each of (n, length, width)."""
    result = x.new_empty(len(x), tiles[-1][0].stop, *x.shape[2:])
    for rows, columns, tile in tiles:
        if x.dim() == 2:
            torch.mm(x[:, columns], tile.T, out=result[:, rows])
        else:
            torch.bmm(tile.expand(len(x), -1, -1), x[:, columns], out=result[:, rows])
    return result


class ConvBlur:
    """Blur by two depthwise convolutions, in fp32 on a CPU, with the methods of ``MatrixBlur``.

    The maps are innermost in memory (channels last), so that one vector instruction works on 16
    maps. Other layouts are several times slower, channels folded into the batch 10 to 100 times.
    """

    maps_at_once = 16  # fp32 numbers in a vector of 512 bits

    def __init__(self, window, sigma, padding):
        self._taps = blur_matrix(window, window, sigma, "valid", torch.float32, torch.device("cpu"))
        self._margin = window // 2
        self._mirrors = padding == "reflect"
        self._zeros = self._margin if padding == "zero" else 0

    def arrange(self, x, mean):
        """Return maps (M, H, W) less a mean (M, 1, 1), as a view of (H, W, M)."""
        maps, height, width = x.shape
        cells = mean.new_empty(height * width, maps)
        torch.sub(x.reshape(maps, -1).T, mean.view(maps), out=cells)
        return cells.view(height, width, maps).permute(2, 0, 1)

    def pad(self, x):
        """Return (K, M, H, W) with mirrored borders; the convolutions pad zeros themselves."""
        return F.pad(x, [self._margin] * 4, mode="reflect") if self._mirrors else x

    def __call__(self, padded):
        """Return the blurred maps, (K, M, H', W')."""
        down, across = self._filters(padded.shape[1])
        x = F.conv2d(padded, down, padding=(self._zeros, 0), groups=len(down))
        return F.conv2d(x, across, padding=(0, self._zeros), groups=len(down))

    def adjoint(self, x):
        """Return the adjoint, (K, M, H, W), for (K, M, H', W')."""
        # Across first, which keeps the intermediate maps as small as possible.
        down, across = self._filters(x.shape[1])
        zeros, m = 2 * self._margin - self._zeros, self._margin
        x = F.conv2d(x, across, padding=(0, zeros), groups=len(down))
        x = F.conv2d(x, down, padding=(zeros, 0), groups=len(down))
        if self._mirrors and m:
            # Cells beyond the border are added to the cells that they mirror.
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
def blur_for(maps, height, width, window, sigma, padding, dtype, device) -> MatrixBlur | ConvBlur:
    """Return the faster blur for so many maps of this size."""
    runs = device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available()
    if runs and maps >= ConvBlur.maps_at_once and height * width >= CONV_CELLS:
        return ConvBlur(window, sigma, padding)
    return MatrixBlur(height, width, window, sigma, padding, dtype, device)
