"""SSIM against other implementations in fp64, and in lower precision against itself in fp64."""

import numpy as np
import pytest
import torch
from ssim_reference import FRACTIONAL, SIZES, maps, plain
from torch.testing import assert_close

from msad_kd.losses.ssim import ssim
from msad_kd.losses.ssim.blur import PADDINGS, fitting_window


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_the_plain_formula_with_its_gradients(size, padding):
    x, y = (z.requires_grad_() for z in maps(2, 3, *size))
    result = ssim(x, y, padding=padding, reduction="none")
    expected = plain(x, y, fitting_window(11, *size, padding), padding)
    assert_close(result, expected, atol=1e-10, rtol=0)
    assert_close(ssim(x, y, padding=padding), expected.mean(), atol=1e-10, rtol=0)
    weight = torch.linspace(-1, 1, expected.numel(), dtype=x.dtype).view(expected.shape)
    gradients = torch.autograd.grad((result * weight).sum(), (x, y))
    expected = torch.autograd.grad((expected * weight).sum(), (x, y))
    assert_close(gradients, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("size", [(6, 6), (7, 11), (8, 9), (17, 23)], ids=str)
def test_equals_kornia_and_torchmetrics(size):
    from kornia.metrics import ssim as kornia_ssim
    from torchmetrics.functional.image import structural_similarity_index_measure

    x, y = maps(2, 3, *size)
    expected = structural_similarity_index_measure(x, y, data_range=1.0)
    assert_close(ssim(x, y), expected, atol=1e-10, rtol=0)
    assert_close(ssim(x, y, reduction="none"), kornia_ssim(x, y, 11), atol=1e-10, rtol=0)


@pytest.mark.parametrize("size", [(11, 11), (17, 23)], ids=str)
def test_valid_equals_scikit_image(size):
    from skimage.metrics import structural_similarity

    x, y = maps(1, 1, *size)
    arguments = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    arguments |= {"data_range": 1.0, "full": True}
    _, expected = structural_similarity(x[0, 0].numpy(), y[0, 0].numpy(), **arguments)
    expected = torch.from_numpy(np.ascontiguousarray(expected[5:-5, 5:-5]))
    result = ssim(x, y, padding="valid", reduction="none")[0, 0]
    assert_close(result, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("padding", PADDINGS)
def test_only_what_the_input_has_lost_is_lost(dtype, padding):
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
            # The hand-written backward has to hold under autocast as well.
            with torch.autocast("cpu", enabled=enabled and exponents == (1, 1, 1)):
                result.sum().backward()
        results.append((result, x.grad, y.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results))
