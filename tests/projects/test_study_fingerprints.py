"""What the fingerprint of a cell stands for."""

import pytest
import yaml
from grids import CONTENT, TEACHER, content, fingerprints
from helpers import ROOT


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_a_fingerprint_stands_for_the_meaning(cells_of):
    before = fingerprints(cells_of(content()))
    assert len(set(before.values())) == len(before)

    same = content()
    same["rows"]["student"]["title"] = "another title"
    same["rows"]["student"]["options"]["KD.GRADIENT_RATIO_PERIOD"] = 7  # changes no weight
    same["data"]["shapes"] |= {"classes": 8}  # the default
    assert fingerprints(cells_of(same)) == before
    renamed = yaml.safe_load(CONTENT.replace("student}", "pupil}").replace(" student", " pupil"))
    renamed["tables"][0]["rows"] = ["pupil"]
    assert set(fingerprints(cells_of(renamed)).values()) == set(before.values())

    other = content()
    other["rows"]["student"]["options"]["SOLVER.BASE_LR"] = 0.5
    after = fingerprints(cells_of(other))
    # What uses a checkpoint that is trained in another way is another cell, too.
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {key for key in before if not key.startswith(("teacher", "lr"))}
    mixed = content()
    mixed["rows"]["student"]["options"]["SOLVER.AMP.ENABLED"] = True  # though this CPU has none
    after_amp = fingerprints(cells_of(mixed))
    assert {key for key in before if before[key] != after_amp[key]} == changed
    other["data"]["shapes"]["train"] = 7
    assert all(fingerprints(cells_of(other))[key] != after[key] for key in after)


def test_a_fingerprint_stands_for_the_content_of_checkpoints(cells_of, tmp_path):
    grid, weights = content(), tmp_path / "t.pth"
    stage = {"name": "a", "config_file": TEACHER, "weights": str(weights)}
    grid["rows"]["student"]["options"] = {"KD.TEACHER.WEIGHTS": str(weights)}
    grid["rows"]["again"]["options"] = {"KD.LADDER.STAGES": [stage]}
    # A checkpoint is not changed by what its config would start from.
    grid["rows"]["teacher"]["options"] = {"MODEL.WEIGHTS": str(weights)}
    found = []
    for content_of_file in (b"one", b"other"):
        weights.write_bytes(content_of_file)
        found.append(fingerprints(cells_of(grid)))
    changed = {key.split("/")[0] for key in found[0] if found[0][key] != found[1][key]}
    assert changed == {"student", "again", "fresh"}


@pytest.mark.parametrize("what", ["teacher", "stage", "start"])
def test_a_fingerprint_stands_for_the_content_of_files_of_teachers(cells_of, tmp_path, what):
    grid, file = content(), tmp_path / "own.yaml"
    stage = {"name": "a", "config_file": TEACHER, "weights": "t.pth"}
    stage |= {"config_file": str(file)} if what == "stage" else {"start": str(file)}
    options = {"KD.LADDER.STAGES": [stage]}
    if what == "teacher":
        options = {"KD.TEACHER.CONFIG_FILE": str(file)}
    grid["rows"]["student"]["options"] |= options
    found = []
    for own in ({}, {"SOLVER": {"MAX_ITER": 9}}, {"MODEL": {"PIXEL_MEAN": [1.0, 2.0, 3.0]}}):
        file.write_text(yaml.safe_dump({"_BASE_": str(ROOT / TEACHER), **own}))
        found.append(fingerprints(cells_of(grid)))
    first, trained_otherwise, other_model = found
    changed = [
        {key.split("/")[0] for key in after if after[key] != first[key]}
        for after in (trained_otherwise, other_model)
    ]
    uses = {"student", "again", "fresh"}
    # A student does not read how its teacher was trained. A start is a file of weights.
    assert changed == [uses if what == "start" else set(), uses]
