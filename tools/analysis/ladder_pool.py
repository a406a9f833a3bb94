"""The student and the pool of teachers of suggest_ladder.py: read, checked and built."""

import math
import re
from dataclasses import dataclass, replace

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.layers import ShapeSpec

from msad_kd import InputError, KDTrainer
from msad_kd.checkpoint.checkpoint import SafeCheckpointer, check_exists
from msad_kd.data.dict_checks import explain_missing_data
from msad_kd.distill.teacher import Teacher
from msad_kd.distill.teacher_spec import TeacherSpec
from msad_kd.modeling.classes import is_a, number_of_classes
from msad_kd.modeling.multi_resolution import MultiResolutionMixin

STUDENT = "student"


@dataclass
class Entry:
    """One teacher of the pool."""

    name: str
    spec: TeacherSpec
    levels: dict[str, ShapeSpec]
    stage: dict  # the teacher's fields in KD.LADDER.STAGES


def _read_pairs(pairs: list[str], option: str, names: list[str]) -> dict[str, str]:
    values = {}
    for pair in pairs:
        name, mark, value = pair.partition("=")
        if not mark or name not in names:
            raise InputError(f"--{option} {pair}: give NAME=VALUE; the teachers are {names}")
        values[name] = value
    return values


def read_teachers(teachers: list[list[str]], images: list[str], cfg: CfgNode) -> list[Entry]:
    """Read the pool, and check each teacher's config against the student's.

    Args:
        teachers: NAME, CONFIG, WEIGHTS, KEY, VALUE, ... of each teacher.
        images: NAME=hr or NAME=lr, for some of the teachers.
        cfg: the student's config.
    """
    names = [name for name, *_ in teachers]
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name == STUDENT or names.count(name) > 1:
            raise InputError(
                f"--teacher {name}: give each teacher its own name of letters, digits, - and _, "
                f"other than '{STUDENT}'"
            )
    chosen_images = _read_pairs(images, "image", names)
    entries = []
    for values in teachers:
        if len(values) % 2 == 0 or len(values) < 3:
            raise InputError(
                f"--teacher {values[0]}: give NAME CONFIG WEIGHTS, then KEY VALUE pairs, if any"
            )
        try:
            entries.append(_read_teacher(*values[:3], values[3:], chosen_images, cfg))
        except InputError as error:
            raise InputError(f"--teacher {values[0]}: {error}") from error
    return entries


def _read_teacher(
    name: str, config_file: str, weights: str, opts: list[str], images: dict[str, str], cfg: CfgNode
) -> Entry:
    cfg, image = cfg.clone(), images.get(name, "hr")
    keys = cfg.KD.TEACHER
    keys.CONFIG_FILE, keys.WEIGHTS, keys.OPTS = config_file, weights, opts
    keys.BRANCH = "lr" if image == "lr" else "hr"  # every teacher has both
    spec = TeacherSpec.from_config(cfg)
    fused = is_a(spec.cfg, MultiResolutionMixin)
    spec = replace(spec, branch="fused") if fused else spec
    if image not in ("hr", "lr") or (fused and name in images):
        raise InputError(
            f"its image is '{image}'; a single-resolution teacher reads hr or lr, and a "
            "multi-resolution one both"
        )
    levels = spec.build_on_meta().levels()
    check_exists(weights, f"'{config_file}'")  # now, not after the other models' turns
    stage = {"name": name, "config_file": config_file, "weights": weights}
    stage |= {"opts": opts} if opts else {}
    stage |= {"kind": "fused" if fused else "plain", "image": image}
    return Entry(name, spec, levels, stage)


def build_student(cfg: CfgNode, config_file: str, weights: str) -> Teacher:
    """Build the student as a frozen detector whose features at low resolution can be read.

    If ``weights`` is "", MODEL.WEIGHTS initialise it. ``config_file`` is for error messages.
    """
    model = KDTrainer.load_model(cfg, weights or None, f"the student's config '{config_file}'")
    if not weights:
        SafeCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return Teacher(model, branch="lr", scale=cfg.KD.SCALE)


def known_aps(pairs: list[str], entries: list[Entry]) -> dict[str, float]:
    """Return teachers' box AP from NAME=AP pairs, or from their TEST.EXPECTED_RESULTS."""
    aps = {}
    for entry in entries:
        for task, metric, value, *_ in entry.spec.cfg.TEST.EXPECTED_RESULTS:
            if (task, metric) == ("bbox", "AP"):
                aps[entry.name] = float(value)
    for name, value in _read_pairs(pairs, "ap", [entry.name for entry in entries]).items():
        try:
            aps[name] = float(value)
        except ValueError:
            aps[name] = float("nan")
        if not 0 <= aps[name] <= 100:
            raise InputError(f"--ap {name}={value}: the AP must be a number from 0 to 100")
    return aps


def evaluate(entry: Entry, teacher: Teacher, folder: str) -> float:
    """Return a teacher's box AP on the first of DATASETS.TEST, with the files in ``folder``."""
    cfg = entry.spec.cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR, cfg.DATASETS.TEST = folder, cfg.DATASETS.TEST[:1]
    advice = f"so its AP cannot be measured; give it as --ap {entry.name}=..."
    if not cfg.DATASETS.TEST:
        raise InputError(f"--teacher {entry.name}: DATASETS.TEST is empty, {advice}")
    with explain_missing_data(cfg.DATASETS.TEST):
        DatasetCatalog.get(cfg.DATASETS.TEST[0])  # reads the classes' names
    classes = MetadataCatalog.get(cfg.DATASETS.TEST[0]).get("thing_classes")
    predicted = number_of_classes(cfg)
    if classes is not None and predicted not in (None, len(classes)):
        raise InputError(
            f"--teacher {entry.name} predicts {predicted} classes and the data have "
            f"{len(classes)}, {advice}"
        )
    ap = KDTrainer.test(cfg, teacher.model)["bbox"]["AP"]
    return ap if math.isfinite(ap) else 0.0  # NaN if the teacher detects nothing
