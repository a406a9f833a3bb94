#!/usr/bin/env python
r"""Tell where a model's multiply-adds, parameters and activations are, in Markdown.

    python tools/analysis/analyze_model.py \
        --config-file configs/COCO/mask_rcnn_R_50_FPN_teacher_1x.yaml

takes any config: a multi-resolution teacher (each of its branches by itself), a high- or
low-resolution model, a student (which costs what its low-resolution baseline costs).

Without --test-images the model sees one picture of noise. Masks are made of detections only, so
give --weights and --test-images where their cost counts.
"""

import argparse
import copy
import os
import tempfile

import cv2
import numpy as np
import torch
from arguments import positive
from detectron2.data import get_detection_dataset_dicts
from tabulate import tabulate

from msad_kd import InputError, KDTrainer, build_config
from msad_kd.checkpoint.files import write_json
from msad_kd.data.loader import clear_absence, clear_errors
from msad_kd.data.mapper import build_mapper
from msad_kd.evaluation.cost import cost_by_part, input_sides
from msad_kd.modeling.multi_resolution import BRANCHES, MultiResolutionMixin


def read_inputs(cfg, count, size):
    """Mapped images.

    Args:
        cfg: the config.
        count: how many of the first test images; None for one image of noise.
        size: (height, width) of that, before it is resized, in pixels.

    Raises:
        InputError: if the data set is absent.
    """
    mapper = clear_errors(build_mapper(cfg, is_train=False))
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
    with clear_absence(names):
        dicts = get_detection_dataset_dicts(names[:1], filter_empty=False)
    return [mapper(copy.deepcopy(each)) for each in dicts[:count]]


def analyze(args):
    """What is written as JSON; "branches" has the costs by branch, "" where a model has none.

    Raises:
        InputError: as ``build_config``, ``load_strictly`` and ``read_inputs``.
    """
    cfg = build_config(args.config_file, args.opts)
    model = KDTrainer.load_model(cfg, args.weights or None, f"the config '{args.config_file}'")
    inputs = read_inputs(cfg, args.test_images, args.image_size)
    found = {}
    for branch in BRANCHES if isinstance(model, MultiResolutionMixin) else ("",):
        if branch:
            model.test_branch = branch
        costs = cost_by_part(model, inputs)
        with torch.no_grad():
            detections = [len(model([each])[0]["instances"]) for each in inputs]
        costs["side"] = input_sides(inputs[0], branch or None)
        costs["detections"] = sum(detections) / len(detections)
        found[branch] = costs
    told = {"config": args.config_file, "weights": args.weights, "images": len(inputs)}
    return {**told, "branches": found}


def markdown(result):
    """The table of ``analyze``'s result, and what it counts."""
    branches = result["branches"]
    first, *_ = branches.values()
    headings = ["part", "params (M)"]
    for name in branches:
        headings += [f"{kind} {name}".strip() for kind in ("GMACs", "activations (M)")]
    rows = []
    for part in first["gmacs"]:
        row = [part, f"{first['params_m'][part]:.3f}"]
        for each in branches.values():
            row += [f"{each[kind][part]:.3f}" for kind in ("gmacs", "activations_m")]
        rows.append(row)
    align = ["left", *["right"] * (len(headings) - 1)]
    table = tabulate(rows, headings, "pipe", colalign=align, disable_numparse=True)
    seen = "; ".join(
        f"{name or 'the model'} sees {each['side']} px and finds {each['detections']:.0f} objects"
        for name, each in branches.items()
    )
    weights = f"of '{result['weights']}'" if result["weights"] else "random"
    return (
        f"{table}\n\nPer image, mean over {result['images']}; weights {weights}: {seen}. GMACs: "
        "multiply-adds of convolutions and matrix products. Activations: the numbers that "
        "convolutions and linear layers put out.\n"
    )


def main(arguments=None):
    """Runs the command line; an expected error ends it with one sentence."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--config-file", required=True, help="the model's config")
    add("--weights", default="", help="its checkpoint; random weights without")
    add("--test-images", type=positive, help="use this many of DATASETS.TEST")
    noise = "of the picture of noise, in pixels, before it is resized"
    add("--image-size", type=positive, nargs=2, default=(480, 640), metavar=("H", "W"), help=noise)
    add("--json", help="write the numbers to this file, too")
    add("opts", nargs="*", help="KEY VALUE pairs on top of the config")
    args = parser.parse_args(arguments)
    try:
        result = analyze(args)
    except InputError as error:
        parser.error(str(error))
    print(markdown(result))
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
