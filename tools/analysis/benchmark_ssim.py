#!/usr/bin/env python
"""Time our SSIM against kornia, torchmetrics, pytorch-msssim and piqa, each with its own padding.

    python tools/analysis/benchmark_ssim.py --output output/ssim.md
    python tools/analysis/benchmark_ssim.py --shapes 7x11 13x21 --dtypes float32 --blurs

Forward and backward of the loss for one input, on maps of the pyramid's levels P2 to P6 of a
400x672 and of an 800x1344 image (P3 to P6 of the second are P2 to P5 of the first). In every round
all take their turn, in an order drawn anew, and the ratio peer / ours is taken within the round:
what disturbs the machine for longer than a round disturbs both. Reported are the median ratio and
its quartiles. The memory is all that the graph holds from the forward to the backward, the inputs
too where it holds them, in units of one fp32 input. Writes Markdown, and JSON of the same name.
"""

import argparse
import os
import platform
import random
import statistics
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from kornia.losses import ssim_loss as kornia_loss
from piqa.ssim import ssim as piqa_ssim
from piqa.utils.functional import gaussian_kernel
from pytorch_msssim import ssim as msssim_ssim
from ssim_benchmark_report import markdown, write
from torchmetrics.functional.image import structural_similarity_index_measure
from tqdm import tqdm

from msad_kd.losses.ssim import blur
from msad_kd.losses.ssim.functional import ssim_loss
from msad_kd.utils.errors import InputError

# H and W of P2 to P6 at strides 4 to 64.
SHAPES = ["7x11", "13x21", "25x42", "50x84", "100x168", "200x336"]
MIN_SECONDS = 0.01  # a shorter call is repeated within a round
PACKAGES = ["torch", "kornia", "torchmetrics", "pytorch-msssim", "piqa"]


def piqa(x, y, padding):
    """PIQA's mean similarity of each channel by itself."""
    kernel = gaussian_kernel(11, 1.5).to(x).repeat(x.shape[1], 1, 1)
    return piqa_ssim(x, y, kernel, padding=padding)[0].mean()


PEERS = {
    "reflect": {
        "kornia": lambda x, y: kornia_loss(x, y, 11),
        "torchmetrics": lambda x, y: structural_similarity_index_measure(x, y, data_range=1.0),
    },
    "valid": {
        "kornia": lambda x, y: kornia_loss(x, y, 11, padding="valid"),
        "pytorch-msssim": lambda x, y: msssim_ssim(x, y, data_range=1.0),
        "piqa": lambda x, y: piqa(x, y, False),
    },
    "zero": {"piqa": lambda x, y: piqa(x, y, True)},
}


def synchronise(x):
    """Waits until what was begun on the device of x is done."""
    if x.is_cuda:
        torch.cuda.synchronize()


def seconds(function, x, y, calls=1):
    """Mean time of a forward and backward."""
    synchronise(x)
    start = time.perf_counter()
    for _ in range(calls):
        x.grad = None
        function(x, y).backward()
    synchronise(x)
    return (time.perf_counter() - start) / calls


def kept(function, x, y):
    """Bytes that the graph holds between forward and backward, over those of x in fp32."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function(x, y)
    result.backward()
    return sum(storages.values()) / (4 * x.numel())


def works(function, x, y):
    """None, or the reason why it can't do this map."""
    with warnings.catch_warnings():
        # pytorch-msssim blurs no axis that is shorter than its window: another function, then.
        warnings.filterwarnings("error", message="Skipping Gaussian")
        try:
            function(x, y).backward()
        except Exception as error:
            return " ".join(str(error).split())[:80]


def spread(values):
    """Median and quartiles."""
    if len(values) == 1:
        return [values[0]] * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return [middle, low, high]


def maps(args, device, dtype, shape):
    """Two random maps (N, C, H, W) in [0, 1), the first of which wants a gradient."""
    generator = torch.Generator().manual_seed(0)
    size = args.batch, args.channels, *map(int, shape.split("x"))
    x, y = (torch.rand(size, generator=generator).to(device, dtype) for _ in range(2))
    return x.requires_grad_(), y


def measure(args, device, dtype, shape, padding, progress):
    """Rows of one shape and padding, one a peer."""
    x, y = maps(args, device, getattr(torch, dtype), shape)
    place = {"device": device, "dtype": dtype, "shape": shape, "padding": padding}
    place["maps"] = args.batch * args.channels
    functions, rows = {"ours": lambda x, y: ssim_loss(x, y, padding=padding)}, []
    for name, function in PEERS[padding].items():
        reason = works(function, x, y)
        if reason is None:
            functions[name] = function
        else:
            rows.append({**place, "peer": name, "cannot": reason})
    times, memory, calls = {}, {}, {}
    for name, function in functions.items():
        memory[name] = kept(function, x, y)
        calls[name] = max(1, int(MIN_SECONDS / seconds(function, x, y)))
        times[name] = []
    names = list(functions)
    for _ in range(args.rounds):
        random.shuffle(names)
        for name in names:
            times[name].append(seconds(functions[name], x, y, calls[name]))
        progress.update()
    for name in PEERS[padding]:
        if name in functions:
            ratios = [peer / ours for peer, ours in zip(times[name], times["ours"])]
            rows.append(
                {
                    **place,
                    "peer": name,
                    "ours_ms": [1e3 * t for t in spread(times["ours"])],
                    "peer_ms": [1e3 * t for t in spread(times[name])],
                    "ratio": spread(ratios),
                    "ours_kept": memory["ours"],
                    "peer_kept": memory[name],
                }
            )
    return rows


def measure_blurs(args, shape, padding):
    """Ours with either blur, whatever the size of the map: where CONV_CELLS comes from."""
    x, y = maps(args, "cpu", torch.float32, shape)
    usual, times = blur.CONV_CELLS, {"matrix": [], "conv": []}
    for _ in range(args.rounds + 1):
        for name, cells in (("matrix", float("inf")), ("conv", 0)):
            blur.CONV_CELLS = cells
            blur.blur_for.cache_clear()
            seconds(lambda x, y: ssim_loss(x, y, padding=padding), x, y)
            times[name].append(seconds(lambda x, y: ssim_loss(x, y, padding=padding), x, y, 3))
    blur.CONV_CELLS = usual
    blur.blur_for.cache_clear()
    ratios = [conv / matrix for conv, matrix in zip(times["conv"][1:], times["matrix"][1:])]
    row = {
        "shape": shape,
        "maps": args.batch * args.channels,
        "padding": padding,
        "conv_over_matrix": spread(ratios),
    }
    return {**row, **{f"{name}_ms": 1e3 * statistics.median(t[1:]) for name, t in times.items()}}


def machine():
    """What the numbers depend on: processor or GPU, threads, versions."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        name = next(line.split(":")[1] for line in text.splitlines() if "model name" in line)
    except (OSError, StopIteration):
        name = platform.processor()
    result = {"cpu": name.strip(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        result["gpu"] = torch.cuda.get_device_name()
    return {**result, "python": platform.python_version(), **{p: version(p) for p in PACKAGES}}


def main(args):
    """Measures every case in turn, and writes or prints the report."""
    if args.quick:
        args.shapes, args.dtypes = ["7x11", "13x21"], ["float32"]
        args.rounds, args.channels, args.devices = 2, 16, ["cpu"]
    torch.set_num_threads(args.threads)
    random.seed(0)
    # As in any training: once a large block was freed, malloc keeps what smaller ones return.
    torch.empty(2**25 - 2**16, dtype=torch.uint8)
    devices = [d for d in args.devices if d == "cpu" or torch.cuda.is_available()]
    content = {"machine": machine(), "rows": [], "blurs": []}
    cases = [
        (device, dtype, shape, padding)
        for device in devices
        for dtype in args.dtypes
        for shape in args.shapes
        for padding in PEERS
    ]
    with tqdm(total=len(cases) * args.rounds, unit="round") as progress:
        for case in cases:
            progress.set_description(" ".join(case))
            content["rows"] += measure(args, *case, progress)
    if args.blurs:
        for shape in tqdm(args.shapes, desc="blurs"):
            content["blurs"] += [measure_blurs(args, shape, padding) for padding in PEERS]
    if args.output is None:
        print(markdown(content))
    else:
        print(write(Path(args.output), content, add=args.add))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="*", default=SHAPES, metavar="HxW", help="maps")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--devices", nargs="+", default=["cpu", "cuda"], choices=["cpu", "cuda"])
    parser.add_argument("--batch", type=int, default=1, help="images")
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--blurs", action="store_true", help="compare our two CPU blurs too")
    parser.add_argument("--output", metavar="FILE.md", help="write there, and FILE.json")
    parser.add_argument("--add", action="store_true", help="keep FILE.json's other rows")
    parser.add_argument("--quick", action="store_true", help="two small maps on the CPU, 2 rounds")
    try:
        main(parser.parse_args())
    except InputError as error:
        parser.error(str(error))
