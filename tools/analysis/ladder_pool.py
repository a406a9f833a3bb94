"""A student whose features are read, and suggest_ladder.py's pool of teachers: checked, built."""

import math
import re
from dataclasses import dataclass, field

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY

from msad_kd import InputError, KDTrainer
from msad_kd.checkpoint.checkpoint import check_exists
from msad_kd.data.loader import clear_absence
from msad_kd.distill.teacher import Teacher, TeacherSpec
from msad_kd.modeling.multi_resolution import MultiResolutionMixin

STUDENT = "student"


@dataclass
class Entry:
    """One teacher of the pool."""

    name: str
    cfg: CfgNode  # the student's, with this teacher in KD.TEACHER
    levels: dict[str, ShapeSpec]
    stage: dict = field(default_factory=dict)  # its part of KD.LADDER.STAGES


def read_pairs(pairs: list[str], key: str, names: list[str]) -> dict[str, str]:
    """NAME=VALUE texts of an option that is about teachers."""
    read = {}
    for pair in pairs:
        name, mark, value = pair.partition("=")
        if not mark or name not in names:
            raise InputError(f"--{key} {pair}: give NAME=VALUE; the teachers are {names}")
        read[name] = value
    return read


def read_teachers(teachers: list[list[str]], images: list[str], cfg: CfgNode) -> list[Entry]:
    """The pool, each teacher checked against the student as far as its config tells.

    Args:
        teachers: a NAME, CONFIG, WEIGHTS, KEY, VALUE, ... for each.
        images: NAME=hr or NAME=lr, for those it is given for.
        cfg: the student's.
    """
    names = [each[0] for each in teachers]
    for number, name in enumerate(names):
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name == STUDENT or name in names[:number]:
            raise InputError(
                f"--teacher {name}: names are of letters, digits, - and _, no two alike and none "
                f"'{STUDENT}'"
            )
    chosen = read_pairs(images, "image", names)
    entries = []
    for given in teachers:
        if len(given) % 2 == 0 or len(given) < 3:
            raise InputError(
                f"--teacher {given[0]}: give NAME CONFIG WEIGHTS, and KEY VALUE pairs if need be"
            )
        name, config_file, weights, *options = given
        own = cfg.clone()
        own.KD.TEACHER.CONFIG_FILE, own.KD.TEACHER.WEIGHTS = config_file, weights
        own.KD.TEACHER.OPTS, own.KD.TEACHER.BRANCH = options, "hr"  # any teacher has it
        image = chosen.get(name, "hr")
        try:
            meta = META_ARCH_REGISTRY.get(TeacherSpec.from_config(own).cfg.MODEL.META_ARCHITECTURE)
            fused = isinstance(meta, type) and issubclass(meta, MultiResolutionMixin)
            own.KD.TEACHER.BRANCH = "fused" if fused else image
            if image not in ("hr", "lr") or (fused and name in chosen):
                raise InputError(
                    f"its image is '{image}'; a single-resolution teacher reads hr or lr, and a "
                    "multi-resolution one both"
                )
            levels = TeacherSpec.from_config(own).build_on_meta().levels()
            check_exists(weights, f"'{config_file}'")  # rather than after other models' turns
        except InputError as error:
            raise InputError(f"--teacher {name}: {error}") from error
        stage = {"name": name, "config_file": config_file, "weights": weights}
        if options:
            stage["opts"] = options
        stage |= {"kind": "fused" if fused else "plain", "image": image}
        entries.append(Entry(name, own, levels, stage))
    return entries


def build_student(cfg: CfgNode, config_file: str, weights: str) -> Teacher:
    """The student as what its features are read from: a frozen detector, at low resolution."""
    model = KDTrainer.load_model(cfg, weights or None, f"the student's config '{config_file}'")
    if not weights:
        if cfg.MODEL.WEIGHTS:
            check_exists(cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS")
        DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return Teacher(model, branch="lr", scale=cfg.KD.SCALE)


def known_aps(given: list[str], entries: list[Entry]) -> dict[str, float]:
    """Box AP as given, or as TEST.EXPECTED_RESULTS of a teacher's config has it."""
    found = {}
    for entry in entries:
        for task, metric, value, *_ in TeacherSpec.from_config(entry.cfg).cfg.TEST.EXPECTED_RESULTS:
            if (task, metric) == ("bbox", "AP"):
                found[entry.name] = float(value)
    for name, value in read_pairs(given, "ap", [entry.name for entry in entries]).items():
        try:
            found[name] = float(value)
        except ValueError as error:
            raise InputError(f"--ap {name}={value}: the AP should be a number") from error
    return found


def evaluate(entry: Entry, teacher: Teacher, folder: str) -> float:
    """A teacher's box AP on the first of DATASETS.TEST."""
    cfg = TeacherSpec.from_config(entry.cfg).cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR, cfg.DATASETS.TEST = folder, cfg.DATASETS.TEST[:1]
    advice = f"give it by --ap {entry.name}=..."
    if not cfg.DATASETS.TEST:
        raise InputError(f"DATASETS.TEST is empty, so no AP can be measured; {advice}")
    model = teacher.model
    predicted = getattr(getattr(model, "roi_heads", model), "num_classes", None)
    with clear_absence(cfg.DATASETS.TEST):
        DatasetCatalog.get(cfg.DATASETS.TEST[0])  # reads the classes' names
    known = MetadataCatalog.get(cfg.DATASETS.TEST[0]).get("thing_classes")
    if known is not None and predicted not in (None, len(known)):
        raise InputError(
            f"--teacher {entry.name} predicts {predicted} classes and the data have {len(known)}, "
            f"so its AP cannot be measured; {advice}"
        )
    ap = KDTrainer.test(cfg, model)["bbox"]["AP"]
    return ap if math.isfinite(ap) else 0.0  # where nothing was found
