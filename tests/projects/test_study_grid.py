"""What a grid file may say, and the cells it means."""

import os
import signal
import sys

import pytest
import torch
import yaml
from grids import CHECKPOINT, LR, UNLABELED, content, fingerprints
from helpers import ROOT

from msad_kd import DISTILL_LOSS_REGISTRY
from msad_kd.config.build import build_config
from msad_kd.utils.errors import InputError
from projects.study.cells import make_cells
from projects.study.grid import read_grid
from projects.study.run import choose, main, parse_arguments


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_cells_of_a_grid(cells_of, tmp_path):
    cells = cells_of(content())
    assert list(cells) == [
        *("teacher/0", "lr/1", "lr/2", "student/1", "student/2"),
        *("again/2", "again/3", "fresh/1", "fresh/2"),
    ]
    teacher, again = cells["teacher/0"], cells["again/3"]
    assert str(teacher.weights) == CHECKPOINT
    assert teacher.iterations == 0 and again.iterations == 4
    # Row `student` lacks seed 3: its first seed stands in.
    assert cells["again/2"].needs == ("teacher/0", "student/2")
    assert again.needs == ("teacher/0", "student/1")
    options = dict(zip(again.options[::2], again.options[1::2]))
    assert options["MODEL.WEIGHTS"] == str(tmp_path / "runs/student/seed_1/model_final.pth")
    assert options["KD.TEACHER.WEIGHTS"] == CHECKPOINT and options["SEED"] == "3"
    assert again.row.test_config == LR and again.test_options == []


def test_a_teacher_is_measured_at_its_scale(cells_of):
    grid, before = content(), cells_of(content())["teacher/0"]
    grid["rows"]["teacher"]["options"] = {"KD.SCALE": 4, "KD.DIAGNOSTICS_PERIOD": 3}
    cell = cells_of(grid)["teacher/0"]
    assert cell.test_options == ["KD.SCALE", "4"] and cell.fingerprint != before.fingerprint


def test_what_a_row_has_of_its_own(cells_of):
    """A row with its own config is measured by it, and a file has no seeds."""
    grid = content()
    hr = {"title": "HR", "config": "configs/Shapes/hr.yaml"}
    grid["rows"] |= {
        "hr": {**hr, "like": "lr"},
        "student-hr": {**hr, "like": "student"},
        "at-hr": {**hr, "checkpoint_of": "lr"},
        "file": {"title": "F", "like": "lr", "checkpoint": CHECKPOINT},
    }
    cells = cells_of(grid)
    assert cells["hr/1"].row.test_config == cells["at-hr/2"].row.test_config == hr["config"]
    assert cells["student-hr/1"].row.test_config == LR  # which its parent names
    assert [key for key in cells if key.startswith("file")] == ["file/0"]


@pytest.mark.parametrize(
    ("length", "asked", "period"),
    [(100, 10**5, 500), (90_000, 10**5, 9000), (90_000, 70, 70), (90_000, 5000, 9000)],
)
def test_how_often_a_training_saves(cells_of, length, asked, period, tmp_path):
    grid, config = content(), tmp_path / "lr.yaml"
    solver = {"MAX_ITER": length, "CHECKPOINT_PERIOD": asked}
    config.write_text(yaml.safe_dump({"_BASE_": str(ROOT / LR), "SOLVER": solver}))
    grid["rows"]["lr"]["config"] = str(config)
    assert cells_of(grid)["lr/1"].saved_every == period


def test_checkpoints_of_a_row_are_measured_on_other_images(cells_of):
    grid = content()
    ladder = {"title": "L", "config": "projects/MTPD/configs/Shapes/ladder.yaml", "seeds": [1]}
    elsewhere = {**grid["rows"]["fresh"], "checkpoint_of": "ladder"}
    grid["rows"] |= {"ladder": ladder, "ladder-fresh": elsewhere}
    cells = cells_of(grid)
    # The checkpoint of a ladder is its last stage's student.
    assert cells["ladder/1"].weights.parts[-2:] == ("stage_02_hr", "student.pth")
    for key, source in (("fresh/2", "student/2"), ("ladder-fresh/1", "ladder/1")):
        cell = cells[key]
        assert cell.weights == cells[source].weights and cell.iterations == 0
        # Not the teacher, too: a checkpoint that is there can be measured without it.
        assert cell.needs == (source,) and cell.data == ("shapes_fresh",)
        cfg = build_config(cell.row.test_config, cell.test_options)
        assert cfg.DATASETS.TEST == ("shapes_fresh_val",)
    assert set(cells["student/2"].data) == {"shapes"}

    before = fingerprints(cells)
    grid["data"]["shapes_fresh"]["seed"] = 2
    after = fingerprints(cells_of(grid))
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {"fresh/1", "fresh/2", "ladder-fresh/1"}
    del grid["data"]  # all data sets are there
    assert all(cell.data == () for cell in cells_of(grid).values())


def test_a_row_whose_images_another_row_labels(cells_of, tmp_path):
    grid = content()
    grid["rows"]["student"]["options"] |= UNLABELED
    plain = cells_of(grid)
    grid["rows"]["student"]["labels_by"] = "lr"
    cells = cells_of(grid)
    assert cells["student/2"].needs == ("lr/2", "teacher/0")
    labels, options = cells["student/2"].labels, cells["student/2"].options
    assert labels.file.parents[1] == tmp_path / "runs" / "lr" / "seed_2"
    last = dict(zip(options[::2], options[1::2]))
    assert last["DATASETS.UNLABELED"] == "['more_labels_of_lr']"
    assert f"'json': '{labels.file}'" in last["DATASETS.COCO_FORMAT"]
    assert labels.command[labels.command.index("--weights") + 1] == str(cells["lr/2"].weights)
    assert cells["fresh/2"].labels is None  # nothing is trained
    assert labels.so_far() == ""
    labels.file.parent.mkdir(parents=True)
    (labels.file.parent / "labels_12.partial").write_text("an image\nanother\n")
    assert labels.so_far() == " (2 images)"
    for key in ("student/2", "fresh/2", "again/2"):
        assert cells[key].fingerprint != plain[key].fingerprint
    assert cells["lr/2"].fingerprint == plain["lr/2"].fingerprint
    assert "'shapes_train'" in labels.command[-1] and "'more'" in labels.command[-1]
    # Another model labels otherwise, and other images get other labels.
    grid["rows"]["lr"]["options"] = {"SOLVER.MAX_ITER": 3}
    assert cells_of(grid)["student/2"].fingerprint != cells["student/2"].fingerprint
    files = set()
    for grid["data"]["shapes_more"] in ({"train": 3, "val": 1}, {"train": 4, "val": 1}):
        files.add(cells_of(grid)["student/2"].labels.file)
    assert len(files) == 2


def test_the_schedule_is_that_of_the_processes(written):
    grid = content()
    grid["rows"]["lr"]["options"] = {"SOLVER.MAX_ITER": 8000, "SOLVER.REFERENCE_WORLD_SIZE": 4}
    # A row whose images another one labels, on two seeds, registers these labels in between.
    grid["rows"]["student"]["options"] |= {**UNLABELED, "SOLVER.REFERENCE_WORLD_SIZE": 4}
    grid["rows"]["student"]["labels_by"] = "lr"
    path, found = written(grid), {}
    for processes, iterations in ((1, 32_000), (2, 16_000), (4, 8000)):
        cell = found[processes] = make_cells(read_grid(path), "runs", (), processes)["lr/1"]
        # The training scales the period, too.
        assert (cell.iterations, cell.saved_every) == (iterations, 800)
    assert len({cell.fingerprint for cell in found.values()}) == 1


def test_settings_hold_for_teachers_too(cells_of):
    grid, extra = content(), ["MODEL.FPN.OUT_CHANNELS", "128"]
    own = ["MODEL.ROI_BOX_HEAD.FC_DIM", 64]
    grid["rows"]["student"]["options"]["KD.TEACHER.OPTS"] = own
    stages = [
        {"name": name, "config_file": "configs/Shapes/hr.yaml", "weights": weights}
        for name, weights in (("a", "{teacher}"), ("b", "{lr}"))
    ]
    grid["rows"]["again"]["options"] = {"KD.LADDER.STAGES": stages}
    cells = cells_of(grid, extra)
    assert cells["again/2"].needs == ("teacher/0", "lr/2")
    for key in ("student/1", "again/2"):
        cfg = build_config(cells[key].row.config, cells[key].options)
        assert cfg.MODEL.FPN.OUT_CHANNELS == 128
        opts = [cfg.KD.TEACHER.OPTS, *(stage["opts"] for stage in cfg.KD.LADDER.STAGES)]
        assert opts == [[*own, *extra], *[extra] * 2][: 1 if key == "student/1" else 3]
    assert cells["lr/1"].test_options == extra


TABLE = {"name": "t", "title": "T", "rows": ["lr"]}
CURVE = {"name": "c", "title": "C"}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("rows", "lr", "confg"), "x", r"'confg' not in 'Row'(?s:.*)rows.lr.confg"),
        (("rows", "lr"), None, "rows.lr"),
        (("rows", "again", "seeds"), 3, "rows.again.seeds"),
        (("tables", 0, "colour"), "red", "'colour' not in 'Table'"),
        (("tables", 0), {"title": "T", "rows": []}, "Table(?s:.*)name"),
        (("curves",), [{**CURVE, "lines": {"a": ["nil"]}}], "curve 'c' .* row 'nil'"),
        (("rows", "again", "like"), "studnt", "row 'again' refers to the row 'studnt'"),
        (("rows", "student", "like"), "again", "row '(student|again)' is like itself"),
        (("rows", "fresh", "like"), "lr", "row 'fresh' .* both like and checkpoint_of"),
        (("rows", "lr", "title"), "", "row 'lr' needs a title, a config"),
        (("rows", "an lr"), {"title": "x", "config": "x"}, "row 'an lr' needs .* plain name"),
        (("rows", "lr", "options"), {"MODEL.WEIGHTS": "{nothing}"}, "refers to the row 'nothing'"),
        (("tables", 0, "control"), "base", "table 't' refers to the row 'base'"),
        (("tables", 0), {**TABLE, "picture": True}, "table 't' has a picture, but no control"),
        (("comparison",), ["base"], "the comparison refers to the row 'base'"),
        (("seeds",), [1, 0], "seeds are whole numbers of 1 or more"),
        (("rows", "teacher", "checkpoint"), "t.pth", "'teacher': there is no checkpoint 't.pth'"),
        (("rows", "lr", "options"), {"MODEL.WEIGHTS": "{lr}"}, "row 'lr' needs its own checkpoint"),
        (("rows", "lr", "options"), {"SOLVER.MAXITER": 3}, "SOLVER.MAXITER; did you mean"),
        (("data", "shapes"), {"trian": 3}, "'shapes' .*'trian'"),
        (
            ("rows", "lr", "options"),
            {"DATASETS.TEST": ["shapes_val", "shapes_fresh_val"]},
            "row 'lr': DATASETS.TEST of 'configs/Shapes/lr.yaml' is shapes_val, shapes_fresh_val;",
        ),
        (("rows", "student", "labels_by"), "lr", "'student' has labels_by: DATASETS.UNLABELED"),
    ],
)
def test_errors_name_the_entry(cells_of, path, value, message):
    grid = node = content()
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(InputError, match=message):
        cells_of(grid)


def test_an_empty_grid(written):
    path = written({})
    path.write_text("")
    with pytest.raises(InputError, match="the grid '.*study.yaml': .*mandatory value: rows"):
        read_grid(path)


def test_the_command_line_chooses_cells(cells_of, written, capsys):
    grid = content()
    grid["tables"].append({"name": "one", "title": "One", "rows": ["student"], "seeds": [2]})
    grid["tables"][1]["baseline"] = "teacher"
    cells = cells_of(grid)

    def chosen(*arguments):
        args = parse_arguments(["--grid", "x", *arguments])
        return choose(cells, read_grid(written(grid)), args)

    assert chosen() == list(cells)
    assert chosen("--tables", "t", "--seeds", "1") == ["lr/1", "student/1"]
    # A table shows some seeds of its rows; checkpoints, which have none, always count.
    assert chosen("--tables", "one") == ["teacher/0", "student/2"]
    assert chosen("--tables", "one", "--rows", "again") == [
        *("teacher/0", "student/2", "again/2", "again/3"),
    ]
    for arguments, message in (
        (["--rows", "lr", "--seeds", "1", "7"], "no row that was chosen has the seed 7"),
        (["--rows", "teacher", "--seeds", "1"], "no row that was chosen has the seed 1"),
        (["--rows", "studnt"], "there is no row 'studnt'; known: teacher, lr, student"),
        (["--tables", "none"], "there is no table 'none'; known: t, one"),
    ):
        with pytest.raises(InputError, match=message):
            chosen(*arguments)
    for option in ("--slots", "--seeds"):
        with pytest.raises(SystemExit):
            chosen(option, "0")
        assert f"{option}: '0' is no whole number of 1 or more" in capsys.readouterr().err


def test_a_training_has_a_gpu_of_its_own_or_none(written, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7")
    words = ["--grid", str(written(content())), "--output", str(tmp_path / "runs"), "--report"]
    assert parse_arguments(words).num_gpus == 1
    main(words)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3,5,7"
    main([*words, "--num-gpus", "0"])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_a_loss_of_the_users(written, tmp_path, monkeypatch, capsys):
    code = "from msad_kd import DISTILL_LOSS_REGISTRY as REGISTRY\n\n"
    code += "@REGISTRY.register()\ndef of_mine(student, teacher):\n    return student.mean()\n"
    (tmp_path / "my_grids_losses.py").write_text(code)
    grid = content()
    grid["rows"]["student"]["options"]["KD.LOSSES"] = [{"name": "of_mine", "weight": 1.0}]
    words = ["--grid", str(written(grid)), "--output", str(tmp_path / "out"), "--report"]
    monkeypatch.setenv("MSAD_KD_IMPORT", "")  # undone afterwards
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # handlers of the tests' process stay
    with pytest.raises(SystemExit, match="there is no loss 'of_mine'"):
        main(words)
    monkeypatch.chdir(tmp_path)  # which main() has left
    main([*words, "--import", "my_grids_losses"])
    assert "Tables and pictures are in" in capsys.readouterr().out
    DISTILL_LOSS_REGISTRY._obj_map.pop("of_mine")
