"""Derive the configs of teacher, control and student for distill.py, and the grid of all."""

import hashlib
import json
import os
import re

import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from tabulate import tabulate

from msad_kd import KDTrainer
from msad_kd.checkpoint.files import replacing
from msad_kd.config.build import build_config, scale_to_processes
from msad_kd.config.derive import derive_configs, fit_warmups
from msad_kd.data.cityscapes_files import is_cityscapes
from msad_kd.data.dict_checks import explain_missing_data
from msad_kd.data.images import list_images
from msad_kd.engine.optimizer import check_optimizer
from msad_kd.evaluation.build import check_augmentation
from msad_kd.losses.terms import read_losses
from msad_kd.utils.arguments import check_pairs
from msad_kd.utils.errors import InputError
from msad_kd.utils.flat_config import flatten_config
from msad_kd.utils.hashes import hash_file

ROLES = ("teacher", "student", "control")
SEED = 1  # unless another is given
# MODEL keys that only training reads.
TRAINING = re.compile(
    r"\.(META_ARCHITECTURE|WEIGHTS|DEVICE)$"
    r"|LOSS|BETA|TRAIN|IOU|BATCH_SIZE|POSITIVE_FRACTION|FREEZE|APPEND_GT|MIN_KEYPOINTS"
)
# Keys that no role may choose, with what to do instead.
FIXED = {
    "SEED": "SEED without a role is that of all",
    "OUTPUT_DIR": "--output is the folder of all",
    "KD.TEACHER.WEIGHTS": "--teacher names a trained one",
    "KD.TEACHER.CONFIG_FILE": "teacher:KEY VALUE changes it",
}


def split_roles(pairs):
    """Split KEY VALUE pairs into those of CONFIG and those of each role."""
    check_pairs(pairs)
    if len(pairs) % 2:
        raise InputError(f"KEY VALUE pairs: '{pairs[-1]}' has no value")
    options = {"": [], **{role: [] for role in ROLES}}
    for key, value in zip(pairs[::2], pairs[1::2]):
        role, _, name = key.rpartition(":")
        if role not in options:
            raise InputError(f"'{key}': there is no role '{role}'; use {', '.join(ROLES)}")
        if role and name in FIXED:
            raise InputError(f"'{key}' cannot be chosen: {FIXED[name]}")
        tests = name == "DATASETS.TEST" or name.startswith("TEST.") or "_TEST" in name
        # TEST.PRECISE_BN changes the trained model.
        if role == "student" and tests and not name.startswith("TEST.PRECISE_BN."):
            raise InputError(
                f"'{key}' cannot be chosen: the student is tested by its control's config; give "
                f"control:{name} for both"
            )
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
        check_optimizer(cfg)  # before another model is trained for hours
        if cfg.TEST.PATIENCE:
            raise InputError(
                f"TEST.PATIENCE is {cfg.TEST.PATIENCE}, but distill.py evaluates after the last "
                "iteration alone, since a model chosen by the images of the table would look too "
                "good; set it to 0, or train by train_net.py"
            )
        if len(cfg.DATASETS.TEST) != 1:
            names = ", ".join(cfg.DATASETS.TEST) or "nothing"
            raise InputError(f"DATASETS.TEST is {names}; the table is of one data set, so name one")
        if "SOLVER.MAX_ITER" in given and "SOLVER.WARMUP_ITERS" not in given:
            fit_warmups(cfg, losses="KD.LOSSES" not in given)
        part.write_text(cfg.dump())
    return cfg


def read_images(name):
    """Return the folder of a registered data set and its dicts, none if a file is missing."""
    metadata = MetadataCatalog.get(name)
    root = metadata.get("image_root") or metadata.get("image_dir")
    if not root:
        raise InputError(f"--unlabeled: '{name}' does not say where its images are; name a folder")
    root = os.path.abspath(root)
    # A file or folder may be made later; its reader will say so if it is not.
    if not os.path.exists(metadata.get("json_file", root)) and not is_cityscapes(name):
        return root, []
    with explain_missing_data((name,)):
        return root, DatasetCatalog.get(name)


def add_unlabeled(args, configs):
    """Let the student learn from images without labels: a folder, or a data set that has a name.

    Unless they have labels of a model, with scores, HR labels them once, if it is there and the
    teacher is not asked for. Else the teacher does, in each step.

    Returns:
        The words of label_images.py that make HR's labels; None if HR makes none.
    """
    name, hr, student = args.unlabeled, configs["hr"], configs["student"]
    entry, words, dicts = None, ["--dataset", name], []
    if os.path.isdir(name) and name not in [x["name"] for x in student.DATASETS.COCO_FORMAT]:
        root, name = os.path.abspath(name), "unlabeled"
        words, entry = ["--images", root], {"name": name, "images": root}
        dicts = [{"file_name": file} for file in list_images(root)]
        if not dicts:
            raise InputError(f"--unlabeled: '{root}' has no images; folders in it are not read")
    elif name in DatasetCatalog.list():
        root, dicts = read_images(name)
    else:
        raise InputError(f"--unlabeled: '{name}' is neither a folder nor a registered data set")
    labelled = any("score" in label for x in dicts for label in x.get("annotations", ()))
    if labelled and args.labels_by:
        raise InputError(f"--labels-by: '{name}' has labels of a model already; leave it out")
    by_hr = args.weights and args.labels_by != "teacher" and not labelled
    if by_hr:
        check_augmentation(hr)
        model = hr.MODEL.clone()  # labels do not depend on where it is and runs
        model.WEIGHTS, model.DEVICE = "", ""
        meaning = [hash_file(args.weights), model.dump(), hr.INPUT.dump(), root]
        meaning += [hr.TEST.DETECTIONS_PER_IMAGE, [x["file_name"] for x in dicts]]
        meaning += [hr.TEST.AUG.dump()] * hr.TEST.AUG.ENABLED
        digest = hashlib.sha256(json.dumps(meaning).encode()).hexdigest()[:8]
        file, name = args.output / f"labels_by_hr_{digest}.json", f"{name}_by_hr"
        entry = {"name": name, "json": str(file), "images": root}
        config = args.output / "configs" / "hr.yaml"
        words += ["--config-file", config, "--weights", args.weights, "--output", file]
    else:
        words = None
    if entry:
        student.DATASETS.COCO_FORMAT = [*student.DATASETS.COCO_FORMAT, entry]
    student.DATASETS.UNLABELED = (name,)
    student.SOLVER.UNLABELED_PER_BATCH = student.SOLVER.IMS_PER_BATCH
    student.KD.UNLABELED.PSEUDO_LABELS = True
    if student.MODEL.ROI_HEADS.NAME == "CascadeROIHeads":  # which can ignore no boxes
        student.KD.UNLABELED.IGNORE_SCORE = max(student.KD.UNLABELED.SCORE)
    return words


def make_configs(args, options) -> tuple[dict[str, CfgNode], list | None]:
    """Write OUTPUT/configs.

    Returns:
        The configs by the name of their row, and the words of label_images.py that make the labels
        of the student's images without labels; None if there are no such labels.
    """
    folder = args.output / "configs"
    source = build_config(find_config(args.config_file, folder), options[""])
    # What is given for a role is meant for as many processes as will train it.
    source = scale_to_processes(source, max(args.num_gpus, 1))
    if not source.DATASETS.TRAIN:
        raise InputError("DATASETS.TRAIN of the config should name the training images")
    configs = {"hr": source.clone(), **derive_configs(source, args.scale)}
    seed = source.SEED if "SEED" in options[""] else SEED
    if seed < 1:
        raise InputError(f"SEED is {seed}; give a number from 1")
    weights = {role: args.output / role / f"seed_{seed}" / "model_final.pth" for role in ROLES}
    teacher = str(args.teacher or weights["teacher"])
    for name, cfg in configs.items():
        cfg.defrost()
        cfg.SEED = seed
        cfg.OUTPUT_DIR = str(args.output / name / f"seed_{seed}")
    start = args.weights or source.MODEL.WEIGHTS
    start = os.path.abspath(start) if os.path.isfile(start) else start
    configs["hr"].MODEL.WEIGHTS = configs["teacher"].MODEL.WEIGHTS = start
    configs["control"].MODEL.WEIGHTS = teacher
    configs["student"].MODEL.WEIGHTS = ""  # starts from the teacher's
    configs["student"].KD.TEACHER.CONFIG_FILE = str(folder / "teacher.yaml")
    configs["student"].KD.TEACHER.WEIGHTS = teacher
    words = add_unlabeled(args, configs) if args.unlabeled else None
    names = configs["student"].DATASETS.UNLABELED
    paths = {name: folder / f"{name}.yaml" for name in configs}
    configs = {x: write_config(cfg, paths[x], options.get(x, [])) for x, cfg in configs.items()}
    check_same_model(configs)
    student = configs["student"]  # role:KEY VALUE pairs may have chosen other images, or no labels
    used = {*student.DATASETS.UNLABELED} == {*names} and student.KD.UNLABELED.PSEUDO_LABELS
    return configs, words if used else None


def check_same_model(configs):
    """Check that the student's model is its control's, by whose config it is tested."""
    student, control = (
        {"INPUT.FORMAT": cfg.INPUT.FORMAT} | flatten_config(cfg.MODEL, "MODEL.")
        for cfg in (configs["student"], configs["control"])
    )
    for key, value in student.items():
        if value != control[key] and not TRAINING.search(key):
            raise InputError(
                f"{key} is {value} in the student and {control[key]} in its control, by whose "
                f"config it is tested; give student:{key} and control:{key} the same value"
            )


def check_weights(args, configs):
    """Check that the checkpoints that are named fit the configs that they are measured with."""
    for option, role in (("weights", "hr"), ("teacher", "teacher"), ("baseline", "control")):
        if path := getattr(args, option):
            config = args.output / "configs" / f"{role}.yaml"
            cfg = configs[role].clone()
            cfg.MODEL.DEVICE = "cpu"  # the GPU's memory is for the trainings
            KDTrainer.load_model(cfg, path, f"the config '{config}' of --{option}")


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
        # AP is compared without test-time augmentation, as costs are. HR's labels may have it.
        row.setdefault("options", {})["TEST.AUG.ENABLED"] = False
    rows["student"]["test_config"] = rows["control"]["config"]
    given = {"hr": args.weights, "baseline": args.baseline, "control": args.control}
    rows = {name: row for name, row in rows.items() if given.get(name, True)}
    grid = {
        "output": str(args.output),
        "seeds": [configs["student"].SEED],
        "detections": min(args.detections, configs["control"].TEST.DETECTIONS_PER_IMAGE),
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


def describe(configs, trained):
    """Return a table of what was derived, and a warning if the comparison would not be fair.

    `trained` are the roles that are; of the others only the config is written.
    """
    table = []
    for name, cfg in configs.items():
        sizes, solver = cfg.INPUT.MIN_SIZE_TRAIN, cfg.SOLVER
        sides = f"{min(sizes)} to {max(sizes)} px" if len({*sizes}) > 1 else f"{sizes[0]} px"
        losses = [f"{term.name} {term.weight:g}" for term in read_losses(cfg.KD.LOSSES)]
        losses += [f"images of {name}" for name in cfg.DATASETS.UNLABELED]
        tested = configs["control" if name == "student" else name].INPUT.MIN_SIZE_TEST
        schedule = [solver.MAX_ITER, f"{solver.BASE_LR:.3g}"] if name in trained else ["-", "-"]
        cells = [name, sides, f"{tested} px", *schedule]
        table.append([*cells, ", ".join(losses) if name == "student" else "-"])
    headers = ["", "short side, training", "test", "iterations", "rate", "losses"]
    names = "MAX_ITER WARMUP_ITERS STEPS IMS_PER_BATCH ACCUMULATE BASE_LR OPTIMIZER".split()
    solvers = [configs[role].SOLVER for role in ("student", "control")]
    other = [f"SOLVER.{name}" for name in names if solvers[0][name] != solvers[1][name]]
    words = f"\nWarning: student and control differ in {', '.join(other)}: not a fair comparison"
    return tabulate(table, headers, "plain") + words * bool(other)
