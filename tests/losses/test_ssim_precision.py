"""SSIM in fp32 and half precision, and under autocast."""

import pytest
import torch
from ssim_reference import FRACTIONAL, maps
from torch.testing import assert_close

from msad_kd.losses.ssim.blur import PADDINGS
from msad_kd.losses.ssim.functional import ssim


@pytest.mark.parametrize("offset", [0.0, 20.0])
@pytest.mark.parametrize("padding", ["reflect", "valid"])
def test_fp32_is_exact_far_from_zero_too(padding, offset):
    x, y = (z + offset for z in maps(1, 4, 20, 24, dtype=torch.float32))
    arguments = {"padding": padding, "reduction": "none"}
    expected = ssim(x.double(), y.double(), **arguments)
    assert_close(ssim(x, y, **arguments).double(), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input(dtype, padding):
    for offset in (0.0, 20.0):
        x, y = (z + offset for z in maps(1, 4, 20, 24))
        arguments = {"padding": padding, "reduction": "none"}
        result = ssim(x.to(dtype), y.to(dtype), **arguments)
        assert result.dtype == torch.float32 and result.abs().max() <= 1
        if not offset:
            assert_close(result.double(), ssim(x, y, **arguments), atol=2e-2, rtol=0)
        # Beyond what the input itself has lost, nothing is lost.
        expected = ssim(x.to(dtype).double(), y.to(dtype).double(), **arguments)
        tolerance = 2e-2 if offset and padding == "zero" else 2e-5
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
