"""SSIM's moments, map and gradient in two fused Triton kernels, for CUDA.

M: maps (images times channels), H, W: their height and width, H', W': size of the similarity map.

A program blurs one tile of a map by two products with the part of ``blur.blur_matrix`` that it
needs: padding and adjoint (the transpose) are in the matrices. ``moments`` explains the names and
formulas. With TRITON_INTERPRET=1 in the environment before the import, the kernels run on a CPU.
"""

import os

import torch
import triton
import triton.language as tl

from msad_kd.losses.ssim.blur import blur_matrix

# Side of the square that a program reads; the one it writes is smaller by the window less one.
PATCH = tl.constexpr(32)
LARGEST_WINDOW = 17


def runs_on(x: torch.Tensor, window_size: int, dtype: torch.dtype) -> bool:
    """Return whether the kernels run for this device, window and dtype of the computation."""
    device = x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return device and window_size <= LARGEST_WINDOW and dtype == torch.float32


@triton.jit
def _tile(tiles_across, tile, reach):
    """Return the map's index, the rows and columns to write, and those to read for them."""
    pid = tl.program_id(1)
    rows = pid // tiles_across * tile + tl.arange(0, PATCH)
    columns = pid % tiles_across * tile + tl.arange(0, PATCH)
    return tl.program_id(0).to(tl.int64), rows, columns, rows - reach, columns - reach


@triton.jit
def _matrix(pointer, outs, ins, out_size, in_size, stride_out, stride_in):
    """Return the part of a blur matrix that blurs the cells ``ins`` to the cells ``outs``."""
    inside = (outs < out_size)[:, None] & ((ins >= 0) & (ins < in_size))[None, :]
    offsets = outs[:, None] * stride_out + ins[None, :] * stride_in
    return tl.load(pointer + offsets, mask=inside, other=0.0)


@triton.jit
def _load(pointer, index, rows, columns, height, width):
    """Return cells of one map as fp32, 0 beyond the border."""
    inside = (rows >= 0) & (rows < height)
    inside = inside[:, None] & ((columns >= 0) & (columns < width))[None, :]
    offsets = index * height * width + rows[:, None] * width + columns[None, :]
    return tl.load(pointer + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _written(index, rows, columns, height, width, tile):
    """Return offsets and mask of the cells that this program writes."""
    inside = ((rows < height) & (rows < tl.min(rows, axis=0) + tile))[:, None]
    inside = inside & ((columns < width) & (columns < tl.min(columns, axis=0) + tile))[None, :]
    return index * height * width + rows[:, None] * width + columns[None, :], inside


@triton.jit
def _blur(down, x, across):
    """Return both products in full fp32; tf32 would lose the variances."""
    x = tl.dot(down, x, input_precision="ieee")
    return tl.dot(x, tl.trans(across), input_precision="ieee")


@triton.jit
def _moments_kernel(
    x_pointer, y_pointer, means_pointer, down_pointer, across_pointer, weight_pointer,
    result_pointer, stack_pointer, height, width, out_height, out_width, tiles_across, reach,
    c1, c2, TILE: tl.constexpr, WEIGHTED: tl.constexpr, STORE_MAP: tl.constexpr,
    X_WANTED: tl.constexpr, Y_WANTED: tl.constexpr,
):  # fmt: skip
    """Store the similarity of a tile or its sum, and what the second kernel needs."""
    index, rows, columns, in_rows, in_columns = _tile(tiles_across, TILE, reach)
    maps = tl.num_programs(0).to(tl.int64)
    down = _matrix(down_pointer, rows, in_rows, out_height, height, height, 1)
    across = _matrix(across_pointer, columns, in_columns, out_width, width, width, 1)
    # The matrices multiply what these loads read beyond the border by 0.
    mean_x, mean_y = tl.load(means_pointer + index), tl.load(means_pointer + maps + index)
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

    cells, inside = _written(index, rows, columns, out_height, out_width, TILE)
    similarity = tl.where(inside, luminance * structure, 0.0)
    if STORE_MAP:
        tl.store(result_pointer + cells, similarity, mask=inside)
    else:
        sums = result_pointer + index * tl.num_programs(1) + tl.program_id(1)
        tl.store(sums, tl.sum(similarity))
    if X_WANTED or Y_WANTED:
        by_s, by_m = luminance / d2 / d2, structure / d1 / d1
        if WEIGHTED:
            weight = tl.load(weight_pointer + cells, mask=inside, other=0.0)
            by_s, by_m = by_s * weight, by_m * weight
        by_su, by_sv = by_s * B, by_s * A
        by_mu = by_m * b * mean_u - p * by_su
        by_mv = q * by_sv - by_m * a * mean_v
        kind = maps * out_height * out_width
        tl.store(stack_pointer + cells, by_su, mask=inside)
        tl.store(stack_pointer + kind + cells, by_sv, mask=inside)
        if X_WANTED:
            tl.store(stack_pointer + 2 * kind + cells, by_mu + by_mv, mask=inside)
        if Y_WANTED:
            tl.store(stack_pointer + (2 + X_WANTED) * kind + cells, by_mu - by_mv, mask=inside)


@triton.jit
def _adjoint_kernel(
    x_pointer, y_pointer, means_pointer, down_pointer, across_pointer, stack_pointer,
    grad_x_pointer, grad_y_pointer, height, width, out_height, out_width, tiles_across, reach,
    TILE: tl.constexpr, X_WANTED: tl.constexpr, Y_WANTED: tl.constexpr,
):  # fmt: skip
    """Store the gradients of a tile, from the stack of the first kernel."""
    index, rows, columns, in_rows, in_columns = _tile(tiles_across, TILE, reach)
    maps = tl.num_programs(0)
    down = _matrix(down_pointer, rows, in_rows, height, out_height, 1, height)
    across = _matrix(across_pointer, columns, in_columns, width, out_width, 1, width)
    by_su = _load(stack_pointer, index, in_rows, in_columns, out_height, out_width)
    by_sv = _load(stack_pointer, index + maps, in_rows, in_columns, out_height, out_width)
    mean_x, mean_y = tl.load(means_pointer + index), tl.load(means_pointer + maps + index)
    x = _load(x_pointer, index, rows, columns, height, width) - mean_x
    y = _load(y_pointer, index, rows, columns, height, width) - mean_y
    by_u = (x + y) * _blur(down, by_su, across)
    by_v = (x - y) * _blur(down, by_sv, across)
    cells, inside = _written(index, rows, columns, height, width, TILE)
    if X_WANTED:
        by_m = _load(stack_pointer, index + 2 * maps, in_rows, in_columns, out_height, out_width)
        tl.store(grad_x_pointer + cells, 4 * (by_u - by_v + _blur(down, by_m, across)), mask=inside)
    if Y_WANTED:
        kind = index + (2 + X_WANTED) * maps
        by_m = _load(stack_pointer, kind, in_rows, in_columns, out_height, out_width)
        tl.store(grad_y_pointer + cells, 4 * (by_u + by_v + _blur(down, by_m, across)), mask=inside)


def similarity(x, y, window, weight, as_map, gradients):
    """Return the sum of SSIM over maps (M, H, W) in fp32, or the map (M, H', W').

    Gradients of the sum, weighted by ``weight`` (M, H', W') if it is not None, are written to the
    contiguous memory (M, H, W) that ``gradients`` has for x and y, None where none is wanted.
    """
    x, y = x.contiguous(), y.contiguous()
    maps, height, width = x.shape
    args = window.size, window.sigma, window.padding, torch.float32, x.device
    matrices = [blur_matrix(side, *args) for side in (height, width)]
    sizes = height, width, *map(len, matrices)
    means = torch.cat([window.mean(z, torch.float32) for z in (x, y)])
    reach = 0 if window.padding == "valid" else window.size // 2
    tile = PATCH.value - window.size + 1
    grids = [(maps, triton.cdiv(h, tile) * triton.cdiv(w, tile)) for h, w in (sizes[2:], sizes[:2])]
    x_wanted, y_wanted = (gradient is not None for gradient in gradients)
    kinds = (2 + x_wanted + y_wanted) * (x_wanted or y_wanted)
    result = x.new_empty((maps, *sizes[2:]) if as_map else grids[0], dtype=torch.float32)
    stack = x.new_empty(kinds * maps, *sizes[2:], dtype=torch.float32)
    options = {"TILE": tile, "X_WANTED": x_wanted, "Y_WANTED": y_wanted}
    with torch.cuda.device_of(x):
        # The interpreter wants a tensor also for what is neither read nor written.
        _moments_kernel[grids[0]](
            *(x, y, means, *matrices, means if weight is None else weight.contiguous(), result),
            *(stack, *sizes, triton.cdiv(sizes[3], tile), reach, window.c1, window.c2),
            **{"WEIGHTED": weight is not None, "STORE_MAP": as_map, **options},
        )
        if kinds:
            _adjoint_kernel[grids[1]](
                *(x, y, means, *matrices, stack),
                *(means if gradient is None else gradient for gradient in gradients),
                *(*sizes, triton.cdiv(width, tile), window.size - 1 - reach),
                **options,
            )
    return result if as_map else result.sum()
