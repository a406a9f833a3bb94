"""Runs of several processes, here two on the CPU."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, TEST_SCENES, differing

TERMS = [
    {"name": "l1", "weight": 0.6, "adapter": True, "warmup_iters": 2},
    {"name": "mgd", "weight": 1e-4, "levels": ["p2", "p3"]},
]


@pytest.fixture(scope="module")
def run(config_files, teacher_weights):
    """run(folder, ...): a student of four steps, by two processes that share its batches."""

    def call(folder, *arguments):
        options = [
            *("KD.TEACHER.WEIGHTS", teacher_weights, "KD.TEACHER.EVAL_BEFORE_TRAIN", False),
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
        return process, torch.load(folder / "model_final.pth", weights_only=False)["model"]

    return call


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return (folder, *run(folder))


def test_two_processes_train_and_evaluate(whole):
    folder, process, state = whole
    assert "No GPU is at hand: 2 processes on the CPU" in process.stdout + process.stderr
    early = torch.load(folder / "model_0000001.pth", weights_only=False)["model"]
    assert "backbone.fpn_output2.weight" in state  # not "module.backbone..."
    for part in ("distiller.adapters.p6.weight", "distiller.parts.mgd.p3.0.weight"):
        assert not torch.equal(early[part], state[part])
    predictions = json.loads((folder / "inference" / "coco_instances_results.json").read_text())
    assert len({x["image_id"] for x in predictions}) == TEST_SCENES


@pytest.mark.long
def test_two_processes_resume_bitwise(whole, run, tmp_path):
    folder, _, expected = whole
    shutil.copy(folder / "model_0000001.pth", tmp_path)
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    process, state = run(tmp_path, "--resume")
    assert "Starting training from iteration 2" in process.stdout
    assert differing(state, expected) == []
