#!/usr/bin/env python
"""Compare models over a grid of test sizes: AP, latency and GMACs, as tables and a picture.

    python tools/analysis/resolution_sweep.py --output output/sweep --sizes 48 64 96 128 \
        --model "stock HR" configs/Shapes/hr.yaml projects/Shapes/checkpoints/hr.pth \
        --model student configs/Shapes/lr.yaml output/shapes/student/model_final.pth

writes sweep.md, sweep.json, sweep.csv and sweep.png to the folder, after every evaluation what is
known by then. A size is that of the shorter side (INPUT.MIN_SIZE_TEST), and the longest side keeps
its ratio to it; a multi-resolution teacher's is that of its high-resolution image. All models are
timed in turn on the same images. KEY VALUE pairs may follow the weights.
"""

import argparse
import copy
import math
import os
import tempfile
from dataclasses import dataclass

import torch
from arguments import positive
from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts
from detectron2.evaluation import inference_on_dataset
from sweep_report import markdown, write_files
from tqdm import tqdm

from msad_kd import InputError, KDTrainer, build_config
from msad_kd.data.loader import clear_absence, clear_errors
from msad_kd.data.mapper import build_mapper
from msad_kd.evaluation.cost import count_gmacs, device_name, input_sides, time_models


@dataclass
class Candidate:
    """A model at a test size."""

    name: str
    size: int
    cfg: CfgNode
    model: torch.nn.Module


def read_candidates(models, sizes, folder):
    """Every model at every size; a model is built once.

    Args:
        models: lists of words, NAME CONFIG WEIGHTS [KEY VALUE ...].
        sizes: in pixels.
        folder: for what an evaluation writes.

    Raises:
        InputError: if a model is incomplete or cannot be built, if two have one name, or if they
            are not of the same test set.
    """
    candidates, data_sets = [], {}
    for words in models:
        if len(words) < 3:
            raise InputError(f"--model {' '.join(words)}: NAME, CONFIG and WEIGHTS are needed")
        name, config, weights, *options = words
        if name in data_sets:
            raise InputError(f"--model {name}: the name is given twice; tell the models apart")
        cfg = build_config(config, options)
        data_sets[name] = cfg.DATASETS.TEST
        model = KDTrainer.load_model(cfg, weights, f"the config '{config}'")
        for size in sizes:
            own = cfg.clone()
            own.defrost()
            ratio = cfg.INPUT.MAX_SIZE_TEST / max(cfg.INPUT.MIN_SIZE_TEST, 1)
            own.INPUT.MIN_SIZE_TEST, own.INPUT.MAX_SIZE_TEST = size, round(size * ratio)
            own.OUTPUT_DIR = folder
            candidates.append(Candidate(name, size, own, model))
    first, *others = data_sets
    for name in data_sets:
        if len(data_sets[name]) != 1 or data_sets[name] != data_sets[first]:
            raise InputError(
                f"--model {name}: DATASETS.TEST is {tuple(data_sets[name])}, but all models are to "
                "be compared on the same single data set"
            )
    return candidates


def measure_costs(candidates, dicts, bar):
    """The rows of the table, still without AP.

    Args:
        candidates: from ``read_candidates``.
        dicts: Detectron2's dicts of the images, each of which every candidate sees.
        bar: a progress bar, advanced by one an image.
    """
    inputs = {}
    for index, each in enumerate(candidates):
        mapper = clear_errors(build_mapper(each.cfg, is_train=False))
        inputs[index] = [mapper(copy.deepcopy(entry)) for entry in dicts]
    models = {index: each.model for index, each in enumerate(candidates)}
    latency = time_models(models, inputs, after_round=lambda: bar.update(len(candidates)))
    rows = []
    for index, each in enumerate(candidates):
        branch = getattr(each.model, "test_branch", None)
        rows.append(
            {
                "model": each.name,
                "size": each.size,
                "side": input_sides(inputs[index][0], branch),
                "box_ap": None,
                "mask_ap": None,
                "gmacs": count_gmacs(each.model, inputs[index]),
                "latency_ms": latency[index]["median"],
                "latency_low_ms": latency[index]["low"],
                "latency_high_ms": latency[index]["high"],
            }
        )
    return rows


class Counted:
    """A loader that advances a progress bar by one a batch."""

    def __init__(self, loader, bar):
        self.loader, self.bar = loader, bar

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for batch in self.loader:
            yield batch
            self.bar.update()


def average_precision(candidate, bar):
    """Box and mask AP in percent: 0 where nothing is found, None for the masks of a model without.

    Args:
        candidate: the model and its config.
        bar: a progress bar, advanced by one an image.
    """
    cfg = candidate.cfg
    (name,) = cfg.DATASETS.TEST
    loader = KDTrainer.build_test_loader(cfg, name)
    evaluator = KDTrainer.build_evaluator(cfg, name)
    metrics = inference_on_dataset(candidate.model, Counted(loader, bar), evaluator)
    found = (metrics.get(task, {}).get("AP") for task in ("bbox", "segm"))
    return [None if ap is None else ap if math.isfinite(ap) else 0.0 for ap in found]


def sweep(args):
    """Measure, evaluate, and write after every evaluation; returns the rows and the note.

    Raises:
        InputError: as ``read_candidates``, and if the data set is absent.
    """
    with tempfile.TemporaryDirectory() as folder:
        candidates = read_candidates(args.model, args.sizes, folder)
        cfg = candidates[0].cfg
        with clear_absence(cfg.DATASETS.TEST):
            dicts = get_detection_dataset_dicts(cfg.DATASETS.TEST, filter_empty=False)
        timed = dicts[: args.images]
        device = device_name(cfg)
        note = (
            f"{cfg.DATASETS.TEST[0]}, {len(dicts)} images. Latency: one image, from resized pixels "
            f"to detections, {len(timed)} images, all models in turn, "
            + (f"CPU threads: {torch.get_num_threads()}." if device == "no GPU" else f"{device}.")
        )
        os.makedirs(args.output, exist_ok=True)
        total = len(candidates) * (len(timed) + len(dicts))
        with tqdm(total=total, unit="image", smoothing=0) as bar:
            rows = measure_costs(candidates, timed, bar)
            for done, (row, candidate) in enumerate(zip(rows, candidates), start=1):
                bar.set_description(f"{candidate.name}, {candidate.size} px")
                row["box_ap"], row["mask_ap"] = average_precision(candidate, bar)
                write_files(args.output, rows[:done], note)
    return rows, note


def main(arguments=None):
    """Runs the command line; an expected error ends it with one sentence."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    words = "what to call it, its config, its checkpoint, and KEY VALUE pairs; may be repeated"
    add("--model", nargs="+", action="append", required=True, metavar="WORD", help=words)
    add("--sizes", type=positive, nargs="+", required=True, help="of the shorter side, in pixels")
    add("--images", type=positive, default=30, help="how many to measure latency and GMACs on")
    add("--output", default="output/sweep", help="the folder to write to")
    args = parser.parse_args(arguments)
    try:
        rows, note = sweep(args)
    except InputError as error:
        parser.error(str(error))
    print(markdown(rows, note))


if __name__ == "__main__":
    main()
