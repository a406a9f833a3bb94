"""SSIM against other people's implementations, in fp64."""

import numpy as np
import pytest
import torch
from ssim_reference import SIZES, maps, plain, plain_mean
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
def test_equals_kornia(size):
    from kornia.metrics import ssim as kornia_ssim

    x, y = maps(2, 3, *size)
    expected = kornia_ssim(x, y, 11)
    # It adds 1e-12 to the denominator, which is at least C1 C2 = 9e-8.
    assert_close(ssim(x, y, reduction="none"), expected, atol=1e-10 + 1e-12 / 9e-8, rtol=0)
    mx, my = (plain_mean(z) for z in (x, y))
    d1 = mx**2 + my**2 + 1e-4
    d2 = plain_mean(x * x) - mx**2 + plain_mean(y * y) - my**2 + 9e-4
    without_eps = expected * (d1 * d2 + 1e-12) / (d1 * d2)
    assert_close(ssim(x, y, reduction="none"), without_eps, atol=1e-10, rtol=0)


@pytest.mark.parametrize("size", [(6, 6), (7, 11), (8, 9), (17, 23)], ids=str)
def test_equals_torchmetrics(size):
    from torchmetrics.functional.image import structural_similarity_index_measure

    x, y = maps(2, 3, *size)
    expected = structural_similarity_index_measure(x, y, data_range=1.0)
    assert_close(ssim(x, y), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("size", [(11, 11), (17, 23)], ids=str)
def test_valid_equals_scikit_image(size):
    from skimage.metrics import structural_similarity

    x, y = maps(1, 1, *size)
    _, expected = structural_similarity(
        *(x[0, 0].numpy(), y[0, 0].numpy()),
        **{"data_range": 1.0, "gaussian_weights": True, "sigma": 1.5, "full": True},
        use_sample_covariance=False,
    )
    expected = torch.from_numpy(np.ascontiguousarray(expected[5:-5, 5:-5]))
    result = ssim(x, y, padding="valid", reduction="none")[0, 0]
    assert_close(result, expected, atol=1e-10, rtol=0)
