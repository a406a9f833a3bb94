"""The committed results of the study, and what the READMEs make of them."""

import json
import re
from statistics import fmean

import pytest
from helpers import ROOT

from msad_kd import build_config
from projects.Shapes import plan, study_report
from projects.Shapes.cells import make_cells
from projects.Shapes.grid import read_grid
from projects.Shapes.study_values import mean_and_deviation, paired_difference, values_of

RESULTS = ROOT / "projects" / "Shapes" / "results"
READMES = [ROOT / "projects" / name / "README.md" for name in ("Shapes", "MTPD")]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        grid = read_grid("projects/Shapes/study.yaml")
        cells = make_cells(grid, tmp_path_factory.mktemp("study"))
    return grid, cells, json.loads((RESULTS / "results.json").read_text())


def test_every_result_is_of_a_cell_that_the_study_still_means(study):
    _, cells, results = study
    found = {key: each["fingerprint"] for key, each in results["cells"].items()}
    assert found and found == {key: cells[key].fingerprint for key in found}


def test_the_tables_are_made_of_the_results(study, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert (RESULTS / "tables.md").read_text() == study_report.markdown(*study)


STUDENT, DENSE = "student-of-second-teacher", "fcos-student-ssim"


def measured(study, row, kind):
    grid, _, results = study
    return values_of(results, grid.rows[row], kind)


def without_distillation(study, begins):
    """The names of low-resolution rows that have been measured, by how they begin."""
    found = [name for name in study[0].rows if name.startswith(begins)]
    return [name for name in found if measured(study, name, "bbox")]


def assert_beats(study, student, other, kinds=("bbox", "segm")):
    """A gain on every seed that both have, and in the mean more than its deviation."""
    for kind in kinds:
        gains = paired_difference(measured(study, student, kind), measured(study, other, kind))
        assert gains and min(gains) > 0, (other, kind)
        mean, deviation = mean_and_deviation(gains)
        assert deviation is None or mean > deviation, (other, kind)


def test_the_demos_student_is_the_best_row(study, monkeypatch):
    """No other that distils for as long has more, in the mean of the seeds that both have."""
    monkeypatch.chdir(ROOT)
    grid, cells, _ = study
    own = cells[f"{STUDENT}/1"]
    demo = build_config(plan.CONFIGS["student"], [])
    meant = build_config(own.row.config, list(map(str, own.options)))
    meant.KD.TEACHER.WEIGHTS = demo.KD.TEACHER.WEIGHTS  # the demo names its own
    assert meant == demo
    assert grid.rows["teacher-jitter"].checkpoint.endswith(f"/{plan.TEACHER}.pth")
    others = {
        cell.row.name
        for cell in cells.values()
        if cell.row.test_config != cell.row.config  # as a student is measured
        and cell.iterations == own.iterations
        and measured(study, cell.row.name, "segm")
    } - {STUDENT}
    assert len(others) > 40
    for name in others:
        for kind in ("bbox", "segm"):
            gains = paired_difference(measured(study, STUDENT, kind), measured(study, name, kind))
            assert fmean(gains) > 0, (name, kind)


def test_the_best_student_beats_every_model_without_distillation(study):
    """Those of its table on three seeds; all others, longer ones too, on those they have."""
    table = [name for name in study[0].tables[0]["rows"] if name.startswith("lr")]
    for name in (STUDENT, *table):
        assert {*measured(study, name, "segm")} == {1, 2, 3}
    for name in without_distillation(study, "lr"):
        assert_beats(study, STUDENT, name)
    for name in without_distillation(study, "fcos-lr"):
        assert_beats(study, DENSE, name, ["bbox"])


def test_the_regime_is_one_where_labels_alone_have_no_more_to_give(study):
    """From its teacher's weights the LR model stops gaining, far below the teacher, and its student
    is ahead all along."""
    own = "lr-from-second-teacher"
    for kind in ("bbox", "segm"):
        early, late = (measured(study, f"{own}-{length}", kind) for length in (2400, 4800))
        assert {*early} == {*late} == {1, 2, 3}
        assert abs(fmean(paired_difference(late, early))) < 0.2
        (teacher,) = measured(study, "teacher-jitter", kind).values()
        assert teacher - fmean(late.values()) > 5
    for length in (2400, 4800):
        assert {*measured(study, f"{STUDENT}-{length}", "segm")} == {1, 2, 3}
        assert_beats(study, f"{STUDENT}-{length}", f"{own}-{length}")


def test_the_fused_target_beats_those_of_one_resolution(study):
    for branch in ("hr", "lr"):
        assert {*measured(study, f"second-target-{branch}", "segm")} == {1, 2, 3}
        assert_beats(study, STUDENT, f"second-target-{branch}")


def test_it_does_on_scenes_that_nothing_was_chosen_by(study):
    others = without_distillation(study, "fresh-lr")
    assert "fresh-lr-long" in others
    for name in others:
        assert_beats(study, "fresh-student", name)


def tables_of(readme):
    return re.findall(r"(?:^\|.*\n)+", readme.read_text(), re.MULTILINE)


def test_the_numbers_of_the_readme_are_those_of_the_tables(study):
    written = (RESULTS / "tables.md").read_text()
    shown = [table for table in tables_of(READMES[0]) if "box AP" in table]
    assert shown and all(table in written for table in shown)


def test_every_row_of_a_table_has_its_sentence(study):
    grid, _, results = study
    text = "".join(readme.read_text() for readme in READMES)
    prose = "".join(line for line in text.splitlines(True) if not line.startswith("|"))
    named = set(re.findall(r"`([a-z0-9.-]+)`", prose))
    done = {key.partition("/")[0] for key in results["cells"]}
    rows = {name for table in grid.tables for name in table["rows"]} & done
    assert rows - named == set()
