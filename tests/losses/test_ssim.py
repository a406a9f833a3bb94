"""SSIM: worked-out values, invariances, the window's size, both blurs, and what is refused."""

import pytest
import torch
from ssim_reference import FRACTIONAL, SIZES, maps
from torch.testing import assert_close

from msad_kd.losses.ssim import blind_share, blur, moments, rescale, ssim, ssim_loss
from msad_kd.losses.ssim.blur import PADDINGS, ConvBlur, MatrixBlur, fitting_window


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_symmetric_and_one_for_equal_maps(size, padding):
    x, y = maps(1, 2, *size, dtype=torch.float32)
    arguments = {"padding": padding, "reduction": "none"}
    assert_close(ssim(x, y, **arguments), ssim(y, x, **arguments), atol=2e-6, rtol=0)
    same = ssim(x, x, **arguments)
    assert torch.equal(same, torch.ones_like(same))
    assert ssim_loss(x, x, padding=padding) == 0
    assert_close(ssim_loss(x, y, padding=padding), (1 - ssim(x, y, padding=padding)) / 2)


@pytest.mark.parametrize("exponents", [(1, 1, 1), FRACTIONAL, (0, 0, 0.5)], ids=str)
@pytest.mark.parametrize("padding", PADDINGS)
def test_constant_maps(padding, exponents):
    x = torch.full((1, 1, 9, 12), 0.2, requires_grad=True)
    y = torch.full((1, 1, 9, 12), 0.6)
    result = ssim(x, y, padding=padding, exponents=exponents)
    result.backward()
    assert x.grad.isfinite().all()
    if padding != "zero":  # its border is not constant
        luminance = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
        assert_close(result.item(), luminance ** exponents[0], atol=1e-5, rtol=0)


def test_components():
    x, y = maps(2, 3, 1, 7)  # a window of one cell: luminance alone
    assert_close(ssim(x, y, reduction="none"), (2 * x * y + 1e-4) / (x * x + y * y + 1e-4))
    x, y = maps(1, 2, 9, 12)

    def component(*exponents):
        return ssim(x, y, reduction="none", exponents=exponents)

    single = [component(1, 0, 0), component(0, 1, 0), component(0, 0, 1)]
    assert_close(torch.stack(single).prod(dim=0), component(1, 1, 1))
    assert_close(component(2, 1, 3), single[0] ** 2 * single[1] * single[2] ** 3)
    assert torch.equal(ssim(x, y, exponents=(0, 0, 0)), torch.ones((), dtype=x.dtype))
    # An offset changes neither contrast nor structure, a scale hardly the structure.
    assert_close(ssim(x, y + 3, exponents=(0, 1, 1)), ssim(x, y, exponents=(0, 1, 1)))
    assert abs(ssim(x, 0.5 * x, exponents=(0, 0, 1)) - 1) < 0.02
    assert ssim(x, 0.5 * x, exponents=(0, 1, 0)) < 0.85


def test_the_memory_layout_of_the_input_does_not_matter():
    x, y = maps(2, 4, 9, 12)
    reference = x.clone().requires_grad_()
    ssim(reference, y).backward()
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    wide = torch.zeros(2, 4, 9, 24, dtype=y.dtype)
    wide[..., ::2] = y
    result = ssim(x, wide[..., ::2])
    result.backward()
    assert_close(result, ssim(reference, y))
    assert_close(x.grad, reference.grad)


def test_fitting_window():
    sizes = [(1, 1), (1, 7), (2, 9), (3, 3), (5, 5), (6, 6), (7, 11), (40, 50)]
    windows = {p: [fitting_window(11, *size, p) for size in sizes] for p in PADDINGS}
    assert windows["reflect"] == windows["zero"] == [1, 1, 3, 5, 9, 11, 11, 11]
    assert windows["valid"] == [1, 1, 1, 3, 5, 5, 7, 11]


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_both_blurs_agree(padding, reduction, monkeypatch):
    results = []
    # Convolution in chunks of 16 of the 40 maps, then matrices of 3 tiles on all maps.
    for kind, conv_cells, chunk in ((ConvBlur, 1, 1), (MatrixBlur, 10**9, 10**9)):
        monkeypatch.setattr(blur, "CONV_CELLS", conv_cells)
        monkeypatch.setattr(moments, "CHUNK_CELLS", chunk)
        blur.blur_for.cache_clear()
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


ERRORS = {
    "one shape": lambda x, y: ssim(x, y[:, :1]),
    r"shape \(N, C, H, W\), not \(8, 9\)": lambda x, y: ssim(x[0, 0], y[0, 0]),
    "have a cell": lambda x, y: ssim(x[:, :, :0], y[:, :, :0]),
    "window_size is 4; it must be odd": lambda x, y: ssim(x, y, window_size=4),
    "window_size is -1": lambda x, y: ssim(x, y, window_size=-1),
    "padding is 'same'; it must be one of": lambda x, y: ssim(x, y, padding="same"),
    "reduction is 'sum'; it must be": lambda x, y: ssim(x, y, reduction="sum"),
    r"exponents are \(1, -1, 1\)": lambda x, y: ssim(x, y, exponents=(1, -1, 1)),
    r"exponents are \(1, 1\)": lambda x, y: ssim(x, y, exponents=(1, 1)),
    "scope is 'batch'; it must be": lambda x, y: rescale(x, "batch"),
    "needs two maps of one shape": lambda x, y: blind_share(x, y[..., :3]),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError, match=message):
        ERRORS[message](*maps(2, 2, 8, 9))
