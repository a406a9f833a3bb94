"""What a model costs at inference: multiply-adds and latency.

GMACs are 10^9 multiply-adds of convolutions and matrix products, those of attention included.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from detectron2.config import CfgNode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

WARM_UP_ROUNDS = 2


def fix_detections(cfg: CfgNode, detections: int) -> CfgNode:
    """Return a config whose model keeps the same number of detections in every image.

    A mask head runs once per detection, so a model's cost depends on what it finds. Here the best
    boxes and proposals are kept whatever their scores and overlaps, for costs, not for AP. NMS sees
    every class of every proposal: 0.2 s more on a CPU with COCO's 80 classes.

    Args:
        cfg: the config; it stays as it is.
        detections: how many per image; fewer remain only if an image has fewer candidates.
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
    device = torch.device(cfg.MODEL.DEVICE)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"


def input_sides(inputs: dict, branch: str | None) -> str:
    """Return the shorter sides of a sample's images that a model reads, in pixels: "128 + 64".

    ``branch`` is that of a multi-resolution teacher, None for another model.
    """
    high, low = inputs["image"], inputs.get("image_lr")
    images = {"hr": [high], "lr": [low]}.get(branch, [high, low]) if low is not None else [high]
    return " + ".join(str(min(image.shape[-2:])) for image in images)


@contextmanager
def counting_flops() -> Iterator[FlopCounterMode]:
    """Count FLOPs without gradients: torch's counter, with what it leaves out on a CPU.

    A multiply-add is two FLOPs.
    """
    # Of the teacher's large 1x1 convolutions; see modeling/inference.py.
    more = {torch.ops.aten.mkldnn_convolution: _convolution}
    # Other kernels of attention are counted on GPUs alone.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False, custom_mapping=more) as counter:
            yield counter


def _convolution(x, weight, *_, out_shape=None, **__):
    return conv_flop_count(x, weight, out_shape)


def count_gmacs(model: Callable, inputs: list[dict]) -> float:
    """Return the GMACs of a model, mean over the images; see ``fix_detections``."""
    gmacs = []
    for image in inputs:
        with counting_flops() as counter:
            model([image])
        gmacs.append(counter.get_total_flops() / 2e9)
    return statistics.fmean(gmacs)


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
    quartiles = {name: np.percentile(values, (25, 50, 75)) for name, values in times.items()}
    return {n: dict(zip(("low", "median", "high"), q.tolist())) for n, q in quartiles.items()}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
