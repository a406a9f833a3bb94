#!/usr/bin/env python
"""Time our SSIM against kornia, torchmetrics, pytorch-msssim and piqa, for each one's paddings.

    python tools/analysis/benchmark_ssim.py --output output/ssim.md
    python tools/analysis/benchmark_ssim.py --shapes 7x11 13x21 --dtypes float32 --blurs

It measures forward and backward of the loss with a gradient for one input, on maps of the size of
the levels P2 to P6 of a 400x672 and an 800x1344 image. Every round calls all implementations in
random order, and the ratio peer / ours is taken within a round, so that a longer disturbance of the
machine hits both. The report has the median ratio and its quartiles. The memory is all that the
graph holds from forward to backward, inputs included, in units of one fp32 input. The output is
Markdown, and JSON of the same name. --profile prints where the time goes instead.
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

import numpy as np
import torch
from arguments import run
from kornia.losses import ssim_loss as kornia_loss
from piqa.ssim import ssim as piqa_ssim
from piqa.utils.functional import gaussian_kernel
from pytorch_msssim import ssim as msssim_ssim
from ssim_benchmark_report import markdown, write
from torch.profiler import ProfilerActivity, profile
from torchmetrics.functional.image import structural_similarity_index_measure
from tqdm import tqdm

from msad_kd.losses.ssim import blur, ssim_loss

# H and W of P2 to P6 at strides 4 to 64.
SHAPES = ["7x11", "13x21", "25x42", "50x84", "100x168", "200x336"]
MIN_SECONDS = 0.01  # a shorter call is repeated within a round
PACKAGES = ["torch", "kornia", "torchmetrics", "pytorch-msssim", "piqa"]


def piqa(x, y, padding):
    """Return PIQA's similarity of each channel by itself, averaged."""
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
    """Wait until the device of x has finished its work."""
    if x.is_cuda:
        torch.cuda.synchronize()


def seconds(function, x, y, calls=1):
    """Return the mean time of a forward and backward."""
    synchronise(x)
    start = time.perf_counter()
    for _ in range(calls):
        x.grad = None
        function(x, y).backward()
    synchronise(x)
    return (time.perf_counter() - start) / calls


def kept(function, x, y):
    """Return the bytes that the graph holds before the backward, over those of x in fp32."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function(x, y)
    result.backward()
    return sum(storages.values()) / (4 * x.numel())


def failure(function, x, y):
    """Return the reason why a peer cannot compute this map, or None."""
    with warnings.catch_warnings():
        # pytorch-msssim does not blur an axis shorter than its window, which is another function.
        warnings.filterwarnings("error", message="Skipping Gaussian")
        try:
            function(x, y).backward()
        except Exception as error:
            return " ".join(str(error).split())[:80]


def spread(values):
    """Return the median and the quartiles."""
    return np.percentile(values, (50, 25, 75)).tolist()


def maps(args, device, dtype, shape):
    """Return two random maps (N, C, H, W) in [0, 1), the first with a gradient."""
    generator = torch.Generator().manual_seed(0)
    size = args.batch, args.channels, *map(int, shape.split("x"))
    x, y = (torch.rand(size, generator=generator).to(device, dtype) for _ in range(2))
    return x.requires_grad_(), y


def contestants(x, y, padding):
    """Return ours and the peers that can compute these maps, and why the others cannot."""
    reasons = {name: failure(function, x, y) for name, function in PEERS[padding].items()}
    functions = {name: PEERS[padding][name] for name, why in reasons.items() if not why}
    functions = {"ours": lambda x, y: ssim_loss(x, y, padding=padding), **functions}
    return functions, {name: why for name, why in reasons.items() if why}


def measure(args, device, dtype, shape, padding, progress):
    """Return the rows of one shape and padding, one for each peer."""
    x, y = maps(args, device, getattr(torch, dtype), shape)
    place = {"device": device, "dtype": dtype, "shape": shape, "padding": padding}
    place["maps"] = args.batch * args.channels
    functions, reasons = contestants(x, y, padding)
    rows = [{**place, "peer": name, "cannot": why} for name, why in reasons.items()]
    names = list(functions)
    memory = {name: kept(functions[name], x, y) for name in names}
    calls = {n: max(1, int(MIN_SECONDS / seconds(functions[n], x, y))) for n in names}
    times = {name: [] for name in names}
    for _ in range(args.rounds):
        random.shuffle(names)
        for name in names:
            times[name].append(seconds(functions[name], x, y, calls[name]))
        progress.update()
    for name in [name for name in functions if name != "ours"]:
        row = {**place, "peer": name}
        row["ours_ms"], row["peer_ms"] = (
            [1e3 * t for t in spread(times[side])] for side in ("ours", name)
        )
        row["ratio"] = spread([peer / ours for peer, ours in zip(times[name], times["ours"])])
        rows.append({**row, "ours_kept": memory["ours"], "peer_kept": memory[name]})
    return rows


def measure_blurs(args, shape, padding):
    """Return the times of both blurs for one shape, by which CONV_CELLS was chosen."""
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
    row = {"shape": shape, "maps": args.batch * args.channels, "padding": padding}
    row["conv_over_matrix"] = spread(ratios)
    return {**row, **{f"{name}_ms": 1e3 * statistics.median(t[1:]) for name, t in times.items()}}


def print_profiles(args, device, dtype, shape, padding, progress):
    """Print torch's profile of each implementation, of all rounds together."""
    x, y = maps(args, device, getattr(torch, dtype), shape)
    activities = [getattr(ProfilerActivity, name) for name in {"CPU", device.upper()}]
    for name, function in contestants(x, y, padding)[0].items():
        seconds(function, x, y)
        with profile(activities=activities) as profiler:
            seconds(function, x, y, args.rounds)
        order = f"self_{device}_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=8, max_src_column_width=0)
        progress.write(f"{name}, {device} {dtype} {shape} {padding}\n{table}")
    progress.update(args.rounds)


def machine():
    """Return what the numbers depend on: processor or GPU, threads, versions."""
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
    """Measure all cases, and write or print the report."""
    if args.quick:
        args.shapes, args.dtypes = ["7x11", "13x21"], ["float32"]
        args.rounds, args.channels, args.devices = 2, 16, ["cpu"]
    torch.set_num_threads(args.threads)
    random.seed(0)
    # As in training: once a large block was freed, malloc keeps the memory of smaller ones.
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
            if args.profile:
                print_profiles(args, *case, progress)
            else:
                content["rows"] += measure(args, *case, progress)
    if args.profile:
        return
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
    parser.add_argument("--profile", action="store_true", help="print torch's profiles, no report")
    parser.add_argument("--output", metavar="FILE.md", help="write there, and FILE.json")
    parser.add_argument("--add", action="store_true", help="keep FILE.json's other rows")
    parser.add_argument("--quick", action="store_true", help="two small maps on the CPU, 2 rounds")
    run(parser, main)
