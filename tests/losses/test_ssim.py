"""SSIM: worked-out values, invariances, gradient, both blurs, rescaled maps and errors."""

import pytest
import torch
from ssim_reference import FRACTIONAL, SIZES, maps, plain_mean
from torch.autograd import gradcheck, gradgradcheck
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


@pytest.mark.parametrize("exponents", [(1, 1, 1), FRACTIONAL], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("padding", PADDINGS)
def test_gradcheck(padding, reduction, exponents):
    x, y = (z.requires_grad_() for z in maps(1, 2, 4, 5))
    arguments = {"padding": padding, "reduction": reduction, "exponents": exponents}

    def function(x, y):
        return ssim(x, y, window_size=3, **arguments)

    assert gradcheck(function, (x, y), fast_mode=True)
    assert gradcheck(lambda x: function(x, y.detach()), x, fast_mode=True)
    assert gradcheck(lambda y: function(x.detach(), y), y, fast_mode=True)
    if exponents == FRACTIONAL:
        assert gradgradcheck(function, (x, y), fast_mode=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("power", [1, 2])
def test_a_gradient_penalty_is_refused(power, reduction):
    """once_differentiable dropped the penalty silently where the loss is linear in SSIM."""
    x, y = maps(1, 2, 8, 9)
    x.requires_grad_()
    loss = (ssim(x, y, reduction=reduction) ** power).mean()
    with pytest.raises(RuntimeError, match="cannot be differentiated a second time"):
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + gradient.norm()).backward()


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_memory_kept_until_the_backward(reduction, wanted):
    pair = maps(1, 4, 20, 24, dtype=torch.float32)
    x, y = (z.requires_grad_(want) for z, want in zip(pair, wanted))
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = ssim(x, y, reduction=reduction)
    inputs = sum(kept.values()) / (4 * x.numel())
    assert inputs == (sum(wanted) if reduction == "mean" else 2)
    result.sum().backward()


def test_first_used_in_inference_then_in_training():
    blur.blur_for.cache_clear()
    blur.blur_matrix.cache_clear()
    x, y = maps(1, 2, 9, 10)
    with torch.inference_mode():
        expected = [ssim(x, y), ssim(x, y, exponents=FRACTIONAL)]
    x.requires_grad_()
    results = [ssim(x, y), ssim(x, y, exponents=FRACTIONAL)]
    assert results == expected
    sum(results).backward()
    assert x.grad.isfinite().all()


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
