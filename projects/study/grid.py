"""The grid of a study: data sets, rows, tables and pictures, read from a YAML file."""

import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from msad_kd.utils.errors import InputError

PLACEHOLDER = re.compile(r"\{([\w.-]+)\}")


@dataclass
class Row:
    """One line of a table: a model that is trained once per seed, or a checkpoint."""

    title: str = ""  # what the tables call it
    # A row whose fields hold where this row has none; options are merged. A checkpoint does not
    # take its seeds, nor a row with its own config a test_config that is just the other's config.
    like: str = ""
    checkpoint_of: str = ""  # such a row, whose checkpoints are measured with other options
    checkpoint: str = ""  # a file; nothing is trained
    recorded: str = ""  # the checkpoint's AP: an entry of "results" in the JSON file beside it
    config: str = ""  # of the training
    test_config: str = ""  # of the measured model, if it differs: a student's is a stock model's
    # Config KEY to VALUE on top of both. {row} in a value stands for that row's checkpoint of the
    # same seed, or of its first seed if it lacks this one.
    options: dict[str, Any] = field(default_factory=dict)
    labels_by: str = ""  # a row whose model labels the images of DATASETS.UNLABELED beforehand
    seeds: list[int] = field(default_factory=list)  # of the trainings, if not the grid's
    name: str = ""  # the row's key in the file

    @property
    def trained(self):
        """Tell whether the study trains the row itself."""
        return not (self.checkpoint or self.checkpoint_of)

    def references(self):
        """Return the names of the rows whose checkpoints it uses."""
        if not self.trained:  # its options may name what its checkpoint was trained from
            return (self.checkpoint_of,) if self.checkpoint_of else ()
        names = [self.labels_by] if self.labels_by else []
        return tuple(dict.fromkeys(names + PLACEHOLDER.findall(str(self.options))))


@dataclass
class Table:
    """A table of rows."""

    name: str  # for the command line and file names
    title: str
    rows: list[str]
    control: str = ""  # the row that differences are taken to
    baseline: str = ""  # the row whose steps training is counted in
    seeds: list[int] = field(default_factory=list)  # those that count, if not all
    picture: bool = False  # whether to draw the differences to the control

    def all_rows(self):
        """Return the names of its rows, control and baseline included."""
        return [*self.rows, *filter(None, (self.control, self.baseline))]


@dataclass
class Curve:
    """A picture of AP against the length of the training."""

    name: str
    title: str
    lines: dict[str, list[str]]  # label to rows that differ in their iterations
    levels: dict[str, str] = field(default_factory=dict)  # label to a row, a horizontal line
    seeds: list[int] = field(default_factory=list)


@dataclass
class Grid:
    """A study."""

    rows: dict[str, Row]
    seeds: list[int] = field(default_factory=lambda: [1])
    # Data sets to generate: folder in $DETECTRON2_DATASETS to arguments of `generator`, a module
    # like projects.Shapes.generate. All others must exist.
    generator: str = ""
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    output: str = "output/study"  # the folder of runs and results
    detections: int = 100  # the number at which GMACs and latency are measured
    tables: list[Table] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    # Rows whose models, of their first seeds, are timed in turn for a table of AP and cost
    comparison: list[str] = field(default_factory=list)
    scenes: dict[str, str] = field(default_factory=dict)  # title of a picture's column to its row


def read_grid(path):
    """Read a grid file; an InputError names the entry that is unknown, missing or wrong."""
    try:
        content = yaml.safe_load(Path(path).read_text()) or {}
        merged = OmegaConf.merge(OmegaConf.structured(Grid), content)
        grid = OmegaConf.to_object(merged)
        grid.rows = {name: _complete(name, grid) for name in grid.rows}
        _check(grid)
    except (OSError, yaml.YAMLError, OmegaConfBaseException, InputError) as error:
        raise InputError(f"the grid '{path}': {error}") from error
    return grid


def _complete(name, grid, pending=()):
    """Return a row with the fields and options of the row that it is like."""
    row = replace(grid.rows[name], name=name)
    parent = row.like or row.checkpoint_of
    if row.like and row.checkpoint_of or name in pending:
        raise InputError(f"row '{name}' is like itself, or has both like and checkpoint_of")
    if parent:
        _check_rows(grid, f"row '{name}'", [parent])
        parent = _complete(parent, grid, (*pending, name))
        own = {"title", "recorded"}
        own |= {"seeds"} if row.checkpoint else set()  # one file
        own |= {"test_config"} if row.config and parent.test_config == parent.config else set()
        for each in fields(Row):
            if each.name not in own and not getattr(row, each.name):
                setattr(row, each.name, getattr(parent, each.name))
        row.options = {**parent.options, **row.options}
    row.test_config = row.test_config or row.config
    row.seeds = row.seeds or ([] if row.checkpoint else grid.seeds)
    return row


def _check(grid):
    uses = [(f"row '{row.name}'", row.references()) for row in grid.rows.values()]
    for table in grid.tables:
        if table.picture and not table.control:
            raise InputError(f"table '{table.name}' has a picture, but no control to compare with")
        uses.append((f"table '{table.name}'", table.all_rows()))
    for curve in grid.curves:
        rows = [*sum(curve.lines.values(), []), *curve.levels.values()]
        uses.append((f"curve '{curve.name}'", rows))
    uses.append(("the comparison", [*grid.comparison, *grid.scenes.values()]))
    for use in uses:
        _check_rows(grid, *use)
    for row in grid.rows.values():
        if not row.title or not row.config or not re.fullmatch(r"[\w.-]+", row.name):
            raise InputError(f"row '{row.name}' needs a title, a config and a plain name")
    # 0 stands for rows without a seed, and Detectron2 replaces a negative seed by a random one.
    if min(sum((row.seeds for row in grid.rows.values()), [1])) < 1:
        raise InputError("seeds are whole numbers of 1 or more")


def _check_rows(grid, what, names):
    for name in names:
        if name not in grid.rows:
            raise InputError(f"{what} refers to the row '{name}', which does not exist")
