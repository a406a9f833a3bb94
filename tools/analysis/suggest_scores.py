#!/usr/bin/env python
"""Suggest KD.UNLABELED.SCORE and IGNORE_SCORE for the labels of a detector, by its errors.

    python train_net.py --eval-only --config-file my/hr.yaml MODEL.WEIGHTS output/hr/model_final.pth
    python tools/analysis/suggest_scores.py --config-file my/hr.yaml

It reads what an evaluation on DATASETS.TEST, or the training's last one, has left in
OUTPUT_DIR/inference. The detector should not have been trained on these images. A detection is
right if its box meets an object's with an IoU of 0.5. SCORE is where the detections above it have
the highest F1 (precision and recall weigh the same), IGNORE_SCORE where those of all classes have
the highest F2 (recall weighs more): just below it, fewer than one in five is right. A class with
fewer than 20 objects gets the SCORE of all classes together.
"""

import argparse
import contextlib
import io
import json
import math
import os
from dataclasses import dataclass

import numpy as np
from arguments import run
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate

from msad_kd import InputError, build_config
from msad_kd.data.annotations import read_annotations
from msad_kd.data.classes import annotation_file, class_names, model_classes

FEWEST = 20  # objects of a class that tell its score
THRESHOLDS = np.arange(99, 0, -1) / 100


@dataclass(eq=False)
class Matches:
    """The detections of a class."""

    scores: np.ndarray  # (N,)
    right: np.ndarray  # (N,) whether each meets an object that no better one has met
    objects: int

    def counts(self, threshold):
        """Return how many detections have this score or more, and how many of them are right."""
        above = self.scores >= threshold
        return int(above.sum()), int(self.right[above].sum())

    def best(self, beta):
        """Return the threshold with the highest F-beta, the highest of equal ones."""
        found, right = np.array([self.counts(threshold) for threshold in THRESHOLDS]).T
        quality = (1 + beta**2) * right / (found + beta**2 * self.objects)
        return float(THRESHOLDS[quality.argmax()])

    def line(self, threshold):
        """Return objects, threshold, precision and recall."""
        found, right = self.counts(threshold)
        return [self.objects, threshold, right / max(found, 1), right / max(self.objects, 1)]

    @property
    def enough(self):
        """Return whether there is enough to choose a threshold."""
        return self.objects >= FEWEST and bool(self.right.any())


def match(content, predictions):
    """Return the Matches of each class by its name, as COCO's AP matches.

    Args:
        content: the annotations, from ``read_annotations``.
        predictions: the path of the predictions.

    Raises:
        InputError: if the predictions cannot be read, or are not of these images.
    """
    try:
        with open(predictions) as file:
            found = json.load(file)
        keys = "image_id", "category_id", "bbox", "score"
        boxes = [{key: each[key] for key in keys} for each in found]  # without their masks
        coco = COCO()
        coco.dataset = content
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
            results = coco.loadRes(boxes) if boxes else COCO()  # pycocotools cannot load none
            evaluation = COCOeval(coco, results, "bbox")
            evaluation.params.iouThrs = np.array([0.5])
            evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, math.inf]], ["all"]
            evaluation.params.maxDets = [len(boxes)]
            evaluation.evaluate()
    except (OSError, ValueError, KeyError, TypeError, IndexError, AssertionError) as error:
        raise InputError(
            f"'{predictions}' should be the coco_instances_results.json of an evaluation on the "
            f"data set of DATASETS.TEST; evaluate again ({type(error).__name__}: {error})"
        ) from None
    images = len(evaluation.params.imgIds)
    return {
        coco.cats[category]["name"]: _join(evaluation.evalImgs[i * images : (i + 1) * images])
        for i, category in enumerate(evaluation.params.catIds)
    }


def _join(images):
    """Return the Matches of a class from COCOeval's results of the images that have any."""
    images = [x for x in images if x is not None]
    counted = [~np.asarray(x["dtIgnore"][0], bool) for x in images]
    scores = [np.asarray(x["dtScores"])[keep] for x, keep in zip(images, counted)]
    right = [x["dtMatches"][0][keep] > 0 for x, keep in zip(images, counted)]
    objects = sum(int((~np.asarray(x["gtIgnore"], bool)).sum()) for x in images)
    return Matches(np.concatenate([[], *scores]), np.concatenate([[], *right]) > 0, objects)


def suggest(names, matches):
    """Return SCORE, a number for each class, IGNORE_SCORE, and the lines of the table."""
    parts = matches.values()
    scores, right = ([getattr(x, name) for x in parts] for name in ("scores", "right"))
    every = Matches(np.concatenate(scores), np.concatenate(right), sum(x.objects for x in parts))
    if not every.enough:
        raise InputError(
            f"{every.objects} objects and {every.right.sum()} right detections tell nothing; "
            "evaluate on more objects, or train the detector"
        )
    known = {name: x for name, x in matches.items() if x.enough}
    score = [known.get(name, every).best(1) for name in names]
    ignore = min(every.best(2), *score)
    lines = [["all classes", *every.line(every.best(1))]]
    for name, threshold in zip(names, score):
        if name in matches and len(names) > 1:
            few = "" if name in known else " (too few: SCORE of all classes)"
            lines.append([name + few, *matches[name].line(threshold)])
    every_one = every.counts(ignore)[0] == len(every.scores)
    limit = " (the lowest there is: lower SCORE_THRESH_TEST)" if every_one else ""
    lines.append([f"all classes, IGNORE_SCORE{limit}", *every.line(ignore)])
    return score, ignore, lines


def main(args):
    """Print the table and the keys."""
    cfg = build_config(args.config_file, args.opts)
    names = cfg.DATASETS.TEST
    file = annotation_file(names[0]) if len(names) == 1 else None
    if file is None:
        raise InputError(f"DATASETS.TEST is {list(names)}; name one data set in COCO format")
    content = read_annotations(file, names[0], cfg.DATASETS.INVALID_ANNOTATIONS)
    found = os.path.join(cfg.OUTPUT_DIR, "inference", "coco_instances_results.json")
    classes = model_classes(cfg)[0] or class_names(names[0])
    score, ignore, lines = suggest(classes, match(content, args.predictions or found))
    print(tabulate(lines, ["class", "objects", "SCORE", "precision", "recall"], "pipe", ".2f"))
    print(f'\nKD.UNLABELED.SCORE "{score}" KD.UNLABELED.IGNORE_SCORE {ignore}')


def build_parser():
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config-file", required=True, help="the detector's config")
    found = "OUTPUT_DIR/inference/coco_instances_results.json"
    parser.add_argument("--predictions", metavar="FILE", help=f"instead of {found}")
    parser.add_argument("opts", nargs="*", help="KEY VALUE pairs on top of the config")
    return parser


if __name__ == "__main__":
    run(build_parser(), main)
