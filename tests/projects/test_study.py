"""The study end to end: two tiny cells, stopped in the middle and resumed."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from helpers import ROOT, differing

from projects.Shapes import study
from projects.Shapes.program import locked

LONG = 40  # iterations of the cell that is stopped


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a grid of two trainings and a checkpoint."""
    folder = tmp_path_factory.mktemp("study")
    few = {"SOLVER.IMS_PER_BATCH": 1, "SOLVER.WARMUP_ITERS": 2}
    grid = {
        "data": {"train": 4, "val": 3, "classes": 5},
        "fresh": {"seed": 1, "train": 1},
        "seeds": [1],
        "rows": {
            "teacher": {
                "title": "the teacher",
                "config": "configs/Shapes/teacher.yaml",
                "checkpoint": "projects/Shapes/checkpoints/teacher.pth",
            },
            "lr": {
                "title": "the baseline",
                "config": "configs/Shapes/lr.yaml",
                "options": {**few, "SOLVER.MAX_ITER": 2},
            },
            "student": {
                "title": "the student",
                "config": "configs/Shapes/student.yaml",
                "test_config": "configs/Shapes/lr.yaml",
                "options": {
                    **few,
                    "KD.TEACHER.WEIGHTS": "{teacher}",
                    "KD.GRADIENT_RATIO_PERIOD": 20,
                    "SOLVER.MAX_ITER": LONG,
                },
            },
            "fresh": {"title": "the teacher elsewhere", "fresh": "teacher"},
        },
        "tables": [
            {
                **{"name": "all", "title": "All", "rows": ["teacher", "lr", "student", "fresh"]},
                **{"control": "lr", "baseline": "lr", "reference": "teacher"},
            }
        ],
    }
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    return folder


def start(place, *arguments, output="runs"):
    command = [sys.executable, "projects/Shapes/study.py", "--grid", str(place / "grid.yaml")]
    command += ["--output", str(place / output), "--checkpoint-period", "5", *arguments]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "DETECTRON2_DATASETS": str(place / "datasets")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    printed, _ = process.communicate(timeout=300)
    return process.returncode, printed


def console(folder):
    return (folder / "console.txt").read_text()


def wait_for_checkpoint(folder, process):
    deadline = time.monotonic() + 300
    while not (folder / "last_checkpoint").exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "no checkpoint in five minutes"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def stopped(place):
    """The folder of the student's run, which was stopped in the middle and resumed."""
    run = place / "runs" / "student" / "seed_1"
    process = start(place)
    wait_for_checkpoint(run, process)
    process.send_signal(signal.SIGTERM)
    status, printed = finish(process)
    assert status == 1 and printed.endswith(
        "study.py: terminated; started again, it goes on where it was\n"
    )
    assert not (run / "model_final.pth").exists()
    status, printed = finish(start(place))
    assert status == 0, printed
    return run


def test_stopped_and_resumed(place, stopped):
    begun = re.findall(r"Starting training from iteration (\d+)", console(stopped))
    assert len(begun) == 2 and begun[0] == "0" and int(begun[1]) % 5 == 0 < int(begun[1])
    assert not list(stopped.glob("model_00*.pth"))
    results = json.loads((place / "runs" / "results.json").read_text())
    assert results["cells"].keys() == {"teacher/0", "lr/1", "student/1", "fresh/0"}
    assert "KD.TEACHER.WEIGHTS" in results["cells"]["student/1"]["command"]
    assert all(len(each) > 1 for each in results["steps"]["seconds"].values())
    assert len(results["steps"]["seconds"]) == 2
    assert results["cells"]["student/1"]["gradient_ratio"] > 0
    assert results["cells"]["lr/1"]["gradient_ratio"] is None
    text = (place / "runs" / "tables.md").read_text()
    for title in ("the teacher", "the baseline", "the student"):
        assert title in text
    assert "not run" not in text
    assert "Fresh scenes: the same, but for seed 1, train 1." in text


def test_fresh_scenes_are_others(place, stopped):
    cells = json.loads((place / "runs" / "results.json").read_text())["cells"]
    teacher, elsewhere = cells["teacher/0"], cells["fresh/0"]
    assert 0 < teacher["bbox"]["AP"] != elsewhere["bbox"]["AP"] > 0
    assert teacher["params_m"] == elsewhere["params_m"]
    annotations = "annotations/instances_val.json"
    one, other = (
        json.loads((place / "datasets" / name / annotations).read_text())
        for name in ("shapes", "shapes_fresh")
    )
    assert len(one["images"]) == len(other["images"]) and one != other


@pytest.mark.long
def test_a_stop_changes_no_bit(place, stopped):
    status, printed = finish(start(place, "--rows", "student", output="whole"))
    assert status == 0, printed
    one, other = (
        torch.load(place / folder / "student/seed_1/model_final.pth", weights_only=False)["model"]
        for folder in ("runs", "whole")
    )
    assert differing(one, other) == []


@pytest.fixture
def call(place, capsys, monkeypatch):
    """call(...): what `study.py` prints, and how it ends, in this process."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(place / "datasets"))
    # Other tests have data of the same names in another place.
    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", dict(catalog))
        for name in ("shapes_train", "shapes_val", "shapes_fresh_val"):
            catalog.data.pop(name, None)

    def call(*arguments, output="runs"):
        grid = ["--grid", str(place / "grid.yaml"), "--output", str(place / output)]
        try:
            study.main([*grid, *arguments])
        except SystemExit as end:
            return str(end)
        return capsys.readouterr().out

    return call


@pytest.fixture
def report(call):
    return lambda *arguments, **keywords: call("--report", *arguments, **keywords)


def test_a_report_changes_no_result(place, stopped, report):
    results, tables = place / "runs" / "results.json", place / "runs" / "tables.md"
    before = results.read_bytes(), tables.read_text()
    # Not even the teacher is shown: its test may depend on what is set.
    assert "results.json" not in report("--set", "SOLVER.BASE_LR", "0.002")
    assert "the student" not in tables.read_text()
    report()
    assert (results.read_bytes(), tables.read_text()) == before


def test_done_cells_are_taken_over(place, stopped, call):
    reuse = ["--reuse", str(place / "runs" / "results.json")]
    assert "4 cells, 4 of them done" in call(*reuse, output="taken")
    results = (
        json.loads((place / each / "results.json").read_text()) for each in ("runs", "taken")
    )
    one, other = results
    assert one == other


def test_one_study_at_a_time(place, stopped, call, report):
    with locked(place / "runs"):
        assert call().startswith("study.py: another run is at work in '")
        assert "Written to" in report()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "studnt"], "study.py: there is no row 'studnt'; known: teacher, lr, student"),
        (["--tables", "none"], "study.py: there is no table 'none'; known: all"),
        (["--reuse", "README.md"], "study.py: 'README.md' is no results.json of a study"),
        (["--seeds", "7"], "study.py: no row that was chosen has the seed 7"),
    ],
)
def test_bad_arguments(report, arguments, message):
    assert report(*arguments).startswith(message)


@pytest.mark.parametrize("option", ["--slots", "--checkpoint-period", "--seeds"])
def test_bad_numbers(report, capsys, option):
    assert report(option, "0") == "2"
    assert f"{option}: '0' is no whole number of 1 or more" in capsys.readouterr().err
