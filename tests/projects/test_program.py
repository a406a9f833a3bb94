"""What the demo and the study share: the data, the lock, and an end in one sentence."""

import os
import signal
import subprocess
import sys

import pytest
from helpers import ROOT

from msad_kd.utils.errors import InputError
from projects.Shapes import demo
from projects.Shapes.jobs import DemoError, Screen
from projects.Shapes.program import locked, make_data, run_program

STARTER = """
import sys, time
from pathlib import Path
from projects.Shapes import demo
from projects.Shapes.jobs import Job, _start
from projects.Shapes.program import locked

folder = Path(sys.argv[1])
with locked(folder):
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    child = _start(Job("child", sleep, folder / "child"))
    print(child.pid, flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def handler():
    """The tests' own, which a program replaces."""
    kept = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, kept)


def test_other_data_in_the_folder_is_not_replaced_unasked(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    make_data("shapes", {"train": 2, "val": 1}, False, Screen())
    with pytest.raises(DemoError, match=r"other arguments.*--overwrite.*DETECTRON2_DATASETS"):
        make_data("shapes", {"train": 1, "val": 1}, False, Screen())
    make_data("shapes", {"train": 1, "val": 1}, True, Screen())
    assert len(os.listdir(tmp_path / "shapes" / "train")) == 1


def test_one_run_at_a_time_in_a_folder(tmp_path):
    with locked(tmp_path / "runs"):
        with pytest.raises(DemoError, match="another run is at work in '.*runs'.* wait for it"):
            with locked(tmp_path / "runs"):
                pass
    with locked(tmp_path / "runs"):
        pass


def test_one_demo_at_a_time(tmp_path):
    args = demo.parse_arguments(["--output", str(tmp_path)])
    with locked(tmp_path / "demo"), pytest.raises(DemoError, match="another run is at work"):
        demo.run(args, Screen())


def test_what_outlives_a_killed_run_keeps_others_out(tmp_path):
    command = [sys.executable, "-c", STARTER, str(tmp_path)]
    program = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    child = int(program.stdout.readline())
    program.kill()
    program.wait()
    try:
        with pytest.raises(DemoError, match="or what it had started"), locked(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("error", [DemoError, InputError, KeyboardInterrupt])
def test_it_ends_with_a_sentence(error):
    def run(args, screen):
        raise error("the disk is full")

    said = "interrupted; try again" if error is KeyboardInterrupt else "the disk is full"
    with pytest.raises(SystemExit, match=f"^x.py: {said}$"):
        run_program("x.py", run, None, "try again", (DemoError, InputError))


def test_it_is_terminated_with_a_sentence():
    def run(args, screen):
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit, match="^x.py: terminated; try again$"):
        run_program("x.py", run, None, "try again")
