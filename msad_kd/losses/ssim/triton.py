"""SSIM's moments, map and gradient in two fused Triton kernels, for CUDA.

M: maps (images times channels), H, W: their height and width, H', W': those of the similarity map.

Both kernels work on tiles. A tile is blurred by two matrix products with the part of the banded
matrices (``blur.blur_matrix``) that it needs, so the border, whatever its padding, and the
adjoint, which takes the transpose, are in the matrices and not in the kernels. In between, the
first kernel stores three maps for the second (four where both inputs want a gradient). The names
and formulas are those of ``msad_kd.losses.ssim.moments``, where they are explained.

With the environment variable TRITON_INTERPRET=1, set before this is imported, the kernels run on a
CPU, for tests.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

from msad_kd.losses.ssim.blur import blur_matrix

__all__ = ["runs_on", "similarity"]

# Side of the square that a program reads. It writes one that is smaller by the window less one.
PATCH = tl.constexpr(32)
LARGEST_WINDOW = 17


def runs_on(x: torch.Tensor, window_size: int, dtype: torch.dtype) -> bool:
    """Whether the kernels take maps on this device, this window and arithmetic in this dtype."""
    device = x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return device and window_size <= LARGEST_WINDOW and dtype == torch.float32


@triton.jit
def _tile(tiles_across, tile, reach):
    """Map, and per axis the cells this program writes and those it reads for them."""
    pid = tl.program_id(1)
    rows = pid // tiles_across * tile + tl.arange(0, PATCH)
    columns = pid % tiles_across * tile + tl.arange(0, PATCH)
    return tl.program_id(0).to(tl.int64), rows, columns, rows - reach, columns - reach


@triton.jit
def _matrix(pointer, outs, ins, out_size, in_size, stride_out, stride_in, tile):
    """The part of a blur matrix that makes these outs from these ins, (PATCH, PATCH)."""
    first = tl.min(outs, axis=0)
    inside = (outs < out_size) & (outs < first + tile)
    inside = inside[:, None] & ((ins >= 0) & (ins < in_size))[None, :]
    offsets = outs[:, None] * stride_out + ins[None, :] * stride_in
    return tl.load(pointer + offsets, mask=inside, other=0.0)


@triton.jit
def _load(pointer, index, rows, columns, height, width):
    """Cells of one map as fp32, 0 beyond the border."""
    inside = (rows >= 0) & (rows < height)
    inside = inside[:, None] & ((columns >= 0) & (columns < width))[None, :]
    offsets = index * height * width + rows[:, None] * width + columns[None, :]
    return tl.load(pointer + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _blur(down, x, across):
    """Both products in full fp32: tf32 would lose the variances."""
    x = tl.dot(down, x, input_precision="ieee")
    return tl.dot(x, tl.trans(across), input_precision="ieee")


@triton.jit
def _moments_kernel(
    x_pointer,
    y_pointer,
    mean_x_pointer,
    mean_y_pointer,
    down_pointer,
    across_pointer,
    weight_pointer,
    map_pointer,
    sum_pointer,
    stack_pointer,
    height,
    width,
    out_height,
    out_width,
    tiles_across,
    reach,
    c1,
    c2,
    TILE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    STORE_MAP: tl.constexpr,
    X_WANTED: tl.constexpr,
    Y_WANTED: tl.constexpr,
):
    """Similarity of a tile: its map or sum, and what the adjoint blur needs for the gradient."""
    index, rows, columns, in_rows, in_columns = _tile(tiles_across, TILE, reach)
    down = _matrix(down_pointer, rows, in_rows, out_height, height, height, 1, TILE)
    across = _matrix(across_pointer, columns, in_columns, out_width, width, width, 1, TILE)
    # What these loads read beyond the border the matrices multiply by 0.
    mean_x, mean_y = tl.load(mean_x_pointer + index), tl.load(mean_y_pointer + index)
    x = _load(x_pointer, index, in_rows, in_columns, height, width) - mean_x
    y = _load(y_pointer, index, in_rows, in_columns, height, width) - mean_y
    u, v = x + y, x - y
    p, q = _blur(down, u, across), _blur(down, v, across)
    var_u = tl.maximum(_blur(down, u * u, across) - p * p, 0.0)
    B = tl.maximum(_blur(down, v * v, across) - q * q, 0.0)
    mean_u, mean_v = p + (mean_x + mean_y), q + (mean_x - mean_y)
    a, b, A = mean_u * mean_u + 2 * c1, mean_v * mean_v, var_u + 2 * c2
    d1, d2 = a + b, A + B
    luminance, structure = (a - b) / d1, (A - B) / d2

    first_row, first_column = tl.min(rows, axis=0), tl.min(columns, axis=0)
    mine = ((rows < out_height) & (rows < first_row + TILE))[:, None]
    mine = mine & ((columns < out_width) & (columns < first_column + TILE))[None, :]
    cells = index * out_height * out_width + rows[:, None] * out_width + columns[None, :]
    similarity = tl.where(mine, luminance * structure, 0.0)
    if STORE_MAP:
        tl.store(map_pointer + cells, similarity, mask=mine)
    else:
        tl.store(sum_pointer + index * tl.num_programs(1) + tl.program_id(1), tl.sum(similarity))
    if X_WANTED or Y_WANTED:
        by_s, by_m = luminance / d2 / d2, structure / d1 / d1
        if WEIGHTED:
            weight = tl.load(weight_pointer + cells, mask=mine, other=0.0)
            by_s, by_m = by_s * weight, by_m * weight
        by_su, by_sv = by_s * B, by_s * A
        by_mu = by_m * b * mean_u - p * by_su
        by_mv = q * by_sv - by_m * a * mean_v
        kind = tl.num_programs(0).to(tl.int64) * out_height * out_width
        tl.store(stack_pointer + cells, by_su, mask=mine)
        tl.store(stack_pointer + kind + cells, by_sv, mask=mine)
        if X_WANTED:
            tl.store(stack_pointer + 2 * kind + cells, by_mu + by_mv, mask=mine)
        if Y_WANTED:
            tl.store(stack_pointer + (2 + X_WANTED) * kind + cells, by_mu - by_mv, mask=mine)


@triton.jit
def _adjoint_kernel(
    x_pointer,
    y_pointer,
    mean_x_pointer,
    mean_y_pointer,
    down_pointer,
    across_pointer,
    stack_pointer,
    grad_x_pointer,
    grad_y_pointer,
    height,
    width,
    out_height,
    out_width,
    tiles_across,
    reach,
    TILE: tl.constexpr,
    X_WANTED: tl.constexpr,
    Y_WANTED: tl.constexpr,
):
    """Gradients of a tile from the stack of the first kernel."""
    index, rows, columns, in_rows, in_columns = _tile(tiles_across, TILE, reach)
    down = _matrix(down_pointer, rows, in_rows, height, out_height, 1, height, TILE)
    across = _matrix(across_pointer, columns, in_columns, width, out_width, 1, width, TILE)
    maps = tl.num_programs(0)
    by_su = _load(stack_pointer, index, in_rows, in_columns, out_height, out_width)
    by_sv = _load(stack_pointer, index + maps, in_rows, in_columns, out_height, out_width)
    x = _load(x_pointer, index, rows, columns, height, width) - tl.load(mean_x_pointer + index)
    y = _load(y_pointer, index, rows, columns, height, width) - tl.load(mean_y_pointer + index)
    by_u = (x + y) * _blur(down, by_su, across)
    by_v = (x - y) * _blur(down, by_sv, across)
    first_row, first_column = tl.min(rows, axis=0), tl.min(columns, axis=0)
    mine = ((rows < height) & (rows < first_row + TILE))[:, None]
    mine = mine & ((columns < width) & (columns < first_column + TILE))[None, :]
    cells = index * height * width + rows[:, None] * width + columns[None, :]
    if X_WANTED:
        by_m = _load(stack_pointer, index + 2 * maps, in_rows, in_columns, out_height, out_width)
        tl.store(grad_x_pointer + cells, 4 * (by_u - by_v + _blur(down, by_m, across)), mask=mine)
    if Y_WANTED:
        kind = index + (2 + X_WANTED) * maps
        by_m = _load(stack_pointer, kind, in_rows, in_columns, out_height, out_width)
        tl.store(grad_y_pointer + cells, 4 * (by_u + by_v + _blur(down, by_m, across)), mask=mine)


def similarity(x, y, window, *, weight=None, as_map=False, gradients=(None, None)):
    """SSIM of maps, and its gradients where there is memory for them.

    Args:
        x, y: (M, H, W).
        window: size, sigma, padding, c1 and c2.
        weight: (M, H', W') that the map is multiplied by before its sum is differentiated.
        as_map: return the map, not its sum.
        gradients: (M, H, W) contiguous memory for x's and for y's, None where none is wanted.

    Returns:
        fp32 scalar, or (M, H', W').
    """
    x, y = x.contiguous(), y.contiguous()
    maps, height, width = x.shape
    matrices = [
        blur_matrix(side, window.size, window.sigma, window.padding, torch.float32, x.device)
        for side in (height, width)
    ]
    out_height, out_width = (len(matrix) for matrix in matrices)
    if window.padding == "zero":
        means = [torch.zeros(maps, device=x.device)] * 2
    else:
        means = [z.mean(dim=(1, 2), dtype=torch.float32) for z in (x, y)]
    wanted = {"X_WANTED": gradients[0] is not None, "Y_WANTED": gradients[1] is not None}
    tile = PATCH.value - window.size + 1
    tiles_down, tiles_across = triton.cdiv(out_height, tile), triton.cdiv(out_width, tile)
    # The interpreter wants a tensor where none is read or written too.
    unused = means[0]
    result = x.new_empty(maps, out_height, out_width, dtype=torch.float32) if as_map else unused
    sums = x.new_empty(maps, tiles_down * tiles_across, dtype=torch.float32)
    kinds = 2 + sum(wanted.values()) if any(wanted.values()) else 0
    stack = x.new_empty(kinds * maps, out_height, out_width, dtype=torch.float32)
    reach = 0 if window.padding == "valid" else window.size // 2
    sizes = height, width, out_height, out_width
    with torch.cuda.device_of(x):
        _moments_kernel[(maps, tiles_down * tiles_across)](
            *(x, y, *means, *matrices, unused if weight is None else weight.contiguous()),
            *(result, sums, stack, *sizes, tiles_across, reach, window.c1, window.c2),
            TILE=tile,
            WEIGHTED=weight is not None,
            STORE_MAP=as_map,
            **wanted,
        )
        if kinds:
            tiles_down, tiles_across = triton.cdiv(height, tile), triton.cdiv(width, tile)
            _adjoint_kernel[(maps, tiles_down * tiles_across)](
                *(x, y, *means, *matrices, stack),
                *(unused if gradient is None else gradient for gradient in gradients),
                *(*sizes, tiles_across, window.size - 1 - reach),
                TILE=tile,
                **wanted,
            )
    return result if as_map else sums.sum()
