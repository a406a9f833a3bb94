"""The grids that come with the project."""

import pytest
from helpers import ROOT

from msad_kd.config.build import build_config
from projects.Shapes import plan
from projects.Shapes.cells import make_cells
from projects.Shapes.demo import DATA
from projects.Shapes.grid import read_grid


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_the_study_stands_on_the_data_and_models_of_the_demo(tmp_path):
    grid = read_grid("projects/Shapes/study.yaml")
    assert grid.data == DATA
    cells = make_cells(grid, tmp_path)
    by_name = {cell.row.name: cell for cell in cells.values()}
    student, control = "student-of-second-teacher", "lr-from-second-teacher"
    for name, demo in (("lr", "lr"), (control, "lr-from-teacher"), (student, "student")):
        assert by_name[name].row.config == plan.CONFIGS[demo]
    assert by_name[student].row.test_config == plan.CONFIGS["lr"]
    # Every student of a table trains as long as its control, in all its stages together.
    for table in grid.tables:
        for name in table["rows"]:
            cell = by_name[name]
            if cell.row.test_config != cell.row.config:
                assert cell.iterations == by_name[table["control"]].iterations
    # What is of one seed says so, and is of one seed in all that it shows.
    shown = [*grid.tables, *grid.curves]
    of_one = [each["name"] for each in shown if each.get("seeds") == [1]]
    assert of_one == ["multiscale", "rates", "weights", "levels", "iterations", "start"]
    assert all(("one seed" in each["title"]) == ("seeds" in each) for each in shown)
    # The longer baselines have the iterations of all that made the teacher.
    for teacher, baselines in (
        ("teacher", ("lr-long", "lr-multiscale-long")),
        ("teacher-jitter", ("lr-jitter-long",)),
    ):
        made = grid.rows[teacher].trained_by
        own = sum(build_config(config, []).SOLVER.MAX_ITER for config in made)
        assert {by_name[name].iterations - own for name in baselines} == {by_name["lr"].iterations}
    parts = ("fcos-hr-start", "fcos-teacher")
    own = sum(by_name[name].iterations for name in parts)
    assert by_name["fcos-lr-long"].iterations == by_name["fcos-lr"].iterations + own
    ladder = by_name["swin-ladder"]
    assert any(str(by_name["swin"].weights) in each for each in ladder.options)
    assert ladder.needs == (
        "teacher/0",
        "swin/1",
    )
    assert ladder.weights.parts[-2:] == ("stage_02_swin", "student.pth")
    assert by_name["swin-reversed"].weights.parts[-2] == "stage_02_2_fused"


def test_the_larger_study_reads_too(tmp_path):
    grid = read_grid("projects/Shapes/study_large.yaml")
    cells = make_cells(grid, tmp_path)
    # The teacher's own iterations and those of what it starts from.
    before = cells["teacher/2"].iterations + cells["hr/1"].iterations
    assert cells["lr-long/1"].iterations == cells["lr/1"].iterations + before
    for cell in cells.values():
        cfg = build_config(cell.row.config, ["MODEL.DEVICE", "cpu"])
        assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == grid.data["classes"]
        assert grid.data["folder"] in cfg.DATASETS.COCO_FORMAT[0]["json"]
        assert cfg.INPUT.MIN_SIZE_TEST in (grid.data["size"][0], grid.data["size"][0] // 2)
