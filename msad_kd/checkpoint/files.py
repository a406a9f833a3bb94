"""Files that are complete or absent even if the process that writes them is killed."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a path to write to, and move that file to ``path`` when the block ends.

    Missing folders are created. If the block raises, ``path`` stays as it was.
    """
    part = Path(f"{os.fspath(path)}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, content: Any, *, indent: int | None = 2) -> None:
    """Write a JSON file; numbers of NumPy and PyTorch become floats."""
    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=indent, default=float) + "\n")


def hash_file(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
