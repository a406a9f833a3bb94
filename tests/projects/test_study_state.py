"""What a study does with its cells' folders and results; nothing is trained here."""

import json
from types import SimpleNamespace

import pytest

from msad_kd.utils.errors import InputError
from projects.study import reports
from projects.study.cells import Labels
from projects.study.grid import Row
from projects.study.study import Study, verify


class Lines(list):
    """A screen that keeps what is said."""

    say = list.append


def cell_of(folder, name, fingerprint, needs=(), meaning=None, **fields):
    row = Row(name, config="c.yaml", test_config="c.yaml", name=name, **fields)
    key = f"{name}/{int(row.trained)}"
    run = folder / name / f"seed_{key[-1]}"
    return SimpleNamespace(
        **{"key": key, "title": name, "row": row, "folder": run, "needs": needs},
        **{"fingerprint": fingerprint, "weights": run / "model_final.pth", "iterations": 100},
        **{"options": ["SEED", "1"], "test_options": [], "labels": None, "saved_every": 50},
        meaning=meaning or {"files": [fingerprint]},
    )


@pytest.fixture
def study_of(tmp_path, monkeypatch):
    """study_of(cell, ...): a study in `tmp_path` that writes no tables."""
    monkeypatch.setattr(reports, "write", lambda *_: None)

    def make(*cells, folder=tmp_path):
        cells = {cell.key: cell for cell in cells}
        return Study(SimpleNamespace(detections=5), cells, folder, Lines())

    return make


def train(study, key):
    """Do what the jobs of a cell do, as far as the study sees it; return their names."""
    cell = study.cells[key]
    names = [job.name for job in study.plan([key])]
    if cell.title in names:
        cell.weights.write_text(cell.fingerprint)
        cell.weights.with_name("last_checkpoint").write_text("model_final.pth")
    results = {"machine": "this", "models": {key: {"bbox": {"AP": 1.0}}}}
    (cell.folder / "evaluation" / "results.json").write_text(json.dumps(results))
    study.finish(cell, cell.folder / "evaluation")
    return names


def test_a_changed_row_is_set_aside_and_taken_back(tmp_path, study_of):
    meant, trial = "a" * 64, "b" * 64
    run = tmp_path / "lr" / "seed_1"
    first = study_of(cell_of(tmp_path, "lr", meant))
    assert train(first, "lr/1") == ["lr", "lr: AP"] and first.screen == ["lr: box AP 1.0"]
    assert study_of(cell_of(tmp_path, "lr", meant)).plan(["lr/1"]) == []
    other = study_of(cell_of(tmp_path, "lr", trial))
    assert not other.results["cells"]
    assert train(other, "lr/1") == ["lr", "lr: AP"]
    said = f"'{run}' is another training (other weights); set aside as '{run}.%s'"
    assert other.screen[0] == said % "aaaaaaaa"
    assert (run / "model_final.pth").read_text() == trial

    again = study_of(cell_of(tmp_path, "lr", meant))
    assert again.results["cells"]["lr/1"]["fingerprint"] == meant
    assert again.plan(["lr/1"]) == []
    assert again.screen == [
        said % "bbbbbbbb",
        f"'{run}.aaaaaaaa' is meant again; taken back as '{run}'",
    ]
    assert (run / "model_final.pth").read_text() == meant
    # Results of rows that the grid no longer has are kept, once.
    for _ in range(2):
        study_of().write()
    assert len(study_of().results["other"]) == 2
    changed = {"files": [meant], "train": {"SOLVER.MAX_ITER": 7}, "test": {"MODEL.MASK_ON": True}}
    for number, steps in enumerate((9, 7)):
        changed["train"]["SOLVER.MAX_ITER"] = steps
        last = study_of(cell_of(tmp_path, "lr", f"{number}" * 64, meaning=changed))
        train(last, "lr/1")
    assert last.screen[0].startswith(f"'{run}' is another training (other SOLVER.MAX_ITER); set")
    assert "lr/1" in study_of(cell_of(tmp_path, "lr", trial)).results["cells"]


def test_files_of_unknown_origin_are_not_removed(tmp_path, study_of):
    run, aside = tmp_path / "lr" / "seed_1", tmp_path / "lr" / "seed_1.unknown"
    run.mkdir(parents=True)
    (run / "notes.txt").write_text("mine")
    study_of(cell_of(tmp_path, "lr", "a" * 64)).plan(["lr/1"])
    assert (aside / "notes.txt").read_text() == "mine" and not (run / "notes.txt").exists()

    (run / "cell.json").unlink()
    with pytest.raises(InputError, match="seed_1' cannot become '.*unknown', which exists"):
        study_of(cell_of(tmp_path, "lr", "a" * 64)).plan(["lr/1"])


def test_a_file_in_place_of_the_results(tmp_path, study_of):
    (tmp_path / "results.json").write_text("# a README")
    with pytest.raises(InputError, match="results.json' is no results.json of a study"):
        study_of(cell_of(tmp_path, "lr", "a" * 64))


def test_the_total_time_has_trainings_that_were_not_measured(tmp_path, study_of):
    start = cell_of(tmp_path, "start", "a")
    teacher = cell_of(tmp_path, "teacher", "b", needs=("start/1",))
    branch = cell_of(tmp_path, "branch", "c", needs=("teacher/1",), checkpoint_of="teacher")
    student = cell_of(tmp_path, "student", "d", needs=("branch/0", "start/1"))  # by two paths
    for cell in (start, teacher, branch, student):
        cell.meaning = {"files": [None]}
    for cell, time in ((start, 1), (teacher, 10), (student, 100)):
        cell.folder.mkdir(parents=True)
        (cell.folder / "metrics.json").write_text(json.dumps({"iteration": 1, "time": time}))
    study = study_of(start, teacher, branch, student)
    (tmp_path / "found").mkdir()
    found = {"machine": "m", "models": {"student/1": {"bbox": {"AP": 1.0}}}}
    (tmp_path / "found" / "results.json").write_text(json.dumps(found))
    study.finish(student, tmp_path / "found")
    result = study.results["cells"]["student/1"]
    assert (result["training_seconds"], result["total_seconds"]) == (200, 222)
    for elsewhere in ("a checkpoint", "a file", "no log"):
        start.row.checkpoint = "shipped.pth" if elsewhere == "a checkpoint" else ""
        start.meaning["files"] = [None, "its hash"] if elsewhere == "a file" else [None]
        if elsewhere == "no log":
            (start.folder / "metrics.json").unlink()
        study.finish(student, tmp_path / "found")
        assert study.results["cells"]["student/1"]["total_seconds"] is None, elsewhere


def test_a_cell_waits_for_the_checkpoints_it_uses(tmp_path, study_of):
    start = cell_of(tmp_path, "start", "a")
    teacher = cell_of(tmp_path, "teacher", "b", needs=("start/1",))
    branch = cell_of(tmp_path, "branch", "c", needs=("teacher/1",), checkpoint_of="teacher")
    student = cell_of(tmp_path, "student", "d", needs=("branch/0", "start/1"))
    study = study_of(start, teacher, branch, student)
    assert {job.name: job.after for job in study.plan(["branch/0", "student/1"])} == {
        **{"start": (), "teacher": ("start",), "branch: AP": ("teacher",)},
        **{"student": ("teacher", "start"), "student: AP": ("student",)},
    }
    # A checkpoint counts once Detectron2 has written it to its end.
    teacher.weights.touch()
    last = teacher.folder / "last_checkpoint"
    last.write_text("model_0000009.pth")
    assert [job.name for job in study.plan(["branch/0"])] == ["start", "teacher", "branch: AP"]
    last.write_text("model_final.pth")
    assert [job.name for job in study.plan(["branch/0"])] == ["branch: AP"]


def test_labels_are_made_once_between_two_trainings(tmp_path, study_of):
    labels = Labels(tmp_path / "labels.json", ("--output", str(tmp_path / "labels.json")))
    hr = cell_of(tmp_path, "hr", "a")
    students = [cell_of(tmp_path, name, name, needs=("hr/1",)) for name in ("one", "other")]
    for student in students:
        student.labels = labels
    study = study_of(hr, *students)
    after = {job.name: job.after for job in study.plan(["one/1", "other/1"])}
    assert after[labels.title] == ("hr",) and after["one"] == after["other"]
    assert after["one"] == (labels.title, "hr") and list(after).count(labels.title) == 1
    labels.file.touch()
    assert labels.title not in [job.name for job in study.plan(["one/1"])]


def test_the_time_left_is_of_all_trainings(tmp_path, study_of, monkeypatch):
    cells = [cell_of(tmp_path, name, name) for name in ("a", "b")]
    study = study_of(*cells)
    study.plan(["a/1", "b/1"])
    assert study.overall() == "0/200 iterations, ? left"
    line = {"iteration": 49, "total_loss": 1.0}
    (cells[0].folder / "metrics.json").write_text(json.dumps(line) + "\n")
    monkeypatch.setattr("time.time", lambda: study.start + 100)
    assert study.overall() == "50/200 iterations, 05:00 left"
    for cell in cells:
        (cell.folder / "metrics.json").write_text(json.dumps({**line, "iteration": 99}) + "\n")
    assert study.overall() == "measuring"


def test_a_checkpoint_has_the_recorded_ap(tmp_path):
    cell = cell_of(tmp_path, "teacher", "a", checkpoint="t.pth", recorded="fused")
    with pytest.raises(InputError, match="model_final.json'.* is missing"):
        verify(cell, {})
    cell.folder.mkdir(parents=True)
    record = {"bbox": {"AP": 44.6}, "segm": {"AP": 43.0}}
    text = json.dumps({"results": {"fused": record}})
    cell.weights.with_suffix(".json").write_text(text)
    verify(cell, {"bbox": {"AP": 44.5}, "segm": {"AP": 43.1}})
    with pytest.raises(InputError, match="has no results of 'lr': fused"):
        verify(cell_of(tmp_path, "teacher", "a", checkpoint="t.pth", recorded="lr"), {})
    with pytest.raises(InputError, match="teacher has no mask AP here, but one in .*json.*--set"):
        verify(cell, {"bbox": {"AP": 44.5}})
    for mask in (40.0, float("nan")):
        with pytest.raises(InputError, match=f"teacher has mask AP {mask:.1f} here, but .* 43.0"):
            verify(cell, {"bbox": {"AP": 44.5}, "segm": {"AP": mask}})


def test_how_often_a_training_saves_is_the_cells_unless_the_grid_says_so(tmp_path, study_of):
    training, _ = study_of(cell_of(tmp_path, "lr", "a" * 64)).plan(["lr/1"])
    words = training.command
    assert words[words.index("SOLVER.CHECKPOINT_PERIOD") + 1] == "50"
    assert words.index("SOLVER.CHECKPOINT_PERIOD") < words.index("SEED")
    assert words[words.index("TEST.EXPECTED_RESULTS") + 1] == "[]"
