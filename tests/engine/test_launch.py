"""Runs of several processes, here two on the CPU."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, TEST_SCENES, differing

from msad_kd.engine.launch import launch

TERMS = [
    {"name": "l1", "weight": 0.6, "adapter": True, "warmup_iters": 2},
    {"name": "mgd", "weight": 1e-4, "levels": ["p2", "p3"]},
]
STAGES = {"first": "stage_01_first", "second": "stage_02_second"}


def test_no_gpu_is_one_process_on_the_cpu():
    calls = []
    launch(calls.append, 0, args=("called",))  # Detectron2's --num-gpus 0
    assert calls == ["called"]


@pytest.fixture(scope="module")
def run(config_files):
    """run(folder, ...): a training by two processes that share its batches."""

    def call(folder, *arguments):
        options = [
            *("KD.LOSSES", TERMS, "SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2),
            *("SOLVER.IMS_PER_BATCH", 4, "OUTPUT_DIR", folder),
        ]
        start = ["--num-gpus", 2, "--dist-url", "auto", "--config-file", config_files["student"]]
        process = subprocess.run(
            [sys.executable, str(ROOT / "train_net.py"), *map(str, start + [*arguments, *options])],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
        return process

    return call


@pytest.fixture(scope="module")
def run_student(run, teacher_weights):
    """run_student(folder, ...): four steps of a student, and its final weights."""

    def call(folder, *arguments):
        process = run(folder, *arguments, "KD.TEACHER.WEIGHTS", teacher_weights)
        return process, torch.load(folder / "model_final.pth", weights_only=False)["model"]

    return call


@pytest.fixture(scope="module")
def whole(run_student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return (folder, *run_student(folder))


def test_two_processes_train_and_evaluate(whole):
    folder, process, state = whole
    assert "No GPU is available: starting 2 processes on the CPU" in process.stdout + process.stderr
    early = torch.load(folder / "model_0000001.pth", weights_only=False)["model"]
    assert "backbone.fpn_output2.weight" in state  # not "module.backbone..."
    for part in ("distiller.adapters.p6.weight", "distiller.parts.mgd.p3.0.weight"):
        assert not torch.equal(early[part], state[part])
    predictions = json.loads((folder / "inference" / "coco_instances_results.json").read_text())
    assert len({x["image_id"] for x in predictions}) == TEST_SCENES


@pytest.mark.long
def test_two_processes_resume_bitwise(whole, run_student, tmp_path):
    folder, _, expected = whole
    shutil.copy(folder / "model_0000001.pth", tmp_path)
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    process, state = run_student(tmp_path, "--resume")
    assert "Starting training from iteration 2" in process.stdout
    assert differing(state, expected) == []


# ---- A ladder ----


@pytest.fixture(scope="module")
def run_ladder(run, config_files, teacher_weights):
    """run_ladder(folder, ...): two stages, each of which evaluates its teacher beforehand."""
    common = {"config_file": str(config_files["teacher"]), "weights": str(teacher_weights)}
    stages = [
        {**common, "name": "first", "start": "teacher", "iterations": 2},
        {**common, "name": "second", "kind": "plain", "image": "hr", "losses": TERMS[::-1]},
    ]

    def call(folder, *arguments):
        options = ["KD.LADDER.STAGES", stages, "KD.TEACHER.EVAL_BEFORE_TRAIN", True]
        return run(folder, *arguments, *options)

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


def test_two_processes_resume_a_ladder_bitwise(whole_ladder, run_ladder, tmp_path):
    cut = tmp_path / "cut"
    shutil.copytree(whole_ladder, cut)
    state = json.loads((cut / "ladder_state.json").read_text())
    del state["second"]
    (cut / "ladder_state.json").write_text(json.dumps(state))
    for lost in ("DONE", "student.pth", "model_final.pth", "model_0000003.pth"):
        (cut / STAGES["second"] / lost).unlink()
    (cut / STAGES["second"] / "last_checkpoint").write_text("model_0000001.pth")
    process = run_ladder(cut, "--resume")
    assert "Stage 1, 'first', is done: skipped" in process.stdout
    assert "Starting training from iteration 2" in process.stdout
    for name in ("model_final.pth", "student.pth"):
        files = (folder / STAGES["second"] / name for folder in (cut, whole_ladder))
        found, expected = (torch.load(file, weights_only=False)["model"] for file in files)
        assert differing(found, expected) == []
    assert json.loads((cut / "ladder_state.json").read_text()).keys() == STAGES.keys()
