"""A study end to end, with a few scenes and steps: stopped in the middle and resumed."""

import contextlib
import json
import os
import re
import signal
import time
from pathlib import Path

import cv2
import pytest
import yaml
from helpers import ROOT, fork, fork_python

from projects.study import jobs, run
from projects.study.jobs import locked

DATA = {"train": 4, "val": 3, "classes": 5}
GRID = """
generator: projects.Shapes.generate
data:
  shapes: {train: 4, val: 3, classes: 5}
  shapes_fresh: {train: 4, val: 3, classes: 5, seed: 1}
detections: 4
rows:
  teacher:
    title: the teacher
    config: configs/Shapes/teacher_one_size.yaml
    checkpoint: projects/Shapes/checkpoints/teacher_one_size.pth
  lr:
    title: the baseline
    config: configs/Shapes/lr.yaml
    options: {SOLVER.IMS_PER_BATCH: 1, SOLVER.WARMUP_ITERS: 2, SOLVER.MAX_ITER: 2}
  student:
    title: the student
    like: lr
    config: configs/Shapes/student_one_size.yaml
    test_config: configs/Shapes/lr.yaml
    labels_by: teacher
    options:
      KD.TEACHER.WEIGHTS: "{teacher}"
      KD.GRADIENT_RATIO_PERIOD: 10
      SOLVER.CHECKPOINT_PERIOD: 5
      SOLVER.MAX_ITER: 20
      DATASETS.COCO_FORMAT:
        - {name: shapes_train, json: shapes/annotations/instances_train.json, images: shapes/train}
        - {name: shapes_val, json: shapes/annotations/instances_val.json, images: shapes/val}
        - {name: shapes_more, images: shapes_fresh/train}
      DATASETS.UNLABELED: [shapes_more]
      SOLVER.UNLABELED_PER_BATCH: 1
      KD.UNLABELED.PSEUDO_LABELS: true
  fresh:
    title: the teacher elsewhere
    checkpoint_of: teacher
    options: {DATASETS.TEST: [shapes_fresh_val]}
tables:
  - {name: all, title: All, rows: [teacher, lr, student, fresh], control: lr, baseline: lr}
comparison: [teacher, lr, student]
scenes: {teacher: teacher, student: student}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a grid."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "grid.yaml").write_text(GRID)
    return folder


def fork_job(job):
    """Start a job as jobs.start does, but quickly."""
    job.folder.mkdir(parents=True, exist_ok=True)
    return fork_python(job.command[1:], [job.folder / jobs.CONSOLE] * 2)


def start(place, *arguments, grid="grid.yaml", output="runs"):
    """Start run.py, which starts its jobs."""
    arguments = ["--grid", str(place / grid), "--output", str(place / output), *arguments]
    (place / "printed.txt").unlink(missing_ok=True)

    def study():
        jobs.start = fork_job
        run.main(arguments)

    outputs = [place / "printed.txt"] * 2
    return fork(study, outputs, DETECTRON2_DATASETS=str(place / "datasets"))


def finish(place, process):
    """Return the exit code and what was printed."""
    code = process.wait(900)
    return code, (place / "printed.txt").read_text()


@pytest.fixture(scope="module")
def stopped(place):
    """The folder of the student, which was stopped and resumed, and what was printed."""
    folder = place / "runs" / "student" / "seed_1"
    process = start(place)
    deadline = time.monotonic() + 600
    while not (folder / "last_checkpoint").exists():
        assert process.poll() is None, (place / "printed.txt").read_text()
        assert time.monotonic() < deadline, "no checkpoint in ten minutes"
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    status, first = finish(place, process)
    assert status == 1
    assert first.endswith("run.py: stopped; started again, it goes on where it was\n")
    assert not (folder / "model_final.pth").exists()
    status, printed = finish(place, start(place))
    assert status == 0, printed
    return folder, first + printed


def test_stopped_and_resumed(place, stopped):
    folder, printed = stopped
    log = (folder / "log.txt").read_text()
    begun = re.findall(r"Starting training from iteration (\d+)", log)
    assert len(begun) == 2 and begun[0] == "0" and int(begun[1]) > 0
    assert not list(folder.glob("model_00*.pth"))
    cells = json.loads((place / "runs" / "results.json").read_text())["cells"]
    assert cells.keys() == {"teacher/0", "lr/1", "student/1", "fresh/0"}
    assert "KD.TEACHER.WEIGHTS" in cells["student/1"]["command"]
    (labels,) = (place / "runs" / "teacher").glob("*/labels_*/labels.json")
    assert len(json.loads(labels.read_text())["annotations"]) > 0
    assert f"'json': '{labels}'" in cells["student/1"]["command"].replace("'\"'\"'", "'")
    assert "And on 4 images without labels: shapes_more_labels_of_teacher" in log
    assert cells["student/1"]["gradient_ratio"] > 0 == len(cells["teacher/0"]["command"])
    assert cells["lr/1"]["gradient_ratio"] is None and cells["lr/1"]["iterations"] == 2
    text = (place / "runs" / "tables.md").read_text()
    assert "not run" not in text and "the student" in text
    assert "lr: box AP" in printed
    teacher, elsewhere = cells["teacher/0"], cells["fresh/0"]
    assert 0 < teacher["bbox"]["AP"] != elsewhere["bbox"]["AP"] > 0


def test_a_comparison_is_at_equal_detections(place, stopped):
    folder, printed = place / "runs", stopped[1]
    summary = json.loads((folder / "table.json").read_text())
    models = {model["row"]: model for model in summary["models"]}
    assert list(models) == ["teacher", "lr", "student"] and summary["detections"] == 4
    assert all(model["latency_ms"]["median"] > 0 for model in models.values())
    # A student is measured as a stock model: the same net as its baseline, whatever it finds.
    for fact in ("gmacs", "params_m", "side"):
        assert models["student"][fact] == models["lr"][fact]
    assert models["teacher"]["side"] == "128 + 64"
    assert models["teacher"]["gmacs"] > models["lr"]["gmacs"]
    assert (folder / "table.md").read_text() in printed
    for name in ("scenes.png", "ap_cost.png"):
        assert cv2.imread(str(folder / name)).std() > 10


def test_a_report_changes_no_result(place, stopped):
    results, tables = place / "runs" / "results.json", place / "runs" / "tables.md"
    before = results.read_bytes(), tables.read_text()
    with locked(place / "runs"):  # it does not disturb a run
        # A setting means other trainings, and none of these is done.
        finish(place, start(place, "--report", "--set", "SOLVER.BASE_LR", "0.002"))
        assert re.search(r"the student +\| 0 +\| not run", tables.read_text())
        finish(place, start(place, "--report"))
    assert (results.read_bytes(), tables.read_text()) == before


def test_done_cells_are_kept_and_other_data_are_not_replaced(place, stopped):
    status, printed = finish(place, start(place, "--rows", "lr"))
    assert status == 0 and "1 cells, 1 of them done" in printed
    (place / "other.yaml").write_text(GRID.replace("train: 4", "train: 5"))
    words = ["--rows", "lr"]
    status, printed = finish(place, start(place, *words, grid="other.yaml", output="other"))
    assert status == 1
    assert re.search(r"run.py: .*other arguments.*--overwrite.*DETECTRON2_DATASETS", printed)


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_a_study_stops_where_a_checkpoint_is_not_what_was_recorded(place, stopped):
    grid = yaml.safe_load(GRID)
    grid["rows"]["teacher"]["recorded"] = "fused"  # of a thousand scenes, not of three
    (place / "recorded.yaml").write_text(yaml.safe_dump(grid))
    words = ["--slots", "2", "--rows", "teacher", "lr"]
    status, printed = finish(place, start(place, *words, grid="recorded.yaml", output="recorded"))
    assert status == 1
    end = printed.splitlines()[-1]
    assert re.match(r"run.py: the teacher has \w+ AP .* here, but", end)
    assert not (place / "recorded" / "table.md").exists()
    assert len(list((place / "recorded").rglob(jobs.CONSOLE))) > 1
    open_files = []
    for file in Path("/proc").glob("[0-9]*/fd/1"):
        with contextlib.suppress(OSError):  # of a process that has ended
            open_files.append(os.readlink(file))
    assert open_files and not any(x.startswith(str(place / "recorded")) for x in open_files)


@pytest.mark.long
def test_a_full_demo_trains_every_model(place):
    settings = ["--set", "SOLVER.MAX_ITER", "2", "--rows", "hr", "teacher", "control", "student"]
    grid = yaml.safe_load((ROOT / "projects/Shapes/demo_full.yaml").read_text())
    grid["data"] = {name: {**x, "train": 4, "val": 3} for name, x in grid["data"].items()}
    (place / "full.yaml").write_text(yaml.safe_dump(grid))
    status, printed = finish(
        place, start(place, *settings, "--seeds", "1", grid="full.yaml", output="full")
    )
    assert status == 0, printed
    cells = json.loads((place / "full" / "results.json").read_text())["cells"]
    assert cells.keys() == {f"{row}/1" for row in ("hr", "teacher", "control", "student")}
    assert "teacher/seed_1" in cells["control/1"]["command"]
    assert len(list((place / "full" / "hr" / "seed_1").glob("labels_*/labels.json"))) == 1
    metrics = "seed_1/metrics.json"
    assert "loss_kd" in (place / "full" / "student" / metrics).read_text()
    assert "loss_kd" not in (place / "full" / "control" / metrics).read_text()
