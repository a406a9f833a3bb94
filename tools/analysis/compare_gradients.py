#!/usr/bin/env python
"""Tell where a student's losses pull at its features, and how hard, level by level, in Markdown.

    python tools/analysis/compare_gradients.py --config-file configs/Shapes/student_one_size.yaml \
        KD.LOSSES "[{'name': 'mse', 'weight': 20.0}, {'name': 'ssim', 'weight': 10.0}]"

On training batches, at a checkpoint or where the student starts, by the gradient of each loss of
KD.LOSSES, at its full weight, with respect to the features:

    in boxes         the share of its square that lies in cells which an object's box touches;
                     beside it the share of these cells
    in 10 % images   the share that lies in the tenth of the images that have most
    norm             of a batch, as a share of that of the detection losses' gradient; mean

A loss that pulls mostly outside the boxes, or at few images, teaches little of the objects.
"""

import argparse
from collections import defaultdict
from itertools import islice
from pathlib import Path
from statistics import fmean

import torch
from arguments import positive
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from tqdm import tqdm

from msad_kd import InputError, KDTrainer, attach_teacher, build_config
from msad_kd.checkpoint.checkpoint import check_exists, init_from_teacher, load_strictly
from msad_kd.checkpoint.files import write_json
from msad_kd.distill.student import DistilledMixin
from msad_kd.losses.terms import read_losses
from msad_kd.modeling.capture import recording
from msad_kd.modeling.pyramid import cells_in_boxes
from msad_kd.utils.seed import seed_all

DETECTION, PREFIX = "detection", "loss_kd_"


def measure_batch(model, batch):
    """The square of each loss's gradient: level to loss to (N, 2), of an image in all and in boxes.

    Under "cells" stands the same of a gradient that is 1 everywhere.
    """
    with recording(model.backbone) as call:
        losses = model(batch)
    names = [DETECTION, *(name for name in losses if name.startswith(PREFIX))]
    totals = {name: losses[name] for name in names[1:]}
    totals[DETECTION] = sum(value for name, value in losses.items() if name not in totals)
    boxes = [each["instances"].gt_boxes.tensor for each in batch]
    inside, found = {}, {}
    for level, features in call.output.items():
        height, width = features.shape[-2:]
        stride = call.inputs[0].shape[-1] / width
        masks = [cells_in_boxes(each, stride, height, width) for each in boxes]
        inside[level] = torch.stack(masks)
        found[level] = {"cells": _sums(torch.ones(inside[level].shape), inside[level])}
    maps = list(call.output.values())
    for name in names:
        gradients = torch.autograd.grad(totals[name], maps, retain_graph=True, allow_unused=True)
        for level, gradient in zip(call.output, gradients):
            if gradient is not None:  # as it is of a level that the loss does not see
                square = gradient.double().square().sum(1).cpu()
                found[level][name] = _sums(square, inside[level])
    return found


def _sums(cells, inside):
    """Of (N, H, W): (N, 2), each image's sum in all and over the cells inside."""
    return torch.stack([cells.sum(dim=(1, 2)), (cells * inside).sum(dim=(1, 2))], dim=1)


def summary(batches, detection=None):
    """What is told of a loss at a level.

    Args:
        batches: of each batch (N, 2), from ``measure_batch``.
        detection: those of the detection losses.

    Returns:
        dict of ``in_boxes``, ``in_tenth`` and ``norm``; None where there is no gradient to compare.
    """
    images = torch.cat(batches)
    total, inside = images.sum(0).tolist()
    most = images[:, 0].sort(descending=True).values[: max(1, round(len(images) / 10))]
    pairs = [(own[:, 0].sum(), other[:, 0].sum()) for own, other in zip(batches, detection or ())]
    ratios = [float((own / other).sqrt()) for own, other in pairs if other > 0]
    return {
        "in_boxes": inside / total if total else None,
        "in_tenth": float(most.sum()) / total if total else None,
        "norm": fmean(ratios) if ratios else None,
    }


def measure(args):
    """What is written as JSON.

    Raises:
        InputError: if the config is no student's or has no loss; as ``build_config`` and
            ``load_strictly``.
    """
    cfg = build_config(args.config_file, args.opts)
    cfg.SEED = max(cfg.SEED, 0)  # the same scenes in the same order, and the same new modules
    seed_all(cfg.SEED)
    terms = read_losses(cfg.KD.LOSSES)
    model = KDTrainer.build_model(cfg)
    if not isinstance(model, DistilledMixin) or not terms:
        raise InputError(f"'{args.config_file}' is of no student that has KD.LOSSES")
    teacher = attach_teacher(model, cfg)
    if args.weights:
        load_strictly(model, args.weights, f"the config '{args.config_file}'")
    else:
        if cfg.MODEL.WEIGHTS:
            check_exists(cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS")
        DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
        if cfg.KD.TEACHER.INIT_STUDENT:
            init_from_teacher(model, teacher.model, backbone=cfg.KD.TEACHER.INIT_BACKBONE)
    batches = KDTrainer.build_train_loader(cfg)
    values = defaultdict(lambda: defaultdict(list))
    seed_all(cfg.SEED)
    model.train()
    # As late in a training as it takes for the weights to have risen.
    with EventStorage(max(term.warmup_iters for term in terms)):
        for batch in tqdm(islice(batches, args.batches), total=args.batches):
            for level, entries in measure_batch(model, batch).items():
                for name, squares in entries.items():
                    values[level][name].append(squares)
    found = {}
    for level, entries in values.items():
        cells = summary(entries.pop("cells"))["in_boxes"]
        found[level] = {"cells": cells, "losses": {}}
        for name, squares in entries.items():
            told = summary(squares, entries.get(DETECTION))
            found[level]["losses"][name.removeprefix(PREFIX)] = told
    told = {"config": args.config_file, "weights": args.weights, "losses": cfg.KD.LOSSES}
    return {**told, "batches": args.batches, "images": cfg.SOLVER.IMS_PER_BATCH, "levels": found}


def markdown(result):
    """The table of ``measure``'s result, and of what it is."""
    rows = []
    for level, found in result["levels"].items():
        for name, each in found["losses"].items():
            values = each["in_boxes"], found["cells"], each["in_tenth"], each["norm"]
            told = ["-" if value is None else f"{value:.2f}" for value in values]
            rows.append([level, name, *told])
    headings = ["level", "loss", "in boxes", "cells in boxes", "in 10 % of images", "norm"]
    align = ["left", "left", "right", "right", "right", "right"]
    table = tabulate(rows, headings, "pipe", colalign=align, disable_numparse=True)
    weights = f"'{result['weights']}'" if result["weights"] else "where the student starts"
    return (
        f"{table}\n\nOf {result['batches']} training batches of {result['images']} images; "
        f"weights: {weights}.\n"
    )


def main(args):
    """Runs the command line."""
    result = measure(args)
    print(f"\n{markdown(result)}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.json, result)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--config-file", required=True, help="the student's config")
    add("--weights", default="", help="a checkpoint of it; without: where it starts")
    add("--batches", type=positive, default=8, help="training batches (default: 8)")
    add("--json", type=Path, help="write the numbers to this file, too")
    add("opts", nargs="*", help="KEY VALUE pairs on top of the config")
    try:
        main(parser.parse_args())
    except InputError as error:
        parser.error(str(error))
