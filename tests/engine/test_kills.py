"""Runs that are killed at any time, again and again, end as uninterrupted ones."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, differing

pytestmark = pytest.mark.long
KILLS, STEPS = 10, 120
SLOW = 300  # seconds that a start or a step may take on a busy machine
TORCHRUN_2 = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ALONE, TWO = [], ["--num-gpus=2"]


@pytest.fixture
def start(config_files):
    """start(folder, flags, KEY, VALUE, ...): train_net.py as a process; what it prints is kept."""

    def call(folder, flags, *options, launcher=()):
        folder.mkdir(exist_ok=True)
        options = [
            *("SOLVER.MAX_ITER", STEPS, "SOLVER.CHECKPOINT_PERIOD", 3, "SOLVER.IMS_PER_BATCH", 2),
            *("DATASETS.TEST", "()", "DATALOADER.NUM_WORKERS", 1, "OUTPUT_DIR", folder, *options),
        ]
        flags = ["--config-file", config_files["lr"], *flags]
        with open(folder / "console.txt", "a") as console:
            return subprocess.Popen(
                [sys.executable, *launcher, *map(str, [ROOT / "train_net.py", *flags, *options])],
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}/tests:{ROOT}"},
                stdout=console,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    return call


def text_of(folder):
    return (folder / "console.txt").read_text()


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def processes_below(pid):
    """The processes that a process has started, and those that they have."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [x for child in children for x in (int(child), *processes_below(child))]


def ranks_of(pid):
    """The processes of a run that train."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(x) for x in children if "spawn_main" in Path(f"/proc/{x}/cmdline").read_text()]


def gone(pids):
    """Whether none of the processes runs; a zombie does not."""
    files = [Path(f"/proc/{pid}/stat") for pid in pids]
    states = [file.read_text().rsplit(")", 1)[1].split()[0] for file in files if file.exists()]
    return set(states) <= {"Z"}


def check_equal(one, other):
    found, expected = (
        torch.load(folder / "model_final.pth", weights_only=False) for folder in (one, other)
    )
    assert differing(found["model"], expected["model"]) == []
    assert found["iteration"] == expected["iteration"]


def begun(folder, times):
    wait_until(lambda: text_of(folder).count("Starting training from") >= times, SLOW)


def newest(folder):
    """The last iteration that a checkpoint of a run has; -1 without one."""
    return max((int(file.stem[6:]) for file in folder.glob("model_0*.pth")), default=-1)


@pytest.mark.parametrize("count", [1, 2])
def test_killed_at_random_and_resumed_is_bitwise_the_uninterrupted_run(start, tmp_path, count):
    whole, folder, generator = tmp_path / "whole", tmp_path / "killed", random.Random(count)
    flags = ALONE if count == 1 else TWO
    assert start(whole, flags).wait(900) == 0
    for kills in range(KILLS):
        process = start(folder, [*flags, "--resume"])
        begun(folder, kills + 1)
        goal = newest(folder) + generator.choice([0, 3, 6])
        wait_until(lambda goal=goal: newest(folder) >= goal, SLOW)
        time.sleep(generator.uniform(0, 0.2))  # into a step, or the writing of a file
        everyone = [process.pid, *processes_below(process.pid)]
        victim = generator.choice([process.pid, *ranks_of(process.pid)])
        os.kill(victim, generator.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
        assert process.wait(SLOW) in (1, 143, -9), text_of(folder)[-3000:]
        wait_until(lambda pids=everyone: gone(pids), SLOW)
    assert start(folder, [*flags, "--resume"]).wait(900) == 0
    assert int(text_of(folder).rpartition("Starting training from iteration ")[2].split()[0]) > 0
    check_equal(folder, whole)


def test_torchrun_restarts_a_killed_run_which_resumes(start, tmp_path, monkeypatch):
    heads = ["MODEL.ROI_HEADS.NAME", "UsersHeads", "SOLVER.MAX_ITER", 10]
    assert start(tmp_path / "whole", TWO, "SOLVER.MAX_ITER", 10).wait(900) == 0
    folder = tmp_path / "restarted"
    launcher = [*TORCHRUN_2, "--max-restarts=1"]
    monkeypatch.setenv("DISTURB", "1 7 SIGKILL")
    assert start(folder, ["--import=users_module"], *heads, launcher=launcher).wait(900) == 0
    assert "Starting training from iteration 6" in text_of(folder)
    check_equal(folder, tmp_path / "whole")


@pytest.mark.parametrize(("flags", "launcher"), [(ALONE, []), (TWO, []), ([], TORCHRUN_2)])
def test_a_signal_to_all_processes_at_once_lets_the_step_end(start, tmp_path, flags, launcher):
    """As a scheduler sends it: to the workers of the data loaders, too."""
    folder = tmp_path / "run"
    process = start(folder, flags, "SOLVER.CHECKPOINT_PERIOD", 1000, launcher=launcher)
    wait_until(lambda: "iter: 19" in text_of(folder), SLOW)
    everyone = [process.pid, *processes_below(process.pid)]
    for pid in everyone:
        os.kill(pid, signal.SIGTERM)
    assert process.wait(SLOW) == (1 if launcher else 143)
    wait_until(lambda: gone(everyone), SLOW)
    (file,) = folder.glob("model_*.pth")
    assert (folder / "last_checkpoint").read_text() == file.name
    assert "DataLoader worker" not in text_of(folder)
