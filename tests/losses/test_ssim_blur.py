"""The windows of SSIM: as large as fits, and the same by convolutions and by matrices."""

import pytest
import torch
from ssim_reference import maps
from torch.testing import assert_close

from msad_kd.losses.ssim import blur
from msad_kd.losses.ssim import moments as ssim_moments
from msad_kd.losses.ssim.blur import PADDINGS, ConvBlur, MatrixBlur, fitting_window
from msad_kd.losses.ssim.functional import ssim


def test_fitting_window():
    sizes = [(1, 1), (1, 7), (2, 9), (3, 3), (5, 5), (6, 6), (7, 11), (40, 50)]
    assert [fitting_window(11, *size, "reflect") for size in sizes] == [1, 1, 3, 5, 9, 11, 11, 11]
    assert [fitting_window(11, *size, "zero") for size in sizes] == [1, 1, 3, 5, 9, 11, 11, 11]
    assert [fitting_window(11, *size, "valid") for size in sizes] == [1, 1, 1, 3, 5, 5, 7, 11]


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_both_blurs_agree(padding, reduction, monkeypatch):
    results = []
    # Chunks of 16 of the 40 maps, then of all; 3 tiles a side.
    for conv_cells, chunk in ((1, 1), (10**9, 10**9)):
        monkeypatch.setattr(blur, "CONV_CELLS", conv_cells)
        monkeypatch.setattr(ssim_moments, "CHUNK_CELLS", chunk)
        blur.blur_for.cache_clear()
        kind = MatrixBlur if conv_cells > 1 else ConvBlur
        arguments = (40, 40, 70, 11, 1.5, padding, torch.float32, torch.device("cpu"))
        assert isinstance(blur.blur_for(*arguments), kind)
        x, y = (z.requires_grad_() for z in maps(2, 20, 40, 70, dtype=torch.float32))
        result = ssim(x, y, padding=padding, reduction=reduction)
        weight = torch.linspace(0, 1, result.numel()).view(result.shape)
        (result * weight).sum().backward()
        results.append((result, x.grad, y.grad))
    blur.blur_for.cache_clear()
    for a, b in zip(*results):
        assert_close(a, b, atol=5e-6 * max(b.abs().max().item(), 1e-3), rtol=1e-4)
