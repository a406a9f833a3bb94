"""OUTPUT_DIR: one run at a time is at work in it, and a new run moves the old one aside."""

import errno
import fcntl
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.engine.hooks import PeriodicWriter
from detectron2.utils.events import EventWriter

from msad_kd.checkpoint.checkpointer import LAST, has_checkpoint
from msad_kd.utils.errors import InputError
from msad_kd.utils.flat_config import flatten_config
from msad_kd.utils.processes import in_main_process

LOCK, METRICS, ASIDE = ".run.lock", "metrics.json", "previous_run_{}"
# The marks of a run, which a new one would write over or go on from, and what belongs to it.
_MARKS = (LAST, "model_[0-9]*.pth", "model_final.pth", METRICS, "DONE")  # DONE: a ladder's stage
_REST = ("model_[0-9]*.pth.*", "model_final.pth.*", "model_best*", "student.pth*")
_REST += ("events.out.tfevents.*",)
_REST += ("inference*/**/*_results.json", "inference*/**/instances_predictions.pth")
_LEAST_BYTES = 1 << 20  # logs and configs take some 100 kB
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

_logger = logging.getLogger(__name__)
_locks: dict[str, IO] = {}  # the lock files of this process's runs, by folder


def make_folder(folder: str) -> None:
    """Make OUTPUT_DIR, and check that files can be written there.

    Raises:
        InputError: if it is empty, or no folder that can be written to.
    """
    if not folder:
        raise InputError("OUTPUT_DIR is empty; name the folder that the run writes to")

    def make():
        with _explained(folder):
            os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(_LEAST_BYTES))

    in_main_process(make)


@contextmanager
def _explained(folder: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"OUTPUT_DIR '{folder}' cannot be written to ({error.strerror}); name another "
            "folder, or make room and give leave to write"
        ) from error


def take_folder(cfg: CfgNode, *, resume: bool) -> str | None:
    """Lock OUTPUT_DIR for this process's run, and move an old run aside unless it is resumed.

    Nothing is deleted: the old run's files are moved to ``OUTPUT_DIR/previous_run_<n>``. Every
    process has to call this; the main process holds the lock.

    Args:
        cfg: the config of the run.
        resume: whether to go on with the folder's run, if it has a checkpoint.

    Returns:
        The folder that the old run was moved to; None if there was none.

    Raises:
        InputError: in all processes, if another run is at work in the folder, if it cannot be
            written to, or if the config reads a file of the old run.
    """
    lock_folder(cfg.OUTPUT_DIR)
    return in_main_process(
        lambda: None if resume and has_checkpoint(cfg.OUTPUT_DIR) else move_aside(cfg)
    )


def lock_folder(folder: str) -> None:
    """Lock OUTPUT_DIR, in the main process, until ``release_folder`` or the end of the process.

    Raises:
        InputError: in all processes, if another process has locked it.
    """
    make_folder(folder)
    in_main_process(lambda: _lock(folder))


def release_folder(folder: str) -> None:
    """Unlock OUTPUT_DIR if this process has locked it."""
    if file := _locks.pop(os.path.realpath(folder), None):
        file.close()


@contextmanager
def folder_locked(folder: str) -> Iterator[None]:
    """Keep other runs out of OUTPUT_DIR until the last file is written."""
    lock_folder(folder)
    try:
        yield
    finally:
        release_folder(folder)


def _lock(folder: str) -> None:
    key = os.path.realpath(folder)
    if key in _locks:
        return
    with _explained(folder):
        file = open(os.path.join(folder, LOCK), "a+")
    try:
        # This kind of lock belongs to the process alone. One of flock would outlive it in the
        # loader's workers, and block a run that is resumed right after a kill.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        with file:
            file.seek(0)
            owner = file.read(200).strip()
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            _logger.warning(f"OUTPUT_DIR '{folder}' cannot be locked ({error.strerror})")
            return
        raise InputError(
            f"another run ({owner}) is at work in OUTPUT_DIR '{folder}'; wait for its end, or name "
            "another OUTPUT_DIR"
        ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    _locks[key] = file


def move_aside(cfg: CfgNode) -> str | None:
    """Move an old run in OUTPUT_DIR aside, as ``take_folder`` does; for the main process alone."""
    folder = Path(cfg.OUTPUT_DIR)
    old = {path for pattern in _MARKS for path in folder.glob(pattern)}
    # Every trainer makes metrics.json, and fills it in the first steps.
    if not any(path.name != METRICS or path.stat().st_size for path in old):
        return None
    old |= {path for pattern in _REST for path in folder.glob(pattern)}
    keys = {
        os.path.realpath(text.partition("#sha256=")[0]): key
        for key, value in flatten_config(cfg).items()
        for text in _texts(value)
    }
    for path in sorted(old):
        if key := keys.get(os.path.realpath(path)):
            raise InputError(
                f"{key} reads '{path}', which belongs to the old run in OUTPUT_DIR '{folder}', and "
                "a new run would move it aside; name another OUTPUT_DIR for the new run, or go on "
                "with the old one by --resume"
            )
    number = 1
    while (aside := folder / ASIDE.format(number)).exists():
        number += 1
    aside.mkdir()
    for path in old:
        target = aside / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(path, target)
    if (folder / "config.yaml").is_file():  # copied: the new one may have been written already
        shutil.copy(folder / "config.yaml", aside)
    _logger.warning("An old run in '%s' was moved to '%s'", folder, aside)
    return str(aside)


def reopen_writers(hooks: Iterable[HookBase], build: Callable[[], list[EventWriter]]) -> None:
    """Let the writers of hooks write new files, after those that they had opened were moved."""
    for hook in hooks:
        if isinstance(hook, PeriodicWriter):
            for writer in hook._writers:
                writer.close()
            hook._writers[:] = build()


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in a value of a config."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


@contextmanager
def explain_disk_errors() -> Iterator[None]:
    """Turn the error of a disk that is full or read-only into one sentence.

    Raises:
        InputError: instead of it; if it came up while another was being raised, that one.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        before = error
        while before := before.__context__:
            if isinstance(before, InputError):
                raise before from None
        name = f" to '{error.filename}'" if error.filename else ""
        raise InputError(
            f"nothing can be written{name} ({error.strerror}); make room on the disk of OUTPUT_DIR "
            "and use --resume"
        ) from error
