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

    def call(folder, *arguments, iterations=2):
        stages[1]["iterations"] = iterations
        options = ["KD.LADDER.STAGES", stages, "KD.TEACHER.EVAL_BEFORE_TRAIN", True]
        options += ["SOLVER.CHECKPOINT_PERIOD", 1]
        return start(config_files["student"], folder, *arguments, *options)

    return call


@pytest.fixture(scope="module")
def whole_ladder(run_ladder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ladder")
    run_ladder(folder)
    return folder


@pytest.mark.long
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


@pytest.mark.long
def test_two_processes_end_a_stage_together_by_patience(run_ladder, tmp_path):
    keys = ["TEST.EVAL_PERIOD", 1, "TEST.PATIENCE", 1, "TEST.BEST_METRIC", "bbox/AP", "TEST.LOSS"]
    keys += [True, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.99]  # nothing is found: AP is NaN
    run_ladder(tmp_path, *keys, iterations=3)
    second = tmp_path / STAGES["second"]
    assert (second / "DONE").exists() and (second / "student.pth").exists()
    assert json.loads((second / "model_best.json").read_text())["since"] == [1]
    final = torch.load(second / "model_final.pth", weights_only=False)
    assert final["iteration"] == final["trainer"]["iteration"] == 0
    lines = [json.loads(line) for line in (second / "metrics.json").read_text().splitlines()]
    assert any("validation/total_loss" in line for line in lines)
