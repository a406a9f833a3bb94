"""What a model costs at inference: multiply-adds, parameters, activations, latency.

A multiply-add is one MAC; GMACs are 10^9 of them, in convolutions and matrix products.
Activations are the numbers that convolutions and matrix products put out.
"""

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable

import torch
from detectron2.config import CfgNode
from fvcore.nn import parameter_count
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

WARM_UP_ROUNDS = 2

# Part to the module that computes it; "FPN" is the backbone without its bottom-up path.
_PARTS = {
    "bottom-up": "backbone.bottom_up",
    "FPN": "backbone",
    "fusion": "fusion",
    "RPN": "proposal_generator",
    "RoI heads": "roi_heads",
    "dense head": "head",
}
_WHOLE = "Global"  # the counters' name for the whole model


def fix_detections(cfg: CfgNode, detections: int) -> CfgNode:
    """Return a config whose model keeps the same number of detections in every image.

    A mask head runs once a detection, so the cost of a model would depend on what it finds: an
    untrained one, sure of nothing, may keep many more boxes than a trained one. Here the best
    boxes count as detections whatever their scores and overlaps, and RPNs keep their best
    proposals likewise. Use the config to measure costs, not AP. NMS then sees every class of every
    proposal; with COCO's 80 classes that adds some 0.2 s on a CPU to each model's latency.

    Args:
        cfg: the config; it stays as it is.
        detections: how many an image. Fewer remain only if an image has fewer candidates.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.TEST.DETECTIONS_PER_IMAGE = detections
    cfg.MODEL.RPN.NMS_THRESH = 1.0
    cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE = -1  # keeps proposals that lie outside the image, too
    for head in (cfg.MODEL.ROI_HEADS, cfg.MODEL.RETINANET, cfg.MODEL.FCOS):
        head.SCORE_THRESH_TEST = -1.0  # keeps a probability that was rounded to 0, too
        head.NMS_THRESH_TEST = 1.0
    return cfg


def device_name(cfg: CfgNode) -> str:
    """Return the GPU's name, or "no GPU"."""
    if cfg.MODEL.DEVICE.startswith("cuda"):
        return torch.cuda.get_device_name(torch.device(cfg.MODEL.DEVICE))
    return "no GPU"


def input_sides(inputs: dict, branch: str | None) -> str:
    """Return the shorter sides of the images that a model reads, in pixels, e.g. "128 + 64".

    Args:
        inputs: a mapped sample with ``image`` and perhaps ``image_lr``.
        branch: the branch of a multi-resolution teacher; None for another model.
    """
    high, low = inputs["image"], inputs.get("image_lr")
    images = {"hr": [high], "lr": [low]}.get(branch, [high, low]) if low is not None else [high]
    return " + ".join(str(min(image.shape[-2:])) for image in images)


def count_gmacs(model: Callable, inputs: list[dict]) -> float:
    """Return the GMACs of a whole model, mean over the images.

    The number of detections decides the cost of a mask head; see ``fix_detections``.
    """
    return _count(model, inputs)[0][_WHOLE]


def cost_by_part(model: nn.Module, inputs: list[dict]) -> dict[str, dict[str, float]]:
    """Return the costs of a detector's parts.

    Args:
        model: a detector in eval mode.
        inputs: mapped samples; GMACs and activations are means over them.

    Returns:
        "params_m" (millions, without those that only training needs), "gmacs" and "activations_m"
        (millions), each a dict: bottom-up, FPN (or backbone), fusion, RPN, RoI heads and dense
        head, as far as the model has them, the rest and the total.
    """
    gmacs, activations = _count(model, inputs)
    params = {name: count / 1e6 for name, count in parameter_count(model).items()}
    params[_WHOLE] = params[""] - params.get("distiller", 0)
    names = {name for name, _ in model.named_modules()}
    costs = {"params_m": params, "gmacs": gmacs, "activations_m": activations}
    return {kind: _by_part(names, cost) for kind, cost in costs.items()}


def _count(model: Callable, inputs: list[dict]) -> tuple[Counter, Counter]:
    """Return GMACs and millions of activations by module, mean over the images."""

    def size(*args, out_shape, **kwargs):
        return math.prod(out_shape)

    aten = torch.ops.aten
    sizes = dict.fromkeys((aten.convolution, aten.addmm, aten.mm, aten.bmm), size)
    gmacs, activations = Counter(), Counter()
    for image in inputs:
        macs = FlopCounterMode(display=False)
        outputs = FlopCounterMode(display=False, custom_mapping=sizes)
        with torch.no_grad(), macs, outputs:
            model([image])
        # A multiply-add is two of torch's FLOPs.
        for total, counter, unit in ((gmacs, macs, 2e9), (activations, outputs, 1e6)):
            for name, counts in counter.get_flop_counts().items():
                count = sum(n for op, n in counts.items() if counter is macs or op in sizes)
                # The root's class precedes the names of its modules.
                total[name.partition(".")[2] or name] += count / unit / len(inputs)
    return gmacs, activations


def _by_part(modules: set[str], cost: dict[str, float]) -> dict[str, float]:
    parts = {part: cost.get(path, 0.0) for part, path in _PARTS.items() if path in modules}
    if "bottom-up" in parts:
        parts["FPN"] -= parts["bottom-up"]
    elif "FPN" in parts:  # a backbone in one piece, without an FPN
        parts = {"backbone": parts.pop("FPN"), **parts}
    parts["rest"] = max(0.0, cost[_WHOLE] - sum(parts.values()))
    return {**parts, "total": cost[_WHOLE]}


def time_models(
    models: dict[str, Callable],
    inputs: dict[str, list],
    after_round: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, float]]:
    """Time models from the resized image to the finished detections, batch size 1.

    Every round shows each model the same image and begins with another model, so that other load
    on the machine hits all of them alike.

    Args:
        models: by name.
        inputs: by name, one mapped sample a round.
        after_round: called after each round.

    Returns:
        By name, in milliseconds: "median", and the lower and upper quartile "low" and "high".
    """
    names = list(models)
    times = {name: [] for name in names}
    rounds = len(inputs[names[0]])
    with torch.no_grad():
        for turn in range(-WARM_UP_ROUNDS, rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                batch = [inputs[name][turn % rounds]]
                _synchronize()
                start = time.perf_counter()
                models[name](batch)
                _synchronize()
                if turn >= 0:
                    times[name].append(1000 * (time.perf_counter() - start))
            if turn >= 0:
                after_round()
    return {name: _quartiles(values) for name, values in times.items()}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _quartiles(values: list[float]) -> dict[str, float]:
    if len(values) == 1:
        values = values * 2
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}
