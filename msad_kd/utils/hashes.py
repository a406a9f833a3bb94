"""SHA-256 of files: after the ``#`` of a path, or in a file beside it."""

import hashlib
import os
import re

from msad_kd.utils.errors import InputError

CHECKSUM = ".sha256"  # suffix of the file beside


def hash_file(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def split_hash(path: str) -> tuple[str, str | None]:
    """Split ``path#sha256=<hash>`` into the path and the hash, None without one.

    Raises:
        InputError: if the hash is not 64 hexadecimal digits.
    """
    file, mark, digest = os.fspath(path).partition("#sha256=")
    if mark and not re.fullmatch("[0-9a-fA-F]{64}", digest):
        raise InputError(
            f"'{path}' has no SHA-256 after '{mark}': write its 64 hexadecimal digits, as the "
            "command sha256sum prints them"
        )
    return file, digest.lower() or None


def check_hash(file: str, path: str) -> None:
    """Check a file against the hash in its path or, without one, the ``<file>.sha256`` beside it.

    Args:
        file: the local file.
        path: what the user calls it, with its hash if it has one.

    Raises:
        InputError: if they disagree.
    """
    address, expected = split_hash(path)
    beside = f"{file}{CHECKSUM}"
    if expected:
        if (digest := hash_file(file)) != expected:
            copy = "" if file == address else f" (downloaded to '{file}')"
            raise InputError(
                f"'{address}' has the SHA-256 {digest} instead of the one after '#'{copy}; it is "
                "another file or damaged: take the right one, or correct the hash"
            )
    elif os.path.isfile(beside):
        with open(beside, errors="replace") as stream:
            words = stream.read().lower().split(maxsplit=1)
        if words[:1] != [hash_file(file)]:
            raise InputError(
                f"'{file}' has changed since it was written: its SHA-256 is not the one in "
                f"'{beside}'; take another copy, or delete '{beside}' to trust it as it is"
            )
