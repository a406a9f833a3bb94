"""Runs commands side by side, one a core, and tells on one line how far each has come."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Several threads in each of several processes slow one another down more than tenfold.
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
CONSOLE = "console.txt"
POLL_SECONDS = 0.5
SECONDS_BETWEEN_LINES = 30
SECONDS_TO_STOP = 10


class DemoError(RuntimeError):
    """What ends the demo: one sentence for the person who started it."""


@dataclass
class Job:
    """A command to run.

    Attributes:
        name: what people call it.
        command: the program and its arguments.
        folder: gets what the command prints, as `CONSOLE`, and its results.
        after: names of jobs that have to be done before.
        progress: from the folder to a few words on how far it is; empty when it cannot be told.
        watch: called every so often while the command runs, and once after it.
        done: called after the command has succeeded.
        resumes: whether the command goes on with what it finds in its folder, which is emptied
            before otherwise.
    """

    name: str
    command: list[str]
    folder: Path
    after: tuple[str, ...] = ()
    progress: Callable[[Path], str] = lambda folder: ""
    watch: Callable[[], None] = lambda: None
    done: Callable[[], None] = lambda: None
    resumes: bool = False


def count_cores():
    """The number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def clock(seconds):
    """Seconds as people read them: 65 is "1:05"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def typed(command):
    """A command as one would type it in the current folder."""
    program = Path(command[0])
    if program.is_absolute() and program.is_relative_to(Path.cwd()):
        program = program.relative_to(Path.cwd())
    return shlex.join([str(program), *command[1:]])


class Screen:
    """Lines that stay, each with the time since the start, and one below them that changes.

    Where the output is no terminal the changing line is printed now and then instead.
    """

    def __init__(self, stream=None):
        self.stream = stream or sys.stdout
        self.start = time.monotonic()
        self.last_status = self.start
        self.width = 0

    def seconds(self):
        """Seconds since the start."""
        return time.monotonic() - self.start

    def say(self, text=""):
        """Prints a line that stays."""
        self._clear()
        stamp = f"[{clock(self.seconds()):>5}] " if text else ""
        print(stamp + text, file=self.stream, flush=True)

    def status(self, text):
        """Shows how things stand."""
        if self.stream.isatty():
            self._clear()
            columns = shutil.get_terminal_size().columns
            shown = f"[{clock(self.seconds()):>5}] {text}"[: columns - 1]
            self.width = len(shown)
            print(shown, end="", file=self.stream, flush=True)
        elif time.monotonic() - self.last_status > SECONDS_BETWEEN_LINES:
            self.last_status = time.monotonic()
            self.say(text)

    def _clear(self):
        if self.width:
            print(f"\r{' ' * self.width}\r", end="", file=self.stream)
            self.width = 0


def last_error(log):
    """The last line of a log that tells of an error; the last one of all if none does."""
    try:
        text = log.read_text(errors="replace")
    except OSError:
        text = ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"([\w.]*(Error|Exception)\b|\w+\.py: )", line)]
    return (errors or lines or ["it printed nothing"])[-1]


def _start(job):
    if not job.resumes:
        shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir(parents=True, exist_ok=True)
    with open(job.folder / CONSOLE, "a" if job.resumes else "w") as console:
        return subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ONE_THREAD},
            close_fds=False,  # it inherits what is meant to be inherited: the lock of `locked`
        )


def _failure(job, code):
    log = job.folder / CONSOLE
    if code < 0:
        hint = ", perhaps for want of memory" if -code == signal.SIGKILL else ""
        return f"{job.name} was ended by signal {-code}{hint}; its log is '{log}'"
    return f"{job.name} failed; the end of its log '{log}': {last_error(log)}"


def _stop(processes):
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + SECONDS_TO_STOP
    for process in processes:
        try:
            process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def run_jobs(jobs, slots, screen, overall=None):
    """Runs jobs in their order, at most `slots` at once, each as soon as those it waits for are
    done. Whatever goes wrong, none is left running.

    Args:
        overall: for a long list. Returns a few words on how far all of it is; and where a job fails
            the others go on, but for those that wait for it.

    Raises:
        DemoError: one failed; the others have been stopped, or with `overall`, have been run.
    """
    waiting, running, finished, failures = list(jobs), {}, set(), {}
    try:
        while waiting or running:
            for job in [job for job in waiting if not failures.keys().isdisjoint(job.after)]:
                waiting.remove(job)
                failures[job.name] = f"{job.name} could not be run"
            for job in list(waiting):
                if len(running) < slots and finished.issuperset(job.after):
                    waiting.remove(job)
                    screen.say(f"{job.name}: started")
                    running[job.name] = (job, _start(job), time.monotonic())
            unaffected = all(failures.keys().isdisjoint(job.after) for job in waiting)
            if waiting and not running and unaffected:
                raise ValueError(f"{waiting[0].name} waits for jobs that never run")
            for name, (job, process, started) in list(running.items()):
                code = process.poll()
                if code:
                    del running[name]
                    failures[name] = _failure(job, code)
                    if not overall:
                        raise DemoError(failures[name])
                    screen.say(failures[name])
                    continue
                job.watch()
                if code == 0:
                    del running[name]
                    finished.add(name)
                    screen.say(f"{name}: done in {clock(time.monotonic() - started)}")
                    job.done()
            if running:
                each = [
                    f"{name}: {job.progress(job.folder) or 'under way'}"
                    for name, (job, _, _) in running.items()
                ]
                screen.status(" | ".join([overall(), *each] if overall else each))
                time.sleep(POLL_SECONDS)
    finally:
        _stop([process for _, process, _ in running.values()])
    if failures:
        raise DemoError("; ".join(failures.values()))
