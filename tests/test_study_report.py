"""The study's numbers, worked out by hand."""

from pathlib import Path
from types import SimpleNamespace

import cv2
import pytest

from projects.Shapes import study_report
from projects.Shapes.costs import config_recipe, training_costs
from projects.Shapes.grid import Grid, Row
from projects.Shapes.study_report import mean_and_deviation, paired_difference

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
            **{"command": "python train_net.py", "machine": "this one"},
        }

    seconds = {"lr": [0.1, 0.2, 0.3], "student": [0.5, 0.3, 0.4], "control": [0.2, 0.2, 0.2]}
    seconds[config_recipe("configs/Shapes/hr_start.yaml")[0]] = [0.4, 0.4, 0.4]
    return {"cells": {k: cell(*v) for k, v in AP.items()}, "steps": {"seconds": seconds}}


def test_mean_deviation_and_difference():
    assert mean_and_deviation([40.0, 42.0, 41.0]) == (41.0, 1.0)
    assert mean_and_deviation([5.0]) == (5.0, None)
    assert paired_difference({1: 43.0, 3: 42.0}, {1: 40.0, 2: 42.0, 3: 41.0}) == [3.0, 1.0]
    assert paired_difference({1: 43.0}, {2: 40.0}) == []
    assert paired_difference({1: 43.0, 2: 44.0}, {0: 42.0}) == [1.0, 2.0]


def table_of(grid, cells, results):
    costs = training_costs(grid, cells, results)
    return study_report.table(grid, cells, results, grid.tables[0], costs)


def lines_of(text):
    return {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in text.splitlines()
        if line.startswith("| the ")
    }


def test_table(grid, cells, results, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    text = table_of(grid, cells, results)
    header = [cell.strip() for cell in text.splitlines()[4].split("|")[2:-1]]
    assert header == [
        *("seeds", "box AP", "box, against the control", "box gap"),
        *("mask AP", "mask, against the control", "mask gap", "GMACs", "training"),
    ]
    lines = lines_of(text)
    # In steps of 0.2 s: 100 of 0.4 s are 200, and hr_start's 2,500 of 0.4 s are 5,000.
    assert lines["the student"] == [
        *("2", "42.5 ± 0.7", "+2.0 ± 1.4 (2/2)", "62 %"),
        *("39.0 ± 2.8", "+0.0 ± 1.4 (1/2)", "59 %", "0.20", "200 (5,200)"),
    ]
    assert lines["the control"][:3] == ["3", "41.0 ± 1.0", "-"]
    assert lines["the lr"][:2] == ["1", "30.0"] and lines["the lr"][-1] == "100 (100)"
    assert lines["the hr"][0] == "-" and lines["the hr"][-1] == "5,000 (5,000)"
    assert lines["the later"][:3] == ["0", "not run", ""]


def test_without_a_second_metric_and_without_times(grid, cells, results):
    for cell in results["cells"].values():
        del cell["segm"]
    results["steps"] = {}
    text = table_of(grid, cells, results)
    assert "mask" not in text and "training" not in text
    results["cells"] = {}
    assert table_of(grid, cells, results) is None


def test_files(grid, cells, results, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    study_report.write(grid, cells, results, tmp_path)
    text = (tmp_path / "tables.md").read_text()
    assert "(row - the lr) / (the hr - the lr)" in text and "Machine: this one." in text
    lines = (tmp_path / "cells.csv").read_text().splitlines()
    assert len(lines) == 1 + len(AP)
    assert lines[1].startswith("hr,,50.0,") and lines[2].startswith("control,1,40.0,")
    for name in ("bars_all.png", "curves_c.png"):
        assert cv2.imread(str(tmp_path / name)).std() > 10
