"""The error for what a user gave and the program cannot use."""

import difflib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """A file, config key or level cannot be used; the message says what to change.

    ``train_net.py`` prints the message without a traceback.
    """


class NotFiniteError(InputError, FloatingPointError):
    """A loss is NaN or infinite; the message names it, its images and the last checkpoint."""


@contextmanager
def in_one_sentence(program: str) -> Iterator[None]:
    """End the program with one sentence and exit code 1 at an error that its user can mend.

    That is an ``InputError``, or a file that cannot be read or written.
    """
    try:
        yield
    except (InputError, OSError) as error:
        sys.exit(f"{program}: {error}")


def input_error_of(error: Exception) -> str | None:
    """Return the message of an ``InputError``, or None for any other error.

    A data loader's worker and a launched process pass on their error as the text of a traceback.
    It ends with the error's qualified name and its message, so the message is found there too.
    """
    text = str(error).rstrip()
    for cls in (InputError, NotFiniteError):
        _, mark, message = text.rpartition(f"{cls.__module__}.{cls.__qualname__}: ")
        if mark:
            return message
    return text if isinstance(error, InputError) else None


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean x?" for the known name nearest to ``name``, or "" if none is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def first_line(error: Exception) -> str:
    """Return the kind of an error and the first line that it says."""
    lines = str(error).split("\n")
    said = next((line.strip()[:200] for line in lines if line.strip()), "")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
