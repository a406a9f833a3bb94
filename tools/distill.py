#!/usr/bin/env python
"""Distil a low-resolution student of any FPN detector: one command from its config to a table.

    python tools/distill.py --config-file CONFIG --weights hr.pth --output output/mine

CONFIG is the yacs config of a Mask R-CNN, Faster R-CNN, RetinaNet or FCOS at high resolution: a
file, or a name in Detectron2's model zoo. From it come the configs of an aligned teacher, a student
and its control (OUTPUT/configs). The data are checked, the three are trained and measured, and the
student is exported for stock Detectron2, or as ONNX where that has no such backbone. After a stop,
the same command continues. KEY VALUE pairs change CONFIG; role:KEY VALUE pairs change what
is derived, with teacher, student or control as the role. SOLVER.STEPS follow a role's MAX_ITER.

    ... SOLVER.IMS_PER_BATCH 8 teacher:SOLVER.MAX_ITER 3000 student:SOLVER.BASE_LR 0.002

--unlabeled adds as many images without labels to the student's batches. The detector of --weights
labels them once, or without it the teacher in each step.
"""

import argparse
import glob
import json
import os
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

if not __package__:  # run as a script, which does not put the repository on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from distill_configs import (
    check_weights,
    describe,
    make_configs,
    make_grid,
    split_roles,
)

from msad_kd.checkpoint.files import write_json
from msad_kd.checkpoint.reading import check_exists, fetch
from msad_kd.config.build import scale_to_processes
from msad_kd.config.imports import add_code_options
from msad_kd.data.cityscapes_files import INSTANCES, POLYGONS, is_cityscapes
from msad_kd.data.classes import model_classes
from msad_kd.data.coco_format import datasets_folder
from msad_kd.data.dict_checks import explain_missing_data
from msad_kd.distill.student import check_losses
from msad_kd.distill.teacher_spec import TeacherSpec
from msad_kd.utils.errors import InputError, in_one_sentence
from msad_kd.utils.hashes import check_hash, hash_file, split_hash
from msad_kd.utils.signals import Stopped, on_signal, stop
from projects.study import run as study
from projects.study.jobs import locked

TOOLS = Path(__file__).resolve().parent


def command_line(tool, words):
    """Return a command as a line to type."""
    return "  " + shlex.join(map(str, ["python", f"tools/{tool}.py", *words]))


def run_tool(name, *arguments):
    """Run another command of this folder, and end with its failure."""
    command = [sys.executable, TOOLS / name, *map(str, arguments)]
    try:
        # It inherits the lock of the folder.
        start = partial(subprocess.Popen, cwd=TOOLS.parent, close_fds=False)
        with on_signal(stop), start(command) as process:
            try:
                code = process.wait()
            finally:
                process.terminate()  # does nothing if it has ended
    except Stopped:
        print("distill.py: interrupted; the same command goes on", file=sys.stderr)
        raise
    if code:
        sys.exit(
            f"distill.py: {name} stopped; its last lines say why. Mend it, and type this again"
        )


def check_data(args, cfg):
    """Check all data sets; once they were sound, without reading every pixel again.

    End the command if an annotation file has changed since: models and AP would be of the old one.
    """
    folder, config = args.output / "data", args.output / "configs" / "student.yaml"
    sound, hashes = folder / "SOUND", hash_annotations(cfg)
    before = json.loads(sound.read_text() or "{}") if sound.exists() else {}
    for file in hashes:
        if before.get(file, hashes[file]) != hashes[file]:
            sys.exit(
                f"distill.py: '{file}' has changed since '{args.output}' was begun, whose models "
                "and AP are of the old one; choose another --output, or delete this one"
            )
    (name,) = cfg.DATASETS.TEST
    with explain_missing_data((name,)):
        dicts = DatasetCatalog.get(name)
    if not any(entry.get("annotations") for entry in dicts):
        sys.exit(f"distill.py: '{name}' has no objects, so there is no AP to compare by")
    quick = ["--quick"] if sound.exists() else []
    run_tool("check_dataset.py", "--config-file", config, "--output", folder, *quick)
    write_json(sound, {**before, **hashes})


def hash_annotations(cfg):
    """Return the SHA-256 of each annotation file of a config's labelled data sets, by its path."""
    names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    files = {os.path.abspath(MetadataCatalog.get(name).get("json_file", "")) for name in names}
    for name in filter(is_cityscapes, names):
        scenes = os.path.join(os.path.abspath(MetadataCatalog.get(name).gt_dir), "*", "*")
        files |= {file for suffix in (POLYGONS, INSTANCES) for file in glob.glob(scenes + suffix)}
    return {file: hash_file(file) for file in sorted(files) if os.path.isfile(file)}


def label_images(words, cfg):
    """Label the images without labels for the student's config, unless that is done."""
    if not words[-1].exists():
        print("HR labels the images without labels:", flush=True)
        run_tool("label_images.py", *words)
    print(describe_labels(words[-1], cfg), flush=True)


def describe_labels(file, cfg):
    """Return a line on how many labels count as objects, next to those of labelled images.

    Raises:
        InputError: if none does.
    """
    labels, score = json.loads(file.read_text()), list(cfg.KD.UNLABELED.SCORE)
    names = [category["name"] for category in labels["categories"]]  # their ids are 1, 2, ...
    limits = (
        dict(zip(model_classes(cfg)[0], score)) if len(score) > 1 else dict.fromkeys(names, *score)
    )
    sure = sum(x["score"] >= limits[names[x["category_id"] - 1]] for x in labels["annotations"])
    with explain_missing_data(cfg.DATASETS.TRAIN):
        labelled = [x for name in cfg.DATASETS.TRAIN for x in DatasetCatalog.get(name)]
    objects = sum(len(x.get("annotations", ())) for x in labelled)
    if labels["annotations"] and not sure:
        raise InputError(
            f"none of the detections in '{file}' has a score of KD.UNLABELED.SCORE {score} or "
            "more, so the images would teach that they are empty; set a lower one "
            '(student:KD.UNLABELED.SCORE "[0.3]"), or train the detector that labels longer'
        )
    mine, theirs = sure / len(labels["images"]), objects / len(labelled)
    return "Warning: " * (mine < theirs / 10) + (
        f"An image without labels gets {mine:.1f} labels (KD.UNLABELED.SCORE {score}); a labelled "
        f"one has {theirs:.1f} objects. tools/analysis/suggest_scores.py suggests a score by the "
        "detector's errors"
    )


def export_student(args, cfg):
    """Export the student for stock Detectron2, or as ONNX if that cannot build its backbone."""
    stock = cfg.MODEL.BACKBONE.NAME == "build_resnet_fpn_backbone"
    if not stock and cfg.MODEL.KEYPOINT_ON:
        name = cfg.MODEL.BACKBONE.NAME
        print(f"Not exported: Detectron2 has no {name}, and ONNX cannot take keypoints")
        return
    config, weights = args.output / "configs" / "control.yaml", Path(cfg.OUTPUT_DIR)
    run_tool(
        *("export_model.py", "--config-file", config, "--weights", weights / "model_final.pth"),
        *("--output", args.output / "export", "--format", "detectron2" if stock else "onnx"),
    )


def summarize(args, cfg):
    """Return the gains over control and baseline, and the commands to type next."""
    models = json.loads((args.output / "table.json").read_text())["models"]
    models = {model["row"]: model for model in models}
    titles, lines = {"control": "its control", "baseline": "LR without a teacher"}, []
    for other in [name for name in titles if name in models]:
        gains = [
            # Adding 0 turns -0.0 into 0.0.
            f"{name} AP {round(models['student'][kind]['AP'] - models[other][kind]['AP'], 1) + 0:+}"
            for kind, name in (("bbox", "box"), ("segm", "mask"), ("keypoints", "keypoint"))
            if kind in models[other]
        ]
        lines.append(f"The student against {titles[other]}, one seed: {', '.join(gains)}")
    weights = Path(cfg.OUTPUT_DIR) / "model_final.pth"
    model = ["--config-file", args.output / "configs" / "control.yaml", "--weights", weights]

    commands = [command_line("predict", [*model, "IMAGES", "--output", args.output / "found"])]
    if not cfg.MODEL.KEYPOINT_ON:  # keypoints cannot be traced
        onnx = ["--format", "onnx", "--output", args.output / "onnx"]
        commands.append(command_line("export_model", [*model, *onnx]))
    export = args.output / "export"
    lines += [f"The exported student is in '{export}'."] if export.exists() else []
    lines.append(f"A picture is in '{args.output / 'scenes.png'}'. Next:")
    return "\n".join([*lines, *commands])


def parse_arguments(arguments=None):
    """Read the command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--config-file", required=True, metavar="CONFIG", help="of the high-resolution detector")
    add("--output", required=True, type=Path, help="folder of configs, runs and results")
    add("--weights", help="the trained high-resolution detector, which the teacher starts from")
    add("--teacher", metavar="FILE", help="a teacher of an earlier run; trains no teacher")
    add("--baseline", metavar="FILE", help="a detector of the student's resolution to compare with")
    add("--unlabeled", metavar="IMAGES", help="a folder or data set for the student to learn from")
    add(
        "--labels-by",
        choices=("hr", "teacher"),
        help="who labels them (default: hr, if --weights is given)",
    )
    add("--scale", type=int, default=2, help="high-resolution side over low-resolution side")
    add("--no-control", dest="control", action="store_false", help="leave the control out")
    add("--detections", type=study.positive, default=100, help="per image when costs are measured")
    add("--dry-run", action="store_true", help="write the configs, and train nothing")
    add("--num-gpus", type=int, default=min(1, torch.cuda.device_count()), help="of each training")
    add("--slots", type=study.positive, default=study.count_cores(), help="trainings at a time")
    add_code_options(parser)
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="see above")
    return parser.parse_args(arguments)


def main(arguments=None):
    """Run the command line."""
    args = parse_arguments(arguments)
    args.output = args.output.absolute()  # the runs start in the repository
    os.environ["DETECTRON2_DATASETS"] = os.path.abspath(datasets_folder())
    with in_one_sentence("distill.py"):
        for name in ("weights", "teacher", "baseline"):
            if path := getattr(args, name):
                check_exists(path, f"--{name}")
                file = fetch(split_hash(path)[0], f"--{name}")
                check_hash(file, path)
                setattr(args, name, os.path.abspath(file))
        if args.labels_by and not (args.unlabeled and (args.weights or args.labels_by != "hr")):
            raise InputError("--labels-by needs --unlabeled IMAGES, and hr needs --weights FILE")
        with locked(args.output):  # else a run that is at work there would read other configs
            configs, labels = make_configs(args, split_roles(args.opts))
            check_weights(args, configs)
            check_losses(configs["student"], TeacherSpec.from_config(configs["student"]))
            grid = make_grid(args, configs)
            processes = max(1, args.num_gpus)
            untrained = {"hr": True, "teacher": args.teacher, "control": not args.control}
            trained = {name for name in configs if not untrained.get(name)}
            scaled = {n: scale_to_processes(c, processes) for n, c in configs.items()}
            print(describe(scaled, trained))
            if args.dry_run:
                if labels:
                    print("Before the student is trained, make its labels:")
                    print(command_line("label_images", labels))
                return
            check_data(args, configs["control"])
            if labels:
                label_images(labels, configs["student"])
    words = ["--grid", grid, "--num-gpus", args.num_gpus, "--slots", args.slots]
    study.main([*map(str, words)], name="distill.py")
    export_student(args, configs["student"])
    print(summarize(args, configs["student"]))


if __name__ == "__main__":
    main()
