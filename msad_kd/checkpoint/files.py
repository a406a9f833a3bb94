"""Files that are whole or not there, whenever the process that writes them is killed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["hash_file", "replacing", "write_json"]


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a path beside ``path`` to write to; it takes its place when the block ends.

    Folders on the way are made. If the block raises, ``path`` stays as it is and what was written
    goes.
    """
    part = Path(f"{os.fspath(path)}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, content: Any, *, indent: int | None = 2) -> None:
    """Write a JSON file, with NumPy's and PyTorch's numbers as the floats they are."""
    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=indent, default=float) + "\n")


def hash_file(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
