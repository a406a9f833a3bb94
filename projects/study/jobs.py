"""Runs commands side by side, each with one thread, and prints how far they are."""

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from msad_kd.utils.errors import InputError
from msad_kd.utils.signals import EXIT_CODES

# Several threads in each of several processes slow one another down more than tenfold.
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
CONSOLE = "console.txt"
POLL_SECONDS, SECONDS_BETWEEN_LINES, SECONDS_TO_STOP = 0.5, 30, 60  # the last: to save


@dataclass
class Job:
    """A command to run."""

    name: str  # unique
    command: list[str]
    folder: Path  # what the command prints goes to CONSOLE in it
    after: tuple[str, ...] = ()  # names of jobs that must be done first
    done: Callable[[], None] = lambda: None  # called once the command has succeeded
    so_far: Callable[[], str] = lambda: ""  # how far it is, where `overall` of run_jobs is not


def count_cores():
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class Screen:
    """Prints lines with the time since the start."""

    def __init__(self):
        self.start = self.last_status = time.monotonic()

    def say(self, text):
        """Print a line."""
        print(f"[{tqdm.format_interval(time.monotonic() - self.start)}] {text}", flush=True)

    def status(self, describe):
        """Print what `describe` returns, every now and then."""
        if time.monotonic() - self.last_status > SECONDS_BETWEEN_LINES:
            self.last_status = time.monotonic()
            self.say(describe())


@contextlib.contextmanager
def locked(folder):
    """Keep other runs out of a folder, or say that one is at work there."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            # Child processes inherit the lock, so it also tells of trainings that outlived a run.
            os.set_inheritable(lock.fileno(), True)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another run, or a training that it left behind, is at work in '{folder}': wait "
                "for it, or choose another --output"
            ) from None
        except OSError as error:  # some network file systems
            print(f"'{folder}' cannot be locked ({error.strerror}): start no other run there")
        yield


def last_error(log):
    """Return the last line of a log that names an error, or else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    errors = [line for line in lines if re.match(r"([\w.]*(Error|Exception)\b|\w+\.py: )", line)]
    return (errors or list(filter(None, lines)) or ["it printed nothing"])[-1]


def start(job):
    """Start a job's command and return its process."""
    job.folder.mkdir(parents=True, exist_ok=True)
    with open(job.folder / CONSOLE, "w") as console:
        return subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ONE_THREAD},
            close_fds=False,  # the process inherits the lock of `locked`
            start_new_session=True,  # a Ctrl-C then reaches it once, by `_stop`, and it saves
        )


@contextlib.contextmanager
def _signals_held():
    """Handle signals only afterwards, so that no process is started and then forgotten."""
    held, numbers = [], (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {n: signal.getsignal(n) for n in numbers if callable(signal.getsignal(n))}
    for number in handlers:
        signal.signal(number, lambda *arguments: held.append(arguments))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number, frame in held:
            handlers[number](number, frame)


def run_jobs(jobs, slots, screen, overall=lambda: "at work"):
    """Run jobs in their order, at most `slots` at a time, each after those it waits for.

    When a job fails, the jobs that do not wait for it still run. Whatever ends this function, what
    it started is ended, too, unless a second signal cuts that short. `overall` says how far all
    jobs are together.
    """
    waiting, running, finished, failures = list(jobs), {}, set(), {}

    def fail(name, error):
        known = isinstance(error, (InputError, OSError))
        if not known:
            traceback.print_exception(error)
        failures[name] = str(error) if known else f"{name}: {error!r}"
        screen.say(failures[name])

    try:
        while waiting or running:
            for job in list(waiting):
                if failures.keys() & set(job.after):
                    waiting.remove(job)
                    failures[job.name] = f"{job.name} could not be run"
                elif len(running) < slots and finished.issuperset(job.after):
                    waiting.remove(job)
                    screen.say(f"{job.name}: started")
                    try:
                        with _signals_held():
                            running[job.name] = (job, start(job), time.monotonic())
                    except OSError as error:
                        fail(job.name, error)
            for name, (job, process, began) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                try:
                    if process.returncode:
                        raise InputError(_failure(job, process.returncode))
                    screen.say(f"{name}: done in {tqdm.format_interval(time.monotonic() - began)}")
                    job.done()
                    finished.add(name)
                except Exception as error:  # the other jobs go on
                    fail(name, error)
            if running:
                screen.status(
                    lambda: f"{', '.join(map(_described, running.values()))}: {overall()}"
                )
            time.sleep(POLL_SECONDS if running else 0)
    finally:
        _stop([process for _, process, _ in running.values()])
    if failures:
        raise InputError("; ".join(failures.values()))


def _described(running):
    job, _, _ = running
    return job.name + job.so_far()


def _failure(job, code):
    log = job.folder / CONSOLE
    if code in EXIT_CODES:
        code = 128 - code
    if code < 0:
        hint = ", perhaps because memory ran out" if -code == signal.SIGKILL else ""
        return f"{job.name} was ended by signal {-code}{hint}; its log is '{log}'"
    return f"{job.name} failed; the end of its log '{log}': {last_error(log)}"


def _stop(processes):
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
