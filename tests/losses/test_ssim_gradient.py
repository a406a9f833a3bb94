"""SSIM's gradient: its value, the refusal of a second derivative, and the memory it keeps."""

import pytest
import torch
from ssim_reference import FRACTIONAL, maps
from torch.autograd import gradcheck, gradgradcheck

from msad_kd.losses.ssim import blur, ssim
from msad_kd.losses.ssim.blur import PADDINGS


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
