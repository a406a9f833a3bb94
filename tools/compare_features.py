#!/usr/bin/env python
"""Tell how near models' features are to what a student should learn, level by level, in Markdown.

    python tools/compare_features.py --config-file configs/Shapes/student.yaml \
        --model control output/shapes/lr_from_teacher/model_final.pth \
        --model student output/shapes/student/model_final.pth

The target is the teacher of the config: its KD.TEACHER, and the branch that says. A model is any
checkpoint of the student's net: the student itself (what an adapter would add is not counted), its
baseline, the teacher's weights. For each level that both have:

    |T|       mean absolute value of the target: what a weight of an lp loss is to be seen beside
    |S - T|   mean absolute difference
    R2        the share of the target's variance that the features explain as they are
    fitted    the same after the best 1x1 convolution, on images that it was not fitted to

A high "fitted" beside a low "R2" is a student that has what the teacher has, in other channels.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from feature_files import Measurement
from ladder_pool import build_student
from tabulate import tabulate

from msad_kd import InputError, build_config
from msad_kd.pyramid import in_high_resolution
from msad_kd.sampling import read_features
from msad_kd.teacher import build_teacher, teacher_levels

TARGET = "target"
FIELDS = ("distance", "r2", "fitted")


def distances(source: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
    """How far features are from the target's, as they are.

    Args:
        source, target: (r, C), the same cells.

    Returns:
        ``distance``, the mean absolute difference, and ``r2``, 1 - squared error / squared
        deviation of the target from its channels' means.
    """
    error = (source - target).double()
    deviation = (target - target.mean(0)).double()
    r2 = 1 - error.square().sum() / deviation.square().sum()
    return {"distance": float(error.abs().mean()), "r2": float(r2)}


def measure(cfg, models, names, args, folder):
    """Level name to the target's mean absolute value and each model's distances.

    Args:
        cfg: the student's.
        models: name to checkpoint.
        names: of the data sets.
        args: the command line, for ``images``, ``cells`` and ``seed``.
        folder: for the features.

    Raises:
        InputError: if weights, a data set or a common level are absent.
    """
    measurement = Measurement(cfg, names, images=args.images, seed=args.seed, folder=folder)
    target = teacher_levels(cfg)
    teacher = build_teacher(cfg)
    cfg.KD.LOSSES = []  # so that the student's net is built without parts of losses
    for name, weights in models.items():
        model = build_student(cfg, args.config_file, weights)
        if name == next(iter(models)):
            divisibility = max(1, model.model.backbone.size_divisibility)
            levels = in_high_resolution(model.model.backbone.output_shape(), cfg.KD.SCALE)
            measurement.plan({TARGET: target} | dict.fromkeys(models, levels), args.cells)
            measurement.add(TARGET, teacher, divisibility)
        measurement.add(name, model, divisibility)
        del model
        gc.collect()  # models hold themselves in circles
    own = {shape.stride: (level, shape.channels) for level, shape in levels.items()}
    channels = measurement.channels[TARGET]
    found = {}
    for stride in measurement.strides:
        values = read_features(folder / TARGET, stride, channels)
        level, width = own[stride]
        found[level] = {TARGET: {"magnitude": float(values.abs().mean())}}
        for name in models:
            source = read_features(folder / name, stride, width)
            found[level][name] = distances(source, values) if width == channels else {}
    costs = measurement.costs(list(models), [TARGET])
    for name in models:
        for stride in measurement.strides:  # those that have rows enough
            cost = costs[name][TARGET].levels[f"stride {stride}"]
            found[own[stride][0]][name]["fitted"] = 1 - cost
    return found, len(measurement.dicts)


def markdown(found):
    """The table of ``measure``'s levels."""
    headings = ["level", "|T|", "model", "|S - T|", "R2", "fitted"]
    rows = []
    for level, entries in found.items():
        for name, values in entries.items():
            if name == TARGET:
                magnitude = f"{values['magnitude']:.3f}"
                continue
            told = [f"{values[key]:.3f}" if key in values else "-" for key in FIELDS]
            rows.append([level, magnitude, name, *told])
    align = ["left", "right", "left", "right", "right", "right"]
    return tabulate(rows, headings, "pipe", colalign=align, disable_numparse=True)


def build_parser():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--config-file", required=True, help="the student's config")
    add(
        "--model",
        nargs=2,
        action="append",
        required=True,
        metavar=("NAME", "WEIGHTS"),
        help="a checkpoint of the student's net; give several",
    )
    add("--split", choices=("test", "train"), default="test", help="DATASETS.TEST or TRAIN")
    add("--images", type=int, default=200, help="how many of its images (default: 200)")
    add("--cells", type=int, default=1024, help="of each image and level (default: 1024)")
    add("--seed", type=int, default=0, help="of images and cells")
    add("--json", help="write the numbers to this file, too")
    add("opts", nargs="*", help="KEY VALUE pairs on top of the config")
    return parser


def main(args):
    """Runs the command line.

    Raises:
        InputError: as ``measure``, and if two models have one name.
    """
    cfg = build_config(args.config_file, args.opts)
    models = dict(args.model)
    if len(models) < len(args.model) or TARGET in models:
        raise InputError(f"--model: names are to differ, and none is '{TARGET}'")
    names = cfg.DATASETS.TEST if args.split == "test" else cfg.DATASETS.TRAIN
    with tempfile.TemporaryDirectory() as folder:
        found, images = measure(cfg, models, names, args, Path(folder))
    print(f"\n{markdown(found)}\n\n{images} images of {', '.join(names)}, seed {args.seed}.")
    if args.json:
        result = {"images": images, "data": list(names), "seed": args.seed, "levels": found}
        part = f"{args.json}.part"
        with open(part, "w") as file:
            json.dump(result, file, indent=2)
        os.replace(part, args.json)  # the file is complete or it isn't there


if __name__ == "__main__":
    arguments = build_parser()
    try:
        main(arguments.parse_args())
    except InputError as error:
        arguments.error(str(error))
