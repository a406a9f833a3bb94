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


def test_the_demos_student_is_the_best_row(study, monkeypatch):
    """Of those that see the images it sees, in boxes and masks; and none is ahead of it in both."""
    monkeypatch.chdir(ROOT)
    grid, cells, results = study
    demo = build_config("configs/Shapes/student.yaml", [])
    aps, alike, demos = {}, [], []
    for name in grid.tables[0]["rows"]:
        keys = [f"{name}/{seed}" for seed in grid.rows[name].seeds]
        if name.startswith("student") and all(key in results["cells"] for key in keys):
            found = [results["cells"][key] for key in keys]
            aps[name] = [fmean(cell[kind]["AP"] for cell in found) for kind in ("bbox", "segm")]
            student = build_config(
                cells[keys[0]].row.config, list(map(str, cells[keys[0]].options))
            )
            if student.INPUT.MIN_SIZE_TRAIN == demo.INPUT.MIN_SIZE_TRAIN:
                alike.append(name)
                demos += [name] if student.KD.LOSSES == demo.KD.LOSSES else []
    (own,) = demos
    for name in alike:
        assert aps[own][0] >= aps[name][0] and aps[own][1] >= aps[name][1], name
    for name in aps:
        assert aps[own][0] >= aps[name][0] or aps[own][1] >= aps[name][1], name


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
