"""What a study does with its cells' folders and results; nothing is trained here."""

import json
import os
from types import SimpleNamespace

import pytest

from projects.Shapes.progress import iterations_done
from projects.Shapes.study import Study

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


def study_of(cells, folder, grid=None):
    said = []
    screen = SimpleNamespace(say=said.append, said=said)
    return Study(grid, cells, folder, screen, 5)


def test_time_left_after_a_resume(tmp_path, monkeypatch):
    now = run_in(tmp_path / "lr", 780, "model_0000499.pth", age=HOUR) + HOUR
    study = study_of({"lr/1": SimpleNamespace(folder=tmp_path / "lr")}, tmp_path)
    assert study.overall() == "measuring"
    study.todo, study.begun, study.start = {"lr/1": 1200}, {"lr/1": 500}, now - 100
    monkeypatch.setattr("time.time", lambda: now)
    # Nothing is known before the resumed run tells something: 780 is of the stopped one.
    assert study.overall() == "500/1200 iterations, ? left"
    line = json.dumps({"iteration": 599, "total_loss": 1.0})
    with open(tmp_path / "lr" / "metrics.json", "a") as file:
        file.write(line + "\n")
    os.utime(tmp_path / "lr" / "metrics.json", (now, now))
    assert study.overall() == "600/1200 iterations, 10:00 left"  # 100 in 100 s, 600 to go
