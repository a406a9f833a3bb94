#!/usr/bin/env python
r"""Label images by a model: write what it detects, with scores, as a file in COCO format.

    python tools/label_images.py --config-file my/teacher.yaml --dataset mine_unlabeled \
        --weights output/mine/teacher/model_final.pth --output datasets/mine/labels.json

A multi-resolution teacher predicts with its TEST_BRANCH. TEST.AUG.ENABLED True applies Detectron2's
test-time augmentation. Finished images are kept beside the output; the same command continues
after a stop. See docs/unlabeled.md.
"""

import argparse
import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.utils.data as torchdata
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MapDataset, MetadataCatalog
from detectron2.data.build import trivial_batch_collator
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.structures import Instances
from detectron2.utils.file_io import PathManager
from torch import nn
from tqdm import tqdm

from msad_kd import KDTrainer
from msad_kd.checkpoint.files import write_json
from msad_kd.config.build import build_config
from msad_kd.config.changes import neutral_config
from msad_kd.config.imports import add_code_options
from msad_kd.data.classes import model_classes, with_classes_of
from msad_kd.data.coco_format import load_folder
from msad_kd.data.dict_checks import explain_missing_data
from msad_kd.data.images import size_of
from msad_kd.data.keypoints import read_keypoints
from msad_kd.data.mapper import build_mapper
from msad_kd.evaluation.build import check_augmentation
from msad_kd.evaluation.rle import coco_annotations
from msad_kd.utils.errors import InputError, first_line, input_error_of, nearest
from msad_kd.utils.hashes import hash_file, split_hash


def find_images(cfg: CfgNode, data_set: str | None, folder: str | None) -> tuple[list[dict], str]:
    """Return the images of a folder or data set as Detectron2's dicts, and the folder.

    Raises:
        InputError: if the data set is not registered, or if something is missing.
    """
    if folder is not None:
        if not os.path.isdir(folder):
            raise InputError(f"--images: there is no folder '{folder}'")
        return load_folder(folder, folder, cfg.DATASETS.INVALID_ANNOTATIONS), folder
    if data_set not in DatasetCatalog.list():
        hint = nearest(data_set, DatasetCatalog.list())
        raise InputError(f"--dataset: '{data_set}' is not registered{hint}")
    with explain_missing_data((data_set,)):
        dicts = [{**x, "annotations": []} for x in DatasetCatalog.get(data_set)]
    metadata = MetadataCatalog.get(data_set)
    return dicts, metadata.get("image_root") or metadata.get("image_dir") or ""


@dataclass
class Readable:
    """A mapper that leaves out, with a warning, the images that cannot be used."""

    mapper: Callable[[dict], dict]

    def __call__(self, image: dict) -> dict:
        """Return the mapper's sample, or an empty one."""
        try:
            return self.mapper(image)
        except InputError as error:
            logging.getLogger(__name__).warning("%s; it is left out", error)
            return {}


def read_partial(file: Path) -> dict[str, list[dict]]:
    """Return the annotations that an interrupted run has made by image.

    A line that was not written to its end is cut off.
    """
    content = file.read_bytes() if file.exists() else b""
    end = content.rfind(b"\n") + 1
    if content:
        os.truncate(file, end)
    batches = map(json.loads, content[:end].splitlines())
    return {image: found for batch in batches for image, found in batch.items()}


def annotations_of(found: Instances, classes: int, min_score: float) -> list[dict]:
    """Return an image's detections as annotations in COCO format, without their own ids.

    Those with less score, without a pixel, or of a class without a name are left out.
    """
    keep = (found.scores >= min_score) & (found.pred_classes < classes)
    if found.has("pred_masks"):
        keep &= found.pred_masks.flatten(1).any(dim=1)
    return coco_annotations(found[keep], image_id=0)  # it is known when all are labelled


def detect(model: nn.Module, batch: dict[str, dict], classes: int, min_score: float) -> dict:
    """Return the annotations of each image of a batch by its key; None where a sample is empty."""
    readable = {key: sample for key, sample in batch.items() if sample}
    predictions = model([*readable.values()]) if readable else ()
    found = dict.fromkeys(batch)
    for key, prediction in zip(readable, predictions):
        found[key] = annotations_of(prediction["instances"].to("cpu"), classes, min_score)
    return found


@torch.no_grad()
def label(arguments: argparse.Namespace) -> None:
    """Label all images, or those that an interrupted run has left, and write the file.

    Raises:
        InputError: if an argument, the model or an image cannot be used.
    """
    output, size, min_score = Path(arguments.output), arguments.batch_size, arguments.min_score
    if output.exists():
        raise InputError(f"--output: '{output}' exists already; remove it, or name another file")
    cfg = build_config(arguments.config_file, arguments.opts)
    check_augmentation(cfg)
    dicts, root = find_images(cfg, arguments.dataset, arguments.images)
    weights = arguments.weights
    model = KDTrainer.load_model(cfg, weights, f"the config '{arguments.config_file}'")
    names, _ = model_classes(cfg := with_classes_of(cfg, model))
    if not names:
        raise InputError("the model's classes have no names; set DATASETS.CLASSES")
    images = [
        {
            **{"id": x["image_id"], "file_name": os.path.relpath(x["file_name"], root or ".")},
            **dict(zip(("height", "width"), size_of(x))),
        }
        for x in dicts
    ]
    # An interrupted run is known by what makes its labels, and an image by its path and size: ids
    # change when another image is removed.
    neutral = neutral_config(cfg)
    neutral.DATASETS.pop("INVALID_ANNOTATIONS", None)
    weights = hash_file(PathManager.get_local_path(split_hash(weights)[0]))
    run = json.dumps([weights, neutral.dump(), os.path.abspath(root), min_score, size])
    partial = output.with_name(f"labels_{hashlib.sha256(run.encode()).hexdigest()[:8]}.partial")
    sides = [f"{image['width']} x {image['height']}" for image in images]
    keys = [f"{os.path.abspath(x['file_name'])}, {side}" for x, side in zip(dicts, sides)]
    done = read_partial(partial)
    rest = [(x, key) for x, key in zip(dicts, keys) if key not in done]
    mapper = build_mapper(cfg, is_train=False)
    if cfg.DATASETS.INVALID_ANNOTATIONS == "drop":
        mapper = Readable(mapper)
    batches = torchdata.DataLoader(
        MapDataset([x for x, _ in rest], mapper),
        batch_size=size,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=trivial_batch_collator,
    )
    bar = tqdm(total=len(dicts), initial=len(dicts) - len(rest), unit="image")
    if cfg.TEST.AUG.ENABLED:
        model = GeneralizedRCNNWithTTA(cfg, model)
    output.parent.mkdir(parents=True, exist_ok=True)
    with bar, open(partial, "a") as file:
        for start, batch in zip(range(0, len(rest), size), batches):
            paths = [key for _, key in rest[start : start + size]]
            found = detect(model, dict(zip(paths, batch)), len(names), min_score)
            file.write(json.dumps(found) + "\n")
            file.flush()
            done |= found
            bar.update(len(batch))
    # An image that cannot be used would be one of background.
    used = [(image, done[key]) for image, key in zip(images, keys) if done[key] is not None]
    images = [image for image, _ in used]
    annotations = [{**entry, "image_id": image["id"]} for image, found in used for entry in found]
    annotations = [{"id": i, **entry} for i, entry in enumerate(annotations, start=1)]
    points = {}
    if cfg.MODEL.KEYPOINT_ON:
        points["keypoints"] = list(read_keypoints(cfg)["keypoint_names"])
    categories = [{"id": i, "name": x, **points} for i, x in enumerate(names, start=1)]
    content = {"images": images, "categories": categories, "annotations": annotations}
    write_json(output, content, indent=None)
    partial.unlink(missing_ok=True)  # another run of the same settings may have ended
    left_out = f"; {lost} images are left out" if (lost := len(dicts) - len(images)) else ""
    print(f"{output}: {len(annotations)} labels in {len(images)} images of '{root}'{left_out}")


def main(words: list[str] | None = None) -> None:
    """Read the command line and label the images."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="the model's config")
    parser.add_argument("--weights", required=True, help="its checkpoint; every key has to fit")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--dataset", help="a registered data set, whose labels are not read")
    which.add_argument("--images", help="a folder of images")
    parser.add_argument("--output", required=True, help="the file to write")
    parser.add_argument("--min-score", type=float, default=0.05, help="lowest score to write")
    parser.add_argument("--batch-size", type=int, default=1, help="images at a time")
    add_code_options(parser)
    parser.add_argument("opts", nargs="*", help="KEY VALUE pairs on top of the config")
    arguments = parser.parse_args(words)
    if arguments.batch_size < 1 or not 0 <= arguments.min_score <= 1:
        parser.error("--batch-size should be 1 or more, and --min-score from 0 to 1")
    try:
        label(arguments)
    except KeyboardInterrupt:
        sys.exit("label_images.py: interrupted; the same command goes on")
    except Exception as error:
        sentence = input_error_of(error)
        if sentence is None and isinstance(error, OSError):
            sentence = f"{first_line(error)}; mend that, and the same command goes on"
        if sentence is None:
            raise
        sys.exit(f"label_images.py: {sentence}")


if __name__ == "__main__":
    main()
