"""SSIM: other people's implementations in fp64, gradients, small maps, numerics, every path.

The Triton kernels run here by Triton's interpreter, in a process of their own, because it has to be
chosen before they are imported.
"""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT
from torch.autograd import gradcheck
from torch.testing import assert_close

from msad_kd import blur, ssim_moments
from msad_kd.blur import PADDINGS, ConvBlur, MatrixBlur, fitting_window
from msad_kd.ssim import blind_share, rescale, ssim, ssim_loss

SIZES = [(1, 1), (1, 7), (3, 3), (5, 5), (7, 11), (4, 20), (8, 9), (17, 23)]
FRACTIONAL = (0.5, 1, 1.5)
WINDOW = ssim_moments.Window(size=5, sigma=1.5, c1=1e-4, c2=9e-4, padding="reflect")


def maps(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, dtype=torch.float64, generator=generator)
    y = (x + 0.3 * torch.rand(shape, dtype=torch.float64, generator=generator)) / 1.3
    return x.to(dtype), y.to(dtype)


def taps(size, sigma=1.5):
    x = torch.arange(size, dtype=torch.float64) - size // 2
    weights = torch.exp(-0.5 * (x / sigma) ** 2)
    return weights / weights.sum()


def plain(x, y, size, padding):
    """The formula as it is published, by a convolution with the square window; differentiable."""
    c1, c2 = 0.01**2, 0.03**2
    window = torch.outer(taps(size), taps(size)).to(x)[None, None]
    pad = [size // 2] * 4

    def mean(z):
        n, c, h, w = z.shape
        if padding == "reflect" and size > 1:
            z = F.pad(z, pad, mode="reflect")
        elif padding == "zero":
            z = F.pad(z, pad)
        return F.conv2d(z.flatten(0, 1)[:, None], window).unflatten(0, (n, c))[:, :, 0]

    mx, my = mean(x), mean(y)
    sx, sy, sxy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    return (2 * mx * my + c1) * (2 * sxy + c2) / ((mx**2 + my**2 + c1) * (sx + sy + c2))


def test_fitting_window():
    sizes = [(1, 1), (1, 7), (2, 9), (3, 3), (5, 5), (6, 6), (7, 11), (40, 50)]
    assert [fitting_window(11, *size, "reflect") for size in sizes] == [1, 1, 3, 5, 9, 11, 11, 11]
    assert [fitting_window(11, *size, "zero") for size in sizes] == [1, 1, 3, 5, 9, 11, 11, 11]
    assert [fitting_window(11, *size, "valid") for size in sizes] == [1, 1, 1, 3, 5, 5, 7, 11]


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


def plain_mean(z):
    z = F.pad(z, [5] * 4, mode="reflect").flatten(0, 1)[:, None]
    window = torch.outer(taps(11), taps(11))[None, None]
    return F.conv2d(z, window).view(2, 3, z.shape[2] - 10, -1)


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


def test_no_second_derivative():
    x, y = maps(1, 2, 8, 9)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(ssim(x, y), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_both_blurs_agree(padding, reduction, monkeypatch):
    results = []
    # Chunks of 16 of the 40 maps, then of all; 3 tiles a side.
    for conv_cells, chunk in ((1, 1), (10**9, 10**9)):
        monkeypatch.setattr(blur, "CONV_CELLS", conv_cells)
        monkeypatch.setattr(ssim_moments, "CHUNK_CELLS", chunk)
        blur.blur_for.cache_clear()
        kind = MatrixBlur if conv_cells > 1 else ConvBlur
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


def test_rescale_worked_out():
    x = torch.tensor([[[[1.0, 2.0, 3.0]], [[10.0, 30.0, 50.0]]]])
    per_channel = torch.tensor([0.0, 0.5, 1.0]).expand(1, 2, 1, 3)
    assert_close(rescale(x), per_channel, atol=1e-5, rtol=0)
    assert_close(rescale(x, "image"), (x - 1) / 49, atol=1e-5, rtol=0)
    assert rescale(x, "none") is x
    constant = torch.full((1, 1, 2, 2), 7.0, requires_grad=True)
    result = rescale(constant)
    result.sum().backward()
    assert not result.any() and constant.grad.isfinite().all()
    assert rescale(x.half()).dtype == torch.float32


@pytest.mark.parametrize("scope", ["channel", "image"])
def test_gradient_flows_through_rescale(scope):
    x, _ = maps(2, 3, 3, 4)
    assert gradcheck(lambda x: rescale(x, scope), x.requires_grad_())


def test_rescaled_similarity_is_blind_to_scale_and_offset_of_a_channel():
    x, y = maps(1, 3, 9, 12)
    expected = ssim(rescale(x), rescale(y))
    assert_close(ssim(rescale(5 * x + 3), rescale(y)), expected, atol=1e-5, rtol=0)


def test_blind_share():
    x, y = maps(2, 2, 20, 24, dtype=torch.float32)
    assert blind_share(x, y) == 0
    # A variance of about (1e-3)^2 / 12 on each side against C2 = 9e-4.
    assert blind_share(1e-3 * x, 1e-3 * y) == 1
    assert blind_share(1e-3 * x, 1e-3 * y, data_range=1e-3) == 0
    x[:, 0] = y[:, 0] = 0.5
    share = blind_share(x.bfloat16(), y.bfloat16())
    assert share == 0.5 and share.dtype == torch.float32 and not share.requires_grad


def test_blind_windows_are_those_of_small_variance():
    x, y = (0.05 * z for z in maps(2, 3, 20, 24))
    x[..., :12] = y[..., :12] = 0
    moments = [(plain_mean(z * z) - plain_mean(z) ** 2) for z in (x, y)]
    expected = (sum(moments) < 0.1 * 0.03**2).float().mean()
    assert 0.2 < expected < 0.8
    assert_close(blind_share(x, y), expected)


INTERPRETED = """
import torch
from msad_kd import ssim_moments
from msad_kd.ssim import ssim

torch.set_num_threads(1)
kernels = ssim_moments.ssim_triton
calls = []
similarity = kernels.similarity
kernels.similarity = lambda *args, **kwargs: calls.append(1) or similarity(*args, **kwargs)

def compare(padding, size, reduction, wanted, dtype, window_size):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(1, 2, *size, generator=generator).to(dtype) for _ in range(2))
    results = []
    for ssim_moments.ssim_triton in (kernels, None):
        inputs = [z.clone().requires_grad_(want) for z, want in zip((x, y), wanted)]
        result = ssim(*inputs, padding=padding, reduction=reduction, window_size=window_size)
        (result * torch.linspace(0.1, 1, result.numel()).view(result.shape)).sum().backward()
        results.append([result] + [z.grad for z, want in zip(inputs, wanted) if want])
    # Large terms cancel in the gradient of a window of one cell.
    tolerance = 1e-2 if dtype != torch.float32 else 2e-4 if min(size) == 1 else 1e-5
    for a, b in zip(*results):
        assert a.dtype == b.dtype
        error = (a.float() - b.float()).abs().max() / b.abs().max().clamp(min=1e-3)
        assert error < tolerance, (padding, size, reduction, wanted, dtype, error)

one, other, both = (True, False), (False, True), (True, True)
for padding in ("reflect", "zero", "valid"):
    compare(padding, (1, 7), "mean", one, torch.float32, 11)
    compare(padding, (7, 11), "mean", both, torch.float32, 11)
    compare(padding, (12, 45), "mean", one, torch.bfloat16, 11)
    compare(padding, (24, 30), "none", other, torch.float32, 11)
    compare(padding, (24, 26), "none", both, torch.float16, 5)
assert len(calls) == 3 * (3 + 2 * 2)  # a call for "mean", two for "none"
ssim_moments.ssim_triton = kernels
ssim(torch.rand(1, 1, 40, 40), torch.rand(1, 1, 40, 40), window_size=19)  # no kernel for so large
ssim(torch.rand(1, 1, 9, 9).double(), torch.rand(1, 1, 9, 9))  # nor for fp64
assert len(calls) == 21
"""


def test_triton_kernels_agree_by_the_interpreter():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], cwd=ROOT, env=environment, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("kernel", ["_moments_kernel", "_adjoint_kernel"])
def test_triton_kernels_compile_to_machine_code(kernel, tmp_path, monkeypatch):
    """For a GPU that need not be there: what the interpreter lets pass the compiler may not."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(ssim_moments.ssim_triton, kernel)
    options = {"TILE": 22, "WEIGHTED": True, "STORE_MAP": False, "X_WANTED": True, "Y_WANTED": True}
    options = {name: value for name, value in options.items() if name in function.arg_names}
    # A size of 1 becomes a constant, whose methods are fewer than a number's.
    constants = {"height": 1, "out_height": 1, "tiles_across": 1, **options}
    halves = ("x_pointer", "grad_x_pointer")

    def kind(name):
        if name in constants:
            return "constexpr"
        if name.endswith("pointer"):
            return "*bf16" if name in halves else "*fp32"
        return "fp32" if name in ("c1", "c2") else "i32"

    signature = {name: kind(name) for name in function.arg_names}
    indices = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = triton.compiler.ASTSource(function, signature, indices)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"] and "tf32" not in compiled.asm["ptx"]


def test_without_triton_torch_does_it(monkeypatch):
    expected = ssim_moments.similarity(*maps(1, 2, 9, 9), WINDOW)
    monkeypatch.setitem(sys.modules, "msad_kd.ssim_triton", None)  # importing it fails
    monkeypatch.delattr("msad_kd.ssim_triton", raising=False)
    spec = importlib.util.find_spec("msad_kd.ssim_moments")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "msad_kd.ssim_moments", module)
    spec.loader.exec_module(module)
    assert module.ssim_triton is None
    assert module.similarity(*maps(1, 2, 9, 9), WINDOW) == expected
