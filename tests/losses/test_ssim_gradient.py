"""SSIM's gradient: right, once differentiable, and what is kept for it."""

import pytest
import torch
from ssim_reference import FRACTIONAL, maps
from torch.autograd import gradcheck

from msad_kd.losses.ssim import blur
from msad_kd.losses.ssim.blur import PADDINGS
from msad_kd.losses.ssim.functional import ssim


@pytest.mark.parametrize("exponents", [(1, 1, 1), FRACTIONAL], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("padding", PADDINGS)
def test_gradcheck(padding, reduction, exponents):
    x, y = (z.requires_grad_() for z in maps(1, 2, 4, 5))
    arguments = {"padding": padding, "reduction": reduction, "exponents": exponents}

    def function(x, y):
        return ssim(x, y, window_size=3, **arguments)

    fast = {"fast_mode": True}
    assert gradcheck(function, (x, y), **fast)
    assert gradcheck(lambda x: function(x, y.detach()), x, **fast)
    assert gradcheck(lambda y: function(x.detach(), y), y, **fast)


def test_no_second_derivative():
    x, y = maps(1, 2, 8, 9)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(ssim(x, y), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("reduction, per_side, at_most", [("mean", 1, 2), ("none", 0, 5)])
def test_memory_kept_until_the_backward(reduction, per_side, at_most, wanted):
    x, y = (
        z.requires_grad_(want) for z, want in zip(maps(1, 4, 20, 24, dtype=torch.float32), wanted)
    )
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = ssim(x, y, reduction=reduction)
    inputs = sum(kept.values()) / (4 * x.numel())
    assert inputs == (sum(wanted) if per_side else 2) and inputs <= at_most
    result.sum().backward()


def test_first_used_in_inference_then_in_training():
    blur.blur_for.cache_clear()
    blur.blur_matrix.cache_clear()
    x, y = maps(1, 2, 9, 10)
    with torch.inference_mode():
        expected = [ssim(x, y, exponents=exponents) for exponents in [(1, 1, 1), FRACTIONAL]]
    x.requires_grad_()
    results = [ssim(x, y, exponents=exponents) for exponents in [(1, 1, 1), FRACTIONAL]]
    assert results == expected
    sum(results).backward()
    assert x.grad.isfinite().all()
