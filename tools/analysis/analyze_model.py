#!/usr/bin/env python
"""Print a model's multiply-adds, parameters and activations by part, in Markdown.

    python tools/analysis/analyze_model.py \
        --config-file configs/COCO/mask_rcnn_R_50_FPN_teacher_1x.yaml

It takes any config: a multi-resolution teacher (each of its branches), a high- or low-resolution
model, or a student (which costs the same as its low-resolution baseline). All images have the same
number of detections, so a cost does not depend on what the model finds, nor on its weights.
"""

import math
import os
import tempfile
from collections import Counter

import cv2
import numpy as np
import torch
from arguments import parser_for, positive, report
from detectron2.data import get_detection_dataset_dicts
from fvcore.nn import parameter_count
from tabulate import tabulate
from torch.utils.flop_counter import FlopCounterMode

from msad_kd import InputError, KDTrainer, build_config
from msad_kd.data.dict_checks import explain_missing_data
from msad_kd.data.mapper import build_mapper
from msad_kd.evaluation.cost import counting_flops, fix_detections, input_sides
from msad_kd.modeling.multi_resolution import BRANCHES, MultiResolutionMixin

# Part to the module that computes it; "FPN" is the backbone without its bottom-up path.
PARTS = {
    "bottom-up": "backbone.bottom_up",
    "FPN": "backbone",
    "fusion": "fusion",
    "RPN": "proposal_generator",
    "RoI heads": "roi_heads",
    "dense head": "head",
}
WHOLE = "Global"  # the counters' name for the whole model


def cost_by_part(model, inputs):
    """Return the costs of a detector's parts.

    Args:
        model: a detector in eval mode.
        inputs: mapped samples; GMACs and activations are means over them.

    Returns:
        "params_m" (millions), "gmacs" and "activations_m" (millions), each a dict of the PARTS
        that the model has, "rest" and "total".
    """
    params = {name or WHOLE: count / 1e6 for name, count in parameter_count(model).items()}
    gmacs, activations = Counter(), Counter()
    aten = torch.ops.aten
    sizes = dict.fromkeys((aten.convolution, aten.addmm, aten.mm, aten.bmm), _output_size)
    for image in inputs:
        outputs = FlopCounterMode(display=False, custom_mapping=sizes)
        with counting_flops() as macs, outputs:
            model([image])
        for total, counter, unit in ((gmacs, macs, 2e9), (activations, outputs, 1e6)):
            for name, counts in counter.get_flop_counts().items():
                count = sum(n for op, n in counts.items() if counter is macs or op in sizes)
                # The root's class precedes the names of its modules.
                total[name.partition(".")[2] or name] += count / unit / len(inputs)
    names = {name for name, _ in model.named_modules()}
    costs = {"params_m": params, "gmacs": gmacs, "activations_m": activations}
    return {kind: _by_part(names, cost) for kind, cost in costs.items()}


def _output_size(*args, out_shape, **kwargs):
    return math.prod(out_shape)


def _by_part(names, cost):
    parts = {part: cost.get(path, 0.0) for part, path in PARTS.items() if path in names}
    if "bottom-up" in parts:
        parts["FPN"] -= parts["bottom-up"]
    elif "FPN" in parts:  # a backbone in one piece, without an FPN
        parts = {"backbone": parts.pop("FPN"), **parts}
    parts["rest"] = max(0.0, cost[WHOLE] - sum(parts.values()))
    return {**parts, "total": cost[WHOLE]}


def read_inputs(cfg, count, size):
    """Return mapped test images, or one mapped image of noise.

    Args:
        cfg: the config.
        count: how many of the first test images; None for noise.
        size: (height, width) of the noise in pixels, before it is resized.

    Raises:
        InputError: if the data set is missing.
    """
    mapper = build_mapper(cfg, is_train=False)
    if count is None:
        height, width = size
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "noise.png")
            cv2.imwrite(path, noise)
            return [mapper({"file_name": path, "height": height, "width": width})]
    names = cfg.DATASETS.TEST
    if not names:
        raise InputError("--test-images: the config names no data set; set DATASETS.TEST")
    with explain_missing_data(names):
        dicts = get_detection_dataset_dicts(names[:1], filter_empty=False)
    return [mapper(entry) for entry in dicts[:count]]


def analyze(args):
    """Return what is written as JSON.

    Its "branches" are the costs by branch, or by "" for a model without branches.

    Raises:
        InputError: as ``build_config``, ``load_strictly`` and ``read_inputs``.
    """
    cfg = fix_detections(build_config(args.config_file, args.opts), args.detections)
    model = KDTrainer.load_model(cfg, args.weights or None, f"the config '{args.config_file}'")
    inputs = read_inputs(cfg, args.test_images, args.image_size)
    branches = {}
    for branch in BRANCHES if isinstance(model, MultiResolutionMixin) else ("",):
        if branch:
            model.test_branch = branch
        costs = cost_by_part(model, inputs)
        branches[branch] = {**costs, "side": input_sides(inputs[0], branch or None)}
    settings = {"config": args.config_file, "weights": args.weights, "detections": args.detections}
    return {**settings, "images": len(inputs), "branches": branches}


def markdown(result):
    """Return the result of ``analyze`` as a table with a note."""
    branches = result["branches"]
    first, *_ = branches.values()
    headings = ["part", "params (M)"]
    for name in branches:
        headings += [f"{kind} {name}".strip() for kind in ("GMACs", "activations (M)")]
    rows = []
    for part in first["gmacs"]:
        row = [part, f"{first['params_m'][part]:.3f}"]
        for costs in branches.values():
            row += [f"{costs[kind][part]:.3f}" for kind in ("gmacs", "activations_m")]
        rows.append(row)
    align = ["left", *["right"] * (len(headings) - 1)]
    table = tabulate(rows, headings, "pipe", colalign=align, disable_numparse=True)
    sides = "; ".join(f"{name or 'the model'}: {x['side']} px" for name, x in branches.items())
    return (
        f"{table}\n\nPer image at {result['detections']} detections, mean over {result['images']}. "
        f"Shorter sides of the images: {sides}. GMACs: 10^9 multiply-adds of convolutions and "
        "matrix products. Activations: the numbers that these put out.\n"
    )


def main(arguments=None):
    """Run the command line; an expected error ends it with one sentence."""
    parser = parser_for(__doc__, "the model's config")
    add = parser.add_argument
    add("--weights", default="", help="its checkpoint; without it, weights are random")
    add("--detections", type=positive, default=10, help="detections per image (default: 10)")
    add("--test-images", type=positive, help="how many of DATASETS.TEST to use; default: noise")
    noise = "size of the noise image in pixels, before it is resized (default: 480 640)"
    add("--image-size", type=positive, nargs=2, default=(480, 640), metavar=("H", "W"), help=noise)
    report(parser, analyze, markdown, arguments)


if __name__ == "__main__":
    main()
