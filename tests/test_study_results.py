"""The committed results of the study, and what the READMEs make of them."""

import json
import re
from statistics import fmean

import pytest
from helpers import ROOT

from msad_kd import build_config
from projects.Shapes import study_report
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


# Not met: student-ssim-multiscale leads by 0.15 in the mean, at 1.8 times the training. Strict, so
# that the mark goes as soon as another default, or a measurement, makes it true.
@pytest.mark.xfail(strict=True, raises=AssertionError, reason="a dearer row has a better mean")
def test_the_demos_student_is_the_best_row(study, monkeypatch):
    monkeypatch.chdir(ROOT)
    grid, cells, results = study
    aps = {}
    for name in grid.tables[0]["rows"]:
        keys = [f"{name}/{seed}" for seed in grid.rows[name].seeds]
        if name.startswith("student") and all(key in results["cells"] for key in keys):
            aps[name] = fmean(results["cells"][key]["bbox"]["AP"] for key in keys)
    assert aps, "no student has been measured with every seed"
    best = max(aps, key=aps.get)
    cell = cells[f"{best}/{grid.rows[best].seeds[0]}"]
    student = build_config(cell.row.config, list(map(str, cell.options)))
    assert student.KD.LOSSES == build_config("configs/Shapes/student.yaml", []).KD.LOSSES


def test_no_row_beats_the_demos_student(study, monkeypatch):
    """Beating is what the study calls it: a gain on every seed, in the mean above its deviation.

    Of the rows that see the images it sees, none has a better mean either.
    """
    monkeypatch.chdir(ROOT)
    grid, cells, results = study
    demo = build_config("configs/Shapes/student.yaml", [])
    students, alike, own = {}, set(), []
    for name in grid.tables[0]["rows"]:
        row, cell = grid.rows[name], cells[f"{name}/{(grid.rows[name].seeds or [0])[0]}"]
        found = [values_of(results, row, kind) for kind in ("bbox", "segm")]
        if name.startswith("student") and len(found[0]) == len(row.seeds):
            students[name] = found
            meant = build_config(row.config, list(map(str, cell.options)))
            if meant.INPUT.MIN_SIZE_TRAIN == demo.INPUT.MIN_SIZE_TRAIN:
                alike.add(name)
                own += [name] if meant.KD.LOSSES == demo.KD.LOSSES else []
    (own,) = own
    for name in students.keys() - {own}:
        for values, demos in zip(students[name], students[own], strict=True):
            gains = paired_difference(values, demos)
            mean, deviation = mean_and_deviation(gains)
            assert min(gains) <= 0 or mean <= deviation, name
            assert mean <= 0 or name not in alike, name


def tables_of(readme):
    return re.findall(r"(?:^\|.*\n)+", readme.read_text(), re.MULTILINE)


def test_the_numbers_of_the_readmes_are_those_of_the_tables(study):
    written = (RESULTS / "tables.md").read_text()
    for readme in READMES:
        shown = [table for table in tables_of(readme) if "box AP" in table]
        assert shown and all(table in written for table in shown)


def test_every_row_of_a_table_has_its_sentence(study):
    grid, _, results = study
    text = "".join(readme.read_text() for readme in READMES)
    prose = "".join(line for line in text.splitlines(True) if not line.startswith("|"))
    named = set(re.findall(r"`([a-z0-9.-]+)`", prose))
    done = {key.partition("/")[0] for key in results["cells"]}
    rows = {name for table in grid.tables for name in table["rows"]} & done
    assert rows - named == set()
