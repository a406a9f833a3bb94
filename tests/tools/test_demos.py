"""`make demo` and `make nuclei`: what they train is what the studies measured."""

import json
import os
import shlex
import subprocess

import pytest
from helpers import ROOT, run_script

from msad_kd.config.build import build_config
from msad_kd.utils.flat_config import flatten_config
from projects.study.cells import make_cells
from projects.study.grid import read_grid


def unlabeled(cfg):
    """Return the folders of a flat config's images without labels, and if a file has labels."""
    entries = {x["name"]: x for x in cfg["DATASETS.COCO_FORMAT"]}
    entries = [entries[name] for name in cfg["DATASETS.UNLABELED"]]
    root = os.getenv("DETECTRON2_DATASETS", "datasets")
    return [(os.path.join(ROOT, root, x["images"]), "json" in x) for x in entries]


@pytest.mark.parametrize("target", ["demo", "nuclei"])
def test_make_finds_data_sets_in_the_home_folder(target, tmp_path):
    """A shell does not expand a ~ that is quoted."""
    environment = {**os.environ, "HOME": str(tmp_path), "DETECTRON2_DATASETS": "~/data"}
    keywords = {"cwd": ROOT, "capture_output": True, "text": True, "env": environment}
    said = subprocess.run(["make", "-n", target], **keywords).stdout
    assert f'"{tmp_path}/data/' in said and "~" not in said


@pytest.mark.parametrize(
    ("target", "grid", "rows"),
    [
        ("demo", "Shapes/demo_full", {"student": "student/1", "control": "control/1"}),
        (
            *("nuclei", "Nuclei/study"),
            {"student": "student-unlabeled-10-hr/1", "control": "control-10/1"},
        ),
    ],
)
def test_make_trains_what_the_study_measured(target, grid, rows, tmp_path, monkeypatch):
    """`make demo` and `make nuclei` derive the student and the control of a study."""
    said = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True).stdout
    (words,) = (x for x in said.replace("\\\n", "").splitlines() if "distill.py" in x)
    words = shlex.split(words)[2:]
    words[words.index("--output") + 1] = str(tmp_path)
    run_script("tools/distill.py", "--dry-run", *words)
    monkeypatch.chdir(ROOT)
    cells = make_cells(read_grid(ROOT / f"projects/{grid}.yaml"), tmp_path)
    for role, row in rows.items():
        cell, cpu = cells[row], ["MODEL.DEVICE", "cpu"]
        derived = flatten_config(build_config(str(tmp_path / f"configs/{role}.yaml"), cpu))
        shipped = flatten_config(build_config(cell.row.config, [*cell.options, *cpu]))
        # A study measures val and test; it and distill.py leave the same evaluations out.
        other = ["DATASETS.TEST", "KD.TEACHER.EVAL", "TEST.AUG"]
        other += ["WEIGHTS", "CONFIG_FILE", "OUTPUT_DIR", "DATASETS.COCO_FORMAT", "DATASETS.UNLAB"]
        assert unlabeled(derived) == unlabeled(shipped)
        for key in [key for key in shipped if not any(x in key for x in other)]:
            ours, theirs = (json.loads(json.dumps(x[key])) for x in (derived, shipped))  # lists
            assert ours == theirs, key
