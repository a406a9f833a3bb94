"""The study's numbers, worked out by hand."""

from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from helpers import ROOT

from projects.Shapes import study_report
from projects.Shapes.costs import config_recipe, training_costs
from projects.Shapes.grid import Grid, Row
from projects.Shapes.study_pictures import draw_bars, draw_curves
from projects.Shapes.study_values import mean_and_deviation, paired_difference, values_of

CONFIG = "configs/Shapes/lr.yaml"
AP = {
    "hr/0": (50.0, 52.0),
    "control/1": (40.0, 38.0),
    "control/2": (42.0, 39.0),
    "control/3": (41.0, 40.0),
    "lr/1": (30.0, 20.0),
    "student/1": (43.0, 37.0),
    "student/3": (42.0, 41.0),
}


def row(name, seeds=(1, 2, 3), **fields):
    return Row(name, f"the {name}", CONFIG, CONFIG, seeds=seeds, **fields)


@pytest.fixture
def grid():
    rows = {
        "hr": row("hr", (), checkpoint="hr.pth", trained_by=("configs/Shapes/hr_start.yaml",)),
        "control": row("control"),
        "lr": row("lr"),
        "student": row("student"),
        "later": row("later"),
    }
    table = {"name": "all", "title": "All", "rows": [*rows]}
    table |= {"control": "control", "baseline": "lr", "reference": "hr"}
    curve = {"name": "c", "title": "C", "lines": {"line": ["lr", "student"]}, "levels": {"h": "hr"}}
    return Grid({"train": 3}, rows, [table], [curve])


@pytest.fixture
def cells(grid):
    return {
        f"{each.name}/{seed}": SimpleNamespace(
            row=each,
            seed=seed,
            needs=("hr/0",) if each.name == "student" else (),
            iterations=100,
            recipe=each.name,
        )
        for each in grid.rows.values()
        for seed in each.seeds or (0,)
    }


@pytest.fixture
def results():
    def cell(box, mask):
        metrics = dict.fromkeys(study_report.METRICS, 1.0)
        return {
            "bbox": {**metrics, "AP": box},
            "segm": {**metrics, "AP": mask},
            **{"gmacs": 0.2, "params_m": 1.5, "iterations": 100},
            **{"command": "python train_net.py", "machine": "this one", "gradient_ratio": None},
        }

    seconds = {"lr": [0.1, 0.2, 0.3], "student": [0.5, 0.3, 0.4], "control": [0.2, 0.2, 0.2]}
    seconds[config_recipe("configs/Shapes/hr_start.yaml")[0]] = [0.4, 0.4, 0.4]
    return {"cells": {k: cell(*v) for k, v in AP.items()}, "steps": {"seconds": seconds}}


def test_mean_deviation_and_difference():
    assert mean_and_deviation([40.0, 42.0, 41.0]) == (41.0, 1.0)
    assert mean_and_deviation([5.0]) == (5.0, None)
    assert paired_difference({1: 43.0, 3: 42.0}, {1: 40.0, 2: 42.0, 3: 41.0}) == [3.0, 1.0]
    assert paired_difference({1: 43.0}, {2: 40.0}) == []


def table_of(grid, cells, results):
    costs = training_costs(grid, cells, results)
    return study_report.table(grid, cells, results, grid.tables[0], costs)


def lines_of(text):
    return {
        line.split("|")[2].strip(): [cell.strip() for cell in line.split("|")[3:-1]]
        for line in text.splitlines()
        if line.startswith("| `")
    }


@pytest.fixture
def in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_table(grid, cells, results, in_repository):
    text = table_of(grid, cells, results)
    header = [cell.strip() for cell in text.splitlines()[4].split("|")[1:-1]]
    assert header == [
        *("row", "model"),
        *("seeds", "box AP", "box, against the control", "box gap"),
        *("mask AP", "mask, against the control", "mask gap", "GMACs", "training"),
    ]
    assert "| `student` | the student |" in " ".join(text.split())
    lines = lines_of(text)
    # In steps of 0.2 s: 100 of 0.4 s are 200, and hr_start's 2,500 of 0.4 s are 5,000.
    assert lines["the student"] == [
        *("2", "42.5 ± 0.7", "+2.0 ± 1.4 (2/2)", "62 %"),
        *("39.0 ± 2.8", "+0.0 ± 1.4 (1/2)", "59 %", "0.20", "200 (5,200)"),
    ]
    assert lines["the control"][:3] == ["3", "41.0 ± 1.0", "-"]
    assert lines["the lr"][:2] == ["1", "30.0"] and lines["the lr"][-1] == "100 (100)"
    # A checkpoint: the difference of the means, of no seeds that could be equal.
    assert lines["the hr"][:3] == ["-", "50.0", "+9.0"]
    assert lines["the hr"][-1] == "5,000 (5,000)"
    assert lines["the later"][:3] == ["0", "not run", ""]


def test_gradient_ratios(grid, cells, results, in_repository):
    assert "KD gradient" not in study_report.markdown(grid, cells, results)
    results["cells"]["student/1"]["gradient_ratio"] = 0.1
    results["cells"]["student/3"]["gradient_ratio"] = 0.4
    text = study_report.markdown(grid, cells, results)
    assert lines_of(text)["the student"][-2] == "0.25" and lines_of(text)["the lr"][-2] == "-"
    assert "KD gradient: the norm" in text
    grid.tables[0]["seeds"] = [1]
    assert lines_of(table_of(grid, cells, results))["the student"][-2] == "0.10"


def test_seeds_that_count(grid, cells, results, in_repository):
    grid.tables[0]["seeds"] = [1]
    lines = lines_of(table_of(grid, cells, results))
    assert lines["the student"][:4] == ["1", "43.0", "+3.0 (1/1)", "65 %"]  # 13 of 20
    assert lines["the control"][:2] == ["1", "40.0"]
    assert lines["the hr"][:3] == ["-", "50.0", "+10.0"]
    assert values_of(results, grid.rows["student"], "bbox", [2]) == {}


def test_seeds_of_a_teacher_are_not_those_of_its_students(grid, cells, results, in_repository):
    # A row that was trained once, with a seed that the control happens to have, too.
    teacher = results["cells"].pop("hr/0")
    grid.rows["hr"] = row("hr", (2,))
    results["cells"]["hr/2"] = teacher
    results["steps"] = {}  # the costs are not what this is about
    cells["hr/2"] = cells["hr/0"]
    assert lines_of(table_of(grid, cells, results))["the hr"][2] == "+9.0"  # it is the reference
    del grid.tables[0]["reference"]
    assert lines_of(table_of(grid, cells, results))["the hr"][2] == "+8.0 (1/1)"
    grid.rows["elsewhere"] = row("elsewhere", (2,), checkpoint="{hr}", fresh="hr")
    assert lines_of(table_of(grid, cells, results))["the hr"][2] == "+8.0 (1/1)"
    grid.rows["later"].options["KD.TEACHER.WEIGHTS"] = "{hr}"
    assert lines_of(table_of(grid, cells, results))["the hr"][2] == "+9.0"  # it is a teacher


def test_a_row_of_several_seeds_is_compared_seed_by_seed_whoever_learns_from_it(
    grid, cells, results, in_repository
):
    grid.rows["later"].options["MODEL.WEIGHTS"] = "{student}"
    assert lines_of(table_of(grid, cells, results))["the student"][2] == "+2.0 ± 1.4 (2/2)"


def test_the_gap_is_of_equal_seeds(grid, cells, results, in_repository):
    results["cells"]["lr/2"] = {**results["cells"]["lr/1"], "bbox": {"AP": 36.0}}
    lines = lines_of(table_of(grid, cells, results))
    assert lines["the student"][3] == "62 %"  # it has no seed 2: 12.5 of 20
    assert lines["the control"][3] == "47 %"  # 8 of 17


def test_a_checkpoint_of_unknown_making_has_no_cost(grid, cells, results, in_repository):
    grid.rows["hr"] = row("hr", (), checkpoint="hr.pth")
    lines = lines_of(table_of(grid, cells, results))
    assert [lines[f"the {name}"][-1] for name in ("hr", "student", "lr")] == ["-", "-", "100 (100)"]


def test_a_checkpoint_as_control(grid, cells, results, in_repository):
    grid.tables[0]["control"] = "hr"
    assert lines_of(table_of(grid, cells, results))["the student"][2] == "-7.5"


def test_no_equal_seed_is_no_difference(grid, cells, results, in_repository):
    del results["cells"]["control/1"], results["cells"]["control/3"]
    assert lines_of(table_of(grid, cells, results))["the student"][2] == "-"


def test_no_gap_below_the_baseline(grid, cells, results, in_repository):
    results["cells"]["hr/0"]["bbox"]["AP"] = 29.0
    student = lines_of(table_of(grid, cells, results))["the student"]
    assert student[3] == "-" and student[6] == "59 %"


def test_costs_are_summed_once(grid, cells, results, in_repository, monkeypatch):
    calls = []
    grid.tables.append({**grid.tables[0], "name": "again"})
    monkeypatch.setattr(study_report, "training_costs", lambda *_: calls.append(1) or {})
    study_report.markdown(grid, cells, results)
    assert len(calls) == 1


def test_without_a_second_metric_and_without_times(grid, cells, results):
    for cell in results["cells"].values():
        del cell["segm"]
    results["steps"] = {}
    text = table_of(grid, cells, results)
    assert "mask" not in text and "training" not in text
    results["cells"] = {}
    assert table_of(grid, cells, results) is None


def test_files(grid, cells, results, tmp_path, in_repository):
    study_report.write(grid, cells, results, tmp_path)
    text = (tmp_path / "tables.md").read_text()
    assert "(row - the lr) / (the hr - the lr)" in text and "Machine: this one." in text
    lines = (tmp_path / "cells.csv").read_text().splitlines()
    assert len(lines) == 1 + len(AP)
    assert lines[1].startswith("hr,,50.0,") and lines[2].startswith("control,1,40.0,")
    for name in ("bars_all.png", "curves_c.png"):
        assert cv2.imread(str(tmp_path / name)).std() > 10
    results["cells"].clear()
    study_report.write(grid, cells, results, tmp_path)
    assert not list(tmp_path.glob("*.png*"))  # no picture of what is no longer told


def bars_of(figure):
    """Of each picture of a table: title to (length of its bar, its dots)."""
    titles = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    found = []
    for axes in figure.axes:
        dots = np.concatenate([each.get_offsets() for each in axes.collections]).tolist()
        lengths = {round(bar.get_y() + 0.4): bar.get_width() for bar in axes.patches}
        dots_at = {place: sorted(x for x, y in dots if y == place) for place in lengths}
        found.append({titles[place]: (lengths[place], dots_at[place]) for place in lengths})
    return found


def test_bars(grid, results):
    figure = draw_bars(grid, results, grid.tables[0])
    box, mask = bars_of(figure)
    assert box == {
        "the student": (42.5, [42.0, 43.0]),
        "the lr": (30.0, [30.0]),
        "the control": (41.0, [40.0, 41.0, 42.0]),
        "the hr": (50.0, [50.0]),
    }
    assert mask["the student"] == (39.0, [37.0, 41.0])
    lines = [[line.get_xdata()[0] for line in axes.lines] for axes in figure.axes]
    assert lines == [[41.0], [39.0]]  # the control

    figure = draw_bars(grid, results, {**grid.tables[0], "seeds": [1]})
    assert bars_of(figure)[0]["the student"] == (43.0, [43.0])
    assert figure.axes[0].lines[0].get_xdata()[0] == 40.0
    del grid.tables[0]["control"]
    assert not draw_bars(grid, results, grid.tables[0]).axes[0].lines
    assert draw_bars(grid, {"cells": {}}, grid.tables[0]) is None


def test_curves(grid, cells, results):
    for seed in (1, 2, 3):
        cells[f"student/{seed}"].iterations = 50
    curve = {**grid.curves[0], "lines": {"a line": ["lr", "student", "later"], "none": ["later"]}}
    box, mask = draw_curves(grid, cells, results, curve).axes
    line, level = box.lines
    assert line.get_label() == "a line" and level.get_label() == "h"
    assert line.get_xydata().tolist() == [[50, 42.5], [100, 30.0]]  # by rising iterations
    assert level.get_ydata()[0] == 50.0 and mask.lines[1].get_ydata()[0] == 52.0
    (band,) = box.collections
    ends = {tuple(point) for point in band.get_paths()[0].vertices.tolist()}
    assert ends == {(50, 42.0), (50, 43.0), (100, 30.0)}

    box, _ = draw_curves(grid, cells, results, {**curve, "seeds": [1]}).axes
    assert box.lines[0].get_xydata().tolist() == [[50, 43.0], [100, 30.0]]
