"""The cells of a grid. A cell is a row with one seed: one training, or one checkpoint."""

import contextlib
import hashlib
import importlib
import json
import pickle
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from detectron2.config import get_cfg

from msad_kd.checkpoint.files import hash_file
from msad_kd.config.build import check_config, merge_config, scale_to_processes
from msad_kd.config.defaults import add_msad_kd_config
from msad_kd.evaluation.build import check_augmentation
from msad_kd.modeling.classes import frame_of
from msad_kd.utils.errors import InputError
from msad_kd.utils.flat_config import flatten_config
from projects.study.grid import PLACEHOLDER, Row

# Config keys that change no weight of the trained model.
LOGGING = {"OUTPUT_DIR", "KD.DIAGNOSTICS_PERIOD", "KD.GRADIENT_RATIO_PERIOD"}
LOGGING |= {"SOLVER.CHECKPOINT_PERIOD"}
# Keys of a teacher's config that its student's training reads, beside those of the model.
TEACHER_KEYS = {"KD.SCALE", "INPUT.FORMAT", "TEST.DETECTIONS_PER_IMAGE"}
CHECKPOINTS = 10  # a training writes about so many, so a stop may cost a tenth of it
CHECKPOINT_PERIOD = 500  # and waits so many iterations between two, unless its config asks for less


@dataclass(frozen=True)
class Labels:
    """The labels that the model of another cell gives to images without labels."""

    file: Path
    command: tuple[str, ...]  # of tools/label_images.py

    @property
    def title(self):
        """Return what their job is called."""
        return f"labels '{self.file}'"

    def so_far(self):
        """Return how many images are labelled, while that goes on."""
        done = 0
        with contextlib.suppress(FileNotFoundError):  # it may end at any moment
            for partial in self.file.parent.glob("*.partial"):
                with open(partial, "rb") as lines:
                    done += sum(1 for _ in lines)  # a line for each image
        return f" ({done} images)" if done else ""


@dataclass(frozen=True)
class Cell:
    """A row with one seed."""

    key: str  # "row/seed"; the seed is 0 for a checkpoint that has none
    row: Row
    seed: int
    folder: Path  # of its run
    weights: Path  # its checkpoint, once it is trained
    options: list  # KEY VALUE pairs of the training
    test_options: list  # KEY VALUE pairs of the measured model
    needs: tuple[str, ...]  # keys of the cells whose checkpoints it uses
    data: tuple[str, ...]  # the folders of `Grid.data` that it reads
    labels: Labels | None  # to be made before the training
    iterations: int  # all stages of a ladder together; 0 if nothing is trained
    saved_every: int  # SOLVER.CHECKPOINT_PERIOD
    meaning: dict  # training, data and measurement, in JSON's types
    fingerprint: str  # of the meaning

    @property
    def title(self):
        """Return the row's name and, if it has several, the seed."""
        return f"{self.row.name}, seed {self.seed}" if len(self.row.seeds) > 1 else self.row.name


def make_cells(grid, folder, extra=(), processes=1):
    """Return all cells of a grid by key, each after those it needs.

    Runs go to ROW/seed_SEED in `folder`. `extra` are KEY VALUE pairs for all trainings, teachers
    and measurements, for a trial. `processes` is how many train each cell.
    """
    _read.cache_clear()  # files may have changed since
    cells, data = {}, {}
    for name, arguments in grid.data.items():
        try:
            data[name] = importlib.import_module(grid.generator).complete_arguments(**arguments)
        except (ImportError, TypeError, ValueError) as error:
            raise InputError(f"the data '{name}' of the grid: {error}") from error

    def add(row, seed, pending=()):
        key = f"{row.name}/{seed}"
        if row.name in pending:
            raise InputError(f"row '{row.name}' needs its own checkpoint")
        if key not in cells:
            sources = {}
            for other in map(grid.rows.get, row.references()):
                known = seed if seed in other.seeds else (other.seeds or [0])[0]
                sources[other.name] = add(other, known, (*pending, row.name))
            run = Path(folder) / row.name / f"seed_{seed}"
            cells[key] = _make_cell(row, seed, sources, run, data, list(extra), processes)
        return cells[key]

    for row in grid.rows.values():
        for seed in row.seeds or [0]:
            add(row, seed)
    return cells


def _make_cell(row, seed, sources, folder, data, extra, processes):
    options = [*_flat(row.options), *extra, *(["SEED", seed] if row.seeds else [])]
    if extra:  # a student has to build its teachers as they were trained
        kd = _build(row.config, options).KD
        stages = [{**x, "opts": [*x.get("opts", ()), *extra]} for x in kd.LADDER.STAGES]
        opts = [*kd.TEACHER.OPTS, *extra]
        options += ["KD.TEACHER.OPTS", opts, "KD.LADDER.STAGES", stages]
    # A multi-resolution teacher is measured at its scale, too.
    tested = {k: v for k, v in row.options.items() if k == "KD.SCALE" or not _trains(k)}
    test_options = list(map(str, [*_flat(tested), *extra]))
    # In a fingerprint a checkpoint is known by how it was made, not by its path.
    origins = {name: cell.fingerprint for name, cell in sources.items()}
    cfg, labels = _build(row.config, _filled(options, origins)), None
    written = cfg  # a schedule that is not of one process, each training scales by itself
    if cfg.SOLVER.REFERENCE_WORLD_SIZE:
        written = _build(row.config, [*options, "SOLVER.REFERENCE_WORLD_SIZE", 0])
    if row.labels_by and row.trained:
        labels, changes = _label_images(cfg, row, sources[row.labels_by], data)
        options += changes
    test_cfg = _build(row.test_config, test_options)
    check_augmentation(test_cfg)
    if len(test_cfg.DATASETS.TEST) != 1:
        names = ", ".join(test_cfg.DATASETS.TEST) or "nothing"
        raise InputError(
            f"row '{row.name}': DATASETS.TEST of '{row.test_config}' is {names}; name one data "
            "set, and measure on another by a row with checkpoint_of"
        )
    stages = cfg.KD.LADDER.STAGES
    weights = folder / "model_final.pth"
    if row.checkpoint_of:
        weights = sources[row.checkpoint_of].weights
    elif row.checkpoint:
        weights = Path(row.checkpoint)
        if not weights.is_file():
            raise InputError(f"row '{row.name}': there is no checkpoint '{weights}'")
    elif stages:
        weights = folder / f"stage_{len(stages):02}_{stages[-1]['name']}" / "student.pth"
    folders = _folders(test_cfg, "TEST", data)
    scale = {"KD.SCALE"} if frame_of(test_cfg) == "hr" else set()
    changed = changed_keys(test_cfg).items()
    meaning = {"test": {k: v for k, v in changed if k in scale or not _trains(k)}}
    if row.trained:
        meaning |= {"labels": origins[row.labels_by]} if labels else {}
        folders += _folders(cfg, "TRAIN", data) + _folders(cfg, "UNLABELED", data)
        teachers = [stage["weights"] for stage in stages] or [cfg.KD.TEACHER.WEIGHTS]
        files = [cfg.MODEL.WEIGHTS, *teachers, *(s["start"] for s in stages if "start" in s)]
        files = [hash_file(x) if Path(x).is_file() else None for x in files]
        meaning |= {"train": changed_keys(cfg), "files": files}
        meaning |= {"teachers": configs} if (configs := _teacher_configs(cfg)) else {}
    else:
        meaning |= {"checkpoint": origins.get(row.checkpoint_of) or hash_file(weights)}
    meaning |= {"data": {name: data[name] for name in folders}}
    meaning = json.dumps(meaning, sort_keys=True, default=str)
    return Cell(
        key=f"{row.name}/{seed}",
        row=row,
        seed=seed,
        folder=folder,
        weights=weights,
        options=_filled(options, {name: str(cell.weights) for name, cell in sources.items()}),
        test_options=test_options,
        needs=tuple(cell.key for cell in sources.values()),
        data=tuple(folders),
        labels=labels,
        iterations=_length(scale_to_processes(cfg, processes)) * row.trained,
        saved_every=_saved_every(written),
        meaning=json.loads(meaning),
        fingerprint=hashlib.sha256(meaning.encode()).hexdigest(),
    )


def _teacher_configs(cfg):
    """Return the changed keys that a student's training reads of the config of each teacher."""
    named = [(stage["config_file"], stage.get("opts")) for stage in cfg.KD.LADDER.STAGES]
    named = named or [(cfg.KD.TEACHER.CONFIG_FILE, cfg.KD.TEACHER.OPTS)]
    configs = []
    for file, options in named:
        if Path(file).is_file():  # else the training says what is wrong
            teacher = pickle.loads(_read(file))
            merge_config(teacher, "", list(map(str, options or ())))
            changed = changed_keys(teacher).items()
            configs.append({k: v for k, v in changed if k in TEACHER_KEYS or _of_model(k)})
    return configs


def _length(cfg):
    """Return the iterations of a training, all stages of a ladder together."""
    stages = cfg.KD.LADDER.STAGES or [{}]
    return sum(stage.get("iterations") or cfg.SOLVER.MAX_ITER for stage in stages)


def _saved_every(cfg):
    """Return the period of checkpoints: the config's, unless that is Detectron2's or longer."""
    asked = cfg.SOLVER.CHECKPOINT_PERIOD
    period = max(CHECKPOINT_PERIOD, _length(cfg) // CHECKPOINTS)
    default = pickle.loads(_read("")).SOLVER.CHECKPOINT_PERIOD
    return period if asked == default else min(asked, period)


def _label_images(cfg, row, source, data):
    """Return the labels that a cell gives to the images of a row, and the keys that name them."""
    names = list(cfg.DATASETS.UNLABELED)
    entries = [x for x in cfg.DATASETS.COCO_FORMAT if x["name"] in names]
    if len(entries) != 1 or len(names) != 1 or not cfg.KD.UNLABELED.PSEUDO_LABELS:
        words = "DATASETS.UNLABELED should name one data set of DATASETS.COCO_FORMAT"
        words += ", and KD.UNLABELED.PSEUDO_LABELS be True"
        raise InputError(f"row '{row.name}' has labels_by: {words}")
    images = {name: data[name] for name in _folders(cfg, "UNLABELED", data)}
    meaning = json.dumps([source.fingerprint, entries, images], sort_keys=True)
    digest = hashlib.sha256(meaning.encode()).hexdigest()[:8]
    file = (source.folder / f"labels_{digest}" / "labels.json").absolute()
    # The model's own config may not know the images.
    known = _build(source.row.test_config, source.test_options).DATASETS.COCO_FORMAT
    known = [*(x for x in known if x["name"] not in names), *entries]
    words = ["--config-file", source.row.test_config, "--weights", str(source.weights)]
    words += ["--dataset", names[0], "--output", str(file), *source.test_options]
    words += ["DATASETS.COCO_FORMAT", str(known)]
    labelled = {**entries[0], "name": f"{names[0]}_labels_of_{source.row.name}", "json": str(file)}
    changes = ["DATASETS.COCO_FORMAT", [*cfg.DATASETS.COCO_FORMAT, labelled]]
    return Labels(file, tuple(words)), [*changes, "DATASETS.UNLABELED", [labelled["name"]]]


def _build(config, options):
    cfg = pickle.loads(_read(config))
    # On the CPU, so that a cell means the same on every machine.
    merge_config(cfg, "", [*map(str, options), "MODEL.DEVICE", "cpu"])
    amp, cfg.SOLVER.AMP.ENABLED = cfg.SOLVER.AMP.ENABLED, False  # which would be turned off
    cfg = check_config(cfg)
    cfg.SOLVER.AMP.ENABLED = amp
    return cfg


@lru_cache
def _read(config):
    """Return a file's config, read once for all rows; pickled, as clone() copies more slowly."""
    cfg = get_cfg()
    add_msad_kd_config(cfg)
    merge_config(cfg, config, [])
    return pickle.dumps(cfg)


def _folders(cfg, split, data):
    """Return the generated folders that hold a config's data sets of a split."""
    used = [each for each in cfg.DATASETS.COCO_FORMAT if each["name"] in cfg.DATASETS[split]]
    return [folder for folder in data if any(x["images"].startswith(f"{folder}/") for x in used)]


def changed_keys(cfg):
    """Return KEY to value of all that a config changes of the defaults, without `LOGGING`.

    Defaults are left out, so that a key which a later version adds changes no fingerprint.
    """
    default = flatten_config(pickle.loads(_read("")))
    return {
        k: v for k, v in flatten_config(cfg).items() if k not in LOGGING and v != default.get(k)
    }


def _of_model(key):
    return key.startswith("MODEL.") and key not in ("MODEL.WEIGHTS", "MODEL.DEVICE")


def _trains(key):
    """Return whether a key is about training alone."""
    about = ("KD.", "SOLVER.", "INPUT.MIN_SIZE_TRAIN", "DATASETS.UNLABELED")
    return key.startswith(about) or key == "MODEL.WEIGHTS"


def _flat(options):
    return [each for pair in options.items() for each in pair]


def _filled(values, checkpoints):
    """Return values as text, with checkpoints in place of the names of their rows."""
    return [PLACEHOLDER.sub(lambda m: checkpoints.get(m[1], m[0]), str(value)) for value in values]
