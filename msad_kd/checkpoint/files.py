"""Files that are complete or absent even if the process that writes them is killed."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from msad_kd.utils.hashes import CHECKSUM, hash_file

PART = ".part"  # suffix of an unfinished file


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a path to write to, and move that file to ``path`` when the block ends.

    The file is on disk before it is moved, so that a power cut leaves the old or the new one.
    Missing folders are created. If the block raises, ``path`` stays as it was.
    """
    part = Path(f"{os.fspath(path)}{PART}")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield part
        _sync(part)
        os.replace(part, path)
        with suppress(OSError):  # not every file system lets a folder be synced
            _sync(part.parent)
    finally:
        part.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing_with_checksum(path: str | os.PathLike) -> Iterator[Path]:
    """Do what ``replacing`` does, and write the file's SHA-256 to ``<path>.sha256``.

    A process that is killed in between leaves a complete file without checksum, never one with the
    checksum of another.
    """
    checksum = Path(f"{os.fspath(path)}{CHECKSUM}")
    with replacing(path) as part:
        yield part
        digest = hash_file(part)
        checksum.unlink(missing_ok=True)
    with replacing(checksum) as part:
        part.write_text(f"{digest}  {os.path.basename(path)}\n")  # what "sha256sum -c" reads


def write_json(path: str | os.PathLike, content: Any, *, indent: int | None = 2) -> None:
    """Write a JSON file; numbers of NumPy and PyTorch become floats."""
    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=indent, default=float) + "\n")
