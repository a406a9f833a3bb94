"""Runs of several processes, here two on the CPU."""

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from detectron2.engine import default_argument_parser
from detectron2.utils import comm
from helpers import ROOT, TEST_SCENES, cut_off, differing
from two_processes import TERMS, TORCHRUN_2, start

from msad_kd import KDTrainer
from msad_kd.config.build import build_config
from msad_kd.engine.launch import TORCHRUN, _wait, is_restarted, launch, run_command
from msad_kd.utils import signals
from msad_kd.utils.errors import InputError

UNLABELED = [
    *("DATASETS.UNLABELED", ["tiny_val"], "SOLVER.UNLABELED_PER_BATCH", 2),
    *("KD.UNLABELED.PSEUDO_LABELS", True, "KD.UNLABELED.SCORE", [0.113]),
    *("KD.UNLABELED.IGNORE_SCORE", 0.1),
]


def test_no_gpu_is_one_process_on_the_cpu():
    calls = []
    launch(calls.append, 0, args=("called",))  # Detectron2's --num-gpus 0
    assert calls == ["called"]


@pytest.mark.parametrize(
    ("arguments", "words"), [((2,), "leave out --num-gpus"), ((1, 2), "and --num-machines")]
)
def test_torchrun_has_started_the_processes(monkeypatch, arguments, words):
    for name in TORCHRUN:
        monkeypatch.setenv(name, "0")
    with pytest.raises(InputError, match=f"torchrun has started .* {words}"):
        launch(pytest.fail, *arguments)


def test_several_machines_need_an_address(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_net.py", "--num-machines", "2"])
    with pytest.raises(SystemExit, match="^train_net.py: several machines need --dist-url tcp://"):
        run_command(pytest.fail, default_argument_parser())


def test_one_process_of_torchrun_needs_no_others(monkeypatch):
    for name, value in zip(TORCHRUN, ("0", "1", "0", "127.0.0.1", "1")):
        monkeypatch.setenv(name, value)
    for count, restarted in (("0", False), ("2", True)):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        assert is_restarted() == restarted
    monkeypatch.setattr(signals, "_deaf", dict(signals._deaf))
    seen = []
    launch(lambda: seen.append((comm.get_world_size(), {*signals._deaf.values()})), 1)
    assert seen == [(1, {5.0})]  # torchrun passes on a signal that the process may have got, too


@pytest.fixture(scope="module")
def run_student(config_files, teacher_weights):
    """run_student(folder, ...): four steps of a student, and its final weights."""

    def call(folder, *arguments, **options):
        more = *UNLABELED, "KD.TEACHER.WEIGHTS", teacher_weights
        process = start(config_files["student"], folder, *arguments, *more, **options)
        return process, torch.load(folder / "model_final.pth", weights_only=False)["model"]

    return call


@pytest.fixture(scope="module")
def whole(run_student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return (folder, *run_student(folder, launcher=()))


def test_two_processes_train_and_evaluate(whole):
    folder, process, state = whole
    assert "No GPU is available: starting 2 processes on the CPU" in process.stdout + process.stderr
    assert "loss_mask_unlabeled" in (folder / "metrics.json").read_text()
    early = torch.load(folder / "model_0000001.pth", weights_only=False)["model"]
    assert "backbone.fpn_output2.weight" in state  # not "module.backbone..."
    for part in ("distiller.adapters.p6.weight", "distiller.parts.mgd.p3.0.weight"):
        assert not torch.equal(early[part], state[part])
    predictions = json.loads((folder / "inference" / "coco_instances_results.json").read_text())
    assert len({x["image_id"] for x in predictions}) == TEST_SCENES


def test_the_evaluation_in_the_run_is_that_of_its_checkpoint(whole, config_files, tmp_path):
    folder, _, state = whole
    options = ["OUTPUT_DIR", str(tmp_path), "KD.LOSSES", TERMS]
    cfg = build_config(str(config_files["student"]), options)
    model = KDTrainer.load_model(cfg, str(folder / "model_final.pth"), "it")
    KDTrainer.test(cfg, model)
    found, expected = (
        sorted(json.loads((x / "inference/coco_instances_results.json").read_text()), key=str)
        for x in (folder, tmp_path)
    )
    assert found == expected != []


@pytest.mark.long
def test_two_processes_of_torchrun_are_the_launchers(
    config_files, whole, teacher_weights, tmp_path
):
    keys = [*UNLABELED, "KD.TEACHER.WEIGHTS", teacher_weights]
    keys += ["SOLVER.MAX_ITER", 2, "DATASETS.TEST", "()"]
    start(config_files["student"], tmp_path, *keys, by=(), launcher=TORCHRUN_2)
    state, expected = (
        torch.load(file, weights_only=False)["model"]
        for file in (tmp_path / "model_final.pth", whole[0] / "model_0000001.pth")
    )
    assert differing(state, expected) == []
    assert {"log.txt", "log.txt.rank1", "metrics.json"} <= {x.name for x in tmp_path.iterdir()}
    assert "Rank of current process: 1. World size: 2" in (tmp_path / "log.txt.rank1").read_text()
    assert len((tmp_path / "metrics.json").read_text().splitlines()) == 1


# ---- Signals ----


@pytest.fixture
def signalled(config_files, teacher_weights, tmp_path):
    """signalled("RANK 1 WHAT", ...): a run that a process disturbs in step 1."""

    def call(what, *arguments, code):
        (tmp_path / "pids").mkdir()
        process = start(
            *(config_files["student"], tmp_path / "run"),
            *("--import=users_module", *UNLABELED, "KD.TEACHER.WEIGHTS", teacher_weights),
            *arguments,
            *("MODEL.ROI_HEADS.NAME", "UsersHeads", "SOLVER.CHECKPOINT_PERIOD", 100),
            **{"DISTURB": what, "PIDS": str(tmp_path / "pids"), "code": code},
            PYTHONPATH=f"{ROOT}/tests:{ROOT}",
        )
        pids = [x.name for x in (tmp_path / "pids").iterdir()]
        assert len(pids) == 2, process.stdout + process.stderr
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
        return process

    return call


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("1 1 SIGTERM launcher", 143),
        pytest.param("0 1 SIGINT launcher", 130, marks=pytest.mark.long),
        pytest.param("1 1 SIGTERM", 143, marks=pytest.mark.long),
        pytest.param("1 1 SIGHUP", 129, marks=pytest.mark.long),
        pytest.param("0 1 EVALUATION", 143, marks=pytest.mark.long),
        pytest.param("1 1 EVALUATION", 143, marks=pytest.mark.long),
    ],
)
def test_a_signal_to_one_process_saves_and_ends_all(whole, signalled, tmp_path, what, code):
    process = signalled(what, "TEST.EVAL_PERIOD", 2, code=code)
    assert "Traceback" not in process.stdout + process.stderr
    found, expected = (
        torch.load(folder / "model_0000001.pth", weights_only=False)
        for folder in (tmp_path / "run", whole[0])
    )
    assert [x.name for x in (tmp_path / "run").glob("*.pth")] == ["model_0000001.pth"]
    assert differing(found["model"], expected["model"]) == []
    states = (x["trainer"]["_trainer"]["optimizer"]["state"] for x in (found, expected))
    for one, other in zip(*(state.values() for state in states), strict=True):
        assert differing(one, other) == []


@pytest.mark.long
@pytest.mark.parametrize("what", ["1 1 NAN", "1 1 RAISE"])
def test_a_loss_that_is_not_finite_in_one_process_ends_all(signalled, what):
    process = signalled(what, code=1)
    # In the second case the other process has lost its partner, and Detectron2 logs how.
    assert "Traceback" not in process.stderr + (process.stdout if "NAN" in what else "")
    (sentence,) = [x for x in process.stderr.splitlines() if x.startswith("train_net.py:")]
    assert "Not finite at iteration 1: loss_mask" in sentence
    assert sentence.count("/train/") == 2  # of the four images those of its process


def stubborn(ready):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ready.set()
    time.sleep(300)


def failing(ready):
    ready.wait()
    os._exit(3)


def test_a_process_that_does_not_end_is_killed(monkeypatch):
    monkeypatch.setattr("msad_kd.engine.launch.AFTER_FAILURE", (0, 0.5))
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    processes = [context.Process(target=run, args=(ready,)) for run in (stubborn, failing)]
    for process in processes:
        process.start()
    assert _wait(processes, []) == 1
    assert [process.exitcode for process in processes] == [-signal.SIGKILL, 3]


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_other(signalled, rank):
    began = time.monotonic()
    process = signalled(f"{rank} 1 SIGKILL", code=1)
    assert time.monotonic() - began < 300  # the timeout of a collective is longer
    (sentence,) = [x for x in process.stderr.splitlines() if x.startswith("train_net.py:")]
    assert f"process {rank} terminated with signal SIGKILL; the others were ended" in sentence


@pytest.mark.long
def test_two_processes_resume_bitwise(whole, run_student, tmp_path):
    folder, _, expected = whole
    cut_off(folder, tmp_path)
    process, state = run_student(tmp_path, "--resume")
    assert "Starting training from iteration 2" in process.stdout
    assert differing(state, expected) == []
