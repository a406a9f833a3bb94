"""SSIM in fp32 and half precision, and under autocast."""

import pytest
import torch
from ssim_reference import FRACTIONAL, maps
from torch.testing import assert_close

from msad_kd.losses.ssim import ssim
from msad_kd.losses.ssim.blur import PADDINGS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("padding", PADDINGS)
def test_nothing_is_lost_beyond_what_the_input_has_lost(dtype, padding):
    for offset in (0.0, 20.0):
        exact = [z + offset for z in maps(1, 4, 20, 24)]
        x, y = (z.to(dtype) for z in exact)
        arguments = {"padding": padding, "reduction": "none"}
        result = ssim(x, y, **arguments)
        assert result.dtype == torch.float32 and result.abs().max() <= 1
        if not offset:
            assert_close(result.double(), ssim(*exact, **arguments), atol=2e-2, rtol=0)
        # Zero padding forbids subtracting the mean.
        tolerance = 2e-2 if offset and padding == "zero" else 2e-5
        expected = ssim(x.double(), y.double(), **arguments)
        assert_close(result.double(), expected, atol=tolerance, rtol=0)


def test_gradient_has_the_dtype_of_its_input():
    x, y = maps(1, 2, 8, 9, dtype=torch.float32)
    x, y = x.half().requires_grad_(), y.bfloat16().requires_grad_()
    ssim(x, y).backward()
    assert (x.grad.dtype, y.grad.dtype) == (torch.float16, torch.bfloat16)
    reference = [z.detach().double().requires_grad_() for z in (x, y)]
    ssim(*reference).backward()
    for z, r in zip((x, y), reference):
        assert_close(z.grad.double(), r.grad, atol=1e-2 * r.grad.abs().max().item(), rtol=1e-2)


@pytest.mark.parametrize("exponents", [(1, 1, 1), FRACTIONAL], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_changes_nothing(reduction, exponents):
    results = []
    for enabled in (False, True):
        x, y = (z.requires_grad_() for z in maps(1, 20, 33, 34, dtype=torch.float32))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            result = ssim(x, y, reduction=reduction, exponents=exponents)
            if exponents == (1, 1, 1):
                result.sum().backward()
        if exponents != (1, 1, 1):
            result.sum().backward()
        results.append((result, x.grad, y.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results))
