"""Comparing an exported detector with the one that it was exported from, and their latency.

R: detections of an image. A detector is a function of an image (3, H, W), values 0..255, that
returns arrays: boxes (R, 4), scores (R,), classes (R,) and, if it has masks, masks (R, M, M).
"""

import os
from collections.abc import Callable

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts
from detectron2.data.transforms import ResizeShortestEdge, ResizeTransform
from tabulate import tabulate

from msad_kd.data.dict_checks import explain_missing_data
from msad_kd.data.images import list_images, read_image
from msad_kd.evaluation.cost import time_models
from msad_kd.utils.errors import InputError

Detector = Callable[[np.ndarray], list[np.ndarray]]

# The largest differences that count as equal; boxes in pixels.
LIMITS = {"boxes": 0.05, "scores": 1e-3, "masks": 1e-3}


def read_images(cfg: CfgNode, folder: str | None, count: int) -> list[np.ndarray]:
    """Return images (H, W, 3) in INPUT.FORMAT: the first of a folder, or of DATASETS.TEST.

    Raises:
        InputError: if there is none, or one cannot be read.
    """
    if folder:
        files = list_images(folder) if os.path.isdir(folder) else []
        if not files:
            raise InputError(f"--images: '{folder}' has no images; name a folder of them")
    elif cfg.DATASETS.TEST:
        names = cfg.DATASETS.TEST[:1]
        try:
            with explain_missing_data(names):
                dicts = get_detection_dataset_dicts(names, filter_empty=False)
        except InputError as error:
            raise InputError(f"{error}; or give other images by --images") from error
        files = [entry["file_name"] for entry in dicts]
    else:
        raise InputError("there are no images to compare on; set DATASETS.TEST or give --images")
    return [read_image(file, cfg.INPUT.FORMAT) for file in files[:count]]


def at_three_sizes(image: np.ndarray, metadata: dict) -> list[np.ndarray]:
    """Return an image (H, W, C) at its test size, square, and as a portrait of odd sides: (C, ...).

    The square is larger if the image has its size already. For a model that resizes images itself,
    it comes as it is, and the others are larger.

    Args:
        image: the image.
        metadata: what ``describe_model`` returns.
    """
    side, natural = metadata["min_size"] or min(image.shape[:2]), image
    if metadata["resizes"]:
        side = side * 3 // 2
    elif metadata["min_size"]:
        resize = ResizeShortestEdge(side, metadata["max_size"]).get_transform(image)
        natural = resize.apply_image(image)
    larger = natural.shape[:2] == (side, side)
    square = (side * 3 // 2,) * 2 if larger else (side, side)
    sizes = square, ((side * 5 // 4) | 1, (side * 3 // 4) | 1)  # height, width
    resizes = [ResizeTransform(*image.shape[:2], *size) for size in sizes]
    images = [natural, *(resize.apply_image(image) for resize in resizes)]
    return [np.ascontiguousarray(image.transpose(2, 0, 1)) for image in images]


def differences(
    expected: list[np.ndarray], found: list[np.ndarray], threshold: float, most: int
) -> dict[str, float]:
    """Return the largest differences between the detections of two detectors in an image.

    Detections of a class are paired from the most to the least alike, so their order, which may
    differ where scores are equal, does not matter. One without a partner counts as a difference of
    its score from the lowest that is kept; near that, one of the two may well leave it out.

    Args:
        expected: the outputs of the one.
        found: those of the other.
        threshold: the lowest score of a detection.
        most: the most detections of an image; below 0: any number.

    Returns:
        The keys of LIMITS, without masks if there are none.
    """
    names = list(LIMITS) if len(expected) > 3 else list(LIMITS)[:2]
    largest = dict.fromkeys(names, 0.0)
    boxes = np.abs(expected[0][:, None] - found[0]).max(axis=2, initial=0.0)
    scores = np.abs(np.subtract.outer(expected[1], found[1]))
    cost = np.maximum(boxes / LIMITS["boxes"], scores / LIMITS["scores"])
    cost[expected[2][:, None] != found[2]] = np.inf
    both = expected[1], found[1]
    full = [values.min() for values in both if 0 < most <= len(values)]  # below 0: no limit
    cut = max([threshold, *full]) + LIMITS["scores"]
    rows, columns = set(range(len(expected[1]))), set(range(len(found[1])))

    def pair(limit: float) -> None:
        for row, column in zip(*np.unravel_index(np.argsort(cost, axis=None), cost.shape)):
            if cost[row, column] > limit or not np.isfinite(cost[row, column]):
                return
            if row in rows and column in columns:
                rows.remove(row)
                columns.remove(column)
                values = [boxes[row, column], scores[row, column]]
                if "masks" in largest:
                    values.append(np.abs(expected[3][row] - found[3][column]).max())
                for name, value in zip(names, np.nan_to_num(values, nan=np.inf)):
                    largest[name] = max(largest[name], float(value))

    pair(1.0)
    # What is at the cut may be in one of them only.
    rows = {row for row in rows if expected[1][row] > cut}
    columns = {column for column in columns if found[1][column] > cut}
    pair(np.inf)
    left = [expected[1][row] for row in rows] + [found[1][column] for column in columns]
    largest["scores"] = max([largest["scores"], *(float(x - cut) for x in left)])
    return largest


def compare(
    original: Detector, exported: Detector, images: list[np.ndarray], metadata: dict, runs: int
) -> dict:
    """Return the parity report of an exported detector, ready for JSON.

    Args:
        original: the detector in PyTorch.
        exported: the exported one.
        images: images (H, W, 3); each is compared at three sizes, the first is timed.
        metadata: what ``describe_model`` returns.
        runs: of how many runs a latency is the median.

    Returns:
        "sizes", a row for each of the three; "largest", the largest differences in all images;
        "limits"; "detections", how many were compared; "passed".

    Raises:
        InputError: if nothing was detected in any image, so that nothing was compared.
    """
    threshold, most = metadata["score_threshold"], metadata["detections_per_image"]
    detectors = {"pytorch": original, metadata["format"]: exported}
    rows, detections = [], 0
    for sized in zip(*(at_three_sizes(image, metadata) for image in images)):
        row: dict = {}
        for image in sized:
            expected, found = original(image), exported(image)
            detections += len(expected[1])
            for name, value in differences(expected, found, threshold, most).items():
                row[name] = max(row.get(name, 0.0), value)
        models = {name: lambda batch, run=run: run(batch[0]) for name, run in detectors.items()}
        times = time_models(models, dict.fromkeys(models, [sized[0]] * runs))
        row |= {f"{name}_ms": quartiles["median"] for name, quartiles in times.items()}
        rows.append({"size": list(sized[0].shape[1:]), **row})
    if not detections:
        raise InputError(
            f"nothing scores above {threshold} in any image, so nothing was compared; give "
            "--images with objects, or a lower threshold, such as "
            "MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.001 for an R-CNN"
        )
    largest = {name: max(row[name] for row in rows) for name in LIMITS if name in rows[0]}
    passed = all(value <= LIMITS[name] for name, value in largest.items())
    report = {"passed": passed, "largest": largest, "limits": LIMITS, "detections": detections}
    return {**report, "runs": runs, "sizes": rows}


def table(report: dict) -> str:
    """Return the sizes of a parity report as a table in Markdown."""
    names = {"size": "H x W", "boxes": "boxes (px)", "onnx_ms": "onnxruntime_ms"}
    rows = [{**row, "size": "{} x {}".format(*row["size"])} for row in report["sizes"]]
    formats = [".1f" if name.endswith("_ms") else ".1e" for name in rows[0]]
    return tabulate(rows, {name: names.get(name, name) for name in rows[0]}, "pipe", formats)
