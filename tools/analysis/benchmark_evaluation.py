#!/usr/bin/env python
"""Time COCO's AP from a model's outputs to the tables: Detectron2 with pycocotools, and ours.

    python tools/analysis/benchmark_evaluation.py
    python tools/analysis/benchmark_evaluation.py --images 200 --detections 6000 --rounds 1

It generates objects of COCO's sizes, and detections near them with masks of 28 x 28 pixels, as Mask
R-CNN's. Both evaluators get the same pasted masks, in turn. Their results have to be equal, the
RLEs bit for bit. The output is a Markdown table in seconds of CPU time: the medians of the rounds,
and from the least to the greatest.
"""

import argparse
import io
import json
import pickle
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import numpy as np
import torch
from arguments import positive
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator, coco_evaluation
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances

from msad_kd.evaluation.coco import IMPLEMENTATIONS, AnyCOCOEvaluator
from msad_kd.utils.replaced import replaced

CATEGORIES = 80
PARTS = ["masks to RLE, results", "torch.save", "JSON", "loading", "AP", "tables", "the rest"]
STEPS = {"evaluate", "accumulate", "summarize"}


class Clock:
    """Adds up the CPU time of parts; the time of a part within another counts for itself alone."""

    def __init__(self):
        self.seconds = defaultdict(float)
        self._running = []
        self._since = 0.0

    def _switch(self):
        now = time.process_time()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    @contextmanager
    def part(self, name):
        """Time what runs inside as a part."""
        self._switch()
        self._running.append(name)
        yield
        self._switch()
        self._running.pop()

    def timed(self, name, function):
        """Return the function, timed as a part."""

        def run(*args, **kwargs):
            with self.part(name):
                return function(*args, **kwargs)

        return run


class Scenes:
    """Images with objects, as ground truth and as what Mask R-CNN finds."""

    def __init__(self, images: int, objects: int, detections: int, seed: int):
        self.rng = rng = np.random.default_rng(seed)
        sizes = [(480, 640), (640, 480), (427, 640), (500, 375)]
        self.sizes = np.array(sizes)[rng.integers(len(sizes), size=images)]
        self.owner = np.sort(rng.integers(images, size=objects))
        self.category = rng.integers(CATEGORIES, size=objects)
        limits = self.sizes[self.owner][:, ::-1]
        sides = np.minimum(np.exp(rng.normal(np.log(60), 1, (objects, 2))).clip(4), limits * 0.9)
        corners = rng.uniform(0, limits - sides)
        self.boxes = np.concatenate([corners, corners + sides], axis=1)
        self.found = np.sort(rng.integers(objects, size=detections))
        grid = np.linspace(-1, 1, 28)
        self.soft = 1 / (1 + np.exp(12 * (np.hypot(grid[:, None], grid) - 0.9)))

    def write(self, path: Path) -> None:
        """Write the ground truth: octagons, in COCO format."""
        angles = np.arange(8) * np.pi / 4
        circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        annotations = []
        for number, (x0, y0, x1, y1) in enumerate(self.boxes.tolist()):
            points = (circle + 1) / 2 * [x1 - x0, y1 - y0] + [x0, y0]
            annotation = {"id": number + 1, "image_id": int(self.owner[number])}
            annotation |= {"category_id": int(self.category[number]) + 1, "iscrowd": 0}
            annotation |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": 0.7 * (x1 - x0) * (y1 - y0)}
            annotations.append(annotation | {"segmentation": [points.ravel().tolist()]})
        images = [
            {"id": i, "file_name": f"{i}.jpg", "height": int(h), "width": int(w)}
            for i, (h, w) in enumerate(self.sizes)
        ]
        names = [{"id": i + 1, "name": f"class {i}"} for i in range(CATEGORIES)]
        content = {"images": images, "annotations": annotations, "categories": names}
        path.write_text(json.dumps(content))

    def detections(self, image: int) -> Instances:
        """Return what a model finds, with masks of 28 x 28 pixels: a share of a wrong class."""
        first, end = np.searchsorted(self.owner[self.found], [image, image + 1])
        objects = self.found[first:end]
        boxes, amount = self.boxes[objects], len(objects)
        extent = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
        spread = self.rng.exponential(0.1, (amount, 1))
        boxes = boxes + self.rng.normal(size=(amount, 4)) * spread * extent
        wrong = self.rng.random(amount) < 0.3
        soft = self.soft + self.rng.normal(0, 0.1, (amount, 1, 28, 28))
        found = Instances(tuple(self.sizes[image].tolist()))
        found.pred_boxes = Boxes(torch.as_tensor(boxes, dtype=torch.float32))
        found.scores = torch.as_tensor(np.exp(-3 * self.rng.random(amount) - 3 * spread[:, 0]))
        found.pred_classes = torch.as_tensor((self.category[objects] + wrong) % CATEGORIES)
        found.pred_masks = torch.as_tensor(soft, dtype=torch.float32)
        return found


def timed_class(clock: Clock, cls: type) -> type:
    """Return a ``COCOeval`` that times itself as "AP"; hotcoco's cannot be subclassed."""

    class Timed:
        def __init__(self, *arguments):
            self._inner = cls(*arguments)

        def __getattr__(self, name):
            value = getattr(self._inner, name)
            return clock.timed("AP", value) if name in STEPS else value

    return Timed


def evaluate(evaluator: COCOEvaluator, clock: Clock) -> dict:
    """Return an evaluator's results, and time their parts."""
    compute = coco_evaluation._evaluate_predictions_on_coco
    tables = clock.timed("tables", evaluator._derive_coco_results)
    fast = getattr(evaluator, "_eval_class", None)
    with (
        replaced(torch, save=clock.timed("torch.save", torch.save)),
        replaced(json, dumps=clock.timed("JSON", json.dumps)),
        replaced(coco_evaluation, _evaluate_predictions_on_coco=clock.timed("loading", compute)),
        replaced(coco_evaluation, COCOeval=timed_class(clock, coco_evaluation.COCOeval)),
        replaced(evaluator, _derive_coco_results=tables),
        replaced(evaluator, _eval_class=fast and timed_class(clock, fast)),
        clock.part("the rest"),
    ):
        return evaluator.evaluate()


def cell(values: list[float]) -> str:
    """Return the median and the least and greatest."""
    return f"{np.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"


def main() -> None:
    """Generate images, evaluate them on both sides in turn, and print the times."""
    summary, _, details = __doc__.partition("\n\n")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=details, formatter_class=formatter)
    parser.add_argument("--images", type=positive, default=5000)
    parser.add_argument("--objects", type=positive, default=36000)
    parser.add_argument("--detections", type=positive, default=150000)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--implementation", default="auto", choices=["auto", *IMPLEMENTATIONS])
    parser.add_argument("--seed", type=int, default=0, help="of what is generated")
    args = parser.parse_args()
    scenes = Scenes(args.images, args.objects, args.detections, args.seed)
    pasting, clocks = Clock(), [[Clock() for _ in range(args.rounds)] for _ in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        scenes.write(Path(folder) / "instances.json")
        register_coco_instances("generated", {}, f"{folder}/instances.json", folder)
        DatasetCatalog.get("generated")  # this registers the classes
        stock = COCOEvaluator("generated", output_dir=folder, use_fast_impl=False)
        ours = AnyCOCOEvaluator("generated", output_dir=folder, implementation=args.implementation)
        for evaluator in (stock, ours):
            evaluator.reset()
        for image in range(args.images):
            found = scenes.detections(image)
            with pasting.part("pasting"):
                output = [{"instances": detector_postprocess(found, *found.image_size)}]
            for number in range(args.rounds):
                for evaluator, rounds in zip((stock, ours), clocks):
                    if number:
                        evaluator._predictions.pop()
                    with rounds[number].part(PARTS[0]):
                        evaluator.process([{"image_id": image}], output)
        if stock._predictions != ours._predictions:
            raise RuntimeError("the two sides' predictions differ")
        kept = pickle.dumps(stock._predictions)
        for number in range(args.rounds):
            results = []
            for evaluator, rounds in zip((stock, ours), clocks):
                evaluator._predictions = pickle.loads(kept)  # an evaluation changes them
                with redirect_stdout(io.StringIO()):
                    results.append(evaluate(evaluator, rounds[number]))
    for task, metrics in results[0].items():
        np.testing.assert_allclose(
            list(results[1][task].values()), list(metrics.values()), atol=1e-5
        )
    print(f"Equal results, AP {results[0]['bbox']['AP']:.1f} / {results[0]['segm']['AP']:.1f}.")
    print(f"Pasting the masks, before either: {pasting.seconds['pasting']:.1f} s\n")
    print(f"| CPU s | Detectron2, pycocotools | ours, {ours._implementation} | ours / Detectron2 |")
    print("|---|---|---|---|")
    for part in [*PARTS, "all"]:
        sides = [
            [sum(x.seconds.values()) if part == "all" else x.seconds[part] for x in rounds]
            for rounds in clocks
        ]
        ratios = [mine / other for other, mine in zip(*sides)]
        share = f"{np.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        print(f"| {part} | {cell(sides[0])} | {cell(sides[1])} | {share} |")


if __name__ == "__main__":
    main()
