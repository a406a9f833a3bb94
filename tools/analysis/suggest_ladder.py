#!/usr/bin/env python
"""Suggest an order of teachers for a student, MTPD-style, and write it as KD.LADDER.STAGES.

    python tools/analysis/suggest_ladder.py \
        --student configs/COCO/mask_rcnn_R_50_FPN_student_1x.yaml output/lr/model_final.pth \
        --teacher fused configs/COCO/mask_rcnn_R_50_FPN_teacher_1x.yaml output/fused.pth \
        --teacher swin_t configs/COCO/mask_rcnn_Swin_T_FPN_HR_3x.yaml output/swin_t.pth \
        --ap fused=40.1 --ap swin_t=46.0

It measures how hard it is to predict each model's features from each other's on training images
(msad_kd/ladder/adaptation_cost.py), one model in memory at a time, and selects backward from the
strongest teacher.
It prints the costs, the teachers left out and why, and the stages; OUTPUT gets all of it as
ladder.json, a heat map ladder.png and stages.yaml.
"""

import argparse
import copy
import gc
import os
import tempfile
from pathlib import Path

from arguments import positive
from feature_files import Measurement
from ladder_pool import STUDENT, Entry, build_student, evaluate, known_aps, read_teachers
from ladder_report import report

from msad_kd import InputError, build_config
from msad_kd.distill.teacher import build_teacher
from msad_kd.ladder.adaptation_cost import greedy_order
from msad_kd.modeling.pyramid import in_high_resolution


def ladder_stages(order: list[str], entries: list[Entry], settings: dict) -> list[dict]:
    """KD.LADDER.STAGES; the first starts from its teacher, every other from the student before."""
    stages = []
    for name in order:
        stage = next(entry.stage for entry in entries if entry.name == name)
        # A fused teacher is the student's net; of another only neck and heads may fit.
        first = "teacher" if stage["kind"] == "fused" else "teacher_heads"
        start = "previous" if stages else first
        stages.append({**stage, **copy.deepcopy(settings), "start": start})
    return stages


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--student",
        nargs="+",
        required=True,
        metavar=("CONFIG", "WEIGHTS"),
        help="its config, and weights it has been trained to; a distilled student or its baseline",
    )
    parser.add_argument(
        "--teacher",
        nargs="+",
        action="append",
        required=True,
        metavar="NAME CONFIG WEIGHTS",
        help="one of the pool, with KEY VALUE pairs on top of its config; give several",
    )
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="NAME=lr",
        help="the image a single-resolution teacher reads, hr (default) or lr",
    )
    parser.add_argument(
        "--ap",
        action="append",
        default=[],
        metavar="NAME=AP",
        help="a teacher's box AP; else TEST.EXPECTED_RESULTS of its config, else it is evaluated",
    )
    parser.add_argument(
        "--images", type=positive, default=2000, help="training images (default: 2000)"
    )
    parser.add_argument(
        "--cells",
        type=positive,
        default=64,
        help="cells of each image and level, as far as a gigabyte a model takes (default: 64)",
    )
    parser.add_argument("--iterations", type=positive, help="of each stage; else SOLVER.MAX_ITER")
    parser.add_argument("--seed", type=int, default=0, help="of images, cells and the interval")
    parser.add_argument("--output", default="output/suggest_ladder", help="the folder to write")
    parser.add_argument(
        "--opts", nargs="*", default=[], help="KEY VALUE pairs on top of the student's config"
    )
    return parser


def main(args):
    """Measures the costs between all models, and writes the report and the stages."""
    config_file, weights, *rest = args.student + [""] * (2 - len(args.student))
    if rest:
        raise InputError("--student: give CONFIG and, if there are any, WEIGHTS")
    # Without scaling to the processes here: the stages are for a run of as many as the config's.
    cfg = build_config(config_file, ["SOLVER.REFERENCE_WORLD_SIZE", 0, *args.opts])
    entries = read_teachers(args.teacher, args.image, cfg)
    aps = known_aps(args.ap, entries)
    os.makedirs(args.output, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output) as folder:
        measurement = Measurement(
            cfg, cfg.DATASETS.TRAIN, images=args.images, seed=args.seed, folder=Path(folder)
        )
        student = build_student(cfg, config_file, weights)
        if not weights:
            print(
                "Warning: no weights of the student are given, so its distances are those of "
                f"MODEL.WEIGHTS '{cfg.MODEL.WEIGHTS}', and of a random neck if that has none"
            )
        shapes = in_high_resolution(student.model.backbone.output_shape(), cfg.KD.SCALE)
        levels = {STUDENT: shapes, **{entry.name: entry.levels for entry in entries}}
        measurement.plan(levels, args.cells)
        divisibility = max(1, student.model.backbone.size_divisibility)
        measurement.add(STUDENT, student, divisibility)
        del student
        for entry in entries:
            gc.collect()  # models hold themselves in circles
            try:
                teacher = build_teacher(entry.cfg)
            except InputError as error:
                raise InputError(f"--teacher {entry.name}: {error}") from error
            measurement.add(entry.name, teacher, divisibility)
            if entry.name not in aps and len(entries) > 1:
                aps[entry.name] = evaluate(entry, teacher, folder)
            del teacher
        costs = measurement.costs()
    strongest = max((entry.name for entry in entries), key=lambda name: aps.get(name, 0.0))
    values = {a: {b: cost.value for b, cost in row.items()} for a, row in costs.items()}
    order, excluded = greedy_order(values, STUDENT, strongest)
    settings = {
        "losses": cfg.KD.LOSSES,
        "iterations": args.iterations or cfg.SOLVER.MAX_ITER,
        "base_lr": cfg.SOLVER.BASE_LR,
    }
    stages = ladder_stages(order, entries, settings)
    facts = {"images": len(measurement.dicts), "cells": measurement.cells}
    facts |= {"strides": measurement.strides, "seed": args.seed, "ap": aps}
    report(Path(args.output), costs, order, excluded, stages, facts)


if __name__ == "__main__":
    arguments = build_parser()
    try:
        main(arguments.parse_args())
    except InputError as error:
        arguments.error(str(error))
