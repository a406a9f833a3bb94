"""SSIM: worked-out values, what it does not depend on, what it refuses."""

import pytest
import torch
from ssim_reference import FRACTIONAL, SIZES, maps
from torch.testing import assert_close

from msad_kd.losses.ssim.blur import PADDINGS
from msad_kd.losses.ssim.functional import blind_share, rescale, ssim, ssim_loss


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_symmetric_and_one_where_equal(size, padding):
    x, y = maps(1, 2, *size, dtype=torch.float32)
    arguments = {"padding": padding, "reduction": "none"}
    assert_close(ssim(x, y, **arguments), ssim(y, x, **arguments), atol=2e-6, rtol=0)
    same = ssim(x, x, **arguments)
    assert torch.equal(same, torch.ones_like(same))
    assert ssim_loss(x, x, padding=padding) == 0


def test_loss_is_half_of_what_is_missing_to_one():
    x, y = maps(1, 2, 8, 9)
    assert_close(ssim_loss(x, y, padding="zero"), (1 - ssim(x, y, padding="zero")) / 2)


@pytest.mark.parametrize("exponents", [(1, 1, 1), FRACTIONAL, (0, 0, 0.5)], ids=str)
@pytest.mark.parametrize("padding", PADDINGS)
def test_constant_maps_worked_out(padding, exponents):
    x = torch.full((1, 1, 9, 12), 0.2, requires_grad=True)
    y = torch.full((1, 1, 9, 12), 0.6)
    result = ssim(x, y, padding=padding, exponents=exponents)
    result.backward()
    assert x.grad.isfinite().all()
    if padding != "zero":  # whose border is not constant
        luminance = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
        assert_close(result.item(), luminance ** exponents[0], atol=1e-5, rtol=0)


def test_a_window_of_one_cell_sees_luminance_alone():
    x, y = maps(2, 3, 1, 7)
    expected = (2 * x * y + 1e-4) / (x * x + y * y + 1e-4)
    assert_close(ssim(x, y, reduction="none"), expected)


def test_components():
    x, y = maps(1, 2, 9, 12)
    whole = ssim(x, y, reduction="none")
    one_by_one = [
        ssim(x, y, reduction="none", exponents=e) for e in [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
    ]
    assert_close(torch.stack(one_by_one).prod(dim=0), whole)
    assert_close(
        ssim(x, y, reduction="none", exponents=(2, 1, 3)),
        one_by_one[0] ** 2 * one_by_one[1] * one_by_one[2] ** 3,
    )
    assert torch.equal(ssim(x, y, exponents=(0, 0, 0)), torch.ones((), dtype=x.dtype))
    # Contrast and structure don't see an offset, structure hardly a scale.
    assert_close(ssim(x, y + 3, exponents=(0, 1, 1)), ssim(x, y, exponents=(0, 1, 1)))
    assert abs(ssim(x, 0.5 * x, exponents=(0, 0, 1)) - 1) < 0.02
    assert ssim(x, 0.5 * x, exponents=(0, 1, 0)) < 0.85


def test_layout_of_the_input_does_not_matter():
    x, y = maps(2, 4, 9, 12)
    expected = ssim(x, y)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    wide = torch.zeros(2, 4, 9, 24, dtype=y.dtype)
    wide[..., ::2] = y
    assert_close(ssim(x, wide[..., ::2]), expected)
    ssim(x, y).backward()
    reference = maps(2, 4, 9, 12)[0].requires_grad_()
    ssim(reference, y).backward()
    assert_close(x.grad, reference.grad)


ERRORS = {
    "one shape": lambda x, y: ssim(x, y[:, :1]),
    r"shape \(N, C, H, W\), not \(8, 9\)": lambda x, y: ssim(x[0, 0], y[0, 0]),
    "have a cell": lambda x, y: ssim(x[:, :, :0], y[:, :, :0]),
    "window_size is 4; it must be odd": lambda x, y: ssim(x, y, window_size=4),
    "window_size is -1": lambda x, y: ssim(x, y, window_size=-1),
    "padding is 'same'; it must be one of": lambda x, y: ssim(x, y, padding="same"),
    "reduction is 'sum'; it must be one of": lambda x, y: ssim(x, y, reduction="sum"),
    r"exponents are \(1, -1, 1\)": lambda x, y: ssim(x, y, exponents=(1, -1, 1)),
    r"exponents are \(1, 1\)": lambda x, y: ssim(x, y, exponents=(1, 1)),
    "scope is 'batch'; it must be one of": lambda x, y: rescale(x, "batch"),
    "ssim needs two maps of one shape": lambda x, y: blind_share(x, y[..., :3]),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError, match=message):
        ERRORS[message](*maps(2, 2, 8, 9))
