"""The demo's jobs: their order, their end, their progress, what is said when one fails."""

import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from helpers import ROOT

from projects.Shapes.jobs import (
    CONSOLE,
    DemoError,
    Job,
    last_error,
    run_jobs,
    typed,
)
from projects.Shapes.progress import (
    evaluation_progress,
    gradient_ratio,
    iterations_done,
    training_progress,
)


def python(code, *arguments):
    return [sys.executable, "-c", code, *map(str, arguments)]


def test_jobs_run_in_order_no_more_than_slots_and_after_those_they_wait_for(tmp_path, screen):
    log, done = tmp_path / "log", []
    # `a` and `c` end only after both have started, so each needs the other beside it.
    code = """
import sys, time
path, name = sys.argv[1:]
def write(event):
    with open(path, "a") as log:
        log.write(f"{event} {name}\\n")
write("start")
deadline = time.monotonic() + 30
while name in "ac" and time.monotonic() < deadline:
    if {"start a", "start c"} <= set(open(path).read().splitlines()):
        break
    time.sleep(0.05)
else:
    assert name not in "ac"
write("end")
"""

    def job(name, *after):
        command = python(code, log, name)
        return Job(name, command, tmp_path / name, after=after, done=lambda: done.append(name))

    run_jobs([job("a"), job("b", "c"), job("c"), job("d")], 2, screen)
    events = [line.split() for line in log.read_text().splitlines()]
    running, most = set(), 0
    for _, name in events:
        running ^= {name}
        most = max(most, len(running))
    assert most == 2 and sorted(done) == list("abcd")
    assert {name for _, name in events[:2]} == {"a", "c"}
    assert events.index(["end", "c"]) < events.index(["start", "b"])


def test_jobs_get_one_thread_and_an_empty_folder(tmp_path, screen):
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "metrics.json").write_text("of an earlier run")
    code = "import os, sys; print(os.environ['OMP_NUM_THREADS'], os.listdir(sys.argv[1]))"
    run_jobs([Job("job", python(code, folder), folder)], 1, screen)
    assert (folder / CONSOLE).read_text().strip() == f"1 ['{CONSOLE}']"


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


SLEEPER = """
import os, sys, time
open(sys.argv[1], "w").write(str(os.getpid()))
time.sleep(60)
"""


def wait_for(path):
    for _ in range(200):
        if path.exists() and path.read_text():
            return int(path.read_text())
        time.sleep(0.05)
    raise AssertionError(f"{path} was not written")


def test_a_failure_stops_the_others_and_names_log_and_error(tmp_path, screen):
    failing = f"""
import os, time
while not os.path.exists({str(tmp_path / "pid")!r}):
    time.sleep(0.05)
time.sleep(0.2)
raise KeyError("no such thing")
"""
    jobs = [
        Job("sleeper", python(SLEEPER, tmp_path / "pid"), tmp_path / "sleeper"),
        Job("bad", python(failing), tmp_path / "bad"),
    ]
    with pytest.raises(
        DemoError, match="bad failed; .*bad/console.txt': KeyError: 'no such thing'"
    ):
        run_jobs(jobs, 2, screen)
    assert not is_running(wait_for(tmp_path / "pid"))


def test_of_a_long_list_all_are_run_that_do_not_wait_for_a_failure(tmp_path, screen):
    jobs = [
        Job("bad", python("raise KeyError('x')"), tmp_path / "bad"),
        Job("after bad", python(""), tmp_path / "after", after=("bad",)),
        Job("after that", python(""), tmp_path / "that", after=("after bad",)),
        Job("good", python(""), tmp_path / "good"),
    ]
    expected = "bad failed.*; after bad could not be run; after that could not be run$"
    with pytest.raises(DemoError, match=expected):
        run_jobs(jobs, 1, screen, overall=lambda: "half of it")
    assert (tmp_path / "good").exists() and not (tmp_path / "that").exists()


def test_a_job_that_resumes_keeps_its_folder_and_what_was_printed(tmp_path, screen):
    for word in ("one", "two"):
        run_jobs([Job("job", python(f"print({word!r})"), tmp_path, resumes=True)], 1, screen)
    assert (tmp_path / CONSOLE).read_text().split() == ["one", "two"]


def test_a_watch_that_objects_stops_the_jobs(tmp_path, screen):
    def watch():
        if (tmp_path / "pid").exists():
            raise DemoError("another AP than recorded")

    job = Job("sleeper", python(SLEEPER, tmp_path / "pid"), tmp_path / "sleeper", watch=watch)
    with pytest.raises(DemoError, match="another AP"):
        run_jobs([job], 1, screen)
    assert not is_running(wait_for(tmp_path / "pid"))


def test_a_killed_job_is_told_as_such(tmp_path, screen):
    code = "import os; os.kill(os.getpid(), 9)"
    with pytest.raises(DemoError, match="bad was ended by signal 9, perhaps for want of memory"):
        run_jobs([Job("bad", python(code), tmp_path / "bad")], 1, screen)


def test_a_job_that_waits_for_nothing_that_runs_is_an_error(tmp_path, screen):
    with pytest.raises(ValueError, match="b waits"):
        run_jobs([Job("b", python(""), tmp_path / "b", after=("a",))], 1, screen)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ending_the_demo_ends_what_it_started(tmp_path, number):
    code = f"""
import sys
from pathlib import Path
from projects.Shapes import demo
from projects.Shapes.jobs import Job, run_jobs

command = [sys.executable, "-c", {SLEEPER!r}, {str(tmp_path / "pid")!r}]
job = Job("sleeper", command, Path({str(tmp_path / "sleeper")!r}))
demo.run = lambda args, screen: run_jobs([job], 1, screen)
demo.main([])
"""
    # Tests that were started in a shell's background ignore SIGINT, and so would their children.
    process = subprocess.Popen(
        python(code),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    pid = wait_for(tmp_path / "pid")
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "demo.py: " in output and "Traceback" not in output
    assert not is_running(pid)


def test_progress_of_a_training(tmp_path):
    assert training_progress(tmp_path) == ""
    (tmp_path / "config.yaml").write_text("SOLVER:\n  MAX_ITER: 1200\n")
    line = json.dumps({"iteration": 59, "total_loss": 2.374, "eta_seconds": 783.5})
    (tmp_path / "metrics.json").write_text(f'{line}\n{{"iteration": 79, "total_lo')
    assert training_progress(tmp_path) == "60/1200, loss 2.37, 13:04 left"
    assert iterations_done(tmp_path, since=0) == 60


def test_last_gradient_ratio(tmp_path):
    assert gradient_ratio(tmp_path) is None
    lines = [{"total_loss": 1.0, "kd/gradient_ratio": ratio} for ratio in (0.2, 0.3)]
    lines.append({"total_loss": 1.0})  # not every line has it
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    assert gradient_ratio(tmp_path) == 0.3
    ladder = tmp_path / "ladder"
    for stage, ratio in (("stage_01_a", 0.5), ("stage_02_b", 0.0)):
        (ladder / stage).mkdir(parents=True)
        told = {"total_loss": 1.0, "kd/gradient_ratio": ratio}
        (ladder / stage / "metrics.json").write_text(json.dumps(told))
    assert gradient_ratio(ladder) == 0.0


def test_progress_of_a_ladder(tmp_path):
    for number, iterations in ((1, 600), (2, 20)):
        folder = tmp_path / f"stage_0{number}_x"
        folder.mkdir()
        (folder / "config.yaml").write_text("SOLVER:\n  MAX_ITER: 600\n")
        line = {"iteration": iterations - 1, "total_loss": 1.0, "eta_seconds": 60}
        (folder / "metrics.json").write_text(json.dumps(line) + '\n{"bbox/AP": 3.0}\n')
    assert training_progress(tmp_path) == "stage 2, 20/600, loss 1.00, 1:00 left"
    assert iterations_done(tmp_path, since=0) == 620


def test_progress_of_an_evaluation(tmp_path):
    progress = partial(evaluation_progress, models=4)
    assert progress(tmp_path) == ""
    first = "Start inference on 9 batches\nInference done 8/9. Dataloading\nEvaluation results\n"
    (tmp_path / "log.txt").write_text(first)
    assert progress(tmp_path) == "8/9 images, model 1 of 4"
    (tmp_path / "log.txt").write_text(first + "Start inference on 9 batches\n")
    assert progress(tmp_path) == ""
    (tmp_path / "log.txt").write_text(2 * first)
    assert progress(tmp_path) == "8/9 images, model 2 of 4"


def test_last_error_passes_over_what_follows_it(tmp_path):
    log = tmp_path / "log"
    log.write_text("[10:00 d2.x]: ok\nTraceback\nValueError: too small\n[W1120] warning\n\n")
    assert last_error(log) == "ValueError: too small"
    log.write_text("[10:00 d2.x]: ok\ntrain_net.py: the file 'x' does not exist\n")
    assert last_error(log) == "train_net.py: the file 'x' does not exist"
    assert last_error(tmp_path / "absent") == "it printed nothing"


def test_commands_are_shown_as_typed(monkeypatch):
    monkeypatch.chdir(ROOT)
    command = [str(ROOT / ".venv/bin/python"), "train_net.py", "DATASETS.TEST", "()"]
    assert typed(command) == ".venv/bin/python train_net.py DATASETS.TEST '()'"
