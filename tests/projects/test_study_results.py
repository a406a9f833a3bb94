"""The grids that come with the project, and what the committed results show."""

import json
from statistics import fmean

import pandas as pd
import pytest
from helpers import ROOT

from msad_kd import build_config
from projects.study import reports
from projects.study.cells import make_cells
from projects.study.grid import read_grid

RESULTS = ROOT / "projects" / "Shapes" / "results"
STUDENT, CONTROL = "student-multi-size", "control-multi-size"
DENSE = {"fcos": "fcos-student-ssim", "retinanet": "retinanet-student-cross-head-ssim"}


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Grid, cells, results, and the results as a DataFrame."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        grid = read_grid("projects/Shapes/study.yaml")
        cells = make_cells(grid, tmp_path_factory.mktemp("study"))
    results = json.loads((RESULTS / "results.json").read_text())
    return grid, cells, results, reports.frame(cells, results)


def test_every_result_belongs_to_a_cell_of_the_study(study):
    _, cells, results, _ = study
    found = {key: result["fingerprint"] for key, result in results["cells"].items()}
    assert len(found) == 270 and found == {key: cells[key].fingerprint for key in found}


@pytest.mark.parametrize(
    ("grid", "folder"),
    [
        ("Shapes/demo_full", "Shapes/results/512"),
        ("Nuclei/study", "Nuclei/results"),
        ("StructuralKD/study", "StructuralKD/results"),
        ("MTPD/study", "MTPD/results"),
    ],
)
def test_the_results_of_other_grids_belong_to_their_cells(grid, folder, tmp_path):
    cells = make_cells(read_grid(f"projects/{grid}.yaml"), tmp_path)
    results = json.loads((ROOT / "projects" / folder / "results.json").read_text())
    found = {key: result["fingerprint"] for key, result in results["cells"].items()}
    assert len(found) > 5 and found == {key: cells[key].fingerprint for key in found}
    reports.write(read_grid(f"projects/{grid}.yaml"), cells, results, tmp_path)
    tables = (ROOT / "projects" / folder / "tables.md").read_text()
    assert tables == (tmp_path / "tables.md").read_text()


def test_the_tables_are_made_of_the_results(study, tmp_path):
    grid, cells, results, _ = study
    reports.write(grid, cells, results, tmp_path)
    assert (RESULTS / "tables.md").read_text() == (tmp_path / "tables.md").read_text()
    tables = [pd.read_csv(folder / "cells.csv") for folder in (RESULTS, tmp_path)]
    pd.testing.assert_frame_equal(*(table.drop(columns="command") for table in tables))


def measured(study, row, kind):
    return reports.of_row(study[3], row, f"{kind} AP")


def without_distillation(study, *begins):
    """The names of measured rows, by how they begin."""
    names = [name for name in study[0].rows if name.startswith(begins)]
    return [name for name in names if len(measured(study, name, "box"))]


def assert_beats(study, student, other, kinds=("box", "mask")):
    """A gain on every seed that both have, and in the mean more than its deviation."""
    for kind in kinds:
        gains = (measured(study, student, kind) - measured(study, other, kind)).dropna()
        assert len(gains) and min(gains) > 0, (other, kind)
        assert len(gains) == 1 or gains.mean() > gains.std(), (other, kind)


def test_no_other_student_of_the_study_is_better(study):
    """No other student of as many iterations has more (0.05 AP), on the seeds that both have."""
    _, cells, _, data = study
    student = cells[f"{STUDENT}/1"]
    others = {
        cell.row.name
        for cell in cells.values()
        if cell.row.test_config != cell.row.config  # as a student is measured
        and cell.iterations == student.iterations
        and len(measured(study, cell.row.name, "mask"))
    } - {STUDENT}
    assert len(others) > 40
    for name in others:
        for kind in ("box", "mask"):
            gains = measured(study, STUDENT, kind) - measured(study, name, kind)
            assert gains.mean() > -0.05, (name, kind)


def test_the_best_student_beats_every_model_without_distillation(study):
    """Those of its table on three seeds; all others, longer ones too, on those they have."""
    names = study[0].tables[0].rows
    for name in (STUDENT, *(n for n in names if n.startswith(("lr", "control")))):
        assert {*measured(study, name, "mask").index} == {1, 2, 3}
    for name in without_distillation(study, "lr", "control"):
        assert_beats(study, STUDENT, name)
    for kind, student in DENSE.items():
        assert {*measured(study, student, "box").index} == {1, 2, 3}
        for name in without_distillation(study, f"{kind}-lr", f"{kind}-control"):
            assert_beats(study, student, name, ["box"])


def test_labels_alone_have_no_more_to_give(study):
    """From its teacher's weights the LR model stops gaining, far below the teacher, and its student
    is ahead at every length."""
    for kind in ("box", "mask"):
        early, late = (measured(study, f"{CONTROL}-{n}", kind) for n in (2400, 4800))
        assert {*early.index} == {*late.index} == {1, 2, 3}
        assert abs(fmean(late - early)) < 0.2
        (teacher,) = measured(study, "teacher-multi-size", kind)
        assert teacher - fmean(late) > 5
    for length in (2400, 4800):
        assert {*measured(study, f"{STUDENT}-{length}", "mask").index} == {1, 2, 3}
        assert_beats(study, f"{STUDENT}-{length}", f"{CONTROL}-{length}")


def test_the_fused_target_beats_those_of_one_resolution(study):
    for branch in ("hr", "lr"):
        assert {*measured(study, f"{STUDENT}-{branch}-branch", "mask").index} == {1, 2, 3}
        assert_beats(study, STUDENT, f"{STUDENT}-{branch}-branch")


def test_it_does_on_scenes_that_nothing_was_chosen_by(study):
    others = without_distillation(study, "fresh-lr", "fresh-control")
    assert len(others) == 3
    for name in others:
        assert_beats(study, f"fresh-{STUDENT}", name)


def test_students_and_baselines_train_as_long_as_they_should(study):
    grid, cells, _, _ = study
    by_name = {cell.row.name: cell for cell in cells.values()}
    for table in grid.tables:  # in all stages together
        for cell in map(by_name.get, table.rows):
            if cell.row.trained and cell.row.test_config != cell.row.config:
                assert cell.iterations == by_name[table.control].iterations
    # What is of one seed says so.
    shown = [*grid.tables, *grid.curves]
    assert all(("one seed" in each.title) == (each.seeds == [1]) for each in shown)
    # The longer baselines have the iterations of everything that made the teacher.
    start, one_size, multi_size, lr = (
        build_config(f"configs/Shapes/{name}.yaml", []).SOLVER.MAX_ITER
        for name in ("hr_start", "teacher_one_size", "teacher_multi_size", "lr")
    )
    for name in ("lr-long", "lr-64-128px-long"):
        assert by_name[name].iterations == start + one_size + lr
    assert by_name["lr-48-96px-long"].iterations == start + one_size + multi_size + lr
    fcos = sum(by_name[name].iterations for name in ("fcos-hr-start", "fcos-teacher", "fcos-lr"))
    assert by_name["fcos-lr-long"].iterations == fcos


def test_student_and_control_differ_in_the_distillation_alone():
    student, control = (
        build_config(f"configs/Shapes/{name}.yaml", ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", "same"])
        for name in ("student_multi_size", "control")
    )
    assert student.KD.TEACHER.WEIGHTS == control.MODEL.WEIGHTS  # both start from these
    student.KD, student.MODEL.WEIGHTS = control.KD, control.MODEL.WEIGHTS
    student.MODEL.META_ARCHITECTURE = control.MODEL.META_ARCHITECTURE
    assert student == control


def test_the_grid_of_the_demo_can_be_read(tmp_path):
    grid = read_grid("projects/Shapes/demo_full.yaml")
    cells = make_cells(grid, tmp_path)
    (data, *_) = grid.data.values()
    for cell in cells.values():
        cfg = build_config(cell.row.config, ["MODEL.DEVICE", "cpu"])
        assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == data["classes"]
        assert cell.data and {*cell.data} <= {*grid.data}
