#!/usr/bin/env python
"""Check data sets before a training: annotations, images, classes, and the sizes of the objects.

    python tools/check_dataset.py --config-file my/lr.yaml
    python tools/check_dataset.py --json train.json --images train

The first command checks the data sets of DATASETS.TRAIN and TEST, also against the config, and the
images of DATASETS.UNLABELED. A training stops at the first fault; here all are listed. Prints the
report and writes report.txt, report.json (with all faulty records) and sizes.png to --output. The
exit code is 1 if there are errors, and 0 if there are warnings alone.
"""

import argparse
import contextlib
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from dataset_report import DataSet, Report, Size
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import check_image_size
from tqdm import tqdm

from msad_kd import InputError, build_config
from msad_kd.config.imports import add_code_options
from msad_kd.data.annotations import check_content, parse_json, usable_content
from msad_kd.data.annotations.findings import INVALID, MENDED, PLURALS, REFUSED, name_record
from msad_kd.data.classes import align_classes, annotation_file, spare_classes
from msad_kd.data.coco_format import class_order, dicts_of, make_dicts
from msad_kd.data.dict_checks import (
    check_files,
    check_keypoint_counts,
    check_masks,
    check_shapes,
    explain_missing_data,
    missing_files,
)
from msad_kd.data.images import ImageError, image_size, read_image, size_of, unreadable
from msad_kd.data.mapper import build_mapper
from msad_kd.data.statistics import MANY, enlarged_share
from msad_kd.evaluation.build import build_evaluator
from msad_kd.modeling.classes import frame_of
from msad_kd.utils.arguments import positive
from msad_kd.utils.errors import in_one_sentence

FACTORS = (0.25, 0.375, 0.5, 0.75, 1)
SHOWN = 10  # faulty images of a data set that are reported one by one


def read_coco(report, name, json_file, images, drop):
    """Check an annotation file, note its faults, and return the dicts and classes of the rest."""
    source = f"data set '{name}': '{json_file}'"
    findings = check_content(parse_json(json_file, source))
    levels = {REFUSED: "error", INVALID: "warning" if drop else "error", MENDED: "note"}
    for problem in findings.problems:
        records = findings.content.get(PLURALS.get(problem.record), ())
        names = [name_record(problem.record, records[row], row) for row in problem.rows]
        others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        words = f"{source}: {problem.example}{others}"
        report.add(levels.get(problem.severity, "warning"), words, names)
    if any(problem.severity == REFUSED for problem in findings.problems):
        return [], []
    content = usable_content(findings)
    classes, index_of = class_order(content["categories"], name)
    return make_dicts(content, images, index_of), classes


def read_registered(report, name):
    """Return the dicts and classes of a registered data set without a file in COCO format."""
    words = "it is not in COCO format, so what Detectron2 reads of it is checked, not its files"
    report.add("note", f"data set '{name}': {words}")
    with explain_missing_data((name,)):
        dicts = DatasetCatalog.get(name)
    missing = set(missing_files([entry["file_name"] for entry in dicts]))
    dicts = [entry if entry["file_name"] in missing else _with_size(entry) for entry in dicts]
    return dicts, list(MetadataCatalog.get(name).get("thing_classes") or ())


def _with_size(entry):
    with contextlib.suppress(ImageError):  # check_images will name it
        height, width = size_of(entry)
        return {**entry, "height": height, "width": width}
    return entry


def fault_of(entry, quick):
    """Return what is wrong with a dict's image, or None; ``quick`` reads the image's header."""
    file = entry["file_name"]
    try:
        # In quick mode, something of the size that the header names.
        image = np.broadcast_to(np.uint8(0), image_size(file)) if quick else read_image(file)
        check_image_size({key: entry[key] for key in entry if key != "annotations"}, image)
    except InputError as error:
        return str(error)
    except Exception as error:  # of another size; or what Pillow's plugins raise
        return str(unreadable(file, error))


def check_images(report, data_set, level, args):
    """Note images that are missing, cannot be read, or have another size than is said."""
    name, files = data_set.name, [entry["file_name"] for entry in data_set.dicts]
    with report.catching():
        check_files(files, data_set.source, name)
    missing = set(missing_files(files))
    there = [entry for entry in data_set.dicts if entry["file_name"] not in missing]
    with ThreadPoolExecutor(args.workers) as pool:
        faults = pool.map(partial(fault_of, quick=args.quick), there)
        bar = tqdm(faults, f"images of {name}", len(there), unit="image", disable=not there)
        faults = [fault for fault in bar if fault]
    for fault in faults[:SHOWN]:
        report.add(level, f"data set '{name}': {fault}")
    if len(faults) > SHOWN:
        words = f"{len(faults) - SHOWN} more images cannot be used; report.json lists them"
        report.add(level, f"data set '{name}': {words}", faults[SHOWN:])


def check_unlabeled_images(report, cfg, name, args):
    """Note what is wrong with images of DATASETS.UNLABELED, and their labels; return the images."""
    if (file := annotation_file(name)) and not os.path.exists(file):
        report.add("note", f"data set '{name}': there is no '{file}' yet to check")
        return []
    with report.catching(), explain_missing_data((name,)):
        dicts = dicts_of(name, cfg.DATASETS.INVALID_ANNOTATIONS)
        data_set = DataSet(name, file or "a folder of images", "UNLABELED", dicts, [])
        check_images(report, data_set, level_of_images(cfg, name), args)
        return dicts
    return []


def check_against_config(report, cfg, quick):
    """Note what of the data does not fit the config, as a training would."""
    with report.catching():
        if cfg.DATASETS.TRAIN and (words := spare_classes(cfg)):
            report.add("warning", words)
    for data_set in report.data_sets:
        name, train = data_set.name, data_set.role == "TRAIN"
        with report.catching():
            align_classes(cfg, (name,))
        with report.catching(level_of_images(cfg, name)):
            check_shapes(data_set.dicts, name, build_mapper(cfg, train))
        if train and cfg.MODEL.MASK_ON:
            with report.catching():
                check_masks(data_set.dicts, name)
        if train and cfg.MODEL.KEYPOINT_ON:
            with report.catching():
                count = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
                check_keypoint_counts(data_set.dicts, name, count)
        if name in cfg.DATASETS.TEST:
            check_evaluation(report, cfg, name, quick)


def check_evaluation(report, cfg, name, quick):
    """Note what the evaluation of a data set would refuse, unless it has errors already.

    In quick mode, not for Cityscapes, whose masks it would read.
    """
    kind = MetadataCatalog.get(name).get("evaluator_type", "coco")
    faulty = [x for x in report.remarks if x["level"] == "error" and f"'{name}'" in x["words"]]
    if faulty or (quick and kind == "cityscapes_instance"):
        return
    # A training script may have an evaluator of its own.
    level = "error" if kind in ("coco", "cityscapes_instance") else "warning"
    with report.catching(level), tempfile.TemporaryDirectory() as folder:
        build_evaluator(cfg, name, folder)


def level_of_images(cfg, name):
    """Return what an unusable image is: training may drop it, an evaluation does not."""
    drop = cfg.DATASETS.INVALID_ANNOTATIONS == "drop" and name not in cfg.DATASETS.TEST
    return "warning" if drop else "error"


def choose_sizes(cfg, data_sets):
    """Return the sizes of the tables: FACTORS of the high resolution, or of the images' own.

    A student's or teacher's config knows both resolutions; another config has one of them.
    """
    if cfg is None or not cfg.INPUT.MIN_SIZE_TEST:
        sides = [side for x in data_sets for side in x.image_sizes.min(axis=1)]
        own = float(np.median(sides)) if sides else 0
        labels = {0.5: "half of their own size", 1: "images as they are"}
        return [Size(labels.get(f, ""), f * own, factor=f) for f in FACTORS]
    frame = frame_of(cfg)
    scale, short, longest = cfg.KD.SCALE, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    if frame == "lr":
        short, longest = scale * short, scale * longest
    labels = {1: "HR", 1 / scale: "LR"} if frame else {1 / scale: "LR of an HR config", 1: "config"}
    factors = sorted({*FACTORS, 1 / scale})
    return [Size(labels.get(f, ""), f * short, f * longest) for f in factors]


def judge_sizes(report):
    """Warn of objects that are small at low resolution, and of images that are enlarged."""
    for row in report.size_rows():
        share = row["below_8_px"] / row["objects"]
        if row["size"] in ("LR", "config", "images as they are") and share > MANY:
            report.add(
                "warning",
                f"data set '{row['data_set']}': {share:.0%} of the objects are narrower than 8 px "
                f"at a short side of {row['short_side']:.0f} px ({row['size']}), which is hard for "
                "any model; choose a larger size if you need them",
            )
    largest = report.sizes[-1]
    for x in report.data_sets if largest.factor is None else ():
        share = enlarged_share(np.sort(x.image_sizes), largest.short, largest.longest)
        if share > MANY:
            words = f"{share:.0%} of the images are smaller than the {largest.short:g} px that they"
            words += " are resized to; enlarging adds no detail"
            report.add("warning", f"data set '{x.name}': {words}")


def check(args):
    """Check what the command line names, and return the report.

    Raises:
        InputError: if the config cannot be read.
    """
    report, cfg = Report(), None
    if args.json:
        wanted = [(os.path.splitext(os.path.basename(args.json))[0], "")]
    else:
        cfg = build_config(args.config_file, args.opts)
        wanted = [(name, "TRAIN") for name in cfg.DATASETS.TRAIN]
        wanted += [(name, "TEST") for name in cfg.DATASETS.TEST if name not in cfg.DATASETS.TRAIN]
    drop = cfg is not None and cfg.DATASETS.INVALID_ANNOTATIONS == "drop"
    for name, role in wanted:
        file = annotation_file(name) if cfg else args.json
        with report.catching():
            images = MetadataCatalog.get(name).image_root if cfg and file else args.images
            found = read_coco(report, name, file, images, drop) if file else ()
            dicts, classes = found or read_registered(report, name)
            data_set = DataSet(name, file or "registered in Python", role, dicts, classes)
            report.data_sets.append(data_set)
            check_images(report, data_set, level_of_images(cfg, name) if cfg else "error", args)
        if role == "TRAIN" and name in cfg.DATASETS.TEST:
            words = "is in DATASETS.TEST, too: its AP is of images that were trained on"
            report.add("warning", f"data set '{name}' {words}")
    names = cfg.DATASETS.UNLABELED if cfg else ()
    unlabeled = [x for name in names for x in check_unlabeled_images(report, cfg, name, args)]
    report.sizes = choose_sizes(cfg, report.data_sets)
    if cfg:
        check_against_config(report, cfg, args.quick)
    report.compare(unlabeled)
    judge_sizes(report)
    return report


def main(arguments=None):
    """Run the command line; the exit code is 1 if there are errors."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--config-file", help="the config whose DATASETS.TRAIN and TEST are checked")
    add("--json", help="an annotation file in COCO format, instead of a config")
    add("--images", help="the folder of its images")
    add("--quick", action="store_true", help="read only the headers of the images")
    workers = min(8, os.cpu_count() or 1)
    add("--workers", type=positive, default=workers, help="threads that read images")
    add_code_options(parser)
    add("--output", default="output/check_dataset", help="the folder to write to")
    add("opts", nargs="*", metavar="KEY VALUE", help="pairs on top of the config file")
    args = parser.parse_args(arguments)
    if bool(args.config_file) == bool(args.json) or bool(args.json) != bool(args.images):
        parser.error("give either --config-file, or --json and --images")
    with in_one_sentence(parser.prog):
        report = check(args)
        report.write(args.output)
    print(report.text(), end="")
    print(f"Written to {args.output}")
    if any(remark["level"] == "error" for remark in report.remarks):
        sys.exit(1)


if __name__ == "__main__":
    main()
