#!/usr/bin/env python
"""Time the checks of an annotation file as large as COCO's training set.

    python tools/analysis/benchmark_annotations.py
    python tools/analysis/benchmark_annotations.py --images 1000 --annotations 7000

It generates a file in COCO format with polygons, of which one in a hundred is a crowd in RLE, and
times its parsing as JSON, the checks, and the making of Detectron2's dicts. The output is a line of
a Markdown table, in seconds of CPU time.
"""

import argparse
import gc
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from arguments import positive

from msad_kd.data.annotations import check_content, parse_json
from msad_kd.data.coco_format import make_dicts

HEIGHT, WIDTH = 480, 640
CATEGORIES = 80


def generate(path: Path, images: int, annotations: int, seed: int) -> None:
    """Write a valid file; a polygon has 4 to 40 points, as many as COCO's on average."""
    rng = np.random.default_rng(seed)
    entries = []
    for number in range(1, annotations + 1):
        center, radius = rng.uniform((60, 60), (WIDTH - 60, HEIGHT - 60)), rng.uniform(2, 60)
        angles = np.linspace(0, 2 * np.pi, rng.integers(4, 41), endpoint=False)
        points = center + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        points = points.round(2)
        low, high = points.min(axis=0), points.max(axis=0)
        crowd = int(number % 100 == 0)
        runs = [100, 50] * 40
        rle = {"size": [HEIGHT, WIDTH], "counts": [*runs, HEIGHT * WIDTH - sum(runs)]}
        entries.append(
            {
                "id": number,
                "image_id": int(rng.integers(1, images + 1)),
                "category_id": int(rng.integers(1, CATEGORIES + 1)),
                "bbox": [*low.tolist(), *(high - low).round(2).tolist()],
                "area": float(radius**2 * np.pi),
                "iscrowd": crowd,
                "segmentation": rle if crowd else [points.ravel().tolist()],
            }
        )
    content = {
        "images": [
            {"id": i, "file_name": f"{i:012}.jpg", "height": HEIGHT, "width": WIDTH}
            for i in range(1, images + 1)
        ],
        "annotations": entries,
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, CATEGORIES + 1)],
    }
    path.write_text(json.dumps(content))


def timed(function, *arguments):
    """Return a function's result and its CPU time in seconds; other processes do not count."""
    start = time.process_time()
    result = function(*arguments)
    return result, time.process_time() - start


def main() -> None:
    """Generate a file, time what reads it, and print the times."""
    summary, _, details = __doc__.partition("\n\n")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=details, formatter_class=formatter)
    parser.add_argument("--images", type=positive, default=118_000)
    parser.add_argument("--annotations", type=positive, default=860_000)
    parser.add_argument("--seed", type=int, default=0, help="of what is generated")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "instances.json"
        generate(path, args.images, args.annotations, args.seed)
        size = path.stat().st_size / 2**20
        gc.disable()  # as read_annotations does
        content, parsing = timed(parse_json, str(path), "the benchmark")
    findings, checks = timed(check_content, content)
    if findings.problems:
        raise RuntimeError(f"the generated file has problems: {findings.problems[0].example}")
    classes = {category["id"]: i for i, category in enumerate(content["categories"])}
    _, dicts = timed(make_dicts, content, "", classes)
    print("| images | annotations | MiB | JSON, CPU s | checks, CPU s | dicts, CPU s |")
    print("|---|---|---|---|---|---|")
    counts = f"{args.images} | {args.annotations} | {size:.0f}"
    print(f"| {counts} | {parsing:.1f} | {checks:.1f} | {dicts:.1f} |")


if __name__ == "__main__":
    main()
