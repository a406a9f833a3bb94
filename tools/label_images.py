#!/usr/bin/env python
"""Label images by a model: write what it detects, with scores, as a file in COCO format.

    python tools/label_images.py --config-file my/teacher.yaml --dataset mine_unlabeled \
        --weights output/mine/teacher/model_final.pth --output datasets/mine/labels.json

A multi-resolution teacher predicts with its TEST_BRANCH. What is done is kept beside the output,
and the same command goes on after an interruption. Named in DATASETS.UNLABELED, the file gives a
student its pseudo-labels (KD.UNLABELED.PSEUDO_LABELS).
"""

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, os.getcwd())  # for --import

import torch
import torch.utils.data as torchdata
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetFromList, MapDataset, MetadataCatalog
from detectron2.data.build import trivial_batch_collator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from detectron2.utils.file_io import PathManager
from pycocotools import mask as mask_util
from tqdm import tqdm

from msad_kd import KDTrainer
from msad_kd.checkpoint.files import write_json
from msad_kd.config.build import build_config, import_module
from msad_kd.config.changes import neutral_config
from msad_kd.data.classes import model_classes, with_classes_of
from msad_kd.data.coco_format import load_folder
from msad_kd.data.loader import CheckedMapper, explain_missing_data
from msad_kd.data.mapper import build_mapper
from msad_kd.utils.errors import InputError, input_error_of, nearest
from msad_kd.utils.hashes import hash_file, split_hash
from msad_kd.utils.unpickle import TrustFiles

SMALLEST = 1e-3  # pixels; a box with a shorter side is no label


def find_images(cfg: CfgNode, data_set: str | None, folder: str | None) -> tuple[list[dict], str]:
    """Return Detectron2's dicts of a data set or folder without their labels, and the folder.

    Raises:
        InputError: if the data set is not registered, or if something is missing.
    """
    if folder is not None:
        return load_folder(folder, folder, cfg.DATASETS.INVALID_ANNOTATIONS), folder
    if data_set not in DatasetCatalog.list():
        hint = nearest(data_set, DatasetCatalog.list())
        raise InputError(f"--dataset: '{data_set}' is not registered{hint}")
    with explain_missing_data((data_set,)):
        dicts = DatasetCatalog.get(data_set)
    metadata = MetadataCatalog.get(data_set)
    root = metadata.get("image_root") or metadata.get("image_dir")
    root = root or os.path.commonpath([os.path.dirname(entry["file_name"]) for entry in dicts])
    for entry in dicts:
        entry.pop("annotations", None)
    return dicts, root


def read_part(part: Path, run: dict) -> list[list[dict]]:
    """Return the annotations of the batches that an interrupted run has done; begin the file else.

    A line that was not written to its end is cut off.

    Raises:
        InputError: if the file is of another run.
    """
    done, end = [], 0
    if part.exists():
        with open(part, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                done.append(json.loads(line))
                end += len(line)
    if not done:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(run) + "\n")
        return []
    if other := [key for key in run if done[0].get(key) != run[key]]:
        raise InputError(
            f"'{part}' is of an interrupted run with other {', '.join(other)}; give the same, or "
            "remove it to begin anew"
        )
    os.truncate(part, end)
    return done[1:]


def annotations_of(found: Instances, image_id, classes: int, min_score: float) -> list[dict]:
    """Return an image's detections as annotations in COCO format, without ids.

    Those with less score, without a pixel, or of a class without a name are left out.
    """
    sides = found.pred_boxes.tensor[:, 2:] - found.pred_boxes.tensor[:, :2]
    keep = (found.scores >= min_score) & (found.pred_classes < classes)
    keep &= sides.min(dim=1).values >= SMALLEST
    if found.has("pred_masks"):
        keep &= found.pred_masks.flatten(1).any(dim=1)
    annotations = instances_to_coco_json(found[keep], image_id)
    for entry in annotations:
        entry["category_id"] += 1
        entry["iscrowd"], entry["area"] = 0, entry["bbox"][2] * entry["bbox"][3]
        if "segmentation" in entry:
            entry["area"] = float(mask_util.area(entry["segmentation"]))
        if points := entry.get("keypoints"):
            points[2::3] = [2] * (len(points) // 3)  # visible; the model gives a score here
            entry["num_keypoints"] = len(points) // 3
    return annotations


def categories_of(cfg: CfgNode, names: list[str]) -> list[dict]:
    """Return the categories, with ids from 1, of a model's classes."""
    points = {}
    if cfg.MODEL.KEYPOINT_ON:
        points["keypoints"] = list(MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).keypoint_names)
        points["skeleton"] = []
    return [{"id": number, "name": name, **points} for number, name in enumerate(names, start=1)]


@torch.no_grad()
def label(arguments: argparse.Namespace) -> None:
    """Label all images, or those that an interrupted run has left, and write the file.

    Raises:
        InputError: if an argument, the model or an image cannot be used.
    """
    output, size = Path(arguments.output), arguments.batch_size
    if output.exists():
        raise InputError(f"--output: '{output}' exists already; remove it, or name another file")
    cfg = build_config(arguments.config_file, arguments.opts)
    dicts, root = find_images(cfg, arguments.dataset, arguments.images)
    source = f"the config '{arguments.config_file}'"
    model = KDTrainer.load_model(cfg, arguments.weights, source)
    names, _ = model_classes(with_classes_of(cfg, model))
    if not names:
        raise InputError("the model's classes have no names; set DATASETS.CLASSES")
    images = [
        {
            "id": entry["image_id"],
            "file_name": os.path.relpath(entry["file_name"], root),
            "height": entry["height"],
            "width": entry["width"],
        }
        for entry in dicts
    ]
    digest = lambda content: hashlib.sha256(content.encode()).hexdigest()  # noqa: E731
    run = {
        "weights": hash_file(PathManager.get_local_path(split_hash(arguments.weights)[0])),
        "config": digest(neutral_config(cfg).dump()),
        "images": digest(json.dumps(images)),
        "min-score": arguments.min_score,
        "batch-size": size,
    }
    part = output.with_name(f"{output.name}.partial")
    done = read_part(part, run)
    rest = dicts[len(done) * size :]
    batches = torchdata.DataLoader(
        MapDataset(DatasetFromList(rest, copy=False), CheckedMapper(build_mapper(cfg, False))),
        batch_size=size,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=trivial_batch_collator,
    )
    bar = tqdm(total=len(dicts), initial=len(dicts) - len(rest), unit="image")
    with bar, open(part, "a") as file:
        for batch in batches:
            found = []
            for sample, prediction in zip(batch, model(batch)):
                instances = prediction["instances"].to("cpu")
                found += annotations_of(
                    instances, sample["image_id"], len(names), arguments.min_score
                )
            file.write(json.dumps(found, default=float) + "\n")
            file.flush()
            done.append(found)
            bar.update(len(batch))
    annotations = [entry for found in done for entry in found]
    for number, entry in enumerate(annotations, start=1):
        entry["id"] = number
    content = {
        "images": images,
        "categories": categories_of(cfg, names),
        "annotations": annotations,
    }
    write_json(output, content, indent=None)
    part.unlink()
    print(f"{output}: {len(annotations)} labels in {len(images)} images of '{root}'")


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
    parser.add_argument("--min-score", type=float, default=0.05, help="leave out what has less")
    parser.add_argument("--batch-size", type=int, default=1, help="images at a time")
    parser.add_argument("--import", dest="imports", action="append", default=[], metavar="MODULE")
    parser.add_argument("--trust-files", action=TrustFiles)
    parser.add_argument("opts", nargs="*", help="KEY VALUE pairs on top of the config")
    arguments = parser.parse_args(words)
    if arguments.batch_size < 1 or not 0 <= arguments.min_score <= 1:
        parser.error("--batch-size should be 1 or more, and --min-score from 0 to 1")
    try:
        for module in arguments.imports:
            import_module(module)
        label(arguments)
    except KeyboardInterrupt:
        sys.exit("label_images.py: interrupted; the same command goes on")
    except Exception as error:
        sentence = input_error_of(error)
        if sentence is None:
            raise
        sys.exit(f"label_images.py: {sentence}")


if __name__ == "__main__":
    main()
