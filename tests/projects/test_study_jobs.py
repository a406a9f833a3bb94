"""Jobs: their order, their end, what is said when one fails, and the lock of a folder."""

import errno
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from helpers import fork

from msad_kd.utils.errors import InputError
from projects.study import jobs, run
from projects.study.jobs import CONSOLE, Job, Screen, last_error, locked, run_jobs
from projects.study.progress import gradient_ratio, iterations_done, training_seconds

SLEEPER = """
import os, sys, time
open(sys.argv[1], "w").write(str(os.getpid()))
time.sleep(60)
"""


def python(code, *arguments):
    return [sys.executable, "-c", code, *map(str, arguments)]


def wait_for(path):
    for _ in range(600):
        if path.exists() and path.read_text():
            return int(path.read_text())
        time.sleep(0.05)
    raise AssertionError(f"{path} was not written")


def test_jobs_run_in_order_at_most_slots_at_a_time_and_after_those_they_wait_for(tmp_path):
    log, done = tmp_path / "log", []
    # `a` and `c` end only after both have started, so each needs the other beside it.
    code = """
import sys, time
path, name = sys.argv[1:]
def write(event):
    with open(path, "a") as log:
        log.write(f"{event} {name}\\n")
write("start")
while name in "ac" and not {"start a", "start c"} <= set(open(path).read().splitlines()):
    time.sleep(0.05)
write("end")
"""

    def job(name, *after):
        command = python(code, log, name)
        return Job(name, command, tmp_path / name, after=after, done=lambda: done.append(name))

    run_jobs([job("a"), job("b", "c"), job("c"), job("d")], 2, Screen())
    events = [line.split() for line in log.read_text().splitlines()]
    running, most = set(), 0
    for _, name in events:
        running ^= {name}
        most = max(most, len(running))
    assert most == 2 and sorted(done) == list("abcd")
    assert {name for _, name in events[:2]} == {"a", "c"}
    assert events.index(["end", "c"]) < events.index(["start", "b"])


def test_the_status_names_what_runs_and_how_far_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jobs, "SECONDS_BETWEEN_LINES", 0)
    code = "import time; time.sleep(0.1)"
    job = Job("labels", python(code), tmp_path, so_far=lambda: " (3 images)")
    run_jobs([job], 1, Screen(), overall=lambda: "1/2 iterations")
    assert "labels (3 images): 1/2 iterations" in capsys.readouterr().out


def test_a_failure_is_told_with_the_log_and_the_others_go_on(tmp_path):
    threads = "import os; print(os.environ['OMP_NUM_THREADS'])"

    def refuse():
        raise InputError("another AP than recorded")

    def fill():
        raise OSError("no space left")

    def forget():
        raise KeyError("segm")

    (tmp_path / "a file").touch()
    failing = [
        Job("nowhere", python(""), tmp_path / "a file" / "folder"),
        Job("unexpected", python(""), tmp_path / "unexpected", done=forget),
        Job("bad", python("raise KeyError('x')"), tmp_path / "bad"),
        Job("killed", python("import os; os.kill(os.getpid(), 9)"), tmp_path / "killed"),
        Job("after bad", python(""), tmp_path / "after", after=("bad",)),
        Job("after that", python(""), tmp_path / "that", after=("after bad",)),
        Job("wrong", python(""), tmp_path / "wrong", done=refuse),
        Job("after wrong", python(""), tmp_path / "after", after=("wrong",)),
        Job("full", python(""), tmp_path / "full", done=fill),
        Job("good", python(threads), tmp_path / "good"),
    ]
    expected = (
        r".*Not a directory.*; unexpected: KeyError\('segm'\); "
        r"bad failed; the end of its log '.*bad/console.txt': KeyError: 'x'; "
        "after bad could not be run; after that could not be run; "
        "killed was ended by signal 9, perhaps because memory ran out; its log is '[^']*'; "
        "another AP than recorded; after wrong could not be run; no space left"
    )
    with pytest.raises(InputError, match=expected):
        run_jobs(failing, 1, Screen())
    assert (tmp_path / "good" / CONSOLE).read_text().strip() == "1"  # thread
    assert not (tmp_path / "that").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_end_of_a_run_ends_what_it_started(tmp_path, number):
    job = Job("sleeper", python(SLEEPER, tmp_path / "pid"), tmp_path / "sleeper")

    def study():
        run.run = lambda args, screen: run_jobs([job], 1, screen)
        run.main(["--grid", "x"])

    process = fork(study, [tmp_path / "printed.txt"] * 2)
    pid = wait_for(tmp_path / "pid")
    process.send_signal(number)
    assert process.wait(60) == 1
    stopped = "run.py: stopped; started again, it goes on where it was\n"
    assert (tmp_path / "printed.txt").read_text().endswith(stopped)
    assert not Path(f"/proc/{pid}").exists()


def test_a_signal_while_a_job_starts_ends_it_too(tmp_path, monkeypatch):
    start, started = jobs.start, []

    def interrupted(job):
        started.append(start(job))
        os.kill(os.getpid(), signal.SIGINT)
        return started[-1]

    monkeypatch.setattr(jobs, "start", interrupted)
    sleeper = Job("sleeper", python("import time; time.sleep(60)"), tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_jobs([sleeper], 1, Screen())
    finally:
        signal.signal(signal.SIGINT, before)
    assert started[0].returncode == -signal.SIGTERM


def test_what_outlives_a_killed_run_keeps_others_out(tmp_path):
    def starter():
        with locked(tmp_path):
            jobs.start(Job("child", python(SLEEPER, tmp_path / "pid"), tmp_path / "child"))
            time.sleep(60)

    program = fork(starter, [tmp_path / "printed.txt"] * 2)
    child = wait_for(tmp_path / "pid")
    program.kill()
    program.wait()
    try:
        with pytest.raises(InputError, match="that it left behind"), locked(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_folder_without_locks_is_used_all_the_same(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(jobs.fcntl, "flock", flock)
    with locked(tmp_path):
        said = capsys.readouterr().out
    assert said == f"'{tmp_path}' cannot be locked (No locks available): start no other run there\n"


def test_the_last_error_of_a_log(tmp_path):
    log = tmp_path / "log"
    log.write_text("[10:00 d2.x]: ok\nTraceback\nValueError: too small\n[W1120] warning\n\n")
    assert last_error(log) == "ValueError: too small"
    log.write_text("[10:00 d2.x]: ok\ntrain_net.py: the file 'x' does not exist\n")
    assert last_error(log) == "train_net.py: the file 'x' does not exist"
    log.write_text("")
    assert last_error(log) == "it printed nothing"


def test_the_state_of_a_training(tmp_path):
    assert iterations_done(tmp_path) == training_seconds(tmp_path) == 0
    assert gradient_ratio(tmp_path) is None

    def log(folder, *lines, end="\n"):
        folder.mkdir(exist_ok=True)
        (folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)) + end)

    first = {"iteration": 39, "total_loss": 2.4, "time": 0.3, "kd/gradient_ratio": 0.2}
    last = {"iteration": 59, "total_loss": 2.3, "time": 0.5}
    # The last line is being written, the one before is an evaluation's.
    log(tmp_path, first, last, {"bbox/AP": 3.0}, end='\n{"iteration": 79, "total_lo')
    assert iterations_done(tmp_path) == 60 and gradient_ratio(tmp_path) == 0.2
    assert training_seconds(tmp_path) == pytest.approx(40 * 0.3 + 20 * 0.5)
    # A full disk cut a line, which the resumed training completed. Steps done again count once.
    again = {**last, "iteration": 49, "time": 1.0}
    log(tmp_path, first, last, again, end='\n{"iteration": 79, "to{"iteration": 59, "time": 9}\n')
    assert training_seconds(tmp_path) == pytest.approx(40 * 0.3 + 10 * 1.0 + 10 * 0.5)
    assert iterations_done(tmp_path) == 50 and gradient_ratio(tmp_path) == 0.2
    # The stages of a ladder count together; its gradient ratio is that of the last.
    log(tmp_path / "stage_01_a", last)
    log(tmp_path / "stage_02_b", {**first, "kd/gradient_ratio": 0.0})
    assert iterations_done(tmp_path) == 100 and gradient_ratio(tmp_path) == 0.0
    assert training_seconds(tmp_path) == pytest.approx(42)
