#!/usr/bin/env python
"""Compare models over a grid of test sizes: AP, latency and GMACs, as tables and a picture.

    python tools/analysis/resolution_sweep.py --output output/sweep --sizes 48 64 96 128 \
        --model "stock HR" configs/Shapes/hr.yaml projects/Shapes/checkpoints/hr.pth \
        --model student configs/Shapes/lr.yaml output/shapes/student_multi_size/model_final.pth

The folder receives sweep.md, sweep.json, sweep.csv and sweep.png. They are written anew after every
evaluation, and say how many rows are missing. A size is that of the shorter side
(INPUT.MIN_SIZE_TEST); the limit of the longer side grows with it. For a multi-resolution teacher it
is the size of the high-resolution image. All models are timed in turn on the same images. Costs are
measured at the same number of detections for all models, AP with each model's own config.
"""

import argparse
import math
import os
import tempfile
from dataclasses import dataclass

import torch
from arguments import positive, run
from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts
from detectron2.evaluation import inference_on_dataset
from sweep_report import APS, markdown, write_files
from tqdm import tqdm

from msad_kd import InputError, KDTrainer, build_config
from msad_kd.data.classes import with_classes_of
from msad_kd.data.dict_checks import explain_missing_data
from msad_kd.data.mapper import build_mapper
from msad_kd.evaluation.cost import (
    count_gmacs,
    device_name,
    fix_detections,
    input_sides,
    time_models,
)


@dataclass
class Candidate:
    """A model at a test size."""

    name: str
    size: int
    cfg: CfgNode
    model: torch.nn.Module
    cost_model: torch.nn.Module  # the same with a fixed number of detections


def read_candidates(models, sizes, detections, folder):
    """Return every model at every size; a model is built once for all sizes.

    Args:
        models: lists of words, NAME CONFIG WEIGHTS [KEY VALUE ...].
        sizes: test sizes in pixels.
        detections: per image, for the costs.
        folder: the folder for what an evaluation writes.

    Raises:
        InputError: if a model is incomplete or cannot be built, if a name is used twice, or if the
            models have different test sets.
    """
    candidates, data_sets = [], {}
    for words in models:
        if len(words) < 3:
            raise InputError(f"--model {' '.join(words)}: NAME, CONFIG and WEIGHTS are needed")
        name, config, weights, *options = words
        if name in data_sets:
            raise InputError(f"--model {name}: the name is given twice; use different names")
        cfg = build_config(config, options)
        data_sets[name] = cfg.DATASETS.TEST
        model, cost_model = (
            KDTrainer.load_model(x, weights, f"the config '{config}'")
            for x in (cfg, fix_detections(cfg, detections))
        )
        ratio = cfg.INPUT.MAX_SIZE_TEST / max(cfg.INPUT.MIN_SIZE_TEST, 1)
        for size in sizes:
            sized = cfg.clone()
            sized.defrost()
            sized.INPUT.MIN_SIZE_TEST, sized.INPUT.MAX_SIZE_TEST = size, round(size * ratio)
            sized.OUTPUT_DIR = folder
            candidates.append(Candidate(name, size, sized, model, cost_model))
    first, *_ = data_sets.values()
    for name, data_set in data_sets.items():
        if len(data_set) != 1 or data_set != first:
            raise InputError(
                f"--model {name}: DATASETS.TEST is {tuple(data_set)}, but all models need the "
                "same single data set"
            )
    return candidates


def measure_costs(candidates, dicts, bar):
    """Return the rows of the table without AP.

    Args:
        candidates: from ``read_candidates``.
        dicts: Detectron2's dicts of the images that every candidate sees.
        bar: a progress bar, advanced by one per image.
    """
    inputs = {}
    for index, candidate in enumerate(candidates):
        mapper = build_mapper(candidate.cfg, is_train=False)
        inputs[index] = [mapper(entry) for entry in dicts]
    models = {index: candidate.cost_model for index, candidate in enumerate(candidates)}
    latency = time_models(models, inputs, after_round=lambda: bar.update(len(candidates)))
    rows = []
    for index, candidate in enumerate(candidates):
        branch = getattr(candidate.model, "test_branch", None)
        rows.append(
            {
                "model": candidate.name,
                "size": candidate.size,
                "side": input_sides(inputs[index][0], branch),
                **dict.fromkeys(APS.values()),
                "gmacs": count_gmacs(candidate.cost_model, inputs[index]),
                "latency_ms": latency[index]["median"],
                "latency_low_ms": latency[index]["low"],
                "latency_high_ms": latency[index]["high"],
            }
        )
    return rows


class CountedLoader:
    """A loader that advances a progress bar by one per batch."""

    def __init__(self, loader, bar):
        self.loader, self.bar = loader, bar

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for batch in self.loader:
            yield batch
            self.bar.update()


def average_precision(candidate, bar):
    """Return APs in percent by column: 0 if nothing is found, None for what it does not predict.

    Args:
        candidate: the model and its config.
        bar: a progress bar, advanced by one per image.
    """
    cfg = with_classes_of(candidate.cfg, candidate.model)
    (name,) = cfg.DATASETS.TEST
    loader = KDTrainer.build_test_loader(cfg, name)
    evaluator = KDTrainer.build_evaluator(cfg, name)
    metrics = inference_on_dataset(candidate.model, CountedLoader(loader, bar), evaluator)
    aps = {column: metrics.get(kind, {}).get("AP") for kind, column in APS.items()}
    return {x: ap if ap is None or math.isfinite(ap) else 0.0 for x, ap in aps.items()}


def sweep(args):
    """Measure and evaluate, write the files after every evaluation, and return rows and note.

    Raises:
        InputError: as ``read_candidates``, and if the data set is missing.
    """
    with tempfile.TemporaryDirectory() as folder:
        candidates = read_candidates(args.model, args.sizes, args.detections, folder)
        cfg = candidates[0].cfg
        with explain_missing_data(cfg.DATASETS.TEST):
            dicts = get_detection_dataset_dicts(cfg.DATASETS.TEST, filter_empty=False)
        if not any(entry.get("annotations") for entry in dicts):
            raise InputError(f"'{cfg.DATASETS.TEST[0]}' has no objects, so there is no AP")
        timed = dicts[: args.images]
        device = device_name(cfg)
        note = (
            f"{cfg.DATASETS.TEST[0]}, {len(dicts)} images. Costs at {args.detections} detections "
            "per image. Latency: one image, from resized pixels to detections, "
            f"{len(timed)} images, all models in turn, "
            + (f"CPU threads: {torch.get_num_threads()}." if device == "no GPU" else f"{device}.")
        )
        os.makedirs(args.output, exist_ok=True)
        total = len(candidates) * (len(timed) + len(dicts))
        with tqdm(total=total, unit="image", smoothing=0) as bar:
            rows = measure_costs(candidates, timed, bar)
            for done, (row, candidate) in enumerate(zip(rows, candidates), start=1):
                bar.set_description(f"{candidate.name}, {candidate.size} px")
                row.update(average_precision(candidate, bar))
                write_files(args.output, rows[:done], note, len(rows))
    return rows, note


def main(arguments=None):
    """Run the command line; an expected error ends it with one sentence."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    words = "name, config and checkpoint, then KEY VALUE pairs; may be repeated"
    add("--model", nargs="+", action="append", required=True, metavar="WORD", help=words)
    add("--sizes", type=positive, nargs="+", required=True, help="shorter sides in pixels")
    add("--images", type=positive, default=30, help="images to measure costs on (default: 30)")
    detections = "detections per image when costs are measured (default: 10)"
    add("--detections", type=positive, default=10, help=detections)
    add("--output", default="output/sweep", help="the folder to write to")
    print(markdown(*run(parser, sweep, arguments)))


if __name__ == "__main__":
    main()
