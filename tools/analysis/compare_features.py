#!/usr/bin/env python
"""Measure how near models' features are to what a student should learn, in Markdown.

    python tools/analysis/compare_features.py --config-file configs/Shapes/student_one_size.yaml \
        --model student output/shapes/student_multi_size/model_final.pth

The target is what the config's student learns from: branch KD.TEACHER.BRANCH of its teacher. The
models are checkpoints of the student's net: students (their adapters are ignored) or baselines. If
a multi-resolution teacher has the student's net, its low-resolution branch, from which the student
started, is measured too. Images have the test size. Every level that student and teacher share has
these values:

    |T|       mean absolute value of the target's features, the scale of an lp loss
    |S - T|   mean absolute difference between the model's features and the target's
    R2        share of the target's variance that the model's features explain as they are
    fitted    share that they explain after the best 1x1 convolution, fitted to 80 % of the images
              and measured on the others

A high "fitted" beside a low "R2" means that the model has the target's content in other channels.
"""

import gc
import re
import shutil
import tempfile
from pathlib import Path

import torch
from adaptation_cost import ROWS_AT_ONCE, adaptation_cost, training_images
from arguments import parser_for, positive, report
from feature_files import Measurement
from ladder_pool import STUDENT, build_student
from tabulate import tabulate

from msad_kd import InputError, build_config
from msad_kd.checkpoint.checkpoint import check_exists
from msad_kd.distill.teacher import Teacher
from msad_kd.distill.teacher_spec import TeacherSpec
from msad_kd.modeling.multi_resolution import MultiResolutionMixin

TARGET, START = "target", "teacher, LR branch"
ROWS_PER_CHANNEL = 10  # needed to fit; with only 2, a tenth of the variance is lost
VALUES = {"distance": "|S - T|", "r2": "R2", "fitted": "fitted"}
LEGEND = (
    "|T|: mean absolute value of the target's features. |S - T|: mean absolute difference of the "
    "model's features from them. R2: share of the target's variance that the model's features "
    "explain (1 is best). fitted: the same after the best 1x1 convolution. '-': the model has "
    "another number of channels than the target, or too few cells to fit."
)


def distances(source: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
    """Compare features with the target's as they are.

    Args:
        source: features, (r, C).
        target: the target's features at the same cells, (r, C).

    Returns:
        "distance", the mean absolute difference, and, if the target varies, "r2": 1 - squared
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
    """Return the mean absolute value of features, (r, C)."""
    return sum(float(t.double().abs().sum()) for t in target.split(ROWS_AT_ONCE)) / target.numel()


def values_of(measurement: Measurement, stride: int) -> dict[str, float]:
    """Return the values at one level of the model whose features were written last.

    "distance" and "r2" are missing if the numbers of channels differ, "fitted" if there are too
    few rows.
    """
    source, target = (measurement.rows(name, stride) for name in (STUDENT, TARGET))
    counts = measurement.counts(stride)
    values = distances(source, target) if source.shape == target.shape else {}
    if counts[: training_images(len(counts))].sum() >= ROWS_PER_CHANNEL * source.shape[1]:
        cost = adaptation_cost({"": (source, target, counts)}, resamples=1)
        values["fitted"] = 1 - cost.value
    return values


def compare(args):
    """Return what is written as JSON.

    Raises:
        InputError: as ``read_models`` and ``measure``, and if the split names no data set.
    """
    cfg = build_config(args.config_file, args.opts)
    models = read_models(args.model)
    names = cfg.DATASETS[args.split.upper()]
    if not names:
        raise InputError(f"no data set is named; set DATASETS.{args.split.upper()}")
    with tempfile.TemporaryDirectory() as folder:
        return measure(cfg, models, names, args, Path(folder))


def measure(cfg, models, names, args, folder):
    """Return what is written as JSON.

    Args:
        cfg: the student's config.
        models: checkpoints by name.
        names: the data sets.
        args: the command line.
        folder: the folder for the features, of two models at a time.

    Raises:
        InputError: as ``Measurement``, ``TeacherSpec`` and ``build_student``.
    """
    measurement = Measurement(cfg, names, images=args.images, seed=args.seed, folder=folder)
    teacher = TeacherSpec.from_config(cfg).build()
    levels, values = {}, {}
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
        measurement.add(STUDENT, model, divisibility, label=name)
        for stride in measurement.strides:
            values.setdefault(levels[stride], {})[name] = values_of(measurement, stride)
        shutil.rmtree(folder / STUDENT)
        del model
        gc.collect()  # models contain reference cycles
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
        "levels": values,
    }


def markdown(result):
    """Return the result of ``measure`` as a table with a legend."""
    rows = []
    for level, entries in result["levels"].items():
        for name, values in entries.items():
            cells = [f"{values[key]:.3f}" if key in values else "-" for key in VALUES]
            rows.append([level, f"{result['magnitude'][level]:.3f}", name, *cells])
    headings = ["level", "|T|", "model", *VALUES.values()]
    align = ["left", "right", "left", "right", "right", "right"]
    table = tabulate(rows, headings, "pipe", colalign=align, disable_numparse=True)
    return (
        f"{table}\n\n{LEGEND} Target: branch {result['target']['branch']} of "
        f"{result['target']['weights']}. {result['images']} images of {', '.join(result['data'])}, "
        f"up to {result['cells']} cells per image and level, seed {result['seed']}.\n"
    )


def read_models(given):
    """Return checkpoints by name.

    Raises:
        InputError: if a name is used twice or would break the table, or a checkpoint is missing.
    """
    models = {}
    for name, weights in given:
        if not re.fullmatch(r"[^|\n]+", name) or name in models or name == START:
            raise InputError(
                f"--model {name}: names must differ, also from '{START}', and have no '|'"
            )
        check_exists(weights, f"--model {name}")
        models[name] = weights
    return models


def main(arguments=None):
    """Run the command line; an expected error ends it with one sentence."""
    parser = parser_for(__doc__, "the student's config")
    add = parser.add_argument
    model = {"nargs": 2, "action": "append", "metavar": ("NAME", "WEIGHTS"), "required": True}
    add("--model", **model, help="a checkpoint of the student's net; may be repeated")
    add("--split", choices=("test", "train"), default="test", help="DATASETS.TEST or TRAIN")
    add("--images", type=positive, default=200, help="how many of its images (default: 200)")
    cells = "most cells per image and level (default: 1024); a model's features take at most a "
    cells += "gigabyte of the temporary folder, and those of two models are there at a time"
    add("--cells", type=positive, default=1024, help=cells)
    add("--seed", type=int, default=0, help="decides images and cells (default: 0)")
    report(parser, compare, markdown, arguments)


if __name__ == "__main__":
    main()
