#!/usr/bin/env python
"""Suggest KD.UNLABELED.SCORE and IGNORE_SCORE for the labels of a detector, by its errors.

    python tools/analysis/suggest_scores.py --truth datasets/mine/val.json \
        --predictions output/mine/hr/inference/coco_instances_results.json

The predictions are what an evaluation of train_net.py leaves, on images that the detector was not
trained on.

A detection is right if its box meets an object's with an IoU of 0.5. SCORE is where the detections
above it have the highest F1 (precision and recall weigh the same). IGNORE_SCORE is where F2 (recall
weighs more) is highest: just below it, fewer than one detection in five is right. A class with less
than 20 objects gets the score of all classes together.
"""

import argparse
import contextlib
import io
import json
import math
from dataclasses import dataclass

import numpy as np
from arguments import run
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate

from msad_kd import InputError

KEYS = ("image_id", "category_id", "bbox", "score")
FEWEST = 20  # objects of a class that tell its scores


@dataclass(eq=False)
class Matches:
    """The detections of a class."""

    name: str
    scores: np.ndarray  # (N,) in descending order
    right: np.ndarray  # (N,) whether each meets an object that no better one has met
    objects: int

    def best(self, beta):
        """Return the score with the highest F-beta, with its F-beta, precision and recall."""
        found, count = self.right.cumsum(), np.arange(1, len(self.scores) + 1)
        quality = (1 + beta**2) * found / (count + beta**2 * self.objects)
        last = len(quality) - 1 - quality[::-1].argmax()  # of equal ones the lowest score
        return (
            self.scores[last],
            quality[last],
            found[last] / count[last],
            found[last] / self.objects,
        )


def read(path):
    """Return the content of a JSON file."""
    try:
        with open(path) as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise InputError(f"'{path}' cannot be read as JSON: {error}") from None


def match(truth, predictions):
    """Return the Matches of each class in the order of the category ids, as COCO's AP matches."""
    content, found = read(truth), read(predictions)
    if not found:
        raise InputError(f"'{predictions}' has no detection; train the detector first")
    try:
        coco = COCO()
        truths = [{"iscrowd": 0, "area": 0, **x} for x in content["annotations"]]
        coco.dataset = {**content, "annotations": truths}
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
            boxes = [{key: each[key] for key in KEYS} for each in found]  # without their masks
            results = coco.loadRes(boxes)
            evaluation = COCOeval(coco, results, "bbox")
            evaluation.params.iouThrs = np.array([0.5])
            evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, math.inf]], ["all"]
            evaluation.params.maxDets = [len(found)]
            evaluation.evaluate()
    except (KeyError, TypeError, IndexError, AssertionError) as error:
        raise InputError(
            f"'{predictions}' should be the coco_instances_results.json of an evaluation on "
            f"'{truth}' ({type(error).__name__}: {error})"
        ) from None
    images = len(evaluation.params.imgIds)
    return [
        _join(coco.cats[category]["name"], evaluation.evalImgs[i * images : (i + 1) * images])
        for i, category in enumerate(evaluation.params.catIds)
    ]


def _join(name, images):
    """Return the Matches of a class from COCOeval's results of the images that have any."""
    images = [x for x in images if x is not None]
    ignored = [np.asarray(x["dtIgnore"][0], bool) for x in images]
    scores = [np.asarray(x["dtScores"])[~skip] for x, skip in zip(images, ignored)]
    right = [x["dtMatches"][0][~skip] > 0 for x, skip in zip(images, ignored)]
    objects = sum(int((~np.asarray(x["gtIgnore"], bool)).sum()) for x in images)
    return _sorted(name, scores, right, objects)


def _sorted(name, scores, right, objects):
    scores, right = (np.concatenate([[], *x]) for x in (scores, right))
    order = np.argsort(-scores, kind="stable")
    return Matches(name, scores[order], right[order].astype(bool), objects)


def suggest(classes):
    """Return SCORE, IGNORE_SCORE and the lines of the table."""
    scores, right = [x.scores for x in classes], [x.right for x in classes]
    together = _sorted("all classes", scores, right, sum(x.objects for x in classes))
    if together.objects < FEWEST or not together.right.any():
        raise InputError(
            f"{together.objects} objects and {together.right.sum()} right detections tell nothing; "
            "take a data set with more objects, or train the detector"
        )
    known = [x if x.objects >= FEWEST and x.right.any() else together for x in classes]
    named = classes if len(classes) > 1 else []
    rows = [[x.name, x.objects, *x.best(1)] for x in [together, *named] if x.right.any()]
    return [x.best(1)[0] for x in known], min(x.best(2)[0] for x in known), rows


def build_parser():
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--truth", required=True, help="annotations of images that it was not trained on")
    add("--predictions", required=True, help="its coco_instances_results.json on them")
    return parser


def main(args):
    """Print the table and the keys."""
    score, ignore, rows = suggest(match(args.truth, args.predictions))
    headings = ["class", "objects", "SCORE", "F1", "precision", "recall"]
    print(tabulate(rows, headings, "pipe", floatfmt=".2f"))
    score = [math.floor(100 * x) / 100 for x in score]
    ignore = min(math.floor(100 * ignore) / 100, *score)
    print(f'\nKD.UNLABELED.SCORE "{score}" KD.UNLABELED.IGNORE_SCORE {ignore}')


if __name__ == "__main__":
    run(build_parser(), main)
