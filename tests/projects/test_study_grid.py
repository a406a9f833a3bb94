"""The study's grid: what study.yaml may say, and the cells it means."""

import pytest
import yaml
from helpers import ROOT

from msad_kd.config.build import build_config
from msad_kd.utils.errors import InputError
from projects.Shapes.cells import changed_keys, make_cells
from projects.Shapes.grid import read_grid
from projects.Shapes.study import choose, parse_arguments


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def content():
    """A small grid: a teacher that is there, the baseline, a student, the student of a student."""
    return {
        "data": {"train": 6, "val": 3},
        "seeds": [1, 2],
        "rows": {
            "teacher": {
                "title": "T",
                "config": "configs/Shapes/teacher.yaml",
                "checkpoint": "projects/Shapes/checkpoints/teacher.pth",
                "trained_by": ["configs/Shapes/teacher.yaml"],
            },
            "lr": {"title": "LR", "config": "configs/Shapes/lr.yaml"},
            "student": {
                "title": "S",
                "config": "configs/Shapes/student.yaml",
                "test_config": "configs/Shapes/lr.yaml",
                "options": {"KD.TEACHER.WEIGHTS": "{teacher}", "SOLVER.MAX_ITER": 4},
            },
            "again": {
                "title": "S2",
                "like": "student",
                "options": {"MODEL.WEIGHTS": "{student}"},
                "seeds": [2, 3],
            },
        },
        "tables": [{"name": "t", "title": "T", "rows": ["lr", "student"], "control": "lr"}],
    }


@pytest.fixture
def written(tmp_path):
    def write(grid):
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(grid, sort_keys=False))
        return path

    return write


@pytest.fixture
def cells_of(written, tmp_path):
    return lambda grid: make_cells(read_grid(written(grid)), tmp_path / "runs")


def test_cells_of_a_grid(cells_of, tmp_path):
    cells = cells_of(content())
    assert list(cells) == [
        *("teacher/0", "lr/1", "lr/2", "student/1", "student/2", "again/2", "again/3"),
    ]
    teacher, again = cells["teacher/0"], cells["again/3"]
    assert str(teacher.weights) == "projects/Shapes/checkpoints/teacher.pth"
    assert teacher.iterations == 0 and again.iterations == 4
    # Row `student` has no seed 3: its first stands in.
    assert cells["again/2"].needs == ("teacher/0", "student/2")
    assert again.needs == ("teacher/0", "student/1")
    options = dict(zip(again.options[::2], again.options[1::2]))
    assert options["MODEL.WEIGHTS"] == str(tmp_path / "runs/student/seed_1/model_final.pth")
    assert options["KD.TEACHER.WEIGHTS"] == str(teacher.weights)
    assert options["SEED"] == "3"
    assert again.row.test_config == "configs/Shapes/lr.yaml" and again.test_options == []


def test_fresh_scenes(cells_of):
    """Rows measured on scenes of their own: the trained nets of other rows, seed by seed."""
    grid = content()
    grid["fresh"] = {"seed": 1, "train": 1}
    grid["rows"]["fresh"] = {"title": "S, fresh", "fresh": "student"}
    grid["rows"]["fresh-teacher"] = {"title": "T, fresh", "fresh": "teacher"}
    ladder = {"title": "L", "config": "projects/MTPD/configs/Shapes/ladder.yaml", "seeds": [1]}
    grid["rows"]["ladder"] = ladder
    grid["rows"]["ladder-elsewhere"] = {"title": "L, elsewhere", "fresh": "ladder"}
    cells = cells_of(grid)
    assert cells["ladder-elsewhere/1"].weights == cells["ladder/1"].weights  # its last stage's
    assert [key for key in cells if "fresh" in key] == ["fresh/1", "fresh/2", "fresh-teacher/0"]
    for seed in (1, 2):
        cell, trained = cells[f"fresh/{seed}"], cells[f"student/{seed}"]
        assert cell.weights == trained.weights and cell.iterations == 0
        assert trained.key in cell.needs and cell.row.test_config == trained.row.test_config
    assert cells["fresh-teacher/0"].weights == cells["teacher/0"].weights
    for cell in cells.values():
        (data_set,) = build_config(cell.row.test_config, cell.test_options).DATASETS.TEST
        assert data_set == ("shapes_fresh_val" if cell.row.fresh else "shapes_val")

    grid["fresh"]["seed"] = 2
    after = cells_of(grid)
    changed = {key for key in cells if cells[key].fingerprint != after[key].fingerprint}
    assert changed == {"fresh/1", "fresh/2", "fresh-teacher/0", "ladder-elsewhere/1"}
    grid["rows"]["student"]["options"]["SOLVER.BASE_LR"] = 0.5
    assert cells_of(grid)["fresh/1"].fingerprint != after["fresh/1"].fingerprint


def test_a_fingerprint_is_of_what_is_meant(cells_of, tmp_path):
    before = cells_of(content())
    assert len({cell.fingerprint for cell in before.values()}) == len(before)
    other = content()
    other["rows"]["student"]["title"] = "another title"
    other["rows"]["student"]["options"]["SOLVER.BASE_LR"] = 0.5
    after = cells_of(other)
    changed = {key for key in before if before[key].fingerprint != after[key].fingerprint}
    # What starts from another checkpoint is another training, too.
    assert changed == {"student/1", "student/2", "again/2", "again/3"}
    other["data"]["train"] = 7
    assert all(cells_of(other)[key].fingerprint != after[key].fingerprint for key in after)
    other["data"] = {**content()["data"], "classes": 8, "seed": 0}  # their defaults
    again = cells_of(other)
    assert all(again[key].fingerprint == after[key].fingerprint for key in after)


def test_a_fingerprint_is_of_the_checkpoints_content(cells_of, tmp_path):
    grid, weights = content(), tmp_path / "t.pth"
    stage = {"name": "a", "config_file": "configs/Shapes/teacher.yaml", "weights": str(weights)}
    grid["rows"]["student"]["options"] = {"KD.TEACHER.WEIGHTS": str(weights)}
    grid["rows"]["again"]["options"] = {"KD.LADDER.STAGES": [stage]}
    fingerprints = []
    for content_of_file in (b"one", b"other"):
        weights.write_bytes(content_of_file)
        fingerprints.append({k: cell.fingerprint for k, cell in cells_of(grid).items()})
    before, after = fingerprints
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {"student/1", "student/2", "again/2", "again/3"}


def test_a_checkpoint_is_not_of_what_its_config_starts_from(cells_of, tmp_path):
    grid, start = content(), tmp_path / "start.pth"
    grid["rows"]["teacher"]["options"] = {"MODEL.WEIGHTS": str(start)}
    before = cells_of(grid)
    start.write_bytes(b"one")
    after = cells_of(grid)
    assert all(before[key].fingerprint == after[key].fingerprint for key in before)


LADDER = [
    {"name": name, "config_file": "configs/Shapes/hr.yaml", "weights": f"{{{row}}}", **more}
    for name, row, more in (("a", "teacher", {"start": "teacher"}), ("b", "lr", {"kind": "plain"}))
]


@pytest.mark.parametrize(
    ("control", "needed"),
    [("", ["teacher/0", "lr/2"]), ("first_restarted", ["teacher/0"])]
    + [("strongest", ["lr/2", "teacher/0"]), ("reversed", ["lr/2", "teacher/0"])],
)
def test_a_control_needs_the_teachers_that_it_keeps(cells_of, control, needed):
    grid = content()
    grid["rows"]["again"] |= {"options": {"KD.LADDER.STAGES": LADDER}, "ladder_control": control}
    assert sorted(cells_of(grid)["again/2"].needs) == sorted(needed)


def test_what_is_set_for_all_is_set_for_teachers_too(written, tmp_path):
    grid, extra = content(), ["MODEL.FPN.OUT_CHANNELS", "128"]
    grid["rows"]["again"]["options"] = {"KD.LADDER.STAGES": LADDER}
    cells = make_cells(read_grid(written(grid)), tmp_path, extra)
    for key in ("student/1", "again/2"):
        cfg = build_config(cells[key].row.config, cells[key].options)
        assert cfg.MODEL.FPN.OUT_CHANNELS == 128
        opts = [cfg.KD.TEACHER.OPTS, *(stage["opts"] for stage in cfg.KD.LADDER.STAGES)]
        assert opts == [extra] * (1 if key == "student/1" else 3)


def test_controls_that_are_none(cells_of):
    grid = content()
    grid["rows"]["again"] |= {"options": {"KD.LADDER.STAGES": LADDER}, "ladder_control": "best"}
    with pytest.raises(InputError, match="row 'again': .* no ladder_control 'best'; known: no_kd"):
        cells_of(grid)
    grid["rows"]["again"] |= {"options": {}, "ladder_control": "strongest"}
    with pytest.raises(InputError, match="row 'again': '.*yaml' has no ladder to be a control of"):
        cells_of(grid)


def test_changed_keys_know_no_folder_no_logging_and_no_default():
    options = ["OUTPUT_DIR", "x", "KD.GRADIENT_RATIO_PERIOD", "7", "MODEL.DEVICE", "cpu"]
    changed = changed_keys(build_config("configs/Shapes/lr.yaml", options))
    assert changed["SOLVER.MAX_ITER"] == 1200
    assert not {"OUTPUT_DIR", "KD.GRADIENT_RATIO_PERIOD", "SOLVER.GAMMA"} & changed.keys()


CURVE = {"name": "c", "title": "C"}


def broken(path, value):
    """`content()` with the value at a path of keys."""
    grid = content()
    node = grid
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return grid


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("rows", "lr", "confg"), "x", "row 'lr' has the unknown field 'confg'; known: checkpoint"),
        (("rows", "again", "like"), "studnt", "row 'again' refers to the row 'studnt'"),
        (("rows", "student", "like"), "again", "row 'student' is like itself"),
        (("rows", "again"), {"like": "lr"}, "row 'again' has no title"),
        (("rows", "again"), {"title": "x"}, "row 'again' has no config"),
        (("rows", "again", "fresh"), "lr", "row 'again' is both like another and fresh"),
        (("rows", "again"), {"title": "x", "fresh": "lr"}, "row 'again' is fresh, but the file"),
        (("fresh",), None, "the file: fresh is no mapping"),
        (("curves",), None, "the file: curves is no list"),
        (("rows", "lr", "options"), {"MODEL.WEIGHTS": "{nothing}"}, "refers to the row 'nothing'"),
        (("tables", 0, "control"), "base", "table 't' refers to the row 'base'"),
        (("tables", 0, "colour"), "red", "table 't' has the unknown field 'colour'"),
        (("curves",), [{**CURVE, "lines": {"a": ["l"]}}], "curve 'c' refers to the row 'l'"),
        (("rows", "lr"), None, "row 'lr' is no mapping"),
        (("rows", "lr", "options"), None, "row 'lr': options is no mapping"),
        (("rows", "lr", "trained_by"), "a.yaml", "row 'lr': trained_by is no list"),
        (("rows", "an lr"), {"title": "x", "config": "x"}, "row 'an lr': a name has letters"),
        (("curves",), [{"name": "t", "title": "C", "lines": {}}], "the name 't'"),
        (("rows",), ["lr"], "the file: rows is no mapping"),
        (("tables", 0), {"title": "T", "rows": []}, "table 1 has no name"),
        (("tables", 0), {"name": "t", "rows": []}, "table 't' has no title"),
        (("tables", 0), {"name": "t", "title": "T"}, "table 't' has no rows"),
        (("tables", 0, "rows"), "lr", "table 't': rows is no list"),
        (("tables", 0), "t", "table 1 is no mapping"),
        (("curves",), [{"title": "C", "lines": {}}], "curve 1 has no name"),
        (("curves",), [{"name": "c", "lines": {}}], "curve 'c' has no title"),
        (("curves",), [{"name": "c", "title": "C"}], "curve 'c' has no lines"),
        (("curves",), [{**CURVE, "lines": {"a": "lr"}}], "curve 'c', lines: a is no list"),
        (("seeds",), [1, 0], r"the file: seeds are .* of 1 or more, not \[1, 0\]"),
        (("rows", "again", "seeds"), [-1], r"row 'again': seeds are .* not \[-1\]"),
        (("rows", "again", "seeds"), 3, "row 'again': seeds are .* not 3"),
        (("tables", 0, "seeds"), [], r"table 't': seeds are .* not \[\]"),
        (("curves",), [{**CURVE, "lines": {}, "seeds": "1"}], "curve 'c': seeds are .* not '1'"),
        (("curves",), [{**CURVE, "lines": {"a": ["teacher"]}}], "'teacher' has no iterations"),
    ],
)
def test_what_a_grid_may_not_say(written, path, value, message):
    with pytest.raises(InputError, match=message):
        read_grid(written(broken(path, value)))


@pytest.mark.parametrize("name", ["data", "seeds", "rows", "tables"])
def test_what_a_grid_has_to_say(written, name):
    grid = content()
    del grid[name]
    with pytest.raises(InputError, match=f"the file has no {name}"):
        read_grid(written(grid))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("rows", "teacher", "checkpoint"), "t.pth", "'teacher': there is no checkpoint 't.pth'"),
        (
            ("rows", "student", "options"),
            {"MODEL.WEIGHTS": "{again}"},
            "row 'student' needs its own checkpoint",
        ),
        (("rows", "lr", "options"), {"SOLVER.MAXITER": 3}, "SOLVER.MAXITER; did you mean"),
        (("data",), {"trian": 3}, "data of the grid: .*'trian'"),
        (("data",), {"train": 0}, "data of the grid: train, val >= 1"),
        (("fresh",), {"val": 0}, "fresh scenes of the grid: train, val >= 1"),
    ],
)
def test_what_cells_cannot_be_made_of(cells_of, path, value, message):
    with pytest.raises(InputError, match=message):
        cells_of(broken(path, value))


def test_a_grid_that_is_not_there():
    with pytest.raises(InputError, match="'nowhere.yaml' cannot be read"):
        read_grid("nowhere.yaml")


def test_cells_that_are_asked_for(cells_of, written):
    grid = content()
    grid["tables"].append({"name": "one", "title": "One", "rows": ["student"], "seeds": [2]})
    grid["tables"][1]["reference"] = "teacher"
    cells = cells_of(grid)

    def chosen(*arguments):
        return choose(cells, read_grid(written(grid)), parse_arguments(arguments))

    assert chosen() == list(cells)
    assert chosen("--tables", "t", "--seeds", "1") == ["lr/1", "student/1"]
    # A table shows some seeds of its rows; what is not trained is always there.
    assert chosen("--tables", "one") == ["teacher/0", "student/2"]
    assert chosen("--tables", "one", "--rows", "student", "again") == [
        *("teacher/0", "student/1", "student/2", "again/2", "again/3"),
    ]
    with pytest.raises(InputError, match="no row that was chosen has the seed 1"):
        chosen("--tables", "one", "--seeds", "1")
