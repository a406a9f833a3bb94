#!/usr/bin/env python
"""Tell how near models' features are to what a student should learn, level by level, in Markdown.

    python tools/analysis/compare_features.py --config-file configs/Shapes/student_one_size.yaml \
        --model student output/shapes/student/model_final.pth

The target is what the config's student learns from: KD.TEACHER, at its BRANCH. The models are
checkpoints of the student's net, of the student itself (without its adapters) or of its baselines;
where a multi-resolution teacher has the student's net, its branch of low resolution is measured,
too: that is where the student started. Images are of test size. At each level of the student that
has a partner in the teacher:

    |T|       mean absolute value of the target: what a weight of an lp loss is to be seen beside
    |S - T|   mean absolute difference
    R2        the share of the target's variance that the features explain as they are
    fitted    the share that they explain after the best 1x1 convolution, which is fitted to 80 % of
              the images and measured on the others

A high "fitted" beside a low "R2" is a student that has what the teacher has, in other channels.
"""

import argparse
import gc
import re
import shutil
import tempfile
from pathlib import Path

import torch
from arguments import positive
from feature_files import Measurement
from ladder_pool import STUDENT, build_student
from tabulate import tabulate

from msad_kd import InputError, build_config
from msad_kd.checkpoint.checkpoint import check_exists
from msad_kd.checkpoint.files import write_json
from msad_kd.distill.teacher import Teacher, build_teacher
from msad_kd.ladder.adaptation_cost import ROWS_AT_ONCE, adaptation_cost, training_images
from msad_kd.modeling.multi_resolution import MultiResolutionMixin

TARGET, START = "target", "teacher, LR branch"
ROWS_PER_CHANNEL = 10  # of those that are fitted to; with 2, a tenth of the variance is lost
VALUES = {"distance": "|S - T|", "r2": "R2", "fitted": "fitted"}


def distances(source: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
    """How far features are from the target's, as they are.

    Args:
        source, target: (r, C), the same cells.

    Returns:
        ``distance``, the mean absolute difference, and, if the target varies, ``r2``: 1 - squared
        error / squared deviation of the target from its channels' means.
    """
    mean = sum(t.double().sum(0) for t in target.split(ROWS_AT_ONCE)) / len(target)
    absolute = squared = deviation = 0.0
    for s, t in zip(source.split(ROWS_AT_ONCE), target.split(ROWS_AT_ONCE)):
        error = s.double() - t.double()
        absolute += float(error.abs().sum())
        squared += float(error.square().sum())
        deviation += float((t.double() - mean).square().sum())
    values = {"distance": absolute / target.numel()}
    return values | {"r2": 1 - squared / deviation} if deviation else values


def magnitude(target: torch.Tensor) -> float:
    """Mean absolute value of (r, C)."""
    return sum(float(t.double().abs().sum()) for t in target.split(ROWS_AT_ONCE)) / target.numel()


def compare(measurement: Measurement, stride: int) -> dict[str, float]:
    """The values of the model whose features have just been written, at one level.

    ``distance`` and ``r2`` are absent where the numbers of channels differ, ``fitted`` where rows
    are too few.
    """
    source, target = (measurement.rows(name, stride) for name in (STUDENT, TARGET))
    counts = measurement.counts(stride)
    values = distances(source, target) if source.shape == target.shape else {}
    if counts[: training_images(len(counts))].sum() >= ROWS_PER_CHANNEL * source.shape[1]:
        cost = adaptation_cost({"": (source, target, counts)}, resamples=1)
        values["fitted"] = 1 - cost.value
    return values


def measure(cfg, models, names, args, folder):
    """What is written as JSON.

    Args:
        cfg: the student's.
        models: name to checkpoint.
        names: of the data sets.
        args: the command line.
        folder: for the features, those of two models at a time.

    Raises:
        InputError: as ``Measurement``, ``build_teacher`` and ``build_student``.
    """
    measurement = Measurement(cfg, names, images=args.images, seed=args.seed, folder=folder)
    teacher = build_teacher(cfg)
    levels, found = {}, {}
    for name, weights in [*models.items(), (START, None)]:
        if weights is not None:
            model = build_student(cfg, args.config_file, weights)
        elif isinstance(teacher.model, MultiResolutionMixin) and measurement.one_width():
            model = Teacher(teacher.model, branch="lr", scale=cfg.KD.SCALE)
        else:
            break
        if not levels:
            divisibility = max(1, model.model.backbone.size_divisibility)
            levels = {shape.stride: level for level, shape in model.levels().items()}
            measurement.plan({STUDENT: model.levels(), TARGET: teacher.levels()}, args.cells)
            measurement.add(TARGET, teacher, divisibility)
        measurement.add(STUDENT, model, divisibility)
        for stride in measurement.strides:
            found.setdefault(levels[stride], {})[name] = compare(measurement, stride)
        shutil.rmtree(folder / STUDENT)
        del model
        gc.collect()  # models hold themselves in circles
    keys = cfg.KD.TEACHER
    return {
        "target": {key.lower(): keys[key] for key in ("CONFIG_FILE", "WEIGHTS", "BRANCH")},
        "models": models,
        "data": list(names),
        "images": len(measurement.dicts),
        "cells": measurement.cells,
        "seed": args.seed,
        "magnitude": {
            levels[stride]: magnitude(measurement.rows(TARGET, stride))
            for stride in measurement.strides
        },
        "levels": found,
    }


def markdown(result):
    """The table of ``measure``'s result, and of what it is."""
    rows = []
    for level, entries in result["levels"].items():
        for name, values in entries.items():
            told = [f"{values[key]:.3f}" if key in values else "-" for key in VALUES]
            rows.append([level, f"{result['magnitude'][level]:.3f}", name, *told])
    headings = ["level", "|T|", "model", *VALUES.values()]
    align = ["left", "right", "left", "right", "right", "right"]
    table = tabulate(rows, headings, "pipe", colalign=align, disable_numparse=True)
    return (
        f"{table}\n\n'-': other channels than the target's, or too few cells to fit to. "
        f"{result['images']} images of {', '.join(result['data'])}, up to {result['cells']} cells "
        f"of each at a level, seed {result['seed']}; target: {result['target']['weights']}, branch "
        f"{result['target']['branch']}.\n"
    )


def read_models(given):
    """Name to checkpoint.

    Raises:
        InputError: if a name is used twice or would break the table, or a checkpoint is absent.
    """
    models = {}
    for name, weights in given:
        if not re.fullmatch(r"[^|\n]+", name) or name in models or name == START:
            raise InputError(f"--model {name}: names differ, from '{START}' too, and have no '|'")
        check_exists(weights, f"--model {name}")
        models[name] = weights
    return models


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
    add("--images", type=positive, default=200, help="how many of its images (default: 200)")
    add(
        "--cells",
        type=positive,
        default=1024,
        help="of each image and level, as far as a gigabyte a model takes, of which two are in the "
        "system's temporary folder at a time (default: 1024)",
    )
    add("--seed", type=int, default=0, help="of images and cells")
    add("--json", type=Path, help="write the numbers to this file, too")
    add("opts", nargs="*", help="KEY VALUE pairs on top of the config")
    return parser


def main(args):
    """Runs the command line.

    Raises:
        InputError: as ``read_models`` and ``measure``, and if the split is of no data set.
    """
    cfg = build_config(args.config_file, args.opts)
    models = read_models(args.model)
    names = cfg.DATASETS[args.split.upper()]
    if not names:
        raise InputError(f"no data set is named; set DATASETS.{args.split.upper()}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(cfg, models, names, args, Path(folder))
    print(f"\n{markdown(result)}")
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    arguments = build_parser()
    try:
        main(arguments.parse_args())
    except InputError as error:
        arguments.error(str(error))
