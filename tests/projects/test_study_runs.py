"""What a study does with its cells' folders and results; nothing is trained here."""

import json
import os
from types import SimpleNamespace

import pytest

from projects.Shapes import study_report
from projects.Shapes.jobs import DemoError
from projects.Shapes.progress import iterations_done
from projects.Shapes.study_runs import Study

HOUR = 3600


def run_in(folder, told, checkpoint=None, age=0):
    """A run that told of its iterations up to `told`, `age` seconds ago."""
    folder.mkdir(parents=True)
    if checkpoint:
        (folder / "last_checkpoint").write_text(checkpoint)
    lines = [json.dumps({"iteration": told - 1, "total_loss": 1.0}), '{"data_time": 0.1}']
    path = folder / "metrics.json"
    path.write_text("\n".join(lines) + "\n")
    then = path.stat().st_mtime - age
    os.utime(path, (then, then))
    return then


@pytest.mark.parametrize(
    ("checkpoint", "resumed"),
    [(None, 0), ("model_0000499.pth", 500), ("model_final.pth", 780)],
)
def test_a_run_goes_on_at_its_checkpoint(tmp_path, checkpoint, resumed):
    then = run_in(tmp_path / "run", 780, checkpoint)
    assert iterations_done(tmp_path / "run", then + 1) == resumed
    assert iterations_done(tmp_path / "run", then - 1) == 780  # told since it was started
    assert iterations_done(tmp_path / "nothing", then) == 0


def test_a_ladder_has_its_finished_stages_in_whole(tmp_path):
    run_in(tmp_path / "stage_01_a", 600, "model_final.pth", age=HOUR)
    then = run_in(tmp_path / "stage_02_b", 180, "model_0000099.pth", age=HOUR)
    assert iterations_done(tmp_path, then + 1) == 600 + 100
    assert iterations_done(tmp_path, then) == 600 + 180


def cell_of(folder, name, fingerprint, needs=(), checkpoint=""):
    """Of the row `name`, seed 1, or of a checkpoint."""
    key = f"{name}/{0 if checkpoint else 1}"
    run = folder / name / f"seed_{key[-1]}"
    row = SimpleNamespace(
        **{"name": name, "checkpoint": checkpoint, "config": "c.yaml", "test_config": "c.yaml"}
    )
    return SimpleNamespace(
        **{"key": key, "title": name, "row": row, "folder": run, "needs": needs},
        **{"fingerprint": fingerprint, "weights": run / "model_final.pth"},
        **{"iterations": 100, "options": ["SEED", "1"], "test_options": []},
    )


def study_of(folder, cells):
    said = []
    screen = SimpleNamespace(say=said.append, said=said)
    cells = {cell.key: cell for cell in cells}
    study = Study(None, cells, folder, screen, 5)
    if study.path.is_file():
        study.take(study.path)
    return study


@pytest.fixture
def no_tables(monkeypatch):
    monkeypatch.setattr(study_report, "write", lambda *_: None)


def test_time_left_after_a_resume(tmp_path, monkeypatch):
    now = run_in(tmp_path / "lr" / "seed_1", 780, "model_0000499.pth", age=HOUR) + HOUR
    study = study_of(tmp_path, [cell_of(tmp_path, "lr", "a")])
    assert study.overall() == "measuring"
    study.todo, study.begun, study.start = {"lr/1": 1200}, {"lr/1": 500}, now - 100
    monkeypatch.setattr("time.time", lambda: now)
    # Nothing is known before the resumed run tells something: 780 is of the stopped one.
    assert study.overall() == "500/1200 iterations, ? left"
    line = json.dumps({"iteration": 599, "total_loss": 1.0})
    with open(tmp_path / "lr" / "seed_1" / "metrics.json", "a") as file:
        file.write(line + "\n")
    os.utime(tmp_path / "lr" / "seed_1" / "metrics.json", (now, now))
    assert study.overall() == "600/1200 iterations, 10:00 left"  # 100 in 100 s, 600 to go


def train(study, key):
    """Does what the jobs of a cell do, as far as the study sees it."""
    cell = study.cells[key]
    names = [job.name for job in study.plan([key])]
    if cell.title in names:
        cell.weights.write_text(cell.fingerprint)
    results = {"device": "no GPU", "rows": {key: {"bbox": {"AP": 1.0}}}}
    folder = cell.folder / "evaluation"
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results))
    study._finish(cell, folder)
    return names


def test_a_trial_costs_no_finished_work(tmp_path, no_tables):
    meant, trial = "a" * 64, "b" * 64
    run = tmp_path / "lr" / "seed_1"
    assert train(study_of(tmp_path, [cell_of(tmp_path, "lr", meant)]), "lr/1") == ["lr", "lr: AP"]
    other = study_of(tmp_path, [cell_of(tmp_path, "lr", trial)])
    assert not other.results["cells"]
    assert train(other, "lr/1") == ["lr", "lr: AP"]
    assert other.screen.said[0] == f"'{run}': another training, put aside as '{run}.aaaaaaaa'"
    assert (run / "model_final.pth").read_text() == trial

    again = study_of(tmp_path, [cell_of(tmp_path, "lr", meant)])
    assert again.results["cells"]["lr/1"]["fingerprint"] == meant
    assert again.plan(["lr/1"]) == []
    assert again.screen.said == [
        f"'{run}': another training, put aside as '{run}.bbbbbbbb'",
        f"'{run}.aaaaaaaa': meant again, taken back as '{run}'",
    ]
    assert (run / "model_final.pth").read_text() == meant
    again.write()
    # A row that the grid no longer has is not lost, either.
    without = study_of(tmp_path, [])
    without.write()
    assert len(study_of(tmp_path, []).results["other"]) == 2
    assert "lr/1" in study_of(tmp_path, [cell_of(tmp_path, "lr", trial)]).results["cells"]
    without = study_of(tmp_path, [])
    without.take(without.path)
    assert len(without.results["other"]) == 2


def test_files_of_unknown_origin_are_not_removed(tmp_path):
    run, aside = tmp_path / "lr" / "seed_1", tmp_path / "lr" / "seed_1.unknown"
    run.mkdir(parents=True)
    (run / "notes.txt").write_text("mine")
    study_of(tmp_path, [cell_of(tmp_path, "lr", "a" * 64)]).plan(["lr/1"])
    assert (aside / "notes.txt").read_text() == "mine" and not (run / "notes.txt").exists()

    (run / "cell.json").unlink()
    with pytest.raises(DemoError, match="seed_1' cannot become '.*unknown', which is there"):
        study_of(tmp_path, [cell_of(tmp_path, "lr", "a" * 64)]).plan(["lr/1"])


def test_others_results_are_taken_only_where_they_fit(tmp_path):
    result = {"fingerprint": "a" * 64}
    content = {
        "cells": {"lr/1": result, "hr/1": result},
        "steps": {},
    }  # of before there was `other`
    (tmp_path / "another.json").write_text(json.dumps(content))
    study = study_of(tmp_path / "runs", [cell_of(tmp_path, "lr", "a" * 64)])
    study.take(tmp_path / "another.json")
    assert study.results == {"cells": {"lr/1": result}, "steps": {}, "other": []}


def test_what_stands_on_a_rows_checkpoint_waits_for_its_training(tmp_path):
    start = cell_of(tmp_path, "start", "a")
    teacher = cell_of(tmp_path, "teacher", "b", needs=("start/1",))
    branch = cell_of(tmp_path, "branch", "c", needs=("teacher/1",), checkpoint="{teacher}")
    student = cell_of(tmp_path, "student", "d", needs=("branch/0", "start/1"))
    study = study_of(tmp_path, [start, teacher, branch, student])
    assert {job.name: job.after for job in study.plan(["branch/0", "student/1"])} == {
        **{"start": (), "teacher": ("start",), "branch: AP": ("teacher",)},
        **{"student": ("teacher", "start"), "student: AP": ("student",)},
    }
    # What is trained is not trained again.
    teacher.weights.touch()
    teacher.folder.joinpath("last_checkpoint").write_text("model_0000009.pth")  # it was killed
    assert [job.name for job in study.plan(["branch/0"])] == ["start", "teacher", "branch: AP"]
    teacher.folder.joinpath("last_checkpoint").write_text("model_final.pth")
    assert [job.name for job in study.plan(["branch/0"])] == ["branch: AP"]
