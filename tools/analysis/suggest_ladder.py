#!/usr/bin/env python
"""Suggest an order of teachers for a student, MTPD-style, and write it as KD.LADDER.STAGES.

    python tools/analysis/suggest_ladder.py \
        --student configs/COCO/mask_rcnn_R_50_FPN_student_1x.yaml output/lr/model_final.pth \
        --teacher fused configs/COCO/mask_rcnn_R_50_FPN_teacher_1x.yaml output/fused.pth \
        --teacher swin_t configs/COCO/mask_rcnn_Swin_T_FPN_HR_3x.yaml output/swin_t.pth \
        --ap fused=40.1 --ap swin_t=46.0

It measures the adaptation cost (tools/analysis/adaptation_cost.py) between all models on training
images, with one model in memory at a time, and selects teachers backward from the strongest one. It
prints the costs, the stages, and why it leaves teachers out. OUTPUT gets ladder.json, ladder.png (a
heat map) and stages.yaml.
"""

import argparse
import copy
import gc
import os
import tempfile
from pathlib import Path

from adaptation_cost import greedy_order
from arguments import positive, run
from feature_files import Measurement
from ladder_pool import STUDENT, Entry, build_student, evaluate, known_aps, read_teachers
from ladder_report import report

from msad_kd import InputError, build_config
from msad_kd.modeling.pyramid import in_high_resolution


def ladder_stages(order: list[str], entries: list[Entry], settings: dict) -> list[dict]:
    """Return KD.LADDER.STAGES of teachers in this order; ``settings`` are fields of every stage."""
    teachers = {entry.name: entry.stage for entry in entries}
    stages = [{**teachers[name], **copy.deepcopy(settings), "start": "previous"} for name in order]
    # A fused teacher has the student's architecture; of another, only neck and heads may fit.
    stages[0]["start"] = "teacher" if stages[0]["kind"] == "fused" else "teacher_heads"
    return stages


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add, several = parser.add_argument, {"action": "append", "default": []}
    student = "config and trained weights of a distilled student or its LR baseline"
    add("--student", nargs="+", required=True, metavar=("CONFIG", "WEIGHTS"), help=student)
    teacher = "a teacher of the pool, and KEY VALUE pairs that override its config; repeat it"
    name = "NAME CONFIG WEIGHTS"
    add("--teacher", nargs="+", action="append", required=True, metavar=name, help=teacher)
    image = "the image a single-resolution teacher reads: hr (default) or lr"
    add("--image", **several, metavar="NAME=lr", help=image)
    ap = "a teacher's box AP (default: TEST.EXPECTED_RESULTS of its config, or an evaluation)"
    add("--ap", **several, metavar="NAME=AP", help=ap)
    add("--images", type=positive, default=2000, help="training images (default: %(default)s)")
    cells = "cells per image and level, as far as they fit into 1 GB per model (default: 64)"
    add("--cells", type=positive, default=64, help=cells)
    add("--iterations", type=positive, help="of each stage (default: SOLVER.MAX_ITER)")
    add("--seed", type=int, default=0, help="of images, cells and intervals (default: 0)")
    add("--output", default="output/suggest_ladder", help="folder to write (default: %(default)s)")
    add("--opts", nargs="*", default=[], help="KEY VALUE pairs that override the student's config")
    return parser


def main(args):
    """Measure the costs between all models, and write the report and the stages."""
    config_file, weights, *rest = args.student + [""] * (2 - len(args.student))
    if rest:
        raise InputError("--student: give CONFIG and, if you have them, WEIGHTS")
    # Unscaled, as the run that uses the stages scales its own schedule to its processes.
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
                "Warning: the student has no trained weights, so its costs are those of "
                f"MODEL.WEIGHTS '{cfg.MODEL.WEIGHTS}', with a random neck if these lack one"
            )
        shapes = in_high_resolution(student.model.backbone.output_shape(), cfg.KD.SCALE)
        levels = {STUDENT: shapes, **{entry.name: entry.levels for entry in entries}}
        measurement.plan(levels, args.cells)
        divisibility = max(1, student.model.backbone.size_divisibility)
        measurement.add(STUDENT, student, divisibility)
        del student
        for entry in entries:
            gc.collect()  # models are in reference cycles
            try:
                teacher = entry.spec.build()
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
    facts = {"images": len(measurement.dicts), "cells": measurement.cells}
    facts |= {"strides": measurement.strides, "seed": args.seed, "ap": aps}
    stages = ladder_stages(order, entries, settings)
    report(Path(args.output), costs, order, excluded, stages, facts)


if __name__ == "__main__":
    run(build_parser(), main)
