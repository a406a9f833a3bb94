"""What a model costs at inference: multiply-adds, parameters, activations, latency.

A multiply-add is one MAC; GMACs are 10^9 of them, those of convolutions and matrix products.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable

import torch
from detectron2.config import CfgNode
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from msad_kd.checkpoint.checkpoint import TRAINING_PREFIX

__all__ = ["count_gmacs", "cost_by_part", "device_name", "input_sides", "time_models"]

WARM_UP_ROUNDS = 2

# Part to the module that does it; `backbone` is counted without its `bottom_up`.
_PARTS = {
    "bottom-up": "backbone.bottom_up",
    "FPN": "backbone",
    "fusion": "fusion",
    "RPN": "proposal_generator",
    "RoI heads": "roi_heads",
    "dense head": "head",
}
_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


def device_name(cfg: CfgNode) -> str:
    """The GPU's name, or "no GPU"."""
    if cfg.MODEL.DEVICE.startswith("cuda"):
        return torch.cuda.get_device_name(torch.device(cfg.MODEL.DEVICE))
    return "no GPU"


def input_sides(inputs: dict, branch: str | None) -> str:
    """The shorter sides, in pixels, of the images that a model looks at, as text.

    Args:
        inputs: mapped data with ``image`` and perhaps ``image_lr``.
        branch: that of a multi-resolution teacher; None for another model.
    """
    high, low = inputs["image"], inputs.get("image_lr")
    seen = {"hr": [high], "lr": [low]}.get(branch, [high, low]) if low is not None else [high]
    return " + ".join(str(min(image.shape[-2:])) for image in seen)


def count_gmacs(model: Callable, inputs: list[dict]) -> float:
    """GMACs of one image, heads included.

    It is the mean over the inputs: how many objects a model finds decides what its mask head costs.
    """
    counts = []
    for image in inputs:
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            model([image])
        counts.append(counter.get_total_flops() / 2e9)  # a multiply-add is two of torch's FLOPs
    return statistics.fmean(counts)


def cost_by_part(model: nn.Module, inputs: list[dict]) -> dict[str, dict[str, float]]:
    """What the parts of a detector cost, each with a "total" at the end.

    Args:
        model: a detector in eval mode.
        inputs: mapped images; all but the parameters are means over them.

    Returns:
        "params_m": millions of parameters, without those that only training needs; "gmacs";
        "activations_m": millions of numbers that convolutions and linear layers put out. Each by
        part: bottom-up, FPN (or backbone), fusion, RPN, RoI heads, dense head, as far as there are
        such, and the rest.
    """
    macs, activations = Counter(), Counter()

    def keep(name):
        def hook(_, __, output):
            if isinstance(output, torch.Tensor):  # one that is skipped answers None
                for path in _ancestors(name):
                    activations[path] += output.numel() / len(inputs) / 1e6

        return hook

    layers = [(name, each) for name, each in model.named_modules() if isinstance(each, _LAYERS)]
    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers]
    try:
        for image in inputs:
            counter = FlopCounterMode(display=False)
            with torch.no_grad(), counter:
                model([image])
            for name, counts in counter.get_flop_counts().items():
                path = "" if name == "Global" else name.partition(".")[2] or None
                if path is not None:
                    macs[path] += sum(counts.values()) / 2e9 / len(inputs)
    finally:
        for handle in handles:
            handle.remove()
    params = Counter()
    for name, parameter in model.named_parameters():
        if not name.startswith(TRAINING_PREFIX):
            for path in _ancestors(name):
                params[path] += parameter.numel() / 1e6
    totals = {"params_m": params, "gmacs": macs, "activations_m": activations}
    return {kind: _by_part(model, total) for kind, total in totals.items()}


def _ancestors(name: str) -> list[str]:
    """The dotted paths that a name lies in: "a.b" to "", "a" and "a.b"."""
    words = name.split(".")
    return ["", *(".".join(words[: end + 1]) for end in range(len(words)))]


def _by_part(model: nn.Module, total: Counter) -> dict[str, float]:
    names = {name for name, _ in model.named_modules()}
    parts = {part: total[path] for part, path in _PARTS.items() if path in names}
    if "bottom-up" in parts:
        parts["FPN"] -= parts["bottom-up"]
    elif "FPN" in parts:  # it is none, but a backbone of one piece
        parts = {"backbone": parts.pop("FPN"), **parts}
    parts["rest"] = max(0.0, total[""] - sum(parts.values()))
    return {**parts, "total": total[""]}


def time_models(
    models: dict[str, Callable],
    inputs: dict[str, list],
    after_round: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, float]]:
    """Milliseconds from the resized image to the finished detections, batch size 1.

    Each round shows every model the same image, and begins with another model, so that whatever
    else the machine does falls on all of them alike.

    Args:
        models: by name.
        inputs: by name, a list with one entry a round.
        after_round: is called after each round.

    Returns:
        by name: "median", and the lower and upper quartile "low" and "high".
    """
    names = list(models)
    times = {name: [] for name in names}
    rounds = len(inputs[names[0]])
    with torch.no_grad():
        for turn in range(-WARM_UP_ROUNDS, rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                batch = [inputs[name][turn % rounds]]
                _finish()
                start = time.perf_counter()
                models[name](batch)
                _finish()
                if turn >= 0:
                    times[name].append(1000 * (time.perf_counter() - start))
            if turn >= 0:
                after_round()
    return {name: _quartiles(values) for name, values in times.items()}


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _quartiles(values: list[float]) -> dict[str, float]:
    if len(values) == 1:
        values = values * 2
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}
