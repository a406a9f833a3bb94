"""SSIM's Triton kernels, and what happens without Triton.

The interpreter has to be chosen before they are imported, so they run in a process of their own.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
from helpers import ROOT
from ssim_reference import maps

from msad_kd.losses.ssim import moments

WINDOW = moments.Window(size=5, sigma=1.5, c1=1e-4, c2=9e-4, padding="reflect")

INTERPRETED = """
import torch
from msad_kd.losses.ssim import moments, ssim

torch.set_num_threads(1)
kernels = moments.ssim_triton
calls = []
similarity = kernels.similarity
kernels.similarity = lambda *args, **kwargs: calls.append(1) or similarity(*args, **kwargs)

def compare(padding, size, reduction, wanted, dtype, window_size):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(1, 2, *size, generator=generator).to(dtype) for _ in range(2))
    results = []
    for moments.ssim_triton in (kernels, None):
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
    compare(padding, (12, 28), "none", other, torch.float32, 11)
compare("reflect", (12, 45), "mean", one, torch.bfloat16, 11)
compare("valid", (24, 26), "none", both, torch.float16, 5)
assert len(calls) == 3 * (2 + 2) + 1 + 2  # a call for "mean", two for "none"
moments.ssim_triton = kernels
ssim(torch.rand(1, 1, 40, 40), torch.rand(1, 1, 40, 40), window_size=19)  # no kernel for so large
ssim(torch.rand(1, 1, 9, 9).double(), torch.rand(1, 1, 9, 9))  # nor for fp64
assert len(calls) == 15
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
    function = getattr(moments.ssim_triton, kernel)
    # A size of 1 becomes a constant, whose methods are fewer than a number's.
    sizes = {"height": 1, "out_height": 1, "tiles_across": 1, "TILE": 22}
    constants = {**sizes, "WEIGHTED": True, "STORE_MAP": False, "X_WANTED": True, "Y_WANTED": True}
    constants = {name: x for name, x in constants.items() if name in function.arg_names}

    def kind(name):
        if name in constants:
            return "constexpr"
        if name.endswith("pointer"):
            return "*bf16" if name in ("x_pointer", "grad_x_pointer") else "*fp32"
        return "fp32" if name in ("c1", "c2") else "i32"

    signature = {name: kind(name) for name in function.arg_names}
    indices = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = triton.compiler.ASTSource(function, signature, indices)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"] and "tf32" not in compiled.asm["ptx"]


def test_without_triton_torch_does_it(monkeypatch):
    expected = moments.similarity(*maps(1, 2, 9, 9), WINDOW)
    monkeypatch.setitem(sys.modules, "msad_kd.losses.ssim.triton", None)  # importing it fails
    monkeypatch.delattr("msad_kd.losses.ssim.triton", raising=False)
    spec = importlib.util.find_spec("msad_kd.losses.ssim.moments")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "msad_kd.losses.ssim.moments", module)
    spec.loader.exec_module(module)
    assert module.ssim_triton is None
    assert module.similarity(*maps(1, 2, 9, 9), WINDOW) == expected
