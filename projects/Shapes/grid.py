"""The study's grid, as `study.yaml` has it; what that file may say is told at its top."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from msad_kd.utils.errors import InputError

# Name to kind; what `seeds` have to be is told by _check_seeds.
ROW_FIELDS = dict.fromkeys(("title", "like", "config", "test_config"), str)
ROW_FIELDS |= dict.fromkeys(("ladder_control", "checkpoint", "fresh"), str)
ROW_FIELDS |= {"options": dict, "trained_by": list, "seeds": object}
REFERENCES = ("control", "baseline", "reference")  # rows that a table sets the others against
# What has to be there and what may be, by name to kind.
FILE = {"data": dict, "seeds": list, "rows": dict, "tables": list}, {"curves": list, "fresh": dict}
TABLE = (
    {"name": str, "title": str, "rows": list},
    {**dict.fromkeys(REFERENCES, str), "seeds": object},
)
CURVE = {"name": str, "title": str, "lines": dict}, {"levels": dict, "seeds": object}
KINDS = {dict: "mapping", list: "list", str: "text"}
PLACEHOLDER = re.compile(r"\{([\w.-]+)\}")


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        name: by which the others refer to it.
        title: what people call it.
        config: of the training.
        test_config: of the measured model; a student is measured as the stock model it is.
        options: KEY to value on top of both; `{name}` in a value stands for that row's checkpoint.
        ladder_control: which of the controls of the config's ladder this is; "" for none.
        checkpoint: one that need not be trained, a file or `{name}`; "" for none.
        fresh: the row whose checkpoints these are, measured on scenes that nothing was chosen by;
            "" for a row of its own, measured on the validation scenes.
        trained_by: the configs that made the checkpoint, one after another; their cost is its cost.
        seeds: of the trainings.
    """

    name: str
    title: str
    config: str
    test_config: str
    options: dict = field(default_factory=dict)
    ladder_control: str = ""
    checkpoint: str = ""
    fresh: str = ""
    trained_by: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Grid:
    """What `study.yaml` says: the data's arguments, the rows by name, the tables and the curves,
    and the arguments of the fresh scenes."""

    data: dict
    rows: dict[str, Row]
    tables: list[dict]
    curves: list[dict]
    fresh: dict = field(default_factory=dict)


def read_grid(path):
    """The grid of a file.

    Raises:
        InputError: it cannot be read, or says what it may not; with the name of row or table.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"'{path}' cannot be read: {error}") from error
    _check_fields(path, "the file", content, *FILE)
    _check_seeds(path, "the file", content["seeds"])
    rows = {}
    for name in content["rows"]:
        rows[name] = _read_row(path, name, content["rows"], content["seeds"])
    fresh = content.get("fresh", {})
    grid = Grid(content["data"], rows, content["tables"], content.get("curves", []), fresh)
    for row in rows.values():
        if not re.fullmatch(r"[\w.-]+", row.name):
            raise InputError(f"'{path}': row '{row.name}': a name has letters, digits, ., _ and -")
        for other in references(row):
            _check_row(path, f"row '{row.name}'", other, rows)
        if row.fresh and not fresh:
            raise InputError(f"'{path}': row '{row.name}' is fresh, but the file has no fresh")
    names = [each.get("name") for each in (*grid.tables, *grid.curves) if isinstance(each, dict)]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"'{path}': two tables or curves have the name '{name}'")
    for number, table in enumerate(grid.tables, start=1):
        what = _called("table", number, table)
        _check_fields(path, what, table, *TABLE)
        _check_seeds(path, what, table.get("seeds", content["seeds"]))
        for other in [*table["rows"], *(table[key] for key in REFERENCES if key in table)]:
            _check_row(path, what, other, rows)
    for number, curve in enumerate(grid.curves, start=1):
        what = _called("curve", number, curve)
        _check_fields(path, what, curve, *CURVE)
        _check_seeds(path, what, curve.get("seeds", content["seeds"]))
        kinds = dict.fromkeys(curve["lines"], list)
        _check_fields(path, f"{what}, lines", curve["lines"], kinds, {})
        points = sum(curve["lines"].values(), [])
        for other in [*points, *curve.get("levels", {}).values()]:
            _check_row(path, what, other, rows)
        for other in points:
            if rows[other].checkpoint:
                raise InputError(f"'{path}': {what}: the checkpoint '{other}' has no iterations")
    return grid


def _called(kind, number, content):
    named = isinstance(content, dict) and "name" in content
    return f"{kind} '{content['name']}'" if named else f"{kind} {number}"


def _check_fields(path, what, content, needed, optional):
    """See that a mapping has known fields alone, and the needed ones, each of its kind."""
    kinds = {**needed, **optional}
    if not isinstance(content, dict):
        raise InputError(f"'{path}': {what} is no mapping")
    unknown = sorted(content.keys() - kinds.keys())
    if unknown:
        raise InputError(
            f"'{path}': {what} has the unknown field '{unknown[0]}'; "
            f"known: {', '.join(sorted(kinds))}"
        )
    for name in needed:
        if name not in content:
            raise InputError(f"'{path}': {what} has no {name}")
    for name, kind in kinds.items():
        if name in content and not isinstance(content[name], kind):
            raise InputError(f"'{path}': {what}: {name} is no {KINDS[kind]}")


def _check_seeds(path, what, seeds):
    # Not 0: that stands for what is not trained; and Detectron2 draws a seed for one below 0.
    whole = isinstance(seeds, list) and all(type(seed) is int and seed >= 1 for seed in seeds)
    if not whole or not seeds:
        raise InputError(f"'{path}': {what}: seeds are whole numbers of 1 or more, not {seeds!r}")


def _check_row(path, what, name, rows):
    if name not in rows:
        raise InputError(f"'{path}': {what} refers to the row '{name}', which is not there")


def _read_row(path, name, contents, seeds):
    merged, following = {}, name
    chain = []
    while following:  # from the row itself to what it is like
        what = f"row '{chain[-1] if chain else name}'"
        _check_row(path, what, following, contents)
        if following in chain:
            raise InputError(f"'{path}': row '{name}' is like itself")
        chain.append(following)
        what = f"row '{following}'"
        _check_fields(path, what, contents[following], {}, ROW_FIELDS)
        if {"fresh", "like"} <= contents[following].keys():
            raise InputError(f"'{path}': {what} is both like another and fresh: it is one of them")
        following = contents[following].get("fresh") or contents[following].get("like")
    for each in reversed(chain):
        content = dict(contents[each])
        content["options"] = {**merged.get("options", {}), **content.get("options", {})}
        merged |= content
    for needed in ("title", "config"):
        if needed not in merged or (needed == "title" and "title" not in contents[name]):
            raise InputError(f"'{path}': row '{name}' has no {needed}")
    merged.pop("like", None)
    _check_seeds(path, f"row '{name}'", merged.get("seeds", seeds))
    own = () if "checkpoint" in merged else tuple(merged.get("seeds", seeds))
    if "fresh" in merged:
        merged["checkpoint"] = f"{{{merged['fresh']}}}"
    merged |= {"seeds": own, "trained_by": tuple(merged.get("trained_by", ()))}
    return Row(**{"name": name, "test_config": merged["config"], **merged})


def references(row):
    """The rows whose checkpoints a row's options name, in order."""
    found = PLACEHOLDER.findall(row.checkpoint + json.dumps(row.options))
    return tuple(dict.fromkeys(found))
