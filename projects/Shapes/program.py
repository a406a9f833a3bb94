"""What the demo and the study share as programs: options, the data, and an end in one sentence."""

import contextlib
import fcntl
import os
import signal
import sys
from pathlib import Path

from projects.Shapes.generate import generate
from projects.Shapes.jobs import DemoError, Screen


def add_common(parser):
    """Adds --overwrite and --set, whose pairs are in `settings`."""
    add = parser.add_argument
    add("--overwrite", action="store_true", help="replace a data set made with other arguments")
    add(
        "--set",
        nargs=2,
        action="extend",
        default=[],
        metavar=("KEY", "VALUE"),
        dest="settings",
        help="a config key for all trainings, for a trial run; may be given several times",
    )


def make_data(name, options, overwrite, screen):
    """Generates a data set in $DETECTRON2_DATASETS, or keeps the one that is there.

    Raises:
        DemoError: it cannot be made, or another is in its place.
    """
    folder = Path(os.getenv("DETECTRON2_DATASETS", "datasets")) / name
    screen.say(f"Data: {', '.join(f'{k} {v}' for k, v in options.items())} in '{folder}'")
    try:
        written = generate(folder, **options, overwrite=overwrite)
    except (ValueError, OSError) as error:
        raise DemoError(f"{error} (DETECTRON2_DATASETS says where the folder is)") from None
    screen.say("Data: complete" if written else "Data: there already, kept")


@contextlib.contextmanager
def locked(folder):
    """Keeps other runs of the program out of a folder.

    Raises:
        DemoError: one is at it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            # The lock goes with the process and all that it starts, so it tells of trainings that
            # outlived a killed one, too.
            os.set_inheritable(lock.fileno(), True)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DemoError(
                f"another run is at work in '{folder}', or what it had started: wait for it, or "
                "choose another --output"
            ) from None
        yield


def run_program(name, run, args, stopped, errors=(DemoError,)):
    """Calls `run(args, screen)`; an error that the person can mend, a SIGTERM or Ctrl-C ends the
    program with a sentence, and the trainings that it started with it.

    Args:
        name: of the program.
        stopped: what the person should know where it was stopped from outside.
        errors: those that are a sentence for the person.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(f"{name}: terminated; {stopped}"))
    screen = Screen()
    try:
        run(args, screen)
    except errors as error:
        screen.say("Stopped")
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        screen.say("Interrupted")
        sys.exit(f"{name}: interrupted; {stopped}")
