"""Ladders of two processes, here on the CPU."""

import json
import shutil

import pytest
import torch
from helpers import TEST_SCENES, differing
from two_processes import TERMS, start

STAGES = {"first": "stage_01_first", "second": "stage_02_second"}


@pytest.fixture(scope="module")
def run_ladder(config_files, teacher_weights):
    """run_ladder(folder, ...): two stages, each of which evaluates its teacher beforehand."""
    common = {"config_file": str(config_files["teacher"]), "weights": str(teacher_weights)}
    stages = [
        {**common, "name": "first", "start": "teacher", "iterations": 1},
        {**common, "name": "second", "kind": "plain", "image": "hr", "losses": TERMS[::-1]},
    ]
    stages[1]["iterations"] = 2

    def call(folder, *arguments):
        options = ["KD.LADDER.STAGES", stages, "KD.TEACHER.EVAL_BEFORE_TRAIN", True]
        options += ["SOLVER.CHECKPOINT_PERIOD", 1]
        return start(config_files["student"], folder, *arguments, *options)

    return call


@pytest.fixture(scope="module")
def whole_ladder(run_ladder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ladder")
    run_ladder(folder)
    return folder


def test_two_processes_climb_a_ladder(whole_ladder):
    state = json.loads((whole_ladder / "ladder_state.json").read_text())
    assert {name: entry["folder"] for name, entry in state.items()} == STAGES
    for name, folder in STAGES.items():
        own = whole_ladder / folder
        assert (own / "DONE").exists() and (own / "student.pth").exists()
        assert "AP" in state[name]["results"]["bbox"]
        predictions = own / "teacher" / "inference" / "coco_instances_results.json"
        images = {x["image_id"] for x in json.loads(predictions.read_text())}
        assert len(images) == TEST_SCENES


@pytest.mark.long
def test_two_processes_resume_a_ladder_bitwise(whole_ladder, run_ladder, tmp_path):
    cut = tmp_path / "cut"
    shutil.copytree(whole_ladder, cut)
    state = json.loads((cut / "ladder_state.json").read_text())
    del state["second"]
    (cut / "ladder_state.json").write_text(json.dumps(state))
    for lost in ("DONE", "student.pth", "model_final.pth", "model_0000001.pth"):
        (cut / STAGES["second"] / lost).unlink()
    (cut / STAGES["second"] / "last_checkpoint").write_text("model_0000000.pth")
    process = run_ladder(cut, "--resume")
    assert "Stage 1, 'first', is done: skipped" in process.stdout
    assert "Starting training from iteration 1" in process.stdout
    for name in ("model_final.pth", "student.pth"):
        files = (folder / STAGES["second"] / name for folder in (cut, whole_ladder))
        found, expected = (torch.load(file, weights_only=False)["model"] for file in files)
        assert differing(found, expected) == []
    assert json.loads((cut / "ladder_state.json").read_text()).keys() == STAGES.keys()
