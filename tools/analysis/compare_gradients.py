#!/usr/bin/env python
"""Measure where, and how hard, a student's losses pull at its features, in Markdown.

    python tools/analysis/compare_gradients.py --config-file configs/Shapes/student_one_size.yaml \
        KD.LOSSES "[{'name': 'mse', 'weight': 20.0}, {'name': 'ssim', 'weight': 10.0}]"

On training batches, at a checkpoint or at the student's start, it takes the gradient of each loss
of KD.LOSSES with respect to the features, at the loss's full weight:

    in boxes            share of the squared gradient in cells that an object's box touches
    cells in boxes      share of the cells that an object's box touches
    in 10 % of images   share of the squared gradient in the tenth of the images that have most
    norm                norm of a batch's gradient / norm of the detection losses' gradient, mean

A loss that pulls mostly outside the boxes, or at few images, teaches little about the objects.
"""

from collections import defaultdict
from itertools import islice
from statistics import fmean

import torch
from arguments import parser_for, positive, report
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from tqdm import tqdm

from msad_kd import InputError, KDTrainer, attach_teacher, build_config
from msad_kd.checkpoint.checkpoint import SafeCheckpointer, load_strictly
from msad_kd.checkpoint.start import init_from_teacher
from msad_kd.distill.student import DistilledMixin
from msad_kd.losses.terms import read_losses
from msad_kd.modeling.capture import recording
from msad_kd.utils.seed import seed_all

DETECTION, PREFIX = "detection", "loss_kd_"


def cells_in_boxes(boxes, stride, height, width):
    """Return a mask (height, width) of the cells that boxes touch, on the CPU.

    ``boxes`` is (n, 4), left, top, right, bottom, and ``stride`` a cell's side, both in pixels.
    """
    cells = torch.zeros(height, width, dtype=torch.bool)
    for left, top, right, bottom in (boxes / stride).clamp(min=0).tolist():
        cells[int(top) : -int(-bottom // 1), int(left) : -int(-right // 1)] = True
    return cells


def measure_batch(model, batch):
    """Return the squared gradient by level and loss: (N, 2), each image's sum in all and in boxes.

    The entry "cells" is that of a gradient that is 1 everywhere.
    """
    with recording(model.backbone) as call:
        losses = model(batch)
    names = [DETECTION, *(name for name in losses if name.startswith(PREFIX))]
    totals = {name: losses[name] for name in names[1:]}
    totals[DETECTION] = sum(value for name, value in losses.items() if name not in totals)
    boxes = [sample["instances"].gt_boxes.tensor for sample in batch]
    inside, squares = {}, {}
    for level, features in call.output.items():
        height, width = features.shape[-2:]
        stride = call.inputs[0].shape[-1] / width
        masks = [cells_in_boxes(x, stride, height, width) for x in boxes]
        inside[level] = torch.stack(masks)
        squares[level] = {"cells": _sums(torch.ones(inside[level].shape), inside[level])}
    maps = list(call.output.values())
    for name in names:
        gradients = torch.autograd.grad(totals[name], maps, retain_graph=True, allow_unused=True)
        for level, gradient in zip(call.output, gradients):
            if gradient is not None:  # the loss sees this level
                square = gradient.double().square().sum(1).cpu()
                squares[level][name] = _sums(square, inside[level])
    return squares


def _sums(cells, inside):
    """Sum (N, H, W) over all cells of an image and over those inside: (N, 2)."""
    return torch.stack([cells.sum(dim=(1, 2)), (cells * inside).sum(dim=(1, 2))], dim=1)


def summary(batches, detection=None):
    """Summarise a loss at a level.

    Args:
        batches: (N, 2) of each batch, from ``measure_batch``.
        detection: the same of the detection losses.

    Returns:
        "in_boxes", "in_tenth" and "norm"; None where there is no gradient.
    """
    images = torch.cat(batches)
    total, inside = images.sum(0).tolist()
    most = images[:, 0].sort(descending=True).values[: max(1, round(len(images) / 10))]
    pairs = [(x[:, 0].sum(), y[:, 0].sum()) for x, y in zip(batches, detection or ())]
    ratios = [float((x / y).sqrt()) for x, y in pairs if y > 0]
    return {
        "in_boxes": inside / total if total else None,
        "in_tenth": float(most.sum()) / total if total else None,
        "norm": fmean(ratios) if ratios else None,
    }


def load_student(args):
    """Return a student in training mode, its config and its training batches.

    Raises:
        InputError: if the config is not a student's or has no KD.LOSSES; as ``build_config`` and
            ``load_strictly``.
    """
    cfg = build_config(args.config_file, args.opts)
    cfg.DATASETS.UNLABELED = []  # the gradients are compared in and outside of labelled boxes
    cfg.SOLVER.ACCUMULATE = 1  # each batch is one pass
    cfg.SEED = max(cfg.SEED, 0)  # for the same images and new modules in every run
    seed_all(cfg.SEED)
    model = KDTrainer.build_model(cfg)
    if not isinstance(model, DistilledMixin) or not read_losses(cfg.KD.LOSSES):
        raise InputError(f"'{args.config_file}' is not the config of a student with KD.LOSSES")
    teacher = attach_teacher(model, cfg)
    if args.weights:
        load_strictly(model, args.weights, f"the config '{args.config_file}'")
    else:
        SafeCheckpointer(model).load(cfg.MODEL.WEIGHTS)
        if cfg.KD.TEACHER.INIT_STUDENT:
            init_from_teacher(model, teacher.model, backbone=cfg.KD.TEACHER.INIT_BACKBONE)
    batches = KDTrainer.build_train_loader(cfg)
    seed_all(cfg.SEED)
    return model.train(), cfg, tqdm(islice(batches, args.batches), total=args.batches)


def settings_of(args, cfg):
    """Return what identifies a measurement, for the JSON file."""
    settings = {"config": args.config_file, "weights": args.weights, "losses": cfg.KD.LOSSES}
    return settings | {"batches": args.batches, "images": cfg.SOLVER.IMS_PER_BATCH}


def measure(args):
    """Return what is written as JSON; see ``load_student``."""
    model, cfg, batches = load_student(args)
    values = defaultdict(lambda: defaultdict(list))
    # At an iteration at which all weights have warmed up.
    with EventStorage(max(term.warmup_iters for term in read_losses(cfg.KD.LOSSES))):
        for batch in batches:
            for level, entries in measure_batch(model, batch).items():
                for name, squares in entries.items():
                    values[level][name].append(squares)
    levels = {}
    for level, entries in values.items():
        cells = summary(entries.pop("cells"))["in_boxes"]
        losses = {
            name.removeprefix(PREFIX): summary(squares, entries.get(DETECTION))
            for name, squares in entries.items()
        }
        levels[level] = {"cells": cells, "losses": losses}
    return {**settings_of(args, cfg), "levels": levels}


def source_of(result):
    """Tell on what a result was measured, for the note under a table."""
    weights = f"'{result['weights']}'" if result["weights"] else "the student's start"
    images = f"{result['batches']} training batches of {result['images']} images"
    return f"{images}; weights: {weights}.\n"


def markdown(result):
    """Return the result of ``measure`` as a table with a note."""
    rows = []
    for level, entry in result["levels"].items():
        for name, loss in entry["losses"].items():
            shares = loss["in_boxes"], entry["cells"], loss["in_tenth"]
            cells = [*((x, ".2f") for x in shares), (loss["norm"], ".2g")]  # norms differ by powers
            rows.append([level, name, *("-" if x is None else f"{x:{how}}" for x, how in cells)])
    headings = ["level", "loss", "in boxes", "cells in boxes", "in 10 % of images", "norm"]
    align = ["left", "left", "right", "right", "right", "right"]
    table = tabulate(rows, headings, "pipe", colalign=align, disable_numparse=True)
    note = "Shares of the squared gradient; its norm / that of the detection losses."
    return f"{table}\n\n{note} {source_of(result)}"


def build_parser(doc):
    """Return the parser of a measurement on a student's training batches, with this docstring."""
    parser = parser_for(doc, "the student's config")
    parser.add_argument("--weights", default="", help="its checkpoint; default: its start")
    batches = "training batches (default: 8)"
    parser.add_argument("--batches", type=positive, default=8, help=batches)
    return parser


if __name__ == "__main__":
    report(build_parser(__doc__), measure, markdown)
