"""The cells of the study's grid: a cell is a row with one seed, so a training, or a checkpoint."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from detectron2.config import CfgNode, get_cfg

from msad_kd.config.build import build_config
from msad_kd.config.defaults import add_msad_kd_config
from msad_kd.ladder.controls import control_stages
from msad_kd.utils.errors import InputError
from projects.Shapes.generate import complete_arguments
from projects.Shapes.grid import PLACEHOLDER, Row, references

# Keys of a config, fields of a stage or a loss, on which the time of a step does not depend.
FREE = {"SEED", "MODEL.WEIGHTS", "KD.TEACHER.WEIGHTS", "weights", "weight", "warmup_iters"}
FREE |= {f"SOLVER.{key}" for key in ("MAX_ITER", "STEPS", "BASE_LR", "WARMUP_ITERS")} | {"base_lr"}
# Keys that no weight depends on.
LOGS = {"OUTPUT_DIR", "KD.DIAGNOSTICS_PERIOD", "KD.GRADIENT_RATIO_PERIOD"}


@dataclass(frozen=True)
class Cell:
    """A row with one seed.

    Attributes:
        key: "row/seed".
        folder: of its run.
        weights: its checkpoint, once it is trained.
        options: KEY VALUE pairs of the training.
        test_options: those of the measured model.
        needs: keys of the cells whose checkpoints it starts or learns from.
        iterations: of the training, all stages of a ladder together; 0 for a checkpoint.
        fingerprint: equal only where the same training on the same data is meant.
        recipe: equal where a step of the training costs the same.
    """

    key: str
    row: Row
    seed: int
    folder: Path
    weights: Path
    options: list
    test_options: list
    needs: tuple[str, ...]
    iterations: int
    fingerprint: str
    recipe: str

    @property
    def title(self):
        """The row and, where there are several, the seed, as people read them."""
        return f"{self.row.name}, seed {self.seed}" if self.row.seeds else self.row.name


def _seed_of(row, seed):
    """The seed of the cell that stands for a row where another row's cell has this seed."""
    return seed if seed in row.seeds else (row.seeds or (0,))[0]


def _digest(content):
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def data_of(grid, *, fresh=False):
    """The folder of a grid's data and their arguments, or those of its fresh scenes."""
    data = {"folder": "shapes", **grid.data}
    if fresh:
        data |= {"folder": f"{data['folder']}_fresh", **grid.fresh}
    return data.pop("folder"), data


def _complete(what, data):
    try:
        return complete_arguments(**data)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} of the grid: {error}") from error


def _fresh_options(grid, cfg):
    """KEY to value of a config's model when it is measured on the fresh scenes."""
    name, _ = data_of(grid, fresh=True)
    json_file = f"{name}/annotations/instances_val.json"
    entry = {"name": f"{name}_val", "json": json_file, "images": f"{name}/val"}
    entries = [*cfg.DATASETS.COCO_FORMAT, entry]
    return {"DATASETS.COCO_FORMAT": entries, "DATASETS.TEST": (entry["name"],)}


def _hash_file(path):
    """Of a checkpoint that no row makes; None of one that is to be made."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if Path(path).is_file() else None


def make_cells(grid, folder, extra: Sequence = ()):
    """All cells of a grid, each after those it needs.

    Args:
        grid: from `read_grid`.
        folder: the runs go to ROW/seed_SEED in it.
        extra: KEY VALUE pairs on top of all trainings, teachers and measurements, for a trial.

    Returns:
        dict, key to `Cell`.

    Raises:
        InputError: the data have no such argument, a checkpoint is absent, a config cannot be read,
            or rows need each other.
    """
    maker = _Maker(grid, Path(folder), list(extra))
    for row in grid.rows.values():
        for seed in row.seeds or (0,):
            maker.add(row, seed)
    return maker.cells


class _Maker:
    """Makes cells, each after those it needs."""

    def __init__(self, grid, folder, extra):
        self.grid, self.folder, self.extra = grid, folder, extra
        self.cells: dict[str, Cell] = {}
        self.data = _complete("data", data_of(grid)[1])
        self.fresh = _complete("fresh scenes", data_of(grid, fresh=True)[1])

    def add(self, row, seed, pending=()):
        key = f"{row.name}/{seed}"
        if key in self.cells:
            return self.cells[key]
        if row.name in pending:
            raise InputError(f"row '{row.name}' needs its own checkpoint")
        others = {name: self.grid.rows[name] for name in _needed(row)}
        needs = {
            name: self.add(other, _seed_of(other, seed), (*pending, row.name))
            for name, other in others.items()
        }
        self.cells[key] = self._make(row, seed, needs)
        return self.cells[key]

    def _make(self, row, seed, needs):
        folder = self.folder / row.name / f"seed_{seed}"
        paths = {name: str(cell.weights) for name, cell in needs.items()}
        weights = folder / "model_final.pth"
        common = [*self.extra, *(["SEED", seed] if row.seeds else [])]
        if self.extra:  # what holds for a teacher's training holds for its students' view of it
            common += ["KD.TEACHER.OPTS", self.extra]
        options = [*_flat(row.options), *common]
        # On the CPU, so that a cell means the same wherever it is read.
        meant = build_config(row.config, [*map(str, options), "MODEL.DEVICE", "cpu"])
        stages, iterations = meant.KD.LADDER.STAGES, meant.SOLVER.MAX_ITER
        if row.ladder_control and not stages:
            raise InputError(f"row '{row.name}': '{row.config}' has no ladder to be a control of")
        if stages:
            if row.ladder_control:
                stages = _control(row, stages, iterations)
            if self.extra:
                opts = [[*stage.get("opts", ()), *self.extra] for stage in stages]
                stages = [{**stage, "opts": own} for stage, own in zip(stages, opts)]
            if row.ladder_control or self.extra:
                options = [*_flat({**row.options, "KD.LADDER.STAGES": stages}), *common]
            iterations = sum(stage.get("iterations") or iterations for stage in stages)
            last = f"stage_{len(stages):02}_{stages[-1]['name']}"
            weights = folder / last / "student.pth"
        if row.checkpoint:
            weights = Path(_filled([row.checkpoint], paths)[0])
            if not needs and not weights.is_file():
                raise InputError(f"row '{row.name}': there is no checkpoint '{weights}'")
        tested = {key: value for key, value in row.options.items() if not _trains(key)}
        test_options = _filled([*_flat(tested), *self.extra], paths)
        measured = build_config(row.test_config, [*test_options, "MODEL.DEVICE", "cpu"])
        if row.fresh:
            test_options += _filled(_flat(_fresh_options(self.grid, measured)), {})
            measured = build_config(row.test_config, [*test_options, "MODEL.DEVICE", "cpu"])
        # Of a checkpoint it does not matter what its config would start from.
        files = [row.checkpoint, "" if row.checkpoint else meant.MODEL.WEIGHTS]
        files += [each["weights"] for each in stages] or [meant.KD.TEACHER.WEIGHTS]
        data = self.fresh if row.fresh else self.data
        # What it says of a training is not of the model that is measured.
        tells = {key: value for key, value in changed_keys(measured).items() if not _trains(key)}
        origin = {name: cell.fingerprint for name, cell in needs.items()}
        return Cell(
            key=f"{row.name}/{seed}",
            row=row,
            seed=seed,
            folder=folder,
            weights=weights,
            options=_filled(options, paths),
            test_options=test_options,
            needs=tuple(cell.key for cell in needs.values()),
            iterations=0 if row.checkpoint else iterations,
            fingerprint=_digest(
                [data, changed_keys(meant), stages, tells]
                + [origin, [_hash_file(file) for file in files]]
            ),
            recipe=recipe_of(meant, stages),
        )


def _control(row, stages, iterations):
    controls = control_stages(stages, iterations)
    if row.ladder_control not in controls:
        raise InputError(
            f"row '{row.name}': there is no ladder_control '{row.ladder_control}'; "
            f"known: {', '.join(controls)}"
        )
    return controls[row.ladder_control]


def _needed(row):
    """The rows whose checkpoints a row takes: all that its options name, but for the teachers that
    a control of a ladder does without."""
    stages = row.options.get("KD.LADDER.STAGES")
    if not row.ladder_control or not stages:
        return references(row)
    kept = _control(row, stages, 1)
    return references(replace(row, options={**row.options, "KD.LADDER.STAGES": kept}))


def changed_keys(cfg):
    """Key to value of what a config has changed of the defaults, but for where and what it logs.

    A key that a later version adds does not make it another config.
    """
    default = get_cfg()
    add_msad_kd_config(default)
    default = _keys(default)
    return {k: v for k, v in _keys(cfg).items() if k not in LOGS and v != default.get(k)}


def recipe_of(cfg, stages=()):
    """A digest of what the time of a step depends on, of a training or a ladder of these stages."""
    # How much of it a stage is depends on the length of those that name none.
    free = FREE - {"SOLVER.MAX_ITER"} if stages else FREE

    def without(value):
        if isinstance(value, dict):
            return {key: without(each) for key, each in value.items() if key not in free}
        return [without(each) for each in value] if isinstance(value, (list, tuple)) else value

    return _digest(without({**changed_keys(cfg), "KD.LADDER.STAGES": stages}))


def _keys(node, prefix=""):
    keys = {}
    for name, value in node.items():
        nested = isinstance(value, CfgNode)
        keys |= _keys(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return keys


def _trains(key):
    """Whether a key is of the training alone; the measured model is stock and need not have it."""
    return key.startswith(("KD.", "SOLVER.", "INPUT.MIN_SIZE_TRAIN")) or key == "MODEL.WEIGHTS"


def _flat(options):
    return [each for pair in options.items() for each in pair]


def _filled(options, paths):
    """KEY VALUE pairs as one types them, the rows' checkpoints in their places."""
    return [
        PLACEHOLDER.sub(lambda found: paths.get(found[1], found[0]), str(each)) for each in options
    ]
