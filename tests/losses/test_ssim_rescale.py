"""Maps rescaled to [0, 1] for SSIM, and the share of windows that are too flat for it."""

import pytest
import torch
from ssim_reference import maps, plain_mean
from torch.autograd import gradcheck
from torch.testing import assert_close

from msad_kd.losses.ssim import blind_share, rescale, ssim


def test_rescale_worked_out():
    x = torch.tensor([[[[1.0, 2.0, 3.0]], [[10.0, 30.0, 50.0]]]])
    per_channel = torch.tensor([0.0, 0.5, 1.0]).expand(1, 2, 1, 3)
    assert_close(rescale(x), per_channel, atol=1e-5, rtol=0)
    assert_close(rescale(x, "image"), (x - 1) / 49, atol=1e-5, rtol=0)
    assert rescale(x, "none") is x
    assert rescale(x.half()).dtype == torch.float32
    constant = torch.full((1, 1, 2, 2), 7.0, requires_grad=True)
    result = rescale(constant)
    result.sum().backward()
    assert not result.any() and constant.grad.isfinite().all()
    x, y = maps(1, 3, 9, 12)
    expected = ssim(rescale(x), rescale(y))
    assert_close(ssim(rescale(5 * x + 3), rescale(y)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scope", ["channel", "image"])
def test_gradient_flows_through_rescale(scope):
    x, _ = maps(2, 3, 3, 4)
    assert gradcheck(lambda x: rescale(x, scope), x.requires_grad_())


def test_blind_windows_are_those_of_small_variance():
    x, y = maps(2, 3, 20, 24, dtype=torch.float32)
    assert blind_share(x, y) == 0
    # A variance of about (1e-3)^2 / 12 on each side against C2 = 9e-4.
    assert blind_share(1e-3 * x, 1e-3 * y) == 1
    assert blind_share(1e-3 * x, 1e-3 * y, data_range=1e-3) == 0
    share = blind_share(x.bfloat16(), y.bfloat16())
    assert share.dtype == torch.float32 and not share.requires_grad
    x, y = (0.05 * z for z in maps(2, 3, 20, 24))
    x[..., :12] = y[..., :12] = 0
    moments = [(plain_mean(z * z) - plain_mean(z) ** 2) for z in (x, y)]
    expected = (sum(moments) < 0.1 * 0.03**2).float().mean()
    assert 0.2 < expected < 0.8
    assert_close(blind_share(x, y), expected)
