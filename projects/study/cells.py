"""The cells of a grid. A cell is a row with one seed: one training, or one checkpoint."""

import contextlib
import hashlib
import importlib
import json
from dataclasses import dataclass
from pathlib import Path

from msad_kd.checkpoint.files import hash_file
from msad_kd.config.build import scale_to_processes
from msad_kd.evaluation.build import check_augmentation
from msad_kd.utils.errors import InputError
from projects.study.configs import (
    build,
    defaults,
    forget_files,
    is_of_training,
    measured_meaning,
    training_meaning,
)
from projects.study.grid import PLACEHOLDER, Row

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
    forget_files()
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
    options = _training_options(row, seed, extra)
    # A multi-resolution teacher is measured at its scale, too.
    tested = {k: v for k, v in row.options.items() if k == "KD.SCALE" or not is_of_training(k)}
    test_options = list(map(str, [*_flat(tested), *extra]))
    # In a fingerprint a checkpoint is known by how it was made, not by its path.
    origins = {name: cell.fingerprint for name, cell in sources.items()}
    cfg, labels = build(row.config, _filled(options, origins)), None
    written = cfg  # a schedule that is not of one process, each training scales by itself
    if cfg.SOLVER.REFERENCE_WORLD_SIZE:
        written = build(row.config, [*options, "SOLVER.REFERENCE_WORLD_SIZE", 0])
    if row.labels_by and row.trained:
        labels, changes = _label_images(cfg, row, sources[row.labels_by], data)
        options += changes
    test_cfg = _test_config(row, test_options)
    weights = _weights_of(row, folder, sources, cfg.KD.LADDER.STAGES)
    meaning = measured_meaning(test_cfg)
    folders = _folders(test_cfg, "TEST", data)
    if row.trained:
        meaning |= {"labels": origins[row.labels_by]} if labels else {}
        meaning |= training_meaning(cfg)
        folders += _folders(cfg, "TRAIN", data) + _folders(cfg, "UNLABELED", data)
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


def _training_options(row, seed, extra):
    """Return the KEY VALUE pairs of a row's training, before checkpoints are filled in."""
    options = [*_flat(row.options), *extra, *(["SEED", seed] if row.seeds else [])]
    if extra:  # a student has to build its teachers as they were trained
        kd = build(row.config, options).KD
        stages = [{**x, "opts": [*x.get("opts", ()), *extra]} for x in kd.LADDER.STAGES]
        opts = [*kd.TEACHER.OPTS, *extra]
        options += ["KD.TEACHER.OPTS", opts, "KD.LADDER.STAGES", stages]
    return options


def _test_config(row, options):
    """Return the config that a row is measured by, checked."""
    cfg = build(row.test_config, options)
    check_augmentation(cfg)
    if len(cfg.DATASETS.TEST) != 1:
        names = ", ".join(cfg.DATASETS.TEST) or "nothing"
        raise InputError(
            f"row '{row.name}': DATASETS.TEST of '{row.test_config}' is {names}; name one data "
            "set, and measure on another by a row with checkpoint_of"
        )
    return cfg


def _weights_of(row, folder, sources, stages):
    """Return the checkpoint that a row is measured with; `folder` is that of its run."""
    if row.checkpoint_of:
        return sources[row.checkpoint_of].weights
    if row.checkpoint:
        if not Path(row.checkpoint).is_file():
            raise InputError(f"row '{row.name}': there is no checkpoint '{row.checkpoint}'")
        return Path(row.checkpoint)
    if stages:
        return folder / f"stage_{len(stages):02}_{stages[-1]['name']}" / "student.pth"
    return folder / "model_final.pth"


def _length(cfg):
    """Return the iterations of a training, all stages of a ladder together."""
    stages = cfg.KD.LADDER.STAGES or [{}]
    return sum(stage.get("iterations") or cfg.SOLVER.MAX_ITER for stage in stages)


def _saved_every(cfg):
    """Return the period of checkpoints: the config's, unless that is Detectron2's or longer."""
    asked = cfg.SOLVER.CHECKPOINT_PERIOD
    period = max(CHECKPOINT_PERIOD, _length(cfg) // CHECKPOINTS)
    default = defaults().SOLVER.CHECKPOINT_PERIOD
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
    known = build(source.row.test_config, source.test_options).DATASETS.COCO_FORMAT
    known = [*(x for x in known if x["name"] not in names), *entries]
    words = ["--config-file", source.row.test_config, "--weights", str(source.weights)]
    words += ["--dataset", names[0], "--output", str(file), *source.test_options]
    words += ["DATASETS.COCO_FORMAT", str(known)]
    labelled = {**entries[0], "name": f"{names[0]}_labels_of_{source.row.name}", "json": str(file)}
    changes = ["DATASETS.COCO_FORMAT", [*cfg.DATASETS.COCO_FORMAT, labelled]]
    return Labels(file, tuple(words)), [*changes, "DATASETS.UNLABELED", [labelled["name"]]]


def _folders(cfg, split, data):
    """Return the generated folders that hold a config's data sets of a split."""
    used = [each for each in cfg.DATASETS.COCO_FORMAT if each["name"] in cfg.DATASETS[split]]
    return [folder for folder in data if any(x["images"].startswith(f"{folder}/") for x in used)]


def _flat(options):
    return [each for pair in options.items() for each in pair]


def _filled(values, checkpoints):
    """Return values as text, with checkpoints in place of the names of their rows."""
    return [PLACEHOLDER.sub(lambda m: checkpoints.get(m[1], m[0]), str(value)) for value in values]
