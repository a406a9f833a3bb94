#!/usr/bin/env python
"""Distil a low-resolution student of any FPN detector: one command from its config to a table.

    python tools/distill.py --config-file CONFIG --weights hr.pth --output output/mine

CONFIG is the yacs config of a Mask R-CNN, Faster R-CNN, RetinaNet or FCOS at high resolution: a
file, or a name in Detectron2's model zoo. From it come the configs of an aligned teacher, a student
and its control (OUTPUT/configs). The data are checked, the three are trained and measured, and the
student is exported for stock Detectron2, or as ONNX where that has no such backbone. Stopped, the
same command goes on where it was. KEY VALUE pairs change CONFIG; role:KEY VALUE pairs change what
is derived, with teacher, student or control as the role. SOLVER.STEPS follow a role's MAX_ITER.

    ... SOLVER.IMS_PER_BATCH 8 teacher:SOLVER.MAX_ITER 3000 student:SOLVER.BASE_LR 0.002

By --unlabeled the student's batches have as many images besides, which the teacher labels.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

if not __package__:  # run as a script, which does not put the repository on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode
from tabulate import tabulate

from msad_kd import KDTrainer
from msad_kd.checkpoint.files import replacing
from msad_kd.checkpoint.reading import fetch
from msad_kd.config.build import build_config
from msad_kd.config.derive import derive_configs, fit_warmups
from msad_kd.losses.terms import read_losses
from msad_kd.utils.errors import InputError
from projects.study import run as study

TOOLS = Path(__file__).resolve().parent
ROLES = ("teacher", "student", "control")
SEED = 1


def split_roles(pairs):
    """Split KEY VALUE pairs into those of CONFIG and those of each role."""
    if len(pairs) % 2:
        raise InputError(f"KEY VALUE pairs: '{pairs[-1]}' has no value")
    options = {"": [], **{role: [] for role in ROLES}}
    for key, value in zip(pairs[::2], pairs[1::2]):
        role, _, name = key.rpartition(":")
        if role not in options:
            raise InputError(f"'{key}': there is no role '{role}'; use {', '.join(ROLES)}")
        options[role] += [name, value]
    return options


def find_config(name, folder):
    """Return the path of a config: a file, or one of Detectron2's model zoo, which is copied."""
    if os.path.exists(name) or name.endswith(".py"):  # build_config says what a .py file lacks
        return name
    try:
        # Those of RetinaNet compute their anchors in YAML, which other files may not.
        cfg = model_zoo.get_config(name)
    except RuntimeError:
        raise InputError(f"--config-file: '{name}' is no file and not in the model zoo") from None
    path = folder / "model_zoo.yaml"
    with replacing(path) as part:
        part.write_text(cfg.dump())
    return str(path)


def write_config(cfg, path, options):
    """Check a config with KEY VALUE pairs on top, and write it whole."""
    with replacing(path) as part:
        part.write_text(cfg.dump())
        given = dict(zip(options[::2], options[1::2]))
        length = given.get("SOLVER.MAX_ITER", "")
        if length.isdigit() and "SOLVER.STEPS" not in given:  # the rate falls as late as before
            steps = tuple(x * int(length) // cfg.SOLVER.MAX_ITER for x in cfg.SOLVER.STEPS)
            options = [*options, "SOLVER.STEPS", steps]
        cfg = build_config(str(part), options)
        if cfg.TEST.PATIENCE:
            raise InputError(
                f"TEST.PATIENCE is {cfg.TEST.PATIENCE}, but distill.py evaluates after the last "
                "iteration alone, since a model chosen by the images of the table would look too "
                "good; set it to 0, or train by train_net.py"
            )
        if "SOLVER.MAX_ITER" in given and not {"SOLVER.WARMUP_ITERS", "KD.LOSSES"} & set(given):
            fit_warmups(cfg)
        part.write_text(cfg.dump())
    return cfg


def add_unlabeled(cfg, images):
    """Let a student learn from images without labels: a folder, or a data set that has a name."""
    known = cfg.DATASETS.COCO_FORMAT
    if os.path.isdir(images) and images not in [entry["name"] for entry in known]:
        folder, images = os.path.abspath(images), "unlabeled"
        cfg.DATASETS.COCO_FORMAT = [*known, {"name": images, "images": folder}]
    cfg.DATASETS.UNLABELED = (images,)
    cfg.SOLVER.UNLABELED_PER_BATCH = cfg.SOLVER.IMS_PER_BATCH
    cfg.KD.UNLABELED.PSEUDO_LABELS = True


def make_configs(args, options) -> dict[str, CfgNode]:
    """Write OUTPUT/configs, and return the configs by the name of their row."""
    folder = args.output / "configs"
    source = build_config(find_config(args.config_file, folder), options[""])
    if not source.DATASETS.TRAIN or not source.DATASETS.TEST:
        raise InputError("DATASETS.TRAIN and DATASETS.TEST of the config should both name data")
    configs = {"hr": source.clone(), **derive_configs(source, args.scale)}
    weights = {role: args.output / role / f"seed_{SEED}" / "model_final.pth" for role in ROLES}
    teacher = str(args.teacher or weights["teacher"])
    for name, cfg in configs.items():
        cfg.defrost()
        cfg.SEED = SEED
        cfg.OUTPUT_DIR = str(args.output / name / f"seed_{SEED}")
    start = args.weights or source.MODEL.WEIGHTS
    start = os.path.abspath(start) if os.path.isfile(start) else start
    configs["hr"].MODEL.WEIGHTS = configs["teacher"].MODEL.WEIGHTS = start
    configs["control"].MODEL.WEIGHTS = teacher
    configs["student"].MODEL.WEIGHTS = ""  # starts from the teacher's
    configs["student"].KD.TEACHER.CONFIG_FILE = str(folder / "teacher.yaml")
    configs["student"].KD.TEACHER.WEIGHTS = teacher
    if args.unlabeled:
        add_unlabeled(configs["student"], args.unlabeled)
    paths = {name: folder / f"{name}.yaml" for name in configs}
    return {x: write_config(cfg, paths[x], options.get(x, [])) for x, cfg in configs.items()}


def check_weights(args, configs):
    """Check that the checkpoints that are named fit the configs that they are measured with."""
    for option, role in (("weights", "hr"), ("teacher", "teacher"), ("baseline", "control")):
        if path := getattr(args, option):
            config = args.output / "configs" / f"{role}.yaml"
            KDTrainer.load_model(configs[role], path, f"the config '{config}' of --{option}")


def make_grid(args, configs):
    """Write OUTPUT/grid.yaml, the study of teacher, control and student, and return its path."""
    rows = {
        "hr": {"title": "high resolution", "checkpoint": args.weights},
        "teacher": {"title": "teacher, fused branch", "checkpoint": args.teacher or ""},
        "baseline": {"title": "LR without a teacher", "checkpoint": args.baseline},
        "control": {"title": "control", "options": {"MODEL.WEIGHTS": "{teacher}"}},
        "student": {"title": "student", "options": {"KD.TEACHER.WEIGHTS": "{teacher}"}},
    }
    for name, row in rows.items():
        config = "control" if name == "baseline" else name
        row["config"] = str(args.output / "configs" / f"{config}.yaml")
    rows["student"]["test_config"] = rows["control"]["config"]
    given = {"hr": args.weights, "baseline": args.baseline, "control": args.control}
    rows = {name: row for name, row in rows.items() if given.get(name, True)}
    grid = {
        "output": str(args.output),
        "seeds": [SEED],
        "detections": min(args.detections, configs["student"].TEST.DETECTIONS_PER_IMAGE),
        "rows": rows,
        "comparison": list(rows),
        "scenes": {
            rows[name]["title"]: name for name in ("hr", "control", "student") if name in rows
        },
    }
    path = args.output / "grid.yaml"
    with replacing(path) as part:
        part.write_text(yaml.safe_dump(grid, sort_keys=False))
    return path


def describe(configs):
    """Return a table of what was derived, and a warning if the comparison would not be fair."""
    table = []
    for name, cfg in configs.items():
        sizes, solver = cfg.INPUT.MIN_SIZE_TRAIN, cfg.SOLVER
        sides = f"{min(sizes)} to {max(sizes)} px" if len({*sizes}) > 1 else f"{sizes[0]} px"
        losses = [f"{term.name} {term.weight:g}" for term in read_losses(cfg.KD.LOSSES)]
        losses += [f"{images} without labels" for images in cfg.DATASETS.UNLABELED]
        cells = [name, sides, f"{cfg.INPUT.MIN_SIZE_TEST} px", solver.MAX_ITER, solver.BASE_LR]
        table.append([*cells, ", ".join(losses) if name == "student" else "-"])
    headers = ["", "short side, training", "test", "iterations", "rate", "losses"]
    names = "MAX_ITER", "STEPS", "IMS_PER_BATCH", "ACCUMULATE", "BASE_LR", "OPTIMIZER"
    solvers = [configs[role].SOLVER for role in ("student", "control")]
    other = [f"SOLVER.{name}" for name in names if solvers[0][name] != solvers[1][name]]
    words = f"\nWarning: student and control differ in {', '.join(other)}: not a fair comparison"
    return tabulate(table, headers, "plain", floatfmt=".3g") + words * bool(other)


def run_tool(name, *arguments):
    """Run another command of this folder, and end with its failure."""
    done = subprocess.run([sys.executable, TOOLS / name, *map(str, arguments)], cwd=TOOLS.parent)
    if done.returncode:
        sys.exit(
            f"distill.py: {name} stopped; its last lines say why. Mend it, and type this again"
        )


def check_data(args):
    """Check all data sets; once they were sound, without reading every pixel again."""
    folder, config = args.output / "data", args.output / "configs" / "student.yaml"
    sound = folder / "SOUND"
    quick = ["--quick"] if sound.exists() else []
    run_tool("check_dataset.py", "--config-file", config, "--output", folder, *quick)
    sound.touch()


def export_student(args, cfg):
    """Export the student for stock Detectron2, or as ONNX if that cannot build its backbone."""
    stock = cfg.MODEL.BACKBONE.NAME == "build_resnet_fpn_backbone"
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
    weights = args.output / "student" / f"seed_{SEED}" / "model_final.pth"
    model = ["--config-file", args.output / "configs" / "control.yaml", "--weights", weights]

    def command(tool, *arguments):
        return "  " + shlex.join(map(str, ["python", f"tools/{tool}.py", *model, *arguments]))

    commands = [command("predict", "IMAGES", "--output", args.output / "found")]
    if not cfg.MODEL.KEYPOINT_ON:  # keypoints cannot be traced
        onnx = ["--format", "onnx", "--output", args.output / "onnx"]
        commands.append(command("export_model", *onnx))
    return "\n".join(
        [
            *lines,
            f"The exported student is in '{args.output / 'export'}', a picture in "
            f"'{args.output / 'scenes.png'}'. Next:",
            *commands,
        ]
    )


def parse_arguments(arguments=None):
    """Read the command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--config-file", required=True, metavar="CONFIG", help="of the high-resolution detector")
    add("--output", required=True, type=Path, help="folder of configs, runs and results")
    add("--weights", help="the trained high-resolution detector, which the teacher starts from")
    add("--teacher", metavar="FILE", help="a teacher that this command trained; trains none")
    add("--baseline", metavar="FILE", help="a detector of the student's resolution to compare with")
    add("--unlabeled", metavar="IMAGES", help="a folder or data set for the student to learn from")
    add("--scale", type=int, default=2, help="high-resolution side over low-resolution side")
    add("--no-control", dest="control", action="store_false", help="leave the control out")
    add("--detections", type=study.positive, default=100, help="an image, to measure costs at")
    add("--dry-run", action="store_true", help="write the configs, and train nothing")
    add("--num-gpus", type=int, default=min(1, torch.cuda.device_count()), help="of each training")
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="see above")
    return parser.parse_args(arguments)


def main(arguments=None):
    """Run the command line."""
    args = parse_arguments(arguments)
    args.output = args.output.absolute()  # the runs start in the repository
    os.environ["DETECTRON2_DATASETS"] = os.path.abspath(
        os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    )
    try:
        for name in ("weights", "teacher", "baseline"):
            if path := getattr(args, name):
                setattr(args, name, os.path.abspath(fetch(path, f"--{name}")))
        configs = make_configs(args, split_roles(args.opts))
        check_weights(args, configs)
        grid = make_grid(args, configs)
        print(describe(configs))
    except InputError as error:
        sys.exit(f"distill.py: {error}")
    if args.dry_run:
        return
    check_data(args)
    study.main(["--grid", str(grid), "--num-gpus", str(args.num_gpus)])
    export_student(args, configs["student"])
    print(summarize(args, configs["student"]))


if __name__ == "__main__":
    main()
