"""Runs commands side by side, one a core, and tells on one line how far each has come."""

import json
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

import yaml

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
        folder: emptied before; gets what the command prints, as `CONSOLE`, and its results.
        after: names of jobs that have to be done before.
        progress: from the folder to a few words on how far it is; empty when it cannot be told.
        watch: called every so often while the command runs, and once after it.
        done: called after the command has succeeded.
    """

    name: str
    command: list[str]
    folder: Path
    after: tuple[str, ...] = ()
    progress: Callable[[Path], str] = lambda folder: ""
    watch: Callable[[], None] = lambda: None
    done: Callable[[], None] = lambda: None


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


def read_settings(folder):
    """The config of a run, as Detectron2 wrote it into its folder; {} if it is not there yet."""
    try:
        return yaml.safe_load((folder / "config.yaml").read_text()) or {}
    except (OSError, yaml.YAMLError):
        return {}


def training_progress(folder):
    """Iteration, loss and time left of a run of `train_net.py`; empty before its 20th iteration."""
    try:
        lines = (folder / "metrics.json").read_text().splitlines()
    except OSError:
        return ""
    for line in reversed(lines):
        try:
            metrics = json.loads(line)
        except ValueError:  # being written
            continue
        if "total_loss" in metrics:
            total = read_settings(folder).get("SOLVER", {}).get("MAX_ITER", "?")
            left = clock(metrics.get("eta_seconds", 0))
            done = metrics["iteration"] + 1
            return f"{done}/{total}, loss {metrics['total_loss']:.2f}, {left} left"
    return ""


def evaluation_progress(folder, models=1):
    """Images seen by a run of `measure.py evaluate` that has to evaluate `models` models."""
    try:
        log = (folder / "log.txt").read_text()
    except OSError:
        return ""
    begun = log.split("Start inference on")
    images = re.findall(r"Inference done (\d+/\d+)", begun[-1])
    if len(begun) == 1 or not images:
        return ""
    return f"{images[-1]} images" + (f", model {len(begun) - 1} of {models}" if models > 1 else "")


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
    shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir(parents=True)
    with open(job.folder / CONSOLE, "w") as console:
        return subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ONE_THREAD},
        )


def _check(job, code):
    if code == 0:
        return
    log = job.folder / CONSOLE
    if code < 0:
        hint = ", perhaps for want of memory" if -code == signal.SIGKILL else ""
        raise DemoError(f"{job.name} was ended by signal {-code}{hint}; its log is '{log}'")
    raise DemoError(f"{job.name} failed; the end of its log '{log}': {last_error(log)}")


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


def run_jobs(jobs, slots, screen):
    """Runs jobs in their order, at most `slots` at once, each as soon as those it waits for are
    done. Whatever goes wrong, none is left running.

    Raises:
        DemoError: one failed; the others have been stopped.
    """
    waiting, running, finished = list(jobs), {}, set()
    try:
        while waiting or running:
            for job in list(waiting):
                if len(running) < slots and finished.issuperset(job.after):
                    waiting.remove(job)
                    screen.say(f"{job.name}: started")
                    running[job.name] = (job, _start(job), time.monotonic())
            if not running:
                raise ValueError(f"{waiting[0].name} waits for jobs that never run")
            for name, (job, process, started) in list(running.items()):
                code = process.poll()
                if code is not None:
                    _check(job, code)
                job.watch()
                if code is not None:
                    del running[name]
                    finished.add(name)
                    screen.say(f"{name}: done in {clock(time.monotonic() - started)}")
                    job.done()
            if running:
                screen.status(
                    " | ".join(
                        f"{name}: {job.progress(job.folder) or 'under way'}"
                        for name, (job, _, _) in running.items()
                    )
                )
                time.sleep(POLL_SECONDS)
    finally:
        _stop([process for _, process, _ in running.values()])
